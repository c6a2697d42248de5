"""Evaluation against sums by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from core import evaluate as evaluation
from core.device import score_padded
from core.distributed import Ranks
from core.evaluate import Evaluator, count_loss, evaluate, find_infill_rows
from data.shards import Split
from model import GPT, GPTConfig
from tests.helpers.scripts import prepare

TOKENS = np.random.default_rng(3).integers(0, 20, 51).astype(np.uint16)
INFILL = {'infill_rate': 0.5, 'delimiter': 1, 'blank': 18, 'middle': 19}
STORIES = [[1, 5, 6, 18, 7, 19, 8, 9], [1, 4, 4, 4], [1, 3, 18, 2, 2, 19, 10, 11, 12],
           [1, 4, 18, 5, 19, *[6] * 9], [1, 9, 9, 18, 6, 19, 3]]


def val_split(folder, tokens, **changes):
    """Return a split of several shards whose meta.json claims 3 bytes per token."""
    tokens = np.array(tokens, np.uint16)
    return Split(prepare(folder, tokens, tokens, shard_tokens=13, vocab_size=20, **changes), 'val')


def make_model(block_size):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size, vocab_size=20, n_layer=1, n_head=2, n_embd=16)).eval()


def evaluator_of(model, block_size, batch_size, **options):
    return Evaluator(partial(count_loss, model), block_size, batch_size, **options)


def naive_losses(model, tokens, block_size):
    """Return the loss of every token and whether it is predicted, each from the start of its window."""
    losses, correct = [], []
    for t in range(1, len(tokens)):
        start = (t - 1) // block_size * block_size
        context = torch.tensor(np.array(tokens[start:t]).astype(int))
        logits = model(context[None])[0, -1]
        losses.append(-logits.log_softmax(-1)[int(tokens[t])].item())
        correct.append(logits.argmax().item() == tokens[t])
    return losses, correct


def test_bits_per_byte_by_hand_on_four_tokens(tmp_path):
    """Tokens 0 1 1 0, the last three predicted with probabilities 1/2, 1/4 and 1/8: 1 + 2 + 3 bits."""
    split = val_split(tmp_path, [0, 1, 1, 0])
    split.n_bytes = 10
    result = evaluate(Evaluator(lambda x, y: (torch.tensor(6 * math.log(2)), torch.tensor(1)), 3, 1), split)
    assert result == pytest.approx({'val_loss': 2 * math.log(2), 'val_ppl': 4, 'val_acc': 1 / 3,
                                    'val_bpb': (1 + 2 + 3) / 3 * 4 / 10})
    huge = evaluate(Evaluator(lambda x, y: (torch.tensor(3e6), torch.tensor(0)), 3, 1), split)
    assert huge['val_loss'] == 1e6 and math.isfinite(huge['val_ppl'])


@pytest.mark.parametrize('batch_size', [1, 3, 50])
def test_the_whole_split_is_evaluated_with_its_short_tail(tmp_path, batch_size):
    split, model = val_split(tmp_path, TOKENS), make_model(8)
    losses, correct = naive_losses(model, TOKENS, 8)
    result = evaluate(evaluator_of(model, 8, batch_size), split)
    assert len(losses) == 50
    assert result['val_loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result['val_acc'] == pytest.approx(np.mean(correct))


@pytest.mark.parametrize('batch_size', [2, 3, 50])
def test_max_rows_limits_the_evaluation_to_the_first_windows(tmp_path, batch_size):
    split, model = val_split(tmp_path, TOKENS), make_model(8)
    losses, _ = naive_losses(model, TOKENS, 8)
    result = evaluate(evaluator_of(model, 8, batch_size), split, max_rows=4)  # 4 windows of 8
    assert result['val_loss'] == pytest.approx(np.mean(losses[:32]), rel=1e-5)


def test_an_evaluation_that_is_stopped_has_no_result(tmp_path):
    split, model, asked = val_split(tmp_path, TOKENS), make_model(8), []

    def should_stop():
        asked.append(True)
        return len(asked) > 2

    assert evaluate(evaluator_of(model, 8, 2, should_stop=should_stop), split) is None
    assert len(asked) == 3  # once per batch


def test_ranks_share_the_batches(tmp_path, monkeypatch):
    split, model, sums = val_split(tmp_path, TOKENS), make_model(8), []
    monkeypatch.setattr(evaluation.dist, 'all_reduce', lambda tensor: sums.append(tensor.clone()))
    for rank in range(3):
        evaluate(evaluator_of(model, 8, 2, ranks=Ranks(rank, 0, 3)), split)
    whole = evaluate(evaluator_of(model, 8, 2), split)
    loss, n_correct, n_targets, stopped = torch.stack(sums).sum(0).tolist()
    assert (n_targets, stopped) == (50, 0)
    assert loss / 50 == pytest.approx(whole['val_loss']) and n_correct / 50 == pytest.approx(whole['val_acc'])


def test_a_compiled_score_gets_batches_of_one_shape(tmp_path):
    """The last one, with 3 of 7 windows, is padded with targets that the loss ignores."""
    split, model, shapes = val_split(tmp_path, TOKENS), make_model(8), []

    def score(x, y):
        shapes.append((x.shape, y.shape))
        return count_loss(model, x, y)

    expected = evaluate(evaluator_of(model, 8, 4), split)
    assert evaluate(Evaluator(partial(score_padded, score, 4), 8, 4), split) == pytest.approx(expected)
    assert shapes == [((4, 8), (4, 8))] * 2


@pytest.mark.parametrize('name, expected', [('mps', 'cpu'), ('cuda', 'cuda'), ('cpu', 'cpu')])
def test_sums_are_float64_on_a_device_that_has_it(tmp_path, monkeypatch, name, expected):
    asked, zeros = [], torch.zeros
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device, dtype: (
        asked.append((str(device), dtype)), zeros(*shape, dtype=dtype))[1])
    monkeypatch.setattr(evaluation, 'to_device', lambda arrays, _: [torch.from_numpy(a) for a in arrays])
    evaluator = Evaluator(lambda x, y: (torch.tensor(1.0), torch.tensor(1)), 8, 4, torch.device(name))
    evaluate(evaluator, val_split(tmp_path, TOKENS))
    assert asked == [(expected, torch.float64)]


@pytest.mark.parametrize('n_val, windows', [(9, [0, 5]), (3, [0]), (13, [0, 2, 5]), (40, range(6))])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_the_training_windows_are_evenly_spaced(tmp_path, batch_size, n_val, windows):
    """Of the 6 windows of 8 tokens, one for every four validation windows."""
    split, model = val_split(tmp_path, np.tile(TOKENS, 9)[:8 * n_val]), make_model(8)
    train_split = val_split(tmp_path / 'train', TOKENS)
    losses, correct = [], []
    for window in windows:
        window_losses, window_correct = naive_losses(model, TOKENS[8 * window:8 * window + 9], 8)
        losses += window_losses
        correct += window_correct
    evaluator = evaluator_of(model, 8, batch_size)
    result = evaluate(evaluator, split, train_split)
    assert [result['train_loss'], result['train_acc']] == pytest.approx([np.mean(losses), np.mean(correct)])
    assert result['val_loss'] == evaluate(evaluator, split)['val_loss']


def test_find_infill_rows_returns_the_stories_that_fit(tmp_path):
    split = val_split(tmp_path, np.concatenate(STORIES), **INFILL)  # a story reaches over two shards
    own, shuffled = find_infill_rows(split, 10)
    assert [(ids.tolist(), n_before) for ids, n_before in own] == [
        ([1, 5, 6, 18, 7, 19, 8, 9, 1], 6), ([1, 3, 18, 2, 2, 19, 10, 11, 12, 1], 6),
        ([1, 9, 9, 18, 6, 19, 3, 1], 6)]
    assert [(ids.tolist(), n_before) for ids, n_before in shuffled] == [
        ([1, 5, 6, 18, 2, 2, 19, 8, 9, 1], 7), ([1, 3, 18, 5, 19, 10, 11, 12, 1], 5),
        ([1, 9, 9, 18, 7, 19, 3, 1], 6)]
    assert len(find_infill_rows(split, 8)[0]) == 1  # [..., 9] does not fit with 2, 2 instead of 7


def test_find_infill_rows_searches_a_split_in_pieces(tmp_path, monkeypatch):
    split = val_split(tmp_path, np.concatenate(STORIES), **INFILL)
    whole = find_infill_rows(split, 10)
    monkeypatch.setattr(evaluation, 'PIECE', 5)
    for rows, expected in zip(find_infill_rows(split, 10), whole, strict=True):
        assert [(ids.tolist(), n) for ids, n in rows] == [(ids.tolist(), n) for ids, n in expected]


def test_find_infill_rows_is_empty_without_another_ending(tmp_path):
    lone = val_split(tmp_path, STORIES[0] + STORIES[1], **INFILL)
    assert find_infill_rows(lone, 10) == ([], [])
    several = val_split(tmp_path, np.concatenate(STORIES), **INFILL | {'infill_rate': 0})
    assert find_infill_rows(several, 10) == ([], [])


@pytest.mark.parametrize('batch_size', [1, 2, 7])
def test_the_infill_loss_is_that_of_the_middles(tmp_path, batch_size):
    split, model = val_split(tmp_path, np.concatenate(STORIES), **INFILL), make_model(10)
    infill_rows = find_infill_rows(split, 10)
    evaluator = evaluator_of(model, 10, batch_size)
    result = evaluate(evaluator, split, infill_rows=infill_rows)
    names = 'val_infill_loss', 'val_infill_loss_shuffled'
    for name, rows in zip(names, infill_rows, strict=True):
        losses = []
        for ids, n_before in rows:
            losses += naive_losses(model, ids, 99)[0][n_before - 1:]
        assert len(losses) == 3 + 4 + 2
        assert result[name] == pytest.approx(np.mean(losses), rel=1e-5)
    without = evaluate(evaluator, split)
    assert without == pytest.approx({key: result[key] for key in result.keys() - {*names}})
