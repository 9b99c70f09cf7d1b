"""glibc's allocator, told to keep freed memory."""

import ctypes
import sys

# mallopt(3): parameters, and the largest threshold glibc accepts on 64 bits.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes
KEEP = 512 * 2**20  # bytes


def keep_freed_memory() -> None:
    """Serve arrays of a few megabytes from memory that was freed before.

    By default each is mapped anew and faulted in page by page, in every batch: an encoder on the CPU
    spends a third of its time on that (docs/performance.md). Other systems' allocators are left alone.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            # Threads would get arenas of their own, which give back what they free whatever the other settings say.
            libc.mallopt(M_ARENA_MAX, 1)
            libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
            libc.mallopt(M_TRIM_THRESHOLD, KEEP)
