"""The anomalies of the Hermitage catalogue: each cell of the table in docs/transactions.md.

Two or three transactions are stepped in one order, each in a thread of its own. A step that has to
wait for a lock of another transaction is seen waiting by the server before the next step begins; on
SQLite it does not wait, but is a conflict. The tables are those of the catalogue's idea, the steps
are ours: https://github.com/ept/hermitage.
"""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import sessionmaker

from sa_tablecache import Transaction, TransactionConflict, attempts
from tests.integration.accounts import balances, bank

PAGE = Path(__file__).parents[2] / "docs" / "transactions.md"
LOCKED = {
    "postgresql": "SELECT count(*) FROM pg_locks WHERE NOT granted",
    # Others may be using the server.
    "mysql": """
        SELECT count(*) FROM information_schema.innodb_trx
        JOIN information_schema.processlist ON id = trx_mysql_thread_id
        WHERE trx_state = 'LOCK WAIT' AND db = database()""",
}


class Actor:
    """One transaction, in a thread of its own; after a conflict it does nothing any more."""

    def __init__(self, engine: Engine, relaxed: bool) -> None:
        self.engine = engine
        self.relaxed = relaxed
        self.conflict = False
        self._thread = ThreadPoolExecutor(1)
        self._stack = ExitStack()
        self._txn: Transaction[Any]
        self._thread.submit(self._begin).result(20)

    def _begin(self) -> None:
        txn = Transaction(sessionmaker(self.engine), relaxed=self.relaxed)
        self._step(lambda: self._stack.enter_context(txn))
        self._txn = txn

    def _step(self, function: Callable[[], Any]) -> Any:
        if self.conflict:
            return None
        try:
            return function()
        except TransactionConflict:
            self.conflict = True
        except Exception as error:
            try:
                self._stack.__exit__(type(error), error, error.__traceback__)
            except TransactionConflict:
                self.conflict = True
                return None
            raise

    def _run(self, sql: str) -> Any:
        result = self._txn.session.execute(text(sql))
        return [tuple(row) for row in result] if result.returns_rows else result.rowcount

    def do(self, sql: str) -> Future[Any]:
        """Run a statement, and return when it is done or somebody has to wait for a lock.

        It results in its rows, or in how many it wrote; in ``None`` after a conflict.
        """
        step = self._thread.submit(self._step, lambda: self._run(sql))
        question = LOCKED.get(self.engine.dialect.name)
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            # InnoDB shows what it knew 0.1 s ago, and knows nothing new as long as it is asked.
            for _ in range(100):
                done, _ = wait([step], 0.15)
                if done or (question is not None and connection.scalar(text(question))):
                    break
        return step

    def commit(self) -> None:
        """Commit, when the last step is over."""
        self._thread.submit(self._step, self._stack.close).result(20)

    def abort(self) -> None:
        """Roll back, when the last step is over."""
        self._stack.callback(self._txn.abort)
        self.commit()

    def end(self) -> None:
        """Leave nothing behind."""
        self._thread.submit(self._stack.close)
        self._thread.shutdown()


class Stage:
    """A database with accounts 1 and 2, of 10 and 20, and transactions on it."""

    def __init__(self, engine: Engine, relaxed: bool) -> None:
        self.engine, self.relaxed = engine, relaxed
        self.actors: list[Actor] = []

    def begin(self) -> Actor:
        """Begin a transaction."""
        actor = Actor(self.engine, self.relaxed)
        self.actors.append(actor)
        return actor

    @property
    def all_committed(self) -> bool:
        """Whether there was no conflict."""
        return not any(actor.conflict for actor in self.actors)

    def end(self) -> None:
        """End all transactions."""
        for actor in self.actors:
            actor.end()


READ = "SELECT id, balance FROM txn_account ORDER BY id"


def read(number: int) -> str:
    return f"SELECT balance FROM txn_account WHERE id = {number}"


def write(number: int, balance: int) -> str:
    return f"UPDATE txn_account SET balance = {balance} WHERE id = {number}"


def insert(number: int, balance: int) -> str:
    return f"INSERT INTO txn_account (id, balance) VALUES ({number}, {balance})"


def where(condition: str) -> str:
    return f"SELECT id FROM txn_account WHERE {condition} ORDER BY id"


def results(steps: list[Future[Any]]) -> list[Any]:
    return [step.result(20) for step in steps]


# -- the anomalies: whether they happen --------------------------------------------------------


