"""A file's shared half, mapped: bytes that guest, VMM and devices share without the daemon.

Owns descriptors and mappings of them. Nothing that is written here is told to the daemon.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

# mappings that wait for a file of their size; the daemon keeps no more
SPARES_MAX = 16
SPARE_BYTES_MAX = 512 << 20
# so much is emptied at once: little enough to stay in a cache
_ZEROS = bytes(1 << 18)


class SharedMemory:
    """Part of a file's shared half; a context manager that maps it.

    Args:
        fd: its descriptor, which this closes.
        offset_bytes: where the part begins, page-aligned.
        length_bytes: how long it is; ``None``: to the end.
        read_only: whether it can be written.

    Attributes:
        fd: the descriptor.
        view: the bytes, while it is entered. What is made of it (slices, ``np.frombuffer``) must
            be gone at the end of the block.
    """

    def __init__(
        self, fd: int, offset_bytes: int = 0, length_bytes: int | None = None,
        read_only: bool = False,
    ) -> None:  # fmt: skip
        self.fd = fd
        self.view = memoryview(b"")
        self._map: mmap.mmap | None = None
        self._offset = offset_bytes
        size = os.fstat(fd).st_size
        self._length = size - offset_bytes if length_bytes is None else length_bytes
        self._protection = mmap.PROT_READ | (0 if read_only else mmap.PROT_WRITE)

    def __enter__(self) -> SharedMemory:
        try:
            self._map = mmap.mmap(
                self.fd, self._length, mmap.MAP_SHARED, self._protection, offset=self._offset
            )
        except BaseException:
            self.close()
            raise
        self.view = memoryview(self._map)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap it and close the descriptor.

        Raises:
            BufferError: something made of ``view`` still uses it.
        """
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.view.release()
        if self._map is not None:
            self._map.close()
            self._map = None


class MappedFile:
    """A file that a session has made, with its shared half mapped; a context manager of its life.

    Args:
        file: its handle.
        size_bytes: its size.
        fds: the descriptor that came with it, which this closes; none where ``memory`` serves.
        memory: of a file before it, of the same size.
        release: lets it go.

    Attributes:
        file: its handle.
        view: its bytes, until it is released. What is made of it (slices, ``np.frombuffer``) must
            not be used any more then: the memory may serve another file.
        memory: the mapping, which goes with the last that uses it.
    """

    def __init__(
        self, file: int, size_bytes: int, fds: list[int], memory: mmap.mmap | None,
        release: Callable[[MappedFile], None],
    ) -> None:  # fmt: skip
        self.file = file
        self._release: Callable[[MappedFile], None] | None = release
        for fd in fds:
            try:
                memory = mmap.mmap(fd, size_bytes)
            finally:
                os.close(fd)
        assert memory is not None, "neither a descriptor nor memory"
        self.memory = memory
        self.view = memoryview(memory)

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def release(self) -> None:
        """Let the file go, without waiting for that; once."""
        release, self._release = self._release, None
        if release is not None:
            release(self)
            self.view.release()

    def empty(self) -> None:
        """Overwrite its bytes with zeros, in place."""
        size = len(self.view)
        for at in range(0, size, len(_ZEROS)):
            n = min(size - at, len(_ZEROS))
            self.view[at : at + n] = _ZEROS[:n]


class Spares:
    """Mappings of files that were released, by the file whose they were. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_file: dict[int, mmap.mmap] = {}
        self._nbytes = 0

    def take(self, size_bytes: int) -> tuple[int, mmap.mmap] | None:
        """Return one of a size, the newest, with its file; it is the caller's then."""
        with self._lock:
            for file in reversed(self._by_file):
                if len(self._by_file[file]) == size_bytes:
                    return file, self._pop(file)
            return None

    def put(self, file: int, memory: mmap.mmap) -> None:
        """Keep one; the oldest go where there are too many."""
        with self._lock:
            self._by_file[file] = memory
            self._nbytes += len(memory)
            while len(self._by_file) > SPARES_MAX or self._nbytes > SPARE_BYTES_MAX:
                self._pop(next(iter(self._by_file)))

    def close(self) -> None:
        """Let go of all; a mapping that something still uses goes with that."""
        with self._lock:
            self._by_file.clear()
            self._nbytes = 0

    def _pop(self, file: int) -> mmap.mmap:
        memory = self._by_file.pop(file)
        self._nbytes -= len(memory)
        return memory
