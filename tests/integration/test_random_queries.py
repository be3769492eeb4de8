"""Any chain of methods of Query, at random: what ``session.query(View)`` gives is what Query gives.

The same calls are made on a query of a session that reads from the cache, and on SQLAlchemy's own
Query, which the database answers. Records, errors and SQL have to be equal, those of the queries on
the way included, which calls must not change. A failure names its seed::

    SA_TABLECACHE_TEST_SEEDS=17 pytest tests/integration/test_random_queries.py
"""

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from sqlalchemy import Select, bindparam, exists, literal, or_, select
from sqlalchemy.orm import Query

from sa_tablecache import bypass_cache
from sa_tablecache.queries import CachedQuery
from tests.integration.databases import Database
from tests.integration.flights import flights_world, hour
from tests.integration.test_random_writes import SEEDS
from tests.zoo import Flight, OuterBoard

CHAINS = 60
"""Chains of calls for each seed."""

Call = Callable[[Any], Any]
View: Any = OuterBoard


@dataclass(frozen=True)
class Pair:
    """The same query twice."""

    cached: Any
    plain: Any
    said: str


def some_call(random: Random) -> tuple[str, Call]:
    """Return a method of Query that gives another query, with its arguments."""
    at, number, limit = hour(random.randrange(-1, 6)), random.randrange(-1, 8), random.randrange(5)
    delay = random.choice([None, -3.0, 0.0, 5.0, 4])
    tail = random.choice([None, "N1", "N2", "nobody"])
    column = random.choice([View.id, View.hour, View.delay, View.tailnum, View.year])
    index = random.choice([View.by_hour, View.by_delay])  # SQLite cannot sort by row values
    twice = View.hour >= at
    simple: list[tuple[str, Call]] = [
        ("filter hour >=", lambda q: q.filter(View.hour >= at)),
        ("filter hour, id", lambda q: q.filter(View.hour < at, View.id > number)),
        ("filter delay", lambda q: q.filter(View.delay <= delay)),
        ("filter delay ==", lambda q: q.filter(View.delay == delay)),
        ("filter tailnum", lambda q: q.filter(View.tailnum == tail)),
        ("where tailnum", lambda q: q.where(View.tailnum != tail)),
        ("filter_by", lambda q: q.filter_by(tailnum=tail)),
        ("filter_by two", lambda q: q.filter_by(delay=delay, id=number)),
        ("filter index", lambda q: q.filter(View.by_delay >= 0)),
        ("order_by id", lambda q: q.order_by(View.id)),
        ("order_by hour desc, id", lambda q: q.order_by(View.hour.desc(), View.id.asc())),
        ("order_by column", lambda q: q.order_by(column)),
        ("order_by index", lambda q: q.order_by(index)),
        ("limit", lambda q: q.limit(limit)),
        ("offset", lambda q: q.offset(limit)),
    ]
    others: list[tuple[str, Call]] = [
        ("filter nothing", lambda q: q.filter()),
        ("filter reversed", lambda q: q.filter(at <= View.hour)),
        ("filter twice", lambda q: q.filter(twice, twice)),
        ("filter or", lambda q: q.filter(or_(View.id == number, View.delay > 0))),
        ("filter in", lambda q: q.filter(View.id.in_([1, number]))),
        ("filter is", lambda q: q.filter(View.tailnum.is_(None))),
        ("filter columns", lambda q: q.filter(View.id > View.year)),
        ("filter parameter", lambda q: q.filter(View.id > bindparam("p")).params(p=number)),
        ("filter text", lambda q: q.filter("id > 1")),
        ("filter True", lambda q: q.filter(True)),
        ("filter number", lambda q: q.filter(7)),
        ("filter_by nothing such", lambda q: q.filter_by(nothing=1)),
        ("order_by None", lambda q: q.order_by(None)),
        ("order_by nothing", lambda q: q.order_by()),
        ("order_by text", lambda q: q.order_by("hour")),
        ("order_by index desc", lambda q: q.order_by(index.desc())),
        ("order_by desc asc", lambda q: q.order_by(-View.id)),
        ("order_by number", lambda q: q.order_by(object())),
        ("limit None", lambda q: q.limit(None)),
        ("limit text", lambda q: q.limit("x")),
        ("limit True", lambda q: q.limit(True)),
        ("slice", lambda q: q.slice(limit, limit + 2)),
        ("distinct", lambda q: q.distinct()),
        ("assertions", lambda q: q.enable_assertions(False)),
        ("options", lambda q: q.execution_options(logging_token="q")),
        ("populate", lambda q: q.populate_existing()),
        ("autoflush", lambda q: q.autoflush(False)),
        ("columns", lambda q: q.with_entities(View.id, View.hour)),
        ("add", lambda q: q.add_columns(View.year)),
        ("having", lambda q: q.having(View.id > 1)),
        ("with_session", lambda q: q.with_session(q.session)),
        ("copy", copy.copy),
        ("join", lambda q: q.join(Flight, Flight.id == View.id)),
    ]
    return random.choice(simple if random.random() < 0.75 else others)


