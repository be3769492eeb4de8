"""Declaring cached views: what a class body says, turned into a selectable and a record class.

In: the body of a :class:`CachedView` subclass, that is a ``select()`` and its score indexes.
Out: three things that hang on the class.

``__table__``
    a selectable, rendered as the parenthesised select under the view's name. ``select(View)``,
    joins, aliases and ``Connection.execute`` work with it whether or not a cache is about.
``__record__``
    a frozen :class:`msgspec.Struct` that is a subclass of the view, so that its methods and
    ``isinstance`` work on records.
``__indexes__``
    the :class:`ScoreIndex` declarations bound to the class, by name.

Nothing here configures a mapper: a select of plain columns is checked when the class is created,
any other (entities, a classmethod, a set operation) when the view is first used, because touching
it before all models are imported would poison the mappers.
"""

from __future__ import annotations

import inspect
import keyword
import re
import sys
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast, dataclass_transform
from weakref import WeakValueDictionary

import msgspec
from sqlalchemy import Select, column, tuple_
from sqlalchemy.orm import Mapped, class_mapper
from sqlalchemy.sql import ColumnElement, TableClause, coercions, roles
from sqlalchemy.sql.elements import ColumnClause
from sqlalchemy.sql.operators import ColumnOperators
from sqlalchemy.sql.selectable import FromClause, SelectBase

from .exc import ViewDefinitionError
from .settings import REDACTED, Settings, check_columns, check_settings

if TYPE_CHECKING:
    from sqlalchemy.sql.elements import SQLCoreOperations
    from sqlalchemy.sql.operators import OperatorType

V = TypeVar("V", bound="CachedView")


class Analysis:
    """What works out the plan of a view.

    ``analysis`` sets it when it is imported: a module imports only what stands to its left.
    """

    run: ClassVar[Callable[[type[CachedView]], Any]]


class ViewTable(TableClause):
    """The selectable of a view, rendered as ``(SELECT ...) AS view_name``.

    It is its own cache key: two views may have equal names and columns, and generating a key for
    seventeen columns would be most of the cost of a cached read.
    """

    inherit_cache = True

    def __init__(self, view: type[CachedView], name: str, *columns: ColumnClause[Any]) -> None:
        super().__init__(name, *columns)
        self.view = view

    def _gen_cache_key(self, *_: Any) -> tuple[Any, ...]:
        return (self,)

    def hidden(self, name: str, type_: Any) -> ColumnClause[Any]:
        """Return a column that the view renders, but that ``select(View)`` does not select."""
        result: ColumnClause[Any] = column(name, type_)
        result.table = self
        return result


class ScoreIndex:
    """A sort order in which a view keeps its records.

    :param parts: the scores, most significant first: names of columns of the view, or any SQL
        expression over the tables of its select. An expression is computed by the database, as a
        hidden column of the rendered view. More than one part sorts by tuples of scores.

    On the class the index is a SQL expression (a tuple of them, if it has several parts) for
    ``where()`` and ``order_by()``, and what :meth:`.CacheSession.range` takes. Records with equal
    scores are sorted by the view's primary key.

    It costs eight bytes for each record (an index with an expression: sixteen, and its values).

    ::

        by_time = ScoreIndex("time_hour")
        by_plane = ScoreIndex("tailnum", "time_hour")
        by_delay = ScoreIndex(func.coalesce(Flight.dep_delay, 0))
    """

    def __init__(self, *parts: Any) -> None:
        if not parts:
            raise ViewDefinitionError(
                "ScoreIndex() names no score: give it a column's name or an expression"
            )
        self.parts: tuple[str | ColumnElement[Any], ...] = tuple(
            part if isinstance(part, str) else coercions.expect(roles.ExpressionElementRole, part)
            for part in parts
        )

    if TYPE_CHECKING:

        def __get__(self, instance: object, owner: type[V]) -> ViewIndex[V]: ...


if TYPE_CHECKING:
    _Operators = SQLCoreOperations[Any]
else:
    _Operators = ColumnOperators


