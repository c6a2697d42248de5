"""Loss, perplexity, bits per byte and accuracy of a model over a split."""

import math

import torch
import torch.distributed as dist
from torch.nn import functional as F


@torch.no_grad()
def evaluate(model, split, block_size, batch_size, max_batches=0, device='cpu', rank=0, world_size=1,
             stopped=lambda: False):
    """Evaluate over a whole split, its short tail included, or its first max_batches batches, shared by the ranks.

    model: maps (B, T) token ids to logits (B, T, vocab_size), in evaluation mode.
    Returns {'val_loss': nats per token, 'val_ppl': perplexity, 'val_bpb': bits per UTF-8 byte of the stories,
    'val_acc': share of tokens foretold}, or None where stopped() became true on any rank.
    """
    n_windows = math.ceil((split.n_tokens - 1) / block_size)
    n_batches = math.ceil(n_windows / batch_size)
    if max_batches:
        n_batches = min(n_batches, max_batches)
    sums = torch.zeros(4, dtype=torch.float64, device='cpu' if device == 'mps' else device)
    for batch in range(rank, n_batches, world_size):
        if stopped():
            sums[3] = 1
            break
        # The last batch is filled up with windows beyond the split, all -1: one shape, one compilation.
        first = batch * batch_size
        x, y = split.windows(range(first, first + batch_size), block_size)
        x, y = (torch.from_numpy(a).to(device) for a in (x, y))
        logits = model(x).flatten(0, 1)
        y = y.flatten()
        loss = F.cross_entropy(logits.float(), y, ignore_index=-1, reduction='sum')
        hits = (logits.argmax(-1) == y).sum()
        sums[:3] += torch.stack((loss, hits, (y >= 0).sum())).to(sums)
    if world_size > 1:
        dist.all_reduce(sums)
    loss, hits, tokens, stops = sums.tolist()
    if stops:
        return None
    loss /= tokens
    return {'val_loss': loss, 'val_ppl': math.exp(min(loss, 700)), 'val_acc': hits / tokens,
            'val_bpb': loss / math.log(2) * split.n_tokens / split.n_bytes}
