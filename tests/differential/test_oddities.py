"""Wrong answers that random questions would find too rarely: what databases do with odd values."""

import datetime as dt
import enum
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import (
    JSON,
    REAL,
    URL,
    BigInteger,
    Boolean,
    Column,
    Date,
    DateTime,
    Double,
    Engine,
    Enum,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    String,
    Table,
    Text,
    Time,
    Uuid,
    create_engine,
    func,
    literal,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.exc import DBAPIError

from sa_tablecache import CachedView, ScoreIndex, TableCache
from sa_tablecache.exc import TableCacheError
from tests.differential.tables import bytewise
from tests.differential.values import NAN

metadata = MetaData()
odd = Table(
    "odd",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("flag", Boolean),
    Column("number", Integer),
    Column("ratio", Double),
    Column("name", String(20)),
    Column("data", LargeBinary),
    Column("at", DateTime),
    Column("day", Date),
    Column("clock", Time),
    Column("uid", Uuid),
)


class Odd(CachedView):
    """A table whose values nobody checked."""

    __select__ = select(odd)

    by_flag = ScoreIndex("flag")
    by_at = ScoreIndex("at")


class Reader:
    """A cache of a view, everything loaded, and the truth."""

    def __init__(self, engine: Engine, view: type[CachedView] = Odd) -> None:
        self.engine = engine
        self.view = view
        self.cache = TableCache(engine, views=[view])
        self.cache.load(view)
        self.Session = self.cache.sessionmaker()
        self.kind = ""

    def ids(self, *criteria: Any, order: Any = ()) -> list[int]:
        """Return the ids of the records that meet criteria; assert that the database agrees."""
        view: Any = self.view
        statement = select(view).where(*criteria).order_by(*order, view.id)
        with self.Session() as session:
            found = [record.id for record in session.scalars(statement)]
            assert session.last_read is not None
            self.kind = session.last_read.kind
        with self.engine.connect() as connection:
            expected = [row.id for row in connection.execute(statement)]
        assert found == expected, f"{self.kind}: {' and '.join(map(str, criteria))}"
        return found


@pytest.fixture
def sqlite(sqlite_url: Any) -> Iterator[Engine]:
    """An SQLite file with the table, and one row that is as it should be."""
    engine = create_engine(sqlite_url)
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            odd.insert().values(
                id=1, flag=True, number=1, ratio=1.0, name="1", data=b"1",
                at=dt.datetime(2024, 1, 1), day=dt.date(2024, 1, 1), clock=dt.time(1),
                uid=uuid.UUID(int=1),
            )
        )  # fmt: skip
    yield engine
    engine.dispose()


VIEW: Any = Odd

#: A column, what else SQLite holds in it, and criteria that Python would answer otherwise.
STORED: list[tuple[str, str, list[Any]]] = [
    ("flag", "2", [VIEW.flag, VIEW.flag.is_(True), VIEW.flag.is_(False), ~VIEW.flag]),
    ("number", "'abc'", [VIEW.number > 0, VIEW.number != 1]),
    ("number", "1.5", [VIEW.number > 1, VIEW.number == 1]),
    ("number", "x'31'", [VIEW.number > 0, VIEW.number.in_([1])]),
    ("ratio", "'abc'", [VIEW.ratio > 0.5, VIEW.ratio == 1.0]),
    ("name", "x'31'", [VIEW.name == "1", VIEW.name > "0"]),
    ("data", "'1'", [VIEW.data == b"1", VIEW.data > b"0"]),
    ("at", "'2024-01-01 00:00:00'", [VIEW.at == dt.datetime(2024, 1, 1)]),
    ("at", "'2024-01-01T00:00:00.000000'", [VIEW.at <= dt.datetime(2024, 1, 1, 1)]),
    ("clock", "'01:00:00'", [VIEW.clock == dt.time(1)]),
    ("uid", f"'{uuid.UUID(int=10)}'", [VIEW.uid == uuid.UUID(int=10)]),
    ("uid", f"'{uuid.UUID(int=10).hex.upper()}'", [VIEW.uid == uuid.UUID(int=10)]),
]


@pytest.mark.parametrize(("column", "value", "criteria"), STORED, ids=lambda v: str(v)[:30])
def test_a_value_in_another_form_leaves_its_column_to_sqlite(
    sqlite: Engine, column: str, value: str, criteria: list[Any]
) -> None:
    """SQLite stores anything anywhere; a column of which one value is odd is the database's."""
    with sqlite.begin() as connection:
        connection.execute(text(f"INSERT INTO odd (id, {column}) VALUES (2, {value})"))
    reader = Reader(sqlite)
    for criterion in criteria:
        reader.ids(criterion)
        assert reader.kind == "bypass", str(criterion)
    reader.ids(VIEW.id >= 1)
    assert reader.kind == "hit", "other columns are served"


