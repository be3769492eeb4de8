"""`python -m sa_tablecache inspect` tells what a cache will do, and what keeps it from doing it."""

import contextlib
import json
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from sa_tablecache import CachedView, ReadThrough, ScoreIndex, SlidingWindow, TableCache
from sa_tablecache.__main__ import main
from sa_tablecache.inspecting import describe, pretty, rendered
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.integration.flights import flights_world
from tests.zoo import KINDS, Flight, OuterBoard, Plane

ROOT = Path(__file__).parents[2]

MODULE = """
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sa_tablecache import AsyncTableCache, TableCache
from examples.flights_models import Base, FlightBoard

engine = create_engine("sqlite:///{file}")
Base.metadata.create_all(engine)
cache = TableCache(engine, views=[FlightBoard])
slow = AsyncTableCache(create_async_engine("sqlite+aiosqlite:///{file}"), views=[FlightBoard])
gone = TableCache(
    create_engine("postgresql+psycopg://me:secret@127.0.0.1:1/x"), views=[FlightBoard]
)
slow_gone = AsyncTableCache(
    create_async_engine("postgresql+asyncpg://me:secret@127.0.0.1:1/x"), views=[FlightBoard]
)
unbound = TableCache(views=[FlightBoard])
closed = TableCache(engine)
closed.close()
number = 3

class app:
    state = cache

def make():
    return TableCache(engine, views=[FlightBoard])

def fail():
    raise LookupError("no settings")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> str:
    """The name of a module of an application, with caches over an SQLite file."""
    name = re.sub(r"\W", "_", f"app_{request.node.name}")
    (tmp_path / f"{name}.py").write_text(MODULE.format(file=tmp_path / "flights.sqlite"))
    (tmp_path / f"{name}_broken.py").write_text("import nothing_like_this")
    monkeypatch.syspath_prepend(tmp_path)
    return name


TABLES = """
  key       id
  columns   17: id, time_hour, flight, tailnum, origin, dest, distance, sched_dep_time, dep_delay,
            arr_delay, airline, origin_name, dest_name, plane_model, plane_year, temperature,
            wind_speed
  indexes   by_time (time_hour)
            by_plane (tailnum, time_hour)
            by_delay (coalesce(flights.dep_delay, 0))
  tables    flights   by id (anchor)
            airlines  by _key1_carrier (hidden)
            airports  by origin; by dest (may be missing)
            planes    by tailnum (may be missing)
            weather   by origin, time_hour (may be missing)
"""


@pytest.mark.parametrize("name", ["cache", "slow", "make()", "app.state"])
def test_a_cache_is_described(module: str, name: str, capsys: pytest.CaptureFixture[str]):
    """Keys, indexes, tables and SQL, of a cache of either kind, however it is named."""
    assert main(["inspect", f"{module}:{name}"]) == 0
    out = capsys.readouterr().out
    assert f"FlightBoard  (examples.flights_models){TABLES}" in out
    assert "    LEFT OUTER JOIN planes ON flights.tailnum = planes.tailnum\n" in out
    assert "    FROM (the view) AS flight_board\n" in out
    assert "  refresh after changes of planes\n    ... WHERE flight_board._key4_tailnum IN" in out
    assert out.endswith("no problems\n")
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_it_runs_as_a_module(module: str, tmp_path: Path):
    """From a shell, the application's module is found in the working directory."""
    done = subprocess.run(
        [sys.executable, "-m", "sa_tablecache", "inspect", f"{module}:cache", "--json"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout)["views"][0]["key"] == ["id"]


@pytest.mark.parametrize("name", ["gone", "slow_gone"])
def test_without_its_database_it_tells_what_it_can(module: str, name: str, capsys: Any):
    """The declarations are told in the engine's dialect, without the password, and it fails."""
    assert main(["inspect", f"{module}:{name}"]) == 1
    out = capsys.readouterr().out
    assert "me:***@127.0.0.1:1/x\n          not reachable: " in out
    assert "secret" not in out
    assert "What only the database can tell is missing" in out
    assert f"FlightBoard  (examples.flights_models){TABLES}" in out
    assert "problems" not in out.rpartition("view\n")[2]


def test_an_unbound_cache_has_no_dialect(module: str, capsys: pytest.CaptureFixture[str]):
    """It says what to do about it."""
    assert main(["inspect", f"{module}:unbound"]) == 1
    assert "name a function that makes a bound one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("{0}", "is not of the form MODULE:NAME"),
        (":cache", "is not of the form MODULE:NAME"),
        ("{0}:", "is not of the form MODULE:NAME"),
        ("{0}:nothing", "has no 'nothing'; it has cache, slow, gone, slow_gone, unbound, closed"),
        ("{0}:app.nothing", "{0}.app has no 'nothing'"),
        ("{0}:number", "is of type int, not a TableCache"),
        ("{0}:number()", "is of type int, not a function"),
        ("{0}:make", "if it makes a cache, say {0}:make()"),
        ("{0}:fail()", "raised LookupError: no settings"),
        ("{0}:closed", "was closed"),
        ("{0}.nothing:cache", "there is no module '{0}.nothing'"),
        ("nothing_like_this:cache", "there is no module 'nothing_like_this'"),
        ("{0}_broken:cache", "importing {0}_broken failed: No module named 'nothing_like_this'"),
    ],
)
def test_what_names_no_cache_is_an_error(module: str, named: str, message: str, capsys: Any):
    """The message says what was wrong, and what would be right."""
    assert main(["inspect", named.format(module)]) == 2
    assert message.format(module) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "write"),
    [
        ("planes", update(Plane).where(Plane.tailnum == "N1").values(model=None)),
        ("flights", update(Flight).where(Flight.id == 1).values(delay=1.0)),
    ],
)
def test_the_sql_is_what_is_sent(database: Database, table: str, write: Any):
    """The SELECTs of a load and of a refresh after a change are word for word those told."""
    with (
        flights_world(database) as world,
        TableCache(world.engine, views=[OuterBoard]) as cache,
    ):
        told = describe(cache)["views"][0]["sql"]
        with counting() as statements:
            cache.load(OuterBoard)
        assert told["load"] in map(plain, statements)
        with world.Session() as session:
            session.execute(write)
            session.commit()
        with counting() as statements:
            cache.refresh(OuterBoard)
        assert told["refresh"][table] in map(plain, statements)


