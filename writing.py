"""From prompts to whole stories."""

import itertools
from random import Random

import torch
from tqdm import tqdm

from data import infill
from generate import generate


def continued(model, prompts, stop, max_new_tokens, min_new_tokens=0, **drawing):
    """Continue prompts, lists of ids of any lengths, side by side, until each has written `stop`.

    Yields, after each step, (rows, growing): the list of new ids of each, and the set of those that are not
    whole. A `stop` that ends a row is not in it; one before min_new_tokens stays and ends nothing. A row of
    max_new_tokens was cut. drawing: for `generate`.
    """
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    prompt = torch.tensor([ids + [-1] * (longest - len(ids)) for ids in prompts],
                          device=next(model.parameters()).device)
    idx, given = prompt[:, :shortest], prompt[:, shortest:]
    rows, growing = [[] for _ in prompts], {*range(len(prompts))}
    steps = generate(model, idx, max_new_tokens + longest - shortest, given=given, **drawing)
    for step, tokens in enumerate(steps):
        for i, token in enumerate(tokens.tolist()):
            if i in growing and step >= len(prompts[i]) - shortest:
                ended = token == stop and len(rows[i]) >= min(min_new_tokens, max_new_tokens - 1)
                rows[i] += [] if ended else [token]
                if ended or len(rows[i]) == max_new_tokens:
                    growing.remove(i)
        yield rows, growing
        if not growing:
            return


def stories_at_once(model):
    """How many have their keys and values, in float32, in 1 GB of memory or 8 of a GPU's; on a CPU more than
    128 bring nothing."""
    c, on_cpu = model.config, next(model.parameters()).device.type == 'cpu'
    size = 8 * c.n_layer * c.n_kv_head * c.head_dim * c.block_size
    return max(min(2**30 // size, 128) if on_cpu else 2**33 // size, 1)


def write_all(model, prompts, stop, max_new_tokens, seed, name='writing', **drawing):
    """Continue any number of prompts, as many side by side as there is room for. Yields the new ids of each,
    in their order, once they and those before them are whole. name: of the bar. drawing: as `continued`."""
    at_once, seeds = stories_at_once(model), Random(seed)
    for first in range(0, len(prompts), at_once):
        steps = continued(model, prompts[first:first + at_once], stop, max_new_tokens,
                          seed=seeds.getrandbits(63) if first else seed, **drawing)
        shown = 0
        for rows, growing in tqdm(steps, f'{name}, from {first + 1:,} of {len(prompts):,}', max_new_tokens,
                                  leave=False, disable=None, unit=' tokens'):
            while shown < len(rows) and shown not in growing:
                yield rows[shown]
                shown += 1


def opening(split, tokenizer, longest):
    """How the first story of a split begins: its first four words as ids, a list of at most `longest`."""
    special = tokenizer.delimiter, tokenizer.blank, tokenizer.middle
    ids = split.read(0, 200).tolist()
    ids = itertools.takewhile(lambda token: token not in special, ids[ids[0] == tokenizer.delimiter:])
    return first_words(tokenizer.decode([*ids]), tokenizer, longest)


def first_words(text, tokenizer, longest):
    """Its first four words as ids, a list of at most `longest`."""
    return tokenizer.encode(' '.join(text.split(' ')[:4]))[:longest]


def sample_story(model, tokenizer, seed, prompt=(), stopped=lambda: False):
    """A story that begins with the ids `prompt`, for a person to see; cut short once stopped() is true."""
    steps = continued(model, [[tokenizer.delimiter, *prompt]], tokenizer.delimiter, model.config.block_size,
                      temperature=0.8, suppress=(tokenizer.blank, tokenizer.middle), seed=seed)
    for (story,), growing in steps:
        if not growing or stopped():
            return infill.decode(tokenizer, [*prompt, *story])
