"""States that a consumer must not take: of another kind, or of another version.

Owns the probe that the conformance kit makes at every swap. Whatever it does is undone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from rmemd.consumers.guard import Consumer
from rmemd.engine.core import Core
from rmemd.errors import PluginFault, RmemError
from rmemd.hooks.state import State
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Variant


def taken(
    core: Core, consumer: Consumer, variant: Variant, config: Mapping[str, str], state: State
) -> Iterator[str]:
    """Offer strange states to a fresh object; yield how it took one, or failed to refuse it.

    ``state`` is what the VM's present ``consumer`` exports.
    """
    foreign = replace(state, kind=f"not {state.kind}")
    newer = replace(state, version=state.version + 1)
    for strange in (foreign, newer):
        what = f"{strange.kind!r} version {strange.version}"
        try:
            _offer(core, consumer, variant, config, strange)
            yield f"a state of {what} is taken"
        except PluginFault as fault:
            yield f"a state of {what} is not refused: {fault}"
        except RmemError:
            continue


def _offer(
    core: Core, consumer: Consumer, variant: Variant, config: Mapping[str, str], state: State
) -> None:
    vm, platform = consumer.vm, consumer.platform
    tx = Tx(core.space, "probe")
    with core.locked():
        try:
            for name in [n for n in core.space.tables if n.startswith(f"vm/{vm}/{platform.name}/")]:
                tx.destroy(name)
            new = core.registry.make_of(tx, vm, platform, variant, config, importing=True)
            new.call(tx, "import_state", state)
        finally:
            tx.rollback()
