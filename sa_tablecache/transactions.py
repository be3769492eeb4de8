"""Transactions that run again when they meet a conflict.

In: a factory of sessions, and a function that takes a session. Out: the function without that
parameter; a call runs it in a SERIALIZABLE transaction of a fresh session, commits, and on a
conflict does all of that again. :class:`Transaction` is the same as a block that runs once.

It works on any SQLAlchemy engine of PostgreSQL, MariaDB, MySQL or SQLite, with or without a cache.
There is one implementation, the synchronous one. An ``async def`` function runs through it in a
greenlet, which awaits the function where the other one is called.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import (
    Any,
    Concatenate,
    Final,
    Generic,
    NoReturn,
    ParamSpec,
    Protocol,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.util import await_only, greenlet_spawn

from .attempts import Attempt, enter, is_conflict, leave, outer_transaction
from .exc import TransactionConflict, TransactionError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
S = TypeVar("S", bound=Session)
S_co = TypeVar("S_co", bound=Session, covariant=True)
A = TypeVar("A", bound=AsyncSession)
A_co = TypeVar("A_co", bound=AsyncSession, covariant=True)
E = TypeVar("E", bound=Session | AsyncSession)
OnRetry = Callable[[int, DBAPIError], Any]


class TransactionOptions(TypedDict, total=False):
    """The options of :func:`in_transaction`."""

    relaxed: bool
    tries: int
    timeout: float | None
    on_retry: OnRetry | None


FIRST_PAUSE: Final = 0.01
LONGEST_PAUSE: Final = 1.0

# Tests step through the tries with these.
_sleep = time.sleep
_sleep_async = asyncio.sleep
_random = random.random
_now = time.monotonic


# -- trying ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tries:
    """How one decorated function is tried."""

    name: str
    factory: Any
    relaxed: bool
    tries: int
    timeout: float | None
    on_retry: OnRetry | None

    def call(self, kind: type[Any], fn: Callable[[Any], R]) -> R:
        """Call a function with a session: in the transaction outside, or in one of its own."""
        outer = outer_transaction(self.factory)
        if outer is None:
            return self._try(kind, fn)
        if outer.relaxed and not self.relaxed:
            raise TransactionError(
                f"{self.name} asks for a SERIALIZABLE transaction inside a relaxed one: make the "
                "outer one strict, or this one relaxed=True"
            )
        return fn(outer.session)

    def _try(self, kind: type[Any], fn: Callable[[Any], R]) -> R:
        start = _now()
        number = 0
        while True:
            number += 1
            session = _new(self.factory, kind)
            attempt = Attempt(_sync(session), self.relaxed)
            try:
                attempt.begin()
                mine = enter(self.factory, session, self.relaxed)
                try:
                    result = fn(session)
                finally:
                    leave(mine)
                attempt.commit()
                return result
            except Exception as error:
                conflict = _conflict_behind(attempt, error)
                if conflict is None:
                    raise
            finally:
                _close(session)
            pause = self._pause(number, _now() - start, conflict)
            _sleep(pause) if kind is Session else await_only(_sleep_async(pause))

    def _pause(self, number: int, seconds: float, conflict: DBAPIError) -> float:
        """Return the seconds to wait after a try.

        :raises TransactionConflict: if it was the last one.
        """
        # Full jitter: those that met once do not meet again at the end of equal pauses.
        pause = _random() * min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(number - 1, 30))
        late = self.timeout is not None and seconds + pause > self.timeout
        if number >= self.tries or late:
            limit = f"timeout={self.timeout:g}" if late else f"tries={self.tries}"
            raise TransactionConflict(
                f"{self.name} met other transactions in each of its tries, {number} until "
                f"{limit}: {conflict.orig}"
            ) from conflict
        if self.on_retry is not None:
            self.on_retry(number, conflict)
        return pause


def _new(factory: Any, kind: type[Any]) -> Any:
    session = factory()
    if not isinstance(session, kind):
        raise TransactionError(
            f"{factory!r} returned a {type(session).__name__}, where a {kind.__name__} is needed: "
            "`async` goes with an async_sessionmaker, and only with that"
        )
    if session.in_transaction():  # it is somebody's, and is not to be closed here
        raise TransactionError(
            f"{factory!r} returned a session that is in a transaction already: it has to make "
            "a new one for each call"
        )
    return session


def _sync(session: Any) -> Session:
    return cast("Session", getattr(session, "sync_session", session))


def _close(session: Session | AsyncSession) -> None:
    """Close a session, whatever happens to the task meanwhile: as ``async with`` does."""
    if isinstance(session, Session):
        session.close()
    else:
        await_only(asyncio.shield(asyncio.create_task(session.close())))


def _conflict_behind(attempt: Attempt, error: Exception) -> DBAPIError | None:
    """Return the conflict because of which an attempt failed; ``None`` if it is another error."""
    if is_conflict(error):
        return cast("DBAPIError", error)
    # After a conflict that was swallowed SQLAlchemy and the database complain of what follows.
    return attempt.conflict if isinstance(error, SQLAlchemyError) else None


# -- the decorator -----------------------------------------------------------------------------


class SyncDecorator(Protocol[S_co]):
    """What makes ``f(x)`` of ``f(session, x)``, and a method of a method."""

    @overload
    def __call__(self, fn: Callable[Concatenate[S_co, P], R], /) -> Callable[P, R]: ...
    @overload
    def __call__(
        self, fn: Callable[Concatenate[T, S_co, P], R], /
    ) -> Callable[Concatenate[T, P], R]: ...


class AsyncDecorator(Protocol[A_co]):
    """The same for ``async def``."""

    @overload
    def __call__(
        self, fn: Callable[Concatenate[A_co, P], Coroutine[Any, Any, R]], /
    ) -> Callable[P, Coroutine[Any, Any, R]]: ...
    @overload
    def __call__(
        self, fn: Callable[Concatenate[T, A_co, P], Coroutine[Any, Any, R]], /
    ) -> Callable[Concatenate[T, P], Coroutine[Any, Any, R]]: ...


@overload
def in_transaction(
    factory: Callable[[], S], **options: Unpack[TransactionOptions]
) -> SyncDecorator[S]: ...
@overload
def in_transaction(
    factory: Callable[[], A], **options: Unpack[TransactionOptions]
) -> AsyncDecorator[A]: ...


def in_transaction(
    factory: Any,
    *,
    relaxed: bool = False,
    tries: int = 5,
    timeout: float | None = None,
    on_retry: OnRetry | None = None,
) -> Any:
    """Have a function run in a transaction, and again when it meets a conflict; a decorator.

    ::

        @in_transaction(Session)
        def transfer(session, source, target, amount):
            session.get_one(Account, source).balance -= amount
            session.get_one(Account, target).balance += amount

        transfer("savings", "daily", 100)

    The function takes a session as its first parameter (a method: after ``self`` or ``cls``), and
    is called without it. Its transaction is SERIALIZABLE: as if no other ran at the same time.
    It is committed when the function returns. Whatever the function raises discards everything and
    propagates. On a conflict the whole function runs again in a fresh session, after a short random
    pause; so what it does beside the database is to be harmless when done twice.

    Inside such a function, another one of the same factory joins its transaction. In a child task
    or another thread it has a transaction of its own.

    Costs a BEGIN on SQLite, two short statements on MariaDB, and for each new connection one that
    asks for its level.

    :param factory: a ``sessionmaker``, a ``Session`` class, or what else makes a new session for
        each call; for ``async def`` functions an ``async_sessionmaker`` or the like.
    :param relaxed: for REPEATABLE READ, which lets write skew and double inserts happen.
    :param tries: how often the function runs at most.
    :param timeout: in seconds: no try begins later than that after the first.
    :param on_retry: called before each pause with the number of the try that failed, and the error.
    :raises TransactionConflict: after the last try, from the error of the database.
    :raises TransactionError: now, if this cannot work; when called, if the engine cannot do it.
    """
    return decorator(factory, _is_async(factory), relaxed, tries, timeout, on_retry)


def decorator(
    factory: Any,
    asynchronous: bool | None,
    relaxed: bool = False,
    tries: int = 5,
    timeout: float | None = None,
    on_retry: OnRetry | None = None,
) -> Any:
    """Return the decorator of :func:`in_transaction`.

    :param asynchronous: whether the sessions are; ``None`` if only a call will tell.
    """
    factory = _checked_factory(factory)
    if type(tries) is not int or tries < 1:
        raise TransactionError(f"in_transaction: tries={tries!r} is no number of tries, 1 or more")
    if timeout is not None and not timeout >= 0:
        raise TransactionError(f"in_transaction: timeout={timeout!r} is no number of seconds")
    if inspect.iscoroutinefunction(on_retry):
        raise TransactionError("in_transaction: on_retry is called, not awaited: not async, please")

    def decorate(fn: Any) -> Any:
        name = getattr(fn, "__qualname__", repr(fn))
        is_async = _checked_function(fn, name, asynchronous)
        at, signature = _without_session(fn, name)
        how = _Tries(name, factory, relaxed, tries, timeout, on_retry)

        @wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return how.call(Session, lambda s: fn(*args[:at], s, *args[at:], **kwargs))

        @wraps(fn)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return await greenlet_spawn(
                how.call,
                AsyncSession,
                lambda s: await_only(fn(*args[:at], s, *args[at:], **kwargs)),
            )

        decorated: Any = call_async if is_async else call
        decorated.__signature__ = signature
        return decorated

    return decorate


def _checked_factory(factory: Any) -> Any:
    """Return what makes new sessions: not a registry, which returns the one of its scope."""
    if isinstance(factory, scoped_session | async_scoped_session):
        return factory.session_factory
    if not callable(factory):
        raise TransactionError(
            f"{factory!r} makes no sessions: give a sessionmaker, a Session class or a function"
        )
    return factory


def _is_async(factory: Any) -> bool | None:
    """Whether a factory makes asynchronous sessions; ``None`` if only a call will tell."""
    factory = _checked_factory(factory)
    if isinstance(factory, sessionmaker | async_sessionmaker):
        return isinstance(factory, async_sessionmaker)
    if isinstance(factory, type) and issubclass(factory, Session | AsyncSession):
        return issubclass(factory, AsyncSession)
    return None


def _checked_function(fn: Any, name: str, asynchronous: bool | None) -> bool:
    if isinstance(fn, staticmethod | classmethod):
        kind = type(fn).__name__
        raise TransactionError(f"{name}: put in_transaction below @{kind}, next to the function")
    if not callable(fn):
        raise TransactionError(f"in_transaction decorates functions, and {fn!r} is none")
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise TransactionError(
            f"{name} is a generator, whose body would run after the transaction: return a list"
        )
    is_async = inspect.iscoroutinefunction(fn)
    if asynchronous is not None and asynchronous != is_async:
        raise TransactionError(
            f"{name} is {'async' if is_async else 'not async'}, and its factory makes "
            f"{'asynchronous' if asynchronous else 'synchronous'} sessions: use "
            f"{'an async_sessionmaker' if is_async else 'a sessionmaker'}, or change the function"
        )
    return is_async


def _without_session(fn: Any, name: str) -> tuple[int, inspect.Signature]:
    """Return which of its positional parameters is the session, and the signature without it."""
    signature = inspect.signature(fn)
    parameters = list(signature.parameters.values())
    position = 1 if parameters and parameters[0].name in ("self", "cls") else 0
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    if len(parameters) <= position or parameters[position].kind not in positional:
        raise TransactionError(
            f"{name} takes no session: make it the first parameter, after self or cls"
        )
    if parameters[position].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[position]
    return position, signature.replace(parameters=parameters)


# -- the block ---------------------------------------------------------------------------------


class _Abort(BaseException):
    """Leaves the block of one transaction."""

    def __init__(self, transaction: Any) -> None:
        super().__init__("Transaction.abort() was called")
        self.transaction = transaction


class Transaction(Generic[E]):
    """A block of code in one isolated transaction, without retries.

    ::

        with Transaction(Session) as txn:
            account = txn.session.get_one(Account, "daily")
            if account.balance < 100:
                txn.abort()
            account.balance -= 100

    It is committed at the end of the block. An exception discards everything and propagates. With
    an ``async_sessionmaker`` it is ``async with``.

    :param factory: as for :func:`in_transaction`.
    :param relaxed: for REPEATABLE READ instead of SERIALIZABLE.
    :raises TransactionConflict: for a conflict, in the block or at COMMIT, from the error of the
        database.
    :raises TransactionError: if the engine cannot do it, or the block is inside another transaction
        of the same factory.
    """

    session: E
    """The session of the block."""

    def __init__(self, factory: Callable[[], E], relaxed: bool = False) -> None:
        self._factory = _checked_factory(factory)
        self._relaxed = relaxed
        self._attempt: Attempt | None = None

    def abort(self) -> NoReturn:
        """Discard everything, and leave the block quietly."""
        raise _Abort(self)

    def _open(self, kind: type[Any]) -> None:
        if self._attempt is not None:
            raise TransactionError("a Transaction is used once: make another one")
        if outer_transaction(self._factory) is not None:
            raise TransactionError(
                "a Transaction cannot be inside another transaction of the same factory, without "
                "which it could not commit: use session.begin_nested(), or in_transaction, which "
                "joins"
            )
        self.session = _new(self._factory, kind)
        self._attempt = Attempt(_sync(self.session), self._relaxed)
        try:
            self._attempt.begin()
        except BaseException as error:
            _close(self.session)
            self._raise_conflict(error)
            raise
        self._mine = enter(self._factory, self.session, self._relaxed)

    def _end(self, error: BaseException | None) -> bool:
        """Commit, or discard everything; return whether an error ends here."""
        assert self._attempt is not None
        leave(self._mine)
        try:
            if error is None:
                self._attempt.commit()
        except BaseException as at_commit:
            self._raise_conflict(at_commit)
            raise
        finally:
            _close(self.session)
        self._raise_conflict(error)
        return isinstance(error, _Abort) and error.transaction is self

    def _raise_conflict(self, error: BaseException | None) -> None:
        assert self._attempt is not None
        if isinstance(error, Exception):
            conflict = _conflict_behind(self._attempt, error)
            if conflict is not None:
                raise TransactionConflict(
                    f"the transaction met another one: {conflict.orig}"
                ) from conflict

    def __enter__(self) -> Self:
        self._open(Session)
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        return self._end(error)

    async def __aenter__(self) -> Self:
        await greenlet_spawn(self._open, AsyncSession)
        return self

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        return await greenlet_spawn(self._end, error)
