"""Fixtures that several test files share."""

import os
import signal

import pytest

from tests.helpers import scripts

os.environ.setdefault('OMP_NUM_THREADS', '1')  # tests run side by side


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Return a prepared folder."""
    return scripts.prepare(tmp_path_factory.mktemp('prepared') / 'data')


@pytest.fixture(scope='session')
def run(data):
    """Return a folder with a trained run, and the finished Script that trained it."""
    out = data.parent / 'out'
    flags = ['--max_iters=12', '--eval_interval=6', '--gradient_accumulation_steps=1', f'--dataset={data}']
    done = scripts.script('train.py', *scripts.SETTINGS, *flags, f'--out_dir={out}', DRAW='1')
    return out, done


@pytest.fixture
def start(data, tmp_path, monkeypatch):
    """start(*flags) is train.py in this process, in tmp_path/out, without loss.png.

    Its settings and signal handlers are put back afterwards.
    """
    import train
    from configurator import configure, settings
    from core.progress import Progress

    monkeypatch.setattr(Progress, 'draw', lambda _: None)
    before = settings(vars(train))
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}

    def run(*flags):
        words = [f'--dataset={data}', f'--out_dir={tmp_path}/out', '--eval_interval=4', '--max_iters=8']
        vars(train).update(before)
        configure(vars(train), scripts.once([*scripts.SETTINGS, *words, *flags]), train.checkpoint_settings)
        train.main()

    yield run
    vars(train).update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)
