"""A server in recovery lags behind: it would clear marks with old rows."""

import tempfile
from pathlib import Path

import pytest
from sqlalchemy import create_engine, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sa_tablecache import CachedView, ScoreIndex, TableCache, UnsuitableEngine
from tests.postgres import own_postgres


class Base(DeclarativeBase):
    """Models of these tests."""


class Row(Base):
    """A row."""

    __tablename__ = "standby_row"
    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[int]


class Rows(CachedView):
    """All of them."""

    __select__ = select(Row.id, Row.x)
    by_x = ScoreIndex("x")


@pytest.mark.slow
def test_a_server_in_recovery_is_not_read():
    """A standby is refused, also one that was a primary before; after a promotion it is read."""
    # The name of a socket may not be longer than a hundred characters.
    with (
        tempfile.TemporaryDirectory(prefix="sa_tablecache_") as directory,
        own_postgres(Path(directory)) as server,
    ):
        engine = create_engine(server.url, pool_pre_ping=True)
        Base.metadata.create_all(engine)
        with Session(engine) as session:
            session.add(Row(id=1, x=1))
            session.commit()
        with TableCache(engine, views=[Rows]) as cache:

            def read() -> tuple[str, list[int]]:
                with cache.sessionmaker()() as session:
                    found = [record.x for record in session.range(Rows.by_x)]
                    assert session.last_read is not None
                    return session.last_read.kind, found

            cache.load(Rows)
            assert read() == ("hit", [1])

            server.restart_as_standby()
            for _ in range(2):
                cache.invalidate(Row, 1)
                with pytest.raises(UnsuitableEngine, match="standby"):
                    cache.refresh(Rows)
                assert read() == ("bypass", [1])
            with pytest.raises(UnsuitableEngine, match="standby"):
                cache.estimate(Rows)
            assert cache.stats(Rows).pending_marks
            with (
                TableCache(engine, views=[Rows]) as other,
                pytest.raises(UnsuitableEngine, match="standby"),
            ):
                other.load(Rows)

            with engine.connect() as connection:
                assert connection.scalar(text("SELECT pg_promote()"))
            with engine.begin() as connection:
                connection.execute(update(Row).values(x=2))
            assert read() == ("hit", [2])
        engine.dispose()
