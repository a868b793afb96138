"""A file's shared half, mapped: bytes that guest, VMM and devices share without the daemon.

Owns a descriptor and a mapping of it. Nothing that is written here is told to the daemon.
"""

from __future__ import annotations

import mmap
import os


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
