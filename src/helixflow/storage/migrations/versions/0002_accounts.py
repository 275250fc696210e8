"""Accounts, roles, sessions, signing keys, the audit log; keys with owners and restrictions; changes for gateways.

Existing keys keep what they could do: use all models, in their project. On the way down, a key that revision 0001 would
give more power than it has is revoked, and what 0001 has no place for is dropped.
"""

import time
from typing import Final

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_SCOPES: Final = '["models:read", "models:use"]'

# In the order in which they can be made.
_NEW_TABLES: Final = (
    "audit_heads",
    "audit_records",
    "changes",
    "idempotency_keys",
    "installation",
    "sign_in_attempts",
    "sign_in_failures",
    "signing_keys",
    "accounts",
    "audit_checkpoints",
    "roles",
    "service_accounts",
    "memberships",
    "one_time_tokens",
    "recovery_codes",
    "sessions",
    "refresh_tokens",
)


def upgrade() -> None:
    _extend_tables()
    _create_tables()
    connection = op.get_bind()
    # Gateways compare numbers: none may come again.
    last = connection.scalar(sa.text("SELECT max(revision) FROM revocations")) or 0
    statement = sa.text("INSERT INTO installation (name, number, data) VALUES ('revision', :last, :data)")
    connection.execute(statement, {"last": last, "data": b""})
    op.drop_table("revocations")


def downgrade() -> None:
    _create_revocations()
    _revoke_what_would_gain()
    _number_revocations()
    for name in reversed(_NEW_TABLES):
        op.drop_table(name)
    with op.batch_alter_table("api_keys") as table:
        for name in ("organisation_id", "project_id", "owner_id", "rotated_from"):
            table.drop_index(f"ix_api_keys_{name}")
        for column in (
            "owner_id",
            "scopes",
            "models",
            "networks",
            "created_by",
            "rotated_from",
            "updated_at",
            "version",
        ):
            table.drop_column(column)
        table.create_index("ix_api_keys_created_at", ["created_at"])
    with op.batch_alter_table("projects") as table:
        table.drop_index("ix_projects_organisation_id")
        for column in ("updated_at", "deleted_at", "version"):
            table.drop_column(column)
    with op.batch_alter_table("organisations") as table:
        for column in ("audit_retention_days", "updated_at", "deleted_at", "version"):
            table.drop_column(column)


def _extend_tables() -> None:
    _add_columns(
        "organisations",
        sa.Column("audit_retention_days", sa.Integer, nullable=False, server_default="0"),
        sa.Column("deleted_at", sa.BigInteger),
    )
    _add_columns("projects", sa.Column("deleted_at", sa.BigInteger))
    op.create_index("ix_projects_organisation_id", "projects", ["organisation_id", "created_at", "id"])
    _add_columns(
        "api_keys",
        sa.Column("owner_id", sa.Text, nullable=False, server_default=""),
        sa.Column("scopes", sa.JSON, nullable=False, server_default=_SCOPES),
        sa.Column("models", sa.JSON, nullable=False, server_default="[]"),
        sa.Column("networks", sa.JSON, nullable=False, server_default="[]"),
        sa.Column("created_by", sa.Text, nullable=False, server_default=""),
        sa.Column("rotated_from", sa.Text),
    )
    op.execute("UPDATE api_keys SET scopes = '[]' WHERE bootstrap")
    op.drop_index("ix_api_keys_created_at", "api_keys")
    op.create_index("ix_api_keys_organisation_id", "api_keys", ["organisation_id", "created_at", "id"])
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"])
    op.create_index("ix_api_keys_owner_id", "api_keys", ["owner_id"])
    op.create_index("ix_api_keys_rotated_from", "api_keys", ["rotated_from"], unique=True)


