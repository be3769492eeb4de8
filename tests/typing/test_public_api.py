"""The types of the public API are what the files beside this one say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MINOR = "".join(sqlalchemy.__version__.split(".")[:2])
FILES = [f"tests/typing/{name}.py" for name in ("public_api", f"select_sqlalchemy_{MINOR}")]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this environment in the root of the repository."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_mypy_agrees(tmp_path: Path) -> None:
    """Mypy, strict, finds in the files exactly the errors that they expect."""
    cache = f"--cache-dir={ROOT / '.mypy_cache' / f'sqlalchemy{MINOR}'}"
    done = run("mypy", "--strict", "--explicit-package-bases", cache, *FILES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_agrees() -> None:
    """Pyright finds in the files exactly the errors that they expect."""
    done = run("pyright", "--outputjson", "--pythonpath", sys.executable, *FILES)
    report = json.loads(done.stdout)
    problems = [
        f"{Path(item['file']).name}:{item['range']['start']['line'] + 1}: {item['message']}"
        for item in report["generalDiagnostics"]
        if item["severity"] in {"error", "warning"}
    ]
    assert not problems, "\n".join(problems)
    assert report["summary"]["filesAnalyzed"] == len(FILES)
