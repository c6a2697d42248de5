"""Where to compute and how precisely, on machines that are not here."""

import re
import warnings

import pytest
import torch

from configurator import SettingError
from core.device import DTYPES, autocast, choose_device, choose_dtype, peak_flops


def test_each_rank_has_its_own_gpu(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    assert [choose_device('auto', rank).index for rank in range(4)] == [0, 1, 2, 3]
    assert choose_device('cuda', 2) == torch.device('cuda', 2)
    assert choose_device('cuda:1') == torch.device('cuda', 1)
    assert current == [0, 1, 2, 3, 2, 1]
    with pytest.raises(SettingError, match='has 4 CUDA devices'):
        choose_device('cuda', 4)
    assert choose_device('cpu', 2) == torch.device('cpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert [choose_device('auto', 0, ranks).type for ranks in (1, 2)] == ['mps', 'cpu']
    with pytest.raises(SettingError, match=r'device mps: .* use --device cpu'):
        choose_device('mps', 0, 2)
    with pytest.raises(SettingError, match='2 processes need a GPU each; use --device cuda'):
        choose_device('cuda:1', 1, 2)


def test_a_driver_that_is_too_old_is_told_of_once(monkeypatch, capsys):
    def unavailable():
        warnings.warn('CUDA initialization: The driver is too old (found version 11040). See', stacklevel=1)

    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    for available, line in (unavailable, r'no GPU: .* too old \(found version 11040\), .*pytorch.org.*\n'), (
            lambda: False, ''):  # a machine without any is no news
        monkeypatch.setattr(torch.cuda, 'is_available', available)
        assert [choose_device('auto', rank) for rank in (0, 1)] == 2 * [torch.device('cpu')]
        assert re.fullmatch(line, capsys.readouterr().err)


@pytest.mark.parametrize('kind, capability, avx512, amx, expected', [
    ('cuda', (7, 5), True, True, torch.float16), ('cuda', (8, 0), False, False, torch.bfloat16),
    ('cuda', (9, 0), False, False, torch.bfloat16), ('cpu', (9, 0), False, False, torch.float32),
    ('cpu', (7, 5), True, False, torch.bfloat16), ('cpu', (7, 5), False, True, torch.bfloat16)])
def test_bfloat16_where_the_hardware_multiplies_it(monkeypatch, kind, capability, avx512, amx, expected):
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
def test_the_peak_of_a_gpu_is_that_of_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _: name)
    assert peak_flops(torch.device('cuda', 0)) == peak and peak_flops(torch.device('cpu')) == 0
