"""The set-ups of docs/testing.md work as they stand there, in a run of pytest of their own."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^```\{code-block\} python\n:caption: (\S+)\n\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


def projects() -> list[dict[str, str]]:
    """Return the files of each set-up: its conftest.py with the application and tests before it."""
    files: dict[str, str] = {}
    found = []
    for name, code in BLOCK.findall((ROOT / "docs" / "testing.md").read_text(encoding="utf-8")):
        files[name] = code
        if name == "conftest.py":
            found.append(dict(files))
    return found


def run_pytest(directory: Path) -> subprocess.CompletedProcess[str]:
    """Run pytest on a project, with warnings as errors and the plugin, installed or not."""
    (directory / "pytest.ini").write_text(
        "[pytest]\n"
        "filterwarnings = error\n"
        "asyncio_mode = auto\n"
        "asyncio_default_fixture_loop_scope = function\n"
    )
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "pytest_asyncio.plugin",
            "-p",
            "pytest_sa_tablecache",
        ],
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "docs")]),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # others take longer than the tests
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("number", range(4))
def test_a_set_up_of_the_manual_works(tmp_path: Path, number: int):
    """Transactions and databases, synchronous and asynchronous: two tests each, in any order."""
    assert len(projects()) == 4
    for name, code in projects()[number].items():
        (tmp_path / name).write_text(code)
    tests = (tmp_path / "test_app.py").read_text()
    # Each once more, so that one follows itself and the other.
    (tmp_path / "test_again.py").write_text(tests)
    done = run_pytest(tmp_path)
    assert "4 passed" in done.stdout, done.stdout + done.stderr
    assert not done.returncode


def test_the_plugin_costs_nothing_until_it_is_used():
    """Loading it imports neither the package nor SQLAlchemy."""
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, pytest_sa_tablecache; assert not {'sqlalchemy'} & set(sys.modules)",
        ],
        cwd=ROOT,
        timeout=60,
        check=True,
    )


def test_the_plugin_is_installed_under_its_name():
    """The entry point is the module, and both are in the wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["entry-points"]["pytest11"] == {
        "pytest_sa_tablecache": "pytest_sa_tablecache"
    }
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert (ROOT / "pytest_sa_tablecache.py").is_file()
    assert "pytest_sa_tablecache.py" in wheel
