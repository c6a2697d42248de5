"""Runs that are stopped or killed, and losses that are not finite: nothing is lost."""

import os
import shlex
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, getsignal, signal

import pytest
import torch

import train
from configurator import UserError
from core.checkpoint import load_checkpoint
from core.distributed import watch_signals
from tests.helpers.scripts import metrics
from tests.hostile import kill_1000


@pytest.mark.parametrize('name, number, status', [
    ('evaluate', SIGINT, 130), ('evaluate', SIGTERM, 143), ('evaluate', SIGHUP, 129),
    ('sample_story', SIGINT, 130)])
def test_asked_to_stop_between_steps(start, tmp_path, monkeypatch, capsys, name, number, status):
    """The signal comes in the evaluation at step 4; what goes on from there is the unbroken run."""
    start('--overwrite')
    whole = metrics(tmp_path / 'out')
    asked, calls = getattr(train, name), []

    def signalled(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return asked(*args, **kwargs)

    monkeypatch.setattr(train, name, signalled)
    with pytest.raises(SystemExit) as exit:
        start('--overwrite')
    assert exit.value.code == status
    at = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter']
    said = f'stopped at step {at} and saved; go on with: python train.py --init_from resume'
    assert at in (4, 5) and said in capsys.readouterr().err
    start('--init_from=resume')
    assert metrics(tmp_path / 'out') == whole


def test_a_second_ctrl_c_stops_at_once(start):  # the fixture puts the handlers back
    caught = watch_signals()
    os.kill(os.getpid(), SIGINT)
    assert caught == [SIGINT]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), SIGINT)


def test_what_nohup_has_ignored_stays_ignored(start):
    signal(SIGHUP, SIG_IGN)
    watch_signals()
    assert getsignal(SIGHUP) == SIG_IGN


def test_an_old_run_stays_until_the_new_one_is_there(start, tmp_path, monkeypatch):
    start()
    files = {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()}
    monkeypatch.setattr(train, 'compiled', lambda *_: exec('raise KeyboardInterrupt'))
    with pytest.raises(KeyboardInterrupt):
        start('--overwrite')
    assert {path: path.read_bytes() for path in (tmp_path / 'out').iterdir()} == files


def test_the_best_checkpoint_can_be_gone_on_from(start, tmp_path):
    """Its metrics are cut back to its step."""
    start()
    whole = metrics(tmp_path / 'out')
    (tmp_path / 'out' / 'ckpt.pt').write_bytes((tmp_path / 'out' / 'best.pt').read_bytes())
    start('--init_from=resume')
    assert metrics(tmp_path / 'out') == whole


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_does_not_reach_the_weights(start, tmp_path, monkeypatch, value):
    calls, forward = [], train.GPT.forward

    def broken(self, idx, targets=None, cache=None):
        calls.append(targets is not None)
        return forward(self, idx, targets, cache) * (value if sum(calls) > 10 and targets is not None else 1)

    monkeypatch.setattr(train.GPT, 'forward', broken)  # from step 5 on
    with pytest.raises(UserError, match=r'step 5: the loss is (nan|inf).*best.pt is good.* --init_from'):
        start()
    checkpoint = load_checkpoint(tmp_path / 'out' / 'ckpt.pt')
    assert checkpoint['iter'] == 4 and all(w.isfinite().all() for w in checkpoint['model'].values())


@pytest.mark.parametrize('flags', [
    ('--learning_rate=1e30', '--eval_interval=1'), ('--learning_rate=100', '--eval_interval=5')])
def test_a_run_that_diverged_goes_on_as_it_says(start, tmp_path, flags):
    """Typed as printed; what is saved is finite at any time."""
    flags = '--max_iters=20', '--warmup_iters=0', '--save_interval=1', *flags
    with pytest.raises(UserError, match=r'best\.pt is good') as told:
        start(*flags)
    for path in (tmp_path / 'out').glob('*.pt'):
        assert all(weight.isfinite().all() for weight in load_checkpoint(path)['model'].values())
    copy, command = str(told.value).split('): cp ')[1].split(' && ')
    good, last = shlex.split(copy)
    (tmp_path / 'out' / 'ckpt.pt').unlink()
    os.link(good, last)
    words = shlex.split(command)
    assert words[:2] == ['python', 'train.py'] and words[-2] == '--learning_rate'
    start(*(f'{key}={value}' for key, value in zip(words[2::2], words[3::2], strict=True)), '--max_iters=20')
    losses = [line['val_loss'] for line in metrics(tmp_path / 'out') if 'val_loss' in line]
    assert load_checkpoint(last)['iter'] == 20 and losses[-1] < losses[0]


@pytest.mark.parametrize('harm', [
    {'momentum_buffer': torch.zeros(3, 3)}, {'momentum_buffer': 'x'}, 7], ids=str)
def test_a_state_that_is_not_that_of_its_weight_is_refused(start, tmp_path, harm):
    start()
    path = tmp_path / 'out' / 'ckpt.pt'
    checkpoint = load_checkpoint(path)
    checkpoint['optimizers'][0]['state'][0] = harm
    path.unlink()  # its tensors are mapped
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r'ckpt\.pt is damaged or not what it should be'):
        start('--init_from=resume')


def test_killed_at_random_moments(monkeypatch, capsys):
    """With dropout, accumulation and float16's loss scaling, over the end of an epoch."""
    monkeypatch.setattr(kill_1000, 'kills', 100)
    monkeypatch.setattr(kill_1000, 'dtype', 'float16')
    kill_1000.main()
    assert capsys.readouterr().out.startswith('100 kills')


def test_a_folder_that_goes_away_is_told(start, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def gone(*args, **kwargs):
        (tmp_path / 'out').rename(tmp_path / 'elsewhere')
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train, 'evaluate', gone)
    with pytest.raises(UserError, match=r'cannot write .*: the folder was removed or renamed meanwhile$'):
        start('--eval_interval=9')
