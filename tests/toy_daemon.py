"""A toy under the real keeper, in milliseconds: it keeps, drops, dies and ends as it is told.

``Toy`` starts ``python toy_daemon.py DIRECTORY CONTROL [option...]``, whose process becomes the
keeper as ``rmemd serve`` does; each life of the toy connects to the control socket and says what it
found, then does what it reads there, one JSON line at a time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 30.0


class Life:
    """One process of the toy: what it said at its start, and the way to tell it things."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE_SECONDS)
        self._sock = sock
        self._lines = sock.makefile("r")
        self.said: dict[str, Any] = json.loads(self._lines.readline())
        self.pid: int = self.said["pid"]

    @property
    def found(self) -> dict[str, str]:
        """Return what was handed back: name and contents."""
        found: dict[str, str] = self.said["found"]
        return found

    def do(self, what: str, *args: Any) -> Any:
        """Have it do something and return what it says; None if that was its end."""
        self._sock.sendall((json.dumps([what, *args]) + "\n").encode())
        return self.hear()

    def hear(self) -> Any:
        """Return what it says next; None at its end."""
        return json.loads(self._lines.readline() or "null")

    def close(self) -> None:
        """Hang up, which ends it on purpose."""
        self._lines.close()
        self._sock.close()


class Toy:
    """A keeper and the lives of its toy."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self._control = socket.socket(socket.AF_UNIX)
        self._control.settimeout(PATIENCE_SECONDS)
        self._control.bind(str(directory / "control"))
        self._control.listen()
        self._log = directory / "log"
        self._lives: list[Life] = []
        ready, theirs = os.pipe()
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, __file__, str(directory / "s"), str(directory / "control"),
                    str(theirs), json.dumps(settings),
                ],
                stdin=subprocess.DEVNULL, stderr=log, pass_fds=[theirs],
            )  # fmt: skip
        os.close(theirs)
        self.ready = ready

    def life(self) -> Life:
        """Wait for the next life."""
        self._lives.append(Life(self._control.accept()[0]))
        return self._lives[-1]

    def events(self) -> list[dict[str, Any]]:
        """Return what the keeper and the toy have logged."""
        whole = self._log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def close(self) -> None:
        """End what is left: whoever nobody answers has nothing to live for."""
        self._control.close()
        for life in self._lives:
            life.close()
        self.process.wait(PATIENCE_SECONDS)
        os.close(self.ready)


# --- the toy's own side ---------------------------------------------------------------------------
def _main() -> None:
    from rmemd.daemon import logs
    from rmemd.daemon.config import DaemonSection
    from rmemd.daemon.kept import begin
    from rmemd.daemon.sockets import SocketDir, notify

    directory, control, ready, settings = sys.argv[1:]
    logs.configure("info", as_json=True)
    section = DaemonSection(socket_dir=Path(directory), log_format="json", **json.loads(settings))
    kept = begin(section, False, int(ready))
    held: dict[str, int] = {}
    for name in list(kept.keeping.found):
        if name != SocketDir.LOCK:
            held[name] = kept.keeping.take(name) or 0
    made = kept.directory(section, False)
    kept.watch(made, section)
    if kept.is_first:
        os.close(int(ready))
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(control)
    except ConnectionRefusedError:
        notify("STOPPING=1")
        return
    lines = sock.makefile("r")

    def say(what: Any) -> None:
        # at once, as a handler may say something in the midst of what is said
        sock.sendall((json.dumps(what) + "\n").encode())

    found = {name: os.pread(fd, 1 << 16, 0).decode() for name, fd in held.items()}
    inheritable = [fd for fd in held.values() if os.get_inheritable(fd)]
    listen = {name: value for name, value in os.environ.items() if name.startswith("LISTEN_")}
    signal.signal(signal.SIGTERM, lambda number, frame: say("term"))
    signal.signal(signal.SIGHUP, lambda number, frame: say("hup"))
    say({"pid": os.getpid(), "found": found, "first": kept.is_first, "keeper": kept.keeper,
         "inheritable": inheritable, "listen": listen})  # fmt: skip
    for line in lines:
        what, *args = json.loads(line)
        if what == "keep":
            held[args[0]] = fd = os.memfd_create("toy", os.MFD_CLOEXEC)
            os.write(fd, args[1].encode())
            kept.keeping.keep(args[0], fd)
        elif what == "drop":
            kept.keeping.drop(args[0])
            os.close(held.pop(args[0]))
        elif what == "keep and die":
            fd = os.memfd_create("toy", os.MFD_CLOEXEC)
            os.write(fd, args[1].encode())
            kept.keeping.keep(args[0], fd)
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "notify":
            notify(args[0])
        elif what == "keeper":
            # asked for until it is another one
            while kept.keeper == args[0]:
                os.sched_yield()
        elif what == "end":
            os._exit(args[0])
        elif what == "die":
            os.kill(os.getpid(), args[0])
        say(kept.keeper)
    notify("STOPPING=1")
    os._exit(0)


if __name__ == "__main__":
    _main()
