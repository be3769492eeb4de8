from alembic import context
from board import Base  # the models, and the views that are declared over them
from sqlalchemy import create_engine, pool

options = {
    "target_metadata": Base.metadata,
    "autogenerate_plugins": ["alembic.autogenerate.*", "sa_tablecache"],
    "render_as_batch": True,  # for SQLite, as the manual of Alembic says
}
url = context.config.get_main_option("sqlalchemy.url")

if context.is_offline_mode():
    context.configure(url=url, literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url, poolclass=pool.NullPool).connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
