"""What may be shown of values: in logs, errors and reasons, not those of columns in ``__redact__``.

In: values of a view, by the names of their columns. Out: text. Of hidden columns, which the view
adds (scores that are expressions, keys of base rows), nobody knows which they give away: where a
view redacts anything, they are not shown either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .analysis import ViewPlan
from .coverage import Coverage
from .scores import IntervalSet
from .settings import REDACTED


def is_redacted(plan: ViewPlan, names: Iterable[str]) -> bool:
    """Whether values of one of some columns are not to be shown."""
    hidden = plan.view.__redact__
    return bool(hidden) and any(name in hidden or name.startswith("_") for name in names)


def shown_value(plan: ViewPlan, name: str, value: Any) -> str:
    """Return a value of a column as it may be shown."""
    return REDACTED if is_redacted(plan, (name,)) else repr(value)


def shown_key(plan: ViewPlan, names: Sequence[str], values: Sequence[Any]) -> str:
    """Return the values of a key as they may be shown."""
    shown = ", ".join(shown_value(plan, n, v) for n, v in zip(names, values, strict=False))
    return shown if len(values) == 1 else f"({shown})"


def shown_intervals(plan: ViewPlan, index: str, intervals: IntervalSet) -> str:
    """Return intervals of an index as they may be shown."""
    indexes = plan.view.__indexes__
    names = indexes[index].column_names if index in indexes else plan.key
    if intervals.is_everything or not is_redacted(plan, names):
        return repr(intervals)
    return f"{{{len(intervals)} interval(s), {REDACTED}}}"


def shown_coverage(plan: ViewPlan, coverage: Coverage) -> str:
    """Return the coverage as it may be shown."""
    if coverage.everything or not plan.view.__redact__:
        return repr(coverage)
    parts = (f"{name}: {shown_intervals(plan, name, i)}" for name, i in coverage.sets.items())
    return ", ".join(parts) or "nothing"
