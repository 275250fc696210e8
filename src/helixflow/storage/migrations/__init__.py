"""Alembic's environment and the steps from an empty database to the schema of this version."""
