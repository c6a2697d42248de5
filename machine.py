"""What a process takes of its machine: memory, kept and no more than there is, and idle cores."""

import atexit
import contextlib
import ctypes
import gc
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

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
        if not kilobytes:
            return
        limits = [Path(path).read_text() for path in LIMITS if Path(path).exists()]  # 'max': none
        free = min(1024 * sum(map(int, kilobytes)), *(int(text) for text in limits if text != 'max\n'), 2**62)
        here = int(Path('/proc/self/statm').read_text().split()[5]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = here + free if hard == resource.RLIM_INFINITY else min(here + free, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def freeze_garbage():
    """What there is by now is never garbage: have it not looked through again."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or torch 2.15 says at the end that it leaked


class IdleCores:
    """Called once in a while, keeps torch to as many threads as there are cores that no other process keeps
    busy: a step waits for its slowest thread, and one that shares its core is slower than none.

    Only on Linux, and not where OMP_NUM_THREADS says how many there are to be.
    """

    def __init__(self):
        self.most = torch.get_num_threads()
        ours_to_choose = sys.platform == 'linux' and 'OMP_NUM_THREADS' not in os.environ
        self.before = self.times() if ours_to_choose else None

    def times(self):
        """Seconds: now, those that all processes together had of our cores, those of this process."""
        found = re.findall(r'^cpu(\d+) (.*)', Path('/proc/stat').read_text(), re.M)
        ours = [numbers.split() for core, numbers in found if int(core) in os.sched_getaffinity(0)]
        # user, nice, system, two of interrupts, and what a hypervisor took
        ticks = sum(int(numbers[i]) for numbers in ours for i in (0, 1, 2, 5, 6, 7))
        return time.monotonic(), ticks / os.sysconf('SC_CLK_TCK'), time.process_time()

    def __call__(self):
        if self.before and time.monotonic() - self.before[0] > 0.5:
            now = self.times()
            passed, busy, own = (after - before for after, before in zip(now, self.before, strict=True))
            others = max(0, math.ceil((busy - own) / passed - 0.25))  # beside us they get less than they want
            torch.set_num_threads(max(1, self.most - others))
            self.before = now
