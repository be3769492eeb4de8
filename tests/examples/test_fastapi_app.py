"""The FastAPI service answers real requests, over a week of flights in both databases."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import create_async_engine

from examples.fastapi_app import create_app
from examples.flights_data import fill, tune_sqlite
from tests.conftest import asynchronous


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request, tmp_path_factory):
    """The URL of a database with the flights of a week."""
    if request.param == "sqlite":
        file = tmp_path_factory.mktemp("flights") / "flights.sqlite"
        url = URL.create("sqlite+aiosqlite", database=str(file))
    else:
        url = asynchronous(request.getfixturevalue("postgres_module_url"))

    async def prepare():
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(fill, days=7)
        await engine.dispose()

    asyncio.run(prepare())
    return url


@pytest.fixture(scope="module")
def client(url):
    """A client of the service, which listens on a loopback port."""
    engine = create_async_engine(url)
    if url.get_backend_name() == "sqlite":
        tune_sqlite(engine.sync_engine)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listening:
        server = uvicorn.Server(uvicorn.Config(create_app(engine), ws="none", log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            host, port = listening.getsockname()
            with httpx.Client(base_url=f"http://{host}:{port}", timeout=30) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def ready(client):
    """The same client, when the view is loaded."""
    deadline = time.monotonic() + 30
    while client.get("/ready").status_code != httpx.codes.OK:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return client


NOON = {"since": "2013-01-03T12:00", "until": "2013-01-03T13:00"}


def test_answers_before_it_is_ready(client):
    """A request is answered at once, whether or not the view is loaded yet."""
    response = client.get("/departures", params=NOON)
    assert response.status_code == httpx.codes.OK
    assert len(response.json()) == 60


def test_ready_tells_how_much_is_loaded(ready):
    """The readiness route answers 200 when the view is in memory, with its number of records."""
    answer = ready.get("/ready").json()
    assert answer["ready"] is True
    assert answer["records"] == 5957


def test_departures_come_from_memory_with_all_columns(ready):
    """A range request is a hit, in the order of time, with the joined columns."""
    response = ready.get("/departures", params={**NOON, "until": "2013-01-03T15:00"})
    assert response.headers["X-Cache"] == "hit"
    board = response.json()
    assert [flight["time_hour"] for flight in board] == sorted(f["time_hour"] for f in board)
    assert len(board[0]) == 17
    assert board[0]["origin_name"] in {"La Guardia", "John F Kennedy Intl", "Newark Liberty Intl"}


def test_time_zones_are_converted(ready):
    """A moment with an offset means the same as its UTC time."""
    parameters = {"since": "2013-01-03T07:00-05:00", "until": "2013-01-03T13:00Z"}
    assert ready.get("/departures", params=parameters).json() == (
        ready.get("/departures", params=NOON).json()
    )


def test_pages_follow_each_other(ready):
    """Pages of a given size, each after the last record of the one before, make up the whole."""
    whole = ready.get("/departures", params=NOON).json()
    pages, after = [], None
    while page := ready.get(
        "/departures", params={**NOON, "limit": 20} | ({"after": after} if after else {})
    ).json():
        pages += page
        after = page[-1]["id"]
    assert pages == whole


def test_a_write_is_seen_by_the_next_request(ready):
    """Renaming an aircraft's model changes the board of its flights at once."""
    whole = {"since": "2013-01-01", "until": "2013-01-08", "limit": 1000}
    tailnum = next(
        f["tailnum"] for f in ready.get("/departures", params=whole).json() if f["plane_model"]
    )
    changed = ready.patch(f"/planes/{tailnum}", json={"model": "Concorde"})
    assert changed.status_code == httpx.codes.OK
    flights = ready.get("/departures", params=whole).json()
    assert {f["plane_model"] for f in flights if f["tailnum"] == tailnum} == {"Concorde"}
    assert all(f["plane_model"] != "Concorde" for f in flights if f["tailnum"] != tailnum)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/departures?since=x&until=y", 422),
        ("GET", "/departures?since=2013-01-01&until=2013-01-02&limit=0", 422),
        ("GET", "/departures?since=2013-01-01&until=2013-01-02&after=-1", 404),
        ("PATCH", "/planes/nowhere", 404),
    ],
)
def test_bad_requests(ready, method, path, status):
    """Bad input is the client's error."""
    json = {"model": "x"} if method == "PATCH" else None
    assert ready.request(method, path, json=json).status_code == status
