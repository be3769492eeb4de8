"""What a view says about itself is checked; statement options are part of the statement."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from sa_tablecache import CachedView, bypass_cache, max_staleness, no_store
from sa_tablecache.exc import CriteriaError, ViewDefinitionError
from sa_tablecache.options import BypassCache, MaxStaleness
from sa_tablecache.shapes import shape_of
from tests.zoo import Person, Plane


def declare(**settings: Any) -> type[CachedView]:
    """Declare a view of planes with some settings."""
    statement = select(Plane.tailnum, Plane.model, Plane.year)
    view: type[CachedView] = type("Planes", (CachedView,), {"__select__": statement, **settings})
    return view


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("__refresh__", "soon", r"Planes.__refresh__ is 'soon': .* 'lazy', 'eager'"),
        ("__on_miss__", None, r"Planes.__on_miss__ is None: .* 'database', 'wait', 'raise'"),
        ("__max_misses__", -1, r"Planes.__max_misses__ is -1: .* number of reads, or None"),
        ("__max_misses__", True, r"Planes.__max_misses__ is True"),
        ("__max_misses__", "10", r"Planes.__max_misses__ is '10'"),
        ("__max_staleness__", 5, r"Planes.__max_staleness__ is 5: .* timedelta"),
        ("__max_staleness__", timedelta(-1), r"Planes.__max_staleness__ is .*: .* not negative"),
        ("__redact__", "model", r"Planes.__redact__ has to be a tuple of column names"),
        ("__redact__", ("modl",), r"Planes.__redact__ names 'modl', but .*: tailnum, model, year"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(setting: str, value: Any, message: str) -> None:
    """The error names the view, the setting, what it is and what it could be."""
    with pytest.raises(ViewDefinitionError, match=message):
        declare(**{setting: value})


def test_settings_are_checked_where_columns_are_known_later() -> None:
    """Columns of a view of entities are checked when it is first used."""
    view = type("Persons", (CachedView,), {"__select__": select(Person), "__redact__": ("nme",)})
    with pytest.raises(ViewDefinitionError, match="__redact__ names 'nme'"):
        view.__table__


def test_settings_are_inherited() -> None:
    """A base class may say for all views of an application what they do."""

    class Patient(CachedView):
        __abstract__ = True
        __max_staleness__ = timedelta(seconds=5)
        __max_misses__ = 0
        __on_miss__ = "wait"
        __refresh__ = "eager"

    view: Any = type("Planes", (Patient,), {"__select__": select(Plane.tailnum)})
    assert view.__max_staleness__ == timedelta(seconds=5)
    assert view.__max_misses__ == 0


def test_records_do_not_show_redacted_values() -> None:
    """The `repr()` of a record hides what the view redacts, and nothing else does."""
    record: Any = declare(__redact__=("model",))(tailnum="N1", model="secret", year=None)
    assert repr(record) == "Planes(tailnum='N1', model=<redacted>, year=None)"
    assert "secret" not in str(list(record.__rich_repr__()))
    assert record.model == record._asdict()["model"] == "secret"
    assert repr(declare()(tailnum="N1", model="shown", year=1)) == (
        "Planes(tailnum='N1', model='shown', year=1)"
    )


def test_options_are_part_of_what_a_statement_is() -> None:
    """Statements that differ in their options alone are not taken for each other."""
    statement: Any = select(declare())
    for option, class_ in [
        (no_store(), None),
        (bypass_cache(), BypassCache),
        (max_staleness(timedelta(seconds=1)), MaxStaleness),
    ]:
        options = shape_of(statement.options(option))[0].options
        assert [type(o) for o in options] == [class_ or type(option)]
    ages = [timedelta(seconds=seconds) for seconds in (1, 2, 1)]
    shapes = [shape_of(statement.options(max_staleness(age)))[0] for age in ages]
    assert [shape.options[0].payload for shape in shapes] == ages
    assert shapes[0] is shapes[2]


@pytest.mark.parametrize("age", [5, None, timedelta(seconds=-1)])
def test_an_age_is_a_timedelta(age: Any) -> None:
    """Numbers have no unit, and nothing is younger than now."""
    with pytest.raises(CriteriaError, match="has to be a timedelta that is not negative"):
        max_staleness(age)
