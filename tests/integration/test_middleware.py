"""Middleware that carries tokens of commits: who wrote something reads it, in any process."""

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import httpx
import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import OperationalError

from sa_tablecache import AsyncTableCache, TableCache, TableCacheError
from sa_tablecache.middleware import (
    HEADER,
    MOST_CHARACTERS,
    CommitTokenMiddleware,
    WSGICommitTokenMiddleware,
)
from tests.integration.board_server import (
    FEED,
    synchronous_cache,
    threaded_app,
    write_to,
    wsgi_app,
)
from tests.integration.databases import Database
from tests.integration.flights import insert_flights
from tests.zoo import Flight, OuterBoard

ROOT = Path(__file__).parents[2]


@pytest.fixture
def flights(database: Database) -> Iterator[Database]:
    """A database with flights and a change feed."""
    with database.lent_engine() as engine:
        with engine.begin() as connection:
            insert_flights(connection)
        with TableCache(engine, views=[OuterBoard], feed=FEED) as cache:
            cache.install_feed()
            yield database
            cache.uninstall_feed()


@pytest.fixture
def cache(flights: Database) -> Iterator[TableCache]:
    """A cache that has read all flights, and polls only for readers who have to."""
    with flights.lent_engine() as engine, closing(synchronous_cache(engine)) as cache:
        yield cache


# -- servers ------------------------------------------------------------------------------------


@contextmanager
def servers(kind: str, database: Database) -> Iterator[list[str]]:
    """Start two processes that serve one database, and return their addresses."""
    url = database.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "tests.integration.board_server", kind, url]
    running = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        yield [f"http://127.0.0.1:{int(r.stdout.readline())}" for r in running if r.stdout]
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("kind", "database"),
    [("asynchronous", "postgresql"), ("threads", "sqlite"), ("wsgi", "postgresql")],
    indirect=["database"],
)
def test_who_wrote_in_one_process_reads_it_in_the_other(kind: str, flights: Database) -> None:
    """A client that sends back the token reads its writes; one that does not reads older ones."""
    with servers(kind, flights) as addresses, httpx.Client(timeout=30, trust_env=False) as client:
        for address in addresses:
            assert client.get(f"{address}/2").json() == ["hit", 5.0]
        turns = itertools.cycle(addresses)
        for delay in (10.0, 11.0, 12.0, 13.0, 14.0):
            response = client.post(f"{next(turns)}/2/{delay}")
            token = response.headers[HEADER]
            assert "set-cookie" not in response.headers
            response = client.get(f"{next(turns)}/2", headers={HEADER: token})
            assert response.json()[1] == delay
            assert HEADER not in response.headers, "it committed nothing"
            next(turns)
        client.post(f"{addresses[0]}/2/99")
        assert client.get(f"{addresses[1]}/2").json() == ["hit", 14.0], "nobody had to poll"


# -- what clients send --------------------------------------------------------------------------


