"""`python -m sa_tablecache feed` installs a change feed, tells its state, and removes it."""

import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, text

from sa_tablecache import TableCache
from sa_tablecache.__main__ import main
from sa_tablecache.feed.dialects import changelog_for
from tests.conftest import asynchronous
from tests.integration.databases import Database
from tests.zoo import OuterBoard

ROOT = Path(__file__).parents[2]

MODULE = """
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sa_tablecache import AsyncTableCache, TableCache
from tests.zoo import FlightsByYear, OuterBoard

cache = TableCache(create_engine({url!r}), views=[OuterBoard])
more = TableCache(create_engine({url!r}), views=[OuterBoard, FlightsByYear])
slow = AsyncTableCache(create_async_engine({slow!r}), views=[OuterBoard])
unbound = TableCache(views=[OuterBoard])
gone = TableCache(
    create_engine("postgresql+psycopg://me:secret@127.0.0.1:1/x"), views=[OuterBoard]
)
slow_gone = AsyncTableCache(
    create_async_engine("postgresql+asyncpg://me:secret@127.0.0.1:1/x"), views=[OuterBoard]
)
other = TableCache(create_engine("sqlite:///{file}"), views=[OuterBoard])
"""


@pytest.fixture
def module(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> str:
    """The name of a module of an application, with caches over the database."""
    name = re.sub(r"\W", "_", f"app_{request.node.name}")
    source = MODULE.format(
        url=database.url.render_as_string(hide_password=False),
        slow=asynchronous(database.url).render_as_string(hide_password=False),
        file=tmp_path / "other.sqlite",
    )
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def feed(action: str, *arguments: str) -> int:
    """Run the command."""
    return main(["feed", action, *arguments])


@pytest.mark.every_database
@pytest.mark.parametrize("name", ["cache", "slow"])
def test_a_feed_is_installed_and_removed(
    database: Database, module: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """From nothing to a feed that a cache follows, and back, saying what was done."""
    cache = f"{module}:{name}"

    def outcome(action: str) -> tuple[int, str]:
        sys.modules.pop(module, None)  # the command closes the cache
        status = feed(action, cache)
        return status, capsys.readouterr().out

    status, said = outcome("status")
    assert status == 1
    assert "no change feed is installed\n" in said
    assert len(re.findall(r"^  not watched  \S*\bflights by id\b", said, re.MULTILINE)) == 1
    status, said = outcome("install")
    assert status == 0
    assert len(re.findall(r"^watched now: \S+ by \w+", said, re.MULTILINE)) == 3
    assert "watched      " in said
    status, said = outcome("install")
    assert status == 0
    assert "watched now" not in said
    assert outcome("status")[0] == 0
    cache = f"{module}:more"
    status, said = outcome("status")
    assert status == 1
    assert "  otherwise " in said
    assert outcome("install")[0] == 0
    cache = f"{module}:{name}"
    assert outcome("status")[0] == 0, "what others need is no fault"
    assert outcome("uninstall") == (0, "the change feed is removed\n")
    assert outcome("uninstall")[0] == 0
    assert outcome("status")[0] == 1


@pytest.mark.every_database
def test_the_sql_is_that_of_the_installation(
    database: Database, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever runs what `--sql` prints, with the database's own client, has the same feed."""
    changelog = changelog_for(database.dialect)

    def state() -> Any:
        engine = database.engine()
        with engine.connect() as connection:
            have = changelog.installed(connection)
            query = {
                "sqlite": "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite%'",
                "postgresql": "SELECT tgrelid::regclass::text, pg_get_triggerdef(oid) "
                "FROM pg_trigger UNION ALL SELECT proname, pg_get_functiondef(p.oid) FROM pg_proc "
                "AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace "
                "WHERE nspname = 'sa_tablecache'",
                "mysql": "SELECT trigger_name, event_manipulation, action_statement "
                "FROM information_schema.triggers WHERE trigger_schema = database() "
                "UNION ALL SELECT table_name, column_name, column_type "
                "FROM information_schema.columns WHERE table_schema = database()",
            }[database.dialect]
            rows = sorted(connection.execute(text(query)).all(), key=str)
        engine.dispose()
        return have, rows

    before = state()
    assert feed("install", "--sql", f"{module}:cache") == 0
    sql = capsys.readouterr().out
    assert state() == before, "nothing was run"
    run_as_client(database, sql)
    by_hand = state()
    sys.modules.pop(module)
    assert feed("status", f"{module}:cache") == 0
    sys.modules.pop(module)
    capsys.readouterr()
    assert feed("uninstall", "--sql", f"{module}:cache") == 0
    sql = capsys.readouterr().out
    assert state() == by_hand
    run_as_client(database, sql)
    assert state() == before
    sys.modules.pop(module)
    assert feed("install", f"{module}:cache") == 0
    assert state() == by_hand
    sys.modules.pop(module)
    assert feed("uninstall", f"{module}:cache") == 0


def run_as_client(database: Database, sql: str) -> None:
    """Run a script as psql, sqlite3 or mysql would."""
    if database.dialect == "sqlite":
        connection = sqlite3.connect(str(database.url.database))
        connection.executescript(sql)
        connection.close()
    elif database.dialect == "mysql":
        ends = r"\s*(?:DELIMITER \$\$\n\n(.*?) \$\$\n\nDELIMITER ;\n|(.*?);\n)"
        with database.bystander() as connection:
            for long, short in re.findall(ends, sql, re.DOTALL):
                connection.exec_driver_sql(long or short, execution_options={"no_parameters": True})
    else:
        url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url, autocommit=True) as server:
            server.execute(sql)  # type: ignore[call-overload]


def test_what_is_out_of_order_is_told(
    database: Database, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trigger that is missing makes the status fail, and installing again mends it."""
    assert feed("install", f"{module}:cache") == 0
    with database.bystander() as connection:
        if database.dialect == "sqlite":
            connection.execute(text("DROP TRIGGER sa_tablecache_insert_flights"))
        else:
            connection.execute(text("ALTER TABLE flights DISABLE TRIGGER USER"))
    sys.modules.pop(module)
    assert feed("status", f"{module}:cache") == 1
    assert re.search(r"^  not trusted  \w+\.flights: ", capsys.readouterr().out, re.MULTILINE)
    sys.modules.pop(module)
    assert feed("install", f"{module}:cache") == 0
    sys.modules.pop(module)
    assert feed("uninstall", f"{module}:cache") == 0


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_what_cannot_be_done_is_an_error(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message says what was wrong, the exit status of which kind it was."""

    def outcome(action: str, name: str, *more: str) -> tuple[int, str]:
        status = feed(action, f"{module}:{name}", *more)
        said = capsys.readouterr()
        assert "secret" not in said.out + said.err
        return status, said.out + said.err

    for action in ("install", "status", "uninstall"):
        status, said = outcome(action, "nothing")
        assert (status, "has no 'nothing'; it has cache" in said) == (2, True)
        status, said = outcome(action, "unbound")
        assert (status, "call cache.bind(engine)" in said) == (1, True)
        sys.modules.pop(module)
        for name in ("gone", "slow_gone"):
            status, said = outcome(action, name)
            assert status == 1
            assert said.startswith("error: ")
            assert len(said.splitlines()) == 1
        sys.modules.pop(module)
    engine = create_engine(f"sqlite:///{tmp_path / 'other.sqlite'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE flights (id INTEGER PRIMARY KEY, hour, delay)")
        connection.exec_driver_sql("CREATE VIEW planes AS SELECT 1 AS tailnum, 2 AS year")
    engine.dispose()
    for arguments in (("install", "other", "--sql"), ("install", "other"), ("status", "other")):
        status, said = outcome(*arguments)
        assert status == 1
        assert "there is no such table" in said
        assert "it is a database view" in said
        sys.modules.pop(module)
    with pytest.raises(SystemExit) as ended:
        main(["feed", "remove"])
    assert ended.value.code == 2


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_it_runs_as_a_module(database: Database, module: str, tmp_path: Path) -> None:
    """A cache of another process follows what was installed from a shell."""
    subprocess.run(
        [sys.executable, "-m", "sa_tablecache", "feed", "install", f"{module}:cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        timeout=60,
        check=True,
    )
    with database.lent_engine() as engine, TableCache(engine, views=[OuterBoard]) as cache:
        assert cache.install_feed() == 0
