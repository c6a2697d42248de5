"""Where to compute and how precisely: the 'auto' settings, the hardware's peak, CPU threads."""

import contextlib
import math
import os
import platform
import re
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from configurator import SettingError, UserError, one_of, out_of_memory
from core.distributed import get_ranks

PROC_STAT = Path('/proc/stat')  # how busy each core has been; only Linux has it
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Dense tensor-core peaks in FLOP/s at 16 bits, from the makers' data sheets. Names are compared whole: an L40
# is not an L4.
PEAK_FLOPS = {
    'B200': 2250e12, 'H200': 989e12, 'H100': 989e12, 'H100 NVL': 835e12, 'H100 PCIE': 756e12,
    'A100': 312e12, 'A100 PCIE': 312e12, 'L40S': 362e12, 'L4': 121e12, 'A10': 125e12, 'V100': 125e12,
    'T4': 65e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
}


# the device -------------------------------------------------------------------

def choose_device(name, local_rank=0, world_size=1):
    """Return the torch.device that a `device` setting means; 'auto' is CUDA, then MPS, then CPU.

    Raises SettingError if this machine does not have it.
    """
    has_mps = torch.backends.mps.is_available() and world_size == 1  # ranks cannot communicate there
    if name == 'auto':
        if find_cuda(local_rank):
            name = 'cuda'
        elif has_mps:
            name = 'mps'
        else:
            name = 'cpu'
    if not re.fullmatch(r'cpu|cuda(:\d{1,2})?|mps', name):
        raise SettingError(f'device is {name!r}; type auto, cpu, cuda, cuda:N or mps')
    device = torch.device(name)
    if device.type == 'mps' and not has_mps:
        raise SettingError('device mps: there is no MPS, or there are several ranks; use --device cpu')
    if device.type == 'mps' and not mps_is_reliable():
        print(f'torch {torch.__version__} computes some matrix products on MPS wrongly: '
              "pip install 'torch>=2.14', or use --device cpu", file=sys.stderr)
    if device.type != 'cuda':
        return device
    if device.index is not None and world_size > 1:
        raise SettingError(f'device {name}: {world_size} processes need a GPU each; use --device cuda')
    index = local_rank if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        raise SettingError(f'device {name}: this machine has {count} CUDA devices; use --device cpu')
    torch.cuda.set_device(index)
    device = torch.device('cuda', index)
    check_kernels(device)
    return device


def mps_is_reliable():
    """Return whether this torch computes correctly on MPS, as far as we know.

    Issues of pytorch, all solved in 2.14: float32 products whose left side is transposed are wrong (#193487),
    causal attention in half precision sees future tokens (#195910), and attention of one token is wrong for
    several sequences at once (#181133, until 2.11).
    """
    return torch.__version__ >= (2, 14)


def check_kernels(device):
    """Raise UserError if this torch has no kernels for a CUDA device: it is too old for it, or too new."""
    try:
        torch.ones(1, device=device)
    except RuntimeError as error:
        if 'no kernel image' not in str(error):
            raise
        gpu = torch.cuda.get_device_name(device)
        raise UserError(f'torch {torch.__version__} has no kernels for the {gpu}. For a V100 and older GPUs, '
                        'pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126; for '
                        'newer ones, the newest torch; or use --device cpu') from error


def find_cuda(local_rank):
    """Return whether CUDA works. If it should but does not (say, the driver is too old), print why."""
    with warnings.catch_warnings(record=True) as caught:
        works = torch.cuda.is_available()
    if caught and not works and local_rank == 0:
        reason = str(caught[0].message).split('. ')[0]
        print(f'no GPU: {reason}, for torch {torch.__version__}; pytorch.org/get-started has builds for '
              'older drivers', file=sys.stderr)
    return works