def test_an_odd_value_that_a_refresh_finds(sqlite: Engine) -> None:
    """What is written later in another form is noticed when it is read, and `check()` tells."""
    reader = Reader(sqlite)
    assert reader.ids(VIEW.flag) == [1]
    assert reader.kind == "hit"
    with sqlite.begin() as connection:
        connection.execute(text("INSERT INTO odd (id, flag) VALUES (2, 2)"))
    reader.ids(VIEW.id > 0)
    assert reader.ids(VIEW.flag) == [1]
    assert reader.kind == "bypass"
    problems = [str(problem) for problem in reader.cache.check()]
    assert any("by_flag" in problem and "it holds 2" in problem for problem in problems)


def test_truth_values_and_numbers_as_they_should_be_are_served(sqlite: Engine) -> None:
    """Values that SQLAlchemy itself stored are compared in memory, whichever they are."""
    with sqlite.begin() as connection:
        connection.execute(odd.insert(), [{"id": 3, "flag": False}, {"id": 4, "flag": None}])
    reader = Reader(sqlite)
    assert reader.ids(VIEW.flag) == [1]
    assert reader.ids(~VIEW.flag) == [3]
    assert reader.ids(VIEW.at >= dt.datetime(2024, 1, 1)) == [1]
    assert reader.ids(VIEW.uid == uuid.UUID(int=1)) == [1]
    assert reader.kind == "hit"


def test_a_key_in_another_form_is_refused(sqlite_url: Any) -> None:
    """Records are found by their keys: one that does not compare is an error that says so."""
    keyed = Table("keyed", MetaData(), Column("id", Uuid, primary_key=True))

    class Keyed(CachedView):
        """A key that SQLite stores as text."""

        __select__ = select(keyed)

    engine = create_engine(sqlite_url)
    keyed.create(engine)
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO keyed VALUES ('{uuid.UUID(int=10)}')"))
    with pytest.raises(TableCacheError, match="identifies rows"):
        Reader(engine, Keyed)
    engine.dispose()


def test_null_where_the_model_says_not_null(sqlite_url: Any) -> None:
    """A NULL that the model denies is an error that says so, not a row that is lost."""
    declared = Table(
        "declared", MetaData(), Column("id", Integer, primary_key=True),
        Column("number", Integer, nullable=False),
    )  # fmt: skip

    class Declared(CachedView):
        """A model that is stricter than its table."""

        __select__ = select(declared)

    engine = create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE declared (id INTEGER PRIMARY KEY, number INTEGER)"))
        connection.execute(text("INSERT INTO declared VALUES (1, 1), (2, NULL)"))
    with pytest.raises(TableCacheError, match="number is NULL"):
        Reader(engine, Declared)
    engine.dispose()


def test_text_in_utf_16_does_not_sort_by_code_points(sqlite_url: Any) -> None:
    """An SQLite file in UTF-16 compares bytes of that, so that only single texts are served."""
    engine = create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(text("PRAGMA encoding = 'UTF-16le'"))
        metadata.create_all(connection)
        names = ["a", "\u0100", "😀", "\uff5e"]
        rows = [{"id": at, "name": name} for at, name in enumerate(names)]
        connection.execute(odd.insert(), rows)
    reader = Reader(engine)
    reader.ids(VIEW.name > "b", order=[VIEW.name])
    assert reader.kind == "bypass"
    assert reader.ids(VIEW.name == "😀") == [2]
    assert reader.kind == "hit"
    engine.dispose()


