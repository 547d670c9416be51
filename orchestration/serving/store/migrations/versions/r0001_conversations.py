"""Conversations, messages, prompts, answers and feedback."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("consent", sa.Boolean(), nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
    )
    op.create_index("conversations_of_owner", "conversations", ["owner", "created", "id"])
    op.create_table(
        "messages",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("extra", sa.JSON()),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.UniqueConstraint("conversation_id", "position", name="one_message_per_position"),
    )
    op.create_table(
        "prompts",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id", ondelete="CASCADE")),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
    )
    op.create_index("prompts_of_owner", "prompts", ["owner"])
    op.create_index("prompts_of_conversation", "prompts", ["conversation_id"])
    op.create_table(
        "answers",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("prompt_id", sa.String(64), sa.ForeignKey("prompts.id", ondelete="CASCADE"), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
    )
    op.create_index("answers_of_prompt", "answers", ["prompt_id"])
    op.create_table(
        "feedback",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.Column("consent", sa.Boolean(), nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
    )
    op.create_index("feedback_of_owner", "feedback", ["owner"])
    op.create_table(
        "feedback_answers",
        sa.Column("feedback_id", sa.String(64), sa.ForeignKey("feedback.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("answer_id", sa.String(64), sa.ForeignKey("answers.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer(), nullable=False),
    )
    op.create_index("feedback_of_answer", "feedback_answers", ["answer_id"])


def downgrade() -> None:
    for table in ("feedback_answers", "feedback", "answers", "prompts", "messages", "conversations"):
        op.drop_table(table)
