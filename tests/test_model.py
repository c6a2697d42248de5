"""The model against a naive implementation of each choice, its cache against itself without one."""

import itertools
import math
from functools import partial

import pytest
import torch

from model import GPT, GPTConfig, Int8Linear, KVCache, StaticCache, pick, plain_attention, to_int8

GPT2_BLOCK = {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'bias': True}
CASES = [
    {},
    GPT2_BLOCK,
    {'norm': 'layer', 'position': 'sinusoidal', 'mlp': 'relu', 'bias': True, 'tie_embeddings': False},
    {'n_kv_head': 2, 'mlp': 'relu2', 'qk_norm': True, 'rope_theta': 500.0},
    {'n_kv_head': 1, 'mlp_width': 24, 'norm_eps': 1e-2, 'bias': True},
    {'norm': 'layer', 'qk_norm': True},
]


def small(**choices):
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(**{'block_size': 16, 'vocab_size': 23, 'n_layer': 2, 'n_head': 4, 'n_embd': 32} | choices)
    )
    with torch.no_grad():  # weights far from their initial scale, so that every term shows
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def naive_norm(x, weights, name, config):
    if config.norm == 'rms':
        x = x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
    else:
        x = (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, unbiased=False) + config.norm_eps
        ).sqrt()
    return x * weights[name + '.weight'] + weights.get(name + '.bias', 0)


def naive_linear(x, weights, name):
    return x @ weights[name + '.weight'].T + weights.get(name + '.bias', 0)


def naive_rope(x, config):
    """x: (T, head_dim). Each pair (i, i + half) is a complex number, turned by t * theta^(-i / half)."""
    half = x.size(1) // 2
    out = x.clone()
    for t, i in itertools.product(range(x.size(0)), range(half)):
        turn = torch.polar(torch.tensor(1.0), torch.tensor(t * config.rope_theta ** (-i / half)))
        turned = torch.complex(x[t, i], x[t, i + half]) * turn
        out[t, i], out[t, i + half] = turned.real, turned.imag
    return out


