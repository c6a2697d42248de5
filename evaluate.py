"""Loss, perplexity, bits per byte and accuracy of a model over a split."""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F


@torch.no_grad()
def evaluate(model, split, block_size, batch_size, max_batches=0, device='cpu', rank=0, world_size=1,
             stopped=lambda: False):
    """Evaluate over a whole split, its short tail included, or its first max_batches batches; ranks share it.

    model: maps (B, T) token ids to logits (B, T, vocab_size), in evaluation mode.
    Returns {'val_loss': nats per token, 'val_ppl': perplexity, 'val_bpb': bits per UTF-8 byte of the stories,
    'val_acc': share of tokens foretold}, or None where stopped() became true on any rank. Where the split has
    stories for infilling, there are 'val_middle_loss', nats per token of their middles alone, and, as a check
    that the end is looked at, 'val_middle_loss_other_end', with another story's last sentence in its place.
    """
    rows = [None, *middle_rows(split, block_size)]
    lengths = [math.ceil((split.n_tokens - 1) / block_size), *map(len, rows[1:])]
    limit = max_batches or math.inf
    batches = [(kind, first) for kind, length in enumerate(lengths)
               for first in range(0, min(length, limit * batch_size), batch_size)]
    # Of the split, the middles, and those with another end: loss, hits, targets. Last, whether it stopped.
    sums = torch.zeros(4, 3, dtype=torch.float64, device='cpu' if device == 'mps' else device)
    for kind, first in batches[rank::world_size]:
        if stopped():
            sums[3] = 1
            break
        # The last batch is filled up with rows of -1 alone: one shape, one compilation.
        if kind == 0:
            x, y = split.windows(range(first, first + batch_size), block_size)
        else:
            x, y = padded(rows[kind][first:first + batch_size], batch_size, block_size)
        x, y = (torch.from_numpy(a).to(device) for a in (x, y))
        logits = model(x)
        # The float32 copies are of one sequence at a time, for the memory.
        loss = sum(F.cross_entropy(row.float(), targets, ignore_index=-1, reduction='sum')
                   for row, targets in zip(logits, y, strict=True))
        hits = (logits.argmax(-1) == y).sum()
        sums[kind] += torch.stack((loss, hits, (y >= 0).sum())).to(sums)
    if world_size > 1:
        dist.all_reduce(sums)
    if sums[3].any():
        return None
    (loss, hits, tokens), *middles = sums[:3].tolist()
    loss /= tokens
    result = {'val_loss': loss, 'val_ppl': math.exp(min(loss, 700)), 'val_acc': hits / tokens,
              'val_bpb': loss / math.log(2) * split.n_tokens / split.n_bytes}
    if len(rows[1]):
        names = 'val_middle_loss', 'val_middle_loss_other_end'
        result |= {name: loss / tokens for name, (loss, _, tokens) in zip(names, middles, strict=True)}
    return result


def middle_rows(split, block_size):
    """The stories of a split that data/infill.py has turned around and that fit into block_size, whole.

    Returns two lists of (ids, number of ids before the middle); ids is a 1-D int array and ends in the
    delimiter that closes the story. In the second list each story has the last sentence of the next one in
    the place of its own. Both have the same middles: those of the stories that fit with either end.
    """
    if not split.meta.get('infill_rate'):
        return [], []
    delimiter, blank, middle = (split.meta[name] for name in ('delimiter', 'blank', 'middle'))
    starts = [start + np.flatnonzero(shard == delimiter)
              for shard, start in zip(split.shards, split.starts, strict=True)]
    starts = np.concatenate([*starts, [split.n_tokens]]).tolist()
    stories = []
    for start, stop in pairwise(starts):
        ids = split.read(start, stop - start).astype(np.int64)
        marks = np.flatnonzero((ids == blank) | (ids == middle))
        if len(marks):
            stories.append(np.split(ids, marks))
    own, other = [], []
    if len(stories) < 2:
        return own, other
    for (first, end, rest), (_, next_end, _) in zip(stories, stories[1:] + stories[:1], strict=True):
        if len(first) + max(len(end), len(next_end)) + len(rest) <= block_size:
            for rows, last in (own, end), (other, next_end):
                ids = np.concatenate((first, last, rest, [delimiter]))
                rows.append((ids, len(first) + len(last) + 1))
    return own, other


def padded(rows, batch_size, block_size):
    """Inputs and targets of rows of `middle_rows`: two int64 arrays (batch_size, block_size).

    The targets are -1, which the loss ignores, but for the middles and the delimiters that close the stories.
    """
    x = np.zeros((batch_size, block_size), np.int64)
    y = np.full((batch_size, block_size), -1)
    for i, (ids, before) in enumerate(rows):
        x[i, :len(ids) - 1] = ids[:-1]
        y[i, before - 1:len(ids) - 1] = ids[before:]
    return x, y