@pytest.mark.parametrize(
    "statement",
    [
        select(VIEW).order_by(VIEW.id).limit(0),
        select(VIEW).order_by(VIEW.id).offset(100),
        select(VIEW).order_by(VIEW.id).limit(5).offset(100),
        select(VIEW).order_by(VIEW.id.desc()).limit(1).offset(0),
        select(VIEW.number).distinct().order_by(VIEW.number),
        select(VIEW).order_by(VIEW.number.nulls_last(), VIEW.id),
        select(VIEW).where(VIEW.number.in_([])),
        select(VIEW).where(VIEW.number.not_in([])),
        select(VIEW).where(VIEW.number.in_([None])),
        select(VIEW).where(VIEW.number.not_in([1, None])),
        select(VIEW).where(VIEW.ratio.in_([1, 2.5])),
        select(VIEW).where(VIEW.ratio == literal(2**53 + 1)),
        select(VIEW).where(VIEW.number == literal(1, String)),
        select(VIEW).where(VIEW.day == dt.datetime(2024, 1, 1)),
        select(VIEW).where(VIEW.at == dt.date(2024, 1, 1)),
        select(func.count()).select_from(VIEW).where(VIEW.number.is_(None)),
    ],
    ids=lambda statement: " ".join(str(statement).split())[-60:],
)
def test_the_edges_of_statements(sqlite: Engine, statement: Any) -> None:
    """LIMIT 0, an OFFSET past the end, empty lists, NULL in lists, parameters of other types."""
    rows = [{"id": at, "number": at % 3 or None, "ratio": at / 2} for at in range(2, 9)]
    with sqlite.begin() as connection:
        connection.execute(odd.insert(), rows)
    reader = Reader(sqlite)

    def answer(run: Callable[[Any], Any]) -> list[Any]:
        return [tuple(row) for row in run(statement)]

    with reader.Session() as session:
        found = session.execute(statement).all()
    plain = [
        tuple(getattr(row[0], name) for name in Odd.__table__.c.keys())  # noqa: SIM118
        if isinstance(row[0], Odd)
        else tuple(row)
        for row in found
    ]
    with sqlite.connect() as connection:
        assert plain == answer(connection.execute)


# -- MariaDB -------------------------------------------------------------------------------------


mood = Table(
    "mood",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("flag", Boolean),
    Column("single", Float),
    Column("double", Double),
    Column("at", DateTime),
    Column("stamp", mysql.TIMESTAMP),
    Column("folded", String(20)),
    Column("padded", String(20, collation="utf8mb4_bin")),
    Column("bytewise", String(20, collation="utf8mb4_nopad_bin")),
    Column("long", Text(collation="utf8mb4_nopad_bin")),
    Column("binary", mysql.VARBINARY(20)),
    Column("fixed", mysql.BINARY(4)),
    Column("unsigned", mysql.BIGINT(unsigned=True)),
)


class OnMariaDB(CachedView):
    """Columns that MariaDB compares in ways of its own."""

    __select__ = select(mood, func.coalesce(mood.c.single, 0).label("some"))

    by_folded = ScoreIndex("folded")
    by_bytewise = ScoreIndex("bytewise")
    by_binary = ScoreIndex("binary")
    by_single = ScoreIndex("single")
    by_double = ScoreIndex("double")


MARIA: Any = OnMariaDB
WORDS = ["a", "A", "a ", "\u00e1", "", "\U0001f600", "b", "\uff5e", "\u0102"]


@pytest.fixture
def maria(mariadb: Any) -> Iterator[Engine]:
    """A MariaDB database with text and numbers of all kinds."""
    engine = create_engine(mariadb)
    mood.create(engine)
    with engine.begin() as connection:
        connection.execute(
            mood.insert(),
            [
                {
                    "id": at, "flag": bool(at % 2), "single": at / 10, "double": at / 10,
                    "at": dt.datetime(2024, 10, 27, 2, 30, 0, 500_000 * (at % 2)),
                    "stamp": dt.datetime(2024, 10, 27, 2, 30),
                    "folded": word, "padded": word, "bytewise": word, "long": word,
                    "binary": word.encode(), "fixed": b"ab", "unsigned": 2**63 + at,
                }
                for at, word in enumerate(WORDS)
            ],
        )  # fmt: skip
    yield engine
    engine.dispose()


def test_what_mariadb_compares_as_python_does(maria: Engine) -> None:
    """Text under a NO PAD binary collation, bytes, doubles and datetimes are served."""
    reader = Reader(maria, OnMariaDB)
    for word in [*WORDS, "ab", "\U0001f601"]:
        for criterion in (
            MARIA.bytewise == word, MARIA.bytewise > word, MARIA.bytewise <= word,
            MARIA.binary == word.encode(), MARIA.binary < word.encode(),
        ):  # fmt: skip
            reader.ids(criterion)
            assert reader.kind == "hit", str(criterion)
    for criterion in (
        MARIA.double == 0.1, MARIA.double > 0.3, MARIA.some == 0.1, MARIA.unsigned > 5,
        MARIA.at == dt.datetime(2024, 10, 27, 2, 30),
        MARIA.at > dt.datetime(2024, 10, 27, 2, 30, 0, 499_999),
    ):  # fmt: skip
        reader.ids(criterion)
        assert reader.kind == "hit", str(criterion)
    for order in (MARIA.bytewise, MARIA.bytewise.desc(), MARIA.binary, MARIA.double.desc()):
        reader.ids(order=[order])
        assert reader.kind == "hit", str(order)


