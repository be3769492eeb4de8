"""Alembic: operations that install the change feed, and what autogenerate finds to be lacking."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from alembic.runtime.plugins import Plugin
from alembic.util import CommandError, PriorityDispatchResult
from sqlalchemy import (
    URL,
    Column,
    Date,
    DateTime,
    Engine,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    func,
    inspect,
    select,
    text,
)
from sqlalchemy.pool import NullPool

from sa_tablecache import CachedView, ChangeFeed, ScoreIndex, TableCache
from sa_tablecache.feed.contract import VERSION, Installation, Relation
from sa_tablecache.feed.dialects import changelog_for
from tests.integration.alembic_project import Project, project, run_script
from tests.mariadb import Mariadb

every_database = pytest.mark.every_database
on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what is the same code on each database."""


def shop(schema: str | None = None, customers: str = "customers", day: str = "day") -> Any:
    """Return new tables, and a view of two of them."""
    metadata = MetaData(schema=schema)
    who = Table(
        customers,
        metadata,
        Column("id", Integer, primary_key=True),
        Column("name", String(40), nullable=False),
    )
    orders = Table(
        "orders",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("customer_id", ForeignKey(who.c.id, name="of_customer")),
        Column(day, Date, nullable=False, index=True),
    )
    Table("notes", metadata, Column("id", Integer, primary_key=True), Column("body", String(40)))

    class Orders(CachedView):
        __select__ = select(orders.c.id, orders.c[day].label("day"), who.c.name).join(
            who, orders.c.customer_id == who.c.id
        )
        by_day = ScoreIndex("day")

    return SimpleNamespace(metadata=metadata, customers=who, orders=orders, view=Orders)


def installed(engine: Engine) -> Installation:
    """Return what a database has of the feed."""
    with engine.connect() as connection:
        return changelog_for(engine.dialect.name).installed(connection)


