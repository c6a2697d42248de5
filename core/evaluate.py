"""Loss, perplexity, bits per byte and accuracy of a model over a split."""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from core.device import to_device
from model import log_probs_by_chunk


@torch.no_grad()
def score(model, idx, targets):
    """Of targets (B, T) after idx, -1 where there is none: summed loss in nats, number of hits; scalars."""
    loss = hits = 0
    x = model.hidden(idx).flatten(0, 1)
    for _, log_p, target in log_probs_by_chunk(model.lm_head, x, targets.flatten(), chunk_size=1024):
        loss += F.nll_loss(log_p, target, ignore_index=-1, reduction='sum')
        hits += (log_p.argmax(-1) == target).sum()
    return loss, hits


def evaluate(score_model, split, block_size, batch_size, infill=(), train=None, max_batches=0,
             device='cpu', rank=0, world_size=1, stopped=lambda: False):
    """Evaluate over a whole split, its short tail included, or its first max_batches batches; ranks share it.

    score_model: `score` of a model in evaluation mode, which takes (idx, targets). infill: `infill_rows` of
    the split. train: the Split for training, of which a fixed sample is looked at too, windows spread evenly
    over it, one for four of the other rows: a fifth of the work. Returns {'val_loss': nats per token,
    'val_ppl': perplexity, 'val_acc': share of tokens predicted, 'val_bpb': bits per UTF-8 byte}, of `train`
    'train_loss' and 'train_acc', of the infill rows 'val_infill_loss', nats per token of the middles, and so
    'val_infill_loss_shuffled', after another story's last sentence. None where stopped() came true anywhere.
    """
    kinds = [(split.windows, range(0, split.n_tokens - 1, block_size)),
             *((padded, rows) for rows in infill)]
    batches = [(kind, read, rows[first:first + batch_size]) for kind, (read, rows) in enumerate(kinds)
               for first in range(0, min(len(rows), (max_batches or math.inf) * batch_size), batch_size)]
    if train:
        n, last = max(1, sum(len(rows) for *_, rows in batches) // 4), (train.n_tokens - 1) // block_size - 1
        rows = np.unique(np.linspace(0, last, n, dtype=int)) * block_size
        batches += [(3, train.windows, rows[i:i + batch_size]) for i in range(0, len(rows), batch_size)]
    # a row for each kind of batch, loss, hits, targets; and one for whether it stopped
    device = torch.device(device)  # mps has no float64
    sums = torch.zeros(5, 3, dtype=torch.float64, device='cpu' if device.type == 'mps' else device)
    for kind, read, rows in batches[rank::world_size]:
        if stopped():
            sums[4] = 1
            break
        x, y = read(rows, block_size)
        if device.type == 'cuda':  # one shape, one compilation
            missing = (0, batch_size - len(rows)), (0, 0)
            x, y = np.pad(x, missing), np.pad(y, missing, constant_values=-1)
        x, y = to_device((x, y), device)
        sums[kind] += torch.stack((*score_model(x, y), (y >= 0).sum())).to(sums.device).double()
    if world_size > 1:
        dist.all_reduce(sums)
    if sums[4].any():
        return None
    losses, accuracies = (sums[:4, :2] / sums[:4, 2:]).T.tolist()  # nan where there are no targets
    result = {'val_loss': losses[0], 'val_ppl': math.exp(min(losses[0], 700)), 'val_acc': accuracies[0],
              'val_bpb': losses[0] / math.log(2) * split.n_tokens / split.n_bytes}
    if train:
        result |= {'train_loss': losses[3], 'train_acc': accuracies[3]}
    if any(infill):
        result |= {'val_infill_loss': losses[1], 'val_infill_loss_shuffled': losses[2]}
    return result


def infill_rows(split, block_size):
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
    if len(stories) < 2:
        return [], []
    own, shuffled = [], []
    for (prefix, suffix, rest), (_, next_suffix, _) in zip(stories, stories[1:] + stories[:1], strict=True):
        if len(prefix) + max(len(suffix), len(next_suffix)) + len(rest) <= block_size:
            for rows, end in (own, suffix), (shuffled, next_suffix):
                ids = np.concatenate((prefix, end, rest, [delimiter]))
                rows.append((ids, len(prefix) + len(end) + 1))
    return own, shuffled


def padded(rows, block_size):
    """Inputs and targets of `infill_rows`, int64 arrays (rows, block_size): targets are -1, which the loss
    ignores, but for the middles and the delimiters that close the stories."""
    x = np.zeros((len(rows), block_size), np.int64)
    y = np.full((len(rows), block_size), -1)
    for i, (ids, before) in enumerate(rows):
        x[i, :len(ids) - 1] = ids[:-1]
        y[i, before - 1:len(ids) - 1] = ids[before:]
    return x, y
