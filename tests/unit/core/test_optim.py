"""Muon against a naive version that takes one matrix at a time, the parameter groups, clipping."""

import math

import pytest
import torch

from core.optim import Muon, clip_and_step, make_optimizers, orthogonalize_on_all_ranks, set_learning_rate
from model import GPT, GPTConfig
from tests.helpers.scripts import on_ranks

SHAPES = (8, 8), (8, 24), (24, 8), (8, 8), (24, 8), (5, 7)
LR, DECAY, MOMENTUM = 0.02, 0.1, 0.9


def random_matrices():
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]


def naive_orthogonalize(matrix):
    """Five Newton-Schulz steps of Keller Jordan's Muon, in bfloat16."""
    x = matrix.bfloat16()
    if matrix.size(0) > matrix.size(1):
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        A = x @ x.T
        B = torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, B, x, beta=3.4445)
    return x.T if matrix.size(0) > matrix.size(1) else x


def naive_step(params, buffers, grads):
    """One step of Muon, in place."""
    for p, buffer, grad in zip(params, buffers, grads, strict=True):
        buffer.mul_(MOMENTUM).add_(grad * (1 - MOMENTUM))
        update = grad * (1 - MOMENTUM) + buffer * MOMENTUM
        update = torch.stack([row / max(row.norm(), 1e-30) for row in update])
        update = naive_orthogonalize(update).float()
        p.mul_(1 - LR * DECAY)
        p.sub_(update * LR * max(1, p.size(0) / p.size(1)) ** 0.5)


def test_muon_steps_equal_the_naive_ones():
    """Starting from the state of torch.optim.Muon, which older checkpoints have."""
    params, expected = [torch.nn.Parameter(w) for w in random_matrices()], random_matrices()
    buffers = [w / 2 for w in random_matrices()]
    older = torch.optim.Muon(params).state_dict()
    older['state'] = {i: {'momentum_buffer': buffer.clone()} for i, buffer in enumerate(buffers)}
    muon = Muon(params, lr=LR, weight_decay=DECAY)
    muon.load_state_dict(older | {'param_groups': muon.state_dict()['param_groups']})
    for step in range(3):
        grads = [torch.randn(w.shape, generator=torch.Generator().manual_seed(99 + step)) for w in expected]
        grads[1][3] = 0  # a neuron that no gradient reaches
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        muon.step()
        naive_step(expected, buffers, grads)
        for p, w in zip(params, expected, strict=True):
            torch.testing.assert_close(p.data, w, rtol=0, atol=2e-4)  # bfloat16 rounds


def test_muon_starts_from_a_momentum_of_zero():
    p, w = torch.nn.Parameter(torch.ones(4, 6)), torch.ones(4, 6)
    p.grad = torch.randn(4, 6)
    muon = Muon([p], lr=LR, weight_decay=DECAY)
    muon.step()
    naive_step([w], [torch.zeros(4, 6)], [p.grad])
    torch.testing.assert_close(p.data, w, rtol=0, atol=2e-4)
    torch.testing.assert_close(muon.state[p]['momentum_buffer'], 0.1 * p.grad)


def test_muon_makes_a_momentum_buffer_once(monkeypatch):
    params = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(3)]
    muon, zeros_like, made = Muon(params, lr=LR, weight_decay=DECAY), torch.zeros_like, []
    monkeypatch.setattr(torch, 'zeros_like', lambda p: made.append(p) or zeros_like(p))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(4, 6)
        muon.step()
    assert len(made) == 3


@pytest.mark.parametrize('ranks', [2, 3])
def test_the_shares_of_all_ranks_make_the_whole(tmp_path, ranks):
    """Also if a rank has no share: five matrices on three ranks, one on two."""
    (tmp_path / 'program.py').write_text(
        'import os, torch, torch.distributed as dist\n'
        'from core.optim import orthogonalize_on_all_ranks\n'
        'dist.init_process_group("gloo")\n'
        'for n in 5, 1:\n'
        '    stack = torch.randn(n, 8, 24, generator=torch.Generator().manual_seed(n))\n'
        '    result = orthogonalize_on_all_ranks(stack)\n'
        f'    torch.save(result, f"{tmp_path}/{{n}}-{{dist.get_rank()}}.pt")\n')
    on_ranks(ranks, program=tmp_path / 'program.py')
    for n in 5, 1:
        stack = torch.randn(n, 8, 24, generator=torch.Generator().manual_seed(n))
        expected = orthogonalize_on_all_ranks(stack)  # here without ranks
        for rank in range(ranks):
            assert torch.equal(torch.load(tmp_path / f'{n}-{rank}.pt'), expected)


@pytest.mark.parametrize('optimizer, learning_rate, peaks', [
    ('muon', 0.0, [0.02, 0.01, 0.01]), ('muon', 0.5, [1.0, 0.5, 0.5]), ('adamw', 0.0, [1e-3, 1e-3])])
@pytest.mark.parametrize('choices', [
    {}, {'norm': 'layer', 'position': 'learned', 'bias': True, 'tie_embeddings': False}])
def test_every_parameter_has_one_optimizer(optimizer, learning_rate, peaks, choices):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, **choices))
    optimizers = make_optimizers(model, optimizer, learning_rate, 0.3, (0.8, 0.7))
    groups = [group for opt in optimizers for group in opt.param_groups]
    held = [(id(p), group['weight_decay']) for group in groups for p in group['params']]
    assert sorted(held) == sorted((id(p), 0.3 if p.dim() == 2 else 0.0) for p in model.parameters())
    in_blocks = [id(p) for p in model.blocks.parameters() if p.dim() == 2]
    assert ([id(p) for p in groups[0]['params']] == in_blocks) == (optimizer == 'muon')
    assert [group['peak_lr'] for group in groups] == peaks
    assert {group['betas'] for group in groups[-2:]} == {(0.8, 0.7)}
    set_learning_rate(optimizers, 0.25)
    assert [group['lr'] for group in groups] == [0.25 * peak for peak in peaks]


class Scaler:
    """A gradient scaler as in float16, but on the CPU."""

    def __new__(cls):
        return torch.amp.GradScaler('cpu', init_scale=1024.0)


@pytest.mark.parametrize('grad_clip, factor', [(0.5, 0.25), (4.0, 1.0), (0, 1.0)])
@pytest.mark.parametrize('scaled', [False, True])
def test_gradients_are_clipped_after_they_are_unscaled(grad_clip, factor, scaled):
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, enabled=scaled)
    model = torch.nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x = torch.tensor([[1.2, 1.6]])  # a gradient of norm 2
    scaler.scale(model(x).sum()).backward()
    grad_norm = clip_and_step(model, [optimizer], scaler, grad_clip)
    assert grad_norm.item() == pytest.approx(2.0)
    torch.testing.assert_close(before - model.weight.detach(), factor * x)
    assert model.weight.grad is None


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('bad', [0, 1])  # which optimizer has the bad gradient
def test_an_overflow_in_one_optimizer_skips_the_step_of_both(value, bad):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    model = torch.nn.ParameterList(params)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in params]
    scaler = Scaler()
    scaler.scale(sum(p.sum() for p in params)).backward()
    params[bad].grad[1] = value
    assert not clip_and_step(model, optimizers, scaler, 1.0).isfinite()
    for p in params:
        assert torch.equal(p, torch.ones(3)) and p.grad is None
    assert scaler.get_scale() == 512.0
    scaler.scale(sum(p.sum() for p in params)).backward()  # the next step is taken
    clip_and_step(model, optimizers, scaler, 1.0)
    assert all((p < 1).all() for p in params) and scaler.get_scale() == 512.0
