"""A training run in plain torch, written for reading, to compare train.py with.

It follows the documentation of the settings and shares no training code with the repository: its own order of
batches, learning rates, optimizers, evaluation and bookkeeping. Only the model is the repository's `GPT`,
which tests of its own compare with other implementations. It runs in float32 on one CPU, one window or one
matrix at a time.
"""

import copy
import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig


class Data:
    """A prepared folder: the tokens of both splits as lists of int, and the text bytes of `val`."""

    def __init__(self, folder):
        self.meta = json.loads(Path(folder, 'meta.json').read_text())
        self.train, self.val = self.tokens(folder, 'train'), self.tokens(folder, 'val')
        self.val_bytes = self.meta['splits']['val']['bytes']

    def tokens(self, folder, split):
        tokens = []
        for shard in self.meta['splits'][split]['shards']:
            tokens += np.fromfile(Path(folder, shard['name']), '<u2').tolist()
        return tokens


# batches ----------------------------------------------------------------------

def window_starts(n_tokens, block_size, seed):
    """Yield the position of the first token of each training window, without end.

    Every epoch has an order of its own, and all but the first one begin a few tokens later in the text.
    """
    n_windows = (n_tokens - 1) // block_size
    epoch = 0
    while True:
        rng = np.random.default_rng((seed, epoch))
        order = rng.permutation(n_windows)
        offset = int(rng.integers(block_size)) if epoch > 0 else 0
        for window in order.tolist():
            yield window * block_size + offset
        epoch += 1


def window(tokens, start, block_size):
    """Return inputs and targets of one window, (1, T); T is less than block_size at the end of `tokens`."""
    part = tokens[start:start + block_size + 1]
    return torch.tensor([part[:-1]]), torch.tensor([part[1:]])


def micro_batch_loss(model, tokens, starts, block_size):
    """Return the mean loss over all targets of the windows that begin at `starts`, in nats per token."""
    inputs = torch.zeros(len(starts), block_size, dtype=torch.long)
    targets = torch.full((len(starts), block_size), -1)
    for row, start in enumerate(starts):
        x, y = window(tokens, start, block_size)
        inputs[row, :x.size(1)] = x
        targets[row, :y.size(1)] = y
    return model(inputs, targets)


# optimizers -------------------------------------------------------------------

class AdamW:
    """AdamW for one parameter (Loshchilov and Hutter 2019), with eps 1e-8."""

    def __init__(self, p, peak_lr, weight_decay, betas):
        self.p, self.peak_lr, self.weight_decay, self.betas = p, peak_lr, weight_decay, betas
        self.mean, self.square, self.steps = torch.zeros_like(p), torch.zeros_like(p), 0

    def step(self, lr):
        beta1, beta2 = self.betas
        self.steps += 1
        self.mean = beta1 * self.mean + (1 - beta1) * self.p.grad
        self.square = beta2 * self.square + (1 - beta2) * self.p.grad**2
        mean = self.mean / (1 - beta1**self.steps)
        square = self.square / (1 - beta2**self.steps)
        self.p *= 1 - lr * self.weight_decay
        self.p -= lr * mean / (square.sqrt() + 1e-8)


class Muon:
    """Muon for one matrix (Jordan 2024), with Nesterov momentum 0.9 and rows of equal norm."""

    def __init__(self, p, peak_lr, weight_decay):
        self.p, self.peak_lr, self.weight_decay = p, peak_lr, weight_decay
        self.momentum = torch.zeros_like(p)

    def step(self, lr):
        rows, columns = self.p.shape
        self.momentum = 0.9 * self.momentum + 0.1 * self.p.grad
        direction = orthogonalised(0.9 * self.momentum + 0.1 * self.p.grad)
        self.p *= 1 - lr * self.weight_decay
        self.p -= lr * math.sqrt(max(1, rows / columns)) * direction


def orthogonalised(matrix):
    """Scale the rows to one norm, then do five steps of Newton-Schulz, in bfloat16 as train.py does."""
    x = (matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1e-30)).bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return (x.T if tall else x).float()


def make_optimizers(model, s):
    """Return one optimizer for each parameter of the model."""
    muon = s['optimizer'] == 'muon'
    peak_lr = s['learning_rate'] or (0.01 if muon else 0.001)
    optimizers = []
    for name, p in model.named_parameters():
        is_matrix = p.dim() == 2
        weight_decay = s['weight_decay'] if is_matrix else 0
        if muon and is_matrix and name.startswith('blocks.'):
            optimizers.append(Muon(p, 2 * peak_lr, weight_decay))
        else:
            optimizers.append(AdamW(p, peak_lr, weight_decay, (s['beta1'], s['beta2'])))
    return optimizers


def lr_factor(step, n_steps, warmup_iters):
    """Return the share of the peak rate at `step`, counted from 0: up in a line, then down in a line to 0."""
    up = (step + 1) / (warmup_iters + 1)
    down = (n_steps - step) / max(1, n_steps - warmup_iters)
    return min(1, up, down)


# evaluation -------------------------------------------------------------------

class Sum:
    """Loss and accuracy over any number of scored sequences."""

    def __init__(self):
        self.loss, self.correct, self.count = 0.0, 0, 0

    @torch.no_grad()
    def add(self, model, x, y, first=0):
        """Score the targets y (1, T) of the inputs x (1, T), those before the position `first` left out."""
        logits, targets = model(x)[0, first:], y[0, first:]
        self.loss += F.cross_entropy(logits, targets, reduction='sum').item()
        self.correct += (logits.argmax(-1) == targets).sum().item()
        self.count += len(targets)


