"""Comparing what a cache answers with the truth, in as many ways as a reader could ask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from sqlalchemy import Boolean, ColumnElement, Connection, Engine, asc, desc, event, func, select
from sqlalchemy.orm import Session

from sa_tablecache import bypass_cache
from tests.integration.truth import Columns, Criterion, Questions, Truth, same
from tests.zoo import Kind


class Statements(list[str]):
    """The SQL statements that were run on any engine."""


@contextmanager
def counting() -> Iterator[Statements]:
    """Collect the SQL statements of a block, whichever engine of this process runs them."""
    statements = Statements()

    def collect(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(Engine, "before_cursor_execute", collect)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", collect)


def view_columns(kind: Kind) -> dict[str, Any]:
    """Return the columns of a view as they appear in criteria, by name."""
    return {c.key: getattr(kind.view, c.key) for c in kind.statement().subquery().c}


def parts(kind: Kind, index: str) -> list[str] | None:
    """Return the columns by which an index sorts; None if one is an expression."""
    declared = getattr(kind.view, index).declared.parts
    return list(declared) if all(isinstance(part, str) for part in declared) else None


def part_criterion(column: str, low: Any, high: Any) -> Criterion:
    """Return `low <= column < high`, without the side whose value is None."""

    def make(columns: Columns) -> ColumnElement[bool]:
        terms = []
        if low is not None:
            terms.append(columns[column] >= low)
        if high is not None:
            terms.append(columns[column] < high)
        result: ColumnElement[bool] = terms[0]
        for term in terms[1:]:
            result = result & term
        return result

    return make


class Checker:
    """Asks a cache and the database the same questions about one view.

    :param factory: makes the sessions whose reads the cache answers.
    """

    def __init__(
        self, kind: Kind, factory: Callable[..., Session], connection: Connection, rng: Random
    ) -> None:
        self.kind = kind
        self.view = kind.view
        self.factory = factory
        self.rng = rng
        self.truth = Truth(kind, connection)
        self.questions = Questions(rng, self.truth)
        self.columns = view_columns(kind)
        self.indexes = sorted(self.view.__indexes__)

    def check(self) -> None:
        """Ask for everything, and a few questions more."""
        self.questions.learn()
        questions = [
            self.some_range,
            self.some_filter,
            self.some_order,
            self.some_key,
            self.some_query,
        ]
        with self.factory() as session:
            self.content(session)
        for ask in self.rng.sample(questions, k=2):
            with self.factory() as session:
                ask(session)
        with self.factory() as session:
            for ask in self.rng.sample(questions, k=2):
                ask(session)

    def content(self, session: Session, connection: Connection | None = None) -> None:
        """All records, compared with what a connection sees."""
        records = self.truth.of(session.scalars(select(self.view)).all())
        self._same(records, self.truth.rows(connection=connection), "all")

    def some_filter(self, session: Session) -> None:
        """Records that meet some criterion, and how many there are."""
        described, make = self.questions.criterion()
        criterion, rows = make(self.columns), self.truth.rows(make)
        records = session.scalars(select(self.view).where(criterion)).all()
        self._same(self.truth.of(records), rows, described)
        counting_ = select(func.count()).select_from(self.view).where(criterion)
        assert session.scalar(counting_) == len(rows), f"count of {described}"

    def some_order(self, session: Session) -> None:
        """A page of records in some order, made total by the key."""
        rng = self.rng
        described, make = self.questions.criterion(depth=1)
        index = rng.choice(self.indexes)
        leading = parts(self.kind, index)
        if leading is None or rng.random() < 0.3:
            leading = rng.sample(self._sortable(), k=1)
        names = [*leading, *(name for name in self.kind.key if name not in leading)]
        # One direction for all is what an index has; mixed ones have to be sorted.
        if rng.random() < 0.6:
            directions = [rng.choice([asc, desc])] * len(names)
        else:
            directions = [rng.choice([asc, desc]) for _ in names]
        limit, offset = rng.choice([None, 0, 1, 3, 50]), rng.choice([None, None, 0, 2])

        def terms(columns: Columns) -> list[ColumnElement[Any]]:
            return [of(columns[name]) for of, name in zip(directions, names, strict=True)]

        statement = select(self.view).order_by(*terms(self.columns))
        if rng.random() < 0.5:
            statement, criteria = statement.where(make(self.columns)), [make]
        else:
            described, criteria = "all", []
        if limit is not None:
            statement = statement.limit(limit)
        if offset is not None:
            statement = statement.offset(offset)
        rows = self.truth.rows(
            *criteria, order=terms(self.truth.columns), limit=limit, offset=offset
        )
        records = self.truth.of(session.scalars(statement).all())
        order = [f"{of.__name__} {name}" for of, name in zip(directions, names, strict=True)]
        assert records == rows, f"{described} by {order} limit {limit} offset {offset}"

    def some_range(self, session: Any) -> None:
        """`session.range` along an index: all of it, or between bounds."""
        name = self.rng.choice(self.indexes)
        index, leading = getattr(self.view, name), parts(self.kind, name)
        if leading is None:
            self._check_expression(session.range(index), name, index)
            return
        depth = self.rng.randrange(len(leading) + 1)
        prefix = [self.questions.value(part) for part in leading[:depth]]
        if None in prefix:
            prefix = []
        bounds, criteria = {}, []
        if len(prefix) < len(leading):
            bounds, criteria = self._bounds(leading[len(prefix)])
        descending = self.rng.random() < 0.3
        fixed = [
            lambda c, part=part, value=value: c[part] == value
            for part, value in zip(leading, prefix, strict=False)
        ]
        columns = [self.truth.columns[part] for part in leading]
        order = [column.desc() if descending else column for column in columns]
        rows = self.truth.rows(*fixed, *criteria, order=order)
        records = session.range(index, *prefix, **bounds, descending=descending)
        plain, described = self.truth.of(records), f"{name} {prefix} {bounds} {descending}"
        self._same(plain, rows, described)
        at = [self.truth.names.index(part) for part in leading]

        def scores(of: list[Any]) -> list[Any]:
            """Return the scores in their order: cases may be equal to a collation, zeros are."""
            return [[row[i].lower().replace("float -0.0", "float 0.0") for i in at] for row in of]

        assert scores(plain) == scores(rows), f"order of {described}"

    def some_key(self, session: Session) -> None:
        """`session.get` of a key that exists and of one that does not."""
        names = self.kind.key
        rows = self.truth.run(select(self.truth.source))
        keyed = {tuple(row._mapping[name] for name in names): row for row in rows}
        keys = [key for key in keyed if None not in key]
        if keys:
            key = self.rng.choice(sorted(keys, key=repr))
            record = session.get(self.view, key if len(key) > 1 else key[0])
            assert record is not None, f"get {key}"
            assert self.truth.of([record]) == self.truth.of([keyed[key]]), f"get {key}"
        for _ in range(4):
            other = tuple(self.questions.value(name) for name in names)
            if None not in other and other not in keyed:
                assert session.get(self.view, other if len(other) > 1 else other[0]) is None

    def some_query(self, session: Session) -> None:
        """`session.query`, and the same with the cache bypassed."""
        described, make = self.questions.criterion()
        rows = self.truth.rows(make)
        query = session.query(self.view).filter(make(self.columns))
        self._same(self.truth.of(query.all()), rows, f"query {described}")
        self._same(self.truth.of(query.options(bypass_cache()).all()), rows, "bypass")
        assert query.count() == len(rows), f"query count {described}"
        first = query.first()
        assert (first is None) == (not rows)
        if first is not None:
            assert self.truth.of([first])[0] in rows

    def _bounds(self, name: str) -> tuple[dict[str, Any], list[Criterion]]:
        low, high = self.questions.value(name), self.questions.value(name)
        bounds: dict[str, Any] = {}
        criteria: list[Criterion] = []
        if isinstance(self.questions.types[name], Boolean):  # SQLAlchemy compares none with < and >
            return bounds, criteria
        if low is not None and self.rng.random() < 0.7:
            if self.rng.random() < 0.5:
                bounds["ge"], make = low, lambda c: c[name] >= low
            else:
                bounds["gt"], make = low, lambda c: c[name] > low
            criteria.append(make)
        if high is not None and self.rng.random() < 0.7:
            if self.rng.random() < 0.5:
                bounds["le"], make = high, lambda c: c[name] <= high
            else:
                bounds["lt"], make = high, lambda c: c[name] < high
            criteria.append(make)
        return bounds, criteria

    def _check_expression(self, records: Any, name: str, index: Any) -> None:
        """A range along an expression, whose scores only the view's own SQL knows."""
        statement = select(*self.columns.values(), *index.columns).order_by(*index.columns)
        rows = self.truth.run(statement)
        plain, expected = self.truth.of(records), self.truth.of(rows)
        self._same(plain, expected, name)
        scores = [row[len(self.columns) :] for row in rows]
        score_of = dict(zip(expected, scores, strict=True))
        assert [score_of[row] for row in plain] == scores, f"order of {name}"

    def _sortable(self) -> list[str]:
        return [name for name in self.truth.names if name not in ("extra", "document")]

    def _same(self, records: list[Any], rows: list[Any], described: str) -> None:
        if not same(records, rows):
            missing = [row for row in rows if row not in records]
            wrong = [record for record in records if record not in rows]
            msg = f"{self.view.__name__}, {described}: missing {missing}, wrong {wrong}"
            raise AssertionError(msg)
