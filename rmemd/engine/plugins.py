"""Plugins loaded, unloaded and reloaded while the daemon runs.

Owns the three operations. Code is imported without the engine's lock; what then changes is one
transaction. A reload swaps every VM of the platform in it, all or nothing: on failure the old
modules, reasons, platform and consumers are back, and go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import EntryPoint

from msgspec import Struct, field

from rmemd.consumers import discovery
from rmemd.consumers.registry import Found, Staged, as_found, one_line, require_offer
from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.swap import Swapped, flip, require_quiet, succeed
from rmemd.engine.waits import Retry, WaitFor
from rmemd.errors import (
    NO_SUCH_PLUGIN,
    PLUGIN_IN_USE,
    PLUGIN_INVALID,
    PLUGIN_LOADED,
    RmemError,
)
from rmemd.hooks.tx import Held, Tx
from rmemd.model.vms import Vm


class Reloaded(Struct, frozen=True):
    """What a reload changed: the plugin before and now, and its VMs' swaps."""

    before: Found
    now: Found
    vms: list[Swapped]


class _Imported(Struct):
    """What an import without the lock came to."""

    points: list[EntryPoint] = field(default_factory=list)
    factory: object = None
    error: BaseException | None = None


def load(core: Core, names: Sequence[str]) -> Steps[list[Found]]:
    """Load installed plugins that are not loaded (``names``, or all); list those that fail.

    Raises:
        NotFound: NO_SUCH_PLUGIN; a name is not installed.
        AlreadyExists: PLUGIN_LOADED.
    """
    for name in names:
        if name in core.registry.platforms:
            raise PLUGIN_LOADED(f"{name} is loaded; reload it instead", field="names")
    with (yield from _changing(core, ", ".join(names) or "all")):
        found = _Imported()
        yield Step("load: import", work=lambda: _import_new(core, names, found))
        return (yield from core.unit(lambda: _load(core, names, found.points)))


def unload(core: Core, name: str) -> Steps[list[str]]:
    """Take a plugin out; return the consumers that are no longer offered. Its frames stay as is.

    Raises:
        NotFound: NO_SUCH_PLUGIN.
        Refused: PLUGIN_IN_USE.
    """
    core.registry.plugin(name)
    with (yield from _changing(core, name)):
        offered = yield from core.unit(lambda: _unload(core, name))
        for point in discovery.installed():
            if point.name == name:
                discovery.take_out(_packages(core, [point]))
        return offered


def reload(core: Core, name: str) -> Steps[Reloaded]:
    """Import a plugin anew and swap every VM of it. ALL.

    Raises:
        NotFound: NO_SUCH_PLUGIN; it is not loaded, or not installed any more.
        RmemError: the new code is no good, or a VM cannot be swapped; all is as it was.
    """
    core.registry.plugin(name)
    with (yield from _changing(core, name)):
        fresh = _Imported()
        taken: list[discovery.TakenOut] = []
        try:
            yield Step("reload: import", work=lambda: _import_anew(name, fresh, taken))
            if fresh.error is not None:
                raise _invalid(name, fresh.error) from fresh.error
            return (yield from core.unit(lambda: _reload(core, name, fresh)))
        except BaseException:
            for one in taken:
                discovery.put_back(one)
            raise


# --- one at a time ---------------------------------------------------------------------------
def _changing(core: Core, what: str) -> Steps[AbstractContextManager[None]]:
    """Wait until no plugin changes; then ``what`` does, for as long as the context is open."""

    def one() -> Steps[None]:
        yield from ()
        if core.registry.changing:
            raise Retry(WaitFor(f"plugin {core.registry.changing}", "a plugin changes"))
        core.registry.changing = what

    yield from core.unit(one)
    return _changed(core)


@contextmanager
def _changed(core: Core) -> Iterator[None]:
    try:
        yield
    finally:
        core.registry.changing = ""
        core.wake_waiting()


