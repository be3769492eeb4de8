"""Sort orders: how the key of a record is made, and how its place is found by bisection.

In: the columns of an index, with what is known of their values. Out: an :class:`Order`, with
functions generated for these columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias

from .scores import MAX, MIN, NULLS_FIRST, NULLS_LAST, Extreme, Interval, Key

Record: TypeAlias = Any
Hidden: TypeAlias = tuple[Any, ...]

NAN = Extreme("NAN", 0.5)  # type: ignore[arg-type]
"""In keys, the place of NaN where the database sorts it after all numbers."""


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a sort order."""

    name: str
    nullable: bool
    hidden: int | None = None
    """Its position among the hidden values, or ``None`` for a column of the record."""
    hashed: bool = False
    """Whether to sort by hash, because the values themselves do not sort (keys only)."""
    nan: bool = False
    """Whether NaN may occur."""

    def source(self, null: str) -> str:
        """Return the Python expression of this component for record ``r``, hidden values ``h``."""
        value = f"r.{self.name}" if self.hidden is None else f"h[{self.hidden}]"
        result = value
        if self.hashed:
            result = f"hash({value})"
        elif self.nan:
            result = f"(NAN if {value} != {value} else {value})"
        return f"({null} if {value} is None else {result})" if self.nullable else result

    @property
    def plain(self) -> bool:
        """Whether the component is just an attribute of the record."""
        return not (self.nullable or self.hashed or self.nan) and self.hidden is None


@dataclass(frozen=True)
class Order:
    """How one index sorts: its scores, then the primary key."""

    name: str
    parts: tuple[Part, ...]
    scores: int
    """How many of the parts are scores; the others break ties."""
    nulls_first: bool
    stored: bool = field(init=False)
    """Whether keys are kept beside the records, because records do not show them."""
    key_of: Callable[[Record, Hidden | None], Key] = field(init=False, repr=False)
    prefixes: tuple[Callable[[Any], Any] | None, ...] = field(init=False, repr=False)
    """For each length of prefix, its getter: from a stored key or else from a record."""
    getters: tuple[Callable[[Record], Any], ...] = field(init=False, repr=False)
    """What gives each part of a key of a record, if keys are not stored."""

    def __post_init__(self) -> None:
        null = "NULLS_FIRST" if self.nulls_first else "NULLS_LAST"
        names = {"NULLS_FIRST": NULLS_FIRST, "NULLS_LAST": NULLS_LAST, "NAN": NAN}
        sources = [part.source(null) for part in self.parts]
        stored = any(part.hidden is not None for part in self.parts)
        prefixes: list[Callable[[Any], Any] | None] = [None]
        for length in range(1, len(self.parts) + 1):
            if stored:
                whole = length == len(self.parts)
                prefixes.append(
                    itemgetter(0) if length == 1 else None if whole else itemgetter(slice(length))
                )
            elif all(part.plain for part in self.parts[:length]):
                prefixes.append(attrgetter(*(part.name for part in self.parts[:length])))
            else:
                body = sources[0] if length == 1 else f"({', '.join(sources[:length])})"
                prefixes.append(eval(f"lambda r: {body}", names))  # noqa: S307
        set_ = object.__setattr__
        getters = (
            ()
            if stored
            else (
                attrgetter(part.name) if part.plain else eval(f"lambda r: {source}", names)  # noqa: S307
                for part, source in zip(self.parts, sources, strict=True)
            )
        )
        set_(self, "stored", stored)
        set_(self, "getters", tuple(getters))
        set_(self, "prefixes", tuple(prefixes))
        set_(self, "key_of", eval(f"lambda r, h: ({', '.join(sources)},)", names))  # noqa: S307

    def cut_values(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return a prefix of values as it stands in keys, ``None`` for NULL."""
        null = NULLS_FIRST if self.nulls_first else NULLS_LAST
        cut = []
        for part, value in zip(self.parts, values, strict=False):
            cut.append(null if value is None else hash(value) if part.hashed else value)
        return tuple(cut)

    def prefix(self, values: Sequence[Any]) -> Interval:
        """Return the interval of all keys that start with the values."""
        cut = self.cut_values(values)
        return Interval((*cut, MIN), (*cut, MAX))
