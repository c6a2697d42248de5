"""The recipes in config/: each has the size that it says, and can be trained."""

import math
from dataclasses import fields

import pytest
import torch

import train
from configurator import configure, settings
from model import GPT, GPTConfig
from tests.helpers.scripts import ROOT, metrics

SIZES = [  # config, vocabulary size, number of parameters
    ('quickstart.py', 1536, '1.0M'),
    ('quickstart_infill.py', 1536, '1.0M'),
    ('char_1m.py', 350, '0.97M'),
    ('tiny_stories.py', 350, '25.5M'),
    ('tiny_stories.py', 4096, '27.4M'),
    ('tiny_stories.py', 50259, '51.0M'),
    ('infill.py', 4096, '15.7M'),
    ('infill_33m.py', 50259, '33.5M'),
    ('gpt2_2layer.py', 50259, '85.9M'),
    ('gpt2_89m.py', 50259, '89.3M'),
    ('llama_260k.py', 512, '260K'),
    ('llama_15m.py', 32000, '15.2M'),
    ('llama_15m.py', 4096, '7.2M'),
    ('llama_42m.py', 32000, '41.7M'),
    ('llama_42m.py', 4096, '27.4M'),
    ('llama_110m.py', 32000, '109.5M'),
    ('llama_110m.py', 4096, '88.1M'),
]
CONFIGS = sorted({config for config, _, _ in SIZES})


@pytest.mark.parametrize(('config', 'vocab_size', 'size'), SIZES)
def test_model_has_the_size_that_its_config_says(config, vocab_size, size):
    path = ROOT / 'config' / config
    chosen = dict(vars(train))
    configure(chosen, [str(path)])
    chosen = settings(chosen)
    names = [field.name for field in fields(GPTConfig) if field.name != 'vocab_size']
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=vocab_size, **{name: chosen[name] for name in names}))
    unit = {'K': 1e3, 'M': 1e6}[size[-1]]
    assert model.n_params() / unit == pytest.approx(float(size[:-1]), rel=0.01)
    assert size in path.read_text(encoding='utf-8')


@pytest.mark.parametrize(('config', 'vocab_size', 'size'), SIZES)
def test_docs_say_the_size_of_each_model(config, vocab_size, size):
    recipes = (ROOT / 'docs' / 'recipes.md').read_text(encoding='utf-8').splitlines()
    rows = [line for line in recipes if line.startswith(f'| `{config}`')]
    assert any(size in row and f'{vocab_size:,} tokens' in row for row in rows)


def test_every_config_is_in_the_table_of_sizes():
    files = [path.name for path in (ROOT / 'config').iterdir() if path.suffix in ('.py', '.json')]
    assert sorted(files) == CONFIGS


@pytest.mark.parametrize('config', CONFIGS)
def test_config_trains(start, tmp_path, config):
    """Two steps of the recipe with a small model: `start` makes it narrow and its context short."""
    start(str(ROOT / 'config' / config), '--n_kv_head=0', '--mlp_width=64', '--max_iters=2', '--max_epochs=0',
          '--eval_interval=1', '--eval_iters=2')
    losses = [line['val_loss'] for line in metrics(tmp_path / 'out') if 'val_loss' in line]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == 3