# --- importing, without the lock -------------------------------------------------------------
def _import_new(core: Core, names: Sequence[str], found: _Imported) -> None:
    """Import what is not loaded yet; one that fails is imported again, and fails, when loaded."""
    for point in discovery.installed():
        if point.name in core.registry.platforms or (names and point.name not in names):
            continue
        found.points.append(point)
        # a quarantined one may have left modules behind
        discovery.take_out(_packages(core, [point]))
        with suppress(Exception, SystemExit):
            discovery.load(point)


def _import_anew(name: str, fresh: _Imported, taken: list[discovery.TakenOut]) -> None:
    fresh.points = [point for point in discovery.installed() if point.name == name]
    for point in fresh.points[:1]:
        taken.append(discovery.take_out(discovery.packages_of(point)))
        try:
            fresh.factory = discovery.load(point)
        except (Exception, SystemExit) as error:
            fresh.error = error


def _packages(core: Core, points: Sequence[EntryPoint]) -> set[str]:
    """Return the packages of plugins, but for those that a loaded plugin has too."""
    mine = {package for point in points for package in discovery.packages_of(point)}
    loaded = [p for p in discovery.installed() if p.name in core.registry.platforms]
    return mine - {package for point in loaded for package in discovery.packages_of(point)}


# --- the transactions ------------------------------------------------------------------------
def _load(core: Core, names: Sequence[str], points: list[EntryPoint]) -> Steps[list[Found]]:
    yield from ()
    for name in names:
        if name not in {point.name for point in points}:
            raise NO_SUCH_PLUGIN(
                f"no plugin {name!r} is installed in the daemon's environment", field="names"
            )
    with core.tx("load plugins") as tx:
        for point in points:
            core.registry.forget(point.name)
        loaded = core.registry.load(tx, core.options.nframes, points)
        for found in loaded:
            kind = "plugin_quarantined" if found.error else "plugin_loaded"
            tx.emit(kind, plugin=found.name, version=found.version)
    return loaded


def _unload(core: Core, name: str) -> Steps[list[str]]:
    yield from ()
    users = _vms_of(core, name)
    if users:
        labels = ", ".join(vm.info.label for vm in users)
        raise PLUGIN_IN_USE(f"{name} has consumers of {labels}", field="name", state=labels)
    offered = sorted(key for key, offer in core.registry.offers.items() if offer.platform == name)
    with core.tx("unload plugin") as tx:
        for table in core.space.below(f"platform/{name}"):
            tx.destroy(table)
        tx.emit("plugin_unloaded", plugin=name)
    core.registry.remove(name)
    return offered


def _reload(core: Core, name: str, fresh: _Imported) -> Steps[Reloaded]:
    yield from ()
    if not fresh.points:
        raise NO_SUCH_PLUGIN(f"{name} is no longer installed", field="name")
    before, now = core.registry.plugin(name), as_found(fresh.points[0])
    vms = _vms_of(core, name)
    for vm in vms:
        require_quiet(core, vm)
    begun = core.guard.clock()
    with core.tx("reload plugin") as tx:
        staged = _stage(core, tx, name, fresh)
        successors = []
        for vm in vms:
            offer = require_offer(staged.offers, vm.info.consumer)
            successors.append(succeed(core, tx, vm, staged.platform, offer, {}))
        tx.emit("plugin_reloaded", plugin=name, previous=before.version, version=now.version)
    core.registry.install(staged)
    core.registry.note(now)
    return Reloaded(before, now, flip(core, successors, begun))


def _stage(core: Core, tx: Tx, name: str, fresh: _Imported) -> Staged:
    nframes = core.options.nframes
    try:
        return core.registry.stage(tx, nframes, name, fresh.factory, reloading=True)
    except (RmemError, Held):
        raise
    except (Exception, SystemExit) as error:
        raise _invalid(name, error) from error


def _invalid(name: str, error: BaseException) -> RmemError:
    return PLUGIN_INVALID(f"the new code of {name} is no good: {one_line(error)}", where=name)


def _vms_of(core: Core, name: str) -> list[Vm]:
    """Return the VMs of a platform, dead ones too: their end is the platform's work."""
    return [vm for vm in core.vms.all() if vm.info.platform == name]
