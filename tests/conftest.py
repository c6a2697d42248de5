"""Fixtures that several test files share."""

import signal

import pytest
import torch

import train
from configurator import configure, settings
from tests.helpers import scripts as tiny

torch.set_num_threads(1)  # two stand still beside a busy process


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A prepared folder."""
    return tiny.prepare(tmp_path_factory.mktemp('prepared') / 'data')


@pytest.fixture(scope='session')
def run(data):
    """A folder with a trained run, and what it printed."""
    out = data.parent / 'out'
    words = ['--max_iters=12', '--eval_interval=6', '--gradient_accumulation_steps=1']
    return out, tiny.script('train.py', *tiny.SETTINGS, *words, f'--dataset={data}', f'--out_dir={out}')


@pytest.fixture
def start(data, tmp_path, monkeypatch):
    """start(*flags) is train.py in this process, without pictures; its settings and signal handlers come back
    afterwards."""
    monkeypatch.setattr(train.Progress, 'plot', lambda _: None)
    before = settings(vars(train))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*flags):
        words = [f'--dataset={data}', f'--out_dir={tmp_path}/out', '--eval_interval=4', '--max_iters=8']
        vars(train).update(before)
        configure(vars(train), tiny.once([*tiny.SETTINGS, *words, *flags]), train.checkpoint_settings)
        train.main()

    yield run
    vars(train).update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)
