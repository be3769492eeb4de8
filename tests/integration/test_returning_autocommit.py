"""Statements with RETURNING where each statement commits."""

from sqlalchemy import select, update

from sa_tablecache import TableCache
from tests.integration.databases import Database
from tests.integration.flights import insert_flights
from tests.zoo import Flight, OuterBoard


def test_rows_that_nobody_has_fetched_yet_are_committed(database: Database) -> None:
    """SQLite commits at the last row of a statement, and then the cache marks what it wrote."""
    with database.lent_engine() as engine:
        with engine.begin() as connection:
            insert_flights(connection)
        cache = TableCache(engine, views=[OuterBoard], exclusive_writer=True)
        cache.load(OuterBoard)
        statement = update(Flight).where(Flight.id.between(1, 1)).values(delay=4_321)
        Session = cache.sessionmaker()
        with engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            result = connection.execute(statement.returning(Flight.delay))
            with Session() as session:  # refreshes
                session.scalars(select(OuterBoard)).all()
            assert result.all() == [(4_321,)]
        with Session() as session, engine.connect() as connection:
            cached = session.scalars(select(OuterBoard.delay).where(OuterBoard.id == 1)).all()
            assert cached == connection.scalars(select(Flight.delay).where(Flight.id == 1)).all()
        cache.close()
