"""Give everything back that a daemon's clients left: what a test needs before the next one."""

from __future__ import annotations

from contextlib import suppress

from rmem.v1 import host_pb2

from .client import Client
from .errors import NotFound, RmemError


def reset(client: Client) -> str:
    """Remove rules, sessions, VMs, files and pins, bring frames online; return what is not as new.

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
    for session in client.sessions.list().sessions:
        with suppress(NotFound):  # it went with the one that it was opened below
            client.sessions.close(session.session)
    for vm in client.vms.list().vms:
        client.vms.destroy(vm.vm)
    for file in client.files.list().files:
        client.files.close(file.file)
    for pin in client.files.pins().pins:
        with suppress(NotFound):  # it went with its session
            client.files.unpin(pin.pin)
    host = client.host.get()
    if any(c.use == host_pb2.FRAME_USE_OFFLINE and c.npages for c in host.counts):
        client.host.online(0, host.nframes)
