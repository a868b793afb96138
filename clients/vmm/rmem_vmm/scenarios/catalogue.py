"""The scenarios by name. What each shows, and with which consumers it runs unless told."""

from __future__ import annotations

from .devices import dma_pin_blocks_conversion, vhost_user_shared_only
from .memory import balloon, slot_hotplug
from .paging import external_pager
from .report import Scenario
from .storm import conversion_storm
from .traffic import bounce

TODAY = {"tdx": "tdx-today", "snp": "snp-move", "pkvm": "pkvm-gmem"}
# the first is migrated, the second punched
MOVABLE = {"tdx": "tdx-relocate", "snp": "snp-move", "pkvm": "pkvm-gmem"}

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            "swiotlb-conversion-storm",
            "Bursts of 256 KiB maps: every map converts, by all vCPUs at once; then through a "
            "reserved pool, up to one map more than fits.",
            TODAY, conversion_storm,
        ),
        Scenario(
            "dma-pin-blocks-conversion",
            "A device holds a receive buffer; the guest wants it private. The refusal names the "
            "device, and the conversion goes through once it has let go.",
            TODAY, dma_pin_blocks_conversion,
        ),
        Scenario(
            "vhost-user-shared-only",
            "A disk in a process of its own maps the bounce buffers. A descriptor that names "
            "private memory is refused, and the ring is taken back from it.",
            TODAY, vhost_user_shared_only,
        ),
        Scenario(
            "balloon",
            "Memory is punched, given back and faulted in again, by the daemon's accounts. A VMM "
            "that forgets to punch has both halves allocated, and is found out.",
            TODAY, balloon,
        ),
        Scenario(
            "slot-hotplug",
            "A slot with its file comes while vCPUs run, is used, goes, and leaves nothing.",
            TODAY, slot_hotplug,
        ),
        Scenario(
            "external-pager",
            "Another process resolves the guest's page faults, and is killed while one waits.",
            TODAY, external_pager,
        ),
        Scenario(
            "bounce-1g",
            "Two guests move bytes through bounce buffers to device processes and back; one is "
            "migrated throughout, the other's buffers are punched after every round.",
            MOVABLE, bounce,
        ),
    )
}  # fmt: skip