def client_of(app: Any) -> httpx.AsyncClient:
    """Return a client of an application in this process."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://board")


async def test_a_browser_sends_a_cookie(flights: Database, cache: TableCache) -> None:
    """The token travels in a cookie that scripts and other sites do not see."""
    app = threaded_app(cache, header=None, cookie="commits")
    async with client_of(app) as client:
        response = await client.get("/2")
        assert "set-cookie" not in response.headers
        response = await client.post("/2/7")
        token, _, flags = response.headers["set-cookie"].partition(";")
        assert flags == " Max-Age=60; Path=/; HttpOnly; SameSite=Lax; Secure"
        assert HEADER not in response.headers
        assert cache.wait_for(token.removeprefix("commits="))
        assert (await client.get("/2")).json()[1] == 7.0
        before = polls(cache)
        write_elsewhere(flights)
        assert (await client.get("/2")).json()[1] == 7.0
        assert polls(cache) == before, "what the token stands for was read already"
        client.cookies.set("commits", cache.commit_token())
        assert (await client.get("/2")).json()[1] == 8.0
        assert polls(cache) == before + 2, "one for the token, one of the refresh in its snapshot"


def write_elsewhere(database: Database) -> None:
    """Write as another process does."""
    with database.bystander() as connection:
        connection.execute(update(Flight).where(Flight.id == 2).values(delay=8.0))


def polls(cache: TableCache) -> int:
    """Return how often a cache has polled."""
    assert cache.consumer is not None
    return cache.consumer.counts["polls"]


HOSTILE = [
    "", " ", "x", "0", "null", "é", "a" * (MOST_CHARACTERS + 1), "9" * 1000, "-1.-1", "1.1",
    "main.ab-1.9999999999999999999999.1", "main.0-0.1.1", "' OR 1=1", "%00", "%", "1,2", "a;b=c",
    '"', "..", "\x7f",
]  # fmt: skip


@pytest.mark.parametrize("carrier", ["header", "cookie"])
async def test_a_token_that_is_none_is_ignored(cache: TableCache, carrier: str) -> None:
    """Whatever a client sends, it gets its answer."""
    app = threaded_app(cache, cookie="commits")
    async with client_of(app) as client:
        for token in HOSTILE:
            sent = token.encode("latin-1")
            headers = [(HEADER.encode(), sent)] if carrier == "header" else [
                (b"cookie", b"a=b; commits=" + sent + b"; c"), (b"cookie", b"commits"),
            ]  # fmt: skip
            response = await client.get("/2", headers=headers)
            assert response.status_code == 200, token
            assert response.json()[1] == 5.0


async def test_a_token_of_another_database_costs_a_poll(cache: TableCache) -> None:
    """Nobody can tell whether it is before or after: so it is waited for with one poll."""
    token = cache.commit_token()
    other = "".join("f" if c == "0" else "0" if c in "123456789abcdef" else c for c in token)
    other = other if cache.engine.dialect.name == "postgresql" else f"main.00-1.{'9' * 12}.1"
    async with client_of(threaded_app(cache)) as client:
        before = polls(cache)
        response = await client.get("/2", headers={HEADER: other})
        assert response.json() == ["hit", 5.0]
        assert polls(cache) <= before + 1


async def test_what_commits_gets_a_token(cache: TableCache) -> None:
    """Only a request that has committed something, in whatever thread, has one in its response."""
    app = threaded_app(cache)

    @app.put("/nothing")
    def nothing() -> None:
        with cache.sessionmaker()() as session:
            session.execute(select(Flight)).all()
            session.commit()

    @app.put("/rolled-back")
    def rolled_back() -> None:
        with cache.sessionmaker()() as session:
            session.execute(update(Flight).values(delay=1.0))

    @app.put("/text")
    async def with_text() -> None:
        def run() -> None:
            with cache.engine.begin() as connection:
                connection.execute(text("UPDATE flights SET delay = 1"))

        await asyncio.create_task(asyncio.to_thread(run))

    async with client_of(app) as client:
        assert HEADER not in (await client.put("/nothing")).headers
        assert HEADER not in (await client.put("/rolled-back")).headers
        assert HEADER in (await client.put("/text")).headers
        assert HEADER not in (await client.put("/nothing")).headers
        both = await asyncio.gather(client.put("/nothing"), client.post("/2/3"))
        assert [HEADER in response.headers for response in both] == [False, True]


# -- when the database is away ------------------------------------------------------------------


async def test_a_feed_that_cannot_be_read_is_no_error_page(
    flights: Database, cache: TableCache, caplog: pytest.LogCaptureFixture
) -> None:
    """The request goes on, and the database answers what memory may not know yet."""
    assert cache.consumer is not None
    app = threaded_app(cache, timeout=0.0)
    read, broken = cache.consumer.changelog.poll, True

    def poll(*arguments: Any) -> Any:
        if broken:
            raise OperationalError("poll", {}, Exception("the server is away"))
        return read(*arguments)

    cache.consumer.changelog.poll = poll  # type: ignore[method-assign]
    async with client_of(app) as client:
        assert (await client.get("/2")).json() == ["hit", 5.0]
        write_elsewhere(flights)
        token = cache.commit_token()
        assert (await client.get("/2", headers={HEADER: token})).json() == ["bypass", 8.0]
        assert "could not be read" in caplog.text
        broken = False
        assert (await client.get("/2", headers={HEADER: token})).json()[1] == 8.0
        assert (await client.get("/2")).json() == ["hit", 8.0]


async def test_a_commit_without_a_token_is_a_commit(
    cache: TableCache, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that has committed succeeds, even if nobody can say how far the database was."""
    assert cache.consumer is not None

    def position(*_: Any) -> Any:
        raise OperationalError("position", {}, Exception("the server is away"))

    cache.consumer.changelog.position = position  # type: ignore[method-assign]
    async with client_of(threaded_app(cache)) as client:
        response = await client.post("/2/3")
        assert response.status_code == 200
        assert HEADER not in response.headers
        assert "no token" in caplog.text


# -- WSGI ---------------------------------------------------------------------------------------


