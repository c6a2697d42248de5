"""Muon against a naive one, a matrix at a time, that orthogonalises with torch's function."""

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from core.optim import NEWTON_SCHULZ, Muon, in_shares
from tests.helpers.scripts import on_ranks

SHAPES = (8, 8), (8, 24), (24, 8), (8, 8), (24, 8), (5, 7)
RATE, DECAY, MOMENTUM = 0.02, 0.1, 0.9


def matrices():
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]


def naive(params, buffers, grads):
    """One step, in place."""
    for p, buffer, grad in zip(params, buffers, grads, strict=True):
        buffer.mul_(MOMENTUM).add_(grad * (1 - MOMENTUM))
        update = grad * (1 - MOMENTUM) + buffer * MOMENTUM
        update = torch.stack([row / max(row.norm(), 1e-30) for row in update])
        update = _zeropower_via_newtonschulz(update, NEWTON_SCHULZ, 5, 1e-7)
        p.mul_(1 - RATE * DECAY).sub_(update * RATE * max(1, p.size(0) / p.size(1)) ** 0.5)


def test_steps_are_those_of_the_naive_one_also_from_the_state_of_torchs_own():
    params, expected = [torch.nn.Parameter(w) for w in matrices()], matrices()
    buffers = [w / 2 for w in matrices()]
    older = torch.optim.Muon(params).state_dict()
    older['state'] = {i: {'momentum_buffer': buffer.clone()} for i, buffer in enumerate(buffers)}
    opt = Muon(params, lr=RATE, weight_decay=DECAY)
    opt.load_state_dict(older | {'param_groups': opt.state_dict()['param_groups']})
    for step in range(3):
        grads = [torch.randn(w.shape, generator=torch.Generator().manual_seed(99 + step)) for w in expected]
        grads[1][3] = 0  # as of a neuron that nothing reaches
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        opt.step()
        naive(expected, buffers, grads)
        for p, ours in zip(params, expected, strict=True):
            torch.testing.assert_close(p.data, ours, rtol=0, atol=2e-4)  # bfloat16


@pytest.mark.parametrize('ranks', [2, 3])
def test_the_shares_of_ranks_make_the_whole(tmp_path, ranks):
    """Also where a rank has none: five matrices on three, one on two."""
    (tmp_path / 'program.py').write_text(
        'import os, torch, torch.distributed as dist\n'
        'from muon import in_shares\n'
        'dist.init_process_group("gloo")\n'
        'for n in 5, 1:\n'
        '    stack = torch.randn(n, 8, 24, generator=torch.Generator().manual_seed(n))\n'
        f'    torch.save(in_shares(stack), f"{tmp_path}/{{n}}-{{dist.get_rank()}}.pt")\n')
    on_ranks(ranks, program=tmp_path / 'program.py')
    for n in 5, 1:
        whole = in_shares(torch.randn(n, 8, 24, generator=torch.Generator().manual_seed(n)))
        for rank in range(ranks):
            assert torch.equal(torch.load(tmp_path / f'{n}-{rank}.pt'), whole)
