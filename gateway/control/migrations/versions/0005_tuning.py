"""Files, fine-tuning jobs with their events, and batches; longer names, for fine-tuned models."""

import sqlalchemy as sa
from alembic import op

revision = "0005_tuning"
down_revision = "0004_adapter_pins"

_NAMES = (
    ("adapters", "name"),
    ("adapter_versions", "adapter_name"),
    ("aliases", "adapter_name"),
    ("adapter_history", "adapter_name"),
    ("adapter_pins", "name"),
)


def upgrade() -> None:
    op.create_table(
        "api_objects",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("kind", sa.String(16), nullable=False, index=True),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("record", sa.JSON, nullable=False),
    )
    op.create_table(
        "fine_tuning_events",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("job_id", sa.String(64), nullable=False, index=True),
        sa.Column("record", sa.JSON, nullable=False),
    )
    if op.get_bind().dialect.name == "postgresql":  # SQLite holds no column to a length
        for table, column in _NAMES:
            op.alter_column(table, column, type_=sa.String(255))


def downgrade() -> None:
    for table in ("fine_tuning_events", "api_objects"):
        op.drop_table(table)
