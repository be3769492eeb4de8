"""Asks a cache and the database the same random questions, and compares the answers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st
from sqlalchemy import URL, Engine, Select, create_engine, event, exists, func, literal, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from sa_tablecache import CachedView, TableCache
from sa_tablecache.exc import NotExpressible
from tests.differential import tables
from tests.differential.questions import Ask, Question, clause, ordered
from tests.differential.values import values_of

Rows = dict[str, list[dict[str, Any]]]


#: What SQLAlchemy and drivers raise for values that they cannot take.
_REFUSALS = (
    SQLAlchemyError, DBAPIError, ArithmeticError, TypeError, ValueError, AttributeError, KeyError,
    NotImplementedError,
)  # fmt: skip


@dataclass(frozen=True)
class Refused:
    """That the database, its driver or SQLAlchemy would not answer a question."""

    error: Exception


def _unless_refused(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except _REFUSALS as error:
        return Refused(error)


def in_utc(value: Any) -> Any:
    """Return a value as records have it: aware datetimes in UTC, whatever the connection's zone."""
    return value.astimezone(UTC) if isinstance(value, datetime) and value.tzinfo else value


def plain(value: Any) -> str:
    """Return a value in a form that compares by type and content, time zones included."""
    return f"{type(value).__name__} {value!r}"


