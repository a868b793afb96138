"""Which plugins there are, which are quarantined and why, and the consumers they make.

Owns discovery and the consumer of each VM. Every entry point is loaded on its own: a broken
plugin is listed with its error and never stops the daemon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rmemd.consumers.guard import Consumer, Guard, Platform
from rmemd.errors import BAD_REQUEST, NO_SUCH_CONSUMER, RmemError
from rmemd.hooks.ops import NotifierOps, compile_consumer, compile_platform
from rmemd.hooks.spec import ENTRY_POINTS
from rmemd.hooks.tables import Space
from rmemd.hooks.tx import HookServices, HostContext, Tx, VmContext
from rmemd.hooks.types import Variant

ERROR_MAX = 500
PERSONALITIES = frozenset(("attributes", "in-place"))


@dataclass(frozen=True)
class Found:
    """A plugin that was found; ``error`` is why it is quarantined, "" if it is not."""

    name: str
    distribution: str
    version: str
    error: str = ""


@dataclass(frozen=True)
class Offer:
    """A consumer variant that can be had, with the table its object declares."""

    platform: str
    variant: Variant
    ops: NotifierOps


class Registry:
    """The platforms at work and what they offer."""

    def __init__(self, space: Space, guard: Guard, services: HookServices) -> None:
        self._space = space
        self._guard = guard
        self._services = services
        self.found: list[Found] = []
        self.platforms: dict[str, Platform] = {}
        self.offers: dict[str, Offer] = {}

    def load_installed(self, tx: Tx, nframes: int) -> None:
        """Load every installed plugin, in order of name."""
        self.load(tx, nframes, sorted(entry_points(group=ENTRY_POINTS), key=lambda ep: ep.name))

    def load(self, tx: Tx, nframes: int, points: Iterable[EntryPoint]) -> None:
        """Load plugins one by one; one that fails leaves no trace but its error."""
        for point in points:
            mark = tx.mark()
            dist = point.dist
            name, version = (dist.name, dist.version) if dist else ("", "")
            try:
                self._add(tx, nframes, point.name, point.load())
            except (Exception, SystemExit) as error:
                tx.rollback(mark)
                self._remove(point.name)
                self.found.append(Found(point.name, name, version, _one_line(error)))
            else:
                self.found.append(Found(point.name, name, version))

    def offer(self, consumer: str) -> Offer:
        """Return what is offered under a consumer's full name.

        Raises:
            NotFound: NO_SUCH_CONSUMER.
        """
        offer = self.offers.get(consumer)
        if offer is None:
            known = ", ".join(sorted(self.offers)) or "none"
            raise NO_SUCH_CONSUMER(
                f"no consumer {consumer!r}; there are: {known}", field="consumer"
            )
        return offer

    def make(self, tx: Tx, vm: int, consumer: str, config: Mapping[str, str]) -> Consumer:
        """Make a VM's consumer.

        Raises:
            NotFound: NO_SUCH_CONSUMER.
            InvalidArgument: BAD_REQUEST; an option that the variant does not have.
            PluginFault: the plugin failed, or its object has an invalid hook.
        """
        offer = self.offers.get(consumer)
        if offer is None:
            known = ", ".join(sorted(self.offers)) or "none"
            raise NO_SUCH_CONSUMER(
                f"no consumer {consumer!r}; there are: {known}", field="consumer"
            )
        unknown = sorted(config.keys() - offer.variant.options.keys())
        if unknown:
            options = ", ".join(sorted(offer.variant.options)) or "no options"
            raise BAD_REQUEST(f"{consumer} has no option {unknown[0]!r}: {options}", field="config")
        return self._make(tx, vm, self.platforms[offer.platform], offer.variant, config)

    def _make(
        self, tx: Tx, vm: int, platform: Platform, variant: Variant, config: Mapping[str, str]
    ) -> Consumer:
        context = VmContext(vm, platform.name, tx)
        options = {**variant.options, **config}
        made = platform.call(tx, vm, "make_consumer", context, ..., variant.name, options)
        name = f"{variant.name}(vm/{vm})"
        ops = compile_consumer(made, name)
        return Consumer(name, vm, platform, made, ops, self._guard, self._services)

    def _add(self, tx: Tx, nframes: int, name: str, factory: Any) -> None:
        ops = compile_platform(factory(), name)
        platform = Platform(name, ops, self._guard, self._services)
        ops.start(HostContext(name, nframes, 1, tx))
        self.platforms[name] = platform
        for variant in ops.variants():
            if not variant.personalities or not PERSONALITIES.issuperset(variant.personalities):
                raise ValueError(f"{variant.name}: personalities {variant.personalities!r}")
            if variant.name in self.offers:
                raise ValueError(f"{variant.name} is offered by another plugin")
            mark = tx.mark()
            probe = self._make(tx, 0, platform, variant, {})
            tx.rollback(mark)
            self.offers[variant.name] = Offer(name, variant, probe.ops)

    def _remove(self, name: str) -> None:
        self.platforms.pop(name, None)
        self.offers = {key: offer for key, offer in self.offers.items() if offer.platform != name}


def _one_line(error: BaseException) -> str:
    text = error.message if isinstance(error, RmemError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:ERROR_MAX]
