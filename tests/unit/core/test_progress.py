"""What a run shows and records."""

import io
import json
import os
import sys
import types
from types import SimpleNamespace

import matplotlib.figure
import numpy as np
import pytest
import torch

from configurator import SettingError, UserError
from core import progress
from core.checkpoint import RunFolder
from core.distributed import Ranks
from core.progress import (
    Curves,
    NoProgress,
    Progress,
    check_tracker,
    make_progress,
    plot_metrics,
    read_run_facts,
    smooth,
)
from data.tokenizer import CharTokenizer
from tests.helpers.models import small_model

FACTS = {'name': 'out-now-1f', 'hardware': 'a machine', 'log_interval': 2, 'track': '', 'seed': 5}
FIGURES = {'loss': 2.0, 'lr': 0.01, 'grad_norm': 1.0}


@pytest.fixture
def begin(tmp_path):
    """begin(step, **settings) starts or resumes a run of 10 steps of 64 tokens and returns its Progress."""
    def make(step=0, **settings):
        folder = RunFolder(tmp_path / 'out', resume=step > 0, overwrite=step == 0)
        folder.begin({'iter': step}, CharTokenizer.train(['a']))
        folder.lock.lock.release()  # the next one is of this process, too
        return Progress(folder, step, 10, 64, 6400.0, FACTS | settings)
    return make


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr(Progress, 'draw', lambda _: None)


def read_lines(tmp_path, name='metrics.jsonl'):
    return [json.loads(line) for line in (tmp_path / 'out' / name).read_text().splitlines()]


def test_log_lines_have_the_speed_since_the_last_line_and_the_time_left(begin, tmp_path, capsys):
    progress = begin()
    progress.log_step(0, 0.5, **FIGURES)
    progress.log_step(1, 0.25, **FIGURES | {'grad_norm': float('inf')})
    progress.log_step(2, 0.25, **FIGURES | {'grad_norm': float('nan')})
    assert capsys.readouterr().out.splitlines() == [
        'step 0/10: loss 2.0000, lr 1.00e-02, grad norm 1.00, 128 tokens/s, 00:04 left, MFU 2.0%',
        'step 2/10: loss 2.0000, lr 1.00e-02, grad norm nan, 256 tokens/s, 00:02 left, MFU 4.0%, '
        '2 steps skipped']
    assert read_lines(tmp_path) == [
        {'iter': 0, **FIGURES, 'tokens_per_s': 128.0, 'seconds': 0.5},
        {'iter': 2, 'loss': 2.0, 'lr': 0.01, 'tokens_per_s': 256.0, 'seconds': 1.0}]  # JSON has no nan


def test_a_resumed_run_continues_its_seconds_and_measures_its_own_speed(begin, tmp_path, capsys):
    progress = begin()
    for step in range(3):
        progress.log_step(step, 0.5, **FIGURES)
    progress = begin(step=3)
    progress.log_step(3, 0.25, **FIGURES)
    progress.log_step(4, 0.25, **FIGURES)
    assert [line['seconds'] for line in read_lines(tmp_path)] == [0.5, 1.5, 2.0]
    assert read_lines(tmp_path)[-1]['tokens_per_s'] == 2 * 64 / 0.5
    assert '00:01 left' in capsys.readouterr().out.splitlines()[-1]  # 5 steps of 0.25 s


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_instead_of_log_lines(begin, monkeypatch, no_picture):
    monkeypatch.setattr(sys, 'stdout', terminal := Terminal())
    progress = begin()
    progress.bar.mininterval = 0
    for step in range(4):
        progress.log_step(step, 0.5, **FIGURES)
    progress.log_evaluation(4, {'val_loss': 1.5}, 'Once', 'Once upon\na time.')
    progress.close()
    drawn = terminal.getvalue().split('\r')
    assert any(text.startswith('4/10 ') and text.rstrip().endswith(
        'loss 2.0000, 128 tokens/s, 00:03 left, MFU 2.0%') for text in drawn)
    assert 'step 2/10' not in terminal.getvalue()
    assert 'step 4: val_loss 1.5000\n' in drawn and '    Once upon\n    a time.\n' in drawn
    assert not drawn[-1].strip() and not drawn[-2].strip()  # the bar is removed


