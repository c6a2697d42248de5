"""Where to compute and how precisely, on machines that are not here; CPU threads."""

import contextlib
import re
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch.torch_version import TorchVersion

from configurator import SettingError, UserError
from core import device
from core.device import (
    DTYPES,
    autocast,
    check_kernels,
    choose_device,
    choose_dtype,
    choose_threads,
    describe_hardware,
    peak_flops,
    try_compile,
)
from core.evaluate import count_loss
from tests.helpers.models import small_model
from tests.helpers.scripts import rank_variables

needs_linux = pytest.mark.skipif(sys.platform != 'linux', reason='only Linux has /proc')


def test_each_rank_has_its_own_gpu(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    monkeypatch.setattr(device, 'check_kernels', lambda _: None)
    assert [choose_device('auto', rank).index for rank in range(4)] == [0, 1, 2, 3]
    assert choose_device('cuda', 2) == torch.device('cuda', 2)
    assert choose_device('cuda:1') == torch.device('cuda', 1)
    assert current == [0, 1, 2, 3, 2, 1]
    with pytest.raises(SettingError, match='has 4 CUDA devices'):
        choose_device('cuda', 4)
    with pytest.raises(SettingError, match='2 processes need a GPU each; use --device cuda'):
        choose_device('cuda:1', 1, 2)
    assert choose_device('cpu', 2) == torch.device('cpu')


def test_several_ranks_cannot_use_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch, '__version__', TorchVersion('2.14.0'))
    assert choose_device('auto', 0, 1).type == 'mps'
    assert choose_device('auto', 0, 2).type == 'cpu'
    with pytest.raises(SettingError, match=r'device mps: .* use --device cpu'):
        choose_device('mps', 0, 2)


@pytest.mark.parametrize('version, is_old', [
    ('2.9.1', True), ('2.13.0', True), ('2.14.0', False), ('2.14.1+cpu', False), ('3.0.0', False)])
def test_mps_with_an_old_torch_is_reported_and_has_no_half_precision(monkeypatch, capsys, version, is_old):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    monkeypatch.setattr(torch, '__version__', TorchVersion(version))
    mps = choose_device('auto')
    line = capsys.readouterr().err
    assert choose_device('cpu').type == 'cpu' and capsys.readouterr().err == ''
    assert mps.type == 'mps' and choose_dtype('auto', mps) == choose_dtype('float32', mps) == torch.float32
    if not is_old:
        assert line == '' and choose_dtype('bfloat16', mps) == torch.bfloat16
        return
    assert re.fullmatch(rf"torch {version} .* on MPS wrongly: pip install 'torch>=2\.14', or .* cpu\n", line)
    for name in 'bfloat16', 'float16':
        assert choose_dtype(name, torch.device('cpu')) == DTYPES[name]
        with pytest.raises(SettingError, match=f"dtype {name}: .*'torch>=2.14', or use --dtype float32"):
            choose_dtype(name, mps)


def test_a_gpu_for_which_torch_has_no_kernels_is_refused(monkeypatch):
    def fail(*_, device):
        raise error

    monkeypatch.setattr(torch, 'ones', fail)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _: 'Tesla V100-SXM2-16GB')
    error = RuntimeError('CUDA error: no kernel image is available for execution on the device')
    with pytest.raises(UserError, match=r'no kernels for the Tesla V100-SXM2-16GB\. .*/cu126; '):
        check_kernels(torch.device('cuda', 0))
    error = RuntimeError('CUDA error: device-side assert triggered')
    with pytest.raises(RuntimeError, match='device-side assert'):
        check_kernels(torch.device('cuda', 0))


@pytest.mark.parametrize('name', ['gpu', 'cuda:', 'cuda:x', 'CPU', ''])
def test_unknown_devices_are_refused(name):
    with pytest.raises(SettingError, match='type auto, cpu, cuda, cuda:N or mps'):
        choose_device(name)


def test_a_driver_that_is_too_old_is_reported_once(monkeypatch, capsys):
    def unavailable():
        warnings.warn('CUDA initialization: The driver is too old (found version 11040). See', stacklevel=1)

    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    for available, line in (unavailable, r'no GPU: .* too old \(found version 11040\), .*pytorch.org.*\n'), (
            lambda: False, ''):  # a machine without a GPU is no news
        monkeypatch.setattr(torch.cuda, 'is_available', available)
        assert [choose_device('auto', rank) for rank in (0, 1)] == 2 * [torch.device('cpu')]
        assert re.fullmatch(line, capsys.readouterr().err)


