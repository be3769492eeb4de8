"""The package reads from left to right: a module imports only modules that stand before it.

The order is the map of the package (see CONTRIBUTING.md). Imports inside functions and under
``TYPE_CHECKING`` count as well: an arrow that is drawn late still points somewhere.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sa_tablecache"

ORDER = """
    exc
    scores
    comparison
    criteria
    settings
    options
    turns
    forks
    functions
    view
    readers
    expressions
    joins
    groups
    keys
    analysis
    asking
    actions
    orders
    sorting
    merging
    rows
    records
    storage
    coverage
    redaction
    clauses
    catalog
    loading
    shapes
    prepared
    planner
    changes
    usage
    indexing
    triggers
    layout
    stale
    freshness
    deltas
    replacing
    chunks
    cascades
    wording
    statements
    interests
    returning
    commits
    drivers
    events
    figures
    limits
    slots
    history
    observers
    state
    misses
    keeping
    loads
    table
    feed
    invalidation
    upkeep
    health
    staleness
    following
    running
    modes
    answering
    remembered
    room
    readthrough
    windows
    policies
    explaining
    why
    attempts
    transactions
    problems
    cache
    scopes
    reading
    ranges
    results
    shadow
    listening
    queries
    quick
    session
    metrics
    asyncio
    middleware
    commands
    inspecting
    feed_command
    migrations
    binding
    testing
    __init__
    __main__
""".split()

MAX_LINES = 500
# Modules that may be longer, and how long: the number may fall but not rise.
LONGER: dict[str, int] = {}

MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")
)


def room(module: str) -> str:
    """Return the entry of ORDER that a module belongs to: itself, or its package."""
    return module.partition("/")[0]


def imported_modules(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the room of every import of the package's own modules."""
    package = ["sa_tablecache", *module.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package[: len(package) - node.level + 1]
            base = [*base, *([node.module] if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        for name in names:
            root, _, rest = name.partition(".")
            if root == "sa_tablecache":
                first = rest.partition(".")[0]
                yield node.lineno, first if first in ORDER else "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    """No arrow points back in the order of the package."""
    assert room(module) in ORDER, f"{room(module)} has no place in ORDER: give it one"
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    back = [
        f"{module}.py:{line} imports {target}"
        for line, target in imported_modules(source, module)
        if target != room(module) and ORDER.index(target) >= ORDER.index(room(module))
    ]
    assert not back, "these imports point back: " + ", ".join(back)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_a_room(module: str) -> None:
    """No module grows past what one reads in one go."""
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").count("\n")
    limit = LONGER.get(module, MAX_LINES)
    assert lines <= limit, f"{module}.py has {lines} lines, more than {limit}: split it"


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("from . import exc, scores", ["exc", "scores"]),
        ("from .storage import Storage", ["storage"]),
        ("import sa_tablecache.cache as c", ["cache"]),
        ("from sa_tablecache import CachedView", ["__init__"]),
        ("if TYPE_CHECKING:\n    from .session import CacheSession", ["session"]),
        ("def f():\n    from sa_tablecache.table import CachedTable", ["table"]),
        ("import sqlalchemy\nfrom asyncio import Lock", []),
    ],
)
def test_every_form_of_import_is_seen(source: str, targets: list[str]) -> None:
    """The reader of imports knows relative, absolute, lazy and type-checking imports."""
    assert [target for _, target in imported_modules(source, "planner")] == targets


def test_a_subpackage_reaches_its_neighbours() -> None:
    """Inside a subpackage one dot is the subpackage and two dots are the package."""
    source = "from . import sql\nfrom ..changes import Change"
    targets = [target for _, target in imported_modules(source, "feed/consumer")]
    assert targets == ["feed", "changes"]
