"""Backward passes of our own against numeric gradients, values against torch's or a naive one."""

import torch
from torch import nn

from core.kernels import RMSNorm, RMSNormOnCPU, rotate


def test_the_norm_is_torchs_and_its_gradients_are_numeric_ones():
    x, weight = torch.randn(3, 5, 8, dtype=torch.double), torch.randn(8, dtype=torch.double)
    theirs = nn.functional.rms_norm(x, (8,), weight, 0.1)
    torch.testing.assert_close(RMSNormOnCPU.apply(x, weight, 0.1), theirs)
    assert torch.autograd.gradcheck(RMSNormOnCPU.apply, (x.requires_grad_(), weight.requires_grad_(), 0.1))


def test_the_norm_is_cast_for_the_layers_behind_it():
    norm = RMSNorm(8, eps=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert norm(torch.randn(2, 8)).dtype == torch.bfloat16
    assert norm(torch.randn(2, 8)).dtype == torch.float32


def test_a_rotation_turns_each_pair_and_its_gradient_turns_back():
    angle = torch.randn(5, 1, 3, dtype=torch.double)
    cos, sin = (torch.cat(pair, -1).expand(5, 4, 6).flatten(1)
                for pair in ((angle.cos(),) * 2, (-angle.sin(), angle.sin())))
    x = torch.randn(2, 5, 4, 6, dtype=torch.double)
    turns = torch.polar(torch.ones_like(angle), angle)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * turns
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    assert torch.autograd.gradcheck(rotate, (x.requires_grad_(), cos, sin))
