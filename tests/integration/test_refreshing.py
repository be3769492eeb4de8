"""What a refresh sends to the database: how many statements, and that they are the right ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, delete, event, update

from sa_tablecache import TableCache
from sa_tablecache.comparison import Comparison
from tests.integration.databases import Database
from tests.integration.flights import World, flight, flights_world, hour
from tests.zoo import Flight, OuterBoard, Plane

pytestmark = pytest.mark.every_database


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    """Six flights, of which those from nine to eleven are cached."""
    with flights_world(database) as world:
        world.cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
        yield world


@contextmanager
def selects(cache: TableCache) -> Iterator[list[str]]:
    """Collect the SELECTs that the cache itself sends."""
    found: list[str] = []

    def sent(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.lstrip().startswith("SELECT"):
            found.append(statement)

    engine: Engine = cache.snapshots.engine
    event.listen(engine, "before_cursor_execute", sent)
    try:
        yield found
    finally:
        event.remove(engine, "before_cursor_execute", sent)


def write(world: World, *statements: Any) -> None:
    """Commit each statement by itself."""
    for statement in statements:
        with world.Session() as session:
            session.execute(statement)
            session.commit()


def delays(world: World, *criteria: Any) -> dict[int, Any]:
    """Return the delays of what is read in the cached hours, which has to be a hit."""
    between = (OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
    with world.Session() as session:
        found = session.query(OuterBoard).filter(*between, *criteria).all()
        assert session.last_read is not None
        assert session.last_read.kind == "hit", session.last_read
    return {record.id: record.delay for record in found}


def test_many_commits_to_one_table_are_one_select(world: World) -> None:
    """However many commits wrote rows of a table, the next read sends one SELECT for it."""
    write(world, *(update(Flight).where(Flight.id == n % 6 + 1).values(delay=n) for n in range(60)))
    with selects(world.cache) as sent:
        assert delays(world) == {2: 55, 3: 56, 4: 57}
    assert len(sent) == 1, sent


def test_many_commits_to_two_tables_are_one_select_each(world: World) -> None:
    """Rows of a joined table take one more SELECT, which brings the records that they are in."""
    write(
        world,
        *(update(Flight).where(Flight.id == n % 6 + 1).values(delay=n) for n in range(60)),
        *(update(Plane).where(Plane.tailnum == f"N{n % 3 + 1}").values(year=n) for n in range(60)),
    )
    with selects(world.cache) as sent:
        assert delays(world) == {2: 55, 3: 56, 4: 57}
    assert len(sent) == 2, sent


def test_the_same_select_brings_what_another_coverage_needs(world: World) -> None:
    """A SELECT that was made for one coverage is not used for the next one."""
    write(world, update(Flight).where(Flight.id == 2).values(delay=7.0))
    assert delays(world)[2] == 7.0
    world.cache.extend(OuterBoard, OuterBoard.hour >= hour(3), OuterBoard.hour < hour(4))
    write(world, update(Flight).where(Flight.id.in_([2, 5])).values(delay=8.0))
    with world.Session() as session:
        found = session.query(OuterBoard).filter(
            OuterBoard.hour >= hour(1), OuterBoard.hour < hour(4), OuterBoard.delay == 8.0
        )
        assert sorted(record.id for record in found) == [2, 5]
    world.cache.load(OuterBoard, OuterBoard.hour >= hour(1), OuterBoard.hour < hour(3))
    write(world, update(Flight).where(Flight.id.in_([2, 5])).values(delay=9.0))
    assert delays(world)[2] == 9.0
    world.cache.table(OuterBoard)._check()


def test_each_refresh_looks_up_its_own_rows(world: World) -> None:
    """Rows that come, move and go are found by a SELECT that was made for others."""
    for number in range(3):
        write(world, update(Flight).where(Flight.id == 2 + number).values(delay=100 + number))
        assert delays(world)[2 + number] == 100 + number
    with world.Session() as session:
        session.add(Flight(**flight(7, 2, delay=1.0)))
        session.commit()
    assert delays(world)[7] == 1.0
    write(world, update(Flight).where(Flight.id == 7).values(hour=hour(5)))
    assert 7 not in delays(world)
    write(world, update(Flight).where(Flight.id == 7).values(hour=hour(2)))
    assert delays(world)[7] == 1.0
    write(world, delete(Flight).where(Flight.id == 7))
    assert 7 not in delays(world)
    world.cache.table(OuterBoard)._check()


def test_a_column_that_turns_out_not_to_sort_is_not_asked_for_in_order(world: World) -> None:
    """What is known of the criteria of a coverage goes with what is known of its columns."""
    table = world.cache.table(OuterBoard)
    layout = table.set_up()
    coverage = table.state.coverage
    clauses = layout.coverage_clause(coverage)
    assert clauses
    assert layout.coverage_clause(coverage) is clauses
    comparisons: Any = layout.columns.comparisons
    comparisons["hour"] = Comparison(False, False, reason="it holds something else")
    assert layout.coverage_clause(coverage) == []
