"""Evaluation against sums by hand."""

import math
from functools import partial

import evaluate as evaluation
import numpy as np
import pytest
import torch

from core.evaluate import evaluate, infill_rows, score
from data.shards import Split
from model import GPT, GPTConfig
from tests.helpers.scripts import prepare

TOKENS = np.random.default_rng(3).integers(0, 20, 51).astype(np.uint16)
INFILL = {'infill_rate': 0.5, 'delimiter': 1, 'blank': 18, 'middle': 19}
STORIES = [[1, 5, 6, 18, 7, 19, 8, 9], [1, 4, 4, 4], [1, 3, 18, 2, 2, 19, 10, 11, 12],
           [1, 4, 18, 5, 19, *[6] * 9], [1, 9, 9, 18, 6, 19, 3]]


def val_split(folder, tokens, **changes):
    """3 bytes a token, says its meta.json."""
    tokens = np.array(tokens, np.uint16)
    return Split(prepare(folder, tokens, tokens, shard_tokens=13, vocab_size=20, **changes), 'val')


def small(block_size):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size, vocab_size=20, n_layer=1, n_head=2, n_embd=16)).eval()


def naive(model, tokens, block_size):
    """Loss and hits of every token, each from its window's beginning."""
    losses, hits = [], []
    for t in range(1, len(tokens)):
        start = (t - 1) // block_size * block_size
        logits = model(torch.tensor(np.array(tokens[start:t]).astype(int))[None])[0, -1]
        losses.append(-logits.log_softmax(-1)[int(tokens[t])].item())
        hits.append(logits.argmax().item() == tokens[t])
    return losses, hits


def test_bits_per_byte_by_hand_on_four_tokens(tmp_path):
    """Tokens 0 1 1 0, the last three predicted with probabilities 1/2, 1/4 and 1/8: 1 + 2 + 3 bits."""
    split = val_split(tmp_path, [0, 1, 1, 0])
    split.n_bytes = 10
    result = evaluate(lambda x, y: (torch.tensor(6 * math.log(2)), torch.tensor(1)), split, 3, 1)
    assert result == pytest.approx({'val_loss': 2 * math.log(2), 'val_ppl': 4, 'val_acc': 1 / 3,
                                    'val_bpb': (1 + 2 + 3) / 3 * 4 / 10})
    huge = evaluate(lambda x, y: (torch.tensor(3e6), torch.tensor(0)), split, 3, 1)
    assert huge['val_loss'] == 1e6 and math.isfinite(huge['val_ppl'])


@pytest.mark.parametrize('name, expected', [('mps', 'cpu'), ('cuda', 'cuda'), ('cpu', 'cpu')])
def test_the_sums_are_in_float64_where_there_is_such(tmp_path, monkeypatch, name, expected):
    asked, zeros = [], torch.zeros
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device, dtype: (
        asked.append((str(device), dtype)), zeros(*shape, dtype=dtype))[1])
    monkeypatch.setattr(evaluation, 'to_device', lambda arrays, _: map(torch.from_numpy, arrays))
    evaluate(lambda x, y: (torch.tensor(1.0), torch.tensor(1)), val_split(tmp_path, TOKENS), 8, 4,
             device=torch.device(name))
    assert asked == [(expected, torch.float64)]


@pytest.mark.parametrize('batch_size', [1, 3, 50])
def test_the_whole_split_counts_with_its_tail(tmp_path, batch_size):
    split, model = val_split(tmp_path, TOKENS), small(8)
    losses, hits = naive(model, TOKENS, 8)
    result = evaluate(partial(score, model), split, 8, batch_size)
    assert len(losses) == 50
    assert result['val_loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result['val_acc'] == pytest.approx(np.mean(hits))
    first = evaluate(partial(score, model), split, 8, 2, max_batches=2)  # 2 batches of 2 windows of 8
    assert first['val_loss'] == pytest.approx(np.mean(losses[:32]), rel=1e-5)
    assert evaluate(partial(score, model), split, 8, 2, stopped=lambda: True) is None


@pytest.mark.parametrize('n_val, rows', [(9, [0, 5]), (3, [0]), (13, [0, 2, 5]), (40, range(6))])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_a_fixed_sample_of_the_training_split(tmp_path, batch_size, n_val, rows):
    """Spread evenly over its 6 windows of 8, one for four windows of validation."""
    split, model, seen = val_split(tmp_path, np.tile(TOKENS, 9)[:8 * n_val]), small(8), []
    train, losses, hits = val_split(tmp_path / 'train', TOKENS), [], []

    def scored(x, y):
        seen.append(len(x))
        return score(model, x, y)

    for row in rows:
        row_losses, row_hits = naive(model, TOKENS[8 * row:8 * row + 9], 8)
        losses, hits = losses + row_losses, hits + row_hits
    result = evaluate(scored, split, 8, batch_size, train=train)
    assert [result['train_loss'], result['train_acc']] == pytest.approx([np.mean(losses), np.mean(hits)])
    assert result['val_loss'] == evaluate(partial(score, model), split, 8, batch_size)['val_loss']
    assert sum(seen) == n_val + len(rows) and max(seen) <= batch_size


def test_rows_of_infilled_stories(tmp_path):
    split = val_split(tmp_path, np.concatenate(STORIES), **INFILL)  # a story reaches over two shards
    own, shuffled = infill_rows(split, 10)
    assert [(ids.tolist(), before) for ids, before in own] == [
        ([1, 5, 6, 18, 7, 19, 8, 9, 1], 6), ([1, 3, 18, 2, 2, 19, 10, 11, 12, 1], 6),
        ([1, 9, 9, 18, 6, 19, 3, 1], 6)]
    assert [(ids.tolist(), before) for ids, before in shuffled] == [
        ([1, 5, 6, 18, 2, 2, 19, 8, 9, 1], 7), ([1, 3, 18, 5, 19, 10, 11, 12, 1], 5),
        ([1, 9, 9, 18, 7, 19, 3, 1], 6)]
    assert len(infill_rows(split, 8)[0]) == 1  # [..., 9] fits with 2, 2 in the place of 7 no more
    split.meta['infill_rate'] = 0
    assert infill_rows(split, 10) == ([], [])
    lone = val_split(tmp_path, STORIES[0] + STORIES[1], **INFILL)
    assert infill_rows(lone, 10) == ([], [])  # there is no other end


@pytest.mark.parametrize('batch_size', [1, 2, 7])
def test_loss_of_infilled_middles(tmp_path, batch_size):
    split, model = val_split(tmp_path, np.concatenate(STORIES), **INFILL), small(10)
    infill = infill_rows(split, 10)
    result = evaluate(partial(score, model), split, 10, batch_size, infill)
    names = 'val_infill_loss', 'val_infill_loss_shuffled'
    for name, rows in zip(names, infill, strict=True):
        losses = [loss for ids, before in rows for loss in naive(model, ids, 99)[0][before - 1:]]
        assert len(losses) == 3 + 4 + 2
        assert result[name] == pytest.approx(np.mean(losses), rel=1e-5)
    without = evaluate(partial(score, model), split, 10, batch_size)
    assert without == pytest.approx({key: result[key] for key in result.keys() - {*names}})
