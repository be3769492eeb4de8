"""Results of the cache: they do whatever those of SQLAlchemy do, in any order."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from sqlalchemy.engine.result import IteratorResult, ScalarResult, SimpleResultMetaData

from sa_tablecache.results import RecordScalars
from tests.zoo import InnerBoard

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "all": lambda result: list(result.all()),
    "fetchall": lambda result: list(result.fetchall()),
    "first": lambda result: result.first(),
    "one": lambda result: result.one(),
    "one_or_none": lambda result: result.one_or_none(),
    "next": next,
    "iteration": list,
    "fetchmany": lambda result: list(result.fetchmany(2)),
    "partitions": lambda result: list(map(list, result.partitions(2))),
    "unique": lambda result: result.unique() is result,
    "unique by": lambda result: result.unique(str) is result,
    "yield_per": lambda result: result.yield_per(1) is result,
    "close": lambda result: result.close(),
    "closed": lambda result: result.closed,
    "soft closed": lambda result: result._soft_closed,
    "with": lambda result: result.__exit__(None, None, None),
    "attributes": lambda result: dict(result._attributes),
}


def outcome(result: Any, operation: str) -> Any:
    """What an operation returns or raises."""
    try:
        return OPERATIONS[operation](result)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("records", [[], ["a"], ["a", "a"], ["a", "b", "a"]], ids=len)
def test_scalars_are_those_of_sqlalchemy_whatever_is_done_with_them(
    records: Sequence[Any],
) -> None:
    """Any three operations, one after the other, do what they do to SQLAlchemy's own result."""
    for operations in itertools.product(OPERATIONS, repeat=3):
        real = IteratorResult(
            SimpleResultMetaData(["InnerBoard"]), iter(records), _source_supports_scalars=True
        )
        real._attributes = real._attributes.union({"is_single_entity": True})
        theirs, ours = real.scalars(), RecordScalars(InnerBoard, list(records))
        assert isinstance(ours, ScalarResult)
        for operation in operations:
            assert outcome(ours, operation) == outcome(theirs, operation), (operations, operation)
