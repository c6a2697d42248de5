"""int8 layers against their own rounded weights, an int8 model against the float32 model."""

import pytest
import torch

from core.kernels import use_fast_cpu_kernels
from core.quantize import Int8Linear, to_int8
from tests.helpers.models import CASES, small_model


@pytest.mark.parametrize('rows, bias', [(1, False), (1, True), (500, True)])
def test_int8_linear_multiplies_by_its_rounded_weights(rows, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 24, bias=bias)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = Int8Linear(linear)
    rounded = layer.weight.float() * layer.scale.float()[:, None]
    errors = (rounded - linear.weight).abs().amax(1)
    assert (errors <= 0.51 * linear.weight.abs().amax(1) / 127).all()

    x = torch.randn(2, rows, 64).bfloat16()
    expected = x.float() @ rounded.T
    if bias:
        expected = expected + linear.bias
    torch.testing.assert_close(layer(x).float(), expected, atol=0.02, rtol=0.02)


def test_int8_linear_splits_the_outputs_of_its_layers():
    torch.manual_seed(0)
    linears = torch.nn.Linear(32, 8, bias=False), torch.nn.Linear(32, 16, bias=False)
    x = torch.randn(1, 2, 32).bfloat16()
    for y, linear in zip(Int8Linear(*linears)(x), linears, strict=True):
        torch.testing.assert_close(y, Int8Linear(linear)(x))


def test_int8_linear_rejects_widths_that_32_does_not_divide():
    with pytest.raises(ValueError, match='multiples of 32, not 48'):
        Int8Linear(torch.nn.Linear(48, 8))


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('choices', [case | {'mlp_width': 64} for case in CASES], ids=str)
def test_int8_model_is_close_to_the_float32_model(choices, fast):
    model = small_model(**choices)
    idx = torch.randint(0, 23, (2, 16))
    with torch.no_grad():
        expected = model(idx)
        if fast:
            use_fast_cpu_kernels(model)
        logits = to_int8(model)(idx)
    assert (logits - expected).norm() < 0.04 * expected.norm()