def g0(stage: Stage) -> bool:
    """Two transactions write both accounts, and each keeps one."""
    one, two = stage.begin(), stage.begin()
    one.do(write(1, 11))
    two.do(write(1, 12))
    one.do(write(2, 21))
    one.commit()
    two.do(write(2, 22))
    two.commit()
    return balances(stage.engine) not in ([11, 21], [12, 22])


def g1a(stage: Stage) -> bool:
    """A value that is rolled back was read."""
    one, two = stage.begin(), stage.begin()
    one.do(write(1, 101))
    seen = two.do(READ)
    one.abort()
    two.commit()
    return seen.result() not in (None, [(1, 10), (2, 20)])


def g1b(stage: Stage) -> bool:
    """A value that its transaction changed again was read."""
    one, two = stage.begin(), stage.begin()
    one.do(write(1, 101))
    seen = two.do(READ)
    one.do(write(1, 11))
    one.commit()
    two.commit()
    return (1, 101) in (seen.result() or ())


def g1c(stage: Stage) -> bool:
    """Two transactions read what the other one has written."""
    one, two = stage.begin(), stage.begin()
    one.do(write(1, 11))
    two.do(write(2, 22))
    seen = [one.do(read(2)), two.do(read(1))]
    one.commit()
    two.commit()
    return stage.all_committed and results(seen) == [[(22,)], [(11,)]]


def otv(stage: Stage) -> bool:
    """A reader sees one write of a transaction, and not the other, or not any more."""
    one, two, three = stage.begin(), stage.begin(), stage.begin()
    one.do(write(1, 11))
    one.do(write(2, 19))
    two.do(write(1, 12))
    one.commit()
    seen = [three.do(read(1))]
    two.do(write(2, 18))
    seen.append(three.do(read(2)))
    two.commit()
    seen += [three.do(read(1)), three.do(read(2))]
    three.commit()
    if three.conflict:
        return False
    first, second, first_again, second_again = (rows[0][0] for rows in results(seen))
    consistent = (first, second) in ((10, 20), (11, 19), (12, 18))
    return not consistent or (first_again, second_again) != (first, second)


def pmp(stage: Stage) -> bool:
    """The same condition finds a row that somebody has inserted meanwhile."""
    one, two = stage.begin(), stage.begin()
    before = one.do(where("balance = 30"))
    if two.do(insert(3, 30)).done():
        two.commit()
    after = one.do(where("balance % 3 = 0"))
    one.commit()
    two.commit()
    return stage.all_committed and before.result() == [] and after.result() != []


def pmp_write(stage: Stage) -> bool:
    """A DELETE finds a row to which its condition did not apply when it was read."""
    one, two = stage.begin(), stage.begin()
    before = one.do(where("balance = 20"))
    if two.do("UPDATE txn_account SET balance = balance + 10").done():
        two.commit()
    deleted = one.do("DELETE FROM txn_account WHERE balance = 20")
    after = one.do(where("balance = 20"))
    one.commit()
    two.commit()
    return stage.all_committed and results([before, deleted, after]) == [[(2,)], 1, [(2,)]]


def p4(stage: Stage) -> bool:
    """Two read a balance, and the second one writes over what the first one has made of it."""
    one, two = stage.begin(), stage.begin()
    seen = [one.do(read(1)), two.do(read(1))]
    one.do(write(1, 11))
    two.do(write(1, 12))
    one.commit()
    two.commit()
    return stage.all_committed and results(seen) == [[(10,)]] * 2


def g_single(stage: Stage) -> bool:
    """One row is read before a transaction that changed both, and the other one after it."""
    one, two = stage.begin(), stage.begin()
    first = one.do(read(1))
    if two.do(write(1, 12)).done():
        two.do(write(2, 18))
        two.commit()
    second = one.do(read(2))
    one.commit()
    two.commit()
    return not one.conflict and results([first, second]) == [[(10,)], [(18,)]]


def g_single_write(stage: Stage) -> bool:
    """A DELETE sees what another transaction wrote, of which the read before saw nothing."""
    one, two = stage.begin(), stage.begin()
    first = one.do(read(1))
    if two.do(write(1, 12)).done():
        two.do(write(2, 18))
        two.commit()
    deleted = one.do("DELETE FROM txn_account WHERE balance = 20")
    one.commit()
    two.commit()
    return stage.all_committed and results([first, deleted]) == [[(10,)], 0]