def watched(engine: Engine) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the tables that are watched, with keys and ranges; nothing may be outdated."""
    found = installed(engine)
    assert not found.outdated
    return {relation.name: (w.key, w.ranges) for relation, w in found.watched.items()}


def execute(engine: Engine, *statements: str) -> None:
    """Run statements, as somebody who knows nothing of caches."""
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def drop_a_trigger(engine: Engine, table: str) -> None:
    """Drop one trigger of a table that is watched."""
    catalog = {
        "sqlite": "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = :name",
        "postgresql": "SELECT tgname FROM pg_trigger WHERE tgrelid = cast(:name AS regclass)"
        " AND NOT tgisinternal",
        "mysql": "SELECT trigger_name FROM information_schema.triggers"
        " WHERE event_object_table = :name AND event_object_schema = database()",
    }
    with engine.begin() as connection:
        names = connection.scalars(text(catalog[engine.dialect.name]), {"name": table}).all()
        ours = min(name for name in names if name.startswith("sa_tablecache_"))
        on = f" ON {table}" if engine.dialect.name == "postgresql" else ""
        quoted = connection.dialect.identifier_preparer.quote(ours)
        connection.exec_driver_sql(f"DROP TRIGGER {quoted}{on}")


@pytest.fixture
def new_project(tmp_path: Path, database_url: URL) -> Iterator[Callable[..., Project]]:
    """A function that makes projects, on the database of the test unless another is given."""
    made: list[Project] = []

    def make(metadata: Any, url: URL = database_url, **options: Any) -> Project:
        options = {"sa_tablecache_indexes": False, **options}
        made.append(Project(tmp_path / f"project{len(made)}", url, metadata, options))
        return made[-1]

    yield make
    for each in made:
        each.engine.dispose()


@pytest.fixture
def plain(new_project: Callable[..., Project]) -> tuple[Project, Any]:
    """A project whose tables exist, and that has no migration yet."""
    models = shop()
    made = new_project(models.metadata)
    models.metadata.create_all(made.engine)
    return made, models


ORDERS_AND_CUSTOMERS = {"customers": (("id",), ()), "orders": (("id",), ("day",))}


def without_cascades(body: str) -> str:
    """Return operations as they are rendered where foreign keys fire triggers."""
    return body.replace(", cascades=[]", "")


# -- upgrade, downgrade ----------------------------------------------------------------------------


@every_database
def test_autogenerate_watches_the_tables_of_views(plain: tuple[Project, Any]) -> None:
    """A first migration installs the changelog and watches what views read; then all agree."""
    made, _ = plain
    body = without_cascades(made.migrate())
    assert body.splitlines() == [
        "op.create_change_feed()",
        "op.watch_table('customers', key=['id'])",
        "op.watch_table('orders', key=['id'], ranges=['day'])",
        "def downgrade():",
        "op.unwatch_table('orders')",
        "op.unwatch_table('customers')",
        "op.drop_change_feed()",
    ]
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS
    made.downgrade("base")
    assert installed(made.engine) == Installation(None)
    made.upgrade()
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS
    made.check()


@every_database
def test_tables_and_their_watch_can_come_in_one_migration(
    new_project: Callable[..., Project],
) -> None:
    """A table that a migration creates is watched by the same migration."""
    models = shop()
    made = new_project(models.metadata)
    body = made.migrate()
    assert body.index("op.create_table('orders'") < body.index("op.watch_table('orders'")
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS
    made.downgrade("base")
    assert installed(made.engine) == Installation(None)
    assert not inspect(made.engine).has_table("orders")


@on_sqlite
def test_a_project_without_views_is_left_alone(new_project: Callable[..., Project]) -> None:
    """Where no view is declared and no changelog installed, nothing is proposed."""
    metadata = MetaData()
    Table("orders", metadata, Column("id", Integer, primary_key=True))
    made = new_project(metadata)
    assert "feed" not in made.migrate()
    assert installed(made.engine) == Installation(None)


def test_the_changelog_is_not_proposed_for_dropping(
    new_project: Callable[..., Project],
) -> None:
    """Its own tables are in no metadata, and stay, whoever looks and at which schemas."""
    models = shop()
    new_project(models.metadata, include_schemas=True).migrate()
    others = MetaData()
    made = new_project(
        others,
        version_table="others_version",
        include_schemas=True,
        include_name=lambda name, kind, _: kind != "schema" or name in (None, "sa_tablecache"),
    )
    body = made.autogenerate()
    assert "op.drop_table('orders')" in body
    assert "sa_tablecache" not in body


# -- what differs ----------------------------------------------------------------------------------


@on_sqlite
def test_a_new_index_of_a_view_adds_a_range(plain: tuple[Project, Any]) -> None:
    """A table is watched with further ranges; downgrading restores those that it had."""
    made, models = plain
    made.migrate()

    class ByCustomer(CachedView):
        __select__ = select(models.orders.c.id, models.orders.c.customer_id)
        by_customer = ScoreIndex("customer_id")

    body = without_cascades(made.migrate())
    assert body.splitlines() == [
        "op.watch_table('orders', key=['id'], ranges=['day', 'customer_id'])",
        "def downgrade():",
        "op.watch_table('orders', key=['id'], ranges=['day'])",
    ]
    assert watched(made.engine)["orders"] == (("id",), ("day", "customer_id"))
    made.downgrade("-1")
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS
    del ByCustomer


@every_database
def test_a_lost_trigger_is_noticed_and_repaired(plain: tuple[Project, Any]) -> None:
    """A table whose trigger was dropped is watched again, and stays so when downgraded."""
    made, _ = plain
    made.migrate()
    drop_a_trigger(made.engine, "orders")
    with pytest.raises(CommandError, match="orders"):
        made.check()
    body = without_cascades(made.migrate())
    watch = "op.watch_table('orders', key=['id'], ranges=['day'])"
    assert body.splitlines() == [watch, "def downgrade():", watch]
    made.downgrade("-1")
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS


@on_sqlite
def test_what_older_workers_need_is_kept(
    plain: tuple[Project, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A table that no view needs any more is told of, repaired, and unwatched only if asked."""
    made, models = plain
    made.migrate()

    class Names(CachedView):
        __select__ = select(models.customers.c.id, models.customers.c.name)

    made.options["sa_tablecache_views"] = [Names]
    with caplog.at_level(logging.INFO, "sa_tablecache"):
        made.check()
    assert "orders is watched, and no view needs it any more" in caplog.text
    drop_a_trigger(made.engine, "orders")
    assert "op.watch_table('orders'" in made.migrate()
    made.options["sa_tablecache_cleanup"] = True
    body = without_cascades(made.migrate())
    assert body.splitlines() == [
        "op.unwatch_table('orders')",
        "def downgrade():",
        "op.watch_table('orders', key=['id'], ranges=['day'])",
    ]
    assert watched(made.engine) == {"customers": (("id",), ())}
    made.downgrade("-1")
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS


@every_database
def test_a_deploy_from_the_view_of_a_worker(plain: tuple[Project, Any]) -> None:
    """A worker is served from memory before and after a migration of the next release, and right.

    When its tables are taken from it, the database answers.
    """
    made, models = plain
    made.migrate()
    add = "INSERT INTO {} VALUES ({})"
    first = "'2024-01-01'"
    execute(made.engine, add.format("customers", "1, 'a'"), add.format("orders", f"1, 1, {first}"))

    class OfTheNextRelease(CachedView):
        __select__ = select(models.orders.c.id, models.orders.c.customer_id)
        by_customer = ScoreIndex("customer_id")

    engine = create_engine(made.url)
    feed = ChangeFeed(max_lag=timedelta(hours=1))
    with TableCache(engine, views=[models.view], feed=feed) as cache:
        cache.load(models.view)
        Session = cache.sessionmaker()

        def names() -> tuple[str, list[str]]:
            cache.barrier()
            cache.refresh(models.view)
            with Session() as session:
                found = [record.name for record in session.scalars(select(models.view))]
                return session.last_read.kind, found

        assert names() == ("hit", ["a"])
        assert "op.watch_table('orders'" in made.migrate()
        execute(made.engine, "UPDATE customers SET name = 'b'")
        assert names() == ("hit", ["b"])
        made.revision("op.unwatch_table('customers')")
        made.upgrade()
        execute(made.engine, "UPDATE customers SET name = 'c'")
        assert names() == ("bypass", ["c"])
    engine.dispose()
    del OfTheNextRelease


