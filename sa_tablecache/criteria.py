"""WHERE clauses as trees that Python can evaluate with SQL's three-valued logic.

In: the criteria of a ``select()``. Out: a tree of nodes in negation normal form.

SQL asks whether a condition is *true*; unknown counts as not true. Once NOT is pushed down to the
comparisons, "is true" of a tree is the and/or of "is true" of its leaves, and each leaf can be
tested with two values: a comparison is true if no side is NULL and it holds. What is not described
here raises :class:`.Inexact`, and the database answers.

``sqlalchemy.orm.evaluator`` does not do: it is wrong for NULL under NOT and in NOT IN and in row
values, and eighty times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

from sqlalchemy.sql import operators as sql
from sqlalchemy.sql.elements import (
    AsBoolean,
    BinaryExpression,
    BindParameter,
    ClauseList,
    ColumnClause,
    False_,
    Grouping,
    Label,
    Null,
    True_,
    Tuple,
    UnaryExpression,
)

from .comparison import Comparison, Inexact


@dataclass(frozen=True, slots=True)
class Const:
    """A condition without columns."""

    value: bool


@dataclass(frozen=True, slots=True)
class And:
    """All of them."""

    nodes: tuple[Node, ...]
    row: tuple[str, ...] = ()
    """The columns of the row value whose comparison it is, if it is one."""


@dataclass(frozen=True, slots=True)
class Or:
    """Any of them."""

    nodes: tuple[Node, ...]
    row: tuple[str, ...] = ()
    """See :class:`And`."""


@dataclass(frozen=True, slots=True)
class Compare:
    """A column and a parameter, by a Python operator's symbol."""

    column: str
    op: str
    parameter: int


@dataclass(frozen=True, slots=True)
class CompareColumns:
    """Two columns."""

    left: str
    op: str
    right: str


@dataclass(frozen=True, slots=True)
class IsNull:
    """``IS NULL``, or with ``wanted=False`` ``IS NOT NULL``."""

    column: str
    wanted: bool


@dataclass(frozen=True, slots=True)
class Truth:
    """A boolean column: ``IS TRUE``, ``IS FALSE``, or with ``negated`` ``IS NOT ...``."""

    column: str
    wanted: bool
    negated: bool = False


@dataclass(frozen=True, slots=True)
class In:
    """``IN`` or ``NOT IN`` a list of values."""

    column: str
    parameter: int
    negated: bool


@dataclass(frozen=True, slots=True)
class RowIn:
    """``(a, b) IN (...)``."""

    columns: tuple[str, ...]
    parameter: int


@dataclass(frozen=True, slots=True)
class RowCompare:
    """``(a, b) < (1, 2)`` and the like, compared column by column."""

    columns: tuple[str, ...]
    op: str
    parameters: tuple[int, ...]


Node: TypeAlias = (
    Const | And | Or | Compare | CompareColumns | IsNull | Truth | In | RowIn | RowCompare
)

_SYMBOLS: Final[dict[Any, str]] = {
    sql.eq: "==", sql.ne: "!=", sql.lt: "<", sql.le: "<=", sql.gt: ">", sql.ge: ">=",
}  # fmt: skip
_NEGATED: Final = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
_FLIPPED: Final = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def columns_of(node: Node) -> frozenset[str]:
    """Return the columns that a condition is about."""
    match node:
        case And() | Or():
            return frozenset().union(*map(columns_of, node.nodes))
        case CompareColumns():
            return frozenset({node.left, node.right})
        case RowIn() | RowCompare():
            return frozenset(node.columns)
        case Const():
            return frozenset()
        case _:
            return frozenset({node.column})


def conjuncts(node: Node) -> Iterator[Node]:
    """Return the conditions that all have to be true."""
    if isinstance(node, And):
        for inner in node.nodes:
            yield from conjuncts(inner)
    elif node != Const(True):
        yield node


# -- reading -----------------------------------------------------------------------------------


