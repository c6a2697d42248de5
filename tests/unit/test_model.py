"""The model against a naive implementation of each choice."""

import itertools
import math

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional as F

from core.evaluate import count_loss
from model import (
    GPT,
    GPTConfig,
    LinearCrossEntropy,
    log_probs_by_chunk,
    logits_gradient,
    loss_chunk_size,
)
from tests.helpers.models import CASES, GPT2_BLOCK, small_model


def naive_norm(x, weights, name, config):
    if config.norm == 'layer':
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return x * weights[name + '.weight'] + weights.get(name + '.bias', 0)


def naive_linear(x, weights, name):
    return x @ weights[name + '.weight'].T + weights.get(name + '.bias', 0)


def naive_rope(x, config):
    """x: (T, head_dim). Each pair (i, i + half) is a complex number, turned by t * theta^(-i / half)."""
    half = x.size(1) // 2
    turns = torch.tensor([[t * config.rope_theta ** (-i / half) for i in range(half)] for t in range(len(x))])
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * turns)
    return torch.cat((turned.real, turned.imag), 1)


def naive_logits(model, tokens):
    """Logits (T, vocab_size) of one sequence, token by token and head by head."""
    config, weights = model.config, model.state_dict()
    x = weights['embedding.weight'][tokens]
    if config.position == 'learned':
        x = x + weights['position.weight'][:len(tokens)]
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
            qh = q[:, head * width:(head + 1) * width]
            kh, vh = (t[:, group * width:(group + 1) * width] for t in (k, v))
            if config.qk_norm:
                qh = naive_norm(qh, weights, block + 'attn.q_norm', config)
                kh = naive_norm(kh, weights, block + 'attn.k_norm', config)
            if config.position == 'rope':
                qh, kh = naive_rope(qh, config), naive_rope(kh, config)
            heads.append(torch.stack([
                (kh[:t + 1] @ qh[t] / math.sqrt(width)).softmax(0) @ vh[:t + 1] for t in range(len(tokens))]))
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
def test_logits_equal_those_of_the_naive_model(choices):
    model, tokens = small_model(**choices), torch.randint(0, 23, (11,))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0], naive_logits(model, tokens), atol=1e-4, rtol=1e-4)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize('rows', [1, 3, 100])
@pytest.mark.parametrize('tied', [True, False])
def test_the_chunked_loss_equals_that_of_all_logits_at_once(rows, tied):
    model, idx = small_model(tie_embeddings=tied), torch.randint(0, 23, (2, 9))
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, 5:], y[1, 0] = -1, 0  # no target; the first id
    loss = model(x, y, chunk_size=rows)
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient(model, 3 * loss), gradient(model, 3 * expected), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('compiling', [False, True])
def test_logits_gradient_equals_that_of_cross_entropy(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: compiling)
    logits, targets = torch.randn(6, 23, requires_grad=True), torch.tensor([0, 22, 5, 5, -1, 7])
    F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum').backward()
    gradient = logits_gradient(logits.detach().log_softmax(-1), targets)
    has_target = targets >= 0
    torch.testing.assert_close(gradient[has_target], logits.grad[has_target])


def test_the_compiled_loss_equals_the_eager_one_and_scatters_nothing():
    """A scatter would be a kernel of its own, and a pass over all logits before and after it."""
    graphs = []

    def keep_graph(graph, _):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep_graph)
    compiled_loss = torch.compile(LinearCrossEntropy.apply, backend=backend)
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(23, 8, requires_grad=True)
    targets = torch.tensor([0, 22, 5, 5, -1, 7, 1, -1, 2])
    results = []
    for loss in LinearCrossEntropy.apply, compiled_loss:
        value = loss(x, weight, targets, 4)
        results.append((value, *torch.autograd.grad(value, (x, weight))))
    torch.testing.assert_close(results[0], results[1])
    assert len(graphs) == 2 and 'exp' in graphs[0] and 'scatter' not in ''.join(graphs)


@pytest.mark.parametrize('device, vocab_size, chunk_size', [
    ('cpu', 4096, 1024), ('mps', 50259, 1024), ('cuda', 4096, 32768), ('cuda', 50259, 2670),
    ('cuda', 2**18, 1024)])
def test_a_gpu_computes_the_loss_in_larger_chunks(device, vocab_size, chunk_size):
    assert loss_chunk_size(torch.device(device), vocab_size) == chunk_size