@every_database
def test_a_table_that_is_dropped_is_unwatched_before(plain: tuple[Project, Any]) -> None:
    """Nothing of the watch of a table outlives it, and a downgrade brings back both."""
    made, models = plain
    made.migrate()
    made.metadata = MetaData()
    models.customers.to_metadata(made.metadata)
    Table("notes", made.metadata, *(c._copy() for c in models.metadata.tables["notes"].columns))

    body = made.migrate()
    assert body.index("op.unwatch_table('orders')") < body.index("op.drop_table('orders')")
    assert watched(made.engine) == {"customers": (("id",), ())}
    made.downgrade("-1")
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS


@every_database
def test_a_table_that_is_gone_is_forgotten(plain: tuple[Project, Any]) -> None:
    """A table that was dropped by other means is unwatched by name."""
    made, models = plain
    made.migrate()
    execute(made.engine, "DROP TABLE orders")
    made.metadata = MetaData()
    models.customers.to_metadata(made.metadata)
    Table("notes", made.metadata, *(c._copy() for c in models.metadata.tables["notes"].columns))
    body = made.autogenerate()
    if len(installed(made.engine).watched) > 1:  # the registry of some goes with the table
        assert "op.unwatch_table('orders')" in body
    made.upgrade()
    assert watched(made.engine) == {"customers": (("id",), ())}
    made.check()


@every_database
def test_a_column_that_triggers_use_can_be_dropped(plain: tuple[Project, Any]) -> None:
    """The watch is taken off before, and comes back without the column."""
    made, models = plain
    made.options["render_as_batch"] = True
    made.migrate()
    later = MetaData()
    who = models.customers.to_metadata(later)
    orders = Table(
        "orders",
        later,
        Column("id", Integer, primary_key=True),
        Column("customer_id", ForeignKey(who.c.id, name="of_customer")),
    )
    Table("notes", later, *(c._copy() for c in models.metadata.tables["notes"].columns))

    class Later(CachedView):
        __select__ = select(orders.c.id, who.c.name).join(who, orders.c.customer_id == who.c.id)

    made.metadata = later
    body = made.migrate()
    assert body.index("op.unwatch_table('orders')") < body.index("drop_column('day')")
    assert body.index("drop_column('day')") < body.index("op.watch_table('orders', key=['id']")
    execute(
        made.engine,
        "INSERT INTO customers (id, name) VALUES (1, 'a')",
        "INSERT INTO orders (id, customer_id) VALUES (1, 1)",
        "DELETE FROM orders",
    )
    made.downgrade("-1")
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS
    del Later


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_partition_that_came_later_is_watched(new_project: Callable[..., Project]) -> None:
    """A partition that has no triggers yet is noticed, and gets them."""
    metadata = MetaData()
    orders = Table(
        "orders",
        metadata,
        Column("id", Integer, primary_key=True),
        postgresql_partition_by="RANGE (id)",
    )

    class Orders(CachedView):
        __select__ = select(orders.c.id)

    made = new_project(metadata, include_name=lambda name, *_: name != "orders_1")
    metadata.create_all(made.engine)
    made.migrate()
    execute(made.engine, "CREATE TABLE orders_1 PARTITION OF orders FOR VALUES FROM (1) TO (9)")
    with pytest.raises(CommandError, match="watch_table"):
        made.check()
    made.migrate()
    assert watched(made.engine) == {"orders": (("id",), ())}
    del Orders


@on_sqlite
def test_a_table_with_two_names_is_watched_once(new_project: Callable[..., Project]) -> None:
    """A table that models call with its schema and without is watched as both need it."""
    models, others = shop(), shop("main")

    class ByCustomer(CachedView):
        __select__ = select(others.orders.c.id, others.orders.c.customer_id)
        by_customer = ScoreIndex("customer_id")

    made = new_project(models.metadata, sa_tablecache_views=[models.view, ByCustomer])
    models.metadata.create_all(made.engine)
    body = made.migrate()
    assert "op.watch_table('orders', key=['id'], ranges=['day', 'customer_id'])" in body
    assert watched(made.engine)["orders"] == (("id",), ("day", "customer_id"))


