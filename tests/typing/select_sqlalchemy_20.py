"""What a select of a view is under SQLAlchemy 2.0; checked by mypy and pyright, never run."""

from typing import assert_type

from sqlalchemy import Select, select

from sa_tablecache import CacheSession
from tests.typing.public_api import FlightBoard


def a_select_carries_the_view() -> None:
    assert_type(select(FlightBoard), Select[tuple[FlightBoard]])
    assert_type(select(FlightBoard, FlightBoard.id), Select[tuple[FlightBoard, int]])


def rows_are_typed(session: CacheSession) -> None:
    record, number = session.execute(select(FlightBoard, FlightBoard.id)).one().t
    assert_type(record, FlightBoard)
    assert_type(number, int)
