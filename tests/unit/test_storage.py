"""Records in all their orders are checked against plain lists, after every one of many changes."""

import gc
import random
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import msgspec
import pytest

from sa_tablecache import merging, records, sorting
from sa_tablecache import storage as storage_module
from sa_tablecache.exc import TableCacheError
from sa_tablecache.orders import NAN, Order, Part
from sa_tablecache.records import SortedRecords
from sa_tablecache.scores import EVERYTHING, MAX, MIN, NULLS_FIRST, NULLS_LAST, Interval
from sa_tablecache.storage import Storage


class Row:
    """A record: compared by identity, like the ones that storage moves about."""

    __slots__ = ("id", "label", "opaque", "ratio", "score")

    def __init__(self, id: int, score: int | None, label: str, opaque: Any, ratio: float) -> None:
        self.id = id
        self.score = score
        self.label = label
        self.opaque = opaque
        self.ratio = ratio

    def __repr__(self) -> str:
        return f"Row({self.id}, {self.score}, {self.label!r}, {self.opaque!r}, {self.ratio})"


class Opaque:
    """A key without an order, of which many have the same hash."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and self.number == other.number

    def __hash__(self) -> int:
        return self.number % 3

    def __repr__(self) -> str:
        return f"Opaque({self.number})"


Pair = tuple[Row, tuple[Any, ...] | None]
KeyOf = Callable[[Row, Any], tuple[Any, ...]]


def nullable(value: Any, *, nulls_first: bool) -> tuple[int, Any]:
    """A sort key for a value that may be NULL, made without the extremes of the package."""
    return ((-1 if nulls_first else 1), 0) if value is None else (0, value)


def orders_of(
    kind: str, *, nulls_first: bool
) -> tuple[list[Order], dict[str, KeyOf], Callable[[random.Random], tuple[Any, ...] | None]]:
    """The orders of one kind of view, the same said naively, and a maker of hidden values."""
    key = Part("id", nullable=False)
    orders = [Order("", (key,), 1, nulls_first)]
    naive: dict[str, KeyOf] = {"": lambda row, _: (row.id,)}
    hidden: Callable[[random.Random], tuple[Any, ...] | None] = lambda _: None  # noqa: E731
    match kind:
        case "plain":
            orders.append(Order("by", (Part("label", nullable=False), key), 1, nulls_first))
            naive["by"] = lambda row, _: (row.label, row.id)
        case "nullable":
            orders.append(Order("by", (Part("score", nullable=True), key), 1, nulls_first))
            naive["by"] = lambda row, _: (nullable(row.score, nulls_first=nulls_first), row.id)
        case "nan":
            part = Part("ratio", nullable=False, nan=True)
            orders.append(Order("by", (part, key), 1, nulls_first))
            naive["by"] = lambda row, _: (
                (1, 0.0) if row.ratio != row.ratio else (0, row.ratio),
                row.id,
            )
        case "hidden":
            part = Part("_score", nullable=True, hidden=1)
            orders.append(Order("by", (part, Part("label", False), key), 2, nulls_first))
            naive["by"] = lambda row, h: (
                nullable(h[1], nulls_first=nulls_first),
                row.label,
                row.id,
            )
            hidden = lambda chance: ("aside", chance.choice([None, *range(5)]))  # noqa: E731
        case "hidden ties":
            part = Part("_score", nullable=True, hidden=1)
            orders.append(Order("by", (part, key), 1, nulls_first))
            naive["by"] = lambda row, h: (nullable(h[1], nulls_first=nulls_first), row.id)
            hidden = lambda chance: ("aside", chance.choice([None, 7]))  # noqa: E731
        case "hidden alone":
            orders.append(Order("by", (Part("_unique", False, hidden=0),), 1, nulls_first))
            naive["by"] = lambda _, h: (h[0],)
            hidden = lambda chance: (chance.random(),)  # noqa: E731
        case "hashed":
            orders[0] = Order("", (Part("opaque", nullable=False, hashed=True),), 1, nulls_first)
            naive[""] = lambda row, _: (hash(row.opaque),)
            by = (Part("score", True), Part("opaque", nullable=False, hashed=True))
            orders.append(Order("by", by, 1, nulls_first))
            naive["by"] = lambda row, _: (
                nullable(row.score, nulls_first=nulls_first),
                hash(row.opaque),
            )
    return orders, naive, hidden


def second(_: object, hidden: Any) -> Any:
    """Return the hidden values of a record."""
    return hidden


KINDS = ["plain", "nullable", "nan", "hidden", "hidden ties", "hidden alone", "hashed"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four records, so that few records already fill, split and empty some."""
    monkeypatch.setattr(storage_module, "CHUNK", 4)
    monkeypatch.setattr(records, "CHUNK", 4)
    monkeypatch.setattr(merging, "CHUNK", 4)
    monkeypatch.setattr(sorting, "STEP", 16)
    monkeypatch.setattr(sorting, "SAMPLE", 4)


