"""Why a read is answered the way it is, in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .analysis import table_label
from .answering import (
    check_residual,
    check_sortable,
    covered_candidate,
    limited_candidate,
    partial_candidate,
)
from .comparison import Inexact
from .options import BypassCache
from .planner import ask
from .redaction import shown_coverage, shown_intervals
from .scores import NOTHING
from .shapes import shape_of
from .staleness import tolerated
from .table import CachedTable


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a statement would be answered: ``hit``, ``partial``, ``miss`` or ``bypass``."""

    kind: str
    view: str
    reason: str = ""
    index: str = ""
    intervals: str = ""
    missing: str = ""
    """What would be fetched from the database."""
    records: int = 0
    """Records that would be scanned."""
    residual: int = 0
    """Conditions that would be tested record by record."""
    sort: bool = False
    """Whether the records would have to be sorted."""
    coarse: dict[str, str] = field(default_factory=dict)
    """Tables of which any change marks the whole view, and why."""

    def __str__(self) -> str:
        lines = [f"{self.kind} on {self.view}" + (f": {self.reason}" if self.reason else "")]
        if self.index:
            lines += [f"  index      {self.index}", f"  intervals  {self.intervals}"]
        if self.missing:
            lines.append(f"  missing    {self.missing}")
        if self.index:
            lines.append(f"  records    {self.records} scanned")
            lines.append(f"  residual   {self.residual} condition(s)")
            lines.append(f"  order      {'sorted' if self.sort else 'as indexed'}")
        lines += [f"  coarse     {table}: {why}" for table, why in self.coarse.items()]
        return "\n".join(lines)


def explain(table: CachedTable, statement: Any) -> Explanation:
    """Say how a SELECT of a view would be answered now, and why."""
    name = table.view.__name__
    coarse = {table_label(t): why for t, why in table.coarse.items()}
    try:
        return _explained(table, statement, name, coarse)
    except Inexact as reason:
        return Explanation("bypass", name, str(reason), coarse=coarse)


def _explained(
    table: CachedTable, statement: Any, name: str, coarse: dict[str, str]
) -> Explanation:
    layout = table.set_up()
    columns = layout.columns
    shape, parameters = shape_of(statement)
    if any(isinstance(option, BypassCache) for option in shape.options):
        raise Inexact("bypass_cache()")
    state = table.state
    fills = table.keeper is not None and table.keeper.fills
    loaded = "; ReadThrough loads what it can of what is missing" if fills else ""
    if not state.coverage:
        return Explanation("miss", name, f"nothing is loaded{loaded}", coarse=coarse)
    question = ask(shape, parameters, columns)
    reason = ""
    candidate, missing, kind = covered_candidate(question, state), NOTHING, "hit"
    if candidate is None:
        candidate = limited_candidate(question, state)
    if candidate is None:
        partial = partial_candidate(layout, question, state)
        if partial is None:
            return Explanation(
                "miss",
                name,
                f"the coverage is {shown_coverage(table.plan, state.coverage)}{loaded}",
                coarse=coarse,
            )
        candidate, missing = partial
        kind, reason = "partial", f"the gaps are fetched and merged{loaded}"
    marked = table.current is None or state.is_stale(candidate.index, candidate.intervals - missing)
    stale = None if missing or not marked else tolerated(table, shape.options)
    if stale is not None:
        reason = stale
    elif marked:
        if not table.refresh_needed:
            raise Inexact("a commit is under way")
        reason = reason or "after a refresh of what is marked"
    direction = candidate.direction
    if direction is None or missing:
        check_sortable(shape.orderings, columns)
    check_residual(shape, candidate.residual, columns)
    order = state.storage.orders[candidate.index]
    return Explanation(
        kind,
        name,
        reason,
        index=candidate.index or "primary key",
        intervals=shown_intervals(table.plan, candidate.index, candidate.intervals),
        missing=shown_intervals(table.plan, candidate.index, missing) if missing else "",
        records=sum(map(order.count, candidate.intervals)),
        residual=len(candidate.residual),
        sort=direction is None,
        coarse=coarse,
    )
