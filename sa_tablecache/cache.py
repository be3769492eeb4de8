"""The cached views of one database.

In: an engine, views, and what the application says (load, evict, invalidate). A
:class:`BaseTableCache` holds one :class:`.CachedTable` for each view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, cast

from sqlalchemy import Engine, select
from sqlalchemy.sql import ColumnElement

from .analysis import plan_of
from .answering import covered_candidate
from .changes import MOST_RANGES, VIEW, Marks, RangeMark
from .comparison import Inexact
from .events import unwatch, watch
from .exc import Closed, CriteriaError, NotExpressible, TableCacheError, Unbound, UnknownView
from .explaining import Explanation, explain
from .feed import ChangeFeed
from .figures import Estimate, Stats, estimate
from .indexing import indexes_lacking_in
from .invalidation import named_changes
from .keeping import Clock, utc_now
from .layout import log_coarse
from .limits import MemoryLimit
from .loading import Progress, Snapshots
from .modes import Mode, check_mode, check_rate, wanted_modes
from .planner import ask, load_target, no_range
from .policies import Kept, Policy, check_number, policy_of
from .problems import Problem, problems_of
from .running import Running
from .scores import EVERYTHING, IntervalSet
from .shapes import shape_of, view_of
from .slots import LoadSlots
from .table import CachedTable, Timer
from .view import CachedView, ViewMeta
from .why import Why, why


class BaseTableCache(Running):
    """What :class:`.TableCache` is but for its sessions, which stand to the right of this module.

    See there.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        *,
        views: Iterable[type[CachedView]] = (),
        load_engine: Engine | None = None,
        feed: ChangeFeed | None = None,
        exclusive_writer: bool = False,
        verify: float = 0.0,
        memory_limit: int | None = None,
        load_slots: int | None = None,
        slot_timeout: float = 300.0,
    ) -> None:
        super().__init__(feed, exclusive_writer=exclusive_writer)
        self._verify = check_rate(verify)
        self._wanted_modes = wanted_modes()
        self._modes: dict[CachedTable, Mode] = {}
        self.clock: Clock = utc_now
        """Says what time it is for windows and ages, as an aware datetime; tests have their own."""
        self.memory = None if memory_limit is None else MemoryLimit(memory_limit)
        self._slots = None if load_slots is None else LoadSlots(load_slots, slot_timeout)
        self._policies: dict[type[CachedView], Policy] = {}
        self._kept: dict[type[CachedView], tuple[str, Kept]] = {}
        """What each policy does, and the name of its job."""
        self._engine: Engine | None = None
        self._given_load_engine = load_engine
        self._watched: list[Engine] = []
        self._views: list[type[CachedView]] = []
        self.timers: list[Timer] = []
        """Told how long each load and refresh took."""
        self.closing: list[Callable[[], object]] = []
        """Called when the cache is closed, while its views are still there."""
        if engine is not None:
            self.bind(engine)
        for view in views:
            self.add(view)

    # -- setting up -----------------------------------------------------------------------------

    def bind(self, engine: Engine) -> None:
        """Bind the cache to an engine, whose commits it notices from now on. Emits no SQL.

        :raises UnsuitableEngine: if all connections of the engine's pool are one.
        :raises FeedUnavailable: if the cache has a feed, and there is none for the dialect.
        :raises TableCacheError: if it is bound already.
        """
        self._check_open()
        if self._engine is not None:
            raise TableCacheError(f"this cache is bound to {self._engine!r} already")
        if not isinstance(engine, Engine):
            raise TableCacheError(
                f"a TableCache is bound to an Engine, not to a {type(engine).__name__}; for an "
                "AsyncEngine use AsyncTableCache"
            )
        snapshots = Snapshots(engine, self._given_load_engine)
        self._follow(snapshots)
        self._snapshots = snapshots
        self._engine = engine
        self._watch(engine)
        for view in self._views:
            self._tables[view] = self._new_table(view, self._snapshots)

    def _new_table(self, view: type[CachedView], snapshots: Snapshots) -> CachedTable:
        table = CachedTable(plan_of(view), snapshots)
        table.timers = self.timers
        table.slots = self._slots
        if self.memory is not None:
            table.memory = self.memory
            self.memory.add(table)
        self._keep(view, table)
        self._follow_view(table)
        self.refreshing.watch(table)
        if not self._tables:
            self._wanted_modes.warn_of_unknown()
        mode = self._modes[table] = Mode(table, self._verify)
        mode.set(self._wanted_modes.of(view.__name__))
        return table

    def _keep(self, view: type[CachedView], table: CachedTable) -> None:
        """Have the policy of a view kept, in the place of another if there was one."""
        if view in self._kept:
            job, before = self._kept[view]
            self.upkeep.remove(job)
            table.guards = tuple(guard for guard in table.guards if guard != before.guard)
        job = f"policy of {table.name}"
        if job in self.upkeep:  # of another view of that name
            job = f"policy of {view.__module__}.{view.__qualname__}"
        kept = self._policies[view].keep(table, lambda: self.clock)
        self._kept[view] = job, kept
        table.keeper, table.rereads = kept.keeper, kept.rereads
        if kept.guard is not None:
            table.guards = (*table.guards, kept.guard)
        if kept.step is not None:
            self.upkeep.add(job, kept.step)

    def _watch(self, engine: Engine) -> None:
        watch(engine, self)
        self._watched.append(engine)

    @property
    def engine(self) -> Engine:
        """The engine that the cache is bound to."""
        engine = self._engine
        if engine is None or self._closed:
            self._check_open()
            raise Unbound("this cache is not bound to an engine yet: call cache.bind(engine)")
        return engine

    @property
    def load_engine(self) -> Engine:
        """The engine through which the cache itself reads."""
        assert self.engine is not None
        assert self._snapshots is not None
        return self._snapshots.engine

    @property
    def views(self) -> tuple[type[CachedView], ...]:
        """The views that were added."""
        return tuple(self._views)

    def add(self, view: type[CachedView], *, policy: Policy | None = None) -> None:
        """Add a view; nothing of it is loaded. Emits no SQL.

        :param policy: which records to keep: :class:`.Everything`, :class:`.SlidingWindow`,
            :class:`.ReadThrough` or :class:`.Manual`; by default what the view declares as
            ``__policy__``. Of a view that was added before, it takes the place of the policy.
        :raises ViewDefinitionError: if the view cannot be right.
        :raises NotExpressible: if the policy needs an index that the view does not have.
        """
        self._check_open()
        if not isinstance(view, ViewMeta):
            raise TableCacheError(f"{view!r} is not a CachedView")
        plan = plan_of(view)
        chosen = policy_of(plan, policy)
        with self._lock:
            if view in self._views:
                if policy is not None:
                    self._policies[view] = chosen
                    if view in self._tables:
                        self._keep(view, self._tables[view])
                return
            self._views.append(view)
            self._policies[view] = chosen
            if self._snapshots is not None:
                self._tables[view] = self._new_table(view, self._snapshots)
        for table, reason in plan.coarse.items():
            log_coarse(plan, table, reason)

    def table(self, view: type[CachedView]) -> CachedTable:
        """Return what holds the records of a view."""
        table = self._tables.get(view)
        if table is None or self._closed:
            assert self.engine is not None
            name = getattr(view, "__name__", repr(view))
            raise UnknownView(f"{name} is not in this cache: add it with cache.add({name})")
        return table

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this cache was closed")

    # -- coverage -------------------------------------------------------------------------------

    def _target(
        self, view: type[CachedView], criteria: Sequence[Any]
    ) -> tuple[CachedTable, str, IntervalSet]:
        table = self.table(view)
        layout = table.set_up()
        if not criteria:
            return table, "", EVERYTHING
        try:
            shape, parameters = shape_of(select(view).where(*criteria))
        except Inexact as reason:
            raise no_range(table.plan, str(reason)) from None
        return table, *load_target(shape, parameters, layout.columns)

    def load(
        self,
        view: type[CachedView],
        *criteria: ColumnElement[bool] | bool,
        progress: Progress | None = None,
        chunk: int | None = None,
    ) -> None:
        """Make the coverage exactly what the criteria say; without criteria, everything.

        One SELECT fetches what is missing; what is covered no more is expired; what is there
        stays. Readers go on meanwhile, with the old coverage until the new one is complete. A load
        that fails leaves all as it was.

        With ``chunk``, several SELECTs fetch so many records each, in the order of the index, each
        in a snapshot of its own that ends with it. Each chunk extends the coverage when it is
        there; one that fails leaves those before it, and the same call goes on from there. What is
        covered no more is expired at the end.

        :param criteria: a range of one index, such as ``View.time_hour >= since``.
        :param progress: called every 1,000 rows with the number of rows so far.
        :param chunk: how many records to fetch at a time; ``None`` for all at once.
        :raises NotExpressible: if no index can express the criteria; it says which one would. With
            ``chunk``, if the index does not sort in Python as in the database.
        :raises MemoryLimitExceeded: if there is a ``memory_limit``, and it would pass it.
        :raises LoadSlotTimeout: if there are ``load_slots``, and none became free in time.
        """
        check_number("chunk", chunk)
        table, index, intervals = self._target(view, criteria)
        table.load_chunks(index, intervals, chunk, progress=progress)

    def extend(
        self,
        view: type[CachedView],
        *criteria: ColumnElement[bool] | bool,
        progress: Progress | None = None,
        chunk: int | None = None,
    ) -> None:
        """Add what the criteria say to the coverage; like :meth:`load`, nothing is expired."""
        check_number("chunk", chunk)
        table, index, intervals = self._target(view, criteria)
        table.load_chunks(index, intervals, chunk, extend=True, progress=progress)

    def evict(self, view: type[CachedView], *criteria: ColumnElement[bool] | bool) -> None:
        """Take what the criteria say out of the coverage. Emits no SQL.

        Records that the coverage of another index needs stay.
        """
        table, index, intervals = self._target(view, criteria)
        table.evict(index, intervals)

    def clear(self, view: type[CachedView]) -> None:
        """Give up all records of a view. Emits no SQL.

        A policy that runs in the background begins again.
        """
        self.table(view).clear()
        self.upkeep.wake(self._kept[view][0])

    def step(self, view: type[CachedView]) -> None:
        """Do one step of what the policy of a view does in the background, now and here.

        ::

            cache.step(FlightBoard)   # of a SlidingWindow: load what came in, expire the rest
        """
        table = self.table(view)
        step = self._kept[table.view][1].step
        if step is not None:
            step()

    def covers(self, view: type[CachedView], *criteria: ColumnElement[bool] | bool) -> bool:
        """Whether everything that meets the criteria is in storage, fresh or marked."""
        table = self.table(view)
        if not table.state.coverage:
            return False
        table.set_up()
        if not criteria:
            return table.state.coverage.everything
        try:
            shape, parameters = shape_of(select(view).where(*cast("Any", criteria)))
            question = ask(shape, parameters, table.set_up().columns)
        except Inexact:
            return table.state.coverage.everything
        return covered_candidate(question, table.state) is not None

    def ready(self, view: type[CachedView]) -> bool:
        """Whether a load of the view has ended."""
        return self.table(view).ready

    def wait_ready(self, view: type[CachedView], timeout: float | None = None) -> bool:
        """Wait until a load of the view has ended.

        :param timeout: in seconds; ``None`` waits for ever.
        :returns: whether it has.
        """
        return self.table(view).wait_ready(timeout)

    def estimate(self, view: type[CachedView], *criteria: ColumnElement[bool] | bool) -> Estimate:
        """Estimate what a load would cost: two SELECTs, a count and a sample of 1,000 rows."""
        table, index, intervals = self._target(view, criteria)
        assert self._snapshots is not None
        layout = table.set_up()
        with self._snapshots.open() as connection:
            return estimate(layout, connection, index, intervals)

    # -- freshness ------------------------------------------------------------------------------

    def invalidate(self, target: Any, *what: Any) -> None:
        """Mark records as stale, so that they are read again before the next answer.

        ``invalidate(View)`` marks the whole view, ``invalidate(View, *criteria)`` the records that
        meet the criteria, as they are stored or in the database (the whole view, if the criteria
        are no range of an index). ``invalidate(Model, key)`` marks what was made from a base row,
        ``invalidate(Model)`` what was made from its table. A key of several columns is a tuple.
        Emits no SQL.

        :raises CriteriaError: for what is no view, table, key or criterion of the view.
        """
        if isinstance(target, ViewMeta):
            view: Any = target
            marked = self.table(view)
            marked.publish(self._marks_where(view, what))
            marked.observers.tell()
            return
        self.mark(named_changes(target, what, self.engine.dialect.name))

    def _marks_where(self, view: type[CachedView], criteria: Sequence[Any]) -> Marks:
        """Return the marks of the records that meet criteria."""
        whole: Marks = frozenset({VIEW})
        if not criteria:
            return whole
        table = self.table(view)
        if table.layout is None or table.plan.anchor is None:
            shape_of_criteria(view, criteria)
            return whole
        try:
            _, index, intervals = self._target(view, criteria)
        except NotExpressible:
            return whole
        if intervals.is_everything or len(intervals) > MOST_RANGES:
            return whole
        return frozenset(RangeMark(index, interval, leave=True) for interval in intervals)

    def refresh(self, view: type[CachedView]) -> None:
        """Read again what is marked now, instead of before the next answer."""
        self.table(view).refresh()

    # -- modes ----------------------------------------------------------------------------------

    def set_mode(self, view: type[CachedView], mode: str) -> None:
        """Say who answers reads of a view from now on. Emits no SQL.

        ``"on"``: the cache. ``"off"``: the database. ``"shadow"``: the database, and what the cache
        would have said is compared with it: ``cache.stats(View).mismatches`` counts what was
        different, and the log shows the first ones. In all modes the view is kept as it is.

        The environment variable ``SA_TABLECACHE_MODE`` says it for all views, or for some of them:
        ``shadow``, or ``off,FlightBoard=on``.

        :raises TableCacheError: for another mode.
        :raises UnknownView: if the view is not in the cache.
        """
        self._modes[self.table(view)].set(check_mode(mode, f"set_mode({view.__name__}, ...)"))

    def mode(self, view: type[CachedView]) -> str:
        """Return the mode of a view: ``"on"``, ``"shadow"`` or ``"off"``."""
        return self._modes[self.table(view)].name

    # -- figures --------------------------------------------------------------------------------

    def stats(self, view: type[CachedView]) -> Stats:
        """Return the figures of a view. Emits no SQL."""
        return self.table(view).stats()

    def check(self) -> list[Problem]:
        """Return what keeps views from being served exactly: coarse tables, unordered indexes.

        Asks the catalog about views that were not used yet. What keeps a view from being used at
        all is a problem too, and not raised here; and so is an index that reads of the cache need
        and that the database does not have, for which the catalog is asked about each table.
        """
        tables = list(self._tables.values())
        problems = [Problem(view.__name__, why) for view, why in self.feed_problems().items()]
        for table in tables:
            problems += problems_of(table, self._side_effects)
        usable = [table.plan for table in tables if table.layout is not None]
        if usable:
            with self.snapshots.connect() as connection:
                lacking = indexes_lacking_in(connection, usable)
            problems += [Problem(index.view, str(index)) for index in lacking]
        return problems

    def why(self, view: type[CachedView], key: Any) -> Why:
        """Say why a record is what it is: loaded, marked and refreshed when, and because of what.

        ::

            print(cache.why(FlightBoard, 17))

        What is remembered are the last hundred loads and the last two hundred refreshes of a view;
        nothing is kept for each record. Emits no SQL.

        :param key: the primary key; a tuple, if it has several columns.
        :raises CriteriaError: for what is no key of the view.
        """
        return why(self.table(view), key)

    def explain(self, statement: Any) -> Explanation:
        """Say how a SELECT of a view would be answered now, and why. Runs nothing."""
        view = view_of(statement)
        if view is None:
            raise CriteriaError("this is not a SELECT of a cached view")
        table = self.table(view)
        distrust = None if self.consumer is None else self.consumer.distrust(table)
        if distrust is not None:
            return Explanation("bypass", view.__name__, distrust)
        return explain(table, statement)

    # -- end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop noticing commits, give up all records, close the cache's own connections.

        The upkeep is stopped first: steps that are under way get five seconds to end.
        """
        if self._closed:
            return
        self.upkeep.stop()
        for call in self.closing:
            call()
        for engine in self._watched:
            unwatch(engine, self)
        self._closed = True
        if self._snapshots is not None:
            self._snapshots.close()
        self._tables.clear()

    @property
    def closed(self) -> bool:
        """Whether the cache was closed."""
        return self._closed

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        """Assert the invariants of all views."""
        for table in list(self._tables.values()):
            table._check()


def shape_of_criteria(view: type[CachedView], criteria: Sequence[Any]) -> None:
    """Refuse criteria that are not the view's."""
    try:
        shape_of(select(view).where(*criteria))
    except Inexact:
        return