ANSWERS: dict[str, Call] = {
    "all": lambda q: q.all(),
    "list": list,
    "first": lambda q: q.first(),
    "one": lambda q: q.one(),
    "one_or_none": lambda q: q.one_or_none(),
    "scalar": lambda q: q.scalar(),
    "count": lambda q: q.count(),
    "exists": lambda q: q.session.query(exists_of(q)).scalar(),
    "getitem": lambda q: q[1],
    "slice": lambda q: q[1:3],
    "str": str,
    "statement": lambda q: str(q.statement),
    "subquery": lambda q: str(select(q.subquery())),
    "whereclause": lambda q: str(q.whereclause),
    "descriptions": lambda q: [d["name"] for d in q.column_descriptions],
    "execute": lambda q: len(q.session.execute(q.statement).all()),
    "union": lambda q: sorted(map(tuple_of, q.union(q).all()), key=repr),
    "nothing such": lambda q: q.nothing_such,
    "get": lambda q: q.get(1),
    "delete": lambda q: q.delete(),
}
"""What else can be asked of a query, and be compared."""


def exists_of(query: Any) -> Any:
    """Return EXISTS of a query; SQLAlchemy's own loses the FROM where no entity is selected."""
    statement = query.statement
    if isinstance(query, CachedQuery) or not isinstance(statement, Select):
        return query.exists()
    return exists(statement.with_only_columns(literal(1), maintain_column_froms=True))


def outcome(call: Call, query: Any) -> Any:
    """Return what a call gives, or the error that it raises, in words."""
    try:
        return call(query)
    except Exception as error:
        message = re.sub(r"0x[0-9a-f]+|\bCachedQuery\b|\bLightQuery\b|\bQuery\b", "~", str(error))
        return type(error), message


def check(pair: Pair, name: str) -> str:
    """Compare what two queries answer; say whether the cache did."""
    cached, plain = (outcome(ANSWERS[name], q) for q in (copy.copy(pair.cached), pair.plain))
    statement = pair.plain.statement
    total = any(
        getattr(each, "element", each) is View.id or each is View.id
        for each in statement._order_by_clauses
    )
    part = statement._limit_clause is not None or statement._offset_clause is not None
    if not total and (part or name in ("first", "getitem", "slice", "one_or_none", "scalar")):
        # Which of the records come is for the database to choose.
        assert type(cached) is type(plain), f"{pair.said}: {name}"
        if isinstance(plain, list):
            assert len(cached) == len(plain), f"{pair.said}: {name}"
    elif isinstance(plain, list) and not total and plain and not isinstance(plain[0], str):
        assert Counter(map(tuple_of, cached)) == Counter(map(tuple_of, plain)), pair.said
    else:
        assert cached == plain, f"{pair.said}: {name}"
        assert type(cached) is type(plain)
    read = pair.cached.session.last_read
    pair.cached.session.rollback()
    return str(getattr(read, "kind", ""))


def tuple_of(record: Any) -> Any:
    """Return the values of a record or row."""
    return tuple(record._asdict().values()) if hasattr(record, "_asdict") else record


@pytest.mark.parametrize("seed", SEEDS)
def test_any_chain_of_calls_gives_what_query_gives(sqlite: Database, seed: int) -> None:
    """Records, errors and SQL are the same at each step, and no call changes the query before."""
    random = Random(seed)
    kinds: Counter[str] = Counter()
    with flights_world(sqlite) as world:
        world.cache.load(OuterBoard)
        with world.Session() as session, world.Session(query_cls=Query) as plain:
            for _ in range(CHAINS):
                first = plain.query(OuterBoard).options(bypass_cache())
                pairs = [Pair(session.query(OuterBoard), first, f"seed {seed}: query")]
                for _ in range(random.randrange(1, 6)):
                    pair = random.choice(pairs[-2:])
                    what, call = some_call(random)
                    said = f"{pair.said}, {what}"
                    cached, expected = outcome(call, pair.cached), outcome(call, pair.plain)
                    if isinstance(expected, Query):
                        assert isinstance(cached, Query), said
                        pairs.append(Pair(cached, expected, said))
                    else:
                        assert cached == expected, said
                for pair in pairs:
                    for name in random.sample(sorted(ANSWERS), 4):
                        session.last_read = None
                        kinds[check(pair, name)] += 1
    assert kinds["hit"] > CHAINS, kinds
