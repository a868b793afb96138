"""The descriptor store's protocol, as sd_notify(3) and sd_listen_fds(3) have it.

Owns messages and environment variables, for the keeper, which plays the service manager's part, and
for the daemon, which need not know which of the two it talks to. Imports the standard library only,
as all of this package does: the keeper stays small.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

NOTIFY_SOCKET = "NOTIFY_SOCKET"
LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID = "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"
# how many descriptors the service manager's store takes (systemd 254; our unit sets it for older)
FDSTORE = "FDSTORE"
# pid of our keeper, in the environment of a daemon that it has started again
KEEPER = "RMEMD_KEEPER"
LISTEN_FDS_START = 3
# the name of what came without one
STORED = "stored"
NAME_MAX = 255
MESSAGE_MAX = 4096
# the kernel's bound for one message (SCM_MAX_FD); the service manager's own is 768
FDS_MAX = 253
# a daemon that ends with this makes way for its successor, which is to be started at once
EX_SUCCESSOR = 133


def address_of(name: str) -> str | bytes:
    """Return $NOTIFY_SOCKET as the kernel takes it; "@name" is an abstract one."""
    return b"\0" + os.fsencode(name[1:]) if name.startswith("@") else name


def encode(*fields: tuple[str, str]) -> bytes:
    """Return a message of (variable, value)."""
    return "\n".join(f"{name}={value}" for name, value in fields).encode()


def decode(data: bytes) -> dict[str, str]:
    """Return a message's variables; what is no assignment is left out."""
    pairs = (line.partition("=") for line in data.decode(errors="replace").split("\n"))
    return {name: value for name, equals, value in pairs if equals}


def is_name(name: str) -> bool:
    """Say whether the store takes a descriptor of this name (systemd's fdname_is_valid)."""
    return len(name) <= NAME_MAX and all(" " <= c < "\x7f" and c != ":" for c in name)


def listening(environment: MutableMapping[str, str], pid: int) -> list[str]:
    """Take the names of the descriptors from 3 on that were handed to process ``pid``.

    The variables are removed, so that no child takes them for its own.
    """
    count = environment.pop(LISTEN_FDS, "")
    names = environment.pop(LISTEN_FDNAMES, "")
    if environment.pop(LISTEN_PID, "") != str(pid) or not count.isdecimal():
        return []
    given = names.split(":") if names else []
    return (given + [STORED] * int(count))[: int(count)]
