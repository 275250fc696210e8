"""Shares of organisations and keys when requests wait, residency, and the history of the serving configuration."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _add_columns(
        "organisations",
        sa.Column("share_weight", sa.Integer, nullable=False, server_default="100"),
        sa.Column("max_priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column("residency", sa.Text, nullable=False, server_default=""),
    )
    _add_columns(
        "api_keys",
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column("weight", sa.Integer, nullable=False, server_default="100"),
    )
    op.create_table(
        "serving_configurations",
        sa.Column("revision", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("actor_id", sa.Text, nullable=False),
        sa.Column("actor_name", sa.Text, nullable=False),
        sa.Column("origin", sa.Text, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("document", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("revision", name="pk_serving_configurations"),
    )


def downgrade() -> None:
    op.drop_table("serving_configurations")
    with op.batch_alter_table("api_keys") as table:
        for column in ("priority", "weight"):
            table.drop_column(column)
    with op.batch_alter_table("organisations") as table:
        for column in ("share_weight", "max_priority", "residency"):
            table.drop_column(column)


def _add_columns(table: str, *columns: sa.Column[object]) -> None:
    """Adds `columns`; their defaults are for the rows that are there, and go again."""
    for column in columns:
        op.add_column(table, column)
    # SQLite copies the table here, once.
    with op.batch_alter_table(table) as batch:
        for column in columns:
            batch.alter_column(column.name, existing_type=column.type, server_default=None)