def call(app: Any, path: str = "/", **environ: str) -> tuple[str, dict[str, str], bytes]:
    """Call a WSGI application as a strict server does; return status, headers and body."""
    environ = {"PATH_INFO": path, "SCRIPT_NAME": "", "QUERY_STRING": "", **environ}
    setup_testing_defaults(environ)
    begun: list[Any] = []
    written: list[bytes] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        if exc_info is not None and begun and written:
            raise exc_info[1]
        begun.append((status, dict(headers)))
        return written.append

    body = validator(app)(environ, start_response)
    try:
        written.extend(body)
    finally:
        body.close()
    status, headers = begun[-1]
    return status, headers, b"".join(written)


def test_any_form_of_wsgi_application_has_its_token(cache: TableCache) -> None:
    """Lists, generators, ``write()`` and errors: the response begins after the commit."""
    plain = [("Content-Type", "text/plain")]

    def at_once(environ: Any, start_response: Any) -> Any:
        write_to(cache, 2, 1.0)
        start_response("200 OK", plain)
        return [b"done"]

    def too_early(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", plain)
        write_to(cache, 2, 2.0)
        return [b"do", b"ne"]

    def generator(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", plain)
        write_to(cache, 2, 3.0)
        yield b"do"
        yield b"ne"

    def empty_generator(environ: Any, start_response: Any) -> Any:
        write_to(cache, 2, 4.0)
        start_response("204 No Content", [])
        yield from ()

    def writes(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", plain)
        write_to(cache, 2, 5.0)
        write(b"do")
        write(b"ne")
        return []

    def error_instead(environ: Any, start_response: Any) -> Any:
        write_to(cache, 2, 6.0)
        start_response("200 OK", plain)
        try:
            raise LookupError
        except LookupError:
            start_response("500 Oops", plain, sys.exc_info())
        return [b"done"]

    for app in (at_once, too_early, generator, empty_generator, writes, error_instead):
        status, headers, body = call(WSGICommitTokenMiddleware(app, cache))
        assert body == (b"" if app is empty_generator else b"done"), app.__name__
        assert status[:3] == {"empty_generator": "204", "error_instead": "500"}.get(
            app.__name__, "200"
        )
        assert cache.wait_for(headers[HEADER])

    def reads(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", plain)
        return [b"done"]

    assert HEADER not in call(WSGICommitTokenMiddleware(reads, cache))[1]

    def twice(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", plain)
        start_response("200 OK", plain)
        return []

    with pytest.raises(AssertionError, match="twice"):
        call(WSGICommitTokenMiddleware(twice, cache))

    def fails(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", plain)
        raise LookupError
        yield b""

    with pytest.raises(LookupError):
        call(WSGICommitTokenMiddleware(fails, cache))


def test_wsgi_takes_tokens_from_headers_and_cookies(flights: Database, cache: TableCache) -> None:
    """What a request carries is read before it is answered; what is no token is ignored."""
    app = wsgi_app(cache, cookie="commits")
    _, headers, _ = call(app, "/2/7", REQUEST_METHOD="POST")
    assert headers["set-cookie"].startswith(f"commits={headers[HEADER]}; Max-Age=60")
    for name in ("HTTP_X_SA_TABLECACHE_TOKEN", "HTTP_COOKIE"):
        write_elsewhere(flights)
        token = cache.commit_token()
        before = polls(cache)
        value = token if "TOKEN" in name else f"a=b; commits={token}"
        assert call(app, "/2", **{name: value})[2].endswith(b" 8.0]")
        assert polls(cache) == before + 2, "one for the token, one of the refresh in its snapshot"
        for token in HOSTILE:
            value = token if "TOKEN" in name else f"a=b; commits={token}"
            assert call(app, "/2", **{name: value})[0] == "200 OK"


# -- setting it up ------------------------------------------------------------------------------


def test_bad_options_are_refused() -> None:
    """A middleware that could carry no token says so when it is made."""
    with pytest.raises(TableCacheError, match="has none: give it feed="):
        CommitTokenMiddleware(print, TableCache())  # type: ignore[arg-type]
    cache = TableCache(feed=FEED)
    for options in ({"header": None}, {"header": "a b"}, {"cookie": "a;b"}, {"timeout": -1}):
        with pytest.raises(TableCacheError):
            CommitTokenMiddleware(print, cache, **options)  # type: ignore[arg-type]
    with pytest.raises(TableCacheError, match="AsyncTableCache"):
        WSGICommitTokenMiddleware(print, AsyncTableCache(feed=FEED))  # type: ignore[arg-type]
