"""A project with Alembic migrations, for tests: a directory of its own, one database."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import psycopg
import pymysql
from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Engine, MetaData, create_engine
from sqlalchemy.pool import NullPool

ENVIRONMENT = """
from alembic import context

given = context.config.attributes
options = dict(
    target_metadata=given["metadata"],
    autogenerate_plugins=["alembic.autogenerate.*", "sa_tablecache"],
) | given["options"]
if context.is_offline_mode():
    context.configure(url=given["url"], literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    with given["engine"].connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
"""

TEMPLATE = """
from alembic import op
import sqlalchemy as sa
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = depends_on = None

def upgrade():
    ${upgrades if upgrades else "pass"}

def downgrade():
    ${downgrades if downgrades else "pass"}
"""


@dataclass
class Project:
    """A directory with migrations, and the database that they are made for.

    :param options: further arguments of ``context.configure()``.
    """

    directory: Path
    url: URL
    metadata: MetaData | list[MetaData]
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.directory / "versions").mkdir(parents=True)
        (self.directory / "env.py").write_text(ENVIRONMENT, encoding="utf-8")
        (self.directory / "script.py.mako").write_text(TEMPLATE, encoding="utf-8")
        self.engine: Engine = create_engine(self.url, poolclass=NullPool)
        self.number = 0

    def _config(self, output: StringIO | None = None) -> Config:
        config = Config(stdout=StringIO(), output_buffer=output)
        config.set_main_option("script_location", str(self.directory))
        config.set_main_option("path_separator", "os")
        config.attributes.update(
            url=self.url.render_as_string(hide_password=False),
            engine=self.engine,
            metadata=self.metadata,
            options=self.options,
        )
        return config

    def autogenerate(self) -> str:
        """Make a migration of what differs; return the lines of its two functions."""
        return self._body(self._revision(autogenerate=True))

    def revision(self, upgrade: str, downgrade: str = "pass") -> None:
        """Make a migration by hand."""
        path = self._revision()
        text = path.read_text(encoding="utf-8")
        head, _, _ = text.partition("def upgrade():")
        functions = f"def upgrade():\n    {upgrade}\n\ndef downgrade():\n    {downgrade}\n"
        path.write_text(head + functions, encoding="utf-8")

    def _revision(self, *, autogenerate: bool = False) -> Path:
        self.number += 1
        name = f"{self.number:04}"
        script: Any = command.revision(
            self._config(), rev_id=name, message="m", autogenerate=autogenerate
        )
        return Path(script.path)

    @staticmethod
    def _body(path: Path) -> str:
        _, _, body = path.read_text(encoding="utf-8").partition("def upgrade():")
        lines = [line.strip() for line in body.splitlines()]
        return "\n".join(line for line in lines if line and not line.startswith("#"))

    def upgrade(self, to: str = "head") -> None:
        """Run migrations."""
        command.upgrade(self._config(), to)

    def downgrade(self, to: str) -> None:
        """Take migrations back."""
        command.downgrade(self._config(), to)

    def check(self) -> None:
        """Run ``alembic check``, which raises if autogenerate finds anything."""
        command.check(self._config())

    def migrate(self) -> str:
        """Make a migration of what differs, run it, and see that nothing differs any more."""
        body = self.autogenerate()
        self.upgrade()
        self.check()
        return body

    def sql(self, to: str = "head", *, downgrade: bool = False) -> str:
        """Return what ``alembic upgrade --sql`` prints."""
        output = StringIO()
        run = command.downgrade if downgrade else command.upgrade
        run(self._config(output), to, sql=True)
        return output.getvalue()


@contextmanager
def project(directory: Path, url: URL, metadata: Any, **options: Any) -> Iterator[Project]:
    """Lend a project."""
    made = Project(directory, url, metadata, options)
    try:
        yield made
    finally:
        made.engine.dispose()


def run_script(url: URL, script: str) -> None:
    """Run SQL as the command line client of the database does."""
    match url.get_backend_name():
        case "sqlite":
            connection = sqlite3.connect(str(url.database))
            connection.executescript(script)
            connection.close()
        case "postgresql":
            where = url.set(drivername="postgresql").render_as_string(hide_password=False)
            with psycopg.connect(where, autocommit=True) as postgresql:
                postgresql.execute(script)  # type: ignore[arg-type]
        case "mysql":
            password = {"password": url.password} if url.password else {}
            mysql = pymysql.connect(
                host=url.host,
                port=url.port or 3306,
                user=url.username,
                database=url.database,
                autocommit=True,
                **password,
            )
            with mysql, mysql.cursor() as cursor:
                for statement in _statements(script):
                    cursor.execute(statement)


def _statements(script: str) -> Iterator[str]:
    """Cut a script into statements as the client of MariaDB and MySQL does."""
    delimiter, statement = ";", ""
    for line in script.splitlines():
        if line.startswith("DELIMITER "):
            delimiter = line.split()[1]
        elif not line.startswith("--"):
            statement += line + "\n"
            if line.rstrip().endswith(delimiter):
                yield statement.rstrip()[: -len(delimiter)]
                statement = ""
    assert not statement.strip(), statement