class Reader:
    """Reads criteria into nodes.

    :param resolve: the name of a view's column, or ``None`` for any other expression.
    :param position: the number of a bound parameter in the statement.
    """

    def __init__(
        self,
        resolve: Callable[[Any], str | None],
        position: Callable[[BindParameter[Any]], int],
    ) -> None:
        self._resolve = resolve
        self._position = position

    def read(self, element: Any, *, negated: bool = False) -> Node:
        """Return the condition "``element`` is true", or "``NOT element`` is true"."""
        element = _ungrouped(element)
        match element:
            case True_():
                return Const(not negated)
            case False_():
                return Const(negated)
            case AsBoolean():
                wanted = (element.operator is sql.is_true) is not negated
                return Truth(self._column(element.element), wanted)
            case ColumnClause():
                return Truth(self._column(element), not negated)
            case ClauseList() if element.operator in (sql.and_, sql.or_):
                nodes = tuple(self.read(e, negated=negated) for e in element.clauses)
                return And(nodes) if (element.operator is sql.and_) is not negated else Or(nodes)
            case UnaryExpression() if element.operator is sql.inv:
                return self.read(element.element, negated=not negated)
            case BinaryExpression():
                return self._binary(element, negated=negated)
        # BooleanClauseList is an ExpressionClauseList, which is not a ClauseList.
        operator, clauses = getattr(element, "operator", None), getattr(element, "clauses", None)
        if operator in (sql.and_, sql.or_) and clauses is not None:
            nodes = tuple(self.read(e, negated=negated) for e in clauses)
            return And(nodes) if (operator is sql.and_) is not negated else Or(nodes)
        raise Inexact(f"{type(element).__name__} is left to the database")

    def _binary(self, element: BinaryExpression[Any], *, negated: bool) -> Node:
        operator: Any = element.operator
        left, right = _ungrouped(element.left), _ungrouped(element.right)
        name = getattr(operator, "__name__", str(operator))
        if operator in _SYMBOLS:
            return self._comparison(_SYMBOLS[operator], left, right, negated=negated)
        if operator in (sql.is_, sql.is_not):
            wanted = (operator is sql.is_) is not negated
            if isinstance(right, Null):
                return IsNull(self._column(left), wanted)
            if isinstance(right, True_ | False_):
                return Truth(self._column(left), isinstance(right, True_), not wanted)
        if operator in (sql.in_op, sql.not_in_op):
            outside = (operator is sql.not_in_op) is not negated
            if isinstance(left, Tuple):
                if outside:
                    raise Inexact("NOT IN over row values is left to the database")
                columns = tuple(map(self._column, left.clauses))
                return RowIn(columns, self._parameter(right))
            return In(self._column(left), self._parameter(right), outside)
        if operator in (sql.between_op, sql.not_between_op):
            if element.modifiers.get("symmetric"):
                raise Inexact("BETWEEN SYMMETRIC is left to the database")
            kinds = (left.type, *left.type._variant_mapping.values())
            if any(getattr(kind, "collation", None) for kind in kinds):
                # SQLAlchemy renders the collation with the bounds, which PostgreSQL cannot parse.
                raise Inexact("BETWEEN of text with a collation is left to the database")
            column = self._column(left)
            low, high = (self._parameter(bound) for bound in cast("Any", right).clauses)
            if (operator is sql.between_op) is not negated:
                return And((Compare(column, ">=", low), Compare(column, "<=", high)))
            return Or((Compare(column, "<", low), Compare(column, ">", high)))
        raise Inexact(f"operator {name} is left to the database")

    def _comparison(self, op: str, left: Any, right: Any, *, negated: bool) -> Node:
        if negated:
            op = _NEGATED[op]
        if isinstance(left, BindParameter):
            left, right, op = right, left, _FLIPPED[op]
        if isinstance(left, Tuple) and isinstance(right, Tuple):
            columns = tuple(map(self._column, left.clauses))
            parameters = tuple(map(self._parameter, right.clauses))
            if len(columns) != len(parameters):
                raise Inexact("row values of different lengths")
            pairs = zip(columns, parameters, strict=True)
            if op == "==":
                return And(tuple(Compare(c, op, p) for c, p in pairs), columns)
            if op == "!=":
                return Or(tuple(Compare(c, op, p) for c, p in pairs), columns)
            return RowCompare(columns, op, parameters)
        if isinstance(right, True_ | False_):
            if op not in ("==", "!="):
                raise Inexact("the order of truth values is left to the database")
            return Truth(self._column(left), isinstance(right, True_) is (op == "=="))
        if isinstance(right, BindParameter):
            return Compare(self._column(left), op, self._parameter(right))
        return CompareColumns(self._column(left), op, self._column(right))

    def _column(self, element: Any) -> str:
        element = _ungrouped(element)
        name = self._resolve(element)
        if name is None:
            raise Inexact(f"{type(element).__name__} is left to the database")
        return name

    def _parameter(self, element: Any) -> int:
        if not isinstance(element, BindParameter):
            raise Inexact(f"{type(element).__name__} is left to the database")
        return self._position(element)


def _ungrouped(element: Any) -> Any:
    while isinstance(element, Grouping | Label):
        element = element.element
    return element


# -- parameters --------------------------------------------------------------------------------


