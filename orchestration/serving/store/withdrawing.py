"""Which feedback hangs on which prompts, and the marks on exported rows that may no longer be learned from."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from orchestration.serving.store.tables import AnswerRow, ExportedRow, FeedbackAnswerRow, PromptRow


def feedback_on(session: Session, which: ColumnElement[bool]) -> list[str]:
    """Identifiers of the feedback on answers to these prompts."""
    query = (
        select(FeedbackAnswerRow.feedback_id)
        .join(AnswerRow, AnswerRow.id == FeedbackAnswerRow.answer_id)
        .join(PromptRow, PromptRow.id == AnswerRow.prompt_id)
        .where(which)
        .distinct()
    )
    return sorted(session.scalars(query))


def withdraw(session: Session, feedback: Collection[str]) -> tuple[str, ...]:
    """Mark every exported row that came from this feedback; the folders that hold such rows."""
    if not feedback:
        return ()
    session.execute(
        update(ExportedRow).where(ExportedRow.feedback_id.in_(feedback)).values(withdrawn=True),
        execution_options={"synchronize_session": False},
    )
    query = select(ExportedRow.folder).where(ExportedRow.feedback_id.in_(feedback)).distinct()
    return tuple(sorted(session.scalars(query)))
