"""Limits, budgets, prices; journals, the ledger of requests and its roll-ups.

On PostgreSQL the ledger is partitioned by month: `auth/ledger` makes the months as they come, and the partition without
bounds that is made here takes what belongs to none. On the way down all of it is dropped.
"""

from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# In the order in which they can be dropped.
_NEW_TABLES: Final = (
    "usage_daily_tags",
    "usage_daily",
    "usage_hourly",
    "requests",
    "journals",
    "prices",
    "price_versions",
    "budget_events",
    "budgets",
    "limits",
)


def upgrade() -> None:
    _create_policies()
    _create_prices()
    _create_ledger()
    _create_roll_up("usage_hourly")
    _create_roll_up("usage_daily")
    _create_roll_up("usage_daily_tags", "tag", "tag_value")


def downgrade() -> None:
    for name in _NEW_TABLES:
        # With its partitions, where it has some.
        op.drop_table(name)


def _create_policies() -> None:
    op.create_table(
        "limits",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("scope", sa.Integer, nullable=False),
        sa.Column("subject_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("metric", sa.Integer, nullable=False),
        sa.Column("value", sa.BigInteger, nullable=False),
        sa.Column("burst", sa.BigInteger, nullable=False),
        sa.Column("imposed", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_limits"),
        sa.UniqueConstraint(
            "organisation_id", "scope", "subject_id", "model", "metric", "imposed", name="uq_limits_organisation_id"
        ),
    )
    op.create_index("ix_limits_organisation_id", "limits", ["organisation_id", "created_at", "id"])
    op.create_table(
        "budgets",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("scope", sa.Integer, nullable=False),
        sa.Column("subject_id", sa.Text, nullable=False),
        sa.Column("unit", sa.Integer, nullable=False),
        sa.Column("period", sa.Integer, nullable=False),
        sa.Column("cap", sa.BigInteger, nullable=False),
        sa.Column("thresholds", sa.JSON, nullable=False),
        sa.Column("imposed", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_budgets"),
        sa.UniqueConstraint(
            "organisation_id", "scope", "subject_id", "unit", "period", "imposed", name="uq_budgets_organisation_id"
        ),
    )
    op.create_index("ix_budgets_organisation_id", "budgets", ["organisation_id", "created_at", "id"])
    op.create_table(
        "budget_events",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("budget_id", sa.Text, nullable=False),
        sa.Column("period_start", sa.BigInteger, nullable=False),
        sa.Column("threshold", sa.Integer, nullable=False),
        sa.Column("spent", sa.BigInteger, nullable=False),
        sa.Column("cap", sa.BigInteger, nullable=False),
        sa.Column("unit", sa.Integer, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_budget_events"),
        sa.UniqueConstraint("budget_id", "period_start", "threshold", name="uq_budget_events_budget_id"),
    )
    op.create_index("ix_budget_events_organisation_id", "budget_events", ["organisation_id", "at", "id"])


def _create_prices() -> None:
    op.create_table(
        "price_versions",
        sa.Column("version", sa.Text, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_price_versions"),
    )
    op.create_table(
        "prices",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("subject_kind", sa.Text, nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("price_version", sa.Text, nullable=False),
        sa.Column("valid_from", sa.BigInteger, nullable=False),
        sa.Column("valid_to", sa.BigInteger),
        sa.Column("ended_by", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_prices"),
        sa.ForeignKeyConstraint(["price_version"], ["price_versions.version"], name="fk_prices_price_version"),
    )
    op.create_index("ix_prices_subject", "prices", ["subject_kind", "subject", "valid_from"], unique=True)


def _create_ledger() -> None:
    op.create_table(
        "journals",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("node_id", sa.Text, nullable=False),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("quarantined", sa.BigInteger, nullable=False),
        sa.Column("opened_at", sa.BigInteger, nullable=False),
        sa.Column("shipped_at", sa.BigInteger),
        sa.Column("closed_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_journals"),
    )
    op.create_index("ix_journals_closed_at", "journals", ["closed_at"])
    op.create_table(
        "requests",
        sa.Column("call_id", sa.Text, nullable=False),
        sa.Column("admitted_at_ms", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("project_id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("deployment", sa.Text, nullable=False),
        sa.Column("dialect", sa.Text, nullable=False),
        sa.Column("operation", sa.Text, nullable=False),
        sa.Column("stream", sa.Boolean, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("error", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("estimated", sa.Boolean, nullable=False),
        sa.Column("queue_ms", sa.BigInteger, nullable=False),
        sa.Column("first_token_ms", sa.BigInteger, nullable=False),
        sa.Column("duration_ms", sa.BigInteger, nullable=False),
        sa.Column("engine_ms", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.BigInteger, nullable=False),
        sa.Column("price_version", sa.Text, nullable=False),
        sa.Column("tags", sa.Text, nullable=False),
        sa.Column("explanation", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("call_id", "admitted_at_ms", name="pk_requests"),
        postgresql_partition_by="RANGE (admitted_at_ms)",
    )
    op.create_index("ix_requests_organisation_id", "requests", ["organisation_id", "admitted_at_ms"])
    op.create_index("ix_requests_request_id", "requests", ["request_id", "admitted_at_ms"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE TABLE requests_default PARTITION OF requests DEFAULT")


def _create_roll_up(name: str, *keys: str) -> None:
    subject = ("project_id", "key_id", "user_id", "model", "deployment", "operation")
    grouped_by = ("organisation_id", "start", *keys, *subject)
    sums = (
        "requests",
        "failed_requests",
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "reasoning_tokens",
        "cost",
    )
    op.create_table(
        name,
        *(sa.Column(key, sa.BigInteger if key == "start" else sa.Text, nullable=False) for key in grouped_by),
        *(sa.Column(column, sa.BigInteger, nullable=False) for column in sums),
        sa.PrimaryKeyConstraint(*grouped_by, name=f"pk_{name}"),
        sqlite_with_rowid=False,
        postgresql_with={"fillfactor": 50},
    )
