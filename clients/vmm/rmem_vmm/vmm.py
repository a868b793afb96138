"""A VMM: one process per VM, which starts one process per vCPU (``rmem-vmm``).

Owns the life of one guest: launch, verify what it publishes, move its memory while it runs, stop
it, tear it down. Events go out as JSON lines (``--json-fd``) and, for people, to standard output.
Exit status 0 means that every byte that the guest and the VMM compared was right.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click

from rmem.v1 import consumer_pb2
from rmem_client import Client, RmemError
from rmem_client.constants import PAGE_BYTES

from . import firmware as firmwares
from . import guest
from .firmware import Firmware, FirmwareError
from .machine import (
    Machine,
    create,
    dispose,
    finalize,
    firmware_is_private,
    frames_of,
    load_firmware,
)
from .pattern import differing_pages, words
from .units import SIZE
from .vcpu import Spec

# a vCPU's process that says nothing for so long is stuck
SILENCE_SECONDS = 60.0


class VmmFailed(Exception):
    """The guest did not end as it should have."""


@dataclass(frozen=True)
class Settings:
    """What a VMM is started with."""

    socket_dir: str
    consumer: str
    memory_bytes: int
    vcpus: int = 2
    seed: int = 1
    moves: int = 4
    work_pages: int = guest.WORK_PAGES


class Events:
    """Tells what happens: JSON lines on a descriptor, sentences on standard output."""

    def __init__(self, fd: int | None, quiet: bool) -> None:
        self._stream: IO[str] | None = None if fd is None else os.fdopen(fd, "w")
        self._quiet = quiet

    def say(self, event: str, text: str, **fields: Any) -> None:
        """Tell one event."""
        if self._stream is not None:
            print(json.dumps({"event": event, "text": text, **fields}), file=self._stream)
            self._stream.flush()
        if not self._quiet:
            click.echo(text)


class VcpuHandles:
    """The vCPUs' processes, and what they say."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        self._children = [self._spawn(settings, machine, i) for i in range(machine.vcpus)]
        self._selector = selectors.DefaultSelector()
        for index, child in enumerate(self._children):
            assert child.stdout is not None
            self._selector.register(child.stdout, selectors.EVENT_READ, index)

    @staticmethod
    def _spawn(settings: Settings, machine: Machine, index: int) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "rmem_vmm.vcpu"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        spec = Spec(settings.socket_dir, machine, index, settings.seed, settings.work_pages)
        _order(child, spec.dumps())
        return child

    def order(self, word: str) -> None:
        """Give every vCPU an order."""
        for child in self._children:
            _order(child, word)

    def wait_all(self, event: str) -> list[dict[str, Any]]:
        """Wait until each vCPU has said ``event``; return what they said, by vCPU.

        Raises:
            VmmFailed: one of them ended instead, or all are silent.
        """
        said: dict[int, dict[str, Any]] = {}
        for index, message in self._messages():
            if message["event"] == event:
                said[index] = message
            elif message["event"] == "ended":
                raise VmmFailed(message["failure"] or f"vCPU {index} ended before its time")
            if len(said) == len(self._children):
                return [said[i] for i in sorted(said)]
        raise VmmFailed(f"vCPUs {sorted(set(range(len(self._children))) - set(said))} are silent")

    def wait_readable(self, fd: int) -> None:
        """Wait until a descriptor is readable, or a vCPU says something (which ends it too)."""
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            for child in self._children:
                assert child.stdout is not None
                selector.register(child.stdout, selectors.EVENT_READ)
            selector.select()

    def join(self) -> list[int]:
        """Wait for the processes to end; return their statuses."""
        return [child.wait(SILENCE_SECONDS) for child in self._children]

    def kill(self) -> None:
        """End whatever still runs."""
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()

    def _messages(self) -> Iterator[tuple[int, dict[str, Any]]]:
        while ready := self._selector.select(SILENCE_SECONDS):
            for key, _ in ready:
                line = key.fileobj.readline()  # type: ignore[union-attr]
                if not line:
                    status = self._children[key.data].wait()
                    raise VmmFailed(f"vCPU {key.data}'s process died with status {status}")
                message = json.loads(line)
                if message["event"] == "ended":
                    self._selector.unregister(key.fileobj)
                yield key.data, message