class ViewIndex(_Operators, Generic[V]):
    """A :class:`ScoreIndex` bound to its view: ``FlightBoard.by_time``."""

    inherit_cache = True

    def __init__(self, view: type[V], name: str, declared: ScoreIndex) -> None:
        self.view = view
        self.name = name
        self.declared = declared

    @property
    def columns(self) -> tuple[ColumnClause[Any], ...]:
        """The columns of the rendered view that hold the scores."""
        cached: tuple[ColumnClause[Any], ...] | None = self.__dict__.get("_columns")
        if cached is None:
            table = self.view.__table__
            cached = tuple(
                table.c[part]
                if isinstance(part, str)
                else table.hidden(self.column_name(at), part.type)
                for at, part in enumerate(self.declared.parts)
            )
            self.__dict__["_columns"] = cached
        return cached

    def column_name(self, at: int) -> str:
        """Return the name of the column that holds score number ``at``."""
        part = self.declared.parts[at]
        if isinstance(part, str):
            return part
        suffix = f"_{at}" if len(self.declared.parts) > 1 else ""
        return f"_score_{self.name}{suffix}"

    @property
    def column_names(self) -> tuple[str, ...]:
        """The names of :attr:`columns`."""
        return tuple(map(self.column_name, range(len(self.declared.parts))))

    def __clause_element__(self) -> ColumnElement[Any]:
        columns = self.columns
        return columns[0] if len(columns) == 1 else tuple_(*columns)

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> Any:
        return op(self.__clause_element__(), *other, **kwargs)

    def reverse_operate(self, op: OperatorType, other: Any, **kwargs: Any) -> Any:
        return op(other, self.__clause_element__(), **kwargs)

    def __repr__(self) -> str:
        return f"{self.view.__name__}.{self.name}"


_names: WeakValueDictionary[str, type] = WeakValueDictionary()


def _sql_name(view: type[CachedView]) -> str:
    """Return the view's name as SQL shows it: unique, so that two views can stand in one query."""
    base = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", view.__name__).lower()[:48]
    name, number = base, 1
    while name in _names:
        number += 1
        name = f"{base}_{number}"
    _names[name] = view
    return name


class _Resolved:
    """What is lazy about a view: reading one of these attributes of the class works it out."""

    names = frozenset({"__table__", "__record__", "__statement__"})


class _Plan:
    """The plan of a view, worked out when it is first read.

    Each view has one of these, so that none takes the plan of a view that it is derived from.
    """

    def __get__(self, _: Any, owner: type) -> Any:
        view = next(base for base in owner.__mro__ if vars(base).get("__plan__") is self)
        plan = Analysis.run(cast("type[CachedView]", view))
        type.__setattr__(view, "__plan__", plan)
        return plan


@dataclass_transform(
    frozen_default=True, kw_only_default=True, eq_default=True, field_specifiers=()
)
class ViewMeta(type):
    """The class of view classes."""

    __table__: ViewTable
    __record__: type[Any]
    __statement__: SelectBase
    __indexes__: Mapping[str, ViewIndex[Any]]

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> Any:
        namespace.setdefault("__slots__", ())
        cls = cast("Any", super().__new__(mcs, name, bases, namespace, **kwargs))
        if namespace.get("__abstract__"):
            return cls
        check_settings(cls)
        if not hasattr(cls, "__select__"):
            raise ViewDefinitionError(
                f"{name} has no __select__: give it a select() (or say __abstract__ = True)"
            )
        cls.__abstract__ = False
        indexes = {
            key: ViewIndex(cls, key, value.declared if isinstance(value, ViewIndex) else value)
            for base in reversed(cls.__mro__)
            for key, value in vars(base).items()
            if isinstance(value, ScoreIndex | ViewIndex)
        }
        cls.__indexes__ = indexes
        for key, index in indexes.items():
            setattr(cls, key, index)
        cls.__plan__ = _Plan()
        declared = _declared(cls)
        if isinstance(declared, Select) and all(
            isinstance(c, ColumnElement) for c in declared._raw_columns
        ):
            _resolve(cls, declared)
        elif any("__statement__" in vars(b) and _declared(b) is declared for b in cls.__mro__[1:]):
            _resolve_lazy(cls)  # or the columns of the base would be found for its own
        elif not isinstance(declared, classmethod | SelectBase):
            raise ViewDefinitionError(
                f"{name}.__select__ is a {type(declared).__name__}: it has to be a select(), a "
                "set operation of select()s, or a classmethod that returns one"
            )
        return cls

    def __getattr__(cls, name: str) -> Any:
        if name in _Resolved.names or not name.startswith("_"):
            namespace = cls.__dict__
            if "__indexes__" in namespace and "__statement__" not in namespace:
                _resolve_lazy(cls)
                return getattr(cls, name)
        msg = f"type object {cls.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    if not TYPE_CHECKING:  # type checkers derive the signature from the annotations

        def __call__(cls, **values: Any) -> Any:
            return cls.__record__(**values)

    def __clause_element__(cls) -> ViewTable:
        return cls.__table__


