"""The tables as the code expects them; `migrations/` brings a database there and a test compares the two.

Times are whole seconds since the epoch, ids are text of our own making.
"""

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Index, Integer, LargeBinary, MetaData, Table, Text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

organisations = Table(
    "organisations",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("organisation_id", Text, ForeignKey("organisations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
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
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    # A bootstrap key that gave way to another one may come back; one that somebody revoked may not.
    Column("superseded", Boolean, nullable=False),
    Column("bootstrap", Boolean, nullable=False),
    Index("ix_api_keys_created_at", "created_at"),
)

# Append-only: the largest revision tells a client that was away whether it missed something.
revocations = Table(
    "revocations",
    metadata,
    Column("revision", Integer, primary_key=True, autoincrement=True),
    Column("key_id", Text, ForeignKey("api_keys.id"), nullable=False),
    Column("revoked_at", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)
