"""Every example of the manual, of the README and of docstrings does what it says.

A page is run from top to bottom in one namespace, in a directory of its own. A block that is
fenced as `python` is a doctest if it begins with a prompt, and a program if not.
"""

import doctest
import gc
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import Engine

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    "sa_tablecache" if path.stem == "__init__" else f"sa_tablecache.{path.stem}"
    for path in (ROOT / "sa_tablecache").glob("*.py")
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def _directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs")
    # Each page has models of its own: autogenerate looks at all views over them.
    monkeypatch.delitem(sys.modules, "board", raising=False)


def check(examples: doctest.DocTest) -> None:
    """Run the examples of a doctest; whatever they print beside the expected is a failure."""
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(examples, out=report.append, clear_globs=False)
    if runner.failures:
        pytest.fail("".join(report), pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_does_what_it_says(page: Path) -> None:
    """The blocks of a page run one after another, each with what those before it defined."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": f"page_{page.stem}"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        if block[1].startswith(">>> "):
            parser = doctest.DocTestParser()
            examples = parser.get_doctest(block[1], namespace, page.name, str(page), line)
            check(examples)
            namespace.update(examples.globs)
        else:
            exec(compile("\n" * line + block[1], page, "exec"), namespace)
    for value in namespace.values():
        if isinstance(value, Engine):
            value.dispose()  # as the process of an application does, by ending
    namespace.clear()
    gc.collect()  # a connection that an example forgot is this test's failure, not a later one's


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_do_what_they_say(name: str) -> None:
    """The examples in the docstrings of a module are right."""
    module: ModuleType = importlib.import_module(name)
    for examples in doctest.DocTestFinder(exclude_empty=True).find(module):
        check(examples)
