"""The entry point of the group ``alembic.plugins``.

Alembic imports it while it is being imported itself, so that nothing of Alembic is imported here
before :func:`setup` is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alembic.runtime.plugins import Plugin


def setup(plugin: Plugin) -> None:
    """Register the operations, and what autogenerate does where it is told to use this plugin."""
    from alembic.util import DispatchPriority

    # What defines them imports parts of Alembic that may be imported only in part by now.
    plugin.add_autogenerate_comparator(
        _before, "schema", "change_feed_tables", priority=DispatchPriority.FIRST
    )
    plugin.add_autogenerate_comparator(
        _compare, "schema", "change_feed", priority=DispatchPriority.LAST
    )
    from . import operations  # noqa: F401


def _before(*arguments: Any) -> Any:
    from .comparing import leave_out_own_tables

    return leave_out_own_tables(*arguments)


def _compare(*arguments: Any) -> Any:
    from .comparing import compare

    return compare(*arguments)
