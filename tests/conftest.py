"""Fixtures for all tests: fresh databases on real servers.

========================== ======================================================================
fixture                    what a test gets
========================== ======================================================================
``sqlite_url``             the URL of an SQLite file of its own
``postgres_url``           the URL of an empty PostgreSQL database of its own, bytewise collation
``postgres_module_url``    the same, shared by the tests of a module
``postgres_linguistic_url`` the same as ``postgres_url`` with a collation in which ``a < B < c``
``postgres``               the server, to create databases as the test likes
``mariadb``                a MariaDB server, where the environment names one (see tests/mariadb.py)
``mariadb_url``            the URL of an empty MariaDB database of its own, bytewise collation
``database_url``           the test runs twice: ``sqlite_url``, ``postgres_url``; with the marker
                           ``every_database`` a third time: ``mariadb_url``
``async_database_url``     the same with the drivers aiosqlite, asyncpg and asyncmy
========================== ======================================================================

MariaDB needs that marker because a third run of everything would take minutes. It is on what a
database can make wrong: write paths, the ends of transactions, races, isolation. What comes after
that (planning, answering, messages) is the same code for all, and what only MariaDB has is tested
in ``integration/test_mariadb.py``.

The URLs are `sqlalchemy.URL` with the drivers pysqlite and psycopg;
``url.set(drivername="postgresql+asyncpg")`` or :func:`asynchronous` gives the asynchronous twin.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

from tests.mariadb import VARIABLE as MARIADB
from tests.mariadb import Mariadb, configured_mariadb
from tests.postgres import Postgres, running_postgres

# Where the package is installed, its entry point has loaded it already, under the same name.
pytest_plugins = ["pytest_sa_tablecache"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on each kind of database."""
    kinds = ["sqlite", "postgresql"]
    if metafunc.definition.get_closest_marker("every_database"):
        kinds.append("mariadb")
    marks = metafunc.definition.iter_markers("parametrize")
    chosen = {
        name for m in marks for name in ([m.args[0]] if isinstance(m.args[0], str) else m.args[0])
    }
    # A test has one of them; a ``database`` of its own file may be made from the URL.
    for name in ("database_url", "database"):
        if name in metafunc.fixturenames:
            if name not in chosen:
                metafunc.parametrize(name, kinds, indirect=True)
            break


def asynchronous(url: URL) -> URL:
    """Return the URL of the same database for an asynchronous driver."""
    drivers = {
        "sqlite": "sqlite+aiosqlite",
        "postgresql": "postgresql+asyncpg",
        "mysql": "mysql+asyncmy",
    }
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


@pytest.fixture(scope="session")
def mariadb() -> Mariadb:
    """A MariaDB server."""
    server = configured_mariadb()
    if server is None:
        pytest.skip(f"no MariaDB server is named in {MARIADB}")
    return server


@pytest.fixture
def mariadb_url(mariadb: Mariadb) -> Iterator[URL]:
    """An empty MariaDB database, in which text compares by bytes."""
    with mariadb.database() as url:
        yield url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> URL:
    """An SQLite file that does not exist yet."""
    return URL.create("sqlite", database=str(tmp_path / "test.sqlite"))


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> URL:
    """An empty database of each kind in turn."""
    name = {"postgresql": "postgres"}.get(request.param, request.param)
    url: URL = request.getfixturevalue(f"{name}_url")
    return url


@pytest.fixture
def async_database_url(database_url: URL) -> URL:
    """An empty database of each kind in turn, for asynchronous drivers."""
    return asynchronous(database_url)