def g2_item(stage: Stage) -> bool:
    """Two read both accounts, and each writes another one."""
    one, two = stage.begin(), stage.begin()
    seen = [one.do(READ), two.do(READ)]
    one.do(write(1, 11))
    two.do(write(2, 21))
    one.commit()
    two.commit()
    return stage.all_committed and results(seen) == [[(1, 10), (2, 20)]] * 2


def g2(stage: Stage) -> bool:
    """Two look for a row, and each inserts what the other one has looked for."""
    one, two = stage.begin(), stage.begin()
    seen = [one.do(where("balance % 3 = 0")), two.do(where("balance % 3 = 0"))]
    one.do(insert(3, 30))
    two.do(insert(4, 42))
    one.commit()
    two.commit()
    return stage.all_committed and results(seen) == [[], []]


ANOMALIES: dict[str, Callable[[Stage], bool]] = {
    "G0": g0, "G1a": g1a, "G1b": g1b, "G1c": g1c, "OTV": otv, "PMP": pmp, "PMP-write": pmp_write,
    "P4": p4, "G-single": g_single, "G-single-write": g_single_write, "G2-item": g2_item, "G2": g2,
}  # fmt: skip


def cells() -> Iterator[Any]:
    """Yield each cell of the table in the manual."""
    rows = re.findall(r"^\| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    table = [row.split(" | ") for row in rows]
    start = next(n for n, row in enumerate(table) if row[0] == "anomaly")
    _, *columns = table[start]
    for row in table[start + 1 :]:
        if row[0].startswith("---"):
            continue
        name = row[0].partition(":")[0]
        for column, cell in zip(columns, row[1:], strict=True):
            database, _, relaxed = column.partition(", ")
            assert cell in ("prevented", "**possible**")
            yield pytest.param(
                name, database, bool(relaxed), cell == "**possible**", id=f"{name}-{column}"
            )


def test_the_table_is_complete():
    """It has each anomaly on each database, at both levels."""
    found = [param.values[:3] for param in cells()]
    expected = [
        (name, database, relaxed)
        for name in ANOMALIES
        for database in ("PostgreSQL", "MariaDB", "SQLite")
        for relaxed in (False, True)
    ]
    assert found == expected


@pytest.fixture(scope="module")
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Engine]]:
    """Engines of the three databases, made when they are asked for."""
    made: dict[str, Engine] = {}
    with ExitStack() as stack:

        def engine(database: str) -> Engine:
            if database not in made:
                if database == "SQLite":
                    path = tmp_path_factory.mktemp("anomalies") / "test.sqlite"
                    url: Any = f"sqlite:///{path}"
                else:
                    server = request.getfixturevalue(
                        {"PostgreSQL": "postgres", "MariaDB": "mariadb"}[database]
                    )
                    url = stack.enter_context(server.database())
                made[database] = stack.enter_context(bank(url, [10, 20], busy=0))
            return made[database]

        yield engine


def fill(engine: Engine) -> None:
    """Have accounts 1 and 2, of 10 and 20."""
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM txn_account"))
        connection.execute(text(insert(1, 10)))
        connection.execute(text(insert(2, 20)))


@pytest.mark.parametrize(("name", "kind", "relaxed", "possible"), list(cells()))
def test_an_anomaly(
    engines: Callable[[str], Engine], name: str, kind: str, relaxed: bool, possible: bool
):
    """It is possible, or not, as the manual says."""
    engine = engines(kind)
    fill(engine)
    stage = Stage(engine, relaxed)
    try:
        assert ANOMALIES[name](stage) is possible
    finally:
        stage.end()


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("G1a", "READ UNCOMMITTED"),
        ("G1b", "READ UNCOMMITTED"),
        ("G1c", "READ UNCOMMITTED"),
        ("OTV", "READ COMMITTED"),
        ("PMP", "READ COMMITTED"),
        ("G-single", "READ COMMITTED"),
    ],
)
def test_the_steps_would_show_an_anomaly(
    engines: Callable[[str], Engine], name: str, level: str, monkeypatch: pytest.MonkeyPatch
):
    """What no cell calls possible is what the same steps lead to at a lower level.

    G0 is possible at none.
    """
    engine = engines("MariaDB")
    monkeypatch.setitem(attempts._LEVELS, "mysql", (level, level))
    fill(engine)
    stage = Stage(engine, relaxed=True)
    try:
        assert ANOMALIES[name](stage)
    finally:
        stage.end()
