"""DDL that waits for a session's transaction, while the session waits for the cache."""

from threading import Thread, Timer

import pytest
from sqlalchemy import Engine, select, text

from sa_tablecache import TableCache, loading
from tests.integration.databases import Database
from tests.integration.flights import insert_flights
from tests.zoo import Flight, OuterBoard

WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
    "AND query LIKE 'ALTER TABLE flights%' AND datname = current_database()",
    "mysql": "SELECT count(*) FROM information_schema.processlist "
    "WHERE state LIKE 'Waiting for table metadata lock%' AND info LIKE 'ALTER TABLE flights%'",
}


def _alter(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql("ALTER TABLE flights ADD COLUMN more integer")
        connection.exec_driver_sql("ALTER TABLE flights DROP COLUMN more")


@pytest.mark.every_database
def test_a_reader_does_not_wait_for_ddl_that_waits_for_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that has read a table is answered while somebody waits to alter that."""
    if database.dialect == "sqlite":
        pytest.skip("a writer of SQLite waits for no reader")
    monkeypatch.setattr(loading, "LOCK_SECONDS", 1)
    with database.lent_engine() as engine, database.bystander() as bystander:
        with engine.begin() as connection:
            insert_flights(connection)
        cache = TableCache(engine, views=[OuterBoard], exclusive_writer=True)
        cache.load(OuterBoard)
        with (
            database.lent_engine(isolation_level="AUTOCOMMIT") as another,
            cache.sessionmaker()() as session,
        ):
            session.execute(select(Flight.id)).all()
            altering = Thread(target=_alter, args=(another,))
            altering.start()
            while altering.is_alive() and not bystander.scalar(text(WAITING[database.dialect])):
                pass
            assert altering.is_alive()
            cache.invalidate(OuterBoard)
            # Where it does wait, the end of its transaction lets all go on.
            raw = session.connection().connection
            too_late = Timer(8, raw.driver_connection.close)
            too_late.start()
            records = session.scalars(select(OuterBoard)).all()
            too_late.cancel()
            assert records
            assert session.last_read is not None
            assert session.last_read.kind == "bypass", session.last_read
            assert bystander.scalar(text(WAITING[database.dialect])), "it waits all the time"
            session.rollback()
            altering.join()
        cache.close()
