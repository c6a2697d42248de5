"""Generation against a model without a cache, sampling against the probabilities, batches against rows."""

from types import SimpleNamespace

import pytest
import torch

from configurator import UserError
from core.generate import (
    KVCache,
    first_story_words,
    generate,
    generate_stories,
    generate_until,
    max_stories_at_once,
    prefill,
    sample_story,
    sample_token,
)
from data import infill
from data.shards import Split
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig
from tests.helpers.models import CASES, small_model
from tests.helpers.scripts import STORIES, prepare
from tests.helpers.stories import greedy_tokens, next_context

# tokens -------------------------------------------------------------------------

@pytest.mark.parametrize('choices', CASES, ids=str)
def test_cached_logits_equal_uncached_logits(choices):
    """Prefill 3 tokens, then a chunk of 4, then token by token."""
    model = small_model(**choices)
    idx = torch.randint(0, 23, (2, 16))
    cache = KVCache(model.config, 2, 'cpu', torch.float32)
    with torch.no_grad():
        chunks = [model(chunk, cache=cache) for chunk in idx.split([3, 4] + [1] * 9, dim=1)]
        torch.testing.assert_close(torch.cat(chunks, 1), model(idx), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='17 tokens do not fit into block_size 16'):
        model(idx[:, :1], cache=cache)


@pytest.mark.parametrize('choices', [*CASES[:3], {'block_size': 1}], ids=str)
def test_greedy_generation_equals_the_uncached_model_past_the_context(choices):
    model = small_model(**choices)
    block_size = model.config.block_size
    context = torch.randint(0, 23, (3, min(block_size, 5)))
    n_tokens = 0
    for token in generate(model, context, 40, temperature=0):
        context = next_context(context, block_size)
        assert torch.equal(token, model(context)[:, -1].argmax(-1))
        context = torch.cat((context, token[:, None]), 1)
        n_tokens += 1
    assert n_tokens == 40


@pytest.mark.parametrize('choices', CASES[1:4], ids=str)
def test_compiled_generation_gives_the_same_tokens_with_one_graph(monkeypatch, choices):
    model = small_model(**choices)
    idx = torch.randint(0, 23, (2, 3))
    graphs = []

    def keep_graph(graph, _):
        graphs.append(graph)
        return graph

    compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda step, dynamic, mode: compile(
        step, dynamic=dynamic, fullgraph=True, backend=keep_graph))
    eager = torch.stack(list(generate(model, idx, 40, seed=4)))
    compiled = torch.stack(list(generate(model, idx, 40, seed=4, compile=True)))
    assert len(eager) == 40 and torch.equal(eager, compiled)
    assert len(graphs) == 1


def test_generation_never_uses_cudnn_attention(monkeypatch):
    flags = []
    hidden = GPT.hidden

    def enabled():
        return torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    def watched_hidden(*args):
        flags.append(enabled())
        return hidden(*args)

    monkeypatch.setattr(GPT, 'hidden', watched_hidden)
    before = enabled()
    list(generate(small_model(), torch.ones(1, 1, dtype=torch.long), 3))
    assert flags == 3 * [(False, True)] and enabled() == before


def test_forced_tokens_replace_sampled_ones():
    """A row with forced tokens continues as if they had been part of its prompt."""
    model = small_model()
    forced = torch.tensor([[5, -1], [7, 9]])
    steps = list(generate(model, torch.tensor([[3], [3]]), 5, temperature=0, forced_tokens=forced))
    tokens = torch.stack(steps, 1)
    assert tokens[0].tolist() == [5, *greedy_tokens(model, [3, 5], 4)]
    assert tokens[1].tolist() == [7, 9, *greedy_tokens(model, [3, 7, 9], 3)]


