"""Accounts, roles, sessions, signing keys and the audit log; keys with owners and restrictions; changes for revocations."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None