@on_sqlite
def test_views_of_the_database_cannot_be_watched(
    new_project: Callable[..., Project], caplog: pytest.LogCaptureFixture
) -> None:
    """A model of a view of the database is told of, and gets no triggers."""
    models = shop()
    made = new_project(models.metadata)
    models.metadata.create_all(made.engine)
    execute(made.engine, "CREATE VIEW recent AS SELECT id FROM orders")
    recent = Table("recent", MetaData(), Column("id", Integer, primary_key=True))

    class Recent(CachedView):
        __select__ = select(recent.c.id).join(
            models.customers, models.customers.c.id == recent.c.id
        )

    with caplog.at_level(logging.WARNING, "sa_tablecache"):
        made.migrate()
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS
    assert "recent is read by views, and is no table of the database" in caplog.text
    del Recent


@every_database
def test_what_triggers_rely_on_can_be_altered(plain: tuple[Project, Any]) -> None:
    """A column of another type, a foreign key or a unique index: one migration does it all."""
    made, models = plain
    made.options["render_as_batch"] = True
    made.migrate()
    later = MetaData()
    Table("regions", later, Column("id", Integer, primary_key=True))
    who = models.customers.to_metadata(later)
    who.append_column(
        Column("region_id", ForeignKey("regions.id", ondelete="CASCADE", name="of_region"))
    )
    orders = Table(
        "orders",
        later,
        Column("id", Integer, primary_key=True),
        Column("customer_id", ForeignKey(who.c.id, ondelete="CASCADE", name="of_customer")),
        Column("day", DateTime, nullable=False, index=True),
        Index("one_a_day", "day", "customer_id", unique=True),
    )
    Table("notes", later, *(c._copy() for c in models.metadata.tables["notes"].columns))

    class Later(CachedView):
        __select__ = select(orders.c.id, orders.c.day, who.c.name).join(
            who, orders.c.customer_id == who.c.id
        )
        by_day = ScoreIndex("day")

    made.metadata = later
    upgrade, _, downgrade = made.autogenerate().partition("def downgrade():")
    for part in (upgrade, downgrade):
        assert part.index("op.unwatch_table('orders')") < part.index("'day'")
        assert part.index("op.watch_table('orders'") > part.index("batch_alter_table('orders'")
    made.upgrade()
    made.check()
    made.downgrade("-1")
    assert watched(made.engine) == ORDERS_AND_CUSTOMERS
    del Later


# -- SQLite: batch operations ----------------------------------------------------------------------


def test_a_batch_operation_by_hand_is_repaired(tmp_path: Path, sqlite_url: URL) -> None:
    """A table that is recreated loses its triggers; the next autogenerate watches it again."""
    models = shop()
    options = {"sa_tablecache_indexes": False}
    with project(tmp_path / "p", sqlite_url, models.metadata, **options) as made:
        models.metadata.create_all(made.engine)
        made.migrate()
        made.revision(
            "with op.batch_alter_table('orders', recreate='always') as batch:\n"
            "        batch.alter_column('customer_id', nullable=True)"
        )
        made.upgrade()
        assert Relation("main", "orders") in installed(made.engine).outdated
        assert "op.watch_table('orders', key=['id'], ranges=['day'])" in made.migrate()
        assert watched(made.engine) == ORDERS_AND_CUSTOMERS


def test_an_autogenerated_batch_operation_keeps_the_watch(tmp_path: Path, sqlite_url: URL) -> None:
    """With render_as_batch the watch is taken off before and put on after, both ways."""
    models = shop()
    options = {"sa_tablecache_indexes": False}
    with project(
        tmp_path / "p", sqlite_url, models.metadata, **options, render_as_batch=True
    ) as made:
        models.metadata.create_all(made.engine)
        made.migrate()
        models.orders.c.customer_id.nullable = False
        body = made.migrate()
        upgrade, _, downgrade = body.partition("def downgrade():")
        for part in (upgrade, downgrade):
            assert part.index("op.unwatch_table('orders')") < part.index("op.batch_alter_table")
            assert part.index("op.batch_alter_table") < part.index("op.watch_table('orders'")
        made.downgrade("-1")
        assert watched(made.engine) == ORDERS_AND_CUSTOMERS


