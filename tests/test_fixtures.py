"""The servers that the other tests rely on are what they are said to be."""

import os

import pytest
from sqlalchemy import URL, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from tests.postgres import VARIABLE

WORDS = ["b", "B", "a", "é", "f", "A", "_"]
SORTED = text("SELECT word FROM unnest(CAST(:words AS text[])) AS word ORDER BY word")


def sort_on_server(url: URL) -> list[str]:
    """Return WORDS in the order of a database."""
    engine = create_engine(url)
    with engine.connect() as connection:
        words = list(connection.scalars(SORTED, {"words": WORDS}))
    engine.dispose()
    return words


def test_text_compares_by_bytes(postgres_url: URL) -> None:
    """The default database sorts text as Python does."""
    assert sort_on_server(postgres_url) == sorted(WORDS)


def test_text_compares_as_in_a_language(postgres_linguistic_url: URL) -> None:
    """The linguistic database sorts text without regard to case and accents first."""
    words = sort_on_server(postgres_linguistic_url)
    assert [word for word in words if word != "_"] == ["a", "A", "b", "B", "é", "f"]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_asynchronous_drivers_connect(postgres_url: URL, driver: str) -> None:
    """Both asynchronous drivers reach the same database by its URL."""
    engine = create_async_engine(postgres_url.set(drivername=f"postgresql+{driver}"))
    async with engine.connect() as connection:
        name = await connection.scalar(text("SELECT current_database()"))
    await engine.dispose()
    assert name == postgres_url.database


@pytest.mark.skipif(VARIABLE in os.environ, reason="the settings of another server are its own")
def test_prepared_transactions_are_allowed(postgres_url: URL) -> None:
    """Two-phase commits can be tested on the embedded server."""
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        assert int(connection.scalar(text("SHOW max_prepared_transactions"))) > 0
    engine.dispose()
