"""Which changelog a database can have, by the name of its dialect."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from sa_tablecache.exc import FeedUnavailable

from .contract import Changelog

_CHANGELOGS: Final = {
    "postgresql": ("postgresql", "PostgreSQLChangelog"),
    "sqlite": ("sqlite", "SQLiteChangelog"),
    "mysql": ("mysql", "MySQLChangelog"),
    "mariadb": ("mysql", "MySQLChangelog"),
}


def changelog_for(name: str) -> Changelog:
    """Return the changelog of a dialect; its module is imported by the first who asks.

    :param name: as in ``connection.dialect.name``.
    :raises FeedUnavailable: if there is none for that dialect.
    """
    if name not in _CHANGELOGS:
        raise FeedUnavailable(
            f"there is no change feed for {name}: declare exclusive_writer=True if this process "
            "alone writes the tables of its views, or call cache.invalidate() after what others "
            "wrote"
        )
    module, cls = _CHANGELOGS[name]
    changelog: Changelog = getattr(import_module(f".{module}", __package__), cls)()
    return changelog
