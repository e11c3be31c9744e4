"""The two sets of questions of a search, which share no article with each other or with the calibration text."""

from __future__ import annotations

from pathlib import Path

from halve.errors import DataError
from halve.measure.quality.options import EvaluationOptions
from halve.measure.quality.race import QuestionSet, load_question_set
from halve.measure.quality.splits import divide, shared_articles, without_shared
from halve.measure.quality.tasks.question_task import QuestionTask
from halve.studies.search.options import SearchOptions


def search_and_final(
    task: QuestionTask, asked: EvaluationOptions, options: SearchOptions
) -> tuple[QuestionSet, QuestionSet]:
    """The questions of the trials and those of the final test."""
    if asked.data is None and task.questions is None:
        load_question_set(None, None)  # says what is missing
    questions = load_question_set(asked.data, task.search_questions)
    if options.held_out_data is None and asked.data is not None:
        return divide(questions, options.search_share)
    final = load_question_set(options.held_out_data, task.questions)
    leave_out = options.leave_out_shared or asked.data is None
    return without_shared(questions, final) if leave_out else questions, final


def check_overlaps(questions: QuestionSet, final: QuestionSet, calibration: str, documents: list[str] | None) -> None:
    """Nothing of the final test may have been searched or calibrated on, nothing of the search calibrated on.

    documents: those of the calibration text, None where no step reads it.
    """
    pairs = [(final, [q.article for q in {q.article: q for q in questions.questions}.values()], questions.name)]
    if documents is not None:
        pairs += [(s, documents, f"calibration text {Path(calibration).name}") for s in (final, questions)]
    for data, texts, source in pairs:
        shared = shared_articles(data, texts)
        if shared:
            articles = len({q.article for q in data.questions})
            raise DataError(
                f"{data.name}: {len(shared)} of its {articles} articles are in {source} as well (the first is "
                f"{shared[0].article_id}): the figures would be too good; take them out of one of the two"
                f"{' (--leave-out-shared does, of the search questions)' if source == questions.name else ''}"
            )
