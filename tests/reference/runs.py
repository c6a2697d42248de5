"""What the tests of whole training runs share: small data, and train.py as a user types it."""

import numpy as np
import torch

from tests.helpers.scripts import Script, metrics, prepare, script
from tests.reference.naive_train import Data

__all__ = ['Script', 'checkpoint', 'flags', 'metrics', 'prepare', 'run_script', 'script',
           'stories_for_infilling']


def stories_for_infilling(folder, n_tokens, seed, first_letter=20):
    """Return at least n_tokens uint16 ids of short stories, two in three of them turned around for infilling.

    A letter is mostly followed by the next one of twelve, so that there is something to learn. There is a
    multiple of 60 ids: at several block sizes the last window lacks its last target.
    """
    meta = Data(prepare(folder)).meta
    letters = range(meta['vocab_size'] - first_letter, meta['vocab_size'] - first_letter + 12)
    assert not {meta['delimiter'], meta['blank'], meta['middle']} & {*letters}
    rng, ids, letter = np.random.default_rng(seed), [], 0
    while len(ids) < n_tokens:
        ids.append(meta['delimiter'])
        parts = [(), (meta['blank'],), (meta['middle'],)] if rng.random() < 2 / 3 else [()]
        for mark in parts:
            ids += mark
            for _ in range(rng.integers(1, 7)):
                letter = int(rng.integers(12)) if rng.random() < 0.3 else (letter + 1) % 12
                ids.append(letters[letter])
    ids += [letters[0]] * (-len(ids) % 60)
    return np.array(ids, np.uint16)


def flags(values):
    """Return {name: value} as words of a command line, which may have one of max_iters and max_epochs."""
    if values.get('max_epochs'):
        values = {name: value for name, value in values.items() if name != 'max_iters'}
    return [f'--{name}={value}' for name, value in values.items()]


def run_script(data, out, *words):
    """Run train.py in float32 on the CPU, with a line for each step and no pictures; returns `out`."""
    script('train.py', f'--dataset={data}', f'--out_dir={out}', '--device=cpu', '--dtype=float32',
           '--log_interval=1', *words)
    return out


def checkpoint(path):
    """Return the dict in a checkpoint."""
    return torch.load(path, weights_only=True)