def test_seed_decides_the_tokens():
    model = small_model()
    idx = torch.ones(1, 1, dtype=torch.long)
    runs = [torch.stack(list(generate(model, idx, 20, seed=seed))).tolist() for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


# sampling -----------------------------------------------------------------------

@pytest.mark.parametrize('random_number', [None, 0.0])
def test_suppressed_tokens_are_never_sampled(monkeypatch, random_number):
    model = small_model()
    if random_number is not None:  # the one that would hit a probability of 0 first
        monkeypatch.setattr(torch, 'rand', lambda *shape, generator: torch.full(shape, random_number))
    idx = torch.randint(0, 23, (8, 2))
    tokens = torch.stack(list(generate(model, idx, 30, temperature=3.0, suppress=list(range(20)))))
    sampled = set(tokens.flatten().tolist())
    assert sampled <= {20, 21, 22}
    if random_number is None:
        assert len(sampled) == 3


@pytest.mark.parametrize('size, settings', [
    (4, {'temperature': 1.0}), (4, {'top_k': 2}), (4, {'top_p': 0.9}), (4, {'top_p': 0.1}),
    (1024, {}), (1024, {'top_p': 0.9}), (1024, {'top_k': 700, 'top_p': 0.7})], ids=str)
def test_sample_token_samples_the_smallest_set_in_proportion(size, settings):
    """1024 ids are sampled in groups of 256; the reference sorts them all."""
    torch.manual_seed(0)
    logits = torch.randn(1, size) * 2
    settings = {'temperature': 0.7, 'top_k': 0, 'top_p': 1.0} | settings
    ordered, order = (logits[0] / settings['temperature']).sort(descending=True)
    probs = ordered[:settings['top_k'] or size].double().softmax(0)
    n_kept = int((probs.cumsum(0) - probs < settings['top_p']).sum())  # the token that reaches top_p stays
    expected = torch.zeros(size, dtype=torch.float64)
    expected[order[:n_kept]] = probs[:n_kept] / probs[:n_kept].sum()

    n = 50_000
    generator = torch.Generator().manual_seed(0)
    sampled = sample_token(logits.expand(n, -1), generator=generator, **settings)
    counts = torch.bincount(sampled, minlength=size)
    assert (counts[expected == 0] == 0).all()
    assert (counts - n * expected).square().sum() < n * 1.3  # its mean is n * (1 - sum(p^2))


def test_top_k_is_larger_than_the_vocabulary():
    sampled = sample_token(torch.zeros(500, 3), 1.0, 7, 1.0, torch.Generator())
    assert set(sampled.tolist()) == {0, 1, 2}


def test_lowest_temperature_takes_the_likeliest_token():
    logits = torch.tensor([[3.0, 5.0, 4.0]])
    assert sample_token(logits, 1e-39, 0, 1.0, torch.Generator()).item() == 1
    assert sample_token(logits, 0, 2, 1.0, torch.Generator()).item() == 1


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_logits_that_are_not_finite_are_an_error(value):
    logits = torch.tensor([[0.0, 1.0], [0.0, value]])
    for temperature in 0, 1.0:
        with pytest.raises(Exception, match='did its training diverge'):
            sample_token(logits, temperature, 0, 1.0, torch.Generator())


class NoGenerator:
    """A torch.Generator of a device that is not here."""

    def __init__(self, device):
        pass

    def manual_seed(self, seed):
        return None


@pytest.mark.parametrize('settings', [{'temperature': 0}, {}, {'top_k': 5, 'suppress': [1, 2]}], ids=str)
def test_on_a_gpu_only_a_prefill_looks_at_its_logits(monkeypatch, settings):
    """As on the meta device, where a look at any number is an error; the caller reads the tokens."""
    looks = []
    monkeypatch.setattr('core.generate.check_logits', lambda highest: looks.append(highest.shape))
    monkeypatch.setattr(torch, 'Generator', NoGenerator)
    model = small_model(block_size=16).to('meta')
    idx = torch.zeros(2, 3, dtype=torch.long, device='meta')
    tokens = list(generate(model, idx, 20, **settings))
    assert [token.shape for token in tokens] == 20 * [(2,)]
    assert looks == 2 * [(2,)]  # the prompt, and the last half of the context when that is full


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_prefill_finds_logits_that_are_not_finite(value):
    model, idx = small_model(), torch.ones(2, 3, dtype=torch.long)
    model.lm_head.weight.data[5] = value
    with pytest.raises(UserError, match='did its training diverge'):
        prefill(model, KVCache(model.config, 2, 'cpu', torch.float32), idx)


# stories ------------------------------------------------------------------------

@pytest.mark.parametrize('min_new_tokens', [0, 4])
def test_generate_until_continues_each_prompt_as_if_alone(min_new_tokens):
    """Prompts of any lengths; a row that is finished stays as it is while the others grow."""
    model = small_model(block_size=64)
    prompts = [[3], [5, 6, 7, 8, 9], [5, 6], [9, 9, 1, 2]]
    stop = greedy_tokens(model, prompts[1], 12)[2]  # so that at least one row ends early
    expected = [greedy_tokens(model, ids, 12, stop, min_new_tokens) for ids in prompts]
    steps = []
    for rows, unfinished in generate_until(model, prompts, stop, 12, min_new_tokens, temperature=0):
        steps.append(([list(row) for row in rows], set(unfinished)))
    assert steps[-1] == (expected, set())
    for step, (rows, unfinished) in enumerate(steps):
        for i, new in enumerate(expected):
            n_sampled = max(step + 2 - len(prompts[i]), 0)  # the shortest prompt has one token
            n_until_end = len(new) if len(new) == 12 else len(new) + 1  # one more for the stop
            assert rows[i] == new[:n_sampled]
            assert (i in unfinished) == (n_sampled < n_until_end)


def test_generate_until_drops_a_stop_at_the_limit():
    model = small_model(block_size=64)
    new = greedy_tokens(model, [3], 12)
    stop = new[-1]
    limit = new.index(stop) + 1
    *_, (rows, _) = generate_until(model, [[3]], stop, limit, min_new_tokens=limit, temperature=0)
    assert rows == [new[:limit - 1]]


def test_generate_stories_writes_each_batch_as_if_alone(monkeypatch):
    model = small_model(block_size=64)
    prompts = [[3], [5, 6, 7, 8, 9], [5, 6], [9, 9, 1, 2], [4]]
    stop = greedy_tokens(model, prompts[1], 12)[2]
    expected = [greedy_tokens(model, ids, 12, stop) for ids in prompts]
    monkeypatch.setattr('core.generate.max_stories_at_once', lambda _: 2)
    assert list(generate_stories(model, prompts, stop, 12, seed=1, temperature=0)) == expected


def test_generate_stories_seeds_each_batch_differently(monkeypatch):
    model = small_model(block_size=64)
    monkeypatch.setattr('core.generate.max_stories_at_once', lambda _: 1)

    def write(seed):
        return list(generate_stories(model, [[3]] * 9, -1, 12, seed=seed, temperature=3.0))

    stories = write(1)
    assert len({tuple(row) for row in stories}) == 9
    assert stories == write(1) and stories != write(2)
    *_, (first, _) = generate_until(model, [[3]], -1, 12, seed=1, temperature=3.0)
    assert first == stories[:1]  # the first batch has the seed itself


def test_max_stories_at_once_is_what_memory_has_room_for():
    """Keys and values of a layer are (n_kv_head, block_size, head_dim), 4 bytes each; 1 GB in all."""
    model = small_model(block_size=64)
    config = model.config
    assert max_stories_at_once(model) == 128
    config.block_size = 2**20
    size = 2 * config.n_layer * config.n_kv_head * 2**20 * config.head_dim * 4
    assert max_stories_at_once(model) == 2**30 // size > 0
    config.block_size = 2**30
    assert max_stories_at_once(model) == 1


@pytest.mark.parametrize('name, free, at_once', [
    ('cuda', 3e9, 8),  # 0.75 GB hold 14 stories
    ('cuda', 3.1e9, 8), ('cuda', 0, 1), ('cuda', 24e9, 64),
    ('cuda', 140e9, 128),  # 8 GB hold 163, more is not taken
    ('mps', 12e9, 32), ('mps', -1e9, 1)])
def test_max_stories_at_once_takes_a_share_of_the_free_gpu_memory(monkeypatch, name, free, at_once):
    """The keys and values of a story of this shape take 52 MB."""
    config = GPTConfig(block_size=1024, n_layer=8, n_head=8, n_kv_head=8, n_embd=800)
    model = SimpleNamespace(config=config, device=torch.device(name))
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (int(free), 10**12))
    monkeypatch.setattr(torch.mps, 'recommended_max_memory', lambda: 10**11)
    monkeypatch.setattr(torch.mps, 'driver_allocated_memory', lambda: 10**11 - int(free))
    assert max_stories_at_once(model) == at_once


