"""The faster kernels against model.py, and their backward passes against numeric gradients."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from core.kernels import (
    FastRMSNorm,
    RMSNormFunction,
    RopeFunction,
    math_attention,
    rotate_all_heads,
    use_fast_cpu_kernels,
    use_joined_products,
)
from model import apply_rope
from tests.helpers.models import CASES, small_model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def check_equals_specification(model, specification):
    """Compare parameters' names, loss, gradients and logits in float32; return the inputs and targets."""
    assert model.state_dict().keys() == specification.state_dict().keys()
    idx = torch.randint(0, 23, (3, 17))
    x, y = idx[:, :-1], idx[:, 1:].contiguous()
    expected, loss = specification(x, y), model(x, y)
    torch.testing.assert_close(loss, expected)
    expected_gradients = gradients(specification, expected)
    torch.testing.assert_close(gradients(model, loss), expected_gradients, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), specification(x), rtol=1e-4, atol=1e-4)
    return x, y


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_a_model_with_fast_kernels_equals_the_specification(choices):
    specification, fast = small_model(**choices), small_model(**choices)
    use_fast_cpu_kernels(fast)
    check_equals_specification(fast, specification)


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_a_model_with_fast_kernels_is_near_the_specification_in_bfloat16(choices):
    specification, fast = small_model(**choices), small_model(**choices)
    use_fast_cpu_kernels(fast)
    idx = torch.randint(0, 23, (4, 17))
    x, y = idx[:, :-1], idx[:, 1:].contiguous()
    expected = torch.cat([grad.flatten() for grad in gradients(specification, specification(x, y)).values()])
    with torch.autocast('cpu', torch.bfloat16):
        loss = fast(x, y)
    found = torch.cat([grad.flatten() for grad in gradients(fast, loss).values()])
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_every_module_that_has_a_fast_version_is_replaced():
    model = small_model(qk_norm=True)
    use_fast_cpu_kernels(model)
    kinds = {type(module).__name__ for module in model.modules()}
    assert {'FastRMSNorm', 'FastAttention', 'FastMLP'} <= kinds
    assert not {'RMSNorm', 'Attention', 'MLP'} & kinds


def test_rms_norm_equals_torch_and_has_its_gradients():
    x, weight = torch.randn(3, 5, 8, dtype=torch.double), torch.randn(8, dtype=torch.double)
    expected = nn.functional.rms_norm(x, (8,), weight, 0.1)
    torch.testing.assert_close(RMSNormFunction.apply(x, weight, 0.1), expected)
    inputs = x.requires_grad_(), weight.requires_grad_(), 0.1
    assert torch.autograd.gradcheck(RMSNormFunction.apply, inputs)


def test_rms_norm_is_cast_for_the_layers_that_follow():
    norm = FastRMSNorm(8, eps=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(torch.randn(2, 8)).dtype == torch.bfloat16
    assert norm(torch.randn(2, 8)).dtype == torch.float32


def test_rope_equals_apply_rope_and_its_gradient_rotates_back():
    angles = torch.randn(5, 3, dtype=torch.double)  # T = 5, head_dim = 6
    cos = torch.cat((angles.cos(), angles.cos()), -1).repeat(1, 4)
    sin = torch.cat((-angles.sin(), angles.sin()), -1).repeat(1, 4)
    x = torch.randn(2, 5, 4, 6, dtype=torch.double)
    torch.testing.assert_close(rotate_all_heads(x, cos, sin), apply_rope(x, angles.cos(), angles.sin()))
    assert torch.autograd.gradcheck(RopeFunction.apply, (x.requires_grad_(), cos, sin))


@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
def test_math_attention_equals_scaled_dot_product_attention(n_kv_head):
    q = torch.randn(2, 4, 7, 6)
    k, v = torch.randn(2, 2, n_kv_head, 7, 6)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(math_attention(q, k, v, dropout=0.0), expected)


def test_math_attention_drops_weights_at_the_given_rate():
    q = k = torch.zeros(1, 1, 100, 100)  # position t attends to the t + 1 positions up to it alike
    v = torch.eye(100)[None, None]
    torch.manual_seed(0)
    weights = math_attention(q, k, v, dropout=0.25)[0, 0]
    in_sight = torch.ones(100, 100).tril() > 0
    assert not weights[~in_sight].any()
    kept = weights[in_sight] > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    scaled = weights * torch.arange(1, 101)[:, None]
    torch.testing.assert_close(scaled[scaled > 0], torch.full((int(kept.sum()),), 1 / 0.75))


@pytest.mark.parametrize('T, uses_math', [(512, True), (513, False)])
def test_long_contexts_use_the_flash_kernel(monkeypatch, T, uses_math):
    used = []
    monkeypatch.setattr('core.kernels.math_attention', lambda q, *_: used.append(q.dtype) or q)
    model = small_model(block_size=600, n_layer=1)
    use_fast_cpu_kernels(model)
    with torch.autocast('cpu', torch.bfloat16):
        model(torch.zeros(1, T, dtype=torch.long))
    assert used == ([torch.bfloat16] if uses_math else [])
    model(torch.zeros(1, T, dtype=torch.long))  # without autocast flash is faster
    assert len(used) == uses_math


# for a GPU --------------------------------------------------------------------

def count_products(monkeypatch, model, x, y):
    """Return how many linear layers the blocks of a model compute as products of their own."""
    weights = []
    linear = nn.functional.linear

    def counted(x, weight, bias=None):
        weights.append(weight)
        return linear(x, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, 'linear', counted)
        model.hidden(x)
    return len(weights)


@pytest.mark.parametrize('choices', CASES, ids=str)
def test_joined_products_equal_the_specification(monkeypatch, choices):
    """It takes fewer products."""
    specification, joined = small_model(**choices), small_model(**choices)
    use_joined_products(joined)
    x, y = check_equals_specification(joined, specification)
    is_swiglu = joined.config.mlp == 'swiglu'
    before, now = (count_products(monkeypatch, model, x, y) for model in (specification, joined))
    assert (before, now) == ((2 * 7, 2 * 4) if is_swiglu else (2 * 6, 2 * 4))


def test_joined_products_compile_to_one_graph():
    specification, joined = small_model(n_kv_head=2), small_model(n_kv_head=2)
    use_joined_products(joined)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(joined, backend=counter)
    x, y = torch.randint(0, 23, (2, 2, 16))
    with torch.autocast('cpu', torch.bfloat16):
        expected, loss = specification(x, y), compiled(x, y)
    torch.testing.assert_close(loss, expected)
    found = gradients(joined, loss)
    torch.testing.assert_close(found, gradients(specification, expected), rtol=0.05, atol=0.01)
    assert counter.frame_count == 1