def _add_columns(table: str, *columns: sa.Column[object]) -> None:
    """Adds `columns`, `updated_at` and `version`; their defaults are for the rows that are there, and go again."""
    columns += (
        sa.Column("updated_at", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("version", sa.BigInteger, nullable=False, server_default="1"),
    )
    for column in columns:
        op.add_column(table, column)
    op.execute(f"UPDATE {table} SET updated_at = created_at")  # noqa: S608  (our own names)
    # SQLite copies the table here, once.
    with op.batch_alter_table(table) as batch:
        for column in columns:
            if column.server_default is not None:
                batch.alter_column(column.name, existing_type=column.type, server_default=None)


def _create_revocations() -> None:
    op.create_table(
        "revocations",
        sa.Column("revision", sa.Integer, nullable=False, autoincrement=True),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("revoked_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("revision", name="pk_revocations"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_revocations_key_id"),
        sqlite_autoincrement=True,
    )


def _revoke_what_would_gain() -> None:
    """0001 knows neither restrictions nor owners, and nothing that is deleted or suspended but single keys."""
    statement = sa.text(
        """
        UPDATE api_keys SET revoked_at = :now, superseded = :no
        WHERE revoked_at IS NULL AND (
            owner_id <> ''
            OR CAST(models AS TEXT) <> '[]'
            OR CAST(networks AS TEXT) <> '[]'
            OR (NOT bootstrap AND CAST(scopes AS TEXT) NOT LIKE '%"models:use"%')
            OR (NOT bootstrap AND CAST(scopes AS TEXT) NOT LIKE '%"models:read"%')
            OR organisation_id IN (SELECT id FROM organisations WHERE deleted_at IS NOT NULL)
            OR project_id IN (SELECT id FROM projects WHERE deleted_at IS NOT NULL)
        )
        """
    )
    op.execute(statement.bindparams(now=int(time.time()), no=False))


def _number_revocations() -> None:
    """The revocations end with the number of the last change, so that numbers go on growing."""
    connection = op.get_bind()
    last = connection.scalar(sa.text("SELECT number FROM installation WHERE name = 'revision'")) or 0
    count = connection.scalar(sa.text("SELECT count(*) FROM api_keys WHERE revoked_at IS NOT NULL")) or 0
    before = max(last - count, 0)
    connection.execute(
        sa.text(
            """
            INSERT INTO revocations (revision, key_id, revoked_at)
            SELECT :before + row_number() OVER (ORDER BY revoked_at, id), id, revoked_at
            FROM api_keys WHERE revoked_at IS NOT NULL
            """
        ),
        {"before": before},
    )
    if connection.dialect.name == "postgresql" and before + count:
        statement = sa.text("SELECT setval(pg_get_serial_sequence('revocations', 'revision'), :last)")
        connection.execute(statement, {"last": before + count})


def _create_tables() -> None:
    op.create_table(
        "audit_heads",
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("pruned_sequence", sa.BigInteger, nullable=False),
        sa.Column("pruned_hash", sa.LargeBinary(32), nullable=False),
        sa.PrimaryKeyConstraint("organisation_id", name="pk_audit_heads"),
    )
    op.create_table(
        "audit_records",
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor_kind", sa.Text, nullable=False),
        sa.Column("actor_id", sa.Text, nullable=False),
        sa.Column("actor_name", sa.Text, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("target_kind", sa.Text, nullable=False),
        sa.Column("target_id", sa.Text, nullable=False),
        sa.Column("before", sa.Text, nullable=False),
        sa.Column("after", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("previous_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.PrimaryKeyConstraint("organisation_id", "sequence", name="pk_audit_records"),
    )
    op.create_index("ix_audit_records_at", "audit_records", ["organisation_id", "at"])
    for column in ("actor_id", "action", "outcome", "target_id"):
        op.create_index(f"ix_audit_records_{column}", "audit_records", ["organisation_id", column, "sequence"])
    op.create_table(
        "changes",
        sa.Column("revision", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("kind", sa.Integer, nullable=False),
        sa.Column("subject_id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("key_hash", sa.LargeBinary(32)),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("revision", name="pk_changes"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("caller_id", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("response", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("caller_id", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_table(
        "installation",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_installation"),
    )
    op.create_table(
        "sign_in_attempts",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("email_subject", sa.LargeBinary(32), nullable=False),
        sa.Column("address_subject", sa.LargeBinary(32)),
        sa.Column("began_at", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_sign_in_attempts"),
    )
    op.create_table(
        "sign_in_failures",
        sa.Column("subject", sa.LargeBinary(32), nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("counted_at", sa.BigInteger, nullable=False),
        sa.Column("locked_until", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("subject", name="pk_sign_in_failures"),
    )
    op.create_index("ix_sign_in_failures_counted_at", "sign_in_failures", ["counted_at"])
    op.create_table(
        "signing_keys",
        sa.Column("kid", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("public_key", sa.LargeBinary, nullable=False),
        sa.Column("private_key", sa.LargeBinary),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("active_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("kid", name="pk_signing_keys"),
    )
    op.create_table(
        "accounts",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("email", sa.Text),
        sa.Column("email_key", sa.Text),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("password_hash", sa.Text),
        sa.Column("home_organisation_id", sa.Text, nullable=False),
        sa.Column("operator", sa.Boolean, nullable=False),
        sa.Column("totp_secret", sa.LargeBinary),
        sa.Column("totp_confirmed_at", sa.BigInteger),
        sa.Column("totp_used", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("suspended_at", sa.BigInteger),
        sa.Column("deleted_at", sa.BigInteger),
        sa.Column("last_login_at", sa.BigInteger),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_accounts"),
        sa.ForeignKeyConstraint(
            ["home_organisation_id"], ["organisations.id"], name="fk_accounts_home_organisation_id"
        ),
        sa.UniqueConstraint("email_key", name="uq_accounts_email_key"),
    )
    op.create_index("ix_accounts_home_organisation_id", "accounts", ["home_organisation_id"])
    op.create_table(
        "audit_checkpoints",
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False, autoincrement=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("kid", sa.Text, nullable=False),
        sa.Column("signature", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("organisation_id", "sequence", name="pk_audit_checkpoints"),
        sa.ForeignKeyConstraint(["kid"], ["signing_keys.kid"], name="fk_audit_checkpoints_kid"),
    )
    op.create_table(
        "roles",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("permissions", sa.JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_roles"),
        sa.ForeignKeyConstraint(["organisation_id"], ["organisations.id"], name="fk_roles_organisation_id"),
        sa.UniqueConstraint("organisation_id", "name", name="uq_roles_organisation_id"),
    )
    op.create_table(
        "service_accounts",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("project_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("suspended_at", sa.BigInteger),
        sa.Column("deleted_at", sa.BigInteger),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_service_accounts"),
        sa.ForeignKeyConstraint(["organisation_id"], ["organisations.id"], name="fk_service_accounts_organisation_id"),
    )
    op.create_index("ix_service_accounts_organisation_id", "service_accounts", ["organisation_id", "created_at", "id"])
    op.create_table(
        "memberships",
        sa.Column("account_id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("project_id", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("account_id", "organisation_id", "project_id", name="pk_memberships"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_memberships_account_id"),
        sa.ForeignKeyConstraint(["organisation_id"], ["organisations.id"], name="fk_memberships_organisation_id"),
    )
    op.create_index("ix_memberships_organisation_id", "memberships", ["organisation_id", "project_id"])
    op.create_table(
        "one_time_tokens",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("account_id", sa.Text),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("project_id", sa.Text, nullable=False),
        sa.Column("email", sa.Text, nullable=False),
        sa.Column("email_key", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("created_by", sa.Text, nullable=False),
        sa.Column("created_with", sa.Text, nullable=False),
        sa.Column("needs", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("used_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_one_time_tokens"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_one_time_tokens_account_id"),
        sa.ForeignKeyConstraint(["organisation_id"], ["organisations.id"], name="fk_one_time_tokens_organisation_id"),
        sa.UniqueConstraint("hash", name="uq_one_time_tokens_hash"),
    )
    op.create_index("ix_one_time_tokens_account_id", "one_time_tokens", ["account_id"])
    op.create_index("ix_one_time_tokens_created_by", "one_time_tokens", ["created_by"])
    op.create_index("ix_one_time_tokens_expires_at", "one_time_tokens", ["expires_at"])
    op.create_index(
        "ix_one_time_tokens_organisation_id", "one_time_tokens", ["organisation_id", "purpose", "created_at", "id"]
    )
    op.create_table(
        "recovery_codes",
        sa.Column("account_id", sa.Text, nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("used_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("account_id", "hash", name="pk_recovery_codes"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_recovery_codes_account_id"),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("account_id", sa.Text, nullable=False),
        sa.Column("organisation_id", sa.Text, nullable=False),
        sa.Column("family_id", sa.Text, nullable=False),
        sa.Column("project_id", sa.Text, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("address", sa.Text, nullable=False),
        sa.Column("user_agent", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("refreshed_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("last_until", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("end_reason", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_sessions"),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name="fk_sessions_account_id"),
        sa.ForeignKeyConstraint(["organisation_id"], ["organisations.id"], name="fk_sessions_organisation_id"),
    )
    op.create_index("ix_sessions_account_id", "sessions", ["account_id", "created_at", "id"])
    op.create_index("ix_sessions_expires_at", "sessions", ["expires_at"])
    op.create_index("ix_sessions_family_id", "sessions", ["family_id"])
    op.create_table(
        "refresh_tokens",
        sa.Column("hash", sa.LargeBinary(32), nullable=False),
        sa.Column("session_id", sa.Text, nullable=False),
        sa.Column("issued_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("used_at", sa.BigInteger),
        sa.PrimaryKeyConstraint("hash", name="pk_refresh_tokens"),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"], name="fk_refresh_tokens_session_id"),
    )
    op.create_index("ix_refresh_tokens_session_id", "refresh_tokens", ["session_id"])
