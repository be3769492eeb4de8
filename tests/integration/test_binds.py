"""Which database a session reads: the cache answers for its own, and for no other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select, update
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import sessionmaker

from sa_tablecache import CachedView, CacheSession, ScoreIndex, TableCache
from tests.integration.checking import counting
from tests.integration.databases import Database
from tests.zoo import Airline, Plane


class Fleet(CachedView):
    """The view that two databases have."""

    __select__ = select(Plane.tailnum, Plane.model)
    by_tailnum = ScoreIndex("tailnum")


HERE, THERE = {"here"}, {"there"}


@pytest.fixture
def here(database: Database) -> Iterator[Engine]:
    """A database with one plane."""
    with database.lent_engine() as engine:
        with engine.begin() as connection:
            connection.execute(insert(Plane).values(tailnum="here"))
        yield engine


@pytest.fixture
def there(linguistic: Database) -> Iterator[Engine]:
    """Another database with another plane."""
    with linguistic.lent_engine() as engine:
        with engine.begin() as connection:
            connection.execute(insert(Plane).values(tailnum="there"))
        yield engine


@pytest.fixture
def cache(here: Engine) -> Iterator[TableCache]:
    """A cache of the first database."""
    with TableCache(here, views=[Fleet]) as cache:
        cache.load(Fleet)
        yield cache


def planes(session: Any) -> set[str]:
    """Return the planes that a session sees, read in all ways, which agree."""
    found = {record.tailnum for record in session.scalars(select(Fleet))}
    assert {record.tailnum for record in session.query(Fleet)} == found
    assert set(session.scalars(select(Fleet.tailnum))) == found
    if isinstance(session, CacheSession):
        assert {record.tailnum for record in session.range(Fleet.by_tailnum)} == found
        names = HERE | THERE | found
        assert {name for name in names if session.get(Fleet, name) is not None} == found
    return found


def kind(session: Any) -> str:
    """Return how the last read of a session was answered."""
    return str(session.last_read.kind)


# --- other databases ------------------------------------------------------------------------------


def test_a_session_bound_to_another_engine(cache: TableCache, there: Engine):
    """It reads its own database, by whatever bind it got there."""
    factory = cache.sessionmaker(bind=there)
    with factory() as session:
        assert planes(session) == THERE
        assert kind(session) == "bypass"
    with cache.sessionmaker()(bind=there) as session:
        assert planes(session) == THERE
    with there.connect() as connection, factory(bind=connection) as session:
        assert planes(session) == THERE
    plain = sessionmaker(there)
    cache.attach(plain)
    with plain() as session:
        assert planes(session) == THERE
    with cache.sessionmaker()() as session:
        assert planes(session) == HERE
        session.bind = there
        session.rollback()
        assert planes(session) == THERE


def test_another_engine_to_the_same_database(cache: TableCache, database: Database):
    """Whether that is the same nobody can tell: it is read from the database."""
    other = database.engine()
    with other.connect() as connection, cache.sessionmaker(bind=connection)() as session:
        assert planes(session) == HERE
        assert kind(session) == "bypass"
    other.dispose()


def test_the_bind_of_one_call(cache: TableCache, there: Engine):
    """`bind_arguments` of a call count."""
    with cache.sessionmaker()() as session:
        options = {"bind_arguments": {"bind": there}}
        assert {r.tailnum for r in session.scalars(select(Fleet), **options)} == THERE
        rows = session.execute(select(Fleet.tailnum), **options)
        assert set(rows.scalars()) == THERE
        assert planes(session) == HERE


def test_a_session_with_a_bind_for_each_mapper(cache: TableCache, there: Engine):
    """A view goes to the session's own bind, or to the cache's engine if it has none."""
    binds = {Plane: there, Airline: there}
    with cache.sessionmaker(binds=binds)() as session:
        assert planes(session) == HERE
        assert set(session.scalars(select(Plane.tailnum))) == THERE
    with cache.sessionmaker(bind=None, binds=binds)() as session:
        assert planes(session) == HERE
    with cache.sessionmaker(bind=there, binds={Plane: cache.engine})() as session:
        assert planes(session) == THERE


def test_a_bind_for_the_view_itself(cache: TableCache, there: Engine):
    """A session may bind the table of the view elsewhere, at once or later."""
    with cache.sessionmaker(binds={Fleet.__table__: there})() as session:
        assert planes(session) == THERE
    with cache.sessionmaker()() as session:
        session.bind_mapper(Plane, there)
        assert planes(session) == HERE
        session.bind_table(Fleet.__table__, there)
        assert planes(session) == THERE


class Routing(CacheSession):
    """A session that chooses its engine by what is asked."""

    other: Any = None

    def get_bind(self, mapper: Any = None, **kwargs: Any) -> Any:
        """Return the other engine for a certain plane, and for everything else the usual one."""
        clause = kwargs.get("clause")
        if clause is not None and "there" in clause.compile().params.values():
            return self.other
        return super().get_bind(mapper, **kwargs)


class Elsewhere(CacheSession):
    """A session that goes to another engine always."""

    other: Any = None

    def get_bind(self, *_: Any, **__: Any) -> Any:
        """Return the other engine."""
        return self.other


def test_a_class_of_sessions_that_chooses_its_engine(cache: TableCache, there: Engine):
    """`get_bind` is asked with the statement, as it would be if the statement ran."""
    with cache.sessionmaker(class_=Elsewhere)() as session:
        session.other = there
        assert planes(session) == THERE
    with cache.sessionmaker(class_=Routing)() as session:
        session.other = there
        for name, found in (("here", HERE), ("there", THERE)):
            statement = select(Fleet).where(Fleet.tailnum == name)
            assert {record.tailnum for record in session.scalars(statement)} == found
            assert session.get(Fleet, name).tailnum == name
            assert {r.tailnum for r in session.range(Fleet.by_tailnum, name)} == found
        assert {r.tailnum for r in session.scalars(select(Fleet))} == HERE
        assert kind(session) == "hit"


class ShardedCacheSession(ShardedSession, CacheSession):
    """A sharded session that the cache made."""


def sharded(base: Any, here: Engine, there: Engine) -> dict[str, Any]:
    """Return the arguments of sharded sessions over two databases."""
    return {
        "class_": base,
        "bind": None,
        "shards": {"here": here, "there": there},
        "shard_chooser": lambda *_, **__: "here",
        "identity_chooser": lambda *_, **__: ["here", "there"],
        "execute_chooser": lambda _: ["here", "there"],
    }


def test_sharded_sessions(cache: TableCache, here: Engine, there: Engine):
    """What is read from several databases is not answered from the cache of one."""
    plain = sessionmaker(**sharded(ShardedSession, here, there))
    cache.attach(plain)
    made = cache.sessionmaker(**sharded(ShardedCacheSession, here, there))
    for factory in (plain, made):
        with factory() as session:
            assert set(session.scalars(select(Plane.tailnum))) == HERE | THERE
            assert {row.tailnum for row in session.scalars(select(Fleet))} == HERE | THERE
            assert set(session.scalars(select(Fleet.tailnum))) == HERE | THERE


# --- two caches -----------------------------------------------------------------------------------


@contextmanager
def both(here: Engine, there: Engine, *, swapped: bool) -> Iterator[list[TableCache]]:
    """Lend a cache of each database, made in either order."""
    engines = [there, here] if swapped else [here, there]
    with TableCache(engines[0], views=[Fleet]) as one, TableCache(engines[1], views=[Fleet]) as two:
        one.load(Fleet)
        two.load(Fleet)
        yield [two, one] if swapped else [one, two]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_view_in_caches_of_two_databases(here: Engine, there: Engine, swapped: bool):
    """Each answers for its own database, and notices the commits to it alone."""
    with both(here, there, swapped=swapped) as (one, two):
        for cache, found in ((one, HERE), (two, THERE)):
            with cache.sessionmaker()() as session, counting() as statements:
                assert planes(session) <= found
                assert kind(session) in ("hit", "bypass", "miss")
            with cache.sessionmaker()() as session:
                session.add(Plane(tailnum=f"new {cache is one}"))
                session.commit()
            del statements
        with one.sessionmaker()() as session:
            assert planes(session) == {*HERE, "new True"}
        with two.sessionmaker()() as session:
            assert planes(session) == {*THERE, "new False"}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("attached_swapped", [False, True])
def test_sessions_attached_to_two_caches(
    here: Engine, there: Engine, swapped: bool, attached_swapped: bool
):
    """Whichever cache was attached first, a session reads the database that it is bound to."""
    with both(here, there, swapped=swapped) as caches:
        for engine, found in ((here, HERE), (there, THERE)):
            factory = sessionmaker(engine)
            for cache in reversed(caches) if attached_swapped else caches:
                cache.attach(factory)
            for _ in range(2):
                with factory() as session:
                    assert planes(session) == found
            with factory() as session:
                session.add(Plane(tailnum="new"))
                session.flush()
                assert planes(session) == {*found, "new"}
                session.rollback()
                assert planes(session) == found


def test_two_caches_of_one_engine(cache: TableCache, here: Engine):
    """Each notices what is committed through the sessions of the other."""
    with TableCache(here, views=[Fleet]) as other:
        other.load(Fleet)
        for number, writer in enumerate((cache, other)):
            with writer.sessionmaker()() as session:
                session.add(Plane(tailnum=f"new {number}"))
                session.commit()
            for reader in (cache, other):
                with reader.sessionmaker()() as session:
                    expected = {*HERE, *(f"new {n}" for n in range(number + 1))}
                    assert planes(session) == expected
                    assert kind(session) == "hit"


# --- one database -------------------------------------------------------------------------------


def test_option_engines_of_one_engine(cache: TableCache, here: Engine):
    """An option engine is the same database, unless its options say otherwise."""
    same = here.execution_options(logging_token="x")
    with cache.sessionmaker(bind=same)() as session:
        assert planes(session) == HERE
        assert kind(session) == "hit"
    for options in (
        {"isolation_level": "SERIALIZABLE"},
        {"schema_translate_map": {None: None, "other": "x"}},
    ):
        with cache.sessionmaker(bind=here.execution_options(**options))() as session:
            assert planes(session) == HERE
            assert kind(session) == "bypass"
    with TableCache(same, views=[Fleet]) as other, other.sessionmaker(bind=here)() as session:
        other.load(Fleet)
        assert planes(session) == HERE
        assert kind(session) == "hit"


def test_sessions_joined_to_an_outer_connection(cache: TableCache, here: Engine):
    """Several sessions of one connection see what it wrote, and nobody else does."""
    with here.connect() as connection:
        transaction = connection.begin()
        with cache.sessionmaker(bind=connection)() as one:
            one.add(Plane(tailnum="mine"))
            one.commit()
            with cache.sessionmaker(bind=connection)() as two:
                assert planes(two) == {*HERE, "mine"}
            # On SQLite, what is not committed locks readers out.
            if here.dialect.name != "sqlite":
                with cache.sessionmaker()() as other:
                    assert planes(other) == HERE
        transaction.rollback()
        with cache.sessionmaker(bind=connection)() as two:
            assert planes(two) == HERE


def test_pending_changes_that_are_not_flushed(cache: TableCache):
    """Without autoflush the database does not know them, and so nobody is told."""
    with cache.sessionmaker(autoflush=False)() as session:
        session.add(Plane(tailnum="pending"))
        session.get_one(Plane, "here").model = "changed"
        assert planes(session) == HERE
        assert session.get(Fleet, "here").model is None
        session.flush()
        assert planes(session) == {*HERE, "pending"}
        assert session.get(Fleet, "here").model == "changed"
        session.rollback()
        with session.no_autoflush:
            session.add(Plane(tailnum="pending"))
            assert planes(session) == HERE
    with cache.sessionmaker()() as session:
        with session.no_autoflush:
            session.add(Plane(tailnum="pending"))
            assert planes(session) == HERE
        assert planes(session) == {*HERE, "pending"}


def test_sessions_that_keep_their_objects(cache: TableCache):
    """Views follow a commit also where objects do not expire, and after a session began anew."""
    with cache.sessionmaker(expire_on_commit=False)() as session:
        plane = session.get_one(Plane, "here")
        with cache.sessionmaker().begin() as other:
            other.execute(update(Plane).values(model="changed"))
        session.rollback()
        assert session.get(Fleet, "here").model == "changed"
        plane.model = "mine"
        session.commit()
        assert (plane.model, session.get(Fleet, "here").model) == ("mine", "mine")


def test_what_nested_transactions_undo(cache: TableCache):
    """A rolled back savepoint takes its rows along, in the session and for others."""
    with cache.sessionmaker()() as session:
        session.add(Plane(tailnum="outer"))
        with session.begin_nested() as savepoint:
            session.add(Plane(tailnum="inner"))
            assert planes(session) == {*HERE, "outer", "inner"}
            savepoint.rollback()
        assert planes(session) == {*HERE, "outer"}
        session.commit()
        assert planes(session) == {*HERE, "outer"}
    with cache.sessionmaker()() as session:
        assert planes(session) == {*HERE, "outer"}
