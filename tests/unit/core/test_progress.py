"""What a run shows and keeps of its way."""

import io
import json
import os
import sys
import types

import matplotlib.figure
import numpy as np
import pytest
import torch

from configurator import UserError
from core.checkpoint import RunFolder
from core.progress import Progress, hardware, run_facts, smoothed

SETTINGS = {'log_interval': 2, 'track': '', 'seed': 5}
ROW = {'loss': 2.0, 'lr': 0.01, 'grad_norm': 1.0}


@pytest.fixture
def begin(tmp_path):
    """begin(it, **settings): the Progress of a run of 10 steps of 64 tokens that begins there or goes on."""
    def make(it=0, **settings):
        folder = RunFolder(tmp_path / 'out', resume=it > 0, overwrite=it == 0)
        folder.begin({'iter': it})
        return Progress(folder, it, 10, 64, 6400.0, 'a machine', SETTINGS | settings)
    return make


def records(tmp_path, name='metrics.jsonl'):
    return [*map(json.loads, (tmp_path / 'out' / name).read_text().splitlines())]


def test_lines_have_the_speed_since_the_last_and_the_time_left(begin, tmp_path, capsys):
    progress = begin()
    for it, seconds in enumerate((0.5, 0.75, 1.0)):
        progress.step(it, seconds, it, **ROW)
    progress.keep(3, 1.5, val_part_loss=2.5)
    assert capsys.readouterr().out.splitlines() == [
        'step 0/10: loss 2.0000, lr 1.00e-02, grad norm 1.00, 128 tokens/s, 00:04 left, MFU 2.0%',
        'step 2/10: loss 2.0000, lr 1.00e-02, grad norm 1.00, 256 tokens/s, 00:02 left, MFU 4.0%, '
        '2 steps skipped']
    assert records(tmp_path) == [
        {'iter': 0, **ROW, 'tokens_per_s': 128.0, 'seconds': 0.5},
        {'iter': 2, **ROW, 'tokens_per_s': 256.0, 'seconds': 1.0},
        {'iter': 3, 'val_part_loss': 2.5, 'seconds': 1.5}]
    progress = begin(it=3)  # killed there: seconds go on, and so does its speed, from this start
    progress.step(4, 0.5, 0, **ROW)
    assert [line['seconds'] for line in records(tmp_path)] == [0.5, 1.0, 1.5]
    assert records(tmp_path)[-1]['tokens_per_s'] == 2 * 64 / 0.5


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_one_line_renews_itself(begin, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', terminal := Terminal())
    monkeypatch.setattr(Progress, 'plot', lambda _: None)
    progress = begin()
    progress.bar.mininterval = 0
    for it in range(4):
        progress.step(it, (it + 1) / 2, 0, **ROW)
    progress.evaluated(4, 2.0, {'val_loss': 1.5}, 'Once', 'Once upon\na time.')
    progress.close()
    drawn = terminal.getvalue().split('\r')
    assert any(text.startswith('4/10 ') and text.rstrip().endswith(
        'loss 2.0000, 128 tokens/s, 00:03 left, MFU 2.0%') for text in drawn)
    assert 'step 2/10' not in terminal.getvalue()  # no plain line
    assert 'step 4: val_loss 1.5000\n' in drawn and '    Once upon\n    a time.\n' in drawn
    assert not drawn[-1].strip() and not drawn[-2].strip()  # it has gone


def test_each_evaluation_adds_a_story(begin, tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, 'plot', lambda _: None)
    progress = begin()
    for it in 0, 4, 8:
        progress.evaluated(it, it / 2, {'val_loss': 1.0}, 'Once', f'Once {it}')
    begin(it=8)  # killed before it had saved its last one
    assert records(tmp_path, 'samples.jsonl') == [
        {'iter': it, 'prompt': 'Once', 'story': f'Once {it}'} for it in (0, 4)]


def test_the_picture_has_the_figures(begin, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', lambda figure, path: drawn.append(figure))
    progress = begin()
    for it in range(0, 10, 2):
        progress.step(it, it + 1.0, 0, **ROW | {'loss': 6.0 - it / 2})
        progress.keep(it, it + 1.0, val_part_loss=7.0 - it / 2)
    progress.evaluated(10, 11.0, {'val_loss': 1.5, 'val_acc': 0.5}, '', '')
    losses, rates, accuracy = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in losses.lines}
    assert lines['validation'] == [[10, 1.5]]
    assert lines['validation, a part'] == [[it, 7.0 - it / 2] for it in range(0, 10, 2)]
    raw = [[it, 6.0 - it / 2] for it in range(0, 10, 2)]
    assert losses.lines[0].get_xydata().tolist() == raw and losses.lines[0].get_alpha() < 0.5
    assert lines['training, smoothed'] == [[x, y] for (x, _), y in zip(raw, smoothed([r[1] for r in raw]),
                                                                        strict=True)]
    assert losses.get_yscale() == 'log' and len(losses.get_yticks()) == 6
    to_tokens, to_steps = losses.child_axes[0]._functions
    assert (to_tokens(10), to_steps(64e-5)) == (pytest.approx(64e-5), pytest.approx(10))
    assert rates.lines[0].get_ydata().tolist() == [0.01] * 5 and accuracy.lines[0].get_ydata() == [0.5]


def test_without_matplotlib_there_is_no_picture_and_one_line(begin, tmp_path, monkeypatch, capsys):
    for name in 'matplotlib', 'matplotlib.figure':
        monkeypatch.setitem(sys.modules, name, None)
    progress = begin()
    progress.plot()
    progress.plot()
    said = capsys.readouterr().out
    assert said.startswith('no loss.png is drawn (') and said.endswith('): pip install matplotlib\n')
    assert said.count('\n') == 1 and 'loss.png' not in os.listdir(tmp_path / 'out')


def test_smoothing_is_a_mean_that_forgets():
    values = np.random.default_rng(0).normal(size=90)
    keep = 1 - 1 / (1 + 90 / 100)
    weights = keep ** np.arange(90)[::-1]
    assert smoothed(values)[-1] == pytest.approx((weights * values).sum() / weights.sum())
    np.testing.assert_allclose(smoothed(np.full(7, 3.0)), 3.0)
    assert len(smoothed([])) == 0


class Tracker(types.ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_tracker_hears_the_same(begin, tmp_path, monkeypatch, name):
    """And of a run that goes on by the same name, which is another for another run."""
    monkeypatch.setattr(Progress, 'plot', lambda _: None)
    monkeypatch.setitem(sys.modules, name, tracker := Tracker(name))
    monkeypatch.setattr('core.progress.time.strftime', lambda _: 'now')
    monkeypatch.delenv('WANDB_RUN_ID', raising=False)
    progress = begin(track=name)
    assert os.environ['WANDB_RUN_ID'] == 'out-now'
    progress.step(0, 0.5, 0, **ROW)
    progress.evaluated(2, 1.0, {'val_loss': 1.5}, 'Once', 'Once upon')
    progress.close()
    logged = {step: {} for _, _, kwargs in tracker.calls if (step := kwargs.get('step')) is not None}
    for what, args, kwargs in tracker.calls:
        if what == 'log':
            logged[kwargs['step']] |= args[0]
    lines = {record.pop('iter'): record for record in records(tmp_path)}
    lines[2]['story'] = 'Once upon'
    assert logged == lines
    (first, _, begun), (last, _, _) = tracker.calls[0], tracker.calls[-1]
    assert (first, last) == ('init', 'finish')
    assert begun['name'] == 'out-now' and begun['resume'] == 'allow' and begun['config']['seed'] == 5
    monkeypatch.setattr('core.progress.time.strftime', lambda _: 'later')
    for it, expected in (2, 'out-now'), (0, 'out-later'):
        begin(it, track=name)
        assert tracker.calls[-1][2]['name'] == expected
    assert run_facts(tmp_path / 'out') == {'name': 'out-later', 'hardware': 'a machine'}


def test_a_tracker_that_fails_is_one_line(begin, monkeypatch):
    tracker = types.SimpleNamespace(init=lambda **_: exec('raise ValueError("no key")'))
    monkeypatch.setitem(sys.modules, 'wandb', tracker)
    with pytest.raises(UserError, match='wandb does not begin: no key'):
        begin(track='wandb')


def test_the_hardware_is_named():
    text = hardware(torch.device('cpu'), torch.bfloat16, 2)
    assert text.startswith('2 x cpu (') and f'threads: {torch.get_num_threads()}) in bfloat16, torch' in text
