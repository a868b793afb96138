"""A VMM with its processes in a state that a seed has chosen, and a bystander of another tenant.

Owns what the deaths of VMM processes are tried on, and the ledger of what they must leave alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from daemons import Daemon
from session_clients import ClientProcess, Clients
from session_world import DEVICE, GUEST, HOST, PAGE, grant, make_vm

from rmem_client import Client, vcpus
from rmem_client.session import Session


@dataclass
class Bystander:
    """Another tenant's VM: with a pin, references, shared bytes, and a guest that has written."""

    session: Session
    client: Client
    vm: int
    file: int

    @classmethod
    def make(cls, daemon: Daemon) -> Bystander:
        ticket = daemon.client().sessions.create_ticket(HOST, tenant="uid:4242")
        session = Session.open(daemon.socket_dir, ticket=ticket)
        client = daemon.client(token=session.token)
        vm, file = make_vm(client)
        session.convert_file(file, 0, 4 * PAGE, private=False)
        session.write_shared(file, 0, b"the bystander's")
        session.pin(file, 0, 2 * PAGE, "DMA")
        session.get(file, 4 * PAGE, 4 * PAGE)
        client.vcpus.set_programme(vm, 0, [vcpus.write(4 * PAGE, 4 * PAGE, seed=5, private=True)])
        client.vcpus.run(vm, 0)
        return cls(session, client, vm, file)

    def require_untouched(self) -> None:
        assert self.session.read_shared(self.file, 0, 15) == b"the bystander's"
        programme = [vcpus.check(4 * PAGE, 4 * PAGE, seed=5, private=True)]
        self.client.vcpus.set_programme(self.vm, 0, programme)
        exited = self.client.vcpus.run(self.vm, 0)
        assert (exited.checked_pages, exited.mismatched_pages) == (4, 0)


def ledger(daemon: Daemon) -> Any:
    """Return all that a dead client must have left as it was: frames, fds, holders, objects."""
    client = daemon.client()
    host = client.host.get()
    pins = [str(pin) for pin in client.files.pins().pins]
    counts = {count.use: count.npages for count in host.counts}
    runs = [str(run) for run in client.host.frame_runs() if run.use]
    sessions = [str(session) for session in client.sessions.list().sessions]
    left = (host.free_pages, counts, host.vms, host.files, pins, runs, sessions)
    client.close()
    return left


class Household:
    """A VMM with its vCPU and device processes, in a state that a seed has chosen."""

    def __init__(self, daemon: Daemon, clients: Clients, dice: random.Random) -> None:
        self.daemon, self.dice = daemon, dice
        self.vmm = clients().open(daemon.socket_dir)
        self.rpc = daemon.client(token=self.vmm.token)
        self.guests = [self._vm() for _ in range(dice.randrange(3))]
        self.below: list[ClientProcess] = []
        for vm, file in self.guests:
            for role in dice.sample([GUEST, DEVICE], dice.randrange(3)):
                self.below.append(self._below(clients, role, vm, file))
        if dice.random() < 0.5:
            self.vmm.do("fork")
        for one in self.below:
            if dice.random() < 0.3:
                one.do("fork")

    def _vm(self) -> tuple[int, int]:
        dice, vmm = self.dice, self.vmm
        vm, file = make_vm(self.rpc)
        shared = dice.randrange(1, 8)
        vmm.do("convert_file", file, 0, shared * PAGE, private=False)
        for _ in range(dice.randrange(4)):
            vmm.do("pin", file, dice.randrange(shared) * PAGE, PAGE)
        for _ in range(dice.randrange(3)):
            vmm.do("get", file, dice.randrange(8, 16) * PAGE, dice.randrange(1, 5) * PAGE)
        if dice.random() < 0.5:
            vmm.do("fault", vm, 16 * PAGE, 4 * PAGE)
        if dice.random() < 0.5:
            vmm.do("map", file)
            vmm.do("poke", 0, b"unseen")
        if dice.random() < 0.3:
            vmm.do("register_faults", file, 20 * PAGE, 4 * PAGE)
        return vm, file

    def _below(self, clients: Clients, role: int, vm: int, file: int) -> ClientProcess:
        if role == GUEST:
            ticket = self.rpc.sessions.create_ticket(GUEST, vm=vm)
            one = clients().open(self.daemon.socket_dir, ticket=ticket.hex())
            one.do("write_guest", vm, 0, 17 * PAGE, b"guest")
            return one
        ticket = self.rpc.sessions.create_ticket(DEVICE, grants=[grant(file, 0, 1)])
        one = clients().open(self.daemon.socket_dir, ticket=ticket.hex())
        one.do("pin", file, 0, PAGE)
        return one

    def in_flight(self) -> None:
        """Leave requests on their way, so that death comes in the middle of them."""
        if self.guests:
            _, file = self.guests[0]
            self.vmm.begin("many", "pin", [[file, 0, PAGE]] * self.dice.randrange(30))
