"""Whether changes can be read from a server of MariaDB or MySQL, and what it is called meanwhile.

In: a connection, and what a server says of itself. Out: its *era*, a name for as long as nothing
that was committed is taken back; errors that say what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from sa_tablecache.exc import FeedUnavailable

from .contract import VERSION
from .mysql_catalog import denied, error_code
from .mysql_triggers import LOG, PREFIX

META: Final = f"{PREFIX}meta"

_GRANTS: Final = (
    f"the account that polls needs GRANT SELECT, INSERT, DELETE ON {LOG}, "
    f"GRANT SELECT, UPDATE ON {META} and GRANT SELECT ON {PREFIX}watched"
)
NOT_INSTALLED: Final = (1146, 1046)
"""Errors of the server: no such table, no database chosen."""
_NO_SUCH_COLUMN: Final = 1054


_OFF: Final = frozenset(("0", "OFF"))
"""How MySQL and MariaDB write it."""


class Server(NamedTuple):
    """What a server says of itself, in the order of :func:`variables`."""

    last: int
    increment: int
    read_only: str
    innodb_read_only: str
    isolation: str
    host: str
    port: int
    number: int
    uuid: str
    started: int

    @classmethod
    def read(cls, said: str) -> Server:
        """Return it, if changes can be read from it.

        :raises FeedUnavailable: if not.
        """
        server = cls(*json.loads(said))
        if not {server.read_only, server.innodb_read_only} <= _OFF:
            raise FeedUnavailable(
                f"the server {server.host} is read-only, as replicas are: changes are read from "
                "the primary"
            )
        if server.isolation == "READ-UNCOMMITTED":
            raise FeedUnavailable(
                "the connection reads what others have not committed: give the cache a "
                "load_engine= with another isolation level than READ UNCOMMITTED"
            )
        if server.increment != 1:
            raise FeedUnavailable(
                f"auto_increment_increment is {server.increment} on {server.host}: it is set where "
                "several servers write the same tables, and none of them knows in which order; set "
                "it to 1 if only one of them writes"
            )
        return server

    def era(self, incarnation: str) -> str:
        """Return a name for as long as nothing that was committed is taken back.

        A start of the server ends it. InnoDB shows what is committed before it is on the disk: what
        was seen before a crash may be gone after it, and the ids of that are given again.
        """
        parts = self.host, self.port, self.number, self.uuid, self.started
        digest = hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()
        return f"{incarnation}-{digest[:8]}"


def is_mariadb(connection: Connection) -> bool:
    return bool(getattr(connection.dialect, "is_mariadb", False))


def variables(connection: Connection) -> str:
    # UUID_SHORT() begins with the number of the server, and the second in which it was started.
    isolation, uuid = (
        ("@@tx_isolation", "''")
        if is_mariadb(connection)
        else ("@@transaction_isolation", "@@server_uuid")
    )
    return (
        f"CAST(@@read_only AS CHAR), CAST(@@innodb_read_only AS CHAR), {isolation}, "
        f"@@hostname, @@port, @@server_id, {uuid}, UUID_SHORT() >> 24"
    )


def check_primary(connection: Connection) -> None:
    """Refuse a replica, and one of several servers that write.

    An id that was taken on a replica would keep it from what its primary has with that id.

    :raises FeedUnavailable: then, or if it may not be known.
    """
    if is_mariadb(connection):
        status: dict[str, str] = dict(
            connection.exec_driver_sql(
                "SHOW GLOBAL STATUS WHERE variable_name IN ('Slave_running', 'wsrep_cluster_size')"
            ).all()
        )
        replica = status.get("Slave_running") == "ON"
        if int(status.get("wsrep_cluster_size") or 0) > 1:
            raise FeedUnavailable(
                "the server is one of a Galera cluster, whose members do not see what others have "
                "not committed: there is no change feed for it"
            )
    else:
        table = "performance_schema.replication_connection_status"
        try:
            replica = bool(
                connection.exec_driver_sql(
                    f"SELECT COUNT(*) FROM {table} WHERE service_state <> 'OFF' "
                    "AND LEFT(channel_name, 18) <> 'group_replication_'"
                ).scalar()
            )
        except DBAPIError as error:
            if denied(error):
                raise FeedUnavailable(
                    "it may not be known whether the server is a replica: the account that polls "
                    f"needs GRANT SELECT ON {table}"
                ) from error
            raise
    if replica:
        raise FeedUnavailable("the server is a replica: changes are read from the primary")


def check_version(version: int | None) -> None:
    if version not in (VERSION, VERSION - 1):
        raise FeedUnavailable(
            f"the change feed that is installed is of version {version}, and this process reads "
            f"{VERSION} and {VERSION - 1}: deploy the program that goes with it"
        )


@contextmanager
def available() -> Iterator[None]:
    """Say what is missing where the database cannot know it."""
    try:
        yield
    except DBAPIError as error:
        code = error_code(error)
        if code in NOT_INSTALLED:
            what = (
                "no change feed is installed: run cache.install_feed(), or op.create_change_feed()"
            )
        elif code == _NO_SUCH_COLUMN:
            what = "the change feed that is installed is of another version"
        elif denied(error):
            what = f"the change feed may not be used: {_GRANTS}"
        else:
            raise
        raise FeedUnavailable(what) from error
