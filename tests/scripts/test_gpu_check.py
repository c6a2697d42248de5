"""gpu_check.py on a CPU: every part runs, and a part that finds something wrong says so."""

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch

from configurator import SettingError, UserError
from tests.helpers.scripts import script
from tools import gpu_check


@pytest.fixture
def check(monkeypatch):
    """check(part) checks that part with tiny models on the CPU."""
    def run(part):
        monkeypatch.setattr(gpu_check, '_failed', [])
        for name, value in {'what': part, 'tiny': True, 'device': 'cpu'}.items():
            monkeypatch.setattr(gpu_check, name, value)
        gpu_check.main()

    return run


def test_numbers_and_writing_are_checked_as_a_user_types_it():
    out = script('tools/gpu_check.py', '--tiny', '--device=cpu', '--what=numbers,writing').out
    assert len(re.findall(r'numbers, .*, (?:float32|half): loss .*, gradients .*, logits', out)) == 10
    assert len(re.findall(r'writing \d+ at once, .* tokens are equal', out)) == 2
    assert out.endswith('all parts have run\n')


@pytest.mark.parametrize('factor', [1.01, float('nan')])
def test_wrong_numbers_are_found(check, monkeypatch, capsys, factor):
    def make_wrong(model):
        with torch.no_grad():
            model.blocks[0].attn.q.weight.mul_(factor)

    monkeypatch.setattr(gpu_check, 'use_fast_kernels', make_wrong)
    monkeypatch.setattr(gpu_check, '_NUMBERS_CHOICES', [{}])
    with pytest.raises(UserError, match=r'failed: numbers, the default, float32 \(more than 1e-05\)'):
        check('numbers')


def test_compilation_must_not_happen_again(check, monkeypatch, capsys):
    graphs = {'unique_graphs': 0}
    monkeypatch.setattr(torch, 'compile', lambda function, **_: function)
    monkeypatch.setitem(torch._dynamo.utils.counters, 'stats', graphs)
    check('compilation')
    out = capsys.readouterr().out
    assert 'moves the loss by 0.0e+00, gradients by 0.0e+00' in out and 'not compiled again' in out

    def count(function, **_):
        if isinstance(function, torch.nn.Module):
            return function

        def compiled(*arguments):
            graphs['unique_graphs'] += 1
            return function(*arguments)
        return compiled

    monkeypatch.setattr(torch, 'compile', count)
    with pytest.raises(UserError, match='failed: compilation'):
        check('compilation')
    assert 'fewer rows were compiled again: 3 graphs' in capsys.readouterr().out


def test_speed_is_measured_compiled_and_not(check, monkeypatch, capsys):
    monkeypatch.setattr(torch, 'compile', lambda function: function)
    check('speed')
    out = capsys.readouterr().out
    for how in 'compiled', 'not compiled':
        assert re.search(rf'speed, tiny, {how}: [\d,]+ tokens/s, .*, micro-batch [\d.]+ ms, update', out)


def test_runs_are_compared(check, monkeypatch, data, capsys):
    """The scripts are forked, which starts faster."""
    def fork(command, **_):
        _, *words = command
        done = script(*words)
        return SimpleNamespace(returncode=0, stdout=done.out + done.err)

    monkeypatch.setattr(subprocess, 'run', fork)
    monkeypatch.setattr(gpu_check, 'dataset', str(data))
    check('runs')
    out = capsys.readouterr().out
    losses = re.findall(r'runs, (?:whole|resumed): loss (\S+) in step 19', out)
    assert len(losses) == 2 and losses[0] == losses[1]
    assert 'the weights differ by 0.0e+00' in out and 'runs, sample: exit status 0' in out


def test_a_part_that_fails_leaves_the_others_running(check, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, 'measure_writing', lambda *_: 1 / 0)
    with pytest.raises(UserError, match='failed: writing 1 at once, not compiled; writing 32 at once, not'):
        check('writing')
    assert capsys.readouterr().out.count('ZeroDivisionError: division by zero') == 2


def test_unknown_parts_are_refused(check):
    with pytest.raises(SettingError, match="what has 'sped'; its parts are numbers, compilation, speed"):
        check('numbers,sped')