def is_before(key: tuple[Any, ...], cut: tuple[Any, ...]) -> bool:
    """Whether a key comes before a cut, said without comparing the two."""
    prefix = cut[:-1]
    start = key[: len(prefix)]
    return start < prefix or (start == prefix and cut[-1] is MAX)


class Model:
    """What a storage should hold, as a list of records with their hidden values."""

    def __init__(self, kind: str, seed: int, *, nulls_first: bool) -> None:
        self.chance = random.Random(f"{kind}{seed}")
        self.orders, self.naive, self.make_hidden = orders_of(kind, nulls_first=nulls_first)
        self.pairs: list[Pair] = []
        self.ids: Iterator[int] = iter(self.chance.sample(range(10**6), 20_000))

    def row(self, id: int | None = None) -> Pair:
        """Make a new record."""
        chance = self.chance
        number = next(self.ids) if id is None else id
        return (
            Row(
                number,
                chance.choice([None, *range(6)]),
                chance.choice("abc"),
                Opaque(number),
                chance.choice([0.0, 1.5, float("nan"), float("inf")]),
            ),
            self.make_hidden(chance),
        )

    def rows(self, count: int) -> list[Pair]:
        """Make some new records."""
        return [self.row() for _ in range(count)]

    def build(self) -> Storage:
        """Build a storage from scratch."""
        hidden = [h for _, h in self.pairs]
        return Storage.build(
            self.orders,
            {},
            [row for row, _ in self.pairs],
            None if None in hidden else hidden,  # type: ignore[arg-type]
        )

    def sorted(self, name: str) -> list[Pair]:
        """The records in one order."""
        return sorted(self.pairs, key=lambda pair: self.naive[name](*pair))

    def compare(self, storage: Storage) -> None:
        """Assert that a storage holds what it should, in every order."""
        storage._check()
        assert len(storage) == len(self.pairs)
        hidden_of = {id(row): hidden for row, hidden in self.pairs}
        assert {id(row): hidden for row, hidden in storage.pairs()} == hidden_of
        for order in self.orders:
            records = storage.orders[order.name]
            found = list(records)
            assert len(records) == len(found)
            keys = [self.naive[order.name](row, hidden_of[id(row)]) for row in found]
            assert keys == sorted(keys)
            assert sorted(map(id, found)) == sorted(hidden_of)
            self.compare_slices(order, records, found, hidden_of)

    def compare_slices(
        self, order: Order, records: SortedRecords, found: list[Row], hidden_of: dict[int, Any]
    ) -> None:
        """Assert that slices between random cuts are those of a list."""
        keys = [order.key_of(row, hidden_of[id(row)]) for row in found]
        for _ in range(3):
            cuts = [self.cut(keys), self.cut(keys)]
            if self.chance.random() < 0.9:
                cuts.sort()
            interval = Interval(*cuts)
            inside = [is_before(key, cuts[1]) and not is_before(key, cuts[0]) for key in keys]
            wanted = [row for row, is_in in zip(found, inside, strict=True) if is_in]
            assert records.between(interval) == wanted
            assert records.count(interval) == len(wanted)
            limit = self.chance.randrange(8)
            assert records.some(interval, limit) == wanted[:limit]
            assert records.some(interval, limit, from_end=True) == wanted[::-1][:limit]
            if records.beside is not None:
                assert [value for values in records.beside for value in values] == [
                    (order.score_of if order.stored else second)(row, hidden_of[id(row)])
                    for row in found
                ]
            assert records.rank(cuts[0]) == sum(is_before(key, cuts[0]) for key in keys)

    def cut(self, keys: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """A cut at the start of some key, or at an end."""
        side = self.chance.choice([MIN, MAX])
        if not keys or self.chance.random() < 0.1:
            return (side,)
        key = self.chance.choice(keys)
        return (*key[: self.chance.randrange(1, len(key) + 1)], side)


@pytest.mark.parametrize("nulls_first", [True, False], ids=["nulls first", "nulls last"])
@pytest.mark.parametrize("kind", KINDS)
def test_random_changes_leave_what_a_list_would_hold(kind: str, nulls_first: bool) -> None:
    """Whatever is added and removed, few or many at a time, every order stays sorted and whole."""
    for seed in range(3):
        model = Model(kind, seed, nulls_first=nulls_first)
        storage = model.build()
        chance = model.chance
        for _ in range(40):
            few = chance.random() < 0.7
            most = 3 if few else 40
            removed = chance.sample(model.pairs, min(chance.randrange(most), len(model.pairs)))
            added = model.rows(chance.randrange(most if few or chance.random() < 0.7 else 80))
            gone = {id(row) for row, _ in removed}
            # A record is replaced by another of the same key, as refreshes do.
            added += [model.row(row.id) for row, _ in removed if chance.random() < 0.5]
            model.pairs = [pair for pair in model.pairs if id(pair[0]) not in gone] + added
            storage = storage.replace(removed, added)
            model.compare(storage)


@pytest.mark.parametrize("kind", KINDS)
def test_versions_are_kept_apart(kind: str) -> None:
    """A storage never changes: what a reader holds stays as it was, whatever comes after."""
    model = Model(kind, 0, nulls_first=True)
    model.pairs = model.rows(60)
    storage = model.build()
    versions = []
    for _ in range(20):
        versions.append((storage, {n: list(o) for n, o in storage.orders.items()}, model.pairs))
        removed = model.chance.sample(model.pairs, 3)
        added = model.rows(3)
        gone = {id(row) for row, _ in removed}
        model.pairs = [pair for pair in model.pairs if id(pair[0]) not in gone] + added
        storage = storage.replace(removed, added)
    for version, orders, pairs in versions:
        model.pairs = pairs
        model.compare(version)
        assert {name: list(order) for name, order in version.orders.items()} == orders


def test_a_small_change_shares_the_other_chunks() -> None:
    """Changing one record copies one chunk of each order, and no other."""
    model = Model("plain", 0, nulls_first=True)
    model.pairs = model.rows(200)
    before = model.build()
    after = before.replace([model.pairs[0]], [])
    for name, order in before.orders.items():
        kept = {id(chunk) for chunk in order.chunks}
        assert sum(id(chunk) not in kept for chunk in after.orders[name].chunks) <= 1


def test_a_small_change_does_not_look_at_the_other_chunks() -> None:
    """What it costs does not grow with the records, but for the copies of lists of chunks."""
    asked: list[Any] = []

    class Chunk(list[Any]):
        def __getitem__(self, at: Any) -> Any:
            asked.append(self)
            return super().__getitem__(at)

    order = Order("", (Part("id", nullable=False),), 1, nulls_first=True)
    rows = [Row(number, None, "", None, 0.0) for number in range(0, 400, 2)]
    built = SortedRecords.build(order, rows, None)
    chunks: Any = [Chunk(chunk) for chunk in built.chunks]
    before = SortedRecords(order, chunks, None)
    asked.clear()
    after = before.replace([(rows[77], None)], [(Row(155, None, "", None, 0.0), None)])
    assert len({id(chunk) for chunk in asked}) <= 1
    after._check()


def test_many_records_for_one_place_are_split_evenly() -> None:
    """However many records come to lie in one chunk, none grows longer than two."""
    order = Order("", (Part("id", nullable=False),), 1, nulls_first=True)
    rows = [Row(number, None, "", None, 0.0) for number in range(2_000)]
    storage = Storage.build([order], {}, rows, None)
    late = [Row(2_000 + number, None, "", None, 0.0) for number in range(200)]
    after = storage.replace([], [(row, None) for row in late])
    after._check()
    assert list(after) == rows + late


def test_emptying_and_filling_again() -> None:
    """The last record may go, and others come."""
    model = Model("hidden", 1, nulls_first=False)
    model.pairs = model.rows(9)
    storage = model.build()
    for pair in list(model.pairs):
        model.pairs.remove(pair)
        storage = storage.replace([pair], [])
        model.compare(storage)
    assert len(storage) == 0
    assert storage.orders[""].some(EVERYTHING.intervals[0], 3) == []
    assert storage.orders["by"].between(EVERYTHING.intervals[0]) == []
    model.pairs = model.rows(9)
    model.compare(storage.replace([], model.pairs))


def test_no_change_is_the_same_storage() -> None:
    """Replacing nothing by nothing makes no new version."""
    storage = Model("plain", 0, nulls_first=True).build()
    assert storage.replace([], []) is storage


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_found_by_primary_key(kind: str) -> None:
    """A record is found by its key, with its hidden values, among few records or many."""
    model = Model(kind, 2, nulls_first=True)
    model.pairs = model.rows(300)
    storage = model.build()
    for row, hidden in model.pairs:  # of two chunks
        key = row.opaque if kind == "hashed" else row.id
        assert storage.get((key,)) == (row, hidden)
        assert storage.with_hidden([row]) == [(row, hidden)]
        twin, _ = model.row(row.id)
        assert storage.same_keys([twin]) == [(row, hidden)]
    for missing in (-1, 10**6):
        assert storage.get((Opaque(missing) if kind == "hashed" else missing,)) is None
    assert storage.replace(model.pairs, []).get((1,)) is None
    assert storage.same_keys([model.row(-1)[0]]) == []
    every = {id(row): hidden for row, hidden in model.pairs}
    assert {id(r): h for r, h in storage.with_hidden([r for r, _ in model.pairs])} == every
    twins = [model.row(row.id)[0] for row, _ in model.pairs]
    assert {id(r): h for r, h in storage.same_keys(twins)} == every


def test_a_prefix_is_an_interval() -> None:
    """All records with given first scores, NULL among them, lie next to each other."""
    for nulls_first in (True, False):
        model = Model("nullable", 3, nulls_first=nulls_first)
        model.pairs = model.rows(80)
        records = model.build().orders["by"]
        for score in [None, *range(6)]:
            found = records.between(records.order.prefix([score]))
            assert found == [row for row, _ in model.sorted("by") if row.score == score]


def test_null_and_nan_stand_where_the_database_puts_them() -> None:
    """NULL comes first or last; NaN after all numbers, and NULLs that sort last after that."""
    part = Part("ratio", nullable=True, nan=True)
    values = [2.0, float("nan"), None, float("inf"), -1.0]
    for nulls_first in (True, False):
        order = Order("", (part, Part("id", nullable=False)), 1, nulls_first)
        rows = [Row(at, None, "", None, value) for at, value in enumerate(values)]  # type: ignore
        found = [row.id for row in Storage.build([order], {}, rows, None)]
        assert found == ([2, 4, 0, 3, 1] if nulls_first else [4, 0, 3, 1, 2])
    assert NULLS_FIRST < 1.0 < NAN < NULLS_LAST


def test_values_without_a_common_order_are_told() -> None:
    """Values of two types in one column are an error that names the column."""
    order = Order("", (Part("label", nullable=False),), 1, nulls_first=True)
    rows = [Row(1, None, "a", None, 0.0), Row(2, None, 2, None, 0.0)]  # type: ignore[arg-type]
    with pytest.raises(TableCacheError, match="label cannot be sorted"):
        Storage.build([order], {}, rows, None)


def test_a_record_that_is_not_stored_cannot_be_removed() -> None:
    """Removing is by identity: an equal record is not enough."""
    model = Model("plain", 4, nulls_first=True)
    model.pairs = model.rows(40)
    storage = model.build()
    twin, _ = model.row(model.pairs[0][0].id)
    with pytest.raises(AssertionError, match="not stored"):
        storage.replace([(twin, None)], [])


def test_disorder_fails_the_check() -> None:
    """The check finds records out of order, empty chunks, and orders that hold other records."""
    model = Model("plain", 5, nulls_first=True)
    model.pairs = model.rows(20)
    storage = model.build()
    order = storage.orders[""]
    swapped = [[*chunk] for chunk in order.chunks]
    swapped[0][0], swapped[0][1] = swapped[0][1], swapped[0][0]
    for broken in (
        SortedRecords(order.order, [tuple(chunk) for chunk in swapped], None),
        SortedRecords(order.order, order.chunks[1:], None),
    ):
        with pytest.raises(AssertionError):
            Storage({**storage.orders, "": broken}, {})._check()
    empty = SortedRecords(order.order, [*order.chunks, order.chunks[0]], None)
    empty.chunks[-1] = ()
    with pytest.raises(AssertionError):
        empty._check()


@pytest.mark.parametrize("values", [10**6, 30, 2], ids=["unique", "some", "few"])
def test_records_are_sorted_as_by_list_sort(values: int) -> None:
    """Sorting in steps gives what one sort gives, equal ones in their order."""
    chance = random.Random(values)
    for count in (0, 1, 16, 17, 500):
        items = [(chance.randrange(values), chance.randrange(values), at) for at in range(count)]
        get = itemgetter(0, 1)
        assert sorting.sort(items, get, sorting.no_pause) == sorted(items, key=get)
        scores = [itemgetter(0), itemgetter(1)]
        found = sorting.sort_by_scores(items, scores, get, sorting.no_pause)
        assert found == sorted(items, key=get)


def test_values_that_cannot_be_hashed_are_sorted() -> None:
    """What cannot be put into buckets is compared."""
    items = [[at % 7] for at in range(100)]
    get = itemgetter(slice(None))
    assert sorting.sort_by_scores(items, [get], get, sorting.no_pause) == sorted(items)


def test_no_step_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two pauses few records are looked at, however many there are."""
    monkeypatch.setattr(sorting, "STEP", 512)
    monkeypatch.setattr(sorting, "SAMPLE", 8)
    model = Model("hidden", 0, nulls_first=True)
    model.pairs = model.rows(8_000)
    read: list[int] = []

    class Watched(Row):
        def __getattribute__(self, name: str) -> Any:
            read.append(1)
            return super().__getattribute__(name)

    records = [Watched(r.id, r.score, r.label, r.opaque, r.ratio) for r, _ in model.pairs]
    most = 0

    def pause() -> None:
        nonlocal most
        most = max(most, len(read))
        read.clear()

    hidden: Any = [h for _, h in model.pairs]
    storage = Storage.build(model.orders, {}, records, hidden, pause)
    storage.exchanged({id(r) for r in records[::3]}, records[::3], hidden[::3], pause)
    assert 0 < most < 5 * 512, most


def test_the_garbage_collector_does_not_look_at_records() -> None:
    """After its first look it has lost track of all chunks, those of a change included."""

    class Plain(msgspec.Struct, frozen=True, gc=False):
        id: int
        score: int | None
        label: str

    key = Part("id", nullable=False)
    by_score = Part("score", nullable=True), key
    by_hidden = Part("_hidden", nullable=False, hidden=0), key
    orders = [
        Order("", (key,), 1, nulls_first=True),
        Order("score", by_score, 1, nulls_first=True),
        Order("hidden", by_hidden, 1, nulls_first=True),
    ]
    records = [Plain(at, at % 3, "a") for at in range(100)]
    storage = Storage.build(orders, {}, records, [(at % 5,) for at in range(100)])
    changed = storage.replace([(records[0], (0,))], [(Plain(100, 7, "b"), (3,))])
    merged = changed.exchanged({id(r) for r in records[9::2]}, [Plain(101, 7, "b")], [(3,)])
    for _ in range(2):  # tuples of hidden values first, then what holds them
        gc.collect()
    for each in (storage, changed, merged):
        for order in each.orders.values():
            assert not any(map(gc.is_tracked, (*order.chunks, *(order.beside or ()))))


def test_an_order_that_a_reader_asks_for_meanwhile_is_no_matter() -> None:
    """An exchange of many records goes on with the orders with which it began."""
    orders, _, _ = orders_of("plain", nulls_first=False)
    model = Model("plain", 1, nulls_first=False)
    pairs = [model.row() for _ in range(40)]
    first, *others = orders.values() if isinstance(orders, dict) else orders
    lazy = {order.name: order for order in others}
    storage = Storage.build([first], lazy, [record for record, _ in pairs], None)
    more = [model.row()[0] for _ in range(40)]

    def others_read() -> None:
        for name in lazy:
            storage.order(name)

    result = storage.exchanged(set(), more, None, others_read)
    assert len(result) == 80
    assert storage.orders.keys() >= lazy.keys()
    for name in lazy:
        result.order(name)
    result._check()


class Incomparable:
    """A value of which nothing says whether it equals another: such as an array."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        raise ValueError("which of its elements?")


def test_records_are_told_apart_by_what_they_are() -> None:
    """Sorting compares keys, and no other values of records."""
    get = itemgetter(1)
    items = [(Incomparable(), 2), (Incomparable(), 1), (Incomparable(), 3)]
    sorted_ = sorted(items, key=get)
    beside = sorting.along("bac", items, sorted_, sorting.no_pause)
    assert beside == ["a", "b", "c"]
    assert sorting.along("bac", items, list(items), sorting.no_pause) == ["b", "a", "c"]
