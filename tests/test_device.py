"""Where to compute and how precisely, on machines that are not here."""

import pytest
import torch

import device
from configurator import SettingError
from device import autocast, choose_device, choose_dtype, peak_flops


@pytest.fixture
def gpus(monkeypatch):
    """A machine with four GPUs; returns the ones that were made current."""
    current = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', current.append)
    return current


def test_each_rank_has_its_own_gpu(gpus):
    assert [choose_device('auto', rank).index for rank in range(4)] == [0, 1, 2, 3]
    assert choose_device('cuda', 2) == torch.device('cuda', 2)
    assert choose_device('cuda:1') == torch.device('cuda', 1)
    assert gpus == [0, 1, 2, 3, 2, 1]
    with pytest.raises(SettingError, match='has 4 CUDA devices'):
        choose_device('cuda', 4)
    assert choose_device('cpu', 2) == torch.device('cpu')


@pytest.mark.parametrize('avx512, amx, expected', [
    (False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)])
def test_bfloat16_where_a_cpu_multiplies_it(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: avx512)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    assert choose_dtype('auto', torch.device('cpu')) == expected
    assert choose_dtype('float16', torch.device('cpu')) == torch.float16


@pytest.mark.parametrize('capability, expected', [
    ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_bfloat16_where_a_gpu_has_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    assert choose_dtype('auto', torch.device('cuda', 0)) == expected


@pytest.mark.parametrize('dtype', device.DTYPES.values(), ids=str)
def test_autocast_multiplies_in_its_dtype(dtype):
    with autocast(torch.device('cpu'), dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_peak_of_a_cpu_is_not_known():
    assert peak_flops(torch.device('cpu')) == 0
