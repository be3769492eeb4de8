"""Fixtures of the integration tests: databases with the tables of the zoo, empty at the start.

============== ================================================================================
fixture        what a test gets
============== ================================================================================
``database``   a :class:`~tests.integration.databases.Database`; the test runs twice: on an
               SQLite file, on PostgreSQL
``sqlite``     the first of the two
``postgresql`` the second of the two
``linguistic`` the same, with a collation under which text does not sort by bytes
============== ================================================================================
"""

from collections.abc import Iterator

import pytest
from sqlalchemy import URL

from tests.integration.databases import Database
from tests.postgres import Postgres


@pytest.fixture(scope="session")
def created_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """An SQLite file with the tables."""
    directory = tmp_path_factory.mktemp("zoo")
    original = directory / "original.sqlite"
    Database(URL.create("sqlite", database=str(original))).create()
    return Database(URL.create("sqlite", database=str(directory / "zoo.sqlite")), original)


@pytest.fixture
def sqlite(created_sqlite: Database) -> Database:
    """An SQLite file with empty tables."""
    created_sqlite.empty()
    return created_sqlite


@pytest.fixture(scope="session")
def created_postgresql(postgres: Postgres) -> Iterator[Database]:
    """A PostgreSQL database with the tables."""
    with postgres.database() as url:
        database = Database(url)
        database.create()
        yield database


@pytest.fixture
def postgresql(created_postgresql: Database) -> Database:
    """A PostgreSQL database with empty tables; text compares by bytes."""
    created_postgresql.empty()
    return created_postgresql


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    """A database of each kind in turn."""
    database: Database = request.getfixturevalue(request.param)
    return database


@pytest.fixture(scope="session")
def created_linguistic(postgres: Postgres) -> Iterator[Database]:
    """A PostgreSQL database with the tables and a collation that is not bytewise."""
    if postgres.linguistic is None:
        pytest.skip("this PostgreSQL server has only bytewise collations")
    with postgres.database(postgres.linguistic) as url:
        database = Database(url)
        database.create()
        yield database


@pytest.fixture
def linguistic(created_linguistic: Database) -> Database:
    """A PostgreSQL database with empty tables; text compares as in a natural language."""
    created_linguistic.empty()
    return created_linguistic
