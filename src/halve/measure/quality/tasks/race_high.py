"""`race-h`: RACE's questions for senior high school; the test set from the hub when no data is given."""

from halve.measure.quality.race import HUB_RACE
from halve.measure.quality.tasks.question_task import QuestionTask

RACE_HIGH = QuestionTask("race-h", HUB_RACE, search_questions=(HUB_RACE[0], HUB_RACE[1], "validation"))
