"""Runs that are stopped, killed, or have no room left: nothing is lost. kill_100.py kills more often."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from checkpoint import load_checkpoint, save_checkpoint
from configurator import UserError
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('name, number, status', [
    ('evaluate', signal.SIGINT, 130),
    ('evaluate', signal.SIGTERM, 143),
    ('sample_story', signal.SIGINT, 130),
])
def test_asked_to_stop_between_steps(start, tmp_path, monkeypatch, capsys, name, number, status):
    """The signal comes in the evaluation at step 4; what goes on from there is the unbroken run."""
    start('--overwrite')
    whole = tiny.metrics(tmp_path / 'out')
    asked, calls = getattr(train, name), []

    def signalled(*args):
        calls.append(name)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return asked(*args)

    monkeypatch.setattr(train, name, signalled)
    with pytest.raises(SystemExit) as exit:
        start('--overwrite')
    assert exit.value.code == status
    at = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter']
    assert at in (4, 5)
    said = f'stopped at step {at} and saved; go on with: python train.py --init_from resume'
    assert said in capsys.readouterr().err
    start('--init_from=resume')
    assert tiny.metrics(tmp_path / 'out') == whole


def test_a_second_ctrl_c_stops_at_once():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        caught = train.watch_signals()
        os.kill(os.getpid(), signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_an_old_run_stays_until_the_new_one_is_there(start, tmp_path, monkeypatch):
    start()
    files = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    for name in 'compiled', 'save_checkpoint':
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, name, interrupted)
            start('--overwrite')
        assert {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == files
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'evaluate', interrupted)
        start('--overwrite')
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] == 0


def test_what_a_killed_save_left_is_removed(start, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'best.pt.tmp').write_bytes(b'half')
    start()
    assert sorted(os.listdir(tmp_path / 'out')) == ['best.pt', 'ckpt.pt', 'loss.png', 'metrics.jsonl']


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    state = {'model': {'w': torch.zeros(100_000)}, 'config': {}, 'tokenizer': {}, 'settings': {}, 'iter': 1}
    save_checkpoint(tmp_path / 'ckpt.pt', state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in 1000, 200_000:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(UserError, match=r'cannot save .*ckpt.pt \(File too large\).*make room'):
                save_checkpoint(tmp_path / 'ckpt.pt', state | {'iter': 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ['ckpt.pt'] and load_checkpoint(tmp_path / 'ckpt.pt')['iter'] == 1


def test_the_best_checkpoint_can_be_gone_on_from(start, tmp_path):
    """Its metrics are cut back to its step."""
    start()
    whole = tiny.metrics(tmp_path / 'out')
    (tmp_path / 'out' / 'ckpt.pt').write_bytes((tmp_path / 'out' / 'best.pt').read_bytes())
    start('--init_from=resume')
    assert tiny.metrics(tmp_path / 'out') == whole


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_does_not_reach_the_weights(start, tmp_path, monkeypatch, value):
    forward = train.GPT.forward

    def broken(self, idx, targets=None, cache=None):
        out = forward(self, idx, targets, cache)
        calls.append(targets is not None)
        return out * value if sum(calls) > 10 and targets is not None else out  # from step 5 on

    calls = []
    monkeypatch.setattr(train.GPT, 'forward', broken)
    with pytest.raises(UserError, match=r'step 5: the loss is (nan|inf).*--init_from resume'):
        start()
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter'] == 4 and all(w.isfinite().all() for w in checkpoint['model'].values())


def test_killed_at_random_moments():
    """With dropout, accumulation and float16's loss scaling, over the end of an epoch."""
    words = ['tests/kill_100.py', '--kills', '3', '--dtype', 'float16']
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0 and done.stdout.startswith('3 kills'), done.stderr
