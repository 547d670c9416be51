"""Answers as they were given, and feedback on them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.orm import Session

from orchestration.serving.store.conversations import owned
from orchestration.serving.store.records import (
    KINDS,
    Deleted,
    Feedback,
    Kind,
    Learned,
    NotFound,
    Refused,
    digest_of,
    new_name,
    text_of,
    visible,
)
from orchestration.serving.store.tables import AnswerRow, ConversationRow, FeedbackAnswerRow, FeedbackRow, PromptRow
from orchestration.serving.store.transactions import Transactions
from orchestration.serving.store.withdrawing import withdraw


class Answers(Transactions):
    """The part of the store that holds what was thought of answers."""

    def record_answer(
        self, owner: str, prompt: Sequence[Any], answers: str | Sequence[str], model: str, conversation: str | None = None
    ) -> list[str]:
        """Keep one or more answers to a prompt; their identifiers, in order, are what feedback names.

        Args:
            prompt: the messages that the user could see, as `{"role": …, "content": …}`; hidden instructions must not be among them. Other
                fields are dropped.
            model: the version of the model that answered.
            conversation: the conversation they belong to, and are deleted with.
        """
        texts = [text_of(a, f"answer {n}", empty=True) for n, a in enumerate([answers] if isinstance(answers, str) else answers, start=1)]
        messages, names, prompt_id = visible(prompt), [new_name("ans") for _ in texts], new_name("prompt")
        text_of(owner, "owner")

        def work(session: Session) -> list[str]:
            if session.get(PromptRow, prompt_id) is not None:
                return names
            if conversation is not None:
                owned(session, owner, conversation)
            session.add(
                PromptRow(
                    id=prompt_id, owner=owner, conversation_id=conversation, messages=messages, digest=digest_of(messages),
                    model=model, created=time.time(),
                )
            )  # fmt: skip
            session.flush()
            rows = zip(names, texts, strict=True)
            session.add_all(AnswerRow(id=name, prompt_id=prompt_id, position=n, content=text) for n, (name, text) in enumerate(rows))
            return names

        return self._write(work)

    def given(self, owner: str, conversation: str) -> list[tuple[str, str, str]]:
        """Answers recorded of a conversation, oldest first: each one's identifier, the digest of its prompt (`digest_of`) and its text."""

        def work(session: Session) -> list[tuple[str, str, str]]:
            owned(session, owner, conversation)
            query = (
                select(AnswerRow.id, PromptRow.digest, AnswerRow.content)
                .join(PromptRow, PromptRow.id == AnswerRow.prompt_id)
                .where(PromptRow.owner == owner, PromptRow.conversation_id == conversation)
                .order_by(PromptRow.created, AnswerRow.position)
            )
            return [(row.id, row.digest, row.content) for row in session.execute(query)]

        return self._read(work)

    def add_feedback(self, owner: str, kind: Kind, answers: Sequence[str], value: str, consent: bool = False) -> Feedback:
        """Keep what the owner thinks of answers that were given to them. Said again (another thumb, another choice), it replaces what was
        said before; comments add up.

        Args:
            answers: one answer; for a choice, two or more to the same prompt.
            value: thumbs: `up` or `down`. comment, edit: a text. choice: the better answer's identifier, or `tie`.

        Raises:
            Refused: a kind, value or number of answers that does not fit.
            NotFound: an answer that was not given to this owner.
        """
        _check(kind, answers, value)
        record = Feedback(new_name("fb"), owner, kind, value, tuple(answers), bool(consent), time.time())

        def work(session: Session) -> Feedback:
            if session.get(FeedbackRow, record.id) is not None:
                return record
            query = select(AnswerRow.id, PromptRow.digest).join(PromptRow, PromptRow.id == AnswerRow.prompt_id)
            found = session.execute(query.where(AnswerRow.id.in_(answers), PromptRow.owner == owner)).all()
            if len(found) < len(answers):
                raise NotFound("answer", next(a for a in answers if a not in {row.id for row in found}))
            if len({row.digest for row in found}) > 1:
                raise Refused("a choice is between answers to the same prompt; these have different ones")
            if kind != "comment":
                self._drop(session, _same(session, owner, kind, answers))
            session.add(FeedbackRow(id=record.id, owner=owner, kind=kind, value=value, consent=record.consent, created=record.created))
            session.flush()
            session.add_all(FeedbackAnswerRow(feedback_id=record.id, answer_id=a, position=n) for n, a in enumerate(answers))
            return record

        return self._write(work)

    def feedback(
        self, owner: str, answers: Sequence[str] | None = None, limit: int | None = None, after: str | None = None
    ) -> list[Feedback]:
        """The owner's feedback, oldest first; on these answers only, if given.

        Args:
            limit: of how many, at most; None: all.
            after: the identifier of the last one of the page before.

        Raises:
            NotFound: the owner has no feedback `after`.
        """

        def work(session: Session) -> list[Feedback]:
            query = select(FeedbackRow).where(FeedbackRow.owner == owner).limit(limit)
            if after is not None:
                last = session.scalars(select(FeedbackRow).where(FeedbackRow.id == after, FeedbackRow.owner == owner)).first()
                if last is None:
                    raise NotFound("feedback", after)
                query = query.where(tuple_(FeedbackRow.created, FeedbackRow.id) > (last.created, last.id))
            if answers is not None:
                on = select(FeedbackAnswerRow.feedback_id).where(FeedbackAnswerRow.answer_id.in_(answers))
                query = query.where(FeedbackRow.id.in_(on))
            rows = session.scalars(query.order_by(FeedbackRow.created, FeedbackRow.id)).all()
            return [_feedback(row, _answers_of(session, row.id)) for row in rows]

        return self._read(work)

    def delete_feedback(self, owner: str, identifier: str) -> Deleted:
        """Feedback is gone, and with it the prompt and answers that it was about, where no conversation has them and no other feedback is
        on them.

        Raises:
            NotFound: no such feedback of this owner.
        """

        def work(session: Session) -> Deleted:
            row = session.scalars(select(FeedbackRow).where(FeedbackRow.id == identifier, FeedbackRow.owner == owner)).first()
            if row is None:
                raise NotFound("feedback", identifier)
            about = session.scalars(select(AnswerRow.prompt_id).where(AnswerRow.id.in_(_answers_of(session, identifier))).distinct()).all()
            gone = Deleted((identifier,), self._drop(session, [identifier]))
            _forget(session, about)
            return gone

        return self._delete(work)

    def learnable(self) -> list[Learned]:
        """All feedback that may be learned from, of every owner, oldest first: consent was given with it, and with its conversation if it
        belongs to one. Comments are for people and not among it."""
        return self._read(learnable)

    def _drop(self, session: Session, identifiers: Sequence[str]) -> tuple[str, ...]:
        """Delete feedback; the exported folders that hold rows made from it."""
        folders = withdraw(session, identifiers)
        session.execute(delete(FeedbackRow).where(FeedbackRow.id.in_(identifiers)))
        return folders


