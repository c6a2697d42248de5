"""bench.py: what it reads out of logs, the data it makes up, a comparison from end to end, its mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bench
from data.shards import Split
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
# A nanoGPT that writes tokens and trains as a peer must, and does no more
FAKE_NANOGPT = '''
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = torch.nn.Embedding(config.vocab_size, 4)
        self.head = torch.nn.Linear(4, config.vocab_size)

    def forward(self, x, y):
        logits = self.head(self.embedding(x))
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
'''


@pytest.fixture
def nanogpt(tmp_path):
    checkout = tmp_path / 'nanoGPT'
    (checkout / 'config').mkdir(parents=True)
    (checkout / 'config' / 'train_shakespeare_char.py').touch()
    (checkout / 'model.py').write_text(FAKE_NANOGPT)
    return checkout


def run_bench(*words, status=0):
    one_thread = os.environ | {'OMP_NUM_THREADS': '1'}  # two stand still beside a busy process
    done = subprocess.run([sys.executable, 'bench.py', *map(str, words)],
                          cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stderr
    return done


def test_the_times_of_nanogpt_leave_its_evaluations_out():
    printed = ('step 0: train loss 4.2, val loss 4.1\niter 0: loss 4.2, time 9000.00ms, mfu -100.00%\n'
               'iter 1: loss 4.0, time 20.00ms, mfu -100.00%\nstep 2: train loss 3.9, val loss 3.8\n'
               'saving checkpoint to out-bench\niter 2: loss 3.9, time 8000.00ms, mfu -100.00%\n'
               'iter 3: loss 3.9, time 22.00ms, mfu 1.00%\niter 4: loss 3.9, time 24.00ms, mfu 1.00%\n')
    before, losses = bench.nanogpt_times(printed)
    assert losses == {0: 4.1, 2: 3.8}
    usual = 0.024  # the median of all five
    assert before == pytest.approx(np.cumsum([0, usual, 0.02, usual, 0.022, 0.024]))


def test_our_times_add_up_the_steps():
    lines = ['{"iter": 0, "val_loss": 4.0}', '{"iter": 0, "loss": 4.0, "tokens_per_s": 100}',
             '{"iter": 1, "loss": 3.9, "tokens_per_s": 50}', '{"iter": 2, "val_loss": 3.8}']
    before, losses = bench.our_times(lines, step_tokens=200)
    assert before == pytest.approx([0, 2, 6]) and losses == {0: 4.0, 2: 3.8}


def test_a_text_is_a_split_without_delimiters():
    text = bench.Text([5, 6, 7, 8, 9])
    x, y = text.windows(range(3), 2)
    assert x.tolist() == [[5, 6], [7, 8], [9, 0]] and y.tolist() == [[6, 7], [8, 9], [-1, -1]]


@pytest.mark.parametrize('vocab_size', [4096, 32000, 50259])
def test_random_data_has_the_vocabulary_asked_for(tmp_path, vocab_size):
    bench.random_data(tmp_path, vocab_size, 1000)
    assert load_tokenizer(tmp_path).vocab_size == vocab_size
    assert Split(tmp_path, 'train').n_tokens == 1000
    assert Split(tmp_path, 'val').read(0, 2000).max() < vocab_size


def test_sides_take_turns(monkeypatch):
    monkeypatch.setattr(bench, 'repeats', 2)
    order = []
    sides = {name: lambda name=name: order.append(name) or len(order) for name in 'ab'}
    assert bench.in_turn(sides) == {'a': [1, 3], 'b': [2, 4]} and order == ['a', 'b', 'a', 'b']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_loss_in_parts_is_that_at_once(monkeypatch, dtype):
    monkeypatch.setattr(bench, 'batch_size', 4)
    monkeypatch.setitem(bench._SHAPES, '15M', dict(zip(bench._SIZES, (1, 2, 32, 512, 4096), strict=True)))
    loss, peak, _ = bench.loss_memory('in parts', dtype)
    assert abs(bench.loss_memory('at once', dtype)[0] - loss) < 1e-5 and peak > 100  # MB


def test_training_beside_a_peer(tmp_path, nanogpt):
    done = run_bench('--what=train', '--peer', nanogpt, '--repeats=1', '--steps=1', '--batch_size=1',
                     '--device=cpu', '--json', tmp_path / 'train.json')
    figures = json.loads((tmp_path / 'train.json').read_text())
    rates = figures['tokens_per_s']
    assert figures['ratio'] == pytest.approx(rates['ours'] / rates['nanoGPT, float32'])
    assert f"ratio: {figures['ratio']:.2f}" in done.stdout and 'GFLOP/s' in done.stdout
    assert sorted(path.name for path in nanogpt.iterdir()) == ['config', 'model.py']


def test_a_runner_that_does_not_compile(tmp_path):
    (tmp_path / 'run.c').touch()
    assert 'gcc' in run_bench('--what=sample', '--peer', tmp_path, status=1).stderr
