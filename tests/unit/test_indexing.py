"""Which database indexes reads of a view need, and what of its tables has to be watched."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    Column,
    Connection,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    func,
    select,
)

from sa_tablecache import CachedView, ScoreIndex
from sa_tablecache.analysis import plan_of
from sa_tablecache.feed.needs import Need, needs_of
from sa_tablecache.indexing import (
    KnownIndex,
    declared_indexes,
    existing_indexes,
    lacking_indexes,
)
from tests.zoo import KINDS


def lacking(*names: str, dialect: str = "sqlite") -> set[tuple[str, tuple[str, ...]]]:
    """Return the indexes that views of the zoo lack: tables and columns."""
    plans = [plan_of(KINDS[name].view) for name in names]
    found = lacking_indexes(plans, lambda table: declared_indexes(table, dialect), dialect)
    return {(index.table.name, index.columns) for index in found}


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        # flights.hour has an index; the others are joined by their primary keys.
        (["ByRelationship"], {("flights", ("carrier",)), ("flights", ("tailnum",))}),
        # An index for loads begins as one for a join: one is enough.
        (
            ["InnerBoard"],
            {("flights", ("carrier", "hour")), ("flights", ("delay",))},
        ),
        (
            ["InnerBoard", "ByRelationship"],
            {
                ("flights", ("carrier", "hour")),
                ("flights", ("delay",)),
                ("flights", ("tailnum",)),
            },
        ),
        # A composite key is joined by both of its columns.
        (["AirportChain"], {("weather", ("hour",)), ("weather", ("temp", "hour")),
                            ("flights", ("origin", "hour"))}),
        # A chain: from a customer to orders by their foreign key, to items by the primary key.
        (["WholeChain"], {("orders", ("day",)), ("orders", ("customer_id",)), ("items", ("qty",))}),
        # From one end of many-to-many by the primary key of the link, from the other not.
        (["TaggedPeople"], {("person_tag", ("tag_id",))}),
        (["GrandBosses"], {("person", ("boss_id",))}),
        # Groups of a view, and of a subquery that it joins.
        (["CarrierTotals"], {("flights", ("carrier",))}),
        (["BusyAirlines"], {("flights", ("carrier",))}),
        # Any change marks the whole view.
        (["Names", "CarrierCounts"], set()),
    ],
)  # fmt: skip
def test_what_views_lack(views: list[str], expected: set[Any]) -> None:
    """Joins need the columns by which other tables are found, loads the leading scores."""
    assert lacking(*views) == expected


def test_foreign_keys_of_mysql_are_indexes() -> None:
    """MariaDB and MySQL make an index for each foreign key."""
    assert lacking("ByRelationship", dialect="mysql") == set()


def test_text_without_a_length_is_not_proposed_where_it_needs_one() -> None:
    """Columns that a dialect cannot index without being told how are left out."""
    metadata = MetaData()
    notes = Table(
        "notes",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("body", String),
        Column("title", String(40)),
        Column("data", JSON),
    )

    class Notes(CachedView):
        __select__ = select(notes)
        by_body = ScoreIndex("body")
        by_title = ScoreIndex("title")
        by_size = ScoreIndex(func.length(notes.c.body))

    def columns(dialect: str) -> list[tuple[str, ...]]:
        found = lacking_indexes([plan_of(Notes)], lambda t: declared_indexes(t, dialect), dialect)
        return [index.columns for index in found]

    assert columns("postgresql") == [("body",), ("title",)]
    assert columns("mariadb") == [("title",)]


@pytest.mark.parametrize(
    ("index", "columns", "serves"),
    [
        (KnownIndex(("a", "b")), ("a",), True),
        (KnownIndex(("a", "b")), ("b",), False),
        (KnownIndex(("a", "b", "c")), ("b", "a"), True),
        (KnownIndex(("a",)), ("a", "b"), False),
        (KnownIndex(("a",), unique=True), ("a", "b"), True),
        (KnownIndex((), unique=False), ("a",), False),
    ],
)
def test_what_an_index_serves(index: KnownIndex, columns: tuple[str, ...], serves: bool) -> None:
    """An index serves equality of its leading columns; a unique one, of all of its own."""
    assert index.serves(columns) is serves


@pytest.fixture
def table() -> Table:
    """A table with indexes of all kinds."""
    metadata = MetaData()
    Table("other", metadata, Column("x", Integer, primary_key=True))
    made = Table(
        "things",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("a", Integer, index=True),
        Column("b", Integer, unique=True),
        Column("c", ForeignKey("other.x")),
        Column("d", Integer),
        UniqueConstraint("c", "d"),
    )
    Index("partial", made.c.d, sqlite_where=made.c.d > 0, postgresql_where=made.c.d > 0)
    Index("computed", func.abs(made.c.d))
    Index("both", made.c.d, made.c.a)
    return made


KNOWN = {
    KnownIndex(("id",), unique=True),
    KnownIndex(("a",)),
    KnownIndex(("b",), unique=True),
    KnownIndex(("c", "d"), unique=True),
    KnownIndex(("d", "a")),
}


def test_indexes_of_the_metadata(table: Table) -> None:
    """Keys, unique constraints and plain indexes count; partial ones and expressions do not."""
    assert set(declared_indexes(table, "postgresql")) == KNOWN
    assert set(declared_indexes(table, "mysql")) == KNOWN | {KnownIndex(("c",))}


@pytest.mark.filterwarnings("ignore:Skipped unsupported reflection of expression-based index")
def test_indexes_of_the_database(table: Table) -> None:
    """The catalog says the same of them."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        table.metadata.create_all(connection)
        assert set(existing_indexes(connection, ("main", "things"))) == KNOWN
    engine.dispose()


