"""Reading the database: snapshots, and rows into records.

In: a plan and the criteria of what to read. Out: :class:`Rows`, records with their hidden values.

Every load and refresh runs in one read-only REPEATABLE READ transaction on a small pool of the
cache's own: on the application's pool it could starve behind the very readers that wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, time, tzinfo
from typing import Any, TypeAlias, cast

from sqlalchemy import (
    VARBINARY,
    Boolean,
    Connection,
    Date,
    DateTime,
    Dialect,
    Engine,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Time,
    Uuid,
    select,
    text,
    type_coerce,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import SingletonThreadPool, StaticPool
from sqlalchemy.sql import ColumnElement
from sqlalchemy.types import NullType

from .analysis import ViewPlan
from .asking import READS
from .comparison import Comparison, to_utc
from .exc import TableCacheError, UnsuitableEngine
from .forks import abandon
from .readers import EveryScope
from .redaction import shown_value
from .rows import Rows

log = logging.getLogger(__name__)

Progress = Callable[[int], object]
"""Called now and then during a load with the number of records read so far."""

PARTITION = 1_000
"""Rows fetched at a time: few enough to be made into records while they are in the CPU's cache."""

MOST_KNOWN = 10_000
"""So many conversions of stored values are remembered for each column."""

LOCK_SECONDS = 10
"""A snapshot waits no longer for a table that DDL has locked, or is waiting for.

That may be waiting for the very session that waits for the snapshot: no database would see it.
"""

#: Marks a pooled connection as one of ours, for listeners that the pool was copied with.
READER = "sa_tablecache.reader"

_IMMUTABLE = (
    Boolean, Date, DateTime, Enum, Float, Integer, Interval, LargeBinary, Numeric, String, Time,
    Uuid, VARBINARY,
)  # fmt: skip
_SHARED = (Date, DateTime, Enum, Float, Integer, LargeBinary, String, Time, Uuid)


def check_separate_connections(engine: Engine, why: str, way_out: str) -> None:
    """Refuse an engine all of whose connections are one.

    :raises UnsuitableEngine: for one.
    """
    database = engine.url.database or ""
    in_memory = engine.dialect.name == "sqlite" and (
        database in ("", ":memory:") or "mode=memory" in str(engine.url)
    )
    if isinstance(engine.pool, StaticPool | SingletonThreadPool) or in_memory:
        raise UnsuitableEngine(
            f"{engine!r} shares one DBAPI connection ({type(engine.pool).__name__}): {why}; "
            f"use a database file (SQLite) or a QueuePool, or {way_out}"
        )


class Snapshots:
    """Opens read-only snapshots of one database.

    :param engine: the application's engine; its connection settings are taken over.
    :param load_engine: an engine to use instead of a pool of the cache's own.
    :raises UnsuitableEngine: if all connections of the pool are one, so that a snapshot would
        show what others have not committed, and end their transaction.
    """

    def __init__(self, engine: Engine, load_engine: Engine | None = None) -> None:
        source = load_engine or engine
        check_separate_connections(
            source,
            "a load through it would read uncommitted rows and end the application's transaction",
            "give load_engine= to the cache",
        )
        self.application = engine
        self._source = source
        self._owned = load_engine is None
        self._engine: Engine | None = None if load_engine is None else load_engine
        self.dialect = source.dialect

    @property
    def engine(self) -> Engine:
        """The engine to read through; a pool of the cache's own is made when it is first used.

        By then the application has added what it listens to, such as what sets a search_path.
        """
        if self._engine is None:
            source = self._source
            self._engine = Engine(source.pool.recreate(), source.dialect, source.url)
            self._engine.update_execution_options(**source.get_execution_options())
        return self._engine

    @contextmanager
    def connect(self) -> Iterator[Connection]:
        """Lend a connection of the pool. It emits nothing."""
        with self.engine.connect() as connection:
            if self._owned:
                connection.info[READER] = True
            else:  # the pool may be the application's, whose writes are watched
                connection.execution_options(**READS)
            yield connection

    @contextmanager
    def open(self) -> Iterator[Connection]:
        """Open one snapshot. It emits BEGIN, on PostgreSQL a SET, on a new connection a SELECT.

        :raises UnsuitableEngine: if the server is a standby.
        """
        dialect = self.engine.dialect.name
        with self.connect() as connection:
            if dialect == "sqlite":
                connection = connection.execution_options()
                driver = cast("Any", connection.connection.driver_connection)
                if not driver.in_transaction:
                    connection.exec_driver_sql("BEGIN")
            else:
                options: dict[str, Any] = {"isolation_level": "REPEATABLE READ"}
                if dialect == "postgresql":
                    options["postgresql_readonly"] = True
                connection = connection.execution_options(**options)
                _bound_waits(connection)
                if dialect in ("mysql", "mariadb"):
                    connection.exec_driver_sql(
                        "START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY"
                    )
                if dialect == "postgresql" and "sa_tablecache.primary" not in connection.info:
                    if connection.scalar(text("SELECT pg_is_in_recovery()")):
                        raise UnsuitableEngine(
                            f"{self.engine!r} is connected to a standby, which lags behind: a "
                            "cache reads the primary only"
                        )
                    connection.info["sa_tablecache.primary"] = True
            yield connection

    def nobody_writes(self) -> bool:
        """Whether no connection to an SQLite file has a writing transaction; does not wait."""
        with self.connect() as connection:
            timeout = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            except OperationalError:
                return False
            finally:
                connection.rollback()
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {timeout}")
        return True

    def after_fork(self) -> None:
        """In a forked child: have a pool of one's own; a pool that was given is the giver's."""
        if self._owned and self._engine is not None:
            abandon(self._engine.pool)
            self._engine = None

    def close(self) -> None:
        """Close the pool, if it is the cache's own."""
        if self._owned and self._engine is not None:
            self._engine.dispose()