class _RecordMeta(ViewMeta, type(msgspec.Struct)):  # type: ignore[misc]
    """The class of record classes: a view that is a struct."""

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> Any:
        return type(msgspec.Struct).__new__(mcs, name, bases, namespace, **kwargs)

    # Not a function that calls it: records are made by the hundred thousand.
    __call__ = type(msgspec.Struct).__call__

    def __getattr__(cls, name: str) -> Any:
        msg = f"type object {cls.__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)

    def __clause_element__(cls) -> ViewTable:
        msg = "__clause_element__"
        raise AttributeError(msg)


class CachedView(Settings, metaclass=ViewMeta):
    """Base class of cached views.

    A subclass says ``__select__``, a ``select()`` (or a classmethod that returns one) whose
    columns become the attributes of the records, and any number of :class:`ScoreIndex`.
    Annotations are optional, for type checkers and readers::

        class FlightBoard(CachedView):
            __select__ = (
                select(Flight.id, Flight.time_hour, Airline.name.label("airline"))
                .join(Airline, Flight.carrier == Airline.carrier)
            )
            id: Mapped[int]
            time_hour: Mapped[datetime]
            airline: Mapped[str]

            by_time = ScoreIndex("time_hour")

    On the class, ``FlightBoard.time_hour`` is a SQL expression; on a record it is the value.
    Records are immutable, compare by value, hash by primary key, can be pickled, and are built
    with ``FlightBoard(id=1, time_hour=..., airline=...)``.

    Optional settings are those of :class:`.Settings`, and

    ``__abstract__``
        ``True`` for a base class that is no view itself.

    :raises ViewDefinitionError: if the declaration cannot be right. A select of plain columns is
        checked at once, any other when the view is first used.
    """

    __abstract__: ClassVar[bool] = True

    if TYPE_CHECKING:
        __select__: ClassVar[Any]
        __table__: ClassVar[ViewTable]
        __record__: ClassVar[type[Any]]
        __indexes__: ClassVar[Mapping[str, ViewIndex[Any]]]

    def _asdict(self) -> dict[str, Any]:
        """Return the record as a dictionary, column by column."""
        return msgspec.structs.asdict(cast("Any", self))


def _annotated_names(cls: type) -> list[str]:
    """Return the names annotated with ``Mapped`` in the bodies of a view and its mixins."""
    names: list[str] = []
    for base in cls.__mro__:
        if base is CachedView or not isinstance(base, ViewMeta):
            continue
        if sys.version_info >= (3, 14):  # annotations are evaluated lazily, on request
            import annotationlib

            annotations = annotationlib.get_annotations(
                base, format=annotationlib.Format.FORWARDREF
            )
        else:
            annotations = vars(base).get("__annotations__", {})
        names += [
            name
            for name, annotation in annotations.items()
            if getattr(annotation, "__origin__", None) is Mapped
            or (isinstance(annotation, str) and re.match(r"(\w+\.)*Mapped\b", annotation))
        ]
    return names


def _expand(view: type, statement: Any) -> tuple[SelectBase, list[tuple[str | None, Any]]]:
    """Return the select with its entities replaced by their columns, and its (name, type)s."""
    if not isinstance(statement, SelectBase):
        raise ViewDefinitionError(
            f"{view.__name__}.__select__ is a {type(statement).__name__}: it has to be a select()"
        )
    if not isinstance(statement, Select):
        columns = statement.selected_columns
        return statement, [(str(key), column.type) for key, column in columns.items()]
    expanded: list[Any] = []
    names: list[str | None] = []
    for raw in statement._raw_columns:
        entity = raw._annotations.get("parententity")
        if isinstance(raw, ColumnElement):
            expanded.append(raw)
            names.append(_key_of(raw))
        elif entity is not None:
            mapper = class_mapper(entity.mapper.class_)
            for attribute in mapper.column_attrs:
                expanded.append(getattr(entity.entity, attribute.key))
                names.append(str(attribute.key))
        else:
            if not isinstance(raw, FromClause):
                raise ViewDefinitionError(
                    f"{view.__name__}.__select__ selects {raw}, of which nobody can know what it "
                    "is: write it as a SQLAlchemy expression"
                )
            for key, element in raw.c.items():
                expanded.append(element)
                names.append(str(key))
    if not all(isinstance(raw, ColumnElement) for raw in statement._raw_columns):
        statement = statement.with_only_columns(*expanded)
    return statement, [
        (name, coercions.expect(roles.ColumnsClauseRole, element).type)
        for name, element in zip(names, expanded, strict=True)
    ]


