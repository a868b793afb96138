"""Several VMMs at once: one ``rmem-vmm`` process each, and what they report.

Owns the processes. Waiting is for their events and their ends only.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SILENCE_SECONDS = 90.0


class VmmDied(Exception):
    """A VMM ended with a failure; the message is its own."""


@dataclass
class Run:
    """One VMM process, and all that it said."""

    consumer: str
    child: subprocess.Popen[str]
    events: dict[str, dict[str, Any]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Return what the report and the tables show of it."""
        launched, moved, checked = (self.events[n] for n in ("launched", "moved", "checked"))
        return {
            "consumer": self.consumer,
            "vm": launched["vm"],
            "vcpus": launched["vcpus"],
            "memory_bytes": launched["memory_bytes"],
            "way": launched["way"],
            "firmware_pages": launched["firmware_pages"],
            "measurement": launched["measurement"],
            "published_pages": self.events["verified"]["pages"],
            "moves": moved["moves"],
            "moved": moved["moved"],
            "unmovable": moved["unmovable"],
            "busy": moved["busy"],
            "failed": moved["failed"],
            "refusal": moved["refusal"],
            "checked_pages": checked["checked_pages"],
            "mismatched_pages": checked["mismatched_pages"],
            "rounds": checked["rounds"],
            "exits": checked["exits"],
            "freed_pages": self.events["done"]["freed_pages"],
        }


def run_at_once(
    socket_dir: Path,
    consumers: Sequence[str],
    options: Sequence[str],
    tell: Callable[[str, str, str], None],
) -> list[Run]:
    """Run one VMM per consumer, all at once, to their ends.

    Args:
        socket_dir: the daemon's directory.
        consumers: their consumers.
        options: further options of ``rmem-vmm``, the same for all.
        tell: told each event as it comes: consumer, event, sentence.

    Raises:
        VmmDied: one ended with a failure; the others are ended too.
    """
    runs: list[Run] = []
    with selectors.DefaultSelector() as selector:
        try:
            for consumer in consumers:
                run, stream = _start(socket_dir, consumer, options)
                runs.append(run)
                selector.register(stream, selectors.EVENT_READ, (run, bytearray()))
            _follow(selector, tell)
            return runs
        finally:
            for key in list(selector.get_map().values()):
                os.close(key.fd)
            for run in runs:
                if run.child.poll() is None:
                    run.child.kill()
                run.child.communicate()


def _start(socket_dir: Path, consumer: str, options: Sequence[str]) -> tuple[Run, int]:
    stream, theirs = os.pipe()
    child = subprocess.Popen(
        [
            sys.executable, "-m", "rmem_vmm.vmm", "--consumer", consumer, "--quiet",
            "--socket-dir", str(socket_dir), "--json-fd", str(theirs), *options,
        ],
        pass_fds=[theirs], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(theirs)
    return Run(consumer, child), stream


def _follow(selector: selectors.BaseSelector, tell: Callable[[str, str, str], None]) -> None:
    while selector.get_map():
        ready = selector.select(SILENCE_SECONDS)
        if not ready:
            raise VmmDied("the VMMs are silent")
        for key, _ in ready:
            run, pending = key.data
            said = os.read(key.fd, 1 << 16)
            if not said:
                selector.unregister(key.fd)
                os.close(key.fd)
                _require_success(run)
                continue
            pending += said
            *lines, rest = bytes(pending).split(b"\n")
            pending[:] = rest
            for line in lines:
                event = json.loads(line)
                run.events[event["event"]] = event
                tell(run.consumer, event["event"], event["text"])


def _require_success(run: Run) -> None:
    _, error = run.child.communicate(timeout=SILENCE_SECONDS)
    if run.child.returncode:
        raise VmmDied(
            f"the VMM of {run.consumer} ended with status {run.child.returncode}: {error.strip()}"
        )