# -- SQLite: what REPLACE deletes ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["asked", "rendered", "by hand"])
def test_a_view_that_groups_follows_replaced_rows(
    tmp_path: Path, sqlite_url: URL, how: str
) -> None:
    """What REPLACE deletes has to be logged with the columns that lead to its group, too."""
    metadata = MetaData()
    sales = Table(
        "sales",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("number", Integer, unique=True),
        Column("shop", Integer, nullable=False),
        Column("amount", Integer, nullable=False),
    )

    class Totals(CachedView):
        __select__ = select(sales.c.shop, func.sum(sales.c.amount).label("total")).group_by(
            sales.c.shop
        )

    options = {
        "sa_tablecache_indexes": False,
        "sa_tablecache_views": [Totals],
        "sa_tablecache_offline": how == "rendered",
    }
    with project(tmp_path / "p", sqlite_url, metadata, **options) as made:
        metadata.create_all(made.engine)
        if how == "by hand":
            made.revision(
                "op.create_change_feed()\n    op.watch_table('sales', key=['id', 'shop'])"
            )
            made.upgrade()
        else:
            assert "op.watch_table('sales', key=['id', 'shop']" in made.migrate()
        made.check()
        assert watched(made.engine) == {"sales": (("id", "shop"), ())}
        execute(made.engine, "INSERT INTO sales VALUES (1, 1, 1, 10), (2, 2, 1, 20), (3, 3, 2, 40)")
        elsewhere = create_engine(sqlite_url)
        feed = ChangeFeed()
        with TableCache(made.engine, views=[Totals], feed=feed) as cache, elsewhere.connect() as c:
            assert cache.install_feed() == 0
            cache.load(Totals)
            for values, totals in (
                ("(1, 1, 3, 10)", {1: 20, 2: 40, 3: 10}),  # the same key, of another group
                ("(9, 3, 3, 5)", {1: 20, 3: 15}),  # another row of the same number
            ):
                c.exec_driver_sql(f"INSERT OR REPLACE INTO sales VALUES {values}")
                c.commit()
                cache.barrier()
                with cache.sessionmaker()() as session:
                    assert {r.shop: r.total for r in session.scalars(select(Totals))} == totals
                    assert session.last_read.kind == "hit"
        elsewhere.dispose()
        # No view needs it any more, and there is another unique index: it is watched again, once.
        made.options["sa_tablecache_views"] = []
        Index("more", sales.c.amount, unique=True).create(made.engine)
        assert "op.watch_table('sales', key=['id', 'shop']" in made.migrate()


# -- what no migration can end ---------------------------------------------------------------------


HINDRANCES = {
    "sqlite": (
        "CREATE TRIGGER mine AFTER INSERT ON orders BEGIN SELECT RAISE(IGNORE); END",
        "DROP TRIGGER mine",
        "its trigger mine may raise IGNORE",
    ),
    "postgresql": (
        (
            "CREATE SUBSCRIPTION mine CONNECTION 'dbname=nowhere' PUBLICATION mine "
            "WITH (connect = false, slot_name = NONE)"
        ),
        "DROP SUBSCRIPTION mine",
        "logical replication writes public.orders",
    ),
}