def test_what_is_left_to_mariadb(maria: Engine) -> None:
    """Folded and padded text, single precision, time zones and numbers for text are its own."""
    reader = Reader(maria, OnMariaDB)
    for criterion in (
        MARIA.folded == "a", MARIA.padded == "a", MARIA.folded > "a", MARIA.bytewise == 0,
        MARIA.single == 0.1, MARIA.fixed == b"ab", MARIA.id == "1",
        MARIA.stamp == dt.datetime(2024, 10, 27, 2, 30),
        MARIA.id.in_([True]), MARIA.at == dt.date(2024, 10, 27), MARIA.unsigned > 2**63,
    ):  # fmt: skip
        reader.ids(criterion)
        assert reader.kind == "bypass", str(criterion)
    with pytest.raises(DBAPIError, match="mix of collations"), reader.Session() as session:
        session.scalars(select(MARIA).where(MARIA.bytewise == MARIA.padded)).all()


def test_text_that_mariadb_sorts_otherwise_than_it_compares(maria: Engine) -> None:
    """Its filesort takes NUL for the end of text and looks at max_sort_length bytes."""
    rows = [
        {"id": 20, "bytewise": "a\x00", "long": "x" * 1100 + "b"},
        {"id": 21, "bytewise": None, "long": "x" * 1100 + "a"},
    ]
    with maria.begin() as connection:
        connection.execute(mood.insert(), rows)
    reader = Reader(maria, OnMariaDB)
    for column in (MARIA.bytewise, MARIA.long):
        for order in (column, column.desc()):
            reader.ids(order=[order])
            assert reader.kind == "bypass", str(order)
        reader.ids(column == "a")
        assert reader.kind == "hit"


def test_a_truth_value_that_is_two(maria: Engine) -> None:
    """A 2 is true to SQLAlchemy, and neither true nor false to MariaDB."""
    with maria.begin() as connection:
        connection.execute(text("INSERT INTO mood (id, flag) VALUES (20, 2)"))
    reader = Reader(maria, OnMariaDB)
    for criterion in (MARIA.flag, ~MARIA.flag, MARIA.flag.is_(True), MARIA.flag.is_not(True)):
        reader.ids(criterion)
        assert reader.kind == "bypass"


# -- PostgreSQL ----------------------------------------------------------------------------------


class Letter(enum.StrEnum):
    """An Enum of strings, whose members equal strings."""

    A = "a"
    B = "b"


elephant = Table(
    "elephant",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("ratio", Double),
    Column("price", Numeric),
    Column("seen", DateTime(timezone=True)),
    Column("letter", Enum(Letter)),
    Column("word", Enum(Letter, native_enum=False)),
    Column("code", String(collation="C")),
    Column("document", JSON),
)


class OnPostgreSQL(CachedView):
    """Columns that PostgreSQL compares in ways of its own."""

    __select__ = select(elephant)

    by_ratio = ScoreIndex("ratio")
    by_seen = ScoreIndex("seen")