def test_control_characters_of_a_story_do_not_reach_the_terminal(begin, capsys, no_picture):
    begin().log_evaluation(0, {'val_loss': 1.0}, '', 'Once\x1b[2J')
    assert '\x1b' not in capsys.readouterr().out


def test_each_evaluation_adds_a_story(begin, tmp_path, no_picture):
    progress = begin()
    for step in 0, 4, 8:
        progress.log_evaluation(step, {'val_loss': 1.0}, 'Once', f'Once {step}')
    begin(step=8)  # killed before it saved the last one
    assert read_lines(tmp_path, 'samples.jsonl') == [
        {'iter': step, 'prompt': 'Once', 'story': f'Once {step}'} for step in (0, 4)]


def test_no_progress_takes_the_same_calls(capsys):
    progress = NoProgress()
    progress.log_step(0, 0.5, **FIGURES)
    progress.log_evaluation(0, {}, '', '')
    progress.close()
    assert capsys.readouterr() == ('', '')


# loss.png


def test_the_picture_shows_the_metrics():
    records = [{'iter': step, **FIGURES, 'loss': 6.0 - step / 2} for step in range(0, 10, 2)]
    records += [{'iter': step, 'val_loss': 7.0 - step / 2, 'val_acc': 0.5} for step in (0, 10)]
    curves = Curves()
    for record in records:
        curves.add(record)
    figure = matplotlib.figure.Figure()
    plot_metrics(figure, curves, tokens_per_step=64)
    figure.savefig(io.BytesIO())  # lays out the axes
    losses, rates, accuracy = figure.axes
    raw, smoothed, validation = [line.get_xydata().tolist() for line in losses.lines]
    assert raw == [[step, 6.0 - step / 2] for step in range(0, 10, 2)]
    assert smoothed == [[x, y] for (x, _), y in zip(raw, smooth([y for _, y in raw]), strict=True)]
    assert validation == [[0, 7.0], [10, 2.0]]
    assert losses.lines[0].get_alpha() < 0.5
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ['training, smoothed', 'validation']
    assert losses.get_yscale() == 'log' and len(losses.get_yticks()) == 6
    million_tokens = losses.child_axes[0].get_xlim()
    assert million_tokens == pytest.approx([64e-6 * step for step in losses.get_xlim()])
    assert rates.lines[0].get_ydata().tolist() == [0.01] * 5
    assert accuracy.lines[0].get_xydata().tolist() == [[0, 0.5], [10, 0.5]]


def test_long_curves_are_thinned_to_means(monkeypatch):
    curves = Curves()
    for step in range(25):
        curves.add({'iter': step, 'loss': 2.0 * step, 'lr': 1.0})
    monkeypatch.setattr(progress, 'MOST_POINTS', 10)
    steps, values = curves.thinned('loss')  # groups of 3
    assert steps.tolist() == [1, 4, 7, 10, 13, 16, 19, 22, 24]
    assert values.tolist() == [2.0 * step for step in steps]
    monkeypatch.setattr(progress, 'MOST_POINTS', 25)
    steps, values = curves.thinned('loss')
    assert steps.tolist() == list(range(25)) and values.tolist() == [2.0 * step for step in range(25)]
    assert [len(part) for part in curves.thinned('val_loss')] == [0, 0]


def test_the_picture_of_a_resumed_run_shows_what_was_before(begin, monkeypatch):
    begin().log_step(0, 0.5, **FIGURES)
    progress = begin(step=2)
    progress.log_step(2, 0.5, **FIGURES)
    assert progress.curves.thinned('loss')[0].tolist() == [0, 2]