@pytest.mark.parametrize("database_url", list(HINDRANCES), indirect=True)
def test_what_watching_again_does_not_help_is_a_warning(
    plain: tuple[Project, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A table is not proposed again and again; who checks hears that it is not trusted, and why."""
    made, models = plain
    made.migrate()
    hinder, free, why = HINDRANCES[made.engine.dialect.name]
    execute(made.engine, hinder)
    if made.engine.dialect.name == "postgresql":
        execute(
            made.engine,
            "INSERT INTO pg_subscription_rel SELECT oid, 'orders'::regclass, 'r', NULL "
            "FROM pg_subscription",
        )
    caplog.clear()
    try:
        made.check()
        (warning,) = {r.getMessage() for r in caplog.records if r.levelno == logging.WARNING}
        assert why in warning
        found = installed(made.engine)
        assert (found.outdated, len(found.hindered)) == ({}, 1)
        with TableCache(made.engine, views=[models.view], feed=ChangeFeed()) as cache:
            assert cache.install_feed() == 0
            assert any(why in str(problem) for problem in cache.check())
            assert any(why in said for said in cache.health().feed.untrusted.values())
        drop_a_trigger(made.engine, "orders")
        assert "op.watch_table('orders'" in made.migrate()
    finally:
        execute(made.engine, free)


# -- the same schema, however it is installed ------------------------------------------------------


CATALOG = {
    "sqlite": """
        SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name LIKE 'sa_tablecache%';
        SELECT value FROM sa_tablecache_meta WHERE name = 'version'
        """,
    "postgresql": """
        SELECT relname, relkind, relpersistence, reloptions, relacl::text FROM pg_class
        WHERE relnamespace = 'sa_tablecache'::regnamespace;
        SELECT attrelid::regclass::text, attnum, attname, atttypid::regtype::text, attnotnull,
            pg_get_expr(adbin, adrelid)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        JOIN pg_class c ON c.oid = attrelid
        WHERE relnamespace = 'sa_tablecache'::regnamespace AND attnum > 0;
        SELECT regexp_replace(pg_get_functiondef(oid), '[0-9]{4,}', '0', 'g'), proacl::text
        FROM pg_proc WHERE pronamespace = 'sa_tablecache'::regnamespace;
        SELECT tgrelid::regclass::text, tgenabled,
            regexp_replace(pg_get_triggerdef(oid), '[0-9]{4,}', '0', 'g')
        FROM pg_trigger WHERE NOT tgisinternal
        """,
    "mysql": """
        SELECT table_name, column_name, column_type, is_nullable, column_default, extra
        FROM information_schema.columns
        WHERE table_schema = database() AND table_name LIKE 'sa\\_tablecache\\_%';
        SELECT table_name, index_name, seq_in_index, column_name, non_unique
        FROM information_schema.statistics
        WHERE table_schema = database() AND table_name LIKE 'sa\\_tablecache\\_%';
        SELECT event_object_table, trigger_name, event_manipulation, action_timing, action_statement
        FROM information_schema.triggers WHERE trigger_schema = database()
        """,
}


def schema_of(engine: Engine) -> list[Any]:
    """Return all that a database has of the feed: tables, functions, triggers, the registry."""
    with engine.connect() as connection:
        rows = [
            str(tuple(row))
            for statement in CATALOG[engine.dialect.name].split(";")
            for row in connection.exec_driver_sql(statement, execution_options=RAW)
        ]
        return [*sorted(rows), installed(engine)]


RAW = {"no_parameters": True}
"""So that a percent sign is one, whatever the driver."""


@pytest.fixture
def another_url(request: pytest.FixtureRequest, database_url: URL) -> Iterator[URL]:
    """A second database on the same server."""
    match database_url.get_backend_name():
        case "sqlite":
            path = Path(str(database_url.database)).with_name("another.sqlite")
            yield database_url.set(database=str(path))
        case "postgresql":
            with request.getfixturevalue("postgres").database() as url:
                yield url
        case _:
            mariadb: Mariadb = request.getfixturevalue("mariadb")
            with mariadb.database() as url:
                yield url


def same_names(found: list[Any], one: URL, other: URL) -> str:
    """Return what was found, with the name of one database in the place of another's."""
    return str(found).replace(str(one.database), str(other.database))


@every_database
def test_migrations_install_what_a_cache_installs(
    plain: tuple[Project, Any], another_url: URL
) -> None:
    """A schema made by migrations is the one that ``install_feed()`` makes; either finds it so."""
    made, models = plain
    made.migrate()
    engine = create_engine(another_url)
    models.metadata.create_all(engine)
    with TableCache(engine, views=[models.view]) as cache:
        assert cache.install_feed() == 2
        theirs = same_names(schema_of(engine), another_url, made.url)
        assert same_names(schema_of(made.engine), made.url, made.url) == theirs
        Project(made.directory / "other", another_url, models.metadata, made.options).check()
    engine.dispose()
    with TableCache(made.engine, views=[models.view]) as cache:
        assert cache.install_feed() == 0


@every_database
def test_offline_migrations_install_the_same(
    plain: tuple[Project, Any], new_project: Callable[..., Project], another_url: URL
) -> None:
    """What ``--sql`` prints, run by a client of the database, makes the same, and unmakes it."""
    made, models = plain
    made.options["sa_tablecache_offline"] = True
    made.migrate()
    other = create_engine(another_url, poolclass=NullPool)
    models.metadata.create_all(other)
    run_script(another_url, made.sql())
    theirs = same_names(schema_of(other), another_url, made.url)
    assert same_names(schema_of(made.engine), made.url, made.url) == theirs
    made.revision("op.invalidate_table('orders')", "op.invalidate_table('orders')")
    run_script(another_url, made.sql("0001:0002"))
    assert watched(other) == ORDERS_AND_CUSTOMERS
    run_script(another_url, made.sql("0002:base", downgrade=True))
    assert installed(other) == Installation(None)


@on_sqlite
def test_offline_migrations_say_what_they_cannot_ask(plain: tuple[Project, Any]) -> None:
    """Without its key a table cannot be watched with --sql, and the error says the argument."""
    made, _ = plain
    made.revision("op.watch_table('orders')")
    with pytest.raises(CommandError, match=r"op.watch_table\('orders'\).*say key=\[\.\.\.\]"):
        made.sql()


@on_sqlite
def test_by_hand_the_key_need_not_be_said(plain: tuple[Project, Any]) -> None:
    """Online, the catalog says the key; a table that does not exist is named."""
    made, _ = plain
    made.revision(
        "op.create_change_feed()\n    op.watch_table('orders')\n    op.unwatch_table('nothing')",
        "op.drop_change_feed()",
    )
    made.upgrade()
    assert watched(made.engine) == {"orders": (("id",), ())}
    made.downgrade("base")
    assert installed(made.engine) == Installation(None)
    made.revision("op.watch_table('missing')")
    with pytest.raises(CommandError, match="there is no table 'missing'"):
        made.upgrade()


@on_sqlite
def test_a_migration_without_a_changelog_says_so(plain: tuple[Project, Any]) -> None:
    """Tables can be watched only where the changelog is installed."""
    made, _ = plain
    made.revision("op.watch_table('orders')")
    with pytest.raises(CommandError, match=r"op.create_change_feed\(\) has to come before"):
        made.upgrade()


@every_database
def test_a_table_can_be_invalidated(plain: tuple[Project, Any]) -> None:
    """The operation logs that any row of a table may have changed."""
    made, _ = plain
    made.migrate()
    changelog = changelog_for(made.engine.dialect.name)
    with made.engine.connect() as connection:
        relation = changelog.resolve(connection, [(None, "orders")])[None, "orders"]
        position = changelog.position(connection)
    made.revision("op.invalidate_table('orders')")
    made.upgrade()
    options = {"isolation_level": "AUTOCOMMIT"}
    with made.engine.connect().execution_options(**options) as connection:
        poll = changelog.poll(connection, position, frozenset({relation}))
    assert [(change.relation, change.keys) for change in poll.changes] == [(relation, None)]


# -- schemas, names, environments ------------------------------------------------------------------


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_schemas_and_odd_names(
    new_project: Callable[..., Project], request: pytest.FixtureRequest, another_url: URL
) -> None:
    """Tables in a schema, with names that need quotes, are watched by these names."""
    dialect = another_url.get_backend_name()
    schema = str(another_url.database) if dialect == "mysql" else "Depot 1"
    models = shop(schema, customers="100% Customers", day="the %s day")
    local = Table("orders", MetaData(), Column("id", Integer, primary_key=True))
    local.metadata.create_all(engine := create_engine(new_project(MetaData()).url))
    with engine.begin() as connection:
        if dialect == "postgresql":
            connection.exec_driver_sql(f'CREATE SCHEMA "{schema}"')
    engine.dispose()

    class Local(CachedView):
        __select__ = select(local.c.id)

    made = new_project([models.metadata, local.metadata], include_schemas=True)
    if dialect == "mysql":
        names = {None, schema}
        made.options["include_name"] = lambda name, kind, _: kind != "schema" or name in names
    body = without_cascades(made.migrate())
    assert f"op.watch_table('100% Customers', schema='{schema}', key=['id'])" in body
    assert f"op.watch_table('orders', schema='{schema}', key=['id'], ranges=['the %s day'])" in body
    assert "op.watch_table('orders', key=['id'])" in body
    assert len(installed(made.engine).watched) == 3
    made.downgrade("base")
    assert installed(made.engine) == Installation(None)
    del Local


@on_sqlite
def test_two_databases_have_their_own_views(
    new_project: Callable[..., Project], another_url: URL
) -> None:
    """Each database of an environment gets the tables of the views of its own metadata."""
    models = shop()
    others = MetaData()
    planes = Table("planes", others, Column("tailnum", String(8), primary_key=True))

    class Planes(CachedView):
        __select__ = select(planes.c.tailnum)

    one, other = new_project(models.metadata), new_project(others, url=another_url)
    models.metadata.create_all(one.engine)
    others.create_all(other.engine)
    one.migrate()
    other.migrate()
    assert watched(one.engine) == ORDERS_AND_CUSTOMERS
    assert watched(other.engine).keys() == {"planes"}
    del Planes


@on_sqlite
def test_filters_and_other_plugins_go_on_working(
    plain: tuple[Project, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """What include_object leaves out is told of and left alone; others are not shown triggers."""
    made, _ = plain
    seen: list[Any] = []

    def compare(context: Any, _: Any, __: Any) -> PriorityDispatchResult:
        shown = [("orders", "table"), ("main.sa_tablecache_insert_orders", "trigger")]
        parents = {"schema_name": None, "table_name": ""}
        seen.append([context.run_name_filters(name, kind, parents) for name, kind in shown])
        return PriorityDispatchResult.CONTINUE

    plugin = Plugin("tests.another")
    try:
        plugin.add_autogenerate_comparator(compare, "schema", "another")
        made.options["autogenerate_plugins"] = [
            "alembic.autogenerate.*",
            "tests.another",
            "sa_tablecache",
        ]
        made.options["include_object"] = lambda _, name, kind, *__: name != "customers"
        with caplog.at_level(logging.WARNING, "sa_tablecache"):
            made.migrate()
    finally:
        plugin.remove()
    assert seen[0] == [True, False]
    assert watched(made.engine).keys() == {"orders"}
    assert "customers is read by views, but" in caplog.text


# -- versions --------------------------------------------------------------------------------------


def set_version(engine: Engine, version: int) -> None:
    """Pretend that the changelog is of another version."""
    where = " WHERE name = 'version'" if engine.dialect.name == "sqlite" else ""
    column = "value" if engine.dialect.name == "sqlite" else "version"
    table = "sa_tablecache.meta" if engine.dialect.name == "postgresql" else "sa_tablecache_meta"
    execute(engine, f"UPDATE {table} SET {column} = {version}{where}")


def test_the_version_before_stays_until_it_is_asked_for(
    plain: tuple[Project, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Workers of the release before read a changelog that is one version older: it stays."""
    made, _ = plain
    made.migrate()
    set_version(made.engine, VERSION - 1)
    with caplog.at_level(logging.INFO, "sa_tablecache"):
        assert "create_change_feed" not in made.autogenerate()
    assert f"has version {VERSION - 1}" in caplog.text
    made.upgrade()
    made.options["sa_tablecache_cleanup"] = True
    upgrade, _, downgrade = made.autogenerate().partition("def downgrade():")
    assert "op.create_change_feed()" in upgrade
    assert "op.drop_change_feed()" not in downgrade


def test_a_version_that_cannot_be_read_is_brought_up_to_date(plain: tuple[Project, Any]) -> None:
    """A changelog two versions older is renewed; of a newer one nothing is touched."""
    made, _ = plain
    made.migrate()
    set_version(made.engine, VERSION + 1)
    assert "feed" not in made.autogenerate()
    set_version(made.engine, VERSION - 2)
    made.upgrade()
    assert "op.create_change_feed()" in made.autogenerate()


# -- database indexes ------------------------------------------------------------------------------


def test_lacking_indexes_are_proposed_and_kept(new_project: Callable[..., Project]) -> None:
    """An index that a delta query or a load needs is created, and not dropped again."""
    metadata = MetaData(naming_convention={"ix": "idx_%(table_name)s_%(column_0_N_name)s"})
    planes = Table("planes", metadata, Column("id", Integer, primary_key=True))
    flights = Table(
        "flights",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("plane", Integer),
        Column("hour", Integer, nullable=False),
        Column("minute", Integer, nullable=False),
    )

    class Flights(CachedView):
        __select__ = select(
            flights.c.id, flights.c.hour, flights.c.minute, planes.c.id.label("plane")
        ).outerjoin(planes, planes.c.id == flights.c.plane)
        by_time = ScoreIndex("hour", "minute")
        by_parity = ScoreIndex(flights.c.minute % 2, "hour")

    made = new_project(metadata)
    assert "create_index" not in made.migrate()
    with TableCache(made.engine, views=[Flights]) as cache:
        problems = "\n".join(map(str, cache.check()))
    assert "flights has no index on (plane)" in problems
    assert "flights has no index on (hour, minute)" in problems
    made.options["sa_tablecache_indexes"] = True
    upgrade, _, downgrade = made.migrate().partition("def downgrade():")
    create = "op.create_index(op.f('idx_flights_{0}'), 'flights', {1}, unique=False)"
    assert create.format("hour_minute", ["hour", "minute"]) in upgrade
    assert create.format("plane", ["plane"]) in upgrade
    assert upgrade.count("create_index") == 2
    assert downgrade.count("drop_index") == 2
    with TableCache(made.engine, views=[Flights]) as cache:
        assert "has no index" not in "\n".join(map(str, cache.check()))
    Index("mine", flights.c.plane, flights.c.hour)  # declares one that serves as well
    upgrade, _, _ = made.migrate().partition("def downgrade():")
    assert "create_index('mine'" in upgrade
    assert "drop_index(op.f('idx_flights_plane')" in upgrade


# -- the command line ------------------------------------------------------------------------------

MODELS = """
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sa_tablecache import CachedView, ChangeFeed, ScoreIndex

class Base(DeclarativeBase):
    pass

class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[int] = mapped_column(index=True)

class Orders(CachedView):
    __select__ = select(Order)
    by_day = ScoreIndex("day")
"""


def test_the_command_line_of_alembic(tmp_path: Path, sqlite_url: URL) -> None:
    """A project as ``alembic init`` makes it, with the two lines of the manual."""
    url = sqlite_url.render_as_string(hide_password=False)
    repository = Path(__file__).parents[2]
    path = os.pathsep.join([str(tmp_path), str(repository), *filter(None, sys.path)])

    def alembic(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout

    alembic("init", "migrations")
    (tmp_path / "models.py").write_text(MODELS, encoding="utf-8")
    ini = tmp_path / "alembic.ini"
    lines = ini.read_text(encoding="utf-8")
    before = next(line for line in lines.splitlines() if line.startswith("sqlalchemy.url"))
    escaped = url.replace("%", "%%")
    ini.write_text(lines.replace(before, f"sqlalchemy.url = {escaped}"), encoding="utf-8")
    env = tmp_path / "migrations" / "env.py"
    lines = env.read_text(encoding="utf-8")
    lines = lines.replace("target_metadata = None", "import models\n\n" + TARGET)
    plugins = 'autogenerate_plugins=["alembic.autogenerate.*", "sa_tablecache"],\n'
    lines = lines.replace("target_metadata=target_metadata", plugins + TARGET)
    env.write_text(lines, encoding="utf-8")

    alembic("revision", "--autogenerate", "-m", "first")
    alembic("upgrade", "head")
    engine = create_engine(sqlite_url, poolclass=NullPool)
    assert watched(engine) == {"orders": (("id",), ("day",))}
    assert "No new upgrade operations detected" in alembic("check")
    drop_a_trigger(engine, "orders")
    alembic("check", status=255)


TARGET = "target_metadata=models.Base.metadata"