def _order(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    try:
        child.stdin.write(line + "\n")
        child.stdin.flush()
    except BrokenPipeError:  # it has ended, and what it said before that says why
        return


class Vmm:
    """One guest, from launch to teardown."""

    def __init__(self, client: Client, settings: Settings, image: Firmware, events: Events) -> None:
        self._client = client
        self._settings = settings
        self._firmware = image
        self._events = events

    def run(self, until_fd: int | None = None) -> None:
        """Run the guest to its end.

        Args:
            until_fd: let the guest go on until this descriptor is readable.

        Raises:
            VmmFailed: it did not end well; the message names the vCPU.
        """
        consumer = find_consumer(self._client, self._settings.consumer)
        machine = create(
            self._client, consumer, memory_bytes=self._settings.memory_bytes,
            firmware_bytes=len(self._firmware.image), vcpus=self._settings.vcpus,
            name=self._settings.consumer,
        )  # fmt: skip
        try:
            self._run(machine, until_fd)
        except BaseException:
            with suppress(RmemError):  # the failure is what counts
                dispose(self._client, machine)
            raise
        freed = dispose(self._client, machine)
        self._say(machine, "done", f"torn down, {freed} pages freed", freed_pages=freed)

    def _run(self, machine: Machine, until_fd: int | None) -> None:
        self._launch(machine)
        vcpus = VcpuHandles(self._settings, machine)
        try:
            self._verify(machine, vcpus.wait_all("published"))
            vcpus.order("go")
            vcpus.wait_all("looping")
            self._move(machine)
            if until_fd is not None:
                vcpus.wait_readable(until_fd)
            vcpus.order("stop")
            self._collect(machine, vcpus)
        finally:
            vcpus.kill()

    def _launch(self, machine: Machine) -> None:
        image = self._firmware
        for index in range(machine.vcpus):
            # too little memory is said before anything runs
            self._mine(machine, index)
        way = load_firmware(self._client, machine, image)
        measurement = finalize(self._client, machine)
        self._say(
            machine, "launched", f"firmware of {image.npages} pages {way}"
            + (f"; measurement {measurement.hex()[:16]}…" if measurement else "; not measured"),
            firmware_pages=image.npages, way=way, measurement=measurement.hex(),
            memory_bytes=machine.memory_bytes, vcpus=machine.vcpus,
        )  # fmt: skip

    def _verify(self, machine: Machine, published: list[dict[str, Any]]) -> None:
        """Read what the guests published and compare it with what it must be."""
        total = 0
        for index in range(len(published)):
            mine = self._mine(machine, index)
            for where, source in guest.published(machine, mine):
                wanted = words(mine.seed, source.gpa, source.size_bytes)
                total += self._compare(machine, index, where.gpa, wanted, "shared buffer")
            if mine.show.npages:
                at = mine.show.gpa if firmware_is_private(machine) else machine.firmware_gpa
                total += self._compare(machine, index, at, self._firmware.image, "firmware")
        self._say(
            machine, "verified", f"{total} pages that the guest published are right", pages=total
        )

    def _compare(self, machine: Machine, index: int, gpa: int, wanted: bytes, what: str) -> int:
        found = self._client.files.read_shared(machine.file, machine.offset_of(gpa), len(wanted))
        wrong = differing_pages(found, wanted)
        if wrong:
            raise VmmFailed(
                f"{machine.consumer} vm/{machine.vm} vCPU {index}: {wrong} pages of the {what} "
                f"at gpa {gpa:#x} are not what the guest wrote"
            )
        return len(wanted) // PAGE_BYTES

    def _move(self, machine: Machine) -> None:
        """Move every vCPU's working set from node to node while the vCPUs check it."""
        nodes = [node.node for node in self._client.host.get().nodes]
        ranges = [self._mine(machine, index).work for index in range(machine.vcpus)]
        counts = dict.fromkeys(("moved", "unmovable", "busy", "failed"), 0)
        said = ""
        for turn in range(self._settings.moves):
            node = nodes[(turn + 1) % len(nodes)] if len(nodes) > 1 else None
            pfns = frames_of(self._client, machine, ranges)
            report = self._client.host.migrate(pfns=pfns, node=node).report
            for name in counts:
                counts[name] += getattr(report, name)
            said = next((run.refusal.reason for run in report.runs if run.refusal.reason), said)
        text = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        self._say(
            machine, "moved", f"migrate under load, {self._settings.moves} times: {text} pages"
            + (f" ({said})" if said else ""), moves=self._settings.moves, refusal=said, **counts,
        )  # fmt: skip

    def _collect(self, machine: Machine, vcpus: VcpuHandles) -> None:
        ended = vcpus.wait_all("ended")
        statuses = vcpus.join()
        failures = [message["failure"] for message in ended if message["failure"]]
        checked = sum(message["checked_pages"] for message in ended)
        mismatched = sum(message["mismatched_pages"] for message in ended)
        exits: dict[str, int] = {}
        for message in ended:
            for name, count in message["exits"].items():
                exits[name] = exits.get(name, 0) + count
        self._say(
            machine, "checked", f"{checked} pages checked by {len(ended)} vCPUs, "
            f"{mismatched} wrong", checked_pages=checked, mismatched_pages=mismatched,
            rounds=sum(message["rounds"] for message in ended), exits=exits,
        )  # fmt: skip
        if failures or any(statuses) or mismatched or not checked:
            raise VmmFailed("; ".join(failures) or f"vCPU processes ended with {statuses}")

    def _mine(self, machine: Machine, index: int) -> guest.Layout:
        return guest.layout(machine, index, self._settings.seed, self._settings.work_pages)

    def _say(self, machine: Machine, event: str, text: str, **fields: Any) -> None:
        about = f"{machine.consumer} vm/{machine.vm}"
        self._events.say(
            event, f"{about}: {text}", consumer=machine.consumer, vm=machine.vm, **fields
        )


def find_consumer(client: Client, name: str) -> consumer_pb2.Consumer:
    """Return a consumer by its full name.

    Raises:
        VmmFailed: the daemon has none of that name; those that it has are listed.
    """
    known = {consumer.name: consumer for consumer in client.consumers.list().consumers}
    if name not in known:
        raise VmmFailed(f"the daemon has no consumer {name!r}; it has {', '.join(sorted(known))}")
    return known[name]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--consumer", required=True, help="Vendor back end, such as tdx-today.")
@click.option("--socket-dir", type=click.Path(), help="Directory of the daemon's socket.")
@click.option("--memory", type=SIZE, default="64M", show_default=True, help="The guest's RAM.")
@click.option("--vcpus", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--firmware", type=click.Path(path_type=Path), help="Image; default: OVMF, or built.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of what guests write.")
@click.option(
    "--work-pages", type=click.IntRange(32, 1 << 20), default=guest.WORK_PAGES, show_default=True,
    help="Pages that each vCPU fills and checks.",
)  # fmt: skip
@click.option(
    "--moves", type=click.IntRange(0, 10_000), default=4, show_default=True,
    help="How often its memory is migrated while it runs.",
)  # fmt: skip
@click.option("--until-fd", type=int, help="Let the guest run until this descriptor is readable.")
@click.option("--json-fd", type=int, help="Descriptor that gets events as JSON lines.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def main(
    consumer: str,
    socket_dir: str | None,
    memory: int,
    vcpus: int,
    firmware: Path | None,
    seed: int,
    work_pages: int,
    moves: int,
    until_fd: int | None,
    json_fd: int | None,
    quiet: bool,
) -> None:
    """Run one guest on rmemd, check all of its bytes, and say so by the exit status."""
    events = Events(json_fd, quiet)
    with Client(socket_dir) as client:
        directory = str(client.socket.parent)
        settings = Settings(directory, consumer, memory, vcpus, seed, moves, work_pages)
        try:
            Vmm(client, settings, firmwares.load(firmware), events).run(until_fd)
        except (VmmFailed, RmemError, FirmwareError, ValueError) as error:
            if json_fd is not None:
                events.say("failed", f"rmem-vmm: {error}", consumer=consumer, reason=str(error))
            click.echo(f"rmem-vmm: {error}", err=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
