"""Adapters that are kept loaded."""

import sqlalchemy as sa
from alembic import op

revision = "0004_adapter_pins"
down_revision = "0003_versions"


def upgrade() -> None:
    op.create_table(
        "adapter_pins",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("replicas", sa.Integer, nullable=True),
    )


def downgrade() -> None:
    op.drop_table("adapter_pins")
