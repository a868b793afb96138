"""Where the daemon's socket is, and what is wrong with it when nobody answers.

Owns the rule that finds the socket directory, which the daemon and every client follow.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import quote

SOCKET_NAME = "rmemd.sock"

# sockaddr_un.sun_path has 108 bytes, the last of which ends the string
MAX_SOCKET_PATH_BYTES = 107


def default_socket_dir() -> Path:
    """Return the directory of the daemon's sockets.

    The first of these that applies: ``$RMEMD_SOCKET_DIR``; ``$XDG_RUNTIME_DIR/rmemd``;
    ``/run/rmemd`` for root; ``/tmp/rmemd-<uid>`` for everybody else.
    """
    if named := os.environ.get("RMEMD_SOCKET_DIR"):
        return Path(named)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "rmemd"
    uid = os.getuid()
    return Path("/run/rmemd") if uid == 0 else Path(f"/tmp/rmemd-{uid}")


def grpc_target(socket: Path) -> str:
    """Return the gRPC target of a socket; gRPC reads it as a URI, so odd characters are quoted."""
    return "unix:" + quote(str(socket.absolute()))


def path_bytes(socket: Path) -> int:
    """Return the length of a socket's path as the kernel counts it."""
    return len(os.fsencode(socket.absolute()))


def why_unreachable(socket: Path) -> tuple[str, str]:
    """Return what is wrong with a socket that nobody answers on, and what to try."""
    length, most = path_bytes(socket), MAX_SOCKET_PATH_BYTES
    if length > most:
        problem = f"its path has {length} bytes, and a Unix socket's at most {most}"
        return problem, "Choose a shorter directory."
    try:
        mode = socket.stat().st_mode
    except PermissionError:
        return "its directory is closed to you", "Be the daemon's user, or join its group."
    except OSError:
        return (
            "there is no such socket",
            "Start rmemd, or name its directory: RMEMD_SOCKET_DIR, or --socket-dir.",
        )
    if not stat.S_ISSOCK(mode):
        return "it is not a socket", "Name the directory that rmemd was started with."
    if not os.access(socket, os.W_OK):
        return "you may not connect to it", "Be the daemon's user, or join its group."
    return (
        "nobody answers on it: the daemon is starting, or died",
        "Wait for it with Client.wait_ready() or `rmemctl ready`, or start rmemd again.",
    )
