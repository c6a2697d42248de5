"""Runs that are stopped or killed, or whose loss is no longer finite: what was saved before is intact."""

import gc
import os
import re
import shlex
import signal
import sys

import pytest

import train
from configurator import UserError
from core.checkpoint import load_checkpoint
from tests.helpers.scripts import metrics
from tests.hostile import kill_1000

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='sends signals to this process')


@pytest.fixture(autouse=True)
def default_signals():
    """Give the signals their default handlers: nohup ignores SIGHUP, and a background job ignores SIGINT."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
                signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(params=[False, True], ids=['checked-at-once', 'checked-later'])
def check_later(request, monkeypatch):
    """Check a step at once, or as on a GPU after the gradients of the next step."""
    monkeypatch.setattr(train, '_ASYNCHRONOUS', ('cpu',) if request.param else ())
    return request.param


def error_of(start, *flags):
    """Start a run that fails; return its error without the traceback, which would keep the folder locked."""
    with pytest.raises((UserError, SystemExit, KeyboardInterrupt)) as raised:
        start(*flags)
    error = raised.value.with_traceback(None)
    del raised
    gc.collect()
    return error


@pytest.mark.parametrize(('function', 'number', 'status'), [
    ('evaluate', signal.SIGINT, 130),
    ('evaluate', signal.SIGTERM, 143),
    ('evaluate', signal.SIGHUP, 129),
    ('sample_story', signal.SIGINT, 130)])
def test_run_saves_on_a_signal_and_resumes_to_the_same_metrics(
        start, tmp_path, monkeypatch, capsys, function, number, status):
    """The signal arrives during the evaluation at step 4."""
    start('--overwrite')
    uninterrupted = metrics(tmp_path / 'out')
    original = getattr(train, function)
    calls = []

    def send_signal(*args, **kwargs):
        calls.append(function)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, function, send_signal)
    assert error_of(start, '--overwrite').code == status
    step = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter']
    assert step in (4, 5)
    err = capsys.readouterr().err
    assert f'stopped at step {step} and saved' in err and 'python train.py --init_from resume' in err
    start('--init_from=resume')
    assert metrics(tmp_path / 'out') == uninterrupted


def test_run_that_gets_a_signal_in_a_step_stops_after_it(start, tmp_path, monkeypatch, capsys, check_later):
    """No update of the next step is made, nor counted, and the resumed run has the same metrics."""
    start('--dropout=0.1')
    uninterrupted = metrics(tmp_path / 'out')
    forward, step, n_gradients, n_updates = train.GPT.forward, train.clip_and_step, [], []

    def counted_forward(self, idx, targets=None, **kwargs):
        if targets is not None:
            n_gradients.append(1)
        return forward(self, idx, targets, **kwargs)

    def send_signal(*args):
        n_updates.append(1)
        if len(n_updates) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train.GPT, 'forward', counted_forward)
        patch.setattr(train, 'clip_and_step', send_signal)
        assert error_of(start, '--dropout=0.1', '--overwrite').code == 130
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] == len(n_updates) == 3
    assert 'stopped at step 3 and saved' in capsys.readouterr().err
    assert len(n_gradients) == (8 if check_later else 6)  # two micro-batches per step
    assert metrics(tmp_path / 'out') == uninterrupted[:4]  # an evaluation, three steps
    start('--init_from=resume')
    assert metrics(tmp_path / 'out') == uninterrupted


def test_old_run_stays_until_the_new_one_begins(start, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    start()
    old_files = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    monkeypatch.setattr(train, 'join_ranks', interrupt)
    assert isinstance(error_of(start, '--overwrite'), KeyboardInterrupt)
    assert {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == old_files


def test_run_resumes_from_its_best_checkpoint(start, tmp_path):
    """The metrics are cut back to the step of that checkpoint."""
    start()
    uninterrupted = metrics(tmp_path / 'out')
    (tmp_path / 'out' / 'ckpt.pt').write_bytes((tmp_path / 'out' / 'best.pt').read_bytes())
    start('--init_from=resume')
    assert metrics(tmp_path / 'out') == uninterrupted


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_infinite_loss_does_not_reach_the_checkpoint(start, tmp_path, monkeypatch, value, check_later):
    forward = train.GPT.forward
    n_losses = 0

    def broken_forward(self, idx, targets=None, **kwargs):
        nonlocal n_losses
        result = forward(self, idx, targets, **kwargs)
        if targets is not None:
            n_losses += 1
        return result * value if n_losses > 10 else result  # from step 5 on, with two micro-batches per step

    monkeypatch.setattr(train.GPT, 'forward', broken_forward)
    message = str(error_of(start))
    assert re.match(r'step 5: the loss is (nan|inf).*best\.pt.* --init_from resume', message)
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter'] == 4
    assert all(weight.isfinite().all() for weight in checkpoint['model'].values())


@pytest.mark.parametrize('flags', [
    ['--learning_rate=1e30', '--eval_interval=1'],
    ['--learning_rate=100', '--eval_interval=5']])
def test_diverged_run_resumes_with_the_command_it_prints(start, tmp_path, flags):
    message = str(error_of(start, '--max_iters=20', '--warmup_iters=0', '--save_interval=1', *flags))
    for path in (tmp_path / 'out').glob('*.pt'):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)['model'].values())
    copy, command = message.split('): cp ')[1].split(' && ')
    best, last = shlex.split(copy)
    (tmp_path / 'out' / 'ckpt.pt').unlink()
    os.link(best, last)
    words = shlex.split(command)
    assert words[:2] == ['python', 'train.py'] and words[-2] == '--learning_rate'
    names, values = words[2::2], words[3::2]
    start(*[f'{name}={value}' for name, value in zip(names, values, strict=True)], '--max_iters=20')
    losses = [line['val_loss'] for line in metrics(tmp_path / 'out') if 'val_loss' in line]
    assert load_checkpoint(last)['iter'] == 20
    assert losses[-1] < losses[0]


def test_folder_that_is_renamed_during_a_run_is_reported(start, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def rename_first(*args, **kwargs):
        (tmp_path / 'out').rename(tmp_path / 'elsewhere')
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train, 'evaluate', rename_first)
    message = str(error_of(start, '--eval_interval=9'))
    assert re.match(r'cannot write .*: the folder was removed or renamed', message)


@pytest.mark.skipif(sys.platform != 'linux', reason='forks its runs')
def test_killed_runs_lose_no_checkpoint(monkeypatch, capsys):
    """With dropout, gradient accumulation and loss scaling in float16, over the end of an epoch."""
    monkeypatch.setattr(kill_1000, 'kills', 4)
    monkeypatch.setattr(kill_1000, 'dtype', 'float16')
    kill_1000.main()
    assert capsys.readouterr().out.startswith('4 kills')
