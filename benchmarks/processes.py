"""Processes of their own, which are asked things and answer, a line each.

What is measured in one of them is not disturbed by what another holds in memory, and yet they can
take turns, so that a busy machine slows them alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any


class Process:
    """A module of this package that runs as a program, seen from outside."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._name = " ".join((module, *arguments[:1]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.ready = self.answer()
        """What it said when it was ready."""

    def tell(self, question: Any) -> None:
        """Ask it something, without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")

    def answer(self) -> Any:
        """Wait for its next answer.

        :raises RuntimeError: if it has ended instead.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with {self._process.wait()}")
        return json.loads(line)

    def ask(self, question: Any) -> Any:
        """Ask it something, and wait for the answer."""
        self.tell(question)
        return self.answer()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def say(what: Any) -> None:
    """Answer, in such a process."""
    print(json.dumps(what), flush=True)


def questions() -> Iterator[Any]:
    """Iterate over what such a process is asked."""
    return map(json.loads, iter(sys.stdin.readline, ""))


def answer_all(answers: Callable[[Any], Any], ready: Any) -> None:
    """Say that such a process is ready, and answer what it is asked until nobody asks."""
    say(ready)
    for question in questions():
        say(answers(question))