def plain(statement: str) -> str:
    """Return a statement with its list of keys left open, and its one constant written out."""
    statement = re.sub(r"IN \(.*\)$", "IN (...)", statement)
    return re.sub(r"(coalesce\(\S+, ).+?\) AS", r"\g<1>0) AS", statement)


def test_every_view_can_be_described(database: Database):
    """Groups, aliases, subqueries, set operations: all is told, as JSON and as text."""
    with (
        flights_world(database) as world,
        contextlib.closing(
            TableCache(world.engine, views=[k.view for k in KINDS.values()])
        ) as cache,
    ):
        description = json.loads(json.dumps(describe(cache)))
        page = rendered(description)
        for name, kind in KINDS.items():
            assert f"\n{name}  (" in page
            told = next(view for view in description["views"] if view["name"] == name)
            coarse = [table["coarse"] for table in told["tables"] if table["coarse"]]
            assert bool(coarse) or not kind.coarse
        assert "by the groups of" in page
        assert "coarse: any change marks the whole view: " in page
        problems = page.rpartition("\nproblems\n")[2]
        assert all(" ".join(str(p).split()) in " ".join(problems.split()) for p in cache.check())


def test_how_a_view_is_kept_is_told(sqlite: Database):
    """The policy, as it would be written, and what the view says of stale answers."""

    class Kept(CachedView):
        __select__ = select(Flight.id, Flight.hour)
        __max_staleness__ = timedelta(minutes=1)
        __refresh__ = "eager"
        by_hour = ScoreIndex("hour")
        __policy__ = SlidingWindow(by_hour, past=timedelta(hours=1))

    with flights_world(sqlite) as world, contextlib.closing(TableCache(world.engine)) as cache:
        cache.add(Kept)
        cache.add(OuterBoard, policy=ReadThrough(max_records=5))
        cache.set_mode(OuterBoard, "shadow")
        page = rendered(describe(cache))
    window = "SlidingWindow(by=by_hour, past=datetime.timedelta(seconds=3600))"
    assert f"  policy    {window}\n" in page
    assert "  refresh   eager; answers may be stale: 0:01:00\n" in page
    assert "  mode      shadow\n  policy    ReadThrough(max_records=5)\n" in page


def test_problems_make_it_fail(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The exit status is 1 where `check()` complains, of a view that cannot be used at all, too."""
    (tmp_path / f"{module}_odd.py").write_text(
        "from sqlalchemy import Integer, create_engine, select\n"
        "from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column\n"
        "from sa_tablecache import CachedView, TableCache\n"
        "class Base(DeclarativeBase): pass\n"
        "class Row(Base):\n"
        "    __tablename__ = 'rows'\n"
        "    id: Mapped[int] = mapped_column(primary_key=True)\n"
        "    folded: Mapped[str]\n"
        "class Distinct(CachedView):\n"
        "    __select__ = select(Row.id, Row.folded).distinct()\n"
        "class Whole(CachedView):\n"
        "    __select__ = select(Row.id)\n"
        f"engine = create_engine('sqlite:///{tmp_path / 'odd.sqlite'}')\n"
        "with engine.begin() as connection:\n"
        "    connection.exec_driver_sql('CREATE VIEW rows AS SELECT 1 AS id, 2 AS folded')\n"
        "cache = TableCache(engine, views=[Distinct, Whole])\n"
    )
    assert main(["inspect", f"{module}_odd:cache"]) == 1
    problems = capsys.readouterr().out.rpartition("\nproblems\n")[2]
    assert "Distinct: " in problems
    assert "Whole: " in problems


def test_sql_is_broken_where_a_reader_would():
    """A line for each clause and joined table, and the kind of a join beside it."""
    sql = "SELECT a.x,  b.y \nFROM a LEFT OUTER JOIN b ON a.x = b.x JOIN c ON 1 = 1 WHERE a.x = 1"
    assert pretty(sql) == [
        "SELECT a.x, b.y",
        "FROM a",
        "LEFT OUTER JOIN b ON a.x = b.x",
        "JOIN c ON 1 = 1",
        "WHERE a.x = 1",
    ]
