"""Run by Alembic for each command; `storage.upgrade` hands it an open connection inside a transaction."""

from alembic import context

from helixflow.storage.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # SQLite cannot alter most of a table: later steps copy it.
    render_as_batch=True,
)
context.run_migrations()
