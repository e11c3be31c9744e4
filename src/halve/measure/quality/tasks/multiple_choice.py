"""`multiple-choice`: any questions in RACE's layout."""

from halve.measure.quality.tasks.question_task import QuestionTask

MULTIPLE_CHOICE = QuestionTask("multiple-choice")
