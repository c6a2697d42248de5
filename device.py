"""Where to compute and how precisely: 'auto' settings decided, and what the hardware's peak is."""

import contextlib
import re
import sys
import warnings

import torch

from configurator import one_of
from errors import SettingError

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
