"""Declaring views: what is refused, and what records can do."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sqlalchemy import ForeignKey, Integer, String, func, literal, select, text, union
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from sa_tablecache import CachedView, ScoreIndex, ViewDefinitionError
from sa_tablecache.analysis import plan_of
from tests.zoo import Airline, Flight, InnerBoard, Plane, PlaneEntity, WeatherHours

# -- declarations ------------------------------------------------------------------------------


def declare(**namespace: Any) -> Any:
    """Declare a view by the body of its class."""
    return type(CachedView)("Board", (CachedView,), namespace)


PLANES = select(Plane.tailnum, Plane.model, Plane.year)


@pytest.mark.parametrize(
    ("namespace", "message"),
    [
        ({}, "Board has no __select__: give it a select"),
        ({"__select__": "SELECT 1"}, r"Board.__select__ is a str: it has to be a select\(\)"),
        ({"__select__": Plane}, "Board.__select__ is a"),
        ({"__select__": lambda: PLANES}, "Board.__select__ is a function"),
        (
            {"__select__": select(Plane.tailnum, Plane.year + 1)},
            "column 2 of Board.__select__ .*give it one with .label",
        ),
        (
            {"__select__": select(Plane.tailnum, Plane.year.label("model year"))},
            "column 2 of Board.__select__ is called 'model year'",
        ),
        (
            {"__select__": select(Plane.tailnum, Plane.year.label("_year"))},
            "column 2 of Board.__select__ is called '_year'",
        ),
        (
            {"__select__": select(Plane.tailnum, Plane.year.label("class"))},
            "column 2 of Board.__select__ is called 'class'",
        ),
        (
            {"__select__": select(Flight.carrier, Airline.carrier)},
            "Board.__select__ has two columns called 'carrier': rename one",
        ),
        (
            {"__select__": PLANES, "model": ScoreIndex("year")},
            "Board.model is both a column and an index or method",
        ),
        (
            {"__select__": PLANES, "__annotations__": {"modell": Mapped[str]}},
            "Board.modell is annotated, .*it has: tailnum, model, year",
        ),
        (
            {"__select__": PLANES, "__annotations__": {"modell": "Mapped[str]"}},
            "Board.modell is annotated",
        ),
        (
            {"__select__": PLANES, "by_yaer": ScoreIndex("yaer")},
            "Board.by_yaer sorts by 'yaer', but .*it has: tailnum, model, year",
        ),
        ({"__select__": PLANES, "__primary_key__": "tailnum"}, "has to be a tuple of column names"),
        ({"__select__": PLANES, "__primary_key__": ()}, "has to be a tuple of column names"),
        (
            {"__select__": PLANES, "__primary_key__": ("tail",)},
            "Board.__primary_key__ names 'tail', but .*it has: tailnum, model, year",
        ),
    ],
)
def test_a_declaration_that_cannot_be_right_is_refused(
    namespace: dict[str, Any], message: str
) -> None:
    """A select of plain columns is checked when the class is created; the culprit is named."""
    with pytest.raises(ViewDefinitionError, match=message):
        declare(**namespace)


def test_an_index_needs_a_score() -> None:
    """``ScoreIndex()`` says nothing to sort by."""
    with pytest.raises(ViewDefinitionError, match="names no score"):
        ScoreIndex()


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (select(Plane, Airline.name.label("model")), "two columns called 'model'"),
        (union(select(Plane.tailnum.label("a b"))), "is called 'a b'"),
    ],
)
def test_other_selects_are_checked_when_they_are_used(statement: Any, message: str) -> None:
    """Entities and set operations are looked at when the view is, not when it is declared."""
    view = declare(__select__=statement)
    for _ in range(2):
        with pytest.raises(ViewDefinitionError, match=message):
            view.__table__


def test_a_classmethod_must_return_a_select() -> None:
    """What a classmethod returns is looked at when the view is used."""
    view = declare(__select__=classmethod(lambda cls: "SELECT 1"))
    with pytest.raises(ViewDefinitionError, match="it has to be a select"):
        view.__table__
    good = declare(__select__=classmethod(lambda cls: PLANES))
    assert list(good.__table__.c.keys()) == ["tailnum", "model", "year"]


def test_annotations_are_optional_and_may_be_others() -> None:
    """Only what is annotated as ``Mapped`` claims to be a column."""
    view = declare(
        __select__=PLANES, __annotations__={"tailnum": Mapped[str], "note": str, "more": "int"}
    )
    assert view(tailnum="N1", model=None, year=None).tailnum == "N1"


def test_declaring_configures_no_mappers() -> None:
    """A view may be declared before the models that its models refer to."""

    class Later(DeclarativeBase):
        pass

    class Thing(Later):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(String)
        other_id: Mapped[int] = mapped_column(ForeignKey("other.id"))
        other: Mapped[Any] = relationship("Other")

    plain = declare(__select__=select(Thing.id, Thing.name), by_name=ScoreIndex("name"))
    lazy = declare(__select__=classmethod(lambda cls: select(Thing.id).join(Thing.other)))
    entity = declare(__select__=select(Thing))
    assert plain(id=1, name="x").name == "x"
    assert str(plain.name == "x")
    assert not Thing.__mapper__.configured

    class Other(Later):
        __tablename__ = "other"
        id: Mapped[int] = mapped_column(primary_key=True)

    assert plan_of(lazy).tables == {(None, "thing"), (None, "other")}
    assert plan_of(entity).key == ("id",)
    assert plan_of(plain).key == ("id",)


def test_views_of_one_name_are_told_apart_in_sql() -> None:
    """Two classes may have the same name; in one query they have different ones."""
    one, other = declare(__select__=PLANES), declare(__select__=PLANES)
    assert one.__table__.name != other.__table__.name
    rendered = str(select(one.tailnum, other.tailnum).where(one.tailnum == other.tailnum))
    assert f"AS {one.__table__.name}" in rendered
    assert f"AS {other.__table__.name}" in rendered


def test_abstract_bases_share_indexes_and_methods() -> None:
    """A base class that says it is abstract needs no select; subclasses have what it has."""

    class ByYear(CachedView):
        __abstract__ = True

        by_year = ScoreIndex("year")

        @property
        def label(self) -> str:
            """A property of all records."""
            return f"{self.tailnum} ({self.year})"  # type: ignore[attr-defined]

    class Planes(ByYear):
        __select__ = PLANES

    class Others(ByYear):
        __select__ = PLANES

    assert Planes.by_year.view is Planes
    assert Others.by_year.view is Others
    record: Any = Planes(tailnum="N1", model=None, year=2000)
    assert record.label == "N1 (2000)"
    assert isinstance(record, ByYear)
    assert not isinstance(record, Others)


def test_columns_and_indexes_of_the_class_are_sql() -> None:
    """On the class, columns and indexes are expressions; an index with several parts is a tuple."""
    assert "inner_board" in str(select(InnerBoard).where(InnerBoard.carrier == "AA"))
    assert str(InnerBoard.by_hour > 1).startswith("inner_board.hour >")  # type: ignore[operator]
    assert "(inner_board.carrier, inner_board.hour)" in str(
        select(InnerBoard).order_by(InnerBoard.by_carrier)
    )
    assert repr(InnerBoard.by_carrier) == "InnerBoard.by_carrier"
    assert "hour DESC" in str(select(InnerBoard).order_by(InnerBoard.by_hour.desc()))


def test_an_expression_index_is_a_hidden_column() -> None:
    """The database computes the score; ``select(View)`` does not show it."""
    view = declare(
        __select__=PLANES,
        by_age=ScoreIndex(2013 - Plane.year),
        by_both=ScoreIndex("model", func.coalesce(Plane.year, 0)),
    )
    assert view.by_age.column_names == ("_score_by_age",)
    assert view.by_both.column_names == ("model", "_score_by_both_1")
    assert list(view.__table__.c.keys()) == ["tailnum", "model", "year"]
    assert isinstance(view.by_age.columns[0].type, Integer)
    assert "_score_by_age" in str(select(view).where(view.by_age > 5))


def test_a_missing_attribute_is_an_attribute_error() -> None:
    """A name that the view does not have is missing, on the class and on records."""
    record: Any = PlaneEntity(tailnum="N1", model=None, year=None)
    for thing in (PlaneEntity, InnerBoard, record):
        with pytest.raises(AttributeError, match="wingspan"):
            thing.wingspan


# -- records -----------------------------------------------------------------------------------


class Named(CachedView):
    """A view with behaviour of its own."""

    __select__ = select(Plane.tailnum, Plane.model, Plane.year)

    tailnum: Mapped[str]
    model: Mapped[str | None]
    year: Mapped[int | None]

    by_year = ScoreIndex("year")
    fleet = "all"

    @property
    def old(self) -> bool:
        """A property."""
        return self.year is not None and self.year < 1990

    def title(self, *, upper: bool = False) -> str:
        """A method."""
        words = f"{self.model} {self.tailnum}"
        return words.upper() if upper else words

    @classmethod
    def unknown(cls, tailnum: str) -> "Named":
        """A constructor of its own."""
        return cls(tailnum=tailnum, model=None, year=None)

    @staticmethod
    def wheels() -> int:
        """A static method."""
        return 3


def plane(tailnum: str = "N1", model: str | None = "a320", year: int | None = 1985) -> Named:
    """Make a record."""
    return Named(tailnum=tailnum, model=model, year=year)


def test_records_are_made_by_name() -> None:
    """The constructor takes every column, by keyword."""
    assert (plane().tailnum, plane().model, plane().year) == ("N1", "a320", 1985)
    for wrong in ({}, {"tailnum": "N1"}, {"tailnum": "N1", "model": "", "year": 1, "x": 1}):
        with pytest.raises(TypeError):
            Named(**wrong)  # type: ignore[arg-type]


def test_records_are_instances_of_their_view() -> None:
    """``isinstance``, methods, properties and class attributes work as on any class."""
    record = plane()
    assert isinstance(record, Named)
    assert isinstance(record, CachedView)
    assert type(record).__name__ == "Named"
    assert record.old
    assert record.title(upper=True) == "A320 N1"
    assert record.wheels() == 3
    assert record.fleet == "all"
    assert Named.unknown("N2") == plane("N2", None, None)


def test_records_compare_by_value_and_hash_by_key() -> None:
    """Records are equal if all their columns are; equal keys have equal hashes."""
    assert plane() == plane()
    assert plane() != plane(year=1986)
    assert hash(plane()) == hash(plane(year=1986))
    assert len({plane(), plane(), plane("N2")}) == 2
    assert plane() != InnerBoard(id=1, hour=None, carrier="", delay=None, airline="")  # type: ignore[arg-type]
    composite: Any = WeatherHours(origin="JFK", hour=1, temp=None)  # type: ignore[arg-type, call-arg]
    assert hash(composite) == hash(WeatherHours(origin="JFK", hour=1, temp=3))  # type: ignore


def test_records_are_immutable() -> None:
    """Nothing of a record can be set or deleted."""
    record: Any = plane()
    with pytest.raises(AttributeError):
        record.year = 1
    with pytest.raises(AttributeError):
        del record.year
    with pytest.raises(AttributeError):
        record.colour = "red"
    assert record == plane()


def test_records_can_be_pickled_and_copied() -> None:
    """A record survives pickle, copy and deepcopy; what comes back is of the same class."""
    record: Any = PlaneEntity(tailnum="N1", model="a320", year=None)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(record, protocol))
        assert again == record
        assert type(again) is type(record)
    for again in (copy.copy(record), copy.deepcopy(record)):
        assert again == record
        assert isinstance(again, PlaneEntity)


def test_records_become_dictionaries_and_json() -> None:
    """``_asdict`` has the columns in their order, and msgspec encodes them."""
    assert plane()._asdict() == {"tailnum": "N1", "model": "a320", "year": 1985}
    assert list(plane()._asdict()) == ["tailnum", "model", "year"]
    assert msgspec.json.encode(plane()) == b'{"tailnum":"N1","model":"a320","year":1985}'
    assert msgspec.json.decode(msgspec.json.encode([plane()])) == [plane()._asdict()]


def test_records_can_be_read_from_attributes() -> None:
    """What reads attributes by name, as pydantic's ``from_attributes`` does, takes records."""
    record = plane()
    copied = SimpleNamespace(**{name: getattr(record, name) for name in record._asdict()})
    assert vars(copied) == record._asdict()


