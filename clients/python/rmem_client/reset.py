"""Give everything back that a daemon's clients left: what a test needs before the next one."""

from __future__ import annotations

import re

from rmem.v1 import host_pb2

from .client import Client
from .errors import NotFound, RmemError

_PIN = re.compile(r" pin (\d+)$")
_OWNED = (host_pb2.FRAME_USE_PRIVATE, host_pb2.FRAME_USE_SHARED)


def reset(client: Client) -> str:
    """Remove fault rules, VMs, files and pins, bring frames online; return what is not as new.

    Everybody's, not only this client's: the daemon must be one's own. The answer is "" if every
    frame is free again. Handles and revisions go on counting.
    """
    try:
        _remove_all(client)
        host = client.host.get()
    except RmemError as error:
        return f"it could not be reset: {error}"
    if host.free_pages == host.nframes:
        return ""
    rest = {host_pb2.FrameUse.Name(c.use): c.npages for c in host.counts if c.npages}
    rest.pop("FRAME_USE_FREE", None)
    told = [f"{n} {use.removeprefix('FRAME_USE_').lower()}" for use, n in rest.items()]
    return f"frames are not back: {', '.join(told) or host.nframes - host.free_pages}"


def _remove_all(client: Client) -> None:
    # first, so that nothing below meets one
    for rule in client.host.list_faults().rules:
        client.host.remove_fault(rule.rule)
    for vm in client.vms.list().vms:
        client.vms.destroy(vm.vm)
    for file in client.files.list().files:
        client.files.close(file.file)
    while _unpin_one(client):
        pass
    host = client.host.get()
    if any(c.use == host_pb2.FRAME_USE_OFFLINE and c.npages for c in host.counts):
        client.host.online(0, host.nframes)


def _unpin_one(client: Client) -> bool:
    """Let the pins go that hold the first frame still held; return whether there was one.

    Without a file a frame is owned by its pins alone; there is no call that lists them.
    """
    held = next((run.pfn for run in client.host.frame_runs() if run.use in _OWNED), None)
    if held is None:
        return False
    page = client.host.page(pfn=held)
    pins = [int(found[1]) for holder in page.holders if (found := _PIN.search(holder.name))]
    for pin in pins:
        try:
            client.files.unpin(pin)
        except NotFound:  # somebody else's, in this very moment
            continue
    return bool(pins)
