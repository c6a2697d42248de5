"""What a process does with the machine's memory: keep what it has had, and be refused what there is not."""

import contextlib
import ctypes
import re
import sys
from pathlib import Path

LIMITS = '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'  # of a container


def use_memory(device):
    """For a process that computes on `device`: keep memory, and on a CPU, on Linux, limit it."""
    if sys.platform == 'linux':
        keep_memory()
        if device.type == 'cpu':  # CUDA maps much that it does not use
            limit_memory()


def keep_memory():
    """Have glibc keep the memory of freed tensors: given back at once, it costs each step its page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def limit_memory():
    """Have more than what is free be refused, which can be told: Linux would grant it, and kill us later."""
    import resource

    with contextlib.suppress(OSError, TypeError, ValueError):  # where /proc and limits are others
        kilobytes = re.findall(r'(?:MemAvailable|SwapFree):\s+(\d+)', Path('/proc/meminfo').read_text())
        limits = [Path(path).read_text() for path in LIMITS if Path(path).exists()]  # 'max': none
        free = min(1024 * sum(map(int, kilobytes)), *(int(text) for text in limits if text != 'max\n'), 2**62)
        here = int(Path('/proc/self/statm').read_text().split()[5]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = here + free if hard == resource.RLIM_INFINITY else min(here + free, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
