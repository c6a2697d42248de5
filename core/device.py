"""Where to compute and how precisely: 'auto' settings decided, and what the hardware's peak is."""

import atexit
import contextlib
import ctypes
import gc
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path

import torch

from configurator import SettingError, one_of

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Dense tensor-core peaks in FLOP/s at 16 bits, from the makers' data sheets; whole names: an L40 is no L4.
PEAK_FLOPS = {'B200': 2250e12, 'H200': 989e12, 'H100': 989e12, 'H100 NVL': 835e12, 'H100 PCIE': 756e12,
              'A100': 312e12, 'A100 PCIE': 312e12, 'L40S': 362e12, 'L4': 121e12, 'A10': 125e12,
              'V100': 125e12, 'T4': 65e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def choose_device(name, local_rank=0, world_size=1):
    """The torch.device for a `device` setting: 'auto' is CUDA, then MPS, then CPU. Raises SettingError."""
    has_mps = world_size == 1 and torch.backends.mps.is_available()  # ranks cannot talk there
    if name == 'auto':
        name = 'cuda' if find_cuda(local_rank) else 'mps' if has_mps else 'cpu'
    if not re.fullmatch(r'cpu|cuda(:\d{1,3})?|mps', name):
        raise SettingError(f'device {name!r} is not auto, cpu, cuda, cuda:N or mps')
    device = torch.device(name)
    if name == 'mps' and not has_mps:
        raise SettingError('device mps: this machine has none, or not for several ranks; use --device cpu')
    if device.type != 'cuda':
        return device
    if device.index is not None and world_size > 1:
        raise SettingError(f'device {name}: {world_size} processes need a GPU each; use --device cuda')
    index, count = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if index >= count:
        raise SettingError(f'device {name}: this machine has {count} CUDA devices; use --device cpu')
    torch.cuda.set_device(index)
    return torch.device('cuda', index)


def find_cuda(local_rank):
    """Whether CUDA works. Where it should and does not, as under a driver too old for this torch, say so."""
    with warnings.catch_warnings(record=True) as found:
        works = torch.cuda.is_available()
    if found and not works and local_rank == 0:
        print(f"no GPU: {str(found[0].message).split('. ')[0]}, for torch {torch.__version__}; "
              'pytorch.org/get-started has builds for older drivers', file=sys.stderr)
    return works


def choose_dtype(name, device):
    """The torch.dtype for a `dtype` setting: 'auto' is bfloat16 where the hardware multiplies it, float16 on
    older CUDA GPUs, else float32. Raises SettingError."""
    one_of(('auto', *DTYPES), dtype=name)
    if name in DTYPES:
        return DTYPES[name]
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def autocast(device, dtype):
    """A context in which matrix multiplications compute in `dtype`, float32 ones on tensor cores."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def to_device(arrays, device):
    """NumPy arrays as tensors on the device; from pinned memory they travel to a GPU while it computes."""
    on_gpu = device.type == 'cuda'
    tensors = map(torch.from_numpy, arrays)
    return [(t.pin_memory() if on_gpu else t).to(device, non_blocking=on_gpu) for t in tensors]


def peak_flops(device):
    """Peak FLOP/s of a CUDA device at 16 bits, or 0 where it is not known."""
    name = torch.cuda.get_device_name(device).upper() if device.type == 'cuda' else ''
    name = re.sub(r'NVIDIA |TESLA |GEFORCE | (SXM\d|HBM\d\w*|\d+GB)', '', name.replace('-', ' '))
    return PEAK_FLOPS.get(name, 0)


# memory and threads ------------------------------------------------------------

LIMITS = '/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'  # of a container


def configure_memory(device):
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
