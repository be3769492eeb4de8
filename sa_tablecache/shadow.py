"""Shadow mode: the database answers, and what the cache would have said is compared with it.

In: a read that the guard of ``modes.py`` has sent to the database. Out: the database's answer; and
a count, and a line in the log, if the cache would have said something else.

Both have to speak of one moment, or a commit in between would look like a mistake of the cache.
Nothing concerns a view without its being marked or leased before it can be seen, so that if the
state of the view is the same (by :attr:`.ViewState.changed_at`) before the cache is asked and after
the database has answered, both have seen the same commits. Of those that other processes make that
is known only when a change feed was read after the database: before two answers are called
different, the feed catches up. Where views change too fast for that, the database is asked once
more in a snapshot of the cache's own: then the state need not stay the same for longer than it
takes to open it. What cannot be compared is counted as skipped; there is no false alarm.

Answers are compared as SQL defines them: rows without ORDER BY in any order, equal ones in any, and
at the ends of a LIMIT any of those that are equal.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from sqlalchemy import Select
from sqlalchemy.engine.result import Result
from sqlalchemy.orm import Session

from . import ranges, reading
from .cache import BaseTableCache
from .exc import CacheUnavailable, TableCacheError
from .figures import LastRead, Reason, category_of
from .modes import COMPARE, COMPARING
from .orders import Record
from .ranges import RangeRead
from .readers import reading_as
from .reading import record_maker
from .scopes import in_own_scope, scope_of
from .settings import REDACTED
from .shapes import view_of
from .table import CachedTable

log = logging.getLogger(__name__)

MOST_LOGGED: Final = 10
"""So many mismatches of a view are logged; all are counted."""
MOST_SHOWN: Final = 3
"""So many rows are shown of each."""
TRIES: Final = 3
"""How often it is tried to have the cache and the database speak of one moment."""


class Ordered(NamedTuple):
    """How a statement orders its rows, and whether it takes all of them."""

    columns: tuple[str, ...] = ()
    """The names of the columns, or none if it does not say."""
    offset: bool = False
    limit: bool = False


def is_to_compare(session: Session) -> bool:
    """Whether the read that the database is about to answer is to be compared."""
    return session.info.pop(COMPARE, False) is True


def compared(
    cache: BaseTableCache, session: Session, statement: Select[Any], run: Callable[[], Result[Any]]
) -> Result[Any]:
    """Have the database answer a SELECT of a view, and compare.

    :param run: has the database answer; of whole views with records.
    """
    view = view_of(statement)
    assert view is not None
    ask = partial(reading.answer, cache, session, statement)
    return _Comparison(cache, session, cache.table(view), lambda: statement).result(ask, run)


def compared_range(
    cache: BaseTableCache, session: Session, read: RangeRead, run: Callable[[], list[Record]]
) -> list[Record]:
    """Have the database answer a range read, and compare."""
    table = cache.table(read.by.view)
    statement = partial(ranges.range_statement, session, table, read)
    ask = partial(ranges.range_from_cache, cache, session, read)
    # Ties are sorted by primary key: which records are within a LIMIT is defined.
    ordered = Ordered(read.by.column_names)
    return _Comparison(cache, session, table, statement).records(ask, run, ordered)


class _Comparison:
    """One read that is compared."""

    def __init__(
        self,
        cache: BaseTableCache,
        session: Any,
        table: CachedTable,
        statement: Callable[[], Select[Any]],
    ) -> None:
        self._cache = cache
        self._session = session
        self._table = table
        self._statement = statement

    def result(self, ask: Callable[[], Any], run: Callable[[], Result[Any]]) -> Result[Any]:
        before: LastRead = self._session.last_read
        answer, at, why = self._ask(ask)
        frozen = run().freeze()
        if answer is None:
            self._skip(before, why)
            return frozen()
        shape = answer.shape
        ordered = Ordered(
            tuple(ordering.column for ordering in shape.orderings),
            shape.offset is not None,
            shape.limit is not None,
        )
        names = shape.projection or (() if shape.count else self._names)
        self._judge(before, ask, answer.rows, frozen.data, names, ordered, at)
        return frozen()

    def records(
        self, ask: Callable[[], Any], run: Callable[[], list[Record]], ordered: Ordered
    ) -> list[Record]:
        before: LastRead = self._session.last_read
        answer, at, why = self._ask(ask)
        records = run()
        if answer is None:
            self._skip(before, why)
        else:
            self._judge(before, ask, answer, records, self._names, ordered, at)
        return records

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self._table.plan.columns)

    # -- one moment -----------------------------------------------------------------------------

    def _ask(self, ask: Callable[[], Any]) -> tuple[Any, int, str]:
        """Return what the cache would have said, in which state, or why that cannot be told."""
        session, table = self._session, self._table
        session.info[COMPARING] = True
        with table.comparing():
            try:
                for _ in range(TRIES):
                    at = table.changed_at
                    answer = ask()
                    last: LastRead = session.last_read
                    if answer is None or last.kind != "hit":
                        return None, at, f"it would have been a {last.kind}: {last.reason}"
                    if category_of(last.reason) in ("stale", "staleness"):
                        return None, at, f"it would have been stale: {last.reason}"
                    if table.changed_at == at:
                        return answer, at, ""
                return None, at, "the view changed meanwhile"
            except CacheUnavailable as error:
                return None, 0, str(error)
            except TableCacheError:
                raise  # of the statement: the database would not answer it either
            except Exception as error:
                self._mismatch(f"it would have raised {type(error).__name__}", error)
                return None, 0, "it would have failed"
            finally:
                del session.info[COMPARING]

    def _judge(
        self,
        before: LastRead,
        ask: Callable[[], Any],
        answer: Sequence[Any],
        rows: Sequence[Any],
        names: tuple[str, ...],
        ordered: Ordered,
        at: int,
    ) -> None:
        """Compare, and count and tell what came of it."""
        difference: str | None = differences(answer, rows, names, ordered, self._hidden)
        if difference is not None and not self._is_still(at):
            difference = self._in_snapshot(ask, names, ordered)
            if isinstance(difference, Reason):
                self._skip(before, difference)
                return
        self._table.count("comparisons")
        if difference is None:
            self._remember(before, "the cache would have said the same")
        else:
            self._mismatch(difference)
            self._remember(before, "the cache would have said something else")

    def _is_still(self, at: int) -> bool:
        """Whether nothing has changed the view since, here or, as a feed tells, elsewhere."""
        if self._table.changed_at != at:
            return False
        consumer = self._cache.consumer
        if consumer is not None:
            try:
                consumer.catch_up()
            except Exception as error:
                log.debug("view %s: cannot be compared: %s", self._table.plan.name, error)
                return False
        return self._table.changed_at == at

    def _in_snapshot(
        self, ask: Callable[[], Any], names: tuple[str, ...], ordered: Ordered
    ) -> str | Reason | None:
        """Compare in a snapshot of the cache's own; return a reason if that cannot be done."""
        busy = Reason("shadow", "the view changes too fast")
        table, session = self._table, self._session
        sqlite = self._cache.engine.dialect.name == "sqlite"
        if sqlite and any(schema for schema, _ in table.plan.tables):
            return busy  # a snapshot of several files is taken file by file
        statement = in_own_scope(session, self._statement(), table.view)
        for _ in range(TRIES):
            with self._cache.snapshots.open() as connection:
                at = table.changed_at
                # The snapshot is that of the first statement.
                first = "SELECT 1 FROM sqlite_master LIMIT 1" if sqlite else "SELECT 1"
                connection.exec_driver_sql(first)
                answer, since, _ = self._ask(ask)
                if answer is None or since != at or not self._is_still(at):
                    continue
                with reading_as(partial(scope_of, session)):
                    rows: Sequence[Any] = connection.execute(statement).all()
            if names == self._names:
                make = record_maker(table.view)
                rows = [make(*row) for row in rows]
            said = answer if isinstance(answer, list) else answer.rows
            return differences(said, rows, names, ordered, self._hidden)
        return busy

    # -- what is told ---------------------------------------------------------------------------

    @property
    def _hidden(self) -> Iterable[str]:
        return self._table.view.__redact__

    def _remember(self, before: LastRead, what: str) -> None:
        assert isinstance(before.reason, Reason)
        self._session.last_read = before._replace(reason=before.reason.with_more(what))

    def _skip(self, before: LastRead, why: str) -> None:
        self._table.count("comparisons_skipped")
        self._remember(before, f"not compared, {why}")

    def _mismatch(self, difference: str | None, error: Exception | None = None) -> None:
        table = self._table
        table.count("mismatches")
        if table.counts.mismatches <= MOST_LOGGED:
            log.error(
                "view %s: the cache would have given another answer than the database: %s; the "
                "statement was %s", table.plan.name, difference, self._statement(), exc_info=error,
            )  # fmt: skip


