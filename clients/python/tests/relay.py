"""A relay between a client's socket and a daemon's that a test can cut at the moment it wants.

``hold`` keeps back what the daemon sends, so that requests arrive and their replies do not;
``cut`` ends every connection and forgets what was held. New connections pass again.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path


class Relay:
    """Listens on ``listen``, passes on to ``to``; both are paths of Unix sockets."""

    def __init__(self, listen: Path, to: Path) -> None:
        self._to = to
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._passing = threading.Event()
        self._passing.set()
        self.accepted = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(listen))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def hold(self) -> None:
        """Keep back what the daemon sends from now on."""
        self._passing.clear()

    def cut(self) -> None:
        """End every connection."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _shut(end)
        self._passing.set()

    def close(self) -> None:
        """End everything."""
        _shut(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            daemon = socket.socket(socket.AF_UNIX)
            try:
                daemon.connect(str(self._to))
            except OSError:  # nobody there: what a client of the daemon itself would see
                client.close()
                daemon.close()
                continue
            with self._lock:
                self._pairs.append((client, daemon))
            pair = [
                threading.Thread(target=self._pump, args=(client, daemon, False)),
                threading.Thread(target=self._pump, args=(daemon, client, True)),
            ]
            self._threads += pair
            for thread in pair:
                thread.start()

    def _pump(self, source: socket.socket, to: socket.socket, held: bool) -> None:
        try:
            while data := source.recv(65536):
                if held and not self._passing.is_set():
                    self._passing.wait()  # until the cut, which is the end of this connection
                    return
                to.sendall(data)
        except OSError:
            pass
        finally:
            _shut(source)
            _shut(to)
            source.close()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
