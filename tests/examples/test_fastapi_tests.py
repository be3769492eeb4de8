"""How the FastAPI service would test itself: each test in a transaction that is rolled back.

This file is an example, as the service is: see docs/testing.md. The database is filled once; each
test has a few rows of its own beside that, and leaves nothing.
"""

import asyncio

import httpx
import pytest
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from examples.fastapi_app import create_app
from examples.flights_data import fill
from examples.flights_models import FlightBoard, Plane
from sa_tablecache.testing import assert_hits, assert_statements, run_upkeep
from tests.conftest import asynchronous

NOON = {"since": "2013-01-01T12:00", "until": "2013-01-01T13:00"}


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def service(request, tmp_path_factory):
    """The service over a database with the flights of a day."""
    if request.param == "sqlite":
        file = tmp_path_factory.mktemp("flights") / "flights.sqlite"
        url = URL.create("sqlite+aiosqlite", database=str(file))
    else:
        url = asynchronous(request.getfixturevalue("postgres_module_url"))
    # An event loop for each test: connections must not outlive it.
    engine = create_async_engine(url, poolclass=NullPool)

    async def prepare():
        async with engine.begin() as connection:
            await connection.run_sync(fill, days=1)

    asyncio.run(prepare())
    return create_app(engine)


@pytest.fixture
async def cache(service, bind_cache):
    """The cache of the service, in a transaction that is rolled back when the test ends."""
    cache = service.state.cache
    async with cache.engine.connect() as connection:
        transaction = await connection.begin()
        bind_cache(cache, connection)
        service.state.sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
        yield cache
        await transaction.rollback()


@pytest.fixture
async def client(service, cache):
    """A client of the service, without a server."""
    transport = httpx.ASGITransport(app=service)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def board(client):
    """Return the departures of an hour."""
    response = await client.get("/departures", params=NOON)
    assert response.status_code == httpx.codes.OK
    return response.json()


async def test_departures_come_from_memory(client, cache):
    """A loaded board is read without SQL."""
    expected = await board(client)
    await cache.load(FlightBoard)
    with assert_hits(FlightBoard), assert_statements(0):
        assert await board(client) == expected


async def test_a_renamed_aircraft_is_on_the_board_at_once(client, cache):
    """The write marks its flights; the next request refreshes them, later ones ask nothing."""
    await cache.load(FlightBoard)
    tailnum = next(flight["tailnum"] for flight in await board(client) if flight["plane_model"])
    response = await client.patch(f"/planes/{tailnum}", json={"model": "Concorde"})
    assert response.status_code == httpx.codes.OK
    with assert_hits(FlightBoard):
        flights = await board(client)
    assert {f["plane_model"] for f in flights if f["tailnum"] == tailnum} == {"Concorde"}
    with assert_hits(FlightBoard), assert_statements(0):
        assert await board(client) == flights


async def test_the_test_before_has_left_nothing(service, client, cache):
    """There is no Concorde, neither in the database nor in the cache."""
    await cache.load(FlightBoard)
    assert all(flight["plane_model"] != "Concorde" for flight in await board(client))
    async with service.state.sessions() as session:
        planes = await session.scalars(Plane.__table__.select().where(Plane.model == "Concorde"))
        assert not planes.all()


async def test_readiness_health_and_metrics_are_told(client, cache):
    """Not ready, nor well, before the upkeep has loaded the board; what was read is counted."""
    assert (await client.get("/ready")).status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert (await client.get("/health")).status_code == httpx.codes.SERVICE_UNAVAILABLE
    cache.start()
    await run_upkeep(cache)
    assert (await client.get("/ready")).status_code == httpx.codes.OK
    assert (await client.get("/health")).json() == {"ok": True, "reasons": []}
    await board(client)
    page = (await client.get("/metrics")).text
    records = cache.stats(FlightBoard).records
    assert f'sa_tablecache_records{{cache="",view="FlightBoard"}} {float(records)}' in page