# -- comparing, as SQL defines it ------------------------------------------------------------------


def differences(
    cached: Sequence[Any],
    stored: Sequence[Any],
    names: tuple[str, ...],
    ordered: Ordered,
    hidden: Iterable[str] = (),
) -> str | None:
    """Return in what two answers to one statement differ, or ``None`` if both are right.

    :param cached: records or tuples, from the cache.
    :param stored: the same, from the database.
    :param names: the columns of a row.
    :param hidden: those that are not to be shown.
    """
    mine, theirs = ([_comparable(row, names) for row in rows] for rows in (cached, stored))
    if len(mine) != len(theirs):
        if not (ordered.limit or ordered.offset):
            return _told(mine, theirs, names, hidden)
        return f"{len(mine)} rows instead of {len(theirs)}"
    whole = not (ordered.limit or ordered.offset)
    if not ordered.columns:
        # Without an order, which rows are within a LIMIT is not defined.
        return _told(mine, theirs, names, hidden) if whole else None
    if not set(ordered.columns) <= set(names):
        return _told(mine, theirs, names, hidden) if whole else None
    at = [names.index(name) for name in ordered.columns]
    keys, their_keys = ([tuple(row[i] for i in at) for row in rows] for rows in (mine, theirs))
    if not whole and keys == their_keys:
        open_ends = {*keys[:1]} if ordered.offset else set()
        open_ends |= {*keys[-1:]} if ordered.limit else set()
        mine, theirs = (
            [row for row in rows if tuple(row[i] for i in at) not in open_ends]
            for rows in (mine, theirs)
        )
    told = _told(mine, theirs, names, hidden)
    if told is None and keys != their_keys:
        return "the same rows in another order"
    return told