def scans(connection: Connection, statement: Any) -> set[str]:
    """Return the tables that a statement reads as a whole."""
    compiled = statement.compile(connection, compile_kwargs={"literal_binds": True})
    rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {compiled}").all()
    return {row[3].split()[1] for row in rows if row[3].startswith("SCAN")}


@pytest.fixture
def schema() -> Iterator[tuple[Connection, MetaData]]:
    """An empty database, and metadata without indexes."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        yield connection, MetaData()
    engine.dispose()


def test_delta_queries_scan_no_table_any_more(schema: tuple[Connection, MetaData]) -> None:
    """With the lacking indexes, no change of one row makes the database read a whole table."""
    connection, metadata = schema
    Table("a", metadata, Column("id", Integer, primary_key=True), Column("x", Integer))
    Table(
        "b",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("a_id", ForeignKey("a.id")),
    )
    c = Table(
        "c",
        metadata,
        Column("k", Integer, primary_key=True),
        Column("l", Integer, primary_key=True),
        Column("b_id", ForeignKey("b.id")),
    )
    d = Table(
        "d",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("k", Integer),
        Column("l", Integer),
        ForeignKeyConstraint(["k", "l"], ["c.k", "c.l"]),
    )
    a, b = metadata.tables["a"], metadata.tables["b"]

    class Chain(CachedView):
        __select__ = (
            select(d.c.id, a.c.x)
            .join(c, (c.c.k == d.c.k) & (c.c.l == d.c.l))
            .join(b, b.c.id == c.c.b_id)
            .outerjoin(a, a.c.id == b.c.a_id)
        )

    plan = plan_of(Chain)
    metadata.create_all(connection)
    columns = [plan.column(leaf.hidden[0]).clause for leaf in plan.leaves]
    questions = [select(*columns).select_from(Chain.__table__).where(c == 1) for c in columns]
    assert any(scans(connection, question) for question in questions)
    for lack in lacking_indexes([plan], lambda t: declared_indexes(t, "sqlite"), "sqlite"):
        index = Index(None, *(lack.table.c[name] for name in lack.columns))
        index.create(connection)
    assert {index.name for t in metadata.tables.values() for index in t.indexes} == {
        "ix_b_a_id",
        "ix_c_b_id",
        "ix_d_k",
    }
    for question in questions:
        assert scans(connection, question) == set()


@pytest.mark.parametrize(
    ("view", "needs"),
    [
        # The scores of a table that an outer join NULL-extends are not all its own.
        (
            "OuterBoard",
            {
                "airlines": Need(("carrier",)),
                "flights": Need(("id",), ("hour", "tailnum")),
                "planes": Need(("tailnum",)),
            },
        ),
        # A table that stands twice in the view decides of one record by two rows.
        ("PeopleAndBosses", {"person": Need(("id",))}),
        # Coarse views are watched, too.
        ("Routes", {"flights": Need(("id",))}),
        # Of groups the values are logged, too, that a row had.
        (
            "OrdersByDay",
            {
                "orders": Need(("id", "day", "status"), ("day",)),
                "items": Need(("order_id", "line")),
            },
        ),
        ("WeatherHours", {"weather": Need(("origin", "hour"), ("hour", "temp"))}),
        # Of these types each database has a smallest and a largest value.
        (
            "Samples",
            {"samples": Need(("id",), ("id", "ratio", "amount", "word", "day", "clock", "moment"))},
        ),
    ],
)
def test_what_has_to_be_watched(view: str, needs: dict[str, Need]) -> None:
    """Each table of a view by its key, and with the columns that place its rows in an index."""
    found = needs_of([plan_of(KINDS[view].view)])
    assert {name: need for (_, name), need in found.items()} == needs


def test_a_key_that_models_disagree_on_is_left_to_the_database() -> None:
    """Two declarations of one table with different keys say none."""
    one = Table("t", MetaData(), Column("a", Integer, primary_key=True), Column("b", Integer))
    two = Table("t", MetaData(), Column("a", Integer), Column("b", Integer, primary_key=True))
    views = [
        type("V", (CachedView,), {"__select__": select(table.c.a, table.c.b)})
        for table in (one, two)
    ]
    assert needs_of(map(plan_of, views[:1])) == {(None, "t"): Need(("a",))}
    assert needs_of(map(plan_of, views)) == {(None, "t"): Need(())}