def naive_logits(model, tokens):
    """Logits (T, vocab_size) of one sequence, token by token and head by head."""
    config, weights = model.config, model.state_dict()
    x = weights['embedding.weight'][tokens]
    if config.position == 'learned':
        x = x + weights['position.weight'][: len(tokens)]
    if config.position == 'sinusoidal':
        x = x * math.sqrt(config.n_embd)
        for t, i in itertools.product(range(len(tokens)), range(config.n_embd)):
            angle = t / 10000 ** (2 * (i // 2) / config.n_embd)
            x[t, i] += math.cos(angle) if i % 2 else math.sin(angle)
    for layer in range(config.n_layer):
        block, width = f'blocks.{layer}.', config.head_dim
        h = naive_norm(x, weights, block + 'attn_norm', config)
        q, k, v = (naive_linear(h, weights, f'{block}attn.{name}') for name in 'qkv')
        heads = []
        for head in range(config.n_head):
            group = head // (config.n_head // config.n_kv_head)
            qh = q[:, head * width : (head + 1) * width]
            kh, vh = (t[:, group * width : (group + 1) * width] for t in (k, v))
            if config.qk_norm:
                qh = naive_norm(qh, weights, block + 'attn.q_norm', config)
                kh = naive_norm(kh, weights, block + 'attn.k_norm', config)
            if config.position == 'rope':
                qh, kh = naive_rope(qh, config), naive_rope(kh, config)
            rows = []
            for t in range(len(tokens)):
                attention = (kh[: t + 1] @ qh[t] / math.sqrt(width)).softmax(0)
                rows.append(attention @ vh[: t + 1])
            heads.append(torch.stack(rows))
        x = x + naive_linear(torch.cat(heads, 1), weights, block + 'attn.proj')
        h = naive_norm(x, weights, block + 'mlp_norm', config)
        up = naive_linear(h, weights, block + 'mlp.up')
        if config.mlp == 'swiglu':
            gate = naive_linear(h, weights, block + 'mlp.gate')
            up = gate * torch.sigmoid(gate) * up
        elif config.mlp == 'gelu':
            up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        else:
            up = up.clamp(min=0) ** (2 if config.mlp == 'relu2' else 1)
        x = x + naive_linear(up, weights, block + 'mlp.proj')
    return naive_norm(x, weights, 'norm', config) @ weights['lm_head.weight'].T


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_logits_are_those_of_the_naive_model(choices):
    model, tokens = small(**choices), torch.randint(0, 23, (11,))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0], naive_logits(model, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_autocast_on_the_cpu_is_near_the_float32_model(choices):
    model, idx = small(**choices), torch.randint(0, 23, (2, 16))
    with torch.no_grad():
        expected = model(idx)
        with torch.autocast('cpu', torch.bfloat16):
            logits = model(idx)
    assert (logits - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_cached_logits_equal_uncached_ones(choices):
    """Prefill of 3, a second chunk of 4, then token by token."""
    model, idx = small(**choices), torch.randint(0, 23, (2, 16))
    cache = KVCache(model.config, 2, 'cpu', torch.float32)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in idx.split([3, 4] + [1] * 9, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('choices', CASES[1:4], ids=str)
def test_logits_of_the_static_cache_equal_uncached_ones(choices):
    """The step compiles as one graph, once."""
    model, idx = small(**choices), torch.randint(0, 23, (2, 16))
    cache = KVCache(model.config, 2, 'cpu', torch.float32)
    static, compilations = StaticCache(cache), []

    def backend(graph, _):
        compilations.append(graph)
        return graph

    step = torch.compile(partial(model, cache=static), backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = model(idx)
        torch.testing.assert_close(model(idx[:, :3], cache=cache), expected[:, :3], atol=1e-5, rtol=1e-5)
        for i in range(3, 16):
            static.place.fill_(i)
            torch.testing.assert_close(step(idx[:, i:i + 1]), expected[:, i:i + 1], atol=1e-5, rtol=1e-5)
    assert len(compilations) == 1


@pytest.mark.parametrize('choices', CASES[:3], ids=str)
def test_greedy_generation_past_the_context_is_that_of_the_uncached_model(choices):
    model, idx = small(**choices), torch.randint(0, 23, (3, 5))
    tokens = torch.stack(list(model.generate(idx, 40, temperature=0)), 1)
    context = idx
    for t in range(40):
        if context.size(1) > 16:
            context = context[:, -8:]
        expected = model(context)[:, -1].argmax(-1)
        assert torch.equal(tokens[:, t], expected), t
        context = torch.cat((context, expected[:, None]), 1)


def test_generation_stops_when_every_sequence_has_stopped():
    model, idx = small(), torch.randint(0, 23, (4, 2))
    tokens = torch.stack(list(model.generate(idx, 500, temperature=2.0, stop=7, seed=3)), 1)
    stops = [(row == 7).nonzero()[0].item() for row in tokens]
    assert max(stops) == tokens.size(1) - 1


def test_tokens_of_never_are_not_drawn():
    model, idx = small(), torch.randint(0, 23, (8, 2))
    never = list(range(0, 20))
    tokens = torch.stack(list(model.generate(idx, 30, temperature=3.0, never=never)))
    assert set(tokens.flatten().tolist()) == {20, 21, 22}


@pytest.mark.parametrize('rows', [1, 5, 500])
@pytest.mark.parametrize('bias', [False, True])
def test_an_int8_layer_multiplies_by_its_rounded_weights(rows, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 24, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0
    layer, x = Int8Linear(linear), torch.randn(2, rows, 64).bfloat16()
    rounded = layer.weight.float() * layer.scale.float()[:, None]
    assert ((rounded - linear.weight).abs().amax(1) <= 0.51 * linear.weight.abs().amax(1) / 127).all()
    expected = x.float() @ rounded.T + (linear.bias if bias else 0)
    torch.testing.assert_close(layer(x).float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize('choices', [case | {'mlp_width': 64} for case in CASES], ids=str)
def test_an_int8_model_is_near_the_float32_one(choices):
    model, idx = small(**choices), torch.randint(0, 23, (2, 16))
    with torch.no_grad():
        expected = model(idx)
        logits = to_int8(model)(idx)
    assert (logits - expected).norm() < 0.04 * expected.norm()


def test_same_seed_same_tokens_and_another_seed_others():
    model, idx = small(), torch.randint(0, 23, (1, 2))
    draw = [torch.stack(list(model.generate(idx, 30, seed=seed))) for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])


def test_pick_draws_from_the_kept_tokens_in_proportion():
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)

    def shares(**settings):
        settings = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0} | settings
        return torch.bincount(pick(logits, generator=generator, **settings), minlength=4) / 20_000

    def close(actual, expected):
        torch.testing.assert_close(actual, torch.tensor(expected), atol=0.02, rtol=0)

    close(shares(), [0.1, 0.2, 0.4, 0.3])
    close(shares(top_k=2), [0.0, 0.0, 4 / 7, 3 / 7])
    close(shares(top_p=0.6), [0.0, 0.0, 4 / 7, 3 / 7])  # 0.4 is below 0.6, so the next is needed
    close(shares(top_p=0.4), [0.0, 0.0, 1.0, 0.0])
    close(shares(temperature=0.5), [1 / 30, 4 / 30, 16 / 30, 9 / 30])
    close(shares(temperature=0), [0.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize('settings', [{}, {'top_p': 0.9}, {'top_k': 700, 'top_p': 0.7}], ids=str)
def test_pick_keeps_to_the_smallest_set_of_a_large_vocabulary(settings):
    """1024 ids are drawn from by blocks of 256; the reference sorts them all."""
    torch.manual_seed(0)
    logits, generator = torch.randn(1, 1024) * 2, torch.Generator().manual_seed(0)
    settings = {'temperature': 0.7, 'top_k': 0, 'top_p': 1.0} | settings
    ordered, order = (logits[0] / 0.7).sort(descending=True)
    probs = ordered[:settings['top_k'] or None].double().softmax(0)
    kept = int((probs.cumsum(0) < settings['top_p']).sum()) + 1
    expected = torch.zeros(1024, dtype=torch.float64)
    expected[order[:kept]] = probs[:kept] / probs[:kept].sum()
    drawn = pick(logits.expand(100_000, -1), generator=generator, **settings)
    counts = torch.bincount(drawn, minlength=1024)
    assert (counts[expected == 0] == 0).all()
    assert (counts - 100_000 * expected).square().sum() < 100_000 * 1.3  # 1 - sum(p^2) is its mean


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_the_initial_loss_is_near_that_of_guessing(choices):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, n_layer=2, n_head=4, n_embd=64, block_size=32, **choices))
    idx = torch.randint(0, 500, (8, 33))
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(500), rel=0.03)


def test_the_loss_leaves_out_targets_of_minus_one():
    model, idx = small(), torch.randint(0, 23, (1, 9))
    y = idx[:, 1:].clone()
    y[0, 5:] = -1
    torch.testing.assert_close(model(idx[:, :-1], y), model(idx[:, :5], idx[:, 1:6]))


@pytest.mark.parametrize('rows', [1, 3, 16])
def test_the_loss_in_parts_is_the_loss_at_once(rows):
    model, idx = small(), torch.randint(0, 23, (2, 9))
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, 5:] = -1
    results = []
    for max_logits in 2**62, rows * 23 + 5:
        model.max_logits = max_logits
        model.zero_grad()
        loss = model(x, y)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_every_parameter_is_initialised_at_its_scale(choices):
    torch.manual_seed(0)
    config = {'n_layer': 8, 'n_embd': 128, 'vocab_size': 300, 'n_head': 4, 'mlp_width': 256} | choices
    for name, p in GPT(GPTConfig(**config)).named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith('proj.weight') else 0.02  # 4 = sqrt(2 * 8 layers)
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_dropout_changes_the_training_loss_alone():
    model, idx = small(dropout=0.5), torch.randint(0, 23, (2, 9))
    x, y = idx[:, :-1], idx[:, 1:]
    assert model(x, y) == model(x, y)
    model.train()
    assert model(x, y) != model(x, y)


def test_n_params_of_known_models():
    assert GPT(GPTConfig(vocab_size=32000)).n_params() == 15_191_712  # llama2.c's stories15M
    gpt2 = GPTConfig(1024, 50257, 12, 12, n_embd=768, **GPT2_BLOCK)
    with torch.device('meta'):
        assert GPT(gpt2).n_params() == 124_439_808


@pytest.mark.parametrize(
    'choices, named',
    [
        ({'n_embd': 30}, 'n_head'),
        ({'n_kv_head': 3}, 'n_kv_head'),
        ({'norm': 'batch'}, 'rms, layer'),
        ({'mlp': ''}, 'mlp'),
        ({'position': 'none'}, 'position'),
        ({'dropout': 1.0}, 'dropout'),
        ({'n_layer': 0}, 'n_layer'),
        ({'n_head': 32}, 'even'),
        ({'block_size': -1}, 'block_size'),
        ({'mlp_width': -8}, 'mlp_width'),
        ({'norm_eps': 0.0}, 'norm_eps'),
    ],
)
def test_choices_that_make_no_model_are_refused(choices, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**{'n_head': 4, 'n_embd': 32} | choices)


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match='block_size 16'):
        small()(torch.zeros(1, 17, dtype=torch.long))


def test_plain_attention_drops_attention_alone():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    whole = plain_attention(q, k, v, 0.0)
    dropped = [plain_attention(q, k, v, 0.5) for _ in range(4000)]
    torch.testing.assert_close(torch.stack(dropped).mean(0), whole, atol=0.1, rtol=0)
    first = torch.stack(dropped)[:, 0, 0, 0]  # sees itself alone: all or nothing, scaled up
    assert set((first / v[0, 0, 0]).round().flatten().tolist()) == {0.0, 2.0}


def test_compiled_generation_gives_the_same_tokens(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda step, **_: step)  # its caches and places are what matters
    model, idx = small(), torch.randint(0, 23, (2, 3))
    tokens = [torch.stack(list(model.generate(idx, 40, compile=how, seed=4))) for how in (False, True)]
    assert torch.equal(*tokens)


def test_flops_by_hand():
    """Two operations a weight forward and four backward; the products of attention over a whole window."""
    config = GPTConfig(16, vocab_size=23, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, mlp_width=48)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # q, k and v, proj, swiglu
    forward = 2 * (3 * block + 23 * 32) + 3 * 2 * 2 * 16 * 32  # scores and their sums: 2 products a layer
    assert GPT(config).flops_per_token() == 3 * forward
