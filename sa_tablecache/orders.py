"""Sort orders: how the key of a record is made, and how its place is found by bisection.

In: the columns of an index, with what is known of their values. Out: an :class:`Order`, with
functions generated for these columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any, TypeAlias, cast

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
    """Whether scores are kept beside the records, because records do not show them."""
    key_of: Callable[[Record, Hidden | None], Key] = field(init=False, repr=False)
    prefixes: tuple[Callable[[Any], Any] | None, ...] = field(init=False, repr=False)
    """For each length of prefix, its getter: from a record, or from its stored scores."""
    score_of: Callable[[Record, Hidden | None], Any] = field(init=False, repr=False)
    """Gives what is stored: the score, or the tuple of scores."""
    depth: int = field(init=False)
    """How many parts of the key that is."""
    rests: tuple[Callable[[Record], Any] | None, ...] = field(init=False, repr=False)
    """Where scores are stored: for each length, the getter of so many parts that come after."""
    getters: tuple[Callable[[Record], Any], ...] = field(init=False, repr=False)
    """What gives each score of a record, if none is stored."""

    def __post_init__(self) -> None:
        null = "NULLS_FIRST" if self.nulls_first else "NULLS_LAST"
        names = {"NULLS_FIRST": NULLS_FIRST, "NULLS_LAST": NULLS_LAST, "NAN": NAN}
        sources = [part.source(null) for part in self.parts]
        stored = any(part.hidden is not None for part in self.parts)
        prefixes: list[Callable[[Any], Any] | None] = [None]
        ends = [at for at, part in enumerate(self.parts, 1) if part.hidden is not None]
        depth = max([self.scores, *ends])
        whole = sources[0] if depth == 1 else f"({', '.join(sources[:depth])},)"
        rests: list[Callable[[Any], Any] | None] = [None]
        getters: list[Callable[[Any], Any]] = []
        if stored:
            prefixes += [itemgetter(slice(length)) for length in range(1, depth)]
            prefixes[1:2] = [itemgetter(0)] if depth > 1 else []
            prefixes.append(None)
            stops = range(depth + 1, len(self.parts) + 1)
            rests += [self._getter(depth, stop, sources, names) for stop in stops]
        else:
            lengths = range(1, len(self.parts) + 1)
            prefixes += [self._getter(0, length, sources, names) for length in lengths]
            getters += [self._getter(at, at + 1, sources, names) for at in range(depth)]
        set_ = object.__setattr__
        set_(self, "stored", stored)
        set_(self, "depth", depth)
        set_(self, "getters", tuple(getters))
        set_(self, "prefixes", tuple(prefixes))
        set_(self, "rests", tuple(rests))
        set_(self, "score_of", eval(f"lambda r, h: {whole}", names))  # noqa: S307
        set_(self, "key_of", eval(f"lambda r, h: ({', '.join(sources)},)", names))  # noqa: S307

    def _getter(
        self, start: int, stop: int, sources: Sequence[str], names: dict[str, Any]
    ) -> Callable[[Any], Any]:
        """Return what gives some parts of the key of a record: one, or a tuple of them."""
        parts = self.parts[start:stop]
        if all(part.plain for part in parts):
            return attrgetter(*(part.name for part in parts))
        body = sources[start] if len(parts) == 1 else f"({', '.join(sources[start:stop])})"
        return cast("Callable[[Any], Any]", eval(f"lambda r: {body}", names))  # noqa: S307

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
