"""Read-your-writes across processes: tokens of commits, carried by HTTP.

In: requests. Out: responses that say, where the request has committed something, how far the
database was then; and for requests that say it, a cache that has read as far. So somebody who saves
a form in one process sees what was saved in the next request, whichever process answers it.

::

    app.add_middleware(CommitTokenMiddleware, cache=cache, cookie="commits")  # ASGI
    application = WSGICommitTokenMiddleware(application, cache, cookie="commits")

A token is a short string, such as ``8f3a51c0.2f7`` on PostgreSQL; it tells how many transactions
there were, and nothing else. A client may send what it likes: a token that is none is ignored, and
one of the future costs one poll.

What is committed after the beginning of the response was sent has no token any more: in background
tasks, or by a dependency of FastAPI behind its ``yield``.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from datetime import timedelta
from typing import Any, Final, TypeAlias, TypedDict, Unpack

from .asyncio import AsyncTableCache
from .cache import BaseTableCache
from .exc import TableCacheError
from .following import noting_commits

log = logging.getLogger(__name__)

AnyCache: TypeAlias = BaseTableCache | AsyncTableCache

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApplication: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADER: Final = "x-sa-tablecache-token"
MOST_CHARACTERS: Final = 2_000
"""Longer tokens are neither sent nor looked at."""

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # a token of RFC 9110


class TokenOptions(TypedDict, total=False):
    """The options of :class:`CommitTokenMiddleware`."""

    header: str | None
    cookie: str | None
    timeout: float
    max_age: timedelta
    secure: bool
    path: str
    domain: str | None


class _Tokens:
    """How tokens travel: what both kinds of middleware share."""

    def __init__(
        self,
        cache: AnyCache | Callable[[], AnyCache],
        *,
        header: str | None = HEADER,
        cookie: str | None = None,
        timeout: float = 1.0,
        max_age: timedelta = timedelta(minutes=1),
        secure: bool = True,
        path: str = "/",
        domain: str | None = None,
    ) -> None:
        if header is None and cookie is None:
            raise TableCacheError("a commit token travels in a header or a cookie: name one")
        for kind, name in (("header", header), ("cookie", cookie)):
            if name is not None and not _NAME.fullmatch(name):
                raise TableCacheError(f"{name!r} cannot be the name of a {kind}")
        if timeout < 0 or max_age <= timedelta():
            raise TableCacheError(f"timeout={timeout!r}, max_age={max_age!r}: too short")
        self._cache = cache
        self._header = header.lower() if header is not None else None
        self._cookie = cookie
        self._timeout = timeout
        flags = [f"Max-Age={max(1, int(max_age.total_seconds()))}", f"Path={path}", "HttpOnly"]
        flags += ["SameSite=Lax", *(["Secure"] if secure else [])]
        flags += [f"Domain={domain}"] if domain is not None else []
        self._flags = "; ".join(flags)
        if not callable(cache):
            self.cache()

    def cache(self) -> AnyCache:
        """Return the cache."""
        cache: AnyCache = self._cache() if callable(self._cache) else self._cache
        if _sync(cache)._feed is None:
            raise TableCacheError(
                "commit tokens are read in the change feed, and this cache has none: give it "
                "feed=ChangeFeed()"
            )
        return cache

    def received(self, header: str, cookies: str) -> list[str]:
        """Return the tokens of a request, that in the header first."""
        found = [] if self._header is None else [header.strip()]
        for pair in cookies.split(";") if self._cookie is not None else ():
            name, _, value = pair.strip().partition("=")
            if name == self._cookie:
                found.append(value.strip().strip('"'))
        return [token for token in dict.fromkeys(found) if 0 < len(token) <= MOST_CHARACTERS][:2]

    def sent(self, token: str) -> list[tuple[str, str]]:
        """Return the headers of a response that carry a token."""
        if len(token) > MOST_CHARACTERS:
            log.warning("a commit token of %s characters is not sent", len(token))
            return []
        headers = [] if self._header is None else [(self._header, token)]
        if self._cookie is not None:
            headers.append(("set-cookie", f"{self._cookie}={token}; {self._flags}"))
        return headers

    def _ignored(self, token: str, why: ValueError) -> None:
        log.debug(
            "a request with the commit token %.60r is answered as one without: %s", token, why
        )

    def _late(self, token: str) -> None:
        log.warning(
            "the change feed could not be read for %s s, up to the commit token %.60r of a "
            "request: the database answers",
            self._timeout,
            token,
        )


def _sync(cache: AnyCache) -> BaseTableCache:
    return cache if isinstance(cache, BaseTableCache) else cache.sync_cache


def _no_token(error: Exception) -> None:
    """Log why a commit has no token: it has succeeded, and so has the request."""
    log.warning("a commit has no token for its response: %s", error)


class CommitTokenMiddleware(_Tokens):
    """Carries commit tokens, for ASGI: Starlette, FastAPI, Django, Quart.

    ::

        app.add_middleware(CommitTokenMiddleware, cache=cache)

    A response to a request that has committed costs one SELECT, and a request with a token one poll
    at most, which it shares with others; nothing if the cache has read as far. With a
    :class:`.TableCache` both run in a thread.

    :param cache: a :class:`.TableCache` or :class:`.AsyncTableCache` with a change feed; or a
        function without arguments that returns it, where it is made later.
    :param header: the header of requests and responses; ``None`` for none.
    :param cookie: the name of a cookie, for browsers, which send no headers by themselves.
    :param timeout: for how many seconds a request waits while the change feed cannot be read. Then
        it goes on, and the database answers its reads.
    :param max_age: how long a cookie lives. More than the feed's ``max_lag`` is enough: older
        commits are visible everywhere.
    :param secure: whether browsers send the cookie by HTTPS alone.
    :param path: of the cookie.
    :param domain: of the cookie; ``None`` for the host itself.
    :raises TableCacheError: if the cache has no change feed, or if there is neither a header nor a
        cookie, or its name cannot be one.
    """

    def __init__(
        self,
        app: ASGIApplication,
        cache: AnyCache | Callable[[], AnyCache],
        **options: Unpack[TokenOptions],
    ) -> None:
        self.app = app
        super().__init__(cache, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        cache = self.cache()
        await self._wait(cache, scope["headers"])
        begun: bool | None = None
        with noting_commits() as committed:

            async def send_with_token(message: MutableMapping[str, Any]) -> None:
                nonlocal begun
                if message["type"] == "http.response.start":
                    begun = _sync(cache) in committed
                    if begun:
                        message = {**message, "headers": [*message.get("headers", ())]}
                        for name, value in await self._headers(cache):
                            message["headers"].append((name.encode(), value.encode()))
                await send(message)

            await self.app(scope, receive, send_with_token)
            if begun is False and _sync(cache) in committed:
                log.debug("%s %s committed after its response", scope["method"], scope["path"])

    async def _wait(self, cache: AnyCache, headers: Iterable[tuple[bytes, bytes]]) -> None:
        header, cookies = "", []
        for name, value in headers:
            if name.lower() == b"cookie":
                cookies.append(value.decode("latin-1"))
            elif self._header is not None and name.lower() == self._header.encode():
                header = value.decode("latin-1")
        for token in self.received(header, ";".join(cookies)):
            try:
                if isinstance(cache, AsyncTableCache):
                    read = await cache.wait_for(token, self._timeout)
                else:
                    read = await asyncio.to_thread(cache.wait_for, token, self._timeout)
            except ValueError as why:
                self._ignored(token, why)
            else:
                if not read:
                    self._late(token)

    async def _headers(self, cache: AnyCache) -> list[tuple[str, str]]:
        try:
            if isinstance(cache, AsyncTableCache):
                return self.sent(await cache.commit_token())
            return self.sent(await asyncio.to_thread(cache.commit_token))
        except Exception as error:
            _no_token(error)
            return []


class WSGICommitTokenMiddleware(_Tokens):
    """Carries commit tokens, for WSGI: Flask, Django, Pyramid.

    ::

        application = WSGICommitTokenMiddleware(application, cache)
        app.wsgi_app = WSGICommitTokenMiddleware(app.wsgi_app, cache)  # Flask

    The options and the costs are those of :class:`CommitTokenMiddleware`.
    """

    def __init__(
        self,
        app: Callable[..., Iterable[bytes]],
        cache: AnyCache | Callable[[], AnyCache],
        **options: Unpack[TokenOptions],
    ) -> None:
        self.app = app
        super().__init__(cache, **options)
        self._variable = f"HTTP_{(self._header or '').upper().replace('-', '_')}"

    def cache(self) -> BaseTableCache:
        """Return the cache."""
        cache = super().cache()
        if not isinstance(cache, BaseTableCache):
            raise TableCacheError(
                "a WSGI application runs in threads, and has a TableCache, not an AsyncTableCache"
            )
        return cache

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer a request."""
        cache = self.cache()
        header = environ.get(self._variable, "")
        for token in self.received(header, environ.get("HTTP_COOKIE", "")):
            try:
                if not cache.wait_for(token, self._timeout):
                    self._late(token)
            except ValueError as why:
                self._ignored(token, why)
        response = _Response(self, cache, start_response)
        with noting_commits() as response.committed:
            return response.begin(self.app(environ, response.start))