def test_records_show_their_values() -> None:
    """A record in a log or an assertion can be read."""
    assert repr(plane()) == "Named(tailnum='N1', model='a320', year=1985)"


def test_a_view_of_one_column_works_as_well() -> None:
    """One column is enough for a record, a key, a hash and a pickle."""
    view = declare(__select__=select(Airline.carrier))
    record = view(carrier="AA")
    assert record._asdict() == {"carrier": "AA"}
    assert hash(record) == hash(view(carrier="AA"))


def test_matching_by_attribute() -> None:
    """Records can be taken apart in ``match`` by the names of their columns."""
    match plane():
        case Named(tailnum=tailnum, year=year):
            assert (tailnum, year) == ("N1", 1985)
        case _:
            pytest.fail("no match")


def test_text_and_literals_in_a_select() -> None:
    """``text()`` has no name; a literal may be given one."""
    with pytest.raises(ViewDefinitionError):
        declare(__select__=select(Plane.tailnum, text("1"))).__plan__
    view = declare(__select__=select(Plane.tailnum, literal(1).label("one")))
    assert view(tailnum="N1", one=1).one == 1


def test_a_derived_view_is_a_view_of_its_own() -> None:
    """What a base view has worked out is not taken for that of the views derived from it."""
    base = declare(__select__=select(Plane.tailnum, Plane.model))
    early = type("Early", (base,), {})
    bases = [base, early]
    for view in bases:
        assert view.__plan__.view is view
        assert view.tailnum.table is view.__table__
    late = type("Late", (base,), {"__primary_key__": ("model",)})
    assert late.__plan__.key == ("model",)
    assert base.__plan__.key == ("tailnum",)
    assert {v.__record__.__mro__[1] for v in (*bases, late)} == {*bases, late}


@pytest.mark.parametrize("entity", [select(Plane), classmethod(lambda _: select(Plane))])
def test_a_derived_view_of_entities_is_a_view_of_its_own(entity: Any) -> None:
    """The same where columns are known when a view is first used, whichever is used first."""
    base = declare(__select__=entity)
    early = type("Early", (base,), {})
    assert base.tailnum.table is base.__table__
    late = type("Late", (early,), {})
    for view in (base, early, late):
        assert view.tailnum.table is view.__table__
        assert view.__table__.view is view
        assert view.__plan__.view is view
        assert isinstance(view(tailnum="N1", model=None, year=None), view)