def _key_of(element: Any) -> str | None:
    key = getattr(element, "_proxy_key", None)
    return None if key is None else str(key)  # names of Core columns are strings of their own kind


def _declared(view: type) -> Any:
    return inspect.getattr_static(view, "__select__")


def _resolve_lazy(view: Any) -> None:
    """Resolve a view by its select, and the views derived from it that have the same."""
    declared = _declared(view)
    _resolve(view, view.__select__() if isinstance(declared, classmethod) else declared)
    for derived in type.__subclasses__(view):
        lazy = "__indexes__" in vars(derived) and "__statement__" not in vars(derived)
        if lazy and _declared(derived) is declared:
            _resolve_lazy(derived)


def _resolve(view: Any, declared: Any) -> None:
    """Work out the columns of a view, its table and its record class."""
    statement, columns = _expand(view, declared)
    names: list[str] = []
    for position, (name, _) in enumerate(columns, 1):
        if not name or not name.isidentifier() or keyword.iskeyword(name) or name[0] == "_":
            raise ViewDefinitionError(
                f"column {position} of {view.__name__}.__select__ "
                + (f"is called {name!r}" if name else "has no name")
                + ": give it one with .label('...') that is a public Python identifier"
            )
        if name in names:
            raise ViewDefinitionError(
                f"{view.__name__}.__select__ has two columns called {name!r}: rename one of "
                "them with .label('...')"
            )
        if name in view.__indexes__ or hasattr(CachedView, name):
            raise ViewDefinitionError(
                f"{view.__name__}.{name} is both a column and an index or method: rename one"
            )
        names.append(name)
    known = ", ".join(names)
    for name in _annotated_names(view):
        if name not in names:
            raise ViewDefinitionError(
                f"{view.__name__}.{name} is annotated, but its select has no column of that "
                f"name; it has: {known}"
            )
    for index in view.__indexes__.values():
        for part in index.declared.parts:
            if isinstance(part, str) and part not in names:
                raise ViewDefinitionError(
                    f"{view.__name__}.{index.name} sorts by {part!r}, but the select has no "
                    f"column of that name; it has: {known}"
                )
    check_columns(view, names)
    table = ViewTable(view, _sql_name(view), *(column(n, t) for n, t in columns if n))
    view.__statement__ = statement
    view.__table__ = table
    for name in names:
        setattr(view, name, table.c[name])
    view.__record__ = _record_class(view, names)


def _record_class(view: Any, names: list[str]) -> type[Any]:
    values = attrgetter(*names)
    single = len(names) == 1

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return _restore, (view, (values(self),) if single else values(self))

    def __hash__(self: Any) -> int:
        return hash(view.__plan__.key_of(self))

    def __rich_repr__(self: Any) -> list[tuple[str, Any]]:
        return [(n, REDACTED if n in view.__redact__ else getattr(self, n)) for n in names]

    def __repr__(self: Any) -> str:
        shown = (f"{n}={v}" if v is REDACTED else f"{n}={v!r}" for n, v in __rich_repr__(self))
        return f"{view.__name__}({', '.join(shown)})"

    namespace = {
        "__annotations__": dict.fromkeys(names, object),
        "__module__": view.__module__,
        "__qualname__": view.__qualname__,
        "__doc__": view.__doc__,
        "__reduce__": __reduce__,
        "__hash__": __hash__,
    }
    if view.__redact__:
        namespace |= {"__repr__": __repr__, "__rich_repr__": __rich_repr__}
    record = _RecordMeta(view.__name__, (view, msgspec.Struct), namespace, frozen=True, gc=False)
    return cast("type[Any]", record)


def _restore(view: Any, values: tuple[Any, ...]) -> Any:
    """Build a record again from a pickle."""
    return view.__record__(*values)