def _told(
    mine: list[Any], theirs: list[Any], names: tuple[str, ...], hidden: Iterable[str]
) -> str | None:
    ours, others = Counter(mine), Counter(theirs)
    if ours == others:
        return None
    parts = []
    for rows, where in ((others - ours, "database"), (ours - others, "cache")):
        if rows:
            some = ", ".join(_shown(row, names, hidden) for row in list(rows)[:MOST_SHOWN])
            more = ", ..." if len(rows) > MOST_SHOWN else ""
            parts.append(f"{rows.total()} only in the {where} ({some}{more})")
    return ", ".join(parts)


def _shown(row: tuple[Any, ...], names: tuple[str, ...], hidden: Iterable[str]) -> str:
    if not names:
        return ", ".join(map(repr, row))
    pairs = zip(names, row, strict=True)
    return (
        "("
        + ", ".join(
            f"{name}={REDACTED if name in hidden else repr(value)}" for name, value in pairs
        )
        + ")"
    )


def _comparable(row: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return a row as a tuple that can be counted: NaN is NaN, and lists are tuples."""
    values = (getattr(row, name) for name in names) if hasattr(row, "__struct_fields__") else row
    return tuple(map(_plain, values))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return ("{}", frozenset((key, _plain(each)) for key, each in value.items()))
    if isinstance(value, list | tuple):
        return ("[]", *map(_plain, value))
    if isinstance(value, float) and value != value:  # noqa: PLR0124 - as NaN does
        return "NaN"
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
