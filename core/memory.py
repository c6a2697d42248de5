"""The memory of a process on Linux: an error that we can report instead of the out-of-memory killer.

Without torch, as prepare.py needs it, too.
"""

import contextlib
import ctypes
import re
import sys
from pathlib import Path

PROC = Path('/proc')
CGROUPS = Path('/sys/fs/cgroup')
NUMBER = '[0-9]{1,18}'  # a larger one, as version 1 of control groups has, means no limit


def configure_memory(device):
    """Set up the memory of a process that computes on `device`, a torch.device. Only Linux needs it."""
    if sys.platform == 'linux':
        keep_freed_memory()
        if device.type == 'cpu':  # CUDA maps much memory that it does not use
            limit_memory()


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors: given back at once, every step pays for page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)  # no block is mapped on its own
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap


def limit_memory():
    """Cap our memory at what is free, so that we get a MemoryError instead of the out-of-memory killer.

    A limit that the user has set (ulimit -d) is never raised. Without /proc, and on other systems than Linux,
    nothing is changed.
    """
    free = free_memory()
    statm = re.match(rf'(?:{NUMBER} ){{5}}({NUMBER}) ', read_text(PROC / 'self/statm'))
    if free is None or statm is None:
        return
    import resource

    data_pages = int(statm[1])
    limit = data_pages * resource.getpagesize() + free
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    for given in soft, hard:
        if given != resource.RLIM_INFINITY:
            limit = min(limit, given)
    with contextlib.suppress(OSError, ValueError, OverflowError):  # some sandboxes forbid it
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def free_memory():
    """Return the free bytes of the machine, or of the control group that has fewest; None if unknown.

    Containers, Slurm and systemd limit a process by its control groups. A group whose files are missing,
    unreadable or odd has no limit that we know.
    """
    kilobytes = re.findall(rf'(?:MemAvailable|SwapFree):\s+({NUMBER}) kB', read_text(PROC / 'meminfo'))
    if not kilobytes:
        return None
    free = 1024 * sum(int(number) for number in kilobytes)
    for folder in control_groups():
        free = min(free, free_in_group(folder))
    return max(free, 0)


def control_groups():
    """Return the folders of this process's memory control groups, from the innermost to the outermost.

    /proc/self/cgroup has a line '0::/PATH' (version 2) or 'N:memory:/PATH' (version 1). Each folder on the
    path has limits of its own. In a container the first folders of the path may not be there.
    """
    folders = []
    groups = re.findall('^[0-9]+:([^:\n]*):/(.*)$', read_text(PROC / 'self/cgroup'), re.MULTILINE)
    for controllers, group in [*groups, ('', ''), ('memory', '')]:
        if controllers and 'memory' not in controllers.split(','):
            continue
        root = CGROUPS / 'memory' if controllers else CGROUPS
        folder = root / group
        while folder.is_relative_to(root):
            if folder not in folders:
                folders.append(folder)
            folder = folder.parent
    return folders


def free_in_group(folder):
    """Return how many bytes a control group has free: its limit, less what it uses and cannot give back."""
    for limit_name, usage_name, cache_name in (
            ('memory.max', 'memory.current', 'inactive_file'),
            ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')):
        limit = read_number(folder / limit_name)
        if limit is None:
            continue
        used = read_number(folder / usage_name) or 0
        cached = re.search(rf'^{cache_name} ({NUMBER})$', read_text(folder / 'memory.stat'), re.MULTILINE)
        if cached:  # copies of files, which are dropped when memory is needed
            used -= int(cached[1])
        return limit - used
    return float('inf')


def read_number(path):
    """Return the number in a file, or None if there is none: no file, or a word such as 'max'."""
    text = read_text(path).strip()
    return int(text) if re.fullmatch(NUMBER, text) else None


def read_text(path):
    """Return the text of a file of the system, '' if it cannot be read."""
    try:
        return path.read_text(encoding='utf-8', errors='surrogateescape')
    except (OSError, ValueError):  # ValueError: no file can have this path
        return ''
