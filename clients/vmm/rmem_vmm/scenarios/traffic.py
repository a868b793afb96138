"""Two bounce-buffer guests and their devices, one migrated and the other punched throughout.

Owns one scenario, and the operator's part in it: each time the first guest has done a round, its
private buffers go to another node, while the next round is on its way.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

from rmem_client import Client

from ..bouncevmm import ROUND_BYTES
from ..channel import SILENCE_SECONDS, Child, ChildFailed, Message
from .report import Report, Settings

MIGRATED, PUNCHED = "migrated", "punched"
COUNTS = ("moved", "busy", "unmovable", "failed")


class Operator:
    """Moves a guest's pages from node to node, once for each round that it tells.

    Attributes:
        counts: pages by what became of them.
        moves: how often it was asked.
        wanted: what the ops table says must become of them.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._nodes = [node.node for node in client.host.get().nodes]
        self.counts: Counter[str] = Counter()
        self.moves = 0
        self.wanted = "moved"

    def move(self, launched: Message) -> None:
        """Ask for all private buffers of a guest to be moved to the next node."""
        self.moves += 1
        self.wanted = "moved" if launched["movable"] else "unmovable"
        node = self._nodes[self.moves % len(self._nodes)]
        gfns = [(launched["gfn"], launched["npages"])]
        report = self._client.host.migrate(vm=launched["vm"], gfns=gfns, node=node).report
        for name in COUNTS:
            self.counts[name] += getattr(report, name)


def bounce(settings: Settings, consumers: tuple[str, ...]) -> Iterator[Report]:
    """Move bytes through shared memory by two guests at once; every byte is compared."""
    first, second = (consumers * 2)[:2]
    share = max(settings.bytes_moved // 2, ROUND_BYTES)
    with ExitStack() as stack:
        client = stack.enter_context(Client(settings.socket_dir))
        before = _frames(client)
        begun = time.monotonic()
        vmms: dict[str, Child] = {}
        for part, consumer, node in ((MIGRATED, first, 0), (PUNCHED, second, None)):
            vmms[part] = _start(settings, part, consumer, share, node)
            stack.callback(vmms[part].kill)
        operator = Operator(client)
        done = _follow(vmms, operator)
        seconds = time.monotonic() - begun
        for part, child in vmms.items():
            child.tell({"do": "go"})
            done[part] |= child.next()
        left = _frames(client)
    for part, figures in done.items():
        report = Report(f"{figures['consumer']}, {part}")
        _bytes(report, figures, share)
        if part == MIGRATED:
            _moved(report, operator)
        else:
            _punched(report, figures)
        report.expect("frames free, as before", left, before)
        report.figures["MiB/s, both guests"] = round(2 * share / (1 << 20) / seconds)
        yield report


def _frames(client: Client) -> int:
    """Return the frames that are free, or that a vendor could not give back: those are no loss."""
    return client.host.get().free_pages + client.host.accounting().leaked_pages


def _start(settings: Settings, part: str, consumer: str, share: int, node: int | None) -> Child:
    child = Child(f"VMM of {consumer}, {part}", "rmem_vmm.bouncevmm")
    child.tell(
        {
            "socket_dir": settings.socket_dir, "consumer": consumer, "bytes": share,
            "seed": settings.seed + (part == PUNCHED), "balloon": part == PUNCHED, "node": node,
        }
    )  # fmt: skip
    return child


def _follow(vmms: dict[str, Child], operator: Operator) -> dict[str, Message]:
    """Serve both VMMs' messages until both are done."""
    launched: Message = {}
    done: dict[str, Message] = {}
    while len(done) < len(vmms):
        waiting = {child.channel: part for part, child in vmms.items() if part not in done}
        ready, _, _ = select.select(list(waiting), [], [], SILENCE_SECONDS)
        if not ready:
            raise ChildFailed("both VMMs are silent")
        for channel in ready:
            part = waiting[channel]
            said = vmms[part].next()
            if said["event"] == "done":
                done[part] = said
            elif part == MIGRATED and said["event"] == "launched":
                launched = said
            elif part == MIGRATED and said["event"] == "round":
                operator.move(launched)
    return {part: done[part] for part in vmms}


def _bytes(report: Report, figures: Message, share: int) -> None:
    pages = share // ROUND_BYTES * (ROUND_BYTES // 4096)
    report.expect("pages that the device compared", figures["device_pages"], pages)
    report.expect("… and found wrong", figures["device_wrong"], 0)
    report.expect("answers that the guest compared", figures["guest_pages"], pages,
                  f"{figures['guest_pages']}, 0 wrong")  # fmt: skip
    report.figures["MiB to the device, and back"] = figures["bytes"] >> 20
    report.figures["requests"] = figures["requests"]
    report.figures["pins by the device"] = figures["pins"]
    report.figures["rounds"] = figures["rounds"]
    report.figures["pages freed at the end"] = figures["freed_pages"]


def _moved(report: Report, operator: Operator) -> None:
    counts = {name: operator.counts[name] for name in COUNTS if operator.counts[name]}
    said = ", ".join(f"{n} {name}" for name, n in counts.items())
    ok = operator.counts[operator.wanted] > 0 and set(counts) <= {operator.wanted, "busy"}
    report.require("private pages migrated meanwhile", ok, said)
    report.figures["migrations asked"] = operator.moves


def _punched(report: Report, figures: Message) -> None:
    report.expect("punches that left a page", figures["not_punched"], 0)
    pages = figures["rounds"] * (ROUND_BYTES // 4096)
    report.expect("pages punched meanwhile", figures["punched_pages"], pages)
    report.figures["punches"] = figures["punches"]