class Arena:
    """One database with the tables, one cache of the views, and the truth beside it.

    :param url: an empty database.
    """

    def __init__(self, url: URL) -> None:
        self.dialect = url.get_backend_name().replace("mariadb", "mysql")
        self.views = [
            view
            for view in tables.VIEWS
            if not (view is tables.Full and self.dialect == "mysql")  # which has no FULL JOIN
        ]
        self.engine = self._engine(url)
        self.truth = self._engine(url).execution_options(isolation_level="AUTOCOMMIT")
        tables.metadata.create_all(self.truth)
        self.cache = TableCache(self.engine, views=self.views)
        self.Session = self.cache.sessionmaker()
        self.asks = {view: self._ask(view) for view in self.views}
        self.sources = {view: self._source(view) for view in self.views}
        self.rows = self._rows()
        """Rows for all tables."""
        self.kinds: Counter[str] = Counter()
        """How many questions were answered how."""
        self.found = 0
        """How many of the cache's answers had at least one row."""
        self.refused = 0
        """How many the database refused to answer, and the cache as well."""

    def _engine(self, url: URL) -> Engine:
        options: dict[str, Any] = {}
        if self.dialect == "postgresql":  # a zone with daylight-saving time
            options["connect_args"] = {"options": "-c TimeZone=Europe/Berlin"}
        engine = create_engine(url, **options)
        if self.dialect == "sqlite":

            @event.listens_for(engine, "connect")
            def connect(connection: Any, _: Any) -> None:
                connection.execute("PRAGMA synchronous = OFF")

        return engine

    def close(self) -> None:
        """Close all connections."""
        self.cache.close()
        self.engine.dispose()
        self.truth.dispose()

    # -- what can be asked ----------------------------------------------------------------------

    def _scores(self, view: type[CachedView]) -> dict[str, Any]:
        """Return the expressions by which a view sorts, by the name of their hidden column."""
        return {
            index.column_name(at): part
            for index in view.__indexes__.values()
            for at, part in enumerate(index.declared.parts)
            if not isinstance(part, str)
        }

    def _source(self, view: type[CachedView]) -> Mapping[str, Any]:
        """Return the columns of a view's own select, in a subquery of the database's."""
        statement = view.__select__.add_columns(
            *(part.label(name) for name, part in self._scores(view).items())
        )
        return dict(statement.subquery().c)

    def _ask(self, view: type[CachedView]) -> Ask:
        columns = self.columns(view)
        public = list(view.__table__.c.keys())
        return Ask(view, {name: c.type for name, c in columns.items()}, public, self.dialect)

    def columns(self, view: type[CachedView]) -> Mapping[str, Any]:
        """Return the columns of a view, the hidden ones of its indexes included."""
        hidden = {
            c.name: c
            for index in view.__indexes__.values()
            for c in index.columns
            if c.name not in view.__table__.c
        }
        return {**dict(view.__table__.c), **hidden}

    # -- data -----------------------------------------------------------------------------------

    def _rows(self) -> st.SearchStrategy[Rows]:
        def of(table: Any, number: int) -> st.SearchStrategy[list[dict[str, Any]]]:
            columns = {}
            for column in table.c:
                own = [*values_of(column.type, self.dialect)]
                if column.nullable:
                    own += [None] * (len(own) // 4 + 1)
                columns[column.name] = st.sampled_from(own)
            if table is tables.item:
                columns["id"] = st.integers(-1, 30)
                columns["parent_id"] = st.one_of(st.none(), st.integers(-1, 12))
                columns["place"] = st.sampled_from([None, 0, 1])
                columns["region"] = st.sampled_from([None, "a", "A", "a ", "é", "😀"])
            elif table is tables.part:
                columns["item_id"] = st.integers(-1, 30)
                columns["n"] = st.integers(0, 2)
            else:
                columns["place"] = st.sampled_from([0, 1])
                columns["region"] = st.sampled_from(["a", "A", "a ", "é", "😀"])
            key = [c.name for c in table.primary_key.columns]
            return st.lists(
                st.fixed_dictionaries(columns),
                max_size=number,
                unique_by=lambda row: tuple(row[name] for name in key),
            )

        return st.fixed_dictionaries(
            {
                "owner": of(tables.owner, 6),
                "item": of(tables.item, 16),
                "part": of(tables.part, 12),
            }
        )

    def fill(self, rows: Rows) -> None:
        """Replace the rows of all tables; the cache starts anew."""
        for view in self.views:
            self.cache.clear(view)
        with self.truth.connect() as connection:
            for table in tables.metadata.tables.values():
                connection.execute(table.delete())
                if rows[table.name]:
                    connection.execute(table.insert(), rows[table.name])

    def cover(self, view: type[CachedView], steps: Sequence[tuple[str, Any]]) -> None:
        """Load, extend and evict where an index can say the range; load all where none can."""
        for step, what in steps:
            try:
                criteria = [] if what is None else [clause(what, self.columns(view))]
                getattr(self.cache, step)(view, *criteria)
            except NotExpressible:
                if step == "load":
                    self.cache.load(view)

    # -- questions ------------------------------------------------------------------------------

    def check(self, question: Question) -> None:
        """Assert that the cache gives the database's answer, and keeps its hands off the rest."""
        expected = _unless_refused(lambda: self._from_database(question))
        with self.Session() as session:
            answer = _unless_refused(lambda: self._from_cache(session, question))
            read = session.last_read
        if isinstance(answer, Refused) and isinstance(expected, Refused):
            self.refused += 1
            return
        kind = read.kind if read is not None else "none"
        self.kinds[kind] += 1
        self.found += bool(answer) and kind in ("hit", "partial")
        told = f"{question}\n{read}"
        refused = isinstance(answer, Refused) or isinstance(expected, Refused)
        assert not refused, f"{told}\n{answer}\ninstead of\n{expected}"
        if question.order or question.kind in ("get", "count", "query count", "exists"):
            assert answer == expected, f"{told}\n{answer}\ninstead of\n{expected}"
        elif question.kind == "first":
            assert bool(answer) == bool(expected), told
            assert set(answer) <= set(expected), told
        else:
            assert Counter(answer) == Counter(expected), f"{told}\n{answer}\nnot\n{expected}"
        if question.is_inexact:
            assert kind in ("bypass", "none"), told

    def _from_database(self, question: Question) -> Any:
        """Return the answer that needs no word of the package."""
        c = self.sources[question.view]
        public = [c[name] for name in self.asks[question.view].public]
        statement = self._select(question, c, public)
        with self.truth.connect() as connection:
            result = connection.execute(statement)
            if question.kind in ("count", "query count", "exists"):
                return result.scalar()
            if question.kind in ("columns", "distinct"):
                return [tuple(map(plain, row)) for row in result]
            return [tuple(plain(in_utc(value)) for value in row) for row in result]

    def _select(self, question: Question, c: Mapping[str, Any], public: Sequence[Any]) -> Any:
        """Return a question as a SELECT over some columns."""
        if question.kind in ("count", "query count"):
            statement: Select[Any] = select(func.count()).select_from(public[0].table)
        elif question.kind in ("columns", "distinct"):
            statement = select(*(c[name] for name in question.columns))
        else:
            statement = select(*public)
        if question.kind == "distinct":
            statement = statement.distinct()
        if question.kind == "get":
            for name, value in zip(self.asks[question.view].key, question.key, strict=True):
                statement = statement.where(
                    c[name].is_(None) if value is None else c[name] == value
                )
        if question.kind == "range":
            names = question.view.__indexes__[question.index].column_names
            for name, value in zip(names, question.prefix, strict=False):
                statement = statement.where(
                    c[name].is_(None) if value is None else c[name] == literal(value, c[name].type)
                )
            for op, value in question.bounds:
                if value is not None:
                    column = c[names[len(question.prefix)]]
                    bound = literal(value, column.type)
                    statement = statement.where(
                        {
                            "ge": column >= bound,
                            "gt": column > bound,
                            "le": column <= bound,
                            "lt": column < bound,
                        }[op]
                    )
        statement = statement.where(*(clause(one, c) for one in question.where))
        statement = statement.order_by(*ordered(question, c))
        if question.limit is not None:
            statement = statement.limit(question.limit)
        if question.offset is not None:
            statement = statement.offset(question.offset)
        if question.kind == "exists":
            return select(exists(statement))
        return statement

    def _from_cache(self, session: Any, question: Question) -> Any:
        """Return what a session with a cache answers."""
        view, c = question.view, self.columns(question.view)
        if question.kind == "get":
            key = question.key if len(question.key) > 1 else question.key[0]
            record = session.get(view, key)
            return self._plain(view, [] if record is None else [record])
        if question.kind == "range":
            bounds = {name: value for name, value in question.bounds if value is not None}
            return self._plain(
                view,
                session.range(
                    getattr(view, question.index),
                    *question.prefix,
                    **bounds,
                    descending=bool(question.order) and question.order[0][1],
                    limit=question.limit,
                ),
            )
        criteria = [clause(one, c) for one in question.where]
        if question.kind in ("query", "query count", "first"):
            query = session.query(view).filter(*criteria).order_by(*ordered(question, c))
            if question.kind == "query count":
                return query.count()
            if question.kind == "first":
                record = query.first()
                return self._plain(view, [] if record is None else [record])
            if question.limit is not None:
                query = query.limit(question.limit)
            if question.offset is not None:
                query = query.offset(question.offset)
            return self._plain(view, query.all())
        if question.kind == "records":
            statement = select(view).where(*criteria).order_by(*ordered(question, c))
            if question.limit is not None:
                statement = statement.limit(question.limit)
            if question.offset is not None:
                statement = statement.offset(question.offset)
            told = self.cache.explain(statement)
            records = session.scalars(statement).all()
            assert session.last_read.kind == told.kind, f"{question}\n{session.last_read}\n{told}"
            return self._plain(view, records)
        statement = self._select(question, c, [c[name] for name in self.asks[view].public])
        result = session.execute(statement)
        if question.kind in ("count", "exists"):
            return result.scalar()
        return [tuple(map(plain, row)) for row in result]

    def _plain(self, view: type[CachedView], records: Sequence[Any]) -> list[Any]:
        names = self.asks[view].public
        return [tuple(plain(getattr(record, name)) for name in names) for record in records]
