"""An empty database of every kind that answers are compared on."""

import os
import uuid
from collections.abc import Iterator

import pytest
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from tests.postgres import Postgres

DATABASES = ["sqlite", "postgresql bytewise", "postgresql linguistic", "postgresql icu", "mariadb"]


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest) -> Iterator[URL]:
    """An empty database of each kind, and of each kind of collation."""
    if request.param == "sqlite":
        yield request.getfixturevalue("sqlite_url")
    elif request.param == "mariadb":
        yield request.getfixturevalue("mariadb")
    else:
        server: Postgres = request.getfixturevalue("postgres")
        options = {
            "postgresql bytewise": "LOCALE_PROVIDER libc LOCALE 'C'",
            "postgresql linguistic": server.linguistic,
            "postgresql icu": "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'",
        }[request.param]
        if options is None:
            pytest.skip("this PostgreSQL server has only bytewise collations")
        try:
            with server.database(options) as database:
                yield database
        except DBAPIError as error:
            if "ICU is not supported" not in str(error):
                raise
            pytest.skip("this PostgreSQL server was built without ICU")


@pytest.fixture
def mariadb() -> Iterator[URL]:
    """An empty database on the MariaDB server that the environment names."""
    configured = os.environ.get("SA_TABLECACHE_TEST_MARIADB_URL")
    if configured is None:
        pytest.skip("SA_TABLECACHE_TEST_MARIADB_URL names no server")
    server = make_url(configured)
    name = f"sa_tablecache_{uuid.uuid4().hex[:12]}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} CHARACTER SET utf8mb4"))
    yield server.set(database=name)
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name}"))
    engine.dispose()