@pytest.mark.parametrize('kind, capability, avx512, amx, expected', [
    ('cuda', (7, 5), True, True, torch.float16), ('cuda', (8, 0), False, False, torch.bfloat16),
    ('cuda', (9, 0), False, False, torch.bfloat16), ('cpu', (9, 0), False, False, torch.float32),
    ('cpu', (7, 5), True, False, torch.bfloat16), ('cpu', (7, 5), False, True, torch.bfloat16)])
def test_auto_is_bfloat16_if_the_hardware_multiplies_it(monkeypatch, kind, capability, avx512, amx, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    assert choose_dtype('auto', torch.device(kind)) == expected


@pytest.mark.parametrize('dtype', DTYPES.values(), ids=str)
def test_autocast_multiplies_in_its_dtype(dtype):
    with autocast(torch.device('cpu'), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 NVL', 835e12),
    ('NVIDIA A100-SXM4-40GB', 312e12), ('NVIDIA A100 80GB PCIe', 312e12), ('NVIDIA A100-PCIE-40GB', 312e12),
    ('NVIDIA RTX A1000', 0), ('NVIDIA L4', 121e12), ('NVIDIA L40', 0), ('NVIDIA L40S', 362e12),
    ('NVIDIA A10', 125e12), ('NVIDIA A10G', 0), ('Tesla T4', 65e12), ('NVIDIA T400 4GB', 0),
    ('Tesla V100-SXM2-16GB', 125e12), ('NVIDIA B200', 2250e12), ('NVIDIA GeForce RTX 5090', 210e12),
    ('NVIDIA GeForce RTX 4090', 165e12), ('NVIDIA GeForce RTX 4090 Laptop GPU', 0)])
def test_the_peak_of_a_gpu_is_found_by_its_whole_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _: name)
    assert peak_flops(torch.device('cuda', 0)) == peak
    assert peak_flops(torch.device('cpu')) == 0


def test_describe_hardware_names_the_device_the_threads_and_the_dtype():
    text = describe_hardware(torch.device('cpu'), torch.bfloat16, 2)
    assert text.startswith('2 x cpu (')
    assert f'threads: {torch.get_num_threads()}) in bfloat16, torch {torch.__version__}' in text


# torch.compile


@pytest.mark.parametrize('failing', ['the model', 'its score'])
def test_a_failed_compilation_is_reported_once_and_changes_nothing(monkeypatch, capsys, failing):
    model = small_model()
    model.train()
    score = partial(count_loss, model)
    batch = torch.ones(2, 2, 4, dtype=torch.long)

    def fail(*_):
        raise error

    def compile(function):
        return fail if (function is model) == (failing == 'the model') else function

    monkeypatch.setattr(torch, 'compile', compile)
    error = ValueError('no compiler')
    for rank, line in (0, 'torch.compile failed (ValueError); continuing without it\n'), (1, ''):
        for name, value in rank_variables(rank, 2).items():
            monkeypatch.setenv(name, value)
        assert try_compile(model, score, *batch, contextlib.nullcontext()) is None
        assert model.training and all(p.grad is None for p in model.parameters())
        assert capsys.readouterr().err == line
    error = torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
    with pytest.raises(torch.OutOfMemoryError):  # eager mode would need even more
        try_compile(model, score, *batch, contextlib.nullcontext())


# threads


@pytest.mark.parametrize('busy, threads', [
    (0.0, 4), (0.2, 4), (0.3, 3), (1.2, 3), (2.0, 2), (4.0, 1), (9.0, 1)])
def test_torch_gets_the_cores_that_others_leave_idle(monkeypatch, tmp_path, busy, threads):
    """busy: how many of four cores other processes use."""
    now = [100.0]
    asked = []
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr('core.device.time.monotonic', lambda: now[0])
    monkeypatch.setattr('core.device.time.sleep', lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(device, 'cpu_seconds', lambda: busy * now[0])
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    monkeypatch.setattr(torch, 'set_num_threads', asked.append)
    choose_threads()
    assert asked == [threads]
    for variable, stat in ('3', device.PROC_STAT), (None, tmp_path / 'no_proc'):  # not ours to choose
        monkeypatch.setattr(device, 'PROC_STAT', stat)
        if variable:
            monkeypatch.setenv('OMP_NUM_THREADS', variable)
        else:
            monkeypatch.delenv('OMP_NUM_THREADS')
        choose_threads()
    assert asked == [threads]


@needs_linux
def test_cpu_seconds_counts_what_a_busy_process_uses():
    before = device.cpu_seconds()
    subprocess.run([sys.executable, '-c', 'import time\nwhile time.process_time() < 0.5: pass'], check=True)
    assert device.cpu_seconds() - before > 0.4
