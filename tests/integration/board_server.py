"""A web service over the flights: ``python -m tests.integration.board_server KIND URL SOCKET``.

It is one of several processes over one database, behind a load balancer that does not care which
one answers. It polls the change feed only when a reader has to. It prints its port.
"""

import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from wsgiref.simple_server import make_server

import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine, make_url, select, update
from starlette.concurrency import run_in_threadpool

from sa_tablecache import AsyncTableCache, ChangeFeed, TableCache
from sa_tablecache.middleware import CommitTokenMiddleware, WSGICommitTokenMiddleware
from tests.integration.databases import Database
from tests.zoo import Flight, OuterBoard

FEED = ChangeFeed(max_lag=timedelta(hours=1), poll_interval=3600)


def asynchronous_app(database: Database, **options: Any) -> FastAPI:
    """Return a service with an asynchronous cache."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = database.async_engine()
        cache = app.state.cache = AsyncTableCache(engine, views=[OuterBoard], feed=FEED)
        app.state.sessions = cache.sessionmaker()
        await cache.load(OuterBoard)
        await cache.refresh(OuterBoard)
        yield
        await cache.close()
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(CommitTokenMiddleware, cache=lambda: app.state.cache, **options)

    @app.get("/{number}")
    async def read(number: int) -> Any:
        async with app.state.sessions() as session:
            found = await session.scalar(select(OuterBoard.delay).where(OuterBoard.id == number))
            return [session.last_read.kind, found]

    @app.post("/{number}/{delay}")
    async def write(number: int, delay: float) -> None:
        async with app.state.sessions() as session:
            await session.execute(update(Flight).where(Flight.id == number).values(delay=delay))
            await session.commit()

    return app


def read_from(cache: TableCache, number: int) -> Any:
    """Return how a delay is read, and the delay."""
    with cache.sessionmaker()() as session:
        delay = session.scalar(select(OuterBoard.delay).where(OuterBoard.id == number))
        return [session.last_read.kind, delay]


def write_to(cache: TableCache, number: int, delay: float) -> None:
    """Write a delay, and commit it."""
    with cache.sessionmaker()() as session:
        session.execute(update(Flight).where(Flight.id == number).values(delay=delay))
        session.commit()


def synchronous_cache(engine: Engine) -> TableCache:
    """Return a cache that has all flights."""
    cache = TableCache(engine, views=[OuterBoard], feed=FEED)
    cache.load(OuterBoard)
    cache.refresh(OuterBoard)
    return cache


def threaded_app(cache: TableCache, **options: Any) -> FastAPI:
    """Return a service whose functions run in threads."""
    app = FastAPI()
    app.add_middleware(CommitTokenMiddleware, cache=cache, **options)

    @app.get("/{number}")
    def read(number: int) -> Any:
        return read_from(cache, number)

    @app.post("/{number}/{delay}")
    async def write(number: int, delay: float) -> None:
        await run_in_threadpool(write_to, cache, number, delay)

    return app


def wsgi_app(cache: TableCache, **options: Any) -> Callable[..., Iterable[bytes]]:
    """Return a service for WSGI, whose body is a generator."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        number, *delay = environ["PATH_INFO"].strip("/").split("/")
        start_response("200 OK", [("Content-Type", "application/json")])
        if environ["REQUEST_METHOD"] == "POST":
            write_to(cache, int(number), float(delay[0]))
            yield b"null"
        else:
            kind, found = read_from(cache, int(number))
            yield f'["{kind}", {found}]'.encode()

    return WSGICommitTokenMiddleware(app, cache, **options)


def main(kind: str, url: str) -> None:
    """Serve until killed."""
    database = Database(make_url(url))
    if kind == "wsgi":
        with make_server("127.0.0.1", 0, wsgi_app(synchronous_cache(database.engine()))) as server:
            print(server.server_port, flush=True)
            server.serve_forever()
    app = (
        asynchronous_app(database)
        if kind == "asynchronous"
        else threaded_app(synchronous_cache(database.engine()))
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        print(listening.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])


if __name__ == "__main__":
    main(*sys.argv[1:])
