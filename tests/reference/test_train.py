"""Whole runs of train.py, as a user types them, against a naive reference: figures, weights, steps."""

import random

import pytest
import torch.distributed as dist

from tests.reference.naive_train import train
from tests.reference.runs import (
    Script,
    checkpoint,
    flags,
    metrics,
    prepare,
    run_script,
    script,
    stories_for_infilling,
)

BASE = {
    'seed': 1337, 'batch_size': 2, 'gradient_accumulation_steps': 1, 'block_size': 12, 'optimizer': 'muon',
    'learning_rate': 0.0, 'warmup_iters': 2, 'weight_decay': 0.1, 'beta1': 0.9, 'beta2': 0.95,
    'grad_clip': 1.0, 'max_iters': 6, 'max_epochs': 0.0, 'eval_interval': 4, 'eval_iters': 0, 'patience': 0,
    'n_layer': 1, 'n_head': 2, 'n_kv_head': 0, 'n_embd': 8, 'norm': 'rms', 'position': 'rope',
    'mlp': 'swiglu', 'qk_norm': False, 'bias': False, 'tie_embeddings': True, 'dropout': 0.0}
CHOICES = {  # for settings that are drawn at random
    'seed': [1, 7, 2**62], 'batch_size': [1, 2, 3, 4], 'gradient_accumulation_steps': [1, 2, 3],
    'block_size': [5, 12, 17, 30], 'optimizer': ['muon', 'adamw'], 'learning_rate': [0.0, 0.003, 0.01],
    'warmup_iters': [0, 1, 4, 10], 'weight_decay': [0.0, 0.1, 2.0], 'beta1': [0.0, 0.8, 0.9],
    'beta2': [0.9, 0.95, 0.999], 'grad_clip': [0.0, 0.05, 1.0], 'max_iters': [1, 3, 5, 7],
    'max_epochs': [0.0, 0.0, 0.01, 0.1], 'eval_interval': [0, 1, 2, 3], 'eval_iters': [0, 0, 1, 3],
    'patience': [0, 0, 1, 2], 'n_layer': [1, 2], 'n_kv_head': [0, 1, 2], 'n_embd': [8, 12],
    'norm': ['rms', 'layer'], 'position': ['rope', 'learned', 'sinusoidal'],
    'mlp': ['swiglu', 'gelu', 'relu', 'relu2'], 'mlp_width': [0, 10], 'qk_norm': [False, True],
    'bias': [False, True], 'tie_embeddings': [False, True], 'dropout': [0.0, 0.1, 0.5],
    'rope_theta': [1e4, 10.0], 'norm_eps': [1e-5, 1e-3]}

PLAIN, INFILLED, OTHER_LETTERS = range(3)


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    """Return three prepared folders in many shards, indexed by PLAIN, INFILLED and OTHER_LETTERS.

    The latter two differ from the first in their infill_rate, and in the letters of most stories of `val`.
    """
    folder = tmp_path_factory.mktemp('reference')
    train, val, other = (stories_for_infilling(folder / 'vocabulary', *kind)
                         for kind in ((701, 1), (303, 2), (303, 2, 28)))
    return [prepare(folder / f'data-{i}', train, ids, shard_tokens=97, infill_rate=rate)
            for i, (ids, rate) in enumerate([(val, 0), (val, 0.5), (other, 0)])]


def assert_same_weights(found, run, which):
    """Compare the weights `which` of a run: to 1e-4, or to 2% per step of the way that the matrix has come.

    The latter is for Muon: where bfloat16 rounds a number the other way, a step changes by about a percent.
    """
    first, expected = run['first'], run[which]
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        # the gradient of a key's bias is mere rounding where no position turns the key
        if not name.endswith('attn.k.bias'):
            difference, way = found[name] - weights, (weights - first[name]).norm()
            near = difference.norm() <= 0.02 * run['iter'] * way
            assert near or difference.abs().max() <= 1e-4, name


def assert_same_run(out, expected):
    """Compare a run's folder with what `train` of the reference returns."""
    found = [line for line in metrics(out) if 'loss' in line or 'val_loss' in line]
    for line, figures in zip(found, expected['lines'], strict=True):
        assert line.keys() == figures.keys()
        for name, value in figures.items():
            near = 3e-4 if name == 'grad_norm' else 3e-5
            assert line[name] == pytest.approx(value, rel=near), (name, line, figures)
    last, best = checkpoint(out / 'ckpt.pt'), checkpoint(out / 'best.pt')
    assert (last['iter'], last['best_iter']) == (expected['iter'], expected['best_iter'])
    assert best['iter'] == best['best_iter'] == expected['best_iter']
    for saved, which in (last, 'last'), (best, 'best'):
        assert saved['best_val_loss'] == pytest.approx(expected['best_val_loss'], rel=3e-5)
        assert_same_weights(saved['model'], expected, which)


@pytest.mark.parametrize('number', range(10))
def test_train_matches_the_reference(folders, tmp_path, number):
    draw = random.Random(number)
    data, s = draw.choice(folders), BASE | {name: draw.choice(choices) for name, choices in CHOICES.items()}
    out = run_script(data, tmp_path / 'out', *flags(s))
    assert_same_run(out, train(data, s))


