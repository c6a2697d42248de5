"""What several test files share."""

import signal

import pytest
import torch

import train
from configurator import configure
from tests import tiny


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp('prepared') / 'data')


@pytest.fixture
def start(data, tmp_path):
    """start(*flags) is train.py in this process; its settings and signal handlers come back afterwards."""
    before = {name: value for name, value in vars(train).items() if type(value) in (bool, int, float, str)}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()

    def run(*flags):
        words = [f'--dataset={data}', f'--out_dir={tmp_path}/out', '--eval_interval=4', '--max_iters=8']
        vars(train).update(before)
        configure(vars(train), [*tiny.SETTINGS, *words, *flags], train.checkpoint_settings)
        train.main()

    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)
    vars(train).update(before)
    for number, handler in handlers.items():
        signal.signal(number, handler)