def infilling_stories(data, block_size):
    """Return the infilling stories of `val`, twice: with their own suffix and with that of the next story.

    Each is (ids, start of the middle), and ends in the delimiter that follows. Both lists leave out a story
    that is too long with either suffix.
    """
    delimiter, blank, middle = (data.meta[name] for name in ('delimiter', 'blank', 'middle'))
    stories, story = [], []
    for token in [*data.val, delimiter]:
        if token == delimiter and story:
            stories.append(story)
            story = []
        story.append(token)
    parts = []
    for story in stories:
        if blank in story:
            b, m = story.index(blank), story.index(middle)
            parts.append((story[:b], story[b:m], story[m:]))
    own, shuffled = [], []
    for i, (before, suffix, rest) in enumerate(parts):
        other = parts[(i + 1) % len(parts)][1]
        if len(before) + max(len(suffix), len(other)) + len(rest) <= block_size:
            own.append((before + suffix + rest + [delimiter], len(before) + len(suffix) + 1))
            shuffled.append((before + other + rest + [delimiter], len(before) + len(other) + 1))
    return own, shuffled


def evaluate(model, data, s):
    """Return the figures that metrics.jsonl has of an evaluation."""
    block_size = s['block_size']
    most = s['eval_iters'] * s['batch_size'] if s['eval_iters'] else None  # sequences of each kind
    model.eval()
    val, train, own, shuffled = Sum(), Sum(), Sum(), Sum()
    val_starts = list(range(0, len(data.val) - 1, block_size))[:most]
    for start in val_starts:
        val.add(model, *window(data.val, start, block_size))
    rows = [], []
    if data.meta.get('infill_rate'):
        rows = infilling_stories(data, block_size)
    for total, stories in (own, rows[0]), (shuffled, rows[1]):
        for ids, middle in stories[:most]:
            total.add(model, *window(ids, 0, block_size), first=middle - 1)
    # a fifth of the work is a sample of the training windows, spread evenly
    sample_size = max(1, (len(val_starts) + len(rows[0][:most]) + len(rows[1][:most])) // 4)
    last = (len(data.train) - 1) // block_size - 1
    for index in sorted({int(i) for i in np.linspace(0, last, sample_size)}):
        train.add(model, *window(data.train, index * block_size, block_size))
    model.train()
    nats = val.loss / val.count
    figures = {'val_loss': nats, 'val_ppl': math.exp(nats), 'val_acc': val.correct / val.count,
               'val_bpb': nats / math.log(2) * len(data.val) / data.val_bytes,
               'train_loss': train.loss / train.count, 'train_acc': train.correct / train.count}
    if own.count:
        figures['val_infill_loss'] = own.loss / own.count
        figures['val_infill_loss_shuffled'] = shuffled.loss / shuffled.count
    return figures


# the run ----------------------------------------------------------------------

def train(folder, s, weights=None):
    """Train on the data in `folder` with the settings `s`, from `weights` if there are any.

    Returns a dict: 'lines' (those of metrics.jsonl, with log_interval 1), 'iter', 'best_val_loss',
    'best_iter', and the weights 'first', 'last' and 'best'.
    """
    data = Data(folder)
    steps_per_epoch = (len(data.train) - 1) // s['block_size'] / (
        s['batch_size'] * s['gradient_accumulation_steps'])
    n_steps = math.ceil(s['max_epochs'] * steps_per_epoch) if s['max_epochs'] else s['max_iters']
    eval_interval = s['eval_interval'] or math.ceil(steps_per_epoch)
    shape = {field.name: s[field.name] for field in fields(GPTConfig) if field.name in s}
    torch.manual_seed(s['seed'])
    model = GPT(GPTConfig(vocab_size=data.meta['vocab_size'], **shape))
    if weights:
        model.load_state_dict(weights)
    optimizers = make_optimizers(model, s)
    starts = window_starts(len(data.train), s['block_size'], s['seed'])
    run = {'lines': [], 'best_val_loss': math.inf, 'first': copy.deepcopy(model.state_dict())}
    evaluations_since_best = 0
    for step in range(n_steps + 1):
        if step % eval_interval == 0 or step == n_steps:
            figures = evaluate(model, data, s)
            run['lines'].append({'iter': step} | figures)
            evaluations_since_best += 1
            if figures['val_loss'] < run['best_val_loss']:
                run |= {'best_val_loss': figures['val_loss'], 'best_iter': step,
                        'best': copy.deepcopy(model.state_dict())}
                evaluations_since_best = 0
            if step == n_steps or 0 < s['patience'] <= evaluations_since_best:
                break
        run['lines'].append({'iter': step} | train_step(model, optimizers, data, starts, step, n_steps, s))
    return run | {'iter': step, 'last': model.state_dict()}


def train_step(model, optimizers, data, starts, step, n_steps, s):
    """Update the weights once; returns the figures of the step."""
    dropout_seed = np.random.SeedSequence((s['seed'], step, 0)).generate_state(1)[0]  # 0: the rank
    torch.manual_seed(int(dropout_seed))
    model.zero_grad()
    total = 0.0
    for _ in range(s['gradient_accumulation_steps']):
        batch = [next(starts) for _ in range(s['batch_size'])]
        loss = micro_batch_loss(model, data.train, batch, s['block_size'])
        loss = loss / s['gradient_accumulation_steps']
        loss.backward()
        total += loss.item()
    grad_norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    factor = lr_factor(step, n_steps, s['warmup_iters'])
    with torch.no_grad():
        for optimizer in optimizers:
            if s['grad_clip'] and grad_norm > s['grad_clip']:
                optimizer.p.grad *= s['grad_clip'] / grad_norm
            optimizer.step(optimizer.peak_lr * factor)
    # the rate that is shown is Muon's, where Muon takes part
    shown = max(optimizer.peak_lr for optimizer in optimizers)
    return {'loss': total, 'grad_norm': grad_norm, 'lr': shown * factor}