def choose_dtype(name, device):
    """Return the torch.dtype that a `dtype` setting means.

    'auto' is bfloat16 if the hardware multiplies it, float16 on older CUDA GPUs, else float32. Raises
    SettingError.
    """
    one_of(('auto', *DTYPES), dtype=name)
    if device.type == 'mps' and name in ('bfloat16', 'float16') and not mps_is_reliable():
        raise SettingError(f'dtype {name}: in torch {torch.__version__} on MPS, attention in half precision '
                           "sees future tokens; pip install 'torch>=2.14', or use --dtype float32")
    if name != 'auto':
        return DTYPES[name]
    if device.type == 'cuda':
        has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if device.type == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def autocast(device, dtype):
    """Return a context in which matrix products are computed in `dtype`. Allow TF32 for float32 on a GPU."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def to_device(arrays, device):
    """Return NumPy arrays as tensors on the device. Pinned memory is copied while a GPU computes."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type != 'cuda':
        return [tensor.to(device) for tensor in tensors]
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


def peak_flops(device):
    """Return the peak FLOP/s of a CUDA device at 16 bits, or 0 if it is not known."""
    if device.type != 'cuda':
        return 0
    name = torch.cuda.get_device_name(device).upper().replace('-', ' ')
    name = re.sub(r'NVIDIA |TESLA |GEFORCE | (SXM\d|HBM\d\w*|\d+GB)', '', name)
    return PEAK_FLOPS.get(name, 0)


def describe_hardware(device, dtype, world_size):
    """Return in words what a run computes on."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
    else:
        name = f'{cpu_name()}, threads: {torch.get_num_threads()}'
    count = f'{world_size} x ' if world_size > 1 else ''
    dtype_name = str(dtype).removeprefix('torch.')
    return f'{count}{device.type} ({name}) in {dtype_name}, torch {torch.__version__}'


def cpu_name():
    cpuinfo = Path('/proc/cpuinfo')
    if cpuinfo.exists():
        found = re.search(r'model name\s*: (.*)', cpuinfo.read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


# torch.compile ----------------------------------------------------------------

def try_compile(train_model, score, x, y, context):
    """Compile what trains and what evaluates and return both, or None if compilation fails.

    train_model: a GPT, maybe wrapped in DDP. If it is, the backward graph is split at DDP's buckets, so that
    communication overlaps with computation. score: `count_loss` of the same GPT; it then takes batches of at
    most as many rows as x. x, y: a batch to try both on, as compilation fails only then. context: autocast.
    """
    compiled_model = torch.compile(train_model)
    compiled_score = partial(score_padded, torch.compile(score), len(x))
    train_model.require_backward_grad_sync = False  # every rank tries on its own
    try:
        with context:
            compiled_model(x, y).backward()
            train_model.eval()
            compiled_score(x, y)
        return compiled_model, compiled_score
    except Exception as error:  # no compiler, an old GPU: many libraries, many exceptions
        if out_of_memory(error):  # eager mode would need even more memory
            raise
        if get_ranks().rank == 0:
            print(f'torch.compile failed ({type(error).__name__}); continuing without it', file=sys.stderr)
        return None
    finally:
        train_model.train()
        train_model.zero_grad(set_to_none=True)


def score_padded(score, n_rows, idx, targets):
    """Return score(idx, targets) with n_rows rows: another shape would be compiled again."""
    missing = n_rows - len(idx)
    idx = F.pad(idx, (0, 0, 0, missing))
    targets = F.pad(targets, (0, 0, 0, missing), value=-1)
    return score(idx, targets)


# threads ----------------------------------------------------------------------

def choose_threads():
    """Set the number of torch's CPU threads to the cores that other processes leave idle.

    A step waits for its slowest thread, and one that shares its core slows down all others. Called once, at
    the start. With OMP_NUM_THREADS set, or without Linux's /proc, the number stays as it is.
    """
    if not PROC_STAT.exists() or 'OMP_NUM_THREADS' in os.environ:
        return
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores - count_busy_cores()))


def count_busy_cores(seconds=0.3):
    """Return how many of our cores other processes keep busy; this process sleeps meanwhile."""
    before, start = cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    used = cpu_seconds() - before
    # next to our threads, other processes get less than they want: round up, but not the background noise
    return max(0, math.ceil(used / (time.monotonic() - start) - 0.25))


def cpu_seconds():
    """Return the seconds for which the cores of this process have been busy since the machine started."""
    our_cores = os.sched_getaffinity(0)
    ticks = 0
    for core, numbers in re.findall(r'^cpu(\d+) (.*)', PROC_STAT.read_text(), re.M):
        if int(core) in our_cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, numbers.split())
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf('SC_CLK_TCK')
