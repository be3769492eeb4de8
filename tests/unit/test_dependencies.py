"""What the package imports is what its installation brings."""

import subprocess
import sys
from importlib.metadata import packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROBE = """
import sys
before = set(sys.modules)
import sa_tablecache, sa_tablecache.__main__, sa_tablecache.middleware, sa_tablecache.testing
print(*sorted({name.partition(".")[0] for name in sys.modules.keys() - before}))
"""
"""What an application imports of the package without any of the extras."""


def _installed_with(
    name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]
) -> set[str]:
    """Return the distributions that installing one brings."""
    name = canonicalize_name(name)
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = {name}
    for line in requires(name) or ():
        needed = Requirement(line)
        marker = needed.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in extras | {""}):
            found |= _installed_with(needed.name, frozenset(needed.extras), seen)
    return found


def test_an_installation_without_extras_can_import_the_package() -> None:
    """Nothing is imported that only an extra, or another package of these tests, brings."""
    process = subprocess.run(
        [sys.executable, "-c", PROBE], check=False, capture_output=True, text=True
    )
    assert not process.returncode, process.stderr
    by_module = packages_distributions()
    imported = {
        canonicalize_name(distribution)
        for module in process.stdout.split()
        if module not in sys.stdlib_module_names
        for distribution in by_module.get(module, ())
    }
    brought = _installed_with("sa-tablecache", frozenset(), set())
    assert {"sqlalchemy", "msgspec", "greenlet"} <= imported
    assert imported <= brought, f"{sorted(imported - brought)} are imported, and not required"