ELEPHANT: Any = OnPostgreSQL
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.fixture
def berlin(postgres_url: URL) -> Iterator[Engine]:
    """A PostgreSQL database whose connections are in a zone with daylight-saving time."""
    zone = {"options": "-c TimeZone=Europe/Berlin"}
    engine = create_engine(postgres_url, connect_args=zone)
    elephant.create(engine)
    ratios = [0.0, -0.0, float("nan"), 1.5, float("inf"), None]
    start = dt.datetime(2024, 10, 27, 0, 0, tzinfo=dt.UTC)
    with engine.begin() as connection:
        connection.execute(
            elephant.insert(),
            [
                {
                    "id": at, "ratio": ratios[at % 6], "price": Decimal(at) / 4,
                    "seen": start + at * dt.timedelta(minutes=30), "code": "ab"[at % 2],
                    "letter": list(Letter)[at % 2], "word": list(Letter)[at % 2],
                    "document": None,
                }
                for at in range(12)
            ],
        )  # fmt: skip
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    ("criterion", "kind"),
    [
        (ELEPHANT.seen == dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN), "hit"),
        (ELEPHANT.seen >= dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1), "hit"),
        (ELEPHANT.ratio > 1.0, "hit"),
        (ELEPHANT.ratio == NAN, "bypass"),
        (ELEPHANT.ratio.in_([1, 1.5]), "bypass"),  # sent as integers
        (ELEPHANT.ratio.in_([1.5, 1]), "hit"),
        (tuple_(ELEPHANT.id, ELEPHANT.ratio).in_([(3, 1), (3, 1.5)]), "bypass"),
        (ELEPHANT.price > 1, "hit"),
        (ELEPHANT.price > 0.5, "bypass"),
        (ELEPHANT.letter == Letter.A, "hit"),
        (ELEPHANT.letter == "a", "bypass"),
        (ELEPHANT.letter > Letter.A, "bypass"),
        (ELEPHANT.word == "A", "bypass"),
        (ELEPHANT.code > "a", "hit"),
        (ELEPHANT.document.is_(None), "bypass"),  # JSON null is None, and not NULL
        (ELEPHANT.id.in_([1, Decimal(2)]), "bypass"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_postgresql_compares(berlin: Engine, criterion: Any, kind: str) -> None:
    """What is exact is served, and what is not is left to the database."""
    reader = Reader(berlin, OnPostgreSQL)
    reader.ids(criterion)
    assert reader.kind == kind


def test_a_criterion_that_postgresql_refuses_is_refused(berlin: Engine) -> None:
    """Where the database raises an error, a cache does not answer."""
    reader = Reader(berlin, OnPostgreSQL)
    for criterion in (
        ELEPHANT.letter == ELEPHANT.word,
        ELEPHANT.id == 2**31,
        ELEPHANT.code.between("a", "b"),  # SQLAlchemy renders a COLLATE that cannot stand there
        ELEPHANT.seen <= literal(None, BigInteger),
    ):
        with pytest.raises(DBAPIError), reader.Session() as session:
            session.scalars(select(ELEPHANT).where(criterion)).all()


@pytest.mark.parametrize("descending", [False, True])
def test_pages_through_nan(berlin: Engine, descending: bool) -> None:
    """Pages go on after a NaN, whether the rest is in storage or has to be fetched."""
    reader = Reader(berlin, OnPostgreSQL)
    column = elephant.c.ratio.desc() if descending else elephant.c.ratio
    last = elephant.c.id.desc() if descending else elephant.c.id
    with berlin.connect() as connection:
        expected = list(connection.scalars(select(elephant.c.id).order_by(column, last)))
    for criteria in ([], [ELEPHANT.ratio >= 1.0], [ELEPHANT.ratio < 1.0]):
        reader.cache.load(OnPostgreSQL, *criteria)
        found: list[int] = []
        after = None
        with reader.Session() as session:
            while page := session.range(
                ELEPHANT.by_ratio, limit=2, after=after, descending=descending
            ):
                found += [record.id for record in page]
                after = page[-1]
        assert found == expected


def test_a_selected_datetime_is_in_the_zone_of_the_connection(berlin: Engine) -> None:
    """A column has its values as the driver gives them; records have them in UTC."""
    reader = Reader(berlin, OnPostgreSQL)
    statement = select(ELEPHANT.id, ELEPHANT.seen).order_by(ELEPHANT.id)
    with reader.Session() as session:
        found = [repr(tuple(row)) for row in session.execute(statement)]
        assert session.last_read is not None
        assert session.last_read.kind == "hit"
        assert session.get(ELEPHANT, 1).seen.tzinfo is dt.UTC
    with berlin.connect() as connection:
        assert found == [repr(tuple(row)) for row in connection.execute(statement)]


# -- what an owner is told -----------------------------------------------------------------------


def test_check_names_the_indexes_that_never_serve(url: URL) -> None:
    """`check()` tells which indexes a collation keeps from serving, and the way out."""
    told = Table(
        "told",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("name", String(20)),
        Column("code", bytewise()),
        Column("single", REAL),
    )

    class Told(CachedView):
        """Text under two collations."""

        __select__ = select(told)

        by_name = ScoreIndex("name")
        by_code = ScoreIndex("code")
        by_single = ScoreIndex("single")

    engine = create_engine(url)
    told.create(engine)
    with TableCache(engine, views=[Told]) as cache:
        problems = {p.what.split()[0]: p.what for p in cache.check()}
        reads_bytes = url.get_backend_name() == "sqlite" or _is_bytewise(engine)
    assert "by_code" not in problems
    assert "single precision" in problems["by_single"] or "stored as" in problems["by_single"]
    assert ("by_name" in problems) is not reads_bytes
    if not reads_bytes:
        assert "collation" in problems["by_name"]
        assert "declare the column with collation=" in problems["by_name"]
    engine.dispose()


def _is_bytewise(engine: Engine) -> bool:
    """Whether a database sorts upper case before lower case."""
    with engine.connect() as connection:
        return bool(connection.scalar(text("SELECT 'B' < 'a'")))
