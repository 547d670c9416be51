"""The tables of the store as SQLAlchemy classes. `migrations/` makes the same tables; a test compares the two.

    conversations 1-n messages
    conversations 1-n prompts 1-n answers n-n feedback        (a prompt may belong to no conversation)
    exports 1-n exported                                       (which row of which exported folder came from which feedback)
    audits                                                     (what moderation decided; no text)

Times are seconds since 1970, UTC. Identifiers are made by the program, not by the database, so that a write that is tried again after a
lost connection is the same write.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, Boolean, Float, ForeignKey, Index, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAME = 64
"""Characters of an identifier at most."""
OWNER = 255
"""Characters of an owner's name at most."""


class Base(DeclarativeBase):
    """Base of all tables."""


class ConversationRow(Base):
    __tablename__ = "conversations"
    __table_args__ = (Index("conversations_of_owner", "owner", "created", "id"),)

    id: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    owner: Mapped[str] = mapped_column(String(OWNER))
    title: Mapped[str] = mapped_column(Text)
    consent: Mapped[bool] = mapped_column(Boolean)
    created: Mapped[float] = mapped_column(Float(53))


class MessageRow(Base):
    __tablename__ = "messages"
    __table_args__ = (UniqueConstraint("conversation_id", "position", name="one_message_per_position"),)

    id: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    position: Mapped[int] = mapped_column(Integer)
    role: Mapped[str] = mapped_column(String(16))
    content: Mapped[str] = mapped_column(Text)
    model: Mapped[str | None] = mapped_column(Text)
    extra: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created: Mapped[float] = mapped_column(Float(53))


class PromptRow(Base):
    """What the user could see of one request, without hidden instructions."""

    __tablename__ = "prompts"
    __table_args__ = (Index("prompts_of_owner", "owner"), Index("prompts_of_conversation", "conversation_id"))

    id: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    owner: Mapped[str] = mapped_column(String(OWNER))
    conversation_id: Mapped[str | None] = mapped_column(ForeignKey("conversations.id", ondelete="CASCADE"))
    messages: Mapped[list[dict[str, str]]] = mapped_column(JSON)
    digest: Mapped[str] = mapped_column(String(NAME))
    """Of the messages: answers with the same digest answer the same prompt."""
    model: Mapped[str] = mapped_column(Text)
    created: Mapped[float] = mapped_column(Float(53))


class AnswerRow(Base):
    __tablename__ = "answers"
    __table_args__ = (Index("answers_of_prompt", "prompt_id"),)

    id: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    prompt_id: Mapped[str] = mapped_column(ForeignKey("prompts.id", ondelete="CASCADE"))
    position: Mapped[int] = mapped_column(Integer)
    content: Mapped[str] = mapped_column(Text)


class FeedbackRow(Base):
    __tablename__ = "feedback"
    __table_args__ = (Index("feedback_of_owner", "owner"),)

    id: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    owner: Mapped[str] = mapped_column(String(OWNER))
    kind: Mapped[str] = mapped_column(String(16))
    value: Mapped[str] = mapped_column(Text)
    consent: Mapped[bool] = mapped_column(Boolean)
    created: Mapped[float] = mapped_column(Float(53))


class FeedbackAnswerRow(Base):
    """Which answers a piece of feedback is about."""

    __tablename__ = "feedback_answers"
    __table_args__ = (Index("feedback_of_answer", "answer_id"),)

    feedback_id: Mapped[str] = mapped_column(ForeignKey("feedback.id", ondelete="CASCADE"), primary_key=True)
    answer_id: Mapped[str] = mapped_column(ForeignKey("answers.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer)


class ExportRow(Base):
    """A folder that feedback was exported to."""

    __tablename__ = "exports"

    folder: Mapped[str] = mapped_column(Text, primary_key=True)
    created: Mapped[float] = mapped_column(Float(53))


class ExportedRow(Base):
    """One row of an exported file, and one piece of feedback it came from. Outlives the feedback: only so can the copy be told."""

    __tablename__ = "exported"
    __table_args__ = (Index("exported_feedback", "feedback_id"),)

    folder: Mapped[str] = mapped_column(ForeignKey("exports.folder", ondelete="CASCADE"), primary_key=True)
    row_id: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    feedback_id: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    withdrawn: Mapped[bool] = mapped_column(Boolean)
    """The feedback was deleted or its consent taken back, and the copy still has the row."""


class AuditRow(Base):
    """One decision of moderation that was not `allow`, or any that the service wants kept. It holds no text."""

    __tablename__ = "audits"
    __table_args__ = (Index("audits_by_time", "created"), Index("audits_of_owner", "owner"))

    id: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    owner: Mapped[str] = mapped_column(String(OWNER))
    conversation_id: Mapped[str | None] = mapped_column(ForeignKey("conversations.id", ondelete="SET NULL"))
    request_id: Mapped[str | None] = mapped_column(Text)
    direction: Mapped[str] = mapped_column(String(8))
    action: Mapped[str] = mapped_column(String(8))
    categories: Mapped[list[str]] = mapped_column(JSON)
    scores: Mapped[dict[str, float]] = mapped_column(JSON)
    moderator: Mapped[str] = mapped_column(Text)
    model: Mapped[str | None] = mapped_column(Text)
    created: Mapped[float] = mapped_column(Float(53))