# 23 windows of 30 tokens, 8 sequences per step: an epoch is 2.9 steps
EPOCHS = {'block_size': 30, 'batch_size': 4, 'gradient_accumulation_steps': 2}
# On OTHER_LETTERS the validation loss is 5.66 5.69 5.61 5.48 5.51 5.64 5.82 at the steps 0 2 4 6 8 10 12
RISING = {'optimizer': 'adamw', 'learning_rate': 0.03, 'warmup_iters': 0, 'batch_size': 8, 'max_iters': 24,
          'eval_interval': 2}
STILL = RISING | {'learning_rate': 1e-30}  # the weights stay what they are


@pytest.mark.parametrize('folder, values, evaluated, best', [
    (INFILLED, EPOCHS | {'max_epochs': 2.2, 'eval_interval': 0}, [0, 3, 6, 7], 7),
    (PLAIN, EPOCHS | {'max_epochs': 0.5, 'eval_interval': 0}, [0, 2], 2),
    (PLAIN, EPOCHS | {'max_iters': 8, 'eval_interval': 7, 'dropout': 0.3}, [0, 7, 8], 8),
    (OTHER_LETTERS, RISING | {'max_iters': 13, 'eval_interval': 6}, [0, 6, 12, 13], 6),
    (OTHER_LETTERS, RISING | {'patience': 1}, [0, 2], 0),
    (OTHER_LETTERS, RISING | {'patience': 2}, [0, 2, 4, 6, 8, 10], 6),
    (PLAIN, STILL | {'patience': 3}, [0, 2, 4, 6], 0),
    (INFILLED, {'n_embd': 24, 'n_layer': 3, 'seed': 0, 'warmup_iters': 9}, [0, 4, 6], 6),
    (INFILLED, {'learning_rate': 0.03, 'weight_decay': 1.0, 'warmup_iters': 0, 'max_iters': 2}, [0, 2], 2)])
def test_train_matches_the_reference_to_its_end(folders, tmp_path, folder, values, evaluated, best):
    s = BASE | values
    out, expected = run_script(folders[folder], tmp_path / 'out', *flags(s)), train(folders[folder], s)
    assert_same_run(out, expected)
    assert [line['iter'] for line in metrics(out) if 'val_loss' in line] == evaluated
    assert expected['best_iter'] == best


@pytest.mark.parametrize('values, step', [
    ({'dropout': 0.2, 'max_iters': 7, 'eval_interval': 2}, 3),
    (EPOCHS | {'optimizer': 'adamw', 'dropout': 0.2, 'max_iters': 6, 'eval_interval': 2}, 4),
    (RISING | {'patience': 2}, 8)])
def test_a_resumed_run_matches_the_unbroken_reference(folders, tmp_path, values, step):
    s, out, data = BASE | values, tmp_path / 'out', folders[OTHER_LETTERS]
    run_script(data, out, *flags(s), f'--save_interval={step}')
    (out / f'ckpt_{step}.pt').replace(out / 'ckpt.pt')
    with (out / 'metrics.jsonl').open('a') as file:
        file.write('{"iter": 99, "val_lo')  # half a line, of a run that was killed
    script('train.py', '--init_from=resume', f'--out_dir={out}')
    expected = train(data, s)
    assert_same_run(out, expected)
    assert step < expected['iter']


def test_tuning_begins_from_the_best_weights_of_a_run(folders, tmp_path):
    """Without its optimizers, steps and seed; with its model, where block_size and dropout may be others."""
    first = BASE | RISING | {'max_iters': 24, 'n_layer': 2, 'eval_interval': 8}
    run_script(folders[OTHER_LETTERS], tmp_path / 'first', *flags(first))
    best, last = (checkpoint(tmp_path / 'first' / name) for name in ('best.pt', 'ckpt.pt'))
    assert 0 < best['iter'] < last['iter']
    given_now = {'init_from': tmp_path / 'first', 'block_size': 9, 'dropout': 0.1, 'seed': 3, 'max_iters': 4}
    out = run_script(folders[INFILLED], tmp_path / 'tuned', *flags(given_now))
    s = BASE | given_now | {'n_layer': 2, 'batch_size': 32, 'warmup_iters': 50, 'eval_interval': 500}
    assert_same_run(out, train(folders[INFILLED], s, best['model']))


def test_two_ranks_match_the_reference(folders, tmp_path):
    """Each has two of the four micro-batches of a step, its share of Muon's matrices and of an evaluation."""
    s = BASE | {'gradient_accumulation_steps': 4, 'n_layer': 3}
    store = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    around = {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': 'localhost',
              'MASTER_PORT': str(store.port), 'TORCHELASTIC_USE_AGENT_STORE': 'True'}
    words = [*flags(s), f'--dataset={folders[INFILLED]}', f'--out_dir={tmp_path}', '--device=cpu',
             '--dtype=float32', '--log_interval=1']
    ranks = [Script('train.py', *words, RANK=rank, LOCAL_RANK=rank, **around) for rank in '01']
    for rank in ranks:
        rank.finish()
    assert_same_run(tmp_path, train(folders[INFILLED], s))
