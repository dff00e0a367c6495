"""Where names pointed before, where they will point, canaries, aliases, and the history of all that."""

import sqlalchemy as sa
from alembic import op

revision = "0003_versions"
down_revision = "0002_api_keys"


def upgrade() -> None:
    op.add_column("adapters", sa.Column("previous_version", sa.Integer, nullable=True))
    op.add_column("adapters", sa.Column("coming", sa.JSON, nullable=True))
    op.add_column("adapters", sa.Column("canary", sa.JSON, nullable=True))
    op.create_table(
        "aliases",
        sa.Column("alias", sa.String(96), primary_key=True),
        sa.Column(
            "adapter_name",
            sa.String(96),
            sa.ForeignKey("adapters.name", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
        sa.Column("version", sa.Integer, nullable=True),
    )
    op.create_table(
        "adapter_history",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column(
            "adapter_name",
            sa.String(96),
            sa.ForeignKey("adapters.name", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
        sa.Column("at", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("from_version", sa.Integer, nullable=True),
        sa.Column("to_version", sa.Integer, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("figures", sa.JSON, nullable=True),
    )


def downgrade() -> None:
    for table in ("adapter_history", "aliases"):
        op.drop_table(table)
    for column in ("canary", "coming", "previous_version"):
        op.drop_column("adapters", column)
