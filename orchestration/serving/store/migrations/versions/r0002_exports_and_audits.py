"""What was exported where, so that copies can be told of deletions, and what moderation decided."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "exports",
        sa.Column("folder", sa.Text(), primary_key=True),
        sa.Column("created", sa.Float(53), nullable=False),
    )
    op.create_table(
        "exported",
        sa.Column("folder", sa.Text(), sa.ForeignKey("exports.folder", ondelete="CASCADE"), primary_key=True),
        sa.Column("row_id", sa.String(64), primary_key=True),
        sa.Column("feedback_id", sa.String(64), primary_key=True),
        sa.Column("withdrawn", sa.Boolean(), nullable=False),
    )
    op.create_index("exported_feedback", "exported", ["feedback_id"])
    op.create_table(
        "audits",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("conversation_id", sa.String(64), sa.ForeignKey("conversations.id", ondelete="SET NULL")),
        sa.Column("request_id", sa.Text()),
        sa.Column("direction", sa.String(8), nullable=False),
        sa.Column("action", sa.String(8), nullable=False),
        sa.Column("categories", sa.JSON(), nullable=False),
        sa.Column("scores", sa.JSON(), nullable=False),
        sa.Column("moderator", sa.Text(), nullable=False),
        sa.Column("model", sa.Text()),
        sa.Column("created", sa.Float(53), nullable=False),
    )
    op.create_index("audits_by_time", "audits", ["created"])
    op.create_index("audits_of_owner", "audits", ["owner"])


def downgrade() -> None:
    for table in ("audits", "exported", "exports"):
        op.drop_table(table)
