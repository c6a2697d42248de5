"""Where to compute and how precisely: 'auto' settings decided, and what the hardware's peak is."""

import contextlib
import ctypes
import sys

import torch

from errors import SettingError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Dense tensor-core peaks in FLOP/s at 16 bits, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12,
              'L4': 121e12, 'A10': 125e12, 'V100': 125e12, 'T4': 65e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def choose_device(name, local_rank=0):
    """The torch.device for a `device` setting: 'auto' is CUDA, then MPS, then CPU. Raises SettingError."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingError(f'device {name!r} is not auto, cpu, cuda, cuda:N or mps') from None
    if device.type == 'cuda':
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise SettingError(f'device {name}: this machine has {count} CUDA devices; use --device cpu')
        torch.cuda.set_device(index)
        return torch.device('cuda', index)
    if device.type == 'mps' and not torch.backends.mps.is_available():
        raise SettingError('device mps: this machine has none; use --device cpu or auto')
    if device.type not in ('cpu', 'mps'):
        raise SettingError(f'device {name!r} is not auto, cpu, cuda, cuda:N or mps')
    return torch.device(device.type)


def choose_dtype(name, device):
    """The torch.dtype for a `dtype` setting: 'auto' is bfloat16 where the hardware multiplies it, float16 on
    older CUDA GPUs, else float32. Raises SettingError."""
    if name != 'auto':
        if name not in DTYPES:
            raise SettingError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == 'cuda':
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    if device.type == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32


def autocast(device, dtype):
    """A context in which matrix multiplications compute in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def grad_scaler(device, ptdtype):
    """What scales the loss up, and the gradients back, where they are float16; else it does nothing.
    Raises SettingError."""
    if ptdtype == torch.float16 and device.type == 'mps':
        raise SettingError('float16 does not train on mps: use --dtype float32 or bfloat16')
    return torch.amp.GradScaler(device.type, enabled=ptdtype == torch.float16)


def keep_memory():
    """Have the C library keep the memory of freed tensors for the next ones.

    glibc gives large blocks back to the system at once, and each step pays page faults to have them again.
    Other C libraries decide for themselves.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def peak_flops(device):
    """Peak FLOP/s of a CUDA device at 16 bits, or 0 where it is not known."""
    if device.type != 'cuda':
        return 0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0)