def _bound_waits(connection: Connection) -> None:
    """Have a transaction that is about to begin wait for the locks of others for a while only.

    By the driver: a listener of the application is told of what is read.
    """
    info = connection.info
    if connection.dialect.name == "postgresql":
        # Not for the session: behind a pooler that could be anybody's.
        statement = f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"
    elif READER in info and "sa_tablecache.waits" not in info:
        statement = f"SET SESSION lock_wait_timeout = {LOCK_SECONDS}"
        info["sa_tablecache.waits"] = True
    else:
        return
    try:
        cursor = connection.connection.cursor()
        try:
            cursor.execute(statement)
        finally:
            cursor.close()
    except BaseException as error:
        connection.invalidate(error)
        if isinstance(error, connection.dialect.loaded_dbapi.Error):
            raise OperationalError(statement, None, error) from error
        raise


Check: TypeAlias = Callable[[Rows, bool], object]
"""Called during a load with what was read so far, and whether that is all; it may raise."""


class Loader:
    """Reads records of one view.

    Equal values of a column are shared between records: that makes a record of the flights view
    three times smaller. Each column has a pool of its own, since ``1 == 1.0 == True``; one that
    turns out not to repeat itself is given up.

    SQLite stores any value in any column, and a truth value is a number on MariaDB, too. A column
    that holds what SQLAlchemy would not have stored (2 for true, a datetime without microseconds)
    does not compare in Python as it does there: from then on it is left to the database.

    :param comparisons: how columns compare; changed when such a value is found.
    """

    def __init__(
        self,
        plan: ViewPlan,
        hidden: Sequence[str],
        comparisons: dict[str, Comparison],
        dialect: Dialect,
    ) -> None:
        self.plan = plan
        self.hidden = tuple(hidden)
        self.columns = (*(c.name for c in plan.columns), *self.hidden)
        self.clauses = tuple(plan.column(name).clause for name in self.columns)
        self.mutable = tuple(
            c.name for c in plan.columns if not isinstance(c.clause.type, _IMMUTABLE)
        )
        """Columns whose values a reader could change; copied for each reader."""
        self._comparisons = comparisons
        self._normalise: list[Callable[[Any], Any] | None] = [
            comparisons[name].normalise for name in self.columns
        ]
        self.zones: dict[str, tzinfo] = {}
        """The time zones in which the driver gives aware datetimes, by column."""
        self._stored: list[Any] = list(self.clauses)
        """What is selected: of some columns the stored values, to be converted here."""
        self._unsorted: dict[int, str] = {}
        """Columns of text and bytes, and which values MariaDB does not sort as it compares."""
        self._types: list[tuple[type, ...]] = [()] * len(self.columns)
        """The types that values may have, where a column may hold any; empty elsewhere."""
        self._untested: set[int] = set()
        """Columns of SQLite that may hold any value, and of which the types are not looked at."""
        sqlite = dialect.name == "sqlite"
        for at, (name, clause) in enumerate(zip(self.columns, self.clauses, strict=True)):
            if self._normalise[at] is to_utc:
                self._normalise[at] = self._noting_zone(name)
            converted = (Boolean, DateTime, Date, Time, Uuid) if sqlite else (Boolean,)
            if not comparisons[name].equality or dialect.name == "postgresql":
                if sqlite:
                    self._untested.add(at)
                continue
            if not sqlite and comparisons[name].order and str in comparisons[name].accepts:
                self._unsorted[at] = "len({0}) > 256 or '\\x00' in {0}"
            elif not sqlite and comparisons[name].order and bytes in comparisons[name].accepts:
                self._unsorted[at] = "len({0}) > 1024"
            if isinstance(clause.type, converted):
                self._stored[at] = type_coerce(clause, NullType())
                self._normalise[at] = self._converter(name, clause.type, dialect)
            elif sqlite and isinstance(
                clause.type, Integer | Float | String | LargeBinary | VARBINARY
            ):
                accepts = comparisons[name].accepts
                if not isinstance(clause.type, Enum):
                    self._types[at] = (*accepts, int) if float in accepts else accepts
        self._makers: dict[tuple[bool, ...], Callable[..., None]] = {}

    def statement(self, *criteria: ColumnElement[bool]) -> Any:
        """Return the SELECT that reads the records that meet the criteria."""
        return select(*self._stored).where(*criteria).options(EveryScope(self.plan.view))

    def _noting_zone(self, name: str) -> Callable[[Any], Any]:
        """Return what brings datetimes to UTC and remembers where they came from."""
        zones = self.zones

        def in_utc(value: Any) -> Any:
            if value is not None:
                zones[name] = value.tzinfo
            return to_utc(value)

        return in_utc

    def _converter(self, name: str, type_: Any, dialect: Dialect) -> Callable[[Any], Any]:
        """Return what makes a value of a stored one, and notices one stored in another form."""
        convert = type_.dialect_impl(dialect).result_processor(dialect, None)
        store = type_.dialect_impl(dialect).bind_processor(dialect)
        known: dict[Any, Any] = {None: None}

        def converted(stored: Any) -> Any:
            try:
                return known[stored]
            except KeyError:
                value = convert(stored) if convert is not None else stored
                if (store(value) if store is not None else value) != stored:
                    self._odd(name, stored)
                if len(known) > MOST_KNOWN:
                    known.clear()
                    known[None] = None
                known[stored] = value
                return value

        return converted

    def _odd(self, name: str, value: Any) -> None:
        """Leave a column to the database, because of a value that it holds."""
        plan, how = self.plan, self._comparisons[name]
        shown = shown_value(plan, name, value)
        reason = f"it holds {shown}, which is not how {how.type!r} is stored"
        lineage = {n for leaf in plan.leaves for n in (*leaf.hidden, *(leaf.visible or ()))}
        groups = {n for path in plan.paths for n in (*path.names, *path.stored)}
        if name in lineage | groups or name in plan.key:
            raise TableCacheError(
                f"view {plan.name}: {name} identifies rows, but {reason}: correct the value"
            )
        if how.equality or how.order:
            log.warning("view %s: %s is left to the database: %s", plan.name, name, reason)
            self._comparisons[name] = Comparison(False, False, reason=reason)

    def _long(self, name: str, value: Any) -> None:
        """Leave sorting by a column to MariaDB: it looks at max_sort_length bytes, not at NULs."""
        how = self._comparisons[name]
        if how.order:
            shown = shown_value(self.plan, name, value[:40])
            reason = f"MariaDB does not sort values such as {shown} as it compares them"
            log.warning("view %s: %s is not sorted: %s", self.plan.name, name, reason)
            self._comparisons[name] = replace(how, order=False, reason=reason)

    def _missing(self, *values: tuple[str, Any]) -> None:
        """Refuse a row that has a NULL where the model says that there is none."""
        names = ", ".join(name for name, value in values if value is None)
        raise TableCacheError(
            f"view {self.plan.name}: {names} is NULL in a row, although the model declares it NOT "
            "NULL: correct the model, or the row"
        )

    def read(
        self,
        connection: Connection,
        criteria: Sequence[ColumnElement[bool]],
        *,
        stream: bool = False,
        progress: Progress | None = None,
        check: Check | None = None,
        order_by: Sequence[ColumnElement[Any]] = (),
        limit: int | None = None,
    ) -> Rows:
        """Read records: one SELECT; ``stream`` for many, in parts of 1,000 rows.

        :param check: called with what was read so far; it may raise.
        """
        statement = self.statement(*criteria).order_by(*order_by).limit(limit)
        if not stream:
            return self.run(connection, statement)
        rows = Rows(hidden=[] if self.hidden else None)
        shared = [
            # 12:00+00 equals 13:00+01 in Python only.
            isinstance(c.type, _SHARED) and not (isinstance(c.type, Time) and c.type.timezone)
            for c in self.clauses
        ]
        hidden = shared[len(self.plan.columns) :]
        shared.append(all(hidden))  # and whole tuples of hidden values
        pools: list[dict[Any, Any] | None] = [{} if each else None for each in shared]
        options = {"yield_per": PARTITION}
        with connection.execute(statement, execution_options=options) as result:
            for partition in result.partitions():
                self._add(rows, partition, pools)
                for at, pool in enumerate(pools):
                    if pool is not None and len(pool) * 2 > len(rows.records):
                        pools[at] = None
                if progress is not None:
                    progress(len(rows.records))
                if check is not None:
                    check(rows, False)
        return rows

    def run(
        self, connection: Connection, statement: Any, parameters: dict[str, Any] | None = None
    ) -> Rows:
        """Read the few records of a :meth:`statement`: one SELECT."""
        rows = Rows(hidden=[] if self.hidden else None)
        self._add(rows, connection.execute(statement, parameters).all(), None)
        return rows

    def _add(
        self, rows: Rows, batch: Sequence[Any], pools: list[dict[Any, Any] | None] | None
    ) -> None:
        shared = tuple(pool is not None for pool in pools or [None] * (len(self.columns) + 1))
        maker = self._makers.get(shared)
        if maker is None:
            maker = self._makers[shared] = self._maker(shared)
        maker(
            batch,
            rows.records.append,
            rows.hidden.append if rows.hidden is not None else None,
            *(pool.setdefault for pool in pools or () if pool is not None),
        )

    def _may_share(self, at: int, name: str) -> str:
        """Return the test of whether a value is the same as all that are equal to it, if any."""
        if self._types[at]:  # and so 1 and 1.0 may both occur
            return f"{name} and {name} == {name} and type({name}) is {self._types[at][0].__name__}"
        type_ = self.clauses[at].type
        if isinstance(type_, Float):
            # Neither 0.0 and -0.0, which are equal, nor a NaN may be exchanged.
            return f"{name} and {name} == {name}"
        if at in self._untested:
            return f"type({name}) is str"
        if isinstance(type_, DateTime | Time) and self._normalise[at] is None:
            # In a zone, two that are equal may be an hour apart: those of an autumn night.
            kind = type_.python_type.__name__  # drivers have text for dates that are none
            return f"type({name}) is {kind} and {name}.tzinfo is None"
        return ""

    def _maker(self, shared: tuple[bool, ...]) -> Callable[..., None]:
        """Generate the loop that turns rows into records: it is most of the cost of a load."""
        names = [f"v{at}" for at in range(len(self.columns))]
        public = len(self.plan.columns)
        pools = [f"share{at}" for at, used in enumerate(shared) if used]
        body: list[str] = []
        for at, name in enumerate(names):
            if self._normalise[at] is not None:
                body.append(f"{name} = normalise{at}({name})")
            if self._types[at]:
                kinds = " and ".join(f"type({name}) is not {t.__name__}" for t in self._types[at])
                body.append(f"if {kinds} and {name} is not None: odd({self.columns[at]!r}, {name})")
            if at in self._unsorted:
                test = self._unsorted[at].format(name)
                body.append(f"if {name} and ({test}): long({self.columns[at]!r}, {name})")
            if not shared[at]:
                continue
            test = self._may_share(at, name)
            body.append(f"{f'if {test}: ' if test else ''}{name} = share{at}({name}, {name})")
        required = [
            at for at, name in enumerate(self.columns) if not self.plan.column(name).nullable
        ]
        if required:
            nulls = " or ".join(f"{names[at]} is None" for at in required)
            values = "".join(f"({self.columns[at]!r}, {names[at]}), " for at in required)
            body.append(f"if {nulls}: missing({values})")
        body.append(f"add(Record({', '.join(names[:public])}))")
        if self.hidden:
            body.append(f"h = ({', '.join(names[public:])},)")
            if shared[-1]:
                tests = (
                    (names[at], self._may_share(at, names[at])) for at in range(public, len(names))
                )
                exact = [f"({name} is None or {test})" for name, test in tests if test]
                test = f"if {' and '.join(exact)}: " if exact else ""
                body.append(f"{test}h = share{len(names)}(h, h)")
            body.append("add_hidden(h)")
        source = (
            f"def make(batch, add, add_hidden, {', '.join(pools)}):\n"
            f"    for {', '.join(names)}, in batch:\n        " + "\n        ".join(body)
        )
        scope: dict[str, Any] = {
            "Record": self.plan.view.__record__,
            "odd": self._odd,
            "missing": self._missing,
            "long": self._long,
            "datetime": datetime,
            "time": time,
            **{f"normalise{at}": f for at, f in enumerate(self._normalise) if f is not None},
        }
        exec(source, scope)  # noqa: S102 - built from numbers and our own words only
        return cast("Callable[..., None]", scope["make"])
