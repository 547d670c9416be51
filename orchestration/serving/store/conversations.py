"""Conversations and their messages. Every query names the owner: what belongs to another owner is not found."""

from __future__ import annotations

import json
import time
from typing import Any

from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.orm import Session

from orchestration.serving.store.records import ROLES, Conversation, Deleted, Message, NotFound, Refused, new_name, text_of
from orchestration.serving.store.tables import (
    OWNER,
    ConversationRow,
    FeedbackRow,
    MessageRow,
    PromptRow,
)
from orchestration.serving.store.transactions import Transactions
from orchestration.serving.store.withdrawing import feedback_on, withdraw


class Conversations(Transactions):
    """The part of the store that holds what was said."""

    def new_conversation(self, owner: str, *, title: str = "", consent: bool = False) -> Conversation:
        """Raises:
        Refused: an empty or over-long owner, or text that no database holds.
        """
        if len(text_of(owner, "owner")) > OWNER:
            raise Refused(f"owner has {len(owner)} characters; at most {OWNER}")
        record = Conversation(new_name("conv"), owner, text_of(title, "title", empty=True), consent, time.time())

        def work(session: Session) -> None:
            if session.get(ConversationRow, record.id) is None:  # else an earlier try got through
                session.add(ConversationRow(id=record.id, owner=owner, title=title, consent=consent, created=record.created))

        self._write(work)
        return record

    def conversation(self, owner: str, identifier: str) -> Conversation:
        """Raises:
        NotFound: no such conversation of this owner; of all methods that take one.
        """
        return self._read(lambda session: _conversation(owned(session, owner, identifier)))

    def conversations(self, owner: str, limit: int = 20, after: str | None = None) -> list[Conversation]:
        """The owner's conversations, newest first.

        Args:
            after: the identifier of the last one of the page before.
        """

        def work(session: Session) -> list[Conversation]:
            query = select(ConversationRow).where(ConversationRow.owner == owner)
            if after is not None:
                last = owned(session, owner, after)
                query = query.where(tuple_(ConversationRow.created, ConversationRow.id) < (last.created, last.id))
            query = query.order_by(ConversationRow.created.desc(), ConversationRow.id.desc()).limit(max(limit, 0))
            return [_conversation(row) for row in session.scalars(query)]

        return self._read(work)

    def update_conversation(self, owner: str, identifier: str, *, title: str | None = None, consent: bool | None = None) -> Conversation:
        """Consent that is taken back withdraws what was exported from the conversation; see `exports_to_tell`."""
        if title is not None:
            text_of(title, "title", empty=True)

        def work(session: Session) -> Conversation:
            row = owned(session, owner, identifier, lock=True)
            row.title = row.title if title is None else title
            if consent is False and row.consent:
                withdraw(session, feedback_on(session, PromptRow.conversation_id == identifier))
            row.consent = row.consent if consent is None else consent
            return _conversation(row)

        return self._write(work)

    def delete_conversation(self, owner: str, identifier: str) -> Deleted:
        """Its messages, the prompts and answers recorded of it, and all feedback on them, whoever gave it, are gone."""

        def work(session: Session) -> Deleted:
            row = owned(session, owner, identifier, lock=True)
            found = feedback_on(session, PromptRow.conversation_id == identifier)
            folders = withdraw(session, found)
            session.execute(delete(FeedbackRow).where(FeedbackRow.id.in_(found)))
            session.delete(row)
            return Deleted(tuple(found), folders)

        return self._delete(work)

    def delete_owner(self, owner: str) -> Deleted:
        """Everything that this owner said, was answered, or gave as feedback, and all feedback of others on it."""

        def work(session: Session) -> Deleted:
            own = session.scalars(select(FeedbackRow.id).where(FeedbackRow.owner == owner))
            found = sorted({*own, *feedback_on(session, PromptRow.owner == owner)})
            folders = withdraw(session, found)
            session.execute(delete(FeedbackRow).where(FeedbackRow.id.in_(found)))
            session.execute(delete(PromptRow).where(PromptRow.owner == owner))
            session.execute(delete(ConversationRow).where(ConversationRow.owner == owner))
            self._forget_audits(session, owner)
            return Deleted(tuple(found), folders)

        return self._delete(work)

    def _forget_audits(self, session: Session, owner: str) -> None:
        """What an owner's audits become when the owner is deleted; see `Audits`."""
        raise NotImplementedError

    def add_message(
        self,
        owner: str,
        conversation_id: str,
        role: str,
        content: str,
        *,
        model: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Message:
        """Append a message.

        Raises:
            Refused: an unknown role, or text that no database holds.
        """
        fresh = _fresh(role, content, model, extra)

        def work(session: Session) -> Message:
            owned(session, owner, conversation_id, lock=True)
            return _append(session, conversation_id, fresh)

        return self._write(work)

    def messages(self, owner: str, conversation_id: str) -> list[Message]:
        """All messages, oldest first."""

        def work(session: Session) -> list[Message]:
            owned(session, owner, conversation_id)
            query = select(MessageRow).where(MessageRow.conversation_id == conversation_id).order_by(MessageRow.position)
            return [_message(row) for row in session.scalars(query)]

        return self._read(work)

    def replace_from(
        self,
        owner: str,
        conversation_id: str,
        message_id: str,
        content: str | None = None,
        *,
        role: str | None = None,
        model: str | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Message | None:
        """Cut a conversation before a message, and say something else there (None: nothing, the turn is to be written anew).

        The role stays what it was unless another is given. Answers that were recorded with `record_answer`, and feedback on them, stay:
        that a turn was regenerated is what a choice between its answers is about."""
        fresh = None if content is None else _fresh(role or "user", content, model, extra)

        def work(session: Session) -> Message | None:
            owned(session, owner, conversation_id, lock=True)
            if fresh is not None and (done := session.get(MessageRow, fresh.id)) is not None:
                return _message(done)
            row = session.get(MessageRow, message_id)
            if row is None or row.conversation_id != conversation_id:
                raise NotFound("message", message_id)
            kept = role or row.role
            session.execute(
                delete(MessageRow).where(MessageRow.conversation_id == conversation_id, MessageRow.position >= row.position),
                execution_options={"synchronize_session": False},
            )
            session.expunge(row)
            return None if fresh is None else _append(session, conversation_id, MessageRow(**(_values(fresh) | {"role": kept})))

        return self._delete(work)


def owned(session: Session, owner: str, identifier: str, lock: bool = False) -> ConversationRow:
    """A conversation of this owner.

    Args:
        lock: nobody else may change it until the transaction ends (PostgreSQL; SQLite has one writer).

    Raises:
        NotFound: there is none.
    """
    query = select(ConversationRow).where(ConversationRow.id == identifier, ConversationRow.owner == owner)
    row = session.scalars(query.with_for_update() if lock else query).first()
    if row is None:
        raise NotFound("conversation", identifier)
    return row


def _fresh(role: str, content: str, model: str | None, extra: dict[str, Any] | None) -> MessageRow:
    if role not in ROLES:
        raise Refused(f"the role {role!r:.40} is none of {', '.join(ROLES)}")
    text_of(content, "content", empty=True)
    if extra is not None:
        try:
            text_of(json.dumps(extra, ensure_ascii=False, allow_nan=False).replace("\\u0000", "\0"), "extra")
        except (TypeError, ValueError, RecursionError) as cause:
            raise Refused(f"extra is not JSON that a database can hold ({cause})") from cause
    return MessageRow(id=new_name("msg"), role=role, content=content, model=model, extra=extra, created=time.time())


def _values(row: MessageRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("id", "role", "content", "model", "extra", "created")}


def _append(session: Session, conversation_id: str, fresh: MessageRow) -> Message:
    """Raises nothing when an earlier try of the same call got through: the message is already there."""
    if (done := session.get(MessageRow, fresh.id)) is not None:
        return _message(done)
    last = session.scalar(select(func.max(MessageRow.position)).where(MessageRow.conversation_id == conversation_id))
    row = MessageRow(**_values(fresh), conversation_id=conversation_id, position=0 if last is None else last + 1)
    session.add(row)
    session.flush()
    return _message(row)


def _conversation(row: ConversationRow) -> Conversation:
    return Conversation(row.id, row.owner, row.title, row.consent, row.created)


def _message(row: MessageRow) -> Message:
    return Message(row.id, row.conversation_id, row.position, row.role, row.content, row.model, row.extra, row.created)
