"""int8 layers against their own rounded weights, an int8 model against the float32 one."""

import pytest
import torch

from core.quantize import Int8Linear, to_int8
from tests.helpers.models import CASES, small_model


@pytest.mark.parametrize('rows, bias', [(1, False), (1, True), (500, True)])
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
    model, idx = small_model(**choices), torch.randint(0, 23, (2, 16))
    with torch.no_grad():
        expected = model(idx)
        logits = to_int8(model)(idx)
    assert (logits - expected).norm() < 0.04 * expected.norm()
