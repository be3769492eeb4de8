"""An asynchronous web service over the flights, with FastAPI: ``python -m examples.fastapi_app``.

::

    curl 'localhost:8000/ready'
    curl 'localhost:8000/metrics'
    curl 'localhost:8000/departures?since=2013-01-03T12:00&until=2013-01-03T13:00&limit=2'
    curl -X PATCH 'localhost:8000/planes/N14228' --json '{"model": "737-800"}'

The service answers from its first second: requests that come before the view is loaded are
answered by the database, later ones from memory. A load balancer waits for ``/ready``, ``/health``
is for people and alerts, and Prometheus scrapes ``/metrics``. Writes are ordinary ORM code, and the
next request sees them.

How an application tests itself with its cache is shown in ``tests/examples/test_fastapi_tests.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import uvicorn
from fastapi import Body, Depends, FastAPI, HTTPException, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from examples.flights_data import fill, tune_sqlite
from examples.flights_models import FlightBoard, Plane
from examples.postgres import embedded_postgres
from sa_tablecache import AsyncCacheSession, AsyncTableCache, Everything
from sa_tablecache.metrics import export

MEMORY_LIMIT = 500 * 2**20
"""The most that the records may take, in bytes: a year of flights takes a quarter of it."""


def create_app(engine: AsyncEngine) -> FastAPI:
    """Return the service over a database that has the tables of the flights example."""
    # Nobody else writes: with several processes it would be feed=ChangeFeed().
    cache = AsyncTableCache(engine, exclusive_writer=True, memory_limit=MEMORY_LIMIT)
    cache.add(FlightBoard, policy=Everything())
    registry = CollectorRegistry()
    export(cache, registry=registry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with cache:  # the board is loaded in the background from now on
            yield
        await engine.dispose()

    app = FastAPI(title="Departures of New York, 2013", lifespan=lifespan)
    app.state.cache = cache
    app.state.sessions = cache.sessionmaker()
    app.state.registry = registry
    app.get("/ready")(ready)
    app.get("/health")(health)
    app.get("/metrics")(metrics)
    app.get("/departures")(departures)
    app.patch("/planes/{tailnum}")(rename)
    return app


async def session_of(request: Request) -> AsyncIterator[AsyncCacheSession]:
    """Give each request a session of its own."""
    async with request.app.state.sessions() as session:
        yield session


Session = Annotated[AsyncCacheSession, Depends(session_of)]


async def ready(request: Request, response: Response) -> dict[str, Any]:
    """Tell whether requests are answered from memory; status 503 while they are not."""
    cache: AsyncTableCache = request.app.state.cache
    if not cache.ready(FlightBoard):
        response.status_code = 503
    return {"ready": cache.ready(FlightBoard), "records": cache.stats(FlightBoard).records}


async def health(request: Request, response: Response) -> dict[str, Any]:
    """Tell whether something keeps failing; the service answers all the same."""
    health = request.app.state.cache.health()
    if not health.ok:
        response.status_code = 503
    return {"ok": health.ok, "reasons": health.reasons}


async def metrics(request: Request) -> Response:
    """Return what Prometheus scrapes."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


async def departures(
    session: Session,
    since: datetime,
    until: datetime,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: int | None = None,
) -> Response:
    """Return departures in the order of time; ``after`` is the id of the last one already seen."""
    last = None if after is None else await session.get(FlightBoard, after)
    if after is not None and last is None:
        raise HTTPException(404, f"there is no flight {after}")
    board = await session.range(
        FlightBoard.by_time, ge=_utc(since), lt=_utc(until), limit=limit, after=last
    )
    assert session.last_read is not None
    return Response(
        msgspec.json.encode(board),
        media_type="application/json",
        headers={"X-Cache": str(session.last_read.kind)},
    )


async def rename(
    session: Session, tailnum: str, model: Annotated[str, Body(embed=True)]
) -> dict[str, str]:
    """Change the model of an aircraft, on the boards of all its flights."""
    plane = await session.get(Plane, tailnum)
    if plane is None:
        raise HTTPException(404, f"there is no aircraft {tailnum!r}")
    plane.model = model
    await session.commit()
    return {"tailnum": tailnum, "model": model}


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment


def main() -> None:
    """Fill a temporary database and serve it."""
    parser = argparse.ArgumentParser(prog="python -m examples.fastapi_app")
    parser.add_argument("--postgres", action="store_true", help="embedded PostgreSQL, not SQLite")
    parser.add_argument("--days", type=int, default=None, help="only so many days of 2013")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.postgres:
            url = stack.enter_context(embedded_postgres())
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            url = URL.create("sqlite+aiosqlite", database=str(Path(directory) / "flights.sqlite"))
        engine = create_async_engine(url)
        if not options.postgres:
            tune_sqlite(engine.sync_engine)
        asyncio.run(_fill(url, options.days))
        uvicorn.run(create_app(engine), port=options.port)


async def _fill(url: URL, days: int | None) -> None:
    print("filling a temporary database ...", flush=True)
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(fill, days=days)
    await engine.dispose()


if __name__ == "__main__":
    main()
