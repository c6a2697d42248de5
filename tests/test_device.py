"""Where to compute and how precisely, on machines that are not here."""

import pytest
import torch

from device import DTYPES, autocast, choose_device, choose_dtype, grad_scaler, peak_flops
from errors import SettingError


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
def test_autocast_multiplies_in_its_dtype_and_float16_alone_is_scaled(dtype):
    with autocast(torch.device('cpu'), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert grad_scaler(torch.device('cpu'), dtype).is_enabled() == (dtype == torch.float16)


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA GeForce GT 1030', 0)])
def test_the_peak_of_a_gpu_is_that_of_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _: name)
    assert peak_flops(torch.device('cuda', 0)) == peak and peak_flops(torch.device('cpu')) == 0
