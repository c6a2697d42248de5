"""The recipes: as large as they say, and each can be trained."""

import math

import pytest
import torch

import train
from configurator import configure, settings
from model import GPT
from tests.helpers.scripts import ROOT, metrics

SIZES = [
    ('quickstart.py', 1536, '1.0M'), ('tiny_stories.py', 350, '25.5M'), ('tiny_stories.py', 4096, '27.4M'),
    ('tiny_stories.py', 50259, '51.0M'), ('char_1m.json', 350, '0.97M'), ('gpt2_89m.py', 50259, '89.3M'),
    ('infill.py', 4096, '15.7M'), ('quickstart_infill.py', 1536, '1.0M'), ('gpt2_2layer.py', 50259, '85.9M'),
    ('infill_33m.py', 50259, '33.5M'), ('llama_260k.py', 512, '260K'), ('llama_15m.py', 32000, '15.2M'),
    ('llama_15m.py', 4096, '7.2M'), ('llama_42m.py', 32000, '41.7M'), ('llama_42m.py', 4096, '27.4M'),
    ('llama_110m.py', 32000, '109.5M'), ('llama_110m.py', 4096, '88.1M')]


@pytest.fixture
def given(monkeypatch):
    """given(config, *flags) sets train.py's settings, as its command line would."""
    def run(config, *flags):
        chosen = dict(vars(train))
        configure(chosen, [str(ROOT / 'config' / config), *flags])
        for name, value in settings(chosen).items():
            monkeypatch.setattr(train, name, value)
        train.check_settings()
    return run


@pytest.mark.parametrize('config, vocab_size, size', SIZES)
def test_models_are_as_large_as_they_say(given, config, vocab_size, size):
    """In the config's own words, and in the README's table."""
    given(config)
    with torch.device('meta'):
        n = GPT(train.make_config(vocab_size)).n_params()
    assert n / {'K': 1e3, 'M': 1e6}[size[-1]] == pytest.approx(float(size[:-1]), rel=0.01)
    path = ROOT / 'config' / config
    assert path.suffix == '.json' or size in path.read_text()
    lines = (ROOT / 'README.md').read_text().splitlines()
    rows = [line for line in lines if line.startswith(f'| `{config}`')]
    assert len(rows) == 1 and size in rows[0]


def test_every_config_has_its_size_above():
    names = {path.name for path in (ROOT / 'config').iterdir() if path.suffix in ('.py', '.json')}
    assert names == {config for config, *_ in SIZES}


@pytest.mark.parametrize('config', sorted({config for config, *_ in SIZES}))
def test_every_config_trains(given, data, tmp_path, monkeypatch, config):
    """Two steps of it: one layer, narrow, of a short context."""
    small = {'n_layer': 1, 'n_embd': 48, 'mlp_width': 64, 'block_size': 32, 'batch_size': 2, 'max_iters': 2,
             'max_epochs': 0, 'gradient_accumulation_steps': 2, 'eval_interval': 1, 'eval_iters': 2,
             'device': 'cpu', 'dtype': 'float32', 'dataset': data, 'out_dir': tmp_path / 'out'}
    given(config, *(f'--{name}={value}' for name, value in small.items()))
    monkeypatch.setattr(train, 'watch_signals', list)  # whose handlers would stay
    train.main()
    losses = [line['val_loss'] for line in metrics(tmp_path / 'out') if 'val_loss' in line]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and len({*losses}) == 3