def test_an_evaluation_draws_loss_png(begin, tmp_path):
    progress = begin()
    progress.log_step(0, 0.5, **FIGURES)
    progress.log_evaluation(1, {'val_loss': 1.5, 'val_acc': 0.5}, '', '')
    assert (tmp_path / 'out' / 'loss.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.filterwarnings('error')
def test_numbers_too_large_for_an_axis_are_drawn_without_a_warning(begin, tmp_path, capsys):
    progress = begin()
    for step in 1, 2:
        progress.curves.add({'iter': step, 'val_loss': 1e304 * step, 'loss': 1.0})
    progress.draw()
    assert capsys.readouterr().out == ''
    assert (tmp_path / 'out' / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_without_matplotlib_one_line_says_so(begin, tmp_path, monkeypatch, capsys):
    for name in 'matplotlib', 'matplotlib.figure':
        monkeypatch.setitem(sys.modules, name, None)
    progress = begin()
    progress.draw()
    progress.draw()
    out = capsys.readouterr().out
    assert out.startswith('loss.png was not drawn (') and out.endswith('): pip install matplotlib\n')
    assert out.count('\n') == 1 and 'loss.png' not in os.listdir(tmp_path / 'out')


@pytest.mark.parametrize('error', [
    MemoryError('no room'), ImportError('no room'), OverflowError('no room'), OSError(28, 'no room')])
def test_a_picture_that_cannot_be_drawn_is_one_line_and_training_goes_on(begin, monkeypatch, capsys, error):
    def savefig(*_):
        raise error

    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', savefig)
    progress = begin()
    progress.draw()
    progress.draw()
    out = capsys.readouterr().out
    assert out.startswith('loss.png was not drawn (') and out.endswith('no room)\n')
    assert out.count('\n') == 1


def test_a_bug_in_drawing_is_not_hidden(begin, monkeypatch):
    progress = begin()
    progress.curves = None
    with pytest.raises(AttributeError):
        progress.draw()


def test_smooth_is_an_exponential_mean():
    values = np.random.default_rng(0).normal(size=90)
    keep = 1 - 1 / (1 + 90 / 100)
    weights = keep ** np.arange(90)[::-1]
    assert smooth(values)[-1] == pytest.approx((weights * values).sum() / weights.sum())
    np.testing.assert_allclose(smooth(np.full(7, 3.0)), 3.0)
    assert len(smooth([])) == 0


# trackers


class Tracker(types.ModuleType):
    """Stands in for wandb or trackio and records what it is called with."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_a_tracker_gets_the_same_figures(begin, tmp_path, monkeypatch, no_picture, name):
    monkeypatch.setitem(sys.modules, name, tracker := Tracker(name))
    monkeypatch.delenv('WANDB_RUN_ID', raising=False)
    progress = begin(track=name)
    assert os.environ['WANDB_RUN_ID'] == 'out-now-1f'
    progress.log_step(0, 0.5, **FIGURES)
    progress.log_evaluation(2, {'val_loss': 1.5}, 'Once', 'Once upon')
    progress.close()
    logged = {}
    for call, args, kwargs in tracker.calls:
        if call == 'log':
            logged.setdefault(kwargs['step'], {}).update(args[0])
    lines = {line.pop('iter'): line for line in read_lines(tmp_path)}
    lines[2]['story'] = 'Once upon'
    assert logged == lines
    (first, _, given), (last, _, _) = tracker.calls[0], tracker.calls[-1]
    assert (first, last) == ('init', 'finish')
    assert given['name'] == 'out-now-1f' and given['resume'] == 'allow' and given['config']['seed'] == 5


def test_a_run_of_an_old_checkpoint_has_the_name_in_run_json(begin, tmp_path, monkeypatch):
    """If that is damaged, it gets a new one."""
    made = []
    monkeypatch.setattr('core.progress.Progress', lambda *args: made.append(args[-1]['name']))
    folder = RunFolder(tmp_path / 'out', resume=True)
    run = SimpleNamespace(name='', folder=folder, step=0, settings={}, model=small_model())
    begin()
    assert read_run_facts(folder.path) == {'name': 'out-now-1f', 'hardware': 'a machine'}
    for text in None, '{}', '', '[1]', '[' * 9**5, '{"name": 1}':
        if text is not None:
            (folder.path / 'run.json').write_text(text)
        make_progress(run, 1, 1, torch.device('cpu'), torch.float32, Ranks())
    assert made[0] == 'out-now-1f' and len(set(made)) == 6
    assert read_run_facts(tmp_path) == {}


def test_a_tracker_that_fails_is_one_line(begin, monkeypatch):
    def init(**_):
        raise ValueError('no key')

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match='wandb could not start a run: no key'):
        begin(track='wandb')


def test_check_tracker_refuses_unknown_and_missing_packages(monkeypatch):
    with pytest.raises(SettingError, match='wandb, trackio'):
        check_tracker('tensorboard')
    monkeypatch.setitem(sys.modules, 'trackio', None)
    with pytest.raises(ModuleNotFoundError):
        check_tracker('trackio')
    check_tracker('')
