"""Evaluation against sums by hand."""

import math

import numpy as np
import pytest
import torch
from test_shards import prepare

from data.shards import Split
from evaluate import evaluate
from model import GPT, GPTConfig

TOKENS = np.random.default_rng(3).integers(0, 20, 51).astype(np.uint16)


@pytest.fixture
def split(tmp_path):
    prepare(tmp_path, val=TOKENS, vocab_size=20)  # 3 bytes a token, says its meta.json
    return Split(tmp_path, 'val')


def test_bits_per_byte_of_a_model_that_guesses(split):
    """20 tokens equally likely: log2(20) bits a token, and three bytes a token."""
    result = evaluate(lambda idx: torch.zeros(*idx.shape, 20), split, block_size=8, batch_size=4)
    assert result['val_loss'] == pytest.approx(math.log(20))
    assert result['val_ppl'] == pytest.approx(20)
    assert result['val_bpb'] == pytest.approx(math.log2(20) / 3)


def test_bits_per_byte_by_hand_on_four_tokens(tmp_path):
    """Tokens 0 1 1 0, the last three foretold with probabilities 1/2, 1/4 and 1/8: 1 + 2 + 3 bits."""
    prepare(tmp_path, val=np.array([0, 1, 1, 0], dtype=np.uint16), vocab_size=60_000)
    split = Split(tmp_path, 'val')
    split.n_bytes = 10
    logits = torch.full((1, 3, 3), 0.0)
    for t, (target, p) in enumerate([(1, 1 / 2), (1, 1 / 4), (0, 1 / 8)]):
        logits[0, t] = math.log((1 - p) / 2)
        logits[0, t, target] = math.log(p)
    result = evaluate(lambda idx: logits, split, block_size=3, batch_size=1)
    assert result['val_bpb'] == pytest.approx((1 + 2 + 3) / 3 * 4 / 10)
    assert result['val_acc'] == pytest.approx(1 / 3)  # only the first is the likeliest


def naive(model, tokens, block_size):
    """Loss and hits of every token, each from its window's beginning."""
    losses, hits = [], []
    for t in range(1, len(tokens)):
        start = (t - 1) // block_size * block_size
        logits = model(torch.tensor(tokens[start:t].astype(int))[None])[0, -1]
        losses.append(-logits.log_softmax(-1)[tokens[t]].item())
        hits.append(logits.argmax().item() == tokens[t])
    return losses, hits


@pytest.mark.parametrize('batch_size', [1, 3, 50])
def test_the_whole_split_counts_with_its_tail(split, batch_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16)).eval()
    losses, hits = naive(model, TOKENS, 8)
    result = evaluate(model, split, 8, batch_size)
    assert len(losses) == 50
    assert result['val_loss'] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result['val_acc'] == pytest.approx(np.mean(hits))
    first = evaluate(model, split, 8, 2, max_batches=2)  # 2 batches of 2 windows of 8
    assert first['val_loss'] == pytest.approx(np.mean(losses[:32]), rel=1e-5)


def test_it_ends_when_asked(split):
    assert evaluate(lambda idx: torch.zeros(*idx.shape, 20), split, 8, 4, stopped=lambda: True) is None
