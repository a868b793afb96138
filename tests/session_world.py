"""What the tests of the session socket build in a daemon: VMs, grants, and the roles' numbers."""

from __future__ import annotations

from rmem.v1 import session_pb2
from rmem_client import Client

PAGE = 4096
HOST, GUEST, DEVICE, ADMIN = 1, 2, 3, 4
NPAGES = 32


def make_vm(client: Client, consumer: str = "sw-protected", flags: int = 1) -> tuple[int, int]:
    """Make a VM with a file of NPAGES in slot 0 at address 0, and vCPU 0."""
    vm = client.vms.create(consumer)
    file = client.files.create(vm, NPAGES * PAGE, flags=flags)
    client.vms.set_memory_region(vm, 0, gpa=0, size_bytes=NPAGES * PAGE, file=file)
    client.vcpus.create(vm, 0)
    return vm, file


def grant(file: int, first: int, npages: int, read_only: bool = False) -> session_pb2.Grant:
    """Return a grant of pages."""
    return session_pb2.Grant(
        file=file, offset_bytes=first * PAGE, length_bytes=npages * PAGE, read_only=read_only
    )
