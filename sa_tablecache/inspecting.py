"""The command ``inspect``: what a cache knows of its views, and what it will send to the database.

In: a cache. Out: a description that is plain JSON, and the same as text to read. The database is
asked what :meth:`.TableCache.check` asks. Where it cannot be reached, what follows from the
declarations alone is told, and that it is no more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Final, cast

from sqlalchemy import Select, literal_column, select, tuple_
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import CompileError, SQLAlchemyError
from sqlalchemy.sql import ColumnElement

from .analysis import Leaf, TableName, ViewPlan, table_label
from .cache import BaseTableCache
from .commands import CACHE_HELP, Commands, NoCache, find_cache, with_cache
from .exc import Unbound, one_line
from .layout import Layout
from .policies import Policy
from .readers import EveryScope
from .table import CachedTable
from .view import CachedView

WIDTH: Final = 100


def add_command(commands: Commands) -> None:
    """Add ``inspect`` to the commands of ``python -m sa_tablecache``."""
    parser = commands.add_parser(
        "inspect",
        help="print views, their plans, SQL and problems",
        description="Print the views of a cache: keys, indexes, base tables and how changes of "
        "them are followed, the SQL of loads and refreshes, and what cache.check() complains "
        "about. Nothing is loaded.",
        epilog="The exit status is 0, or 1 if there are problems or the database cannot be asked, "
        "or 2 if there is no such cache.",
    )
    parser.add_argument("cache", metavar="MODULE:cache", help=CACHE_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""
    try:
        description = with_cache(find_cache(options.cache), describe)
    except NoCache as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    print(json.dumps(description, indent=2) if options.json else rendered(description))  # noqa: T201
    return 1 if description["problems"] or description["database"]["error"] else 0


# -- the description ------------------------------------------------------------------------------


def describe(cache: BaseTableCache) -> dict[str, Any]:
    """Return what there is to know of a cache, as plain JSON.

    It emits what setting up the views takes, some SELECTs of the catalog for each.
    """
    try:
        engine = cache.engine
    except Unbound:
        database = {"dialect": None, "url": None, "error": "the cache is not bound to an engine"}
        return {"database": database, "views": [], "problems": []}
    error: str | None = None
    problems = []
    try:
        problems = [{"view": p.view, "what": p.what} for p in cache.check()]
    except (SQLAlchemyError, OSError) as raised:  # asyncpg passes on what the socket says
        error = one_line(raised)
    return {
        "database": {
            "dialect": engine.dialect.name,
            "url": engine.url.render_as_string(hide_password=True),
            "error": error,
        },
        "views": [
            _view(cache.table(view), engine.dialect, cache._policies[view])
            | {"mode": cache.mode(view)}
            for view in cache.views
        ],
        "problems": problems,
    }


def _view(table: CachedTable, dialect: Dialect, policy: Policy) -> dict[str, Any]:
    plan, layout = table.plan, table.layout
    return {
        "name": plan.name,
        "module": plan.view.__module__,
        "key": list(plan.key),
        "columns": [column.name for column in plan.columns],
        "indexes": {
            index.name: [
                part if isinstance(part, str) else _sql(part, dialect)
                for part in index.declared.parts
            ]
            for index in plan.view.__indexes__.values()
        },
        "anchor": None if plan.anchor is None else table_label(plan.anchor.table),
        "grouped": plan.grouped,
        "scope": plan.view.__scope__,
        "policy": _arguments(policy, plan.view),
        "max_staleness": plan.view.__max_staleness__ and str(plan.view.__max_staleness__),
        "refresh": plan.view.__refresh__,
        "tables": [_table(plan, name, table.coarse) for name in _in_order(plan)],
        "sql": {
            "view": _sql(plan.statement, dialect),
            "load": _sql(_select(plan, layout), dialect),
            "refresh": {
                name: _sql(statement, dialect)
                for name, statement in _refreshes(plan, layout, table.coarse)
            },
        },
    }


def _arguments(policy: Policy, view: type[CachedView]) -> str:
    """Return a policy as it would be written: without what is so by default."""
    indexes = {id(index.declared): name for name, index in view.__indexes__.items()}
    said = [
        f"{field.name}={indexes.get(id(value)) or repr(value)}"
        for field in fields(cast("Any", policy))
        if (value := getattr(policy, field.name)) is not field.default
    ]
    return f"{type(policy).__name__}({', '.join(said)})"


def _in_order(plan: ViewPlan) -> list[TableName]:
    """Return the base tables, those of the FROM clause first."""
    known = [leaf.table for leaf in plan.leaves] + [path.table for path in plan.paths]
    return list(dict.fromkeys([*known, *sorted(plan.tables, key=str)]))


def _table(plan: ViewPlan, name: TableName, coarse: dict[TableName, str]) -> dict[str, Any]:
    leaves = [leaf for leaf in plan.leaves if leaf.table == name]
    lineage = [
        {
            "columns": list(leaf.visible or leaf.hidden),
            "hidden": leaf.visible is None,
            "optional": leaf.nullable,
        }
        for leaf in leaves
    ]
    return {
        "name": table_label(name),
        "anchor": any(leaf is plan.anchor for leaf in leaves),
        "lineage": lineage,
        "groups": [list(path.stored) for path in plan.paths if path.table == name],
        "coarse": coarse.get(name),
    }


def _select(plan: ViewPlan, layout: Layout | None, *criteria: ColumnElement[bool]) -> Select[Any]:
    if layout is not None:
        statement: Select[Any] = layout.loader.statement(*criteria)
        return statement
    # Which hidden columns are kept is for the database to say: at least the public ones.
    columns = [column.clause for column in plan.columns]
    return select(*columns).where(*criteria).options(EveryScope(plan.view))


def _refreshes(
    plan: ViewPlan, layout: Layout | None, coarse: dict[TableName, str]
) -> Iterator[tuple[str, Select[Any]]]:
    """Yield the statements that read what changed rows of tables touch, as deltas.py makes them."""

    def by(names: tuple[str, ...]) -> Select[Any]:
        columns = [plan.column(name).clause for name in names]
        left: Any = columns[0] if len(columns) == 1 else tuple_(*columns)
        return _select(plan, layout, left.op("IN")(literal_column("(...)")))

    for leaf in plan.leaves:
        if leaf.table not in coarse:
            yield _occurrence(plan, leaf), by(leaf.hidden)
    for path in plan.paths:
        if path.table not in coarse:
            yield f"{table_label(path.table)}, by {', '.join(path.stored)}", by(path.names)


def _occurrence(plan: ViewPlan, leaf: Leaf) -> str:
    """Return the name of a table, with the columns that tell it from its other occurrences."""
    several = sum(other.table == leaf.table for other in plan.leaves) > 1
    return f"{leaf}, by {', '.join(leaf.visible or leaf.hidden)}" if several else str(leaf)


def _sql(clause: Any, dialect: Dialect) -> str:
    """Return a clause as SQL, the constants of the view's select written out where that works."""
    try:
        return str(clause.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    except (CompileError, NotImplementedError):
        return str(clause.compile(dialect=dialect))


# -- as text --------------------------------------------------------------------------------------


def rendered(description: dict[str, Any]) -> str:
    """Return a description as text to read."""
    database = description["database"]
    lines = [f"database  {database['url'] or '-'}"]
    if database["error"]:
        lines += _wrapped(
            f"{'not reachable' if database['url'] else 'none'}: {database['error']}", 10
        )
        lines += _wrapped(
            "What only the database can tell is missing: which columns compare in Python, which "
            "tables can be followed by them, triggers, problems."
            if database["url"]
            else "Bind it, or name a function that makes a bound one: MODULE:FUNCTION().",
            10,
        )
    for view in description["views"]:
        lines += ["", *_view_lines(view)]
    lines.append("")
    if description["problems"]:
        lines.append("problems")
        for problem in description["problems"]:
            lines += _wrapped(f"{problem['view']}: {problem['what']}", 2, hang=4)
    elif not database["error"]:
        lines.append("no problems")
    return "\n".join(lines).rstrip()


def _view_lines(view: dict[str, Any]) -> Iterator[str]:
    def row(title: str, text: str) -> Iterator[str]:
        yield from _wrapped(text, 12, first=f"  {title:<10}")

    yield f"{view['name']}  ({view['module']})"
    yield from row("key", ", ".join(view["key"]))
    yield from row("columns", f"{len(view['columns'])}: {', '.join(view['columns'])}")
    if view["scope"]:
        yield from row("scope", view["scope"])
    if view["mode"] != "on":
        yield from row("mode", view["mode"])
    if view["policy"] != "Manual()":
        yield from row("policy", view["policy"])
    if view["max_staleness"] or view["refresh"] != "lazy":
        stale = view["max_staleness"] or "never"
        yield from row("refresh", f"{view['refresh']}; answers may be stale: {stale}")
    for at, (name, parts) in enumerate(view["indexes"].items()):
        yield from row("" if at else "indexes", f"{name} ({', '.join(parts)})")
    width = max(len(table["name"]) for table in view["tables"])
    for at, table in enumerate(view["tables"]):
        yield from _wrapped(
            _how(table),
            14 + width,
            first=f"  {'' if at else 'tables':<10}{table['name']:<{width}}  ",
        )
    sql = view["sql"]
    yield "  view"
    yield from (f"    {line}" for line in pretty(sql["view"]))
    yield "  load"
    yield from (f"    {line}" for line in pretty(_without_view(sql["load"], sql["view"])))
    for name, statement in sql["refresh"].items():
        yield f"  refresh after changes of {name}"
        yield f"    ... {statement[statement.rindex('WHERE ') :]}"


def _how(table: dict[str, Any]) -> str:
    """Return how changed rows of a table lead to records."""
    if table["coarse"]:
        return f"coarse: any change marks the whole view: {table['coarse']}"
    ways = [
        f"by {', '.join(way['columns'])}"
        + (" (hidden)" if way["hidden"] else "")
        + (" (may be missing)" if way["optional"] else "")
        for way in table["lineage"]
    ]
    ways += [f"by the groups of {', '.join(names)}" for names in table["groups"]]
    return "; ".join(ways) + (" (anchor)" if table["anchor"] else "")


def _wrapped(
    text: str, indent: int, *, first: str = "", hang: int | None = None, width: int = WIDTH
) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first or " " * indent,
        subsequent_indent=" " * (indent if hang is None else hang),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _without_view(statement: str, view: str) -> str:
    return statement.replace(f"({view})", "(the view)")


_CLAUSE: Final = re.compile(
    r"(?<!\bOUTER)\s+(?=(?:FROM|WHERE|GROUP BY|HAVING|ORDER BY|UNION|INTERSECT|EXCEPT"
    r"|(?:(?:LEFT|RIGHT|FULL) OUTER )?JOIN)\b)"
)


def pretty(sql: str) -> list[str]:
    """Return SQL in lines of a width to read, a clause or a joined table on each."""
    lines = []
    for clause in _CLAUSE.split(" ".join(sql.split())):
        lines += _wrapped(clause, 0, hang=2, width=WIDTH - 4)
    return lines
