"""Stopping loads and refreshes at the place where it hurts."""

import threading
from collections.abc import Callable
from typing import Any

from sa_tablecache.table import CachedTable


class Held:
    """A pause point of a table: what gets there waits until it is let go, once."""

    def __init__(self, table: CachedTable, point: str) -> None:
        self.reached = threading.Event()
        self._go = threading.Event()
        original = table._pause

        def pause(at: str) -> None:
            if at == point and not self.reached.is_set():
                self.reached.set()
                assert self._go.wait(20), "never let go"
            original(at)

        table._pause = pause  # type: ignore[method-assign]

    def let_go(self) -> None:
        """Let what waits go on."""
        self._go.set()


class Running:
    """Something that runs in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._result = work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def result(self) -> Any:
        """Wait for the end, and return or raise what came of it."""
        self._thread.join(20)
        assert not self._thread.is_alive(), "it never ended"
        if self._error is not None:
            raise self._error
        return self._result
