"""The firmware image that a VMM loads: where it comes from, and what it is.

Owns the choice: a file that the user names, else OVMF where the system has one, else a small flat
image that is built here, byte for byte the same each time. Whichever it is, its origin says so.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 4096
BUILT_BYTES = 64 * 1024
# a guest's firmware ends where a 32-bit guest's address space does
MAX_BYTES = 16 << 20

# where distributions put OVMF, best first: the code volume alone, then whole images
OVMF_PLACES = (
    "/usr/share/OVMF/OVMF_CODE*.fd",
    "/usr/share/OVMF/OVMF.fd",
    "/usr/share/ovmf/OVMF.fd",
    "/usr/share/edk2/ovmf/OVMF_CODE*.fd",
    "/usr/share/edk2/x64/OVMF_CODE*.fd",
    "/usr/share/edk2-ovmf/x64/OVMF_CODE*.fd",
    "/usr/share/qemu/OVMF.fd",
    "/usr/share/qemu/ovmf-x86_64-code.bin",
    "/usr/share/qemu/edk2-x86_64-code.fd",
)

HEADER = b"rmem_vmm flat firmware image, version 1: a stand-in, built because there is no OVMF.fd\n"
# at the reset vector, 16 bytes below the end: cli; hlt; jmp back to the hlt
RESET_STUB = b"\xfa\xf4\xeb\xfd"
RESET_OFFSET = 16


class FirmwareError(Exception):
    """The image cannot be read, or is none."""


@dataclass(frozen=True)
class Firmware:
    """A firmware image, padded to whole pages at its front, so that its last byte stays the last.

    Attributes:
        image: the bytes.
        origin: where they come from, for people.
        built: whether they were built here for want of a real image.
    """

    image: bytes
    origin: str
    built: bool = False

    @property
    def npages(self) -> int:
        """Return how many pages the image has."""
        return len(self.image) // PAGE_BYTES

    @property
    def sha256(self) -> str:
        """Return the image's digest."""
        return hashlib.sha256(self.image).hexdigest()


def load(path: Path | None, places: Iterable[str] = OVMF_PLACES) -> Firmware:
    """Return the firmware to load.

    Args:
        path: the file to take; ``None``: OVMF if there is one, else a built image.
        places: glob patterns of the files that count as OVMF.

    Raises:
        FirmwareError: the file that was named cannot be read, is empty or is too big.
    """
    if path is not None:
        return _read(path, str(path))
    for found in _candidates(places):
        try:
            return _read(found, f"{found} (OVMF, found on this system)")
        except FirmwareError:
            continue
    return Firmware(build(), "built here, 64 KiB: this system has no OVMF.fd", built=True)


def build(size_bytes: int = BUILT_BYTES) -> bytes:
    """Build the flat image: a readable header, filler that differs page by page, a reset stub."""
    body = bytearray()
    while len(body) < size_bytes:
        body += hashlib.sha256(HEADER + struct.pack("<Q", len(body))).digest()
    del body[size_bytes:]
    body[: len(HEADER)] = HEADER
    at = size_bytes - RESET_OFFSET
    body[at:] = RESET_STUB.ljust(RESET_OFFSET, b"\x90")
    return bytes(body)


def _candidates(places: Iterable[str]) -> Iterable[Path]:
    for place in places:
        pattern = Path(place)
        yield from sorted(p for p in pattern.parent.glob(pattern.name) if p.is_file())


def _read(path: Path, origin: str) -> Firmware:
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_BYTES:
            raise FirmwareError(f"{path} has {size} bytes; a firmware image has 1 to {MAX_BYTES}")
        image = path.read_bytes()
    except OSError as error:
        raise FirmwareError(f"cannot read the firmware {path}: {error.strerror}") from error
    return Firmware(bytes(-len(image) % PAGE_BYTES) + image, origin)
