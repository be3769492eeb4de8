"""Fixtures for all tests: fresh databases on real servers.

========================== ======================================================================
fixture                    what a test gets
========================== ======================================================================
``sqlite_url``             the URL of an SQLite file of its own
``postgres_url``           the URL of an empty PostgreSQL database of its own, bytewise collation
``postgres_module_url``    the same, shared by the tests of a module
``postgres_linguistic_url`` the same as ``postgres_url`` with a collation in which ``a < B < c``
``postgres``               the server, to create databases as the test likes
``database_url``           the test runs twice: ``sqlite_url``, ``postgres_url``
``async_database_url``     the same with the drivers aiosqlite and asyncpg
========================== ======================================================================

The URLs are `sqlalchemy.URL` with the drivers pysqlite and psycopg;
``url.set(drivername="postgresql+asyncpg")`` or :func:`asynchronous` gives the asynchronous twin.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.postgres import Postgres, running_postgres


def asynchronous(url: URL) -> URL:
    """Return the URL of the same database for an asynchronous driver."""
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    return url.set(drivername=drivers[url.get_backend_name()])


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; one per worker when tests run in parallel."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[URL]:
    """An empty PostgreSQL database, in which text compares by bytes."""
    with postgres.database() as url:
        yield url


@pytest.fixture(scope="module")
def postgres_module_url(postgres: Postgres) -> Iterator[URL]:
    """A PostgreSQL database for all tests of a module."""
    with postgres.database() as url:
        yield url


@pytest.fixture
def postgres_linguistic_url(postgres: Postgres) -> Iterator[URL]:
    """An empty PostgreSQL database, in which text compares as in a natural language."""
    if postgres.linguistic is None:
        pytest.skip("this PostgreSQL server has only bytewise collations")
    with postgres.database(postgres.linguistic) as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> URL:
    """An SQLite file that does not exist yet."""
    return URL.create("sqlite", database=str(tmp_path / "test.sqlite"))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> URL:
    """An empty database of each kind in turn."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: URL = request.getfixturevalue(name)
    return url


@pytest.fixture
def async_database_url(database_url: URL) -> URL:
    """An empty database of each kind in turn, for asynchronous drivers."""
    return asynchronous(database_url)
