"""Fixtures of the integration tests: databases with the tables of the zoo, empty at the start.

============== ================================================================================
fixture        what a test gets
============== ================================================================================
``database``   a :class:`~tests.integration.databases.Database`; the test runs twice: on an
               SQLite file, on PostgreSQL; with the marker ``every_database`` on
               MariaDB, too
``sqlite``     the first of them
``postgresql`` the second of them
``linguistic`` the same, with a collation under which text does not sort by bytes
``mariadb_zoo`` the third of them
``folding``    the same, with a collation under which equal text need not be the same
============== ================================================================================
"""

from collections.abc import Iterator

import pytest
from sqlalchemy import URL, text

from tests.integration.databases import Database
from tests.mariadb import FOLDING, Mariadb
from tests.postgres import Postgres
from tests.zoo import DEPOT


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


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Database:
    """A database of each kind in turn."""
    name = {"mariadb": "mariadb_zoo"}.get(request.param, request.param)
    database: Database = request.getfixturevalue(name)
    return database


@pytest.fixture(scope="session")
def mariadb_depot(mariadb: Mariadb) -> Iterator[URL]:
    """The MariaDB database that is the schema of the odd names."""
    with mariadb.database(name=DEPOT) as url:
        yield url


@pytest.fixture(scope="session")
def created_mariadb(mariadb: Mariadb, mariadb_depot: URL) -> Iterator[Database]:
    """A MariaDB database with the tables."""
    with mariadb.database() as url:
        database = Database(url)
        database.create()
        with database.bystander() as connection:
            # Its catalog tells DDL apart by the second: what is created is not to look like new.
            connection.execute(text("DO SLEEP(1.2)"))
        yield database


@pytest.fixture
def mariadb_zoo(created_mariadb: Database) -> Database:
    """A MariaDB database with empty tables; text compares by bytes."""
    created_mariadb.empty()
    return created_mariadb


@pytest.fixture(scope="session")
def created_folding(mariadb: Mariadb, mariadb_depot: URL) -> Iterator[Database]:
    """A MariaDB database with the tables and the collation that a server has by default."""
    with mariadb.database(FOLDING) as url:
        database = Database(url)
        database.create()
        yield database


@pytest.fixture
def folding(created_folding: Database) -> Database:
    """A MariaDB database with empty tables; text compares without case and trailing spaces."""
    created_folding.empty()
    return created_folding


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
