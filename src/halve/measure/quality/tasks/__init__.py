"""What can be asked of a model: a file per task, an entry in TASKS."""

from collections.abc import Mapping
from typing import Any

from halve.measure.quality.task import Task
from halve.measure.quality.tasks.multiple_choice import MULTIPLE_CHOICE
from halve.measure.quality.tasks.perplexity import PERPLEXITY
from halve.measure.quality.tasks.question_task import QuestionTask
from halve.measure.quality.tasks.race_high import RACE_HIGH

TASKS: dict[str, Task] = {task.name: task for task in (PERPLEXITY, RACE_HIGH, MULTIPLE_CHOICE)}
QUESTION_TASKS = {name: task for name, task in TASKS.items() if isinstance(task, QuestionTask)}


def figure_of(record: Mapping[str, Any]) -> str:
    """The figure an evaluation record is about; accuracy for a task that this version does not know."""
    task = TASKS.get(record.get("task", ""))
    return "accuracy" if task is None else task.figure
