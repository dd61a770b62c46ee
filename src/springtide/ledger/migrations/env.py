"""How Alembic runs here: always from `database.migrate`, on the connection that holds the lock."""

from alembic import context

from springtide.ledger.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
