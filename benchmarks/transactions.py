"""Transactions: what `in_transaction` costs beside a bare session, and how often it runs again.

The bare session does the same work at the same isolation level, as one would write it by hand. The
work is a small one, so that the ratio is about the worst that an application will see.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import URL, Engine, create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks.harness import Case, Result, compare
from sa_tablecache import in_transaction

GOAL = 1.05
WRITERS = 8


class Base(DeclarativeBase):
    """The tables of this benchmark."""


class Account(Base):
    """Somebody's money."""

    __tablename__ = "benchmark_accounts"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    balance: Mapped[int]


def run(url: URL, *, quick: bool) -> list[Result]:
    """Move money between accounts of PostgreSQL: alone, and with others."""
    # It warns of each pipeline that a conflict ends.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    engine = create_engine(url.set(drivername="postgresql+psycopg"), pool_size=WRITERS)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all(Account(id=n, balance=1_000) for n in range(100))
    goal = None if quick else GOAL
    results = compare("a transfer of money", _cases(engine, goal), rounds=5 if quick else 51)
    for accounts in (100, 10, 2):
        results.append(_contention(engine, accounts, 10 if quick else 100))
    engine.dispose()
    return results


def _transfer(session: Session, source: int, target: int) -> None:
    wanted = select(Account).where(Account.id.in_([source, target])).order_by(Account.id)
    first, second = session.scalars(wanted)
    first.balance -= 1
    second.balance += 1


def _cases(engine: Engine, goal: float | None) -> list[Case]:
    factory = sessionmaker(engine)

    def bare() -> None:
        with factory() as session:
            session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
            _transfer(session, 1, 2)
            session.commit()

    transfer = in_transaction(factory)(_transfer)
    return [
        Case("a bare session, SERIALIZABLE", bare),
        Case("in_transaction", lambda: transfer(1, 2), goal=goal),
    ]


def _contention(engine: Engine, accounts: int, turns: int) -> Result:
    retries: list[Any] = []
    transfer = in_transaction(
        sessionmaker(engine), tries=1_000, on_retry=lambda *told: retries.append(told)
    )(_transfer)

    def write(writer: int) -> None:
        for turn in range(turns):
            source = (writer * 7 + turn * 3) % accounts
            transfer(source, (source + 1 + turn % (accounts - 1)) % accounts)

    with ThreadPoolExecutor(WRITERS) as pool:
        writing: Callable[[int], Any] = write
        list(pool.map(writing, range(WRITERS)))
    return Result(
        benchmark=f"retries of {WRITERS} writers for 100 commits",
        case=f"between {accounts} accounts",
        value=100 * len(retries) / (WRITERS * turns),
        unit="retries",
    )
