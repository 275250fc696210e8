"""The tables as the code expects them; `migrations/` brings a database there and a test compares the two.

Times are whole seconds since the epoch, ids are text of our own making. `version` counts the changes of a row from 1.
What is deleted keeps its row, with `deleted_at`, where something refers to it for ever.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Values of the installation as a whole: the `revision` of the last change, and what tells one master key from another.
installation = Table(
    "installation",
    metadata,
    Column("name", Text, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

organisations = Table(
    "organisations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("audit_retention_days", Integer, nullable=False),
    # What it gets of engines that are full, set by operators: its share, and the highest priority of its keys.
    Column("share_weight", Integer, nullable=False),
    Column("max_priority", Integer, nullable=False),
    # The only region that may serve its calls; '' for any.
    Column("residency", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("deleted_at", BigInteger),
    Column("version", BigInteger, nullable=False),
)

projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("deleted_at", BigInteger),
    Column("version", BigInteger, nullable=False),
    Index("ix_projects_organisation_id", "organisation_id", "created_at", "id"),
)

accounts = Table(
    "accounts",
    metadata,
    Column("id", Text, primary_key=True),
    # As it was given, and as it is compared: lower case, NFC. Both null once deleted.
    Column("email", Text),
    Column("email_key", Text, unique=True),
    Column("name", Text, nullable=False),
    # Null until somebody sets one (invited), and for identities of another kind.
    Column("password_hash", Text),
    Column("home_organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("operator", Boolean, nullable=False),
    # Sealed with the master key; counts once `totp_confirmed_at` is set. `totp_used` is the last time step used.
    Column("totp_secret", LargeBinary),
    Column("totp_confirmed_at", BigInteger),
    Column("totp_used", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("suspended_at", BigInteger),
    Column("deleted_at", BigInteger),
    Column("last_login_at", BigInteger),
    Column("version", BigInteger, nullable=False),
    Index("ix_accounts_home_organisation_id", "home_organisation_id"),
)

recovery_codes = Table(
    "recovery_codes",
    metadata,
    Column("account_id", Text, ForeignKey("accounts.id"), primary_key=True),
    # SHA-256: the codes are random.
    Column("hash", LargeBinary(32), primary_key=True),
    Column("used_at", BigInteger),
)

roles = Table(
    "roles",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("description", Text, nullable=False),
    # A list of `noun:verb`.
    Column("permissions", JSON, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    UniqueConstraint("organisation_id", "name", name="uq_roles_organisation_id"),
)

# `role` is the name of a built-in role or of one of the organisation's own; `project_id` is '' in the organisation.
memberships = Table(
    "memberships",
    metadata,
    Column("account_id", Text, ForeignKey("accounts.id"), primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), primary_key=True),
    Column("project_id", Text, primary_key=True),
    Column("role", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    Index("ix_memberships_organisation_id", "organisation_id", "project_id"),
)

service_accounts = Table(
    "service_accounts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    # Where its role holds; '' in the organisation.
    Column("project_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("suspended_at", BigInteger),
    Column("deleted_at", BigInteger),
    Column("version", BigInteger, nullable=False),
    Index("ix_service_accounts_organisation_id", "organisation_id", "created_at", "id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    # SHA-256 of the key: the key itself is nowhere.
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("hint", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False),
    # An account or a service account; '' for a key of the project itself.
    Column("owner_id", Text, nullable=False),
    # Lists of text; `models` and `networks` empty: no restriction.
    Column("scopes", JSON, nullable=False),
    Column("models", JSON, nullable=False),
    Column("networks", JSON, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("weight", Integer, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("rotated_from", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    # A bootstrap key that gave way to another one may come back; one that somebody revoked may not.
    Column("superseded", Boolean, nullable=False),
    # Acts as owner of its organisation and operator of the installation.
    Column("bootstrap", Boolean, nullable=False),
    Column("version", BigInteger, nullable=False),
    Index("ix_api_keys_organisation_id", "organisation_id", "created_at", "id"),
    Index("ix_api_keys_project_id", "project_id"),
    Index("ix_api_keys_owner_id", "owner_id"),
    # A key has at most one successor.
    Index("ix_api_keys_rotated_from", "rotated_from", unique=True),
)

# What gateways must know. `revision` comes from `installation` within the writing transaction: without gaps, in order.
# Rows older than the longest life of an access token are pruned.
changes = Table(
    "changes",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    # ChangeKind of proto/helixflow/auth/v1/identity.proto.
    Column("kind", Integer, nullable=False),
    Column("subject_id", Text, nullable=False),
    Column("organisation_id", Text, nullable=False),
    Column("key_hash", LargeBinary(32)),
    Column("at", BigInteger, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", Text, primary_key=True),
    Column("account_id", Text, ForeignKey("accounts.id"), nullable=False),
    # For its whole life: who goes on in another organisation has a new session there.
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    # The session that the sign-in opened, of all that followed from it: itself, for that one.
    Column("family_id", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("user_agent", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("refreshed_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    # No refresh carries it, or what follows from it, further than that.
    Column("last_until", BigInteger, nullable=False),
    Column("ended_at", BigInteger),
    # `logout`, `moved`, `reused`, `revoked`, `password`, `suspended`, `deleted`.
    Column("end_reason", Text),
    Index("ix_sessions_account_id", "account_id", "created_at", "id"),
    Index("ix_sessions_family_id", "family_id"),
    Index("ix_sessions_expires_at", "expires_at"),
)

refresh_tokens = Table(
    "refresh_tokens",
    metadata,
    Column("hash", LargeBinary(32), primary_key=True),
    Column("session_id", Text, ForeignKey("sessions.id"), nullable=False),
    Column("issued_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("used_at", BigInteger),
    Index("ix_refresh_tokens_session_id", "session_id"),
)

# What is redeemed once: invitations (`invite`), first passwords and resets (`reset`), challenges (`mfa`).
one_time_tokens = Table(
    "one_time_tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("purpose", Text, nullable=False),
    # Null for an invitation, which is for an e-mail.
    Column("account_id", Text, ForeignKey("accounts.id")),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("project_id", Text, nullable=False),
    # As it was given, and as it is compared.
    Column("email", Text, nullable=False),
    Column("email_key", Text, nullable=False),
    Column("role", Text, nullable=False),
    # Sign-in so far, for `mfa`.
    Column("method", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    # Who answers for it (a key only if it acts for nobody), the API key that was used or '', and the permission that it
    # took: it works while all of that holds.
    Column("created_by", Text, nullable=False),
    Column("created_with", Text, nullable=False),
    Column("needs", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("used_at", BigInteger),
    Index("ix_one_time_tokens_organisation_id", "organisation_id", "purpose", "created_at", "id"),
    Index("ix_one_time_tokens_account_id", "account_id"),
    Index("ix_one_time_tokens_created_by", "created_by"),
    Index("ix_one_time_tokens_expires_at", "expires_at"),
)

# Failed sign-ins, by a keyed hash of e-mail or address: also of those that have no account.
sign_in_failures = Table(
    "sign_in_failures",
    metadata,
    Column("subject", LargeBinary(32), primary_key=True),
    # As of `counted_at`.
    Column("failures", Integer, nullable=False),
    Column("counted_at", BigInteger, nullable=False),
    Column("locked_until", BigInteger, nullable=False),
    Index("ix_sign_in_failures_counted_at", "counted_at"),
)

# Passwords that are being tried at this moment, by the same hashes. So few that they need no index.
sign_in_attempts = Table(
    "sign_in_attempts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("email_subject", LargeBinary(32), nullable=False),
    # Null when nobody knows the address.
    Column("address_subject", LargeBinary(32)),
    Column("began_at", BigInteger, nullable=False),
)

# RSA keys for tokens (`token`) and ECDSA keys for checkpoints of the audit log (`audit`).
signing_keys = Table(
    "signing_keys",
    metadata,
    Column("kid", Text, primary_key=True),
    Column("purpose", Text, nullable=False),
    # SubjectPublicKeyInfo (DER), and PKCS #8 (DER) sealed with the master key; null once it signs no more.
    Column("public_key", LargeBinary, nullable=False),
    Column("private_key", LargeBinary),
    Column("created_at", BigInteger, nullable=False),
    # From when on it signs: gateways learn of it before that.
    Column("active_at", BigInteger, nullable=False),
    # When signatures of it stop being accepted; null for the one in use, and for keys of the audit log.
    Column("expires_at", BigInteger),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("caller_id", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    # SHA-256 of the request and the answer, sealed with the master key: both may hold a secret.
    Column("response", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_idempotency_keys_created_at", "created_at"),
)

# Append-only, chained by hashes; '' is the organisation of what concerns the installation.
audit_records = Table(
    "audit_records",
    metadata,
    Column("organisation_id", Text, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("at", BigInteger, nullable=False),
    Column("actor_kind", Text, nullable=False),
    Column("actor_id", Text, nullable=False),
    Column("actor_name", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("target_kind", Text, nullable=False),
    Column("target_id", Text, nullable=False),
    # JSON text, exactly as it was hashed; '' for none.
    Column("before", Text, nullable=False),
    Column("after", Text, nullable=False),
    Column("address", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("previous_hash", LargeBinary(32), nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    Index("ix_audit_records_at", "organisation_id", "at"),
    # What lists are filtered by, in their order.
    Index("ix_audit_records_actor_id", "organisation_id", "actor_id", "sequence"),
    Index("ix_audit_records_action", "organisation_id", "action", "sequence"),
    Index("ix_audit_records_outcome", "organisation_id", "outcome", "sequence"),
    Index("ix_audit_records_target_id", "organisation_id", "target_id", "sequence"),
)

# The end of each chain: the next record goes on from here also when all before it were pruned.
audit_heads = Table(
    "audit_heads",
    metadata,
    Column("organisation_id", Text, primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    # The last record that has been pruned, 0 for none; the chain that is left begins after it.
    Column("pruned_sequence", BigInteger, nullable=False),
    Column("pruned_hash", LargeBinary(32), nullable=False),
)

audit_checkpoints = Table(
    "audit_checkpoints",
    metadata,
    Column("organisation_id", Text, primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary(32), nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("kid", Text, ForeignKey("signing_keys.kid"), nullable=False),
    Column("signature", LargeBinary, nullable=False),
)

# Requests per minute, tokens, parallel requests. Numbers of proto/helixflow/auth/v1/metering.proto.
limits = Table(
    "limits",
    metadata,
    Column("id", Text, primary_key=True),
    # '' for one of the installation, which has no subject either.
    Column("organisation_id", Text, nullable=False),
    Column("scope", Integer, nullable=False),
    Column("subject_id", Text, nullable=False),
    # '' for all models together.
    Column("model", Text, nullable=False),
    Column("metric", Integer, nullable=False),
    Column("value", BigInteger, nullable=False),
    Column("burst", BigInteger, nullable=False),
    # By an operator: the organisation cannot change it.
    Column("imposed", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    # One of a kind; an imposed one stands beside the organisation's own.
    UniqueConstraint("organisation_id", "scope", "subject_id", "model", "metric", "imposed"),
    Index("ix_limits_organisation_id", "organisation_id", "created_at", "id"),
)

budgets = Table(
    "budgets",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, nullable=False),
    Column("scope", Integer, nullable=False),
    Column("subject_id", Text, nullable=False),
    Column("unit", Integer, nullable=False),
    Column("period", Integer, nullable=False),
    # Nanodollars or tokens.
    Column("cap", BigInteger, nullable=False),
    # Per cent, growing.
    Column("thresholds", JSON, nullable=False),
    Column("imposed", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    UniqueConstraint("organisation_id", "scope", "subject_id", "unit", "period", "imposed"),
    Index("ix_budgets_organisation_id", "organisation_id", "created_at", "id"),
)

# A threshold is reached once a period.
budget_events = Table(
    "budget_events",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, nullable=False),
    Column("budget_id", Text, nullable=False),
    Column("period_start", BigInteger, nullable=False),
    Column("threshold", Integer, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("cap", BigInteger, nullable=False),
    Column("unit", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),
    UniqueConstraint("budget_id", "period_start", "threshold"),
    Index("ix_budget_events_organisation_id", "organisation_id", "at", "id"),
)

# What operators set. Validities of one subject do not overlap.
prices = Table(
    "prices",
    metadata,
    Column("id", Text, primary_key=True),
    # "model" or "deployment".
    Column("subject_kind", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("price_version", Text, ForeignKey("price_versions.version"), nullable=False),
    Column("valid_from", BigInteger, nullable=False),
    # None: until further notice.
    Column("valid_to", BigInteger),
    # The price that began there, if it was without end before that: without that one it would be so again.
    Column("ended_by", Text),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_prices_subject", "subject_kind", "subject", "valid_from", unique=True),
)

# Every price that a request may have been rated by, wherever it came from; never changed, never deleted.
price_versions = Table(
    "price_versions",
    metadata,
    # A hash of the body.
    Column("version", Text, primary_key=True),
    # `helixflow.metering.prices.Price` as JSON.
    Column("body", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

# The journals of gateways. One without `closed_at` may still bring requests.
journals = Table(
    "journals",
    metadata,
    Column("id", Text, primary_key=True),
    Column("node_id", Text, nullable=False),
    # Up to where the ledger has it.
    Column("position", BigInteger, nullable=False),
    # Records that could not be read.
    Column("quarantined", BigInteger, nullable=False),
    Column("opened_at", BigInteger, nullable=False),
    Column("shipped_at", BigInteger),
    Column("closed_at", BigInteger),
    Index("ix_journals_closed_at", "closed_at"),
)

# The ledger: one row for each admitted request. Moments and durations are in milliseconds, -1: did not come to it.
# Partitioned by month on PostgreSQL. Rows are added by `auth/ledger` alone, together with their roll-ups.
requests = Table(
    "requests",
    metadata,
    # In the order of time: 48 bits of milliseconds, 80 random ones, as 32 hexadecimal digits.
    Column("call_id", Text, primary_key=True),
    Column("admitted_at_ms", BigInteger, primary_key=True, autoincrement=False),
    Column("request_id", Text, nullable=False),
    Column("organisation_id", Text, nullable=False),
    Column("project_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("deployment", Text, nullable=False),
    Column("dialect", Text, nullable=False),
    # chat/completions, completions, embeddings: the path below /v1.
    Column("operation", Text, nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("status", Integer, nullable=False),
    # completed, failed, cancelled, interrupted, lost.
    Column("outcome", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    # The engine did not report its usage: it was counted by us.
    Column("estimated", Boolean, nullable=False),
    Column("queue_ms", BigInteger, nullable=False),
    Column("first_token_ms", BigInteger, nullable=False),
    Column("duration_ms", BigInteger, nullable=False),
    Column("engine_ms", BigInteger, nullable=False),
    # Nanodollars.
    Column("cost", BigInteger, nullable=False),
    # '' where nothing was rated.
    Column("price_version", Text, nullable=False),
    # JSON objects as text; '' for none.
    Column("tags", Text, nullable=False),
    Column("explanation", Text, nullable=False),
    Index("ix_requests_organisation_id", "organisation_id", "admitted_at_ms"),
    Index("ix_requests_request_id", "request_id", "admitted_at_ms"),
    postgresql_partition_by="RANGE (admitted_at_ms)",
)


def _roll_up(name: str, *keys: Column[Any]) -> Table:
    """Sums of `requests` by `start` (seconds since the epoch, UTC) and what it is grouped by."""
    return Table(
        name,
        metadata,
        Column("organisation_id", Text, primary_key=True),
        Column("start", BigInteger, primary_key=True, autoincrement=False),
        *keys,
        Column("project_id", Text, primary_key=True),
        Column("key_id", Text, primary_key=True),
        Column("user_id", Text, primary_key=True),
        Column("model", Text, primary_key=True),
        Column("deployment", Text, primary_key=True),
        # As in `requests`.
        Column("operation", Text, primary_key=True),
        Column("requests", BigInteger, nullable=False),
        Column("failed_requests", BigInteger, nullable=False),
        Column("prompt_tokens", BigInteger, nullable=False),
        Column("cached_tokens", BigInteger, nullable=False),
        Column("completion_tokens", BigInteger, nullable=False),
        Column("reasoning_tokens", BigInteger, nullable=False),
        Column("cost", BigInteger, nullable=False),
        # Half the size of a table that keeps its long keys a second time in an index.
        sqlite_with_rowid=False,
        # The rows of today change with every shipment: with room in their page the index stays as it is.
        postgresql_with={"fillfactor": 50},
    )


usage_hourly = _roll_up("usage_hourly")
usage_daily = _roll_up("usage_daily")
# Of tagged requests only, once for each of their tags.
usage_daily_tags = _roll_up(
    "usage_daily_tags", Column("tag", Text, primary_key=True), Column("tag_value", Text, primary_key=True)
)

# Every version of the serving configuration, the newest in force. Rows are never changed.
serving_configurations = Table(
    "serving_configurations",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("created_at", BigInteger, nullable=False),
    # '' for the installation itself: a file that was edited.
    Column("actor_id", Text, nullable=False),
    Column("actor_name", Text, nullable=False),
    # file, apply, api, rollback.
    Column("origin", Text, nullable=False),
    Column("note", Text, nullable=False),
    # JSON, sealed with the master key: values of headers may be secrets.
    Column("document", LargeBinary, nullable=False),
)
