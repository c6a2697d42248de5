"""Loss, perplexity, bits per byte and accuracy of a model over a split."""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from core.device import to_device
from core.distributed import Ranks
from model import log_probs_by_chunk, loss_chunk_size

PIECE = 2**22  # tokens of a split that are searched for delimiters at a time


@torch.no_grad()
def count_loss(model, idx, targets):
    """Return the summed loss (nats) and the number of correct predictions for targets (B, T), two scalars.

    Targets of -1 are ignored.
    """
    loss = 0
    n_correct = 0
    x = model.hidden(idx).flatten(0, 1)
    chunk_size = loss_chunk_size(x.device, model.config.vocab_size)
    for _, log_p, target in log_probs_by_chunk(model.lm_head, x, targets.flatten(), chunk_size):
        loss += F.nll_loss(log_p, target, ignore_index=-1, reduction='sum')
        n_correct += (log_p.argmax(-1) == target).sum()
    return loss, n_correct


def never():
    return False


class Stopped(Exception):
    """A rank was asked to stop while it evaluated."""


class Evaluator:
    """Evaluates a model in batches; all ranks share the work and get the same results."""

    def __init__(self, score, block_size, batch_size, device='cpu', ranks=None, should_stop=never):
        """score(idx, targets): `count_loss` of a model in evaluation mode. batch_size: rows per call of it.

        should_stop(): asked per batch.
        """
        self.score = score
        self.block_size = block_size
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.ranks = ranks or Ranks()
        self.should_stop = should_stop

    def mean(self, read, rows, max_rows=0):
        """Return the mean loss (nats per token) and accuracy over `rows`, nan if there are no targets.

        read(rows, block_size) returns inputs and targets of some rows, as NumPy arrays (B, block_size).
        max_rows: evaluate only that many rows; 0: all. Raises Stopped on all ranks if one must stop.
        """
        rows = rows[:n_evaluated(rows, max_rows)]
        batches = [rows[i:i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        # loss, correct predictions, targets, ranks that were stopped. MPS has no float64.
        sums = torch.zeros(4, dtype=torch.float64, device='cpu' if self.device.type == 'mps' else self.device)
        for batch in batches[self.ranks.rank::self.ranks.world_size]:
            if self.should_stop():
                sums[3] = 1
                break
            x, y = to_device(read(batch, self.block_size), self.device)
            loss, n_correct = self.score(x, y)
            sums[:3] += torch.stack((loss, n_correct, (y >= 0).sum())).to(sums.device).double()
        if self.ranks.world_size > 1:
            dist.all_reduce(sums)
        loss, n_correct, n_targets, stopped = sums.tolist()
        if stopped:
            raise Stopped
        if n_targets == 0:
            return math.nan, math.nan
        return loss / n_targets, n_correct / n_targets


def evaluate(evaluator, val_split, train_split=None, infill_rows=((), ()), max_rows=0):
    """Evaluate on a whole validation split, its short tail included, or on its first `max_rows` windows.

    train_split: also evaluate evenly spaced training windows, a quarter as many as all other rows.
    infill_rows: `find_infill_rows` of the validation split.
    Returns None if a rank was asked to stop, else {'val_loss': nats per token, 'val_ppl': perplexity,
    'val_acc': accuracy, 'val_bpb': bits per UTF-8 byte}; with train_split also 'train_loss' and 'train_acc';
    with infill rows 'val_infill_loss', nats per token of the middles, and 'val_infill_loss_shuffled', the
    same with the last sentence of another story.
    """
    val_rows = range(0, val_split.n_tokens - 1, evaluator.block_size)
    own, shuffled = infill_rows
    try:
        metrics = validation_metrics(evaluator, val_split, val_rows, max_rows)
        if train_split is not None:
            n_rows = sum(n_evaluated(rows, max_rows) for rows in (val_rows, own, shuffled))
            metrics |= training_metrics(evaluator, train_split, n_rows=max(1, n_rows // 4))
        if own:
            metrics['val_infill_loss'], _ = evaluator.mean(pad_infill_rows, own, max_rows)
            metrics['val_infill_loss_shuffled'], _ = evaluator.mean(pad_infill_rows, shuffled, max_rows)
    except Stopped:
        return None
    return metrics


def describe_measure(split, block_size, max_rows, dtype):
    """Return in words what a validation loss is measured on: losses of the same words can be compared.

    Example: '48 of 120 windows in bfloat16'
    """
    windows = range(0, split.n_tokens - 1, block_size)
    dtype_name = str(dtype).removeprefix('torch.')
    return f'{n_evaluated(windows, max_rows):,} of {len(windows):,} windows in {dtype_name}'


def n_evaluated(rows, max_rows):
    """Return how many of the rows are evaluated."""
    if max_rows == 0:
        return len(rows)
    return min(len(rows), max_rows)


def validation_metrics(evaluator, split, rows, max_rows):
    loss, accuracy = evaluator.mean(split.windows, rows, max_rows)
    return {
        'val_loss': loss,
        'val_ppl': math.exp(min(loss, 700)),  # beyond that it would overflow
        'val_acc': accuracy,
        'val_bpb': loss / math.log(2) * split.n_tokens / split.n_bytes,
    }


def training_metrics(evaluator, split, n_rows):
    """Evaluate on n_rows windows, always the same, spread evenly over the training split."""
    last = (split.n_tokens - 1) // evaluator.block_size - 1
    windows = np.unique(np.linspace(0, last, n_rows, dtype=int))
    loss, accuracy = evaluator.mean(split.windows, windows * evaluator.block_size)
    return {'train_loss': loss, 'train_acc': accuracy}


# infilling --------------------------------------------------------------------

def find_infill_rows(split, block_size):
    """Return the stories that data/infill.py rearranged for infilling and that fit into block_size.

    Returns two lists of (ids, number of ids before the middle); ids is a 1-D int array that ends in the
    delimiter of the next story. In the second list each story has the last sentence of the next one instead
    of its own. Both lists have the same middles: those of the stories that fit with either end.
    """
    if not split.meta.get('infill_rate'):
        return [], []
    stories = find_infilled_stories(split)
    if len(stories) < 2:
        return [], []
    delimiter = split.meta['delimiter']
    own, shuffled = [], []
    for story, next_story in zip(stories, stories[1:] + stories[:1], strict=True):
        prefix, suffix, middle = story
        _, other_suffix, _ = next_story
        longest = len(prefix) + max(len(suffix), len(other_suffix)) + len(middle)
        if longest > block_size:
            continue
        for rows, end in (own, suffix), (shuffled, other_suffix):
            ids = np.concatenate((prefix, end, middle, [delimiter]))
            n_before = len(prefix) + len(end) + 1  # the first id of `middle` is the <middle> token
            rows.append((ids, n_before))
    return own, shuffled


def find_infilled_stories(split):
    """Return (prefix, suffix, middle) of each story rearranged for infilling, as int64 arrays.

    The prefix begins with the delimiter, the suffix with <blank> and the middle with <middle>.
    """
    delimiter, blank, middle = (split.meta[name] for name in ('delimiter', 'blank', 'middle'))
    starts = [start + np.flatnonzero(split.read(start, PIECE) == delimiter)
              for start in range(0, split.n_tokens, PIECE)]
    bounds = [*np.concatenate(starts).tolist(), split.n_tokens]
    stories = []
    for start, stop in pairwise(bounds):
        ids = split.read(start, stop - start).astype(np.int64)
        marks = np.flatnonzero((ids == blank) | (ids == middle))
        if len(marks) == 2:
            stories.append(np.split(ids, marks))
    return stories


def pad_infill_rows(rows, block_size):
    """Return inputs and targets of `find_infill_rows`, int64 arrays (len(rows), block_size).

    Targets are -1, which the loss ignores, except for the middles and the delimiters after them.
    """
    x = np.zeros((len(rows), block_size), np.int64)
    y = np.full((len(rows), block_size), -1)
    for i, (ids, n_before) in enumerate(rows):
        x[i, :len(ids) - 1] = ids[:-1]
        y[i, n_before - 1:len(ids) - 1] = ids[n_before:]
    return x, y
