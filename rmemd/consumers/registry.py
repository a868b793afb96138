"""Which plugins there are, which are quarantined and why, and the consumers they make.

Owns the platforms at work and what they offer. Every plugin is loaded on its own: a broken one is
listed with its error and never stops the daemon. A plugin is *staged* first, and installed only
when nothing can go wrong any more, so that one that fails leaves what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint
from typing import Any

from msgspec import Struct

from rmemd.consumers import discovery
from rmemd.consumers.guard import Consumer, Guard, Platform
from rmemd.errors import BAD_REQUEST, NO_SUCH_CONSUMER, NO_SUCH_PLUGIN, SWAP_SCHEMA, RmemError
from rmemd.hooks.hooktx import HookServices, HostContext, VmContext
from rmemd.hooks.ops import NotifierOps, compile_consumer, compile_platform
from rmemd.hooks.state import is_plain
from rmemd.hooks.tables import Records, Space
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Variant

ERROR_MAX = 500
PERSONALITIES = frozenset(("attributes", "in-place"))


class Found(Struct, frozen=True):
    """A plugin that was found; ``error`` is why it is quarantined, "" if it is not."""

    name: str
    distribution: str
    version: str
    error: str = ""


class Offer(Struct, frozen=True):
    """A consumer variant that can be had, with the table its object declares."""

    platform: str
    variant: Variant
    ops: NotifierOps


class Staged(Struct, frozen=True):
    """A platform that has started and is not at work yet, with what it will offer."""

    platform: Platform
    offers: dict[str, Offer]


class Registry:
    """The platforms at work and what they offer.

    Attributes:
        found: every plugin that was found, quarantined ones too.
        made: told of each consumer before anything is asked of it; the conformance kit listens.
        changing: the plugin that is loaded, unloaded or reloaded at this moment, "" for none.
    """

    def __init__(self, space: Space, guard: Guard, services: HookServices) -> None:
        self._space = space
        self._guard = guard
        self._services = services
        self.found: list[Found] = []
        self.platforms: dict[str, Platform] = {}
        self.offers: dict[str, Offer] = {}
        self.made: Callable[[Consumer], None] = lambda consumer: None
        self.changing = ""

    # --- loading -----------------------------------------------------------------------------
    def load_installed(self, tx: Tx, nframes: int, others: Iterable[EntryPoint] = ()) -> None:
        """Load every installed plugin, in order of name, and then the others."""
        self.load(tx, nframes, [*discovery.installed(), *others])

    def load(self, tx: Tx, nframes: int, points: Iterable[EntryPoint]) -> list[Found]:
        """Load plugins one by one; one that fails leaves no trace but its error."""
        loaded = []
        for point in points:
            mark = tx.mark()
            error = ""
            try:
                if point.name in self.platforms:
                    raise ValueError(f"another plugin is named {point.name}")
                self.install(self.stage(tx, nframes, point.name, discovery.load(point)))
            except (Exception, SystemExit) as failure:
                tx.rollback(mark)
                error = one_line(failure)
            loaded.append(as_found(point, error))
        self.found += loaded
        return loaded

    def stage(
        self, tx: Tx, nframes: int, name: str, factory: Any, reloading: bool = False
    ) -> Staged:
        """Start a platform; ``reloading``: over the tables of the one of its name.

        Raises:
            Exception: whatever the plugin raises, or what is wrong with it.
        """
        ops = compile_platform(factory(), name)
        platform = Platform(name, ops, self._guard, self._services)
        host = HostContext(name, nframes, 1, tx, reloading)
        ops.start(host)
        if reloading:
            self._check_tables(host)
        offers: dict[str, Offer] = {}
        for variant in ops.variants():
            if not variant.personalities or not PERSONALITIES.issuperset(variant.personalities):
                raise ValueError(f"{variant.name}: personalities {variant.personalities!r}")
            if not all(isinstance(point, str) for point in variant.points):
                raise ValueError(f"{variant.name}: points {variant.points!r}")
            taken = self.offers.get(variant.name)
            if variant.name in offers or (taken is not None and taken.platform != name):
                raise ValueError(f"{variant.name} is offered by another plugin")
            mark = tx.mark()
            # on a host that has no key left a reload must still be possible, and a restart
            importing = reloading or tx.reopening
            probe = self._make(tx, 0, platform, variant, {}, importing)
            tx.rollback(mark)
            offers[variant.name] = Offer(name, variant, probe.ops)
        return Staged(platform, offers)

    def install(self, staged: Staged) -> None:
        """Have a staged platform be at work, in place of the one of its name if there is one."""
        name = staged.platform.name
        self._withdraw(name)
        self.platforms[name] = staged.platform
        self.offers |= staged.offers

    def remove(self, name: str) -> None:
        """Take a platform out; no VM has a consumer of it."""
        self._withdraw(name)
        del self.platforms[name]
        self.forget(name)

    def note(self, found: Found) -> None:
        """List a plugin in place of what was said of it before."""
        self.found = [found if one.name == found.name else one for one in self.found]

    def forget(self, name: str) -> None:
        """List a plugin no more."""
        self.found = [one for one in self.found if one.name != name]

    def plugin(self, name: str) -> Found:
        """Return a plugin that is at work.

        Raises:
            NotFound: NO_SUCH_PLUGIN.
        """
        for found in self.found:
            if found.name == name and name in self.platforms and not found.error:
                return found
        known = ", ".join(sorted(self.platforms)) or "none"
        raise NO_SUCH_PLUGIN(f"no plugin {name!r} is loaded; there are: {known}", field="name")

    def _withdraw(self, name: str) -> None:
        self.offers = {key: offer for key, offer in self.offers.items() if offer.platform != name}

    def _check_tables(self, host: HostContext) -> None:
        """Nothing that the older code kept may be lost on the newer, or be of the older's classes.

        Raises:
            Refused: SWAP_SCHEMA.
        """
        for name, table in self._space.tables.items():
            if not name.startswith(f"platform/{host.name}/"):
                continue
            if name not in host.asked:
                raise SWAP_SCHEMA(f"the new code does not ask for the table {name}")
            if isinstance(table, Records) and not is_plain(tuple(table.items())):
                raise SWAP_SCHEMA(f"the records of {name} are not plain values")

    # --- consumers ---------------------------------------------------------------------------
    def offer(self, consumer: str) -> Offer:
        """Return what is offered under a consumer's full name.

        Raises:
            NotFound: NO_SUCH_CONSUMER.
        """
        return require_offer(self.offers, consumer)

    def make(self, tx: Tx, vm: int, consumer: str, config: Mapping[str, str]) -> Consumer:
        """Make a VM's consumer.

        Raises:
            NotFound: NO_SUCH_CONSUMER.
            InvalidArgument: BAD_REQUEST; an option that the variant does not have.
            PluginFault: the plugin failed, or its object has an invalid hook.
        """
        offer = self.offer(consumer)
        return self.make_of(tx, vm, self.platforms[offer.platform], offer.variant, config)

    def make_of(
        self,
        tx: Tx,
        vm: int,
        platform: Platform,
        variant: Variant,
        config: Mapping[str, str],
        importing: bool = False,
    ) -> Consumer:
        """Make a consumer of a platform's variant; ``importing``: for a VM that had another.

        Raises:
            InvalidArgument: BAD_REQUEST; an option that the variant does not have.
            PluginFault: the plugin failed, or its object has an invalid hook.
        """
        unknown = sorted(config.keys() - variant.options.keys())
        if unknown:
            options = ", ".join(sorted(variant.options)) or "no options"
            raise BAD_REQUEST(
                f"{variant.name} has no option {unknown[0]!r}: {options}", field="config"
            )
        made = self._make(tx, vm, platform, variant, config, importing)
        self.made(made)
        return made

    def _make(
        self,
        tx: Tx,
        vm: int,
        platform: Platform,
        variant: Variant,
        config: Mapping[str, str],
        importing: bool = False,
    ) -> Consumer:
        context = VmContext(vm, platform.name, tx, importing)
        options = {**variant.options, **config}
        made = platform.call(tx, vm, "make_consumer", context, ..., variant.name, options)
        name = f"{variant.name}(vm/{vm})"
        ops = compile_consumer(made, name)
        return Consumer(name, vm, platform, made, ops, self._guard, self._services)


def require_offer(offers: Mapping[str, Offer], consumer: str) -> Offer:
    """Return the offer of a consumer's full name.

    Raises:
        NotFound: NO_SUCH_CONSUMER.
    """
    offer = offers.get(consumer)
    if offer is None:
        known = ", ".join(sorted(offers)) or "none"
        raise NO_SUCH_CONSUMER(f"no consumer {consumer!r}; there are: {known}", field="consumer")
    return offer


def as_found(point: EntryPoint, error: str = "") -> Found:
    """Return how a plugin is listed."""
    name, version = discovery.release_of(point.dist) if point.dist else ("", "")
    return Found(point.name, name, version, error)


def one_line(error: BaseException) -> str:
    """Return what is wrong with a plugin in one line."""
    text = error.message if isinstance(error, RmemError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:ERROR_MAX]
