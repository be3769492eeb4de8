"""The pytest plugin of sa_tablecache: fixtures for applications that test themselves with a cache.

Every run of pytest loads this module where the package is installed. So it stands outside of the
package, which imports SQLAlchemy, and imports it when a fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def bind_cache() -> Iterator[Callable[[Any, Any], None]]:
    """Bind a cache to the connection of a test: ``bind_cache(cache, connection)``.

    See ``sa_tablecache.testing.bound``. A fixture that opens a connection asks for this one first,
    whether it is synchronous or not.
    """
    from contextlib import ExitStack

    from sa_tablecache.testing import bound

    with ExitStack() as stack:
        yield lambda cache, connection: stack.enter_context(bound(cache, connection))