def _forget(session: Session, prompts: Sequence[str]) -> None:
    """Delete those of these prompts, with their answers, that nothing needs any more."""
    on = select(AnswerRow.prompt_id).join(FeedbackAnswerRow, FeedbackAnswerRow.answer_id == AnswerRow.id)
    unneeded = PromptRow.id.in_(prompts), PromptRow.conversation_id.is_(None), PromptRow.id.not_in(on)
    session.execute(delete(PromptRow).where(*unneeded), execution_options={"synchronize_session": False})


def _check(kind: str, answers: Sequence[str], value: str) -> None:
    """Raises:
    Refused: see `add_feedback`.
    """
    if kind not in KINDS:
        raise Refused(f"the kind {kind!r:.40} is none of {', '.join(KINDS)}")
    text_of(value, "value")
    if len(set(answers)) < len(answers) or len(answers) < (2 if kind == "choice" else 1) or (kind != "choice" and len(answers) > 1):
        raise Refused(
            f"{kind}: {len(answers)} answers; " + ("two or more different ones are needed" if kind == "choice" else "one is needed")
        )
    if kind == "thumbs" and value not in ("up", "down"):
        raise Refused(f"thumbs: {value!r:.40} is neither up nor down")
    if kind == "choice" and value != "tie" and value not in answers:
        raise Refused(f"choice: {value!r:.80} is none of the answers, nor tie")


def _same(session: Session, owner: str, kind: str, answers: Sequence[str]) -> list[str]:
    """Feedback of the same kind and owner on exactly these answers."""
    matched = func.count().filter(FeedbackAnswerRow.answer_id.in_(answers))
    query = (
        select(FeedbackRow.id)
        .join(FeedbackAnswerRow, FeedbackAnswerRow.feedback_id == FeedbackRow.id)
        .where(FeedbackRow.owner == owner, FeedbackRow.kind == kind)
        .group_by(FeedbackRow.id)
        .having(matched == len(answers), func.count() == len(answers))
    )
    return list(session.scalars(query))


def _answers_of(session: Session, feedback_id: str) -> tuple[str, ...]:
    query = select(FeedbackAnswerRow.answer_id).where(FeedbackAnswerRow.feedback_id == feedback_id).order_by(FeedbackAnswerRow.position)
    return tuple(session.scalars(query))


def _feedback(row: FeedbackRow, answers: tuple[str, ...]) -> Feedback:
    return Feedback(row.id, row.owner, row.kind, row.value, answers, row.consent, row.created)


def learnable(session: Session) -> list[Learned]:
    """See `Answers.learnable`."""
    query = (
        select(FeedbackRow, AnswerRow, PromptRow, ConversationRow.consent)
        .join(FeedbackAnswerRow, FeedbackAnswerRow.feedback_id == FeedbackRow.id)
        .join(AnswerRow, AnswerRow.id == FeedbackAnswerRow.answer_id)
        .join(PromptRow, PromptRow.id == AnswerRow.prompt_id)
        .outerjoin(ConversationRow, ConversationRow.id == PromptRow.conversation_id)
        .where(FeedbackRow.consent.is_(True), FeedbackRow.kind != "comment")
        .order_by(FeedbackRow.created, FeedbackRow.id, FeedbackAnswerRow.position)
    )
    groups: dict[str, list[Any]] = {}
    for row in session.execute(query):
        groups.setdefault(row[0].id, []).append(row)
    return [_learned(rows) for rows in groups.values() if all(row[3] is not False for row in rows)]


def _learned(rows: Sequence[Any]) -> Learned:
    feedback, _, prompt, _ = rows[0]
    return Learned(
        _feedback(feedback, tuple(row[1].id for row in rows)),
        tuple(prompt.messages), prompt.digest, tuple(row[1].content for row in rows), tuple(row[2].model for row in rows),
        prompt.conversation_id,
    )  # fmt: skip