def test_sample_story_begins_with_its_prompt_and_stops_when_asked():
    tokenizer = CharTokenizer.train(STORIES)
    model = small_model(block_size=64, vocab_size=tokenizer.vocab_size)
    prompt = tokenizer.encode('A dog')
    story = sample_story(model, tokenizer, 1, prompt)
    assert story.startswith('A dog') and len(story) > len('A dog')
    assert sample_story(model, tokenizer, 1, prompt) == story != sample_story(model, tokenizer, 2, prompt)
    calls = iter([False, True])
    cut = sample_story(model, tokenizer, 1, prompt, lambda: next(calls))
    assert cut == tokenizer.decode(prompt + tokenizer.encode(story)[len(prompt):][:2])


def test_first_story_words_are_four(tmp_path):
    tokenizer = CharTokenizer.train(STORIES)

    def words(name, max_tokens=99, **changes):
        split = Split(prepare(tmp_path / name, **changes), 'val')
        return tokenizer.decode(first_story_words(split, tokenizer, max_tokens))

    assert words('plain') == 'Once there was a'
    assert words('short', max_tokens=5) == 'Once'  # with the space before it
    infilled, _ = infill.encode(tokenizer, ['Hi you. It ran. All was well.'], 1.0)
    assert words('infilled', val=infilled) == 'Hi you.'
    no_delimiter = tokenizer.encode_pieces([('Oh no', False)])[0]  # as in some token files
    assert words('bare', val=no_delimiter).strip() == 'Oh no'
