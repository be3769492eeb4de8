"""Commands for the caches of an application: ``python -m sa_tablecache --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import feed_command, inspecting


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sa_tablecache", description="Commands for the caches of an application."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    inspecting.add_command(commands)
    feed_command.add_command(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
