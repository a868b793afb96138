"""Which memory keys are kept.

Owns their end. A key outlives its VM for as long as bytes do that are under it: in a file, or in a
frame that is leaked. Which ones do is asked of all frames in use, and therefore seldom.
"""

from __future__ import annotations

import numpy as np

from rmemd.engine.core import Core
from rmemd.hooks.tx import Tx
from rmemd.model.host import Host
from rmemd.units import PMD_PAGES, distinct

# so many keys are made at least between one look and the next
MADE_BETWEEN = 16
# the number of the key at which the next look is due
DUE = "key_look"


def forget(core: Core, tx: Tx) -> None:
    """Drop the keys of VMs that are gone, if a look is due and no frame's bytes are under them.

    As many keys are made before the next look as this one leaves, so that each of them pays for a
    constant share of a look. What is under way may bring bytes under a key that no frame has yet.
    """
    host = core.host
    made = host.counters.get("key", 0)
    if made < host.counters.get(DUE, MADE_BETWEEN) or core.ranges.any_in_progress:
        return
    alive = {vm.info.label for vm in core.vms.all()}
    under = _keys_of_frames(host)
    unused = [
        number
        for number, spec in host.keys.items()
        if spec.owner not in alive and number not in under
    ]
    for number in unused:
        tx.drop(host.keys, number)
    core.controller.forget(unused)
    tx.set(host.counters, DUE, made + max(MADE_BETWEEN, len(host.keys)))


def _keys_of_frames(host: Host) -> set[int]:
    """Return the keys that bytes of frames are under; free frames have none."""
    used = host.key.view.reshape(-1, PMD_PAGES)[host.free_in_block.view < PMD_PAGES].ravel()
    # neighbours mostly have the same, and what is left is sorted quickly
    first = np.ones(used.size, dtype=np.bool_)
    first[1:] = used[1:] != used[:-1]
    return set(distinct(used[first]).tolist())
