"""Foreign formats, one a file, and the one way back from all that can be read."""

from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import load_checkpoint
from configurator import UserError
from formats import bare, hf, llama2c
from model import GPT


def open_model(path):
    """The checkpoint at `path`: one of ours (a .pt file, or a folder with best.pt) or a published model."""
    path = Path(path)
    if (path / 'best.pt').is_file():
        path = path / 'best.pt'
    return load_checkpoint(path) if path.suffix == '.pt' else load_foreign(path)


def load_foreign(path):
    """A published model as a checkpoint of ours, no step done: {model, config, tokenizer, settings, iter}.

    path: a Hugging Face folder of the Llama or GPT-2 family, a folder of the format `torch`, or llama2.c's
    .bin with its tokenizer beside it. The tokenizer is its state, None where a Hugging Face folder has none.
    Raises UserError where the path is none of these, is damaged, or holds what a model of ours cannot be.
    """
    path = Path(path)
    if path.is_file() and path.suffix == '.bin':
        config, weights, tokenizer = llama2c.load(path)
    elif (path / 'config.json').is_file():
        config, weights, tokenizer = (bare if bare.is_bare(path) else hf).load(path)
    else:
        raise UserError(f'{path} is no model to begin with: name a Hugging Face folder (with config.json), '
                        'a llama2.c model (.bin, tokenizer.bin beside it), or a run of ours (with best.pt)')
    with torch.device('meta'):
        expected = GPT(config).state_dict()
    for name in expected.keys() | weights.keys():
        here, there = (tuple(w[name].shape) if name in w else None for w in (expected, weights))
        if here != there:
            raise UserError(f'{path}: {name} has the shape {there}; by its config it would be {here}')
    if tokenizer and tokenizer.vocab_size != config.vocab_size:
        raise UserError(f'{path} has {config.vocab_size} rows for a tokenizer of {tokenizer.vocab_size} '
                        'tokens: put the tokenizer beside it that it was trained with')
    return {'model': weights, 'config': asdict(config), 'tokenizer': tokenizer and tokenizer.state(),
            'settings': {}, 'iter': 0}
