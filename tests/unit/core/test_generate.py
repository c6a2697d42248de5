"""Generation against the model without a cache, drawing against the probabilities."""

import pytest
import torch

from core.generate import KVCache, generate, sample_token
from model import GPT
from tests.helpers.models import CASES, small_model


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_cached_logits_equal_uncached_ones(choices):
    """Prefill of 3, a second chunk of 4, then token by token."""
    model, idx = small_model(**choices), torch.randint(0, 23, (2, 16))
    cache = KVCache(model.config, 2, 'cpu', torch.float32)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in idx.split([3, 4] + [1] * 9, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(idx), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='17 tokens do not fit into block_size 16'):
        model(idx[:, :1], cache=cache)


@pytest.mark.parametrize('choices', CASES[1:4], ids=str)
def test_compiled_generation_gives_the_same_tokens(monkeypatch, choices):
    """Past the context too. The step compiles as one graph, once."""
    model, idx, graphs, compile = small_model(**choices), torch.randint(0, 23, (2, 3)), [], torch.compile
    monkeypatch.setattr(torch, 'compile', lambda step, dynamic, mode: compile(
        step, dynamic=dynamic, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph))
    tokens = [torch.stack(list(generate(model, idx, 40, compile=how, seed=4))) for how in (False, True)]
    assert torch.equal(*tokens) and len(tokens[0]) == 40 and len(graphs) == 1


@pytest.mark.parametrize('choices', [*CASES[:3], {'block_size': 1}], ids=str)
def test_greedy_generation_past_the_context_is_that_of_the_uncached_model(choices):
    model = small_model(**choices)
    size = model.config.block_size
    context = torch.randint(0, 23, (3, min(size, 5)))
    for token in generate(model, context, 40, temperature=0):
        if context.size(1) > size:
            context = context[:, -max(size // 2, 1):]
        assert torch.equal(token, model(context)[:, -1].argmax(-1))
        context = torch.cat((context, token[:, None]), 1)


def test_attention_to_a_cache_is_never_cudnn_s(monkeypatch):
    flags, hidden = [], GPT.hidden
    monkeypatch.setattr(GPT, 'hidden', lambda *args: (flags.append(enabled()), hidden(*args))[1])

    def enabled():
        return torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    before = enabled()
    list(generate(small_model(), torch.ones(1, 1, dtype=torch.long), 3))
    assert flags == 3 * [(False, True)] and enabled() == before


def test_suppressed_tokens_are_not_drawn_by_any_random_number(monkeypatch):
    model, idx, drawn = small_model(), torch.randint(0, 23, (8, 2)), []
    for _ in 'ab':
        tokens = generate(model, idx, 30, temperature=3.0, suppress=list(range(20)))
        drawn.append(set(torch.stack(list(tokens)).flatten().tolist()))
        monkeypatch.setattr(torch, 'rand', lambda *shape, generator: torch.zeros(shape))
    assert drawn[0] == {20, 21, 22} and drawn[1] <= drawn[0]


@pytest.mark.parametrize('size, settings', [
    (4, {'temperature': 1.0}), (4, {'top_k': 2}), (4, {'top_p': 0.9}), (4, {'top_p': 0.1}),
    (1024, {}), (1024, {'top_p': 0.9}), (1024, {'top_k': 700, 'top_p': 0.7})], ids=str)
def test_sample_token_draws_from_the_smallest_set_in_proportion(size, settings):
    """1024 ids are drawn from by blocks of 256; the reference sorts them all."""
    torch.manual_seed(0)
    logits, generator = torch.randn(1, size) * 2, torch.Generator().manual_seed(0)
    settings = {'temperature': 0.7, 'top_k': 0, 'top_p': 1.0} | settings
    ordered, order = (logits[0] / settings['temperature']).sort(descending=True)
    probs = ordered[:settings['top_k'] or size].double().softmax(0)
    kept = int((probs.cumsum(0) - probs < settings['top_p']).sum())  # what reaches top_p stays
    expected = torch.zeros(size, dtype=torch.float64)
    expected[order[:kept]] = probs[:kept] / probs[:kept].sum()
    drawn = sample_token(logits.expand(50_000, -1), generator=generator, **settings)
    counts = torch.bincount(drawn, minlength=size)
    assert (counts[expected == 0] == 0).all()
    assert (counts - 50_000 * expected).square().sum() < 50_000 * 1.3  # 1 - sum(p^2) is its mean


def test_the_lowest_temperature_draws_the_likeliest():
    logits = torch.tensor([[3.0, 5.0, 4.0]])
    assert sample_token(logits, 1e-39, 0, 1.0, torch.Generator()).item() == 1