def bind(
    node: Node,
    raw: Sequence[Any],
    bound: list[Any],
    comparisons: Mapping[str, Comparison],
    types: Sequence[Any],
) -> None:
    """Put each parameter into the form in which it compares, or raise :class:`.Inexact`.

    ``types`` are those as which the parameters are sent. A list becomes a pair: the set of its
    values other than NULL, and whether NULL is among them.
    """

    def usable(column: str, op: str = "==") -> Comparison:
        how = comparisons.get(column)
        if how is None:
            raise Inexact(f"{column} is computed by the database")
        if not (how.equality if op in ("==", "!=") else how.order):
            raise Inexact(f"{column}: {how.reason or 'no order that Python knows'}")
        return how

    def row(columns: Sequence[str]) -> None:
        for column in columns:
            if usable(column).alone:
                raise Inexact(f"{column} may be NULL in a row value: MariaDB has ways of its own")

    match node:
        case And() | Or():
            row(node.row)
            for inner in node.nodes:
                bind(inner, raw, bound, comparisons, types)
        case Compare():
            how = usable(node.column, node.op)
            value, type_ = raw[node.parameter], types[node.parameter]
            bound[node.parameter] = how.parameter(value, type_)
        case CompareColumns():
            left, right = usable(node.left, node.op), usable(node.right, node.op)
            if not left.compares_with(right):
                raise Inexact(f"{node.left} and {node.right} are of different types")
            if left.nan_is_greatest:
                raise Inexact("columns in which NaN may occur")
        case In():
            how = usable(node.column)
            values, type_ = list(raw[node.parameter]), types[node.parameter]
            some = frozenset(how.parameter(value, type_) for value in values) - {None}
            bound[node.parameter] = (some, None in values, not values)
        case IsNull():
            known = comparisons.get(node.column)
            if known is None or not known.none_is_null:
                raise Inexact(f"{node.column} may be None without being NULL")
        case Truth():
            if bool not in usable(node.column).accepts:
                raise Inexact(f"{node.column} is no truth value")
        case RowIn():
            row(node.columns)
            hows = [usable(column) for column in node.columns]
            rows = [tuple(row) for row in raw[node.parameter]]
            kinds = types[node.parameter].types
            if any(len(row) != len(hows) for row in (*rows, kinds)):
                raise Inexact("row values of different lengths")
            usable_rows = [tuple(map(Comparison.parameter, hows, row, kinds)) for row in rows]
            bound[node.parameter] = frozenset(row for row in usable_rows if None not in row)
        case RowCompare():
            row(node.columns)
            for column, parameter in zip(node.columns, node.parameters, strict=True):
                how, value = usable(column, node.op), raw[parameter]
                usable(column)
                type_ = types[parameter]
                bound[parameter] = how.parameter(value, type_)


# -- evaluation --------------------------------------------------------------------------------


def predicate_source(
    node: Node,
    bound: Sequence[Any],
    comparisons: Mapping[str, Comparison],
    nullable: Callable[[str], bool],
) -> str:
    """Return Python source of "record ``r`` meets the condition"; parameters are ``p0``, ..."""

    def known(*columns: str) -> list[str]:
        return [f"r.{c} is not None" for c in dict.fromkeys(columns) if nullable(c)]

    def joined(word: str, terms: Sequence[str]) -> str:
        return f"({f' {word} '.join(terms)})" if len(terms) > 1 else terms[0]

    def source(node: Node) -> str:
        match node:
            case Const():
                return str(node.value)
            case And() | Or():
                word = "and" if isinstance(node, And) else "or"
                terms = [source(inner) for inner in node.nodes]
                return joined(word, terms) if terms else str(word == "and")
            case Compare():
                return compare(node.column, node.op, node.parameter)
            case CompareColumns():
                terms = known(node.left, node.right)
                return joined("and", [*terms, f"r.{node.left} {node.op} r.{node.right}"])
            case IsNull():
                return f"r.{node.column} is {'' if node.wanted else 'not '}None"
            case Truth():
                test = f"r.{node.column} is {node.wanted}"
                return f"(not {test})" if node.negated else test
            case In():
                name = f"p{node.parameter}"
                _, has_null, empty = bound[node.parameter]
                if not node.negated:
                    return joined("and", [*known(node.column), f"r.{node.column} in {name}[0]"])
                if empty:
                    return "True"
                if has_null:
                    return "False"
                return joined("and", [*known(node.column), f"r.{node.column} not in {name}[0]"])
            case RowIn():
                values = "".join(f"r.{c}, " for c in node.columns)
                return joined("and", [*known(*node.columns), f"({values}) in p{node.parameter}"])
            case RowCompare():
                return row(node.columns, node.op, node.parameters)

    def compare(column: str, op: str, parameter: int) -> str:
        if bound[parameter] is None:
            return "False"
        test = f"r.{column} {op} p{parameter}"
        if op not in ("==", "!=") and comparisons[column].nan_is_greatest:
            # A NaN first: a Decimal one cannot be compared at all.
            nan = f"r.{column} != r.{column}"
            test = f"({nan} or {test})" if op in (">", ">=") else f"(not {nan} and {test})"
        return joined("and", [*known(column), test])

    def row(columns: Sequence[str], op: str, parameters: Sequence[int]) -> str:
        if len(columns) == 1:
            return compare(columns[0], op, parameters[0])
        further = row(columns[1:], op, parameters[1:])
        return joined(
            "or",
            [
                compare(columns[0], op[0], parameters[0]),
                joined("and", [compare(columns[0], "==", parameters[0]), further]),
            ],
        )

    return source(node)
