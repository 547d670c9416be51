"""What moderation decided, kept without the text it decided on, and which folders feedback was exported to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from orchestration.serving.store.answers import learnable
from orchestration.serving.store.records import Audit
from orchestration.serving.store.tables import AuditRow, ConversationRow, ExportedRow, ExportRow
from orchestration.serving.store.transactions import Transactions


class Audits(Transactions):
    """The part of the store that says what happened."""

    def audit(self, record: Audit) -> None:
        """Keep a decision. That of a conversation which is gone by now is kept without it."""

        def work(session: Session) -> None:
            if session.get(AuditRow, record.id) is not None:
                return
            there = record.conversation_id and session.get(ConversationRow, record.conversation_id)
            session.add(
                AuditRow(
                    id=record.id, owner=record.owner, conversation_id=record.conversation_id if there else None,
                    request_id=record.request_id, direction=record.direction, action=record.action, categories=list(record.categories),
                    scores=dict(record.scores), moderator=record.moderator, model=record.model,
                    created=time.time() if record.created is None else record.created,
                )
            )  # fmt: skip

        self._write(work)

    def audits(self, since: float = 0.0, limit: int = 100, owner: str | None = None) -> list[Audit]:
        """Decisions from a time on, newest first."""

        def work(session: Session) -> list[Audit]:
            query = select(AuditRow).where(AuditRow.created >= since).order_by(AuditRow.created.desc(), AuditRow.id).limit(limit)
            return [_audit(row) for row in session.scalars(query if owner is None else query.where(AuditRow.owner == owner))]

        return self._read(work)

    def _forget_audits(self, session: Session, owner: str) -> None:
        session.execute(delete(AuditRow).where(AuditRow.owner == owner))

    def note_export(self, folder: str, rows: Mapping[str, Sequence[str]]) -> None:
        """Remember which rows a folder now holds, and which feedback each came from; what it held before is forgotten. Feedback that was
        taken back since it was read is marked at once."""

        def work(session: Session) -> None:
            session.execute(delete(ExportedRow).where(ExportedRow.folder == folder))
            if session.get(ExportRow, folder) is None:
                session.add(ExportRow(folder=folder, created=time.time()))
                session.flush()
            given = {item.feedback.id for item in learnable(session)}
            pairs = [(row, feedback) for row, sources in rows.items() for feedback in sources]
            session.add_all(ExportedRow(folder=folder, row_id=r, feedback_id=f, withdrawn=f not in given) for r, f in pairs)

        self._write(work)

    def exports_to_tell(self) -> dict[str, list[str]]:
        """For each exported folder that holds rows which may no longer be learned from: these rows' identifiers."""

        def work(session: Session) -> dict[str, list[str]]:
            query = select(ExportedRow.folder, ExportedRow.row_id).where(ExportedRow.withdrawn.is_(True)).distinct()
            found: dict[str, set[str]] = {}
            for folder, row in session.execute(query.order_by(ExportedRow.folder, ExportedRow.row_id)):
                found.setdefault(folder, set()).add(row)
            return {folder: sorted(rows) for folder, rows in found.items()}

        return self._read(work)

    def told(self, folder: str, rows: Sequence[str]) -> None:
        """These rows are no longer in that folder."""
        self._write(lambda session: session.execute(delete(ExportedRow).where(ExportedRow.folder == folder, ExportedRow.row_id.in_(rows))))


def _audit(row: AuditRow) -> Audit:
    return Audit(
        row.owner, row.direction, row.action, tuple(row.categories), dict(row.scores), row.moderator,  # type: ignore[arg-type]
        row.conversation_id, row.request_id, row.model, row.id, row.created,
    )  # fmt: skip
