"""Numbers of the kernel's interface that requests carry, under the kernel's names."""

from __future__ import annotations

PAGE_BYTES = 4096

# CreateFile
GUEST_MEMFD_FLAG_MMAP = 1
GUEST_MEMFD_FLAG_INIT_SHARED = 2

# Fallocate
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

# SetMemoryRegion
KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2
KVM_MEM_GUEST_MEMFD = 4

# SetMemoryAttributes, ConvertFile
KVM_MEMORY_ATTRIBUTE_PRIVATE = 8

# SetPolicy
MPOL_DEFAULT = 0
MPOL_BIND = 2
MPOL_INTERLEAVE = 3


def attributes_of(private: bool) -> int:
    """Return the memory attributes of a private or a shared range."""
    return KVM_MEMORY_ATTRIBUTE_PRIVATE if private else 0
