"""The command ``feed``: installs the change feed for a cache, tells its state, removes it.

In: a cache, named on a command line. Out: triggers in its database, by the same SQL that
:meth:`.TableCache.install_feed` and migrations run; or that SQL, to be read and run by others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Final

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from .analysis import plan_of, table_label
from .cache import BaseTableCache
from .commands import CACHE_HELP, Commands, NoCache, find_cache, with_cache
from .exc import TableCacheError, one_line
from .feed.contract import Changelog, Installation, Watch
from .feed.dialects import changelog_for
from .feed.installing import Outstanding, install, outstanding, script, uninstall

_EPILOG: Final = (
    "The exit status is 0, or 1 if that failed or the database cannot be asked, or 2 if there is "
    "no such cache."
)


def add_command(commands: Commands) -> None:
    """Add ``feed`` to the commands of ``python -m sa_tablecache``."""
    parser = commands.add_parser(
        "feed",
        help="install, look at, or remove the change feed of a database",
        description="What has to be in the database so that a cache sees what others write: a "
        "changelog, and triggers on the tables that its views read. Migrations with Alembic do "
        "the same.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, action, what, epilog in (
        ("install", _install, "install it, and watch all tables that the views read", _EPILOG),
        (
            "status",
            _status,
            "tell what is installed, and which tables are watched",
            _EPILOG.replace("failed", "is not all that the views need"),
        ),
        ("uninstall", _uninstall, "remove it with all triggers, for all who use it", _EPILOG),
    ):
        command = actions.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=epilog
        )
        command.add_argument("cache", metavar="MODULE:cache", help=CACHE_HELP)
        if name != "status":
            command.add_argument(
                "--sql", action="store_true", help="print the SQL instead of running it"
            )
        command.set_defaults(run=run, action=action, sql=False)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit status."""

    def work(cache: BaseTableCache) -> int:
        changelog = changelog_for(cache.engine.dialect.name)
        with cache._bound.connect() as connection, connection.begin():
            return int(options.action(cache, changelog, connection, sql=options.sql))

    try:
        return with_cache(find_cache(options.cache), work)
    except NoCache as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except (TableCacheError, SQLAlchemyError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)  # noqa: T201
        return 1


def _install(
    cache: BaseTableCache, changelog: Changelog, connection: Connection, *, sql: bool
) -> int:
    plans = [plan_of(view) for view in cache.views]
    if sql:
        todo = outstanding(connection, changelog, plans)
        statements = [*changelog.create()]
        for watch in todo.watches:
            statements += changelog.watch(watch)
        print(script(statements, connection.dialect.name))  # noqa: T201
        for name, why in todo.refused.items():
            print(f"{table_label(name)} is not watched: {why}", file=sys.stderr)  # noqa: T201
        return 1 if todo.refused else 0
    _say(f"watched now: {_described(watch)}" for watch in install(connection, changelog, plans))
    return _status(cache, changelog, connection, sql=sql)


def _uninstall(
    cache: BaseTableCache, changelog: Changelog, connection: Connection, *, sql: bool
) -> int:
    if sql:
        statements = changelog.drop(changelog.installed(connection).watched)
        print(script(statements, connection.dialect.name))  # noqa: T201
        return 0
    uninstall(connection, changelog)
    _say(["the change feed is removed"])
    return 0


def _status(
    cache: BaseTableCache, changelog: Changelog, connection: Connection, *, sql: bool
) -> int:
    todo = outstanding(connection, changelog, [plan_of(view) for view in cache.views])
    have = changelog.installed(connection)
    _say([connection.engine.url.render_as_string(hide_password=True)])
    _say(_state(have, todo))
    untrusted = have.outdated or have.hindered
    return 1 if have.version is None or untrusted or todo.watches or todo.refused else 0


def _state(have: Installation, todo: Outstanding) -> Iterator[str]:
    """Say what of a change feed there is, a line for each table."""
    if have.version is None:
        yield "no change feed is installed"
    else:
        yield f"change feed, version {have.version}"
    wanted = {watch.relation: watch for watch in todo.watches}
    for relation, watch in sorted(have.watched.items()):
        why = have.outdated.get(relation, have.hindered.get(relation))
        if why is not None:
            yield f"  not trusted  {relation}: {why}"
        elif relation in wanted:
            yield f"  otherwise    {_described(watch)}; needed: {_described(wanted[relation])}"
        else:
            yield f"  watched      {_described(watch)}"
    for relation, watch in sorted(wanted.items()):
        if relation not in have.watched:
            yield f"  not watched  {_described(watch)}"
    for name, why in todo.refused.items():
        yield f"  not watched  {table_label(name)}: {why}"


def _described(watch: Watch) -> str:
    """Return a watched table and what is logged of it."""
    key = f" by {', '.join(watch.key)}" if watch.key else ", any row"
    ranges = f", ranges of {', '.join(watch.ranges)}" if watch.ranges else ""
    return f"{watch.relation}{key}{ranges}"


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201