def test_loss_and_count_loss_take_chunks_of_loss_chunk_size(monkeypatch):
    sizes = []

    def recorded(head, x, targets, chunk_size):
        sizes.append(chunk_size)
        return log_probs_by_chunk(head, x, targets, chunk_size)

    for module in 'model', 'core.evaluate':
        monkeypatch.setattr(f'{module}.loss_chunk_size', lambda device, vocab_size: vocab_size + 1)
        monkeypatch.setattr(f'{module}.log_probs_by_chunk', recorded)
    model, idx = small_model(), torch.randint(0, 23, (2, 9))
    model(idx, idx)
    count_loss(model, idx, idx)
    assert sizes == [24, 24]


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_autocast_is_near_the_float32_model(choices):
    model, idx = small_model(**choices), torch.randint(0, 23, (4, 17))
    exact = model(idx[:, :-1], idx[:, 1:])
    with torch.autocast('cpu', torch.bfloat16):
        rounded = model(idx[:, :-1], idx[:, 1:], chunk_size=7)
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(exact.item(), rel=0.02)
    expected = gradient(model, exact)
    assert (gradient(model, rounded) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('choices', [*CASES, {'tie_embeddings': False}], ids=str)
def test_every_parameter_is_initialised_at_its_scale(choices):
    torch.manual_seed(0)
    config = {'n_layer': 8, 'n_embd': 128, 'vocab_size': 300, 'n_head': 4, 'mlp_width': 256} | choices
    for name, p in GPT(GPTConfig(**config)).named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith('bias') else 1)).all(), name
        else:
            std = 0.02 / 4 if name.endswith('proj.weight') else 0.02  # 4 = sqrt(2 * 8 layers)
            if name == 'embedding.weight' and choices == {'tie_embeddings': False}:
                std = 0.3
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_dropout_is_applied_in_training_only(monkeypatch):
    model, idx, places = small_model(dropout=0.5), torch.randint(0, 23, (2, 10)), []
    x, y = idx[:, :-1], idx[:, 1:]
    assert model(x, y) == model(x, y)
    model.train()
    monkeypatch.setattr(F, 'dropout', lambda x, p, training=True: places.append((p, training)) or x)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, dropout_p, **_: (
        places.append(('attention', dropout_p)), v)[1])
    model(x, y)
    block = [('attention', 0.5), (0.5, True), (0.5, True)]  # attention, its output, the MLP's output
    assert places == [(0.5, True), *block, *block]
    model.eval()
    places.clear()
    model(x, y)
    block = [('attention', 0.0), (0.5, False), (0.5, False)]
    assert places == [(0.5, False), *block, *block]


def test_n_params_of_known_models():
    with torch.device('meta'):
        assert GPT(GPTConfig(vocab_size=32000)).n_params() == 15_191_712  # llama2.c's stories15M
        assert GPT(GPTConfig(1024, 50257, 12, 12, n_embd=768, **GPT2_BLOCK)).n_params() == 124_439_808


@pytest.mark.parametrize('choices, named', [
    ({'n_embd': 30}, 'n_head'), ({'n_kv_head': 3}, 'n_kv_head'), ({'n_head': 32}, 'even'),
    ({'norm': 'batch'}, 'rms, layer'), ({'mlp': ''}, 'mlp'), ({'position': 'none'}, 'position'),
    ({'n_layer': 0}, 'n_layer'), ({'block_size': -1}, 'block_size'), ({'mlp_width': -8}, 'mlp_width'),
    ({'dropout': 1.0}, 'dropout'), ({'norm_eps': 0.0}, 'norm_eps'), ({'rope_theta': 0.0}, 'rope_theta')])
def test_config_rejects_choices_that_make_no_model(choices, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**{'n_head': 4, 'n_embd': 32} | choices)


def test_flops_per_token_by_hand():
    """Two operations a weight forward and four backward; the products of attention over a whole window."""
    config = GPTConfig(16, vocab_size=23, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, mlp_width=48)
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # q, k and v, proj, swiglu
    forward = 2 * (3 * block + 23 * 32) + 3 * 2 * 2 * 16 * 32  # scores and their sums: 2 products a layer
    assert GPT(config).flops_per_token() == 3 * forward


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize('kind, k_heads', [(OnCuda, 4), (torch.Tensor, 2)])
def test_grouped_queries_repeat_the_heads_on_cuda_only(monkeypatch, kind, k_heads):
    """As enable_gqa does where flash attention cannot run; on a CPU that always can."""
    calls, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda q, k, v, **more: (
        calls.append((k.size(1), v.size(1), more['enable_gqa'])), attend(q, k, v, **more))[1])
    attention, x = small_model(n_kv_head=2, position='learned').blocks[0].attn, torch.randn(2, 16, 32)
    torch.testing.assert_close(attention(x.as_subclass(kind), None, None).as_subclass(torch.Tensor),
                               attention(x, None, None))
    assert calls[0] == (k_heads, k_heads, k_heads == 2)