class _Response:
    """A response that begins no earlier than it has to: the application may commit until then."""

    committed: set[Any]

    def __init__(
        self, tokens: _Tokens, cache: BaseTableCache, start_response: Callable[..., Any]
    ) -> None:
        self._tokens = tokens
        self._cache = cache
        self._start_response = start_response
        self._given: tuple[str, list[tuple[str, str]], Any] | None = None
        self._write: Callable[[bytes], object] | None = None

    def start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Do what ``start_response`` does, but later."""
        if self._given is not None and exc_info is None:
            raise AssertionError("start_response was called twice")
        if self._write is not None:
            # Only an error may do this, and the server raises it.
            self._write = self._start_response(status, headers, exc_info)
        self._given = (status, headers, exc_info)
        return self.write

    def write(self, data: bytes) -> None:
        """Write a part of the body, as old applications do."""
        self._send_start()
        assert self._write is not None
        self._write(data)

    def begin(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """Return the body, with the response begun before its first part."""
        if self._given is not None:
            self._send_start()
            return body  # as it is: it may be a file that the server sends by itself
        return _LazyBody(self, body)

    def _send_start(self) -> None:
        if self._write is not None or self._given is None:
            return
        status, headers, exc_info = self._given
        if self._cache in self.committed:
            try:
                headers = [*headers, *self._tokens.sent(self._cache.commit_token())]
            except Exception as error:
                _no_token(error)
        self._write = (
            self._start_response(status, headers)
            if exc_info is None
            else self._start_response(status, headers, exc_info)
        )


class _LazyBody:
    """The body of an application that starts its response when its body is asked for."""

    def __init__(self, response: _Response, body: Iterable[bytes]) -> None:
        self._response = response
        self._body = body
        self._parts: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        with noting_commits() as committed:
            committed |= self._response.committed
            self._response.committed = committed
            if self._parts is None:
                self._parts = iter(self._body)
            try:
                return next(self._parts)
            finally:
                self._response._send_start()

    def close(self) -> None:
        """Have the application clean up."""
        close = getattr(self._body, "close", None)
        if close is not None:
            close()
