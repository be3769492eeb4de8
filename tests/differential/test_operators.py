"""Random questions to a cache and to the database: the answers are the same, to the last bit.

`make test` asks a few thousand. `SA_TABLECACHE_TEST_EXAMPLES=400` fills each database so often, and
asks some fifty questions of each filling, other ones with another `SA_TABLECACHE_TEST_SEED`.
A failure prints the rows, what was loaded, and the question.
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from sqlalchemy import URL

from tests.differential.arena import Arena

EXAMPLES = int(os.environ.get("SA_TABLECACHE_TEST_EXAMPLES", "6"))
SEED = int(os.environ.get("SA_TABLECACHE_TEST_SEED", "0"))

#: Questions are not meant to be sensible: SQLAlchemy and drivers warn of some.
pytestmark = pytest.mark.filterwarnings(
    "ignore::sqlalchemy.exc.SAWarning",
    "ignore::sqlalchemy.exc.SADeprecationWarning",
    "ignore::DeprecationWarning:sqlalchemy",
)


def test_a_cached_answer_is_the_databases(url: URL, record_property: Any) -> None:
    """Whatever is asked of whatever data: value, type and order are those of the database.

    What Python cannot say exactly is left to the database, and `explain()` says so beforehand.
    """
    arena = Arena(url)

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        # A hundred questions share a filling: to shrink it would ask them all over and over.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.data())
    def ask(data: st.DataObject) -> None:
        arena.fill(data.draw(arena.rows, "rows"))
        for view in arena.views:
            questions = arena.asks[view]
            arena.cover(view, data.draw(questions.coverage(), f"{view.__name__} covered"))
            for _ in range(7):
                arena.check(data.draw(questions.question(), view.__name__))

    try:
        ask()
    finally:
        arena.close()
    asked = arena.kinds.total() + arena.refused
    answered = arena.kinds["hit"] + arena.kinds["partial"]
    summary = (
        f"{asked} questions, {answered} answered by the cache, {arena.refused} refused by both"
    )
    record_property("questions", summary)
    print(f"{url.get_backend_name()}: {summary}, {dict(arena.kinds)}")
    assert answered > 0.3 * asked, "a cache that answers nothing is never wrong"
    assert arena.kinds["hit"]
    assert arena.kinds["partial"]
    assert arena.kinds["bypass"]
