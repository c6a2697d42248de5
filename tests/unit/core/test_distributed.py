"""Ranks, signals and lost ranks, without starting several processes."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from configurator import UserError
from core import distributed
from core.checkpoint import resume_command
from core.distributed import Ranks, StopSignals, get_ranks, join_ranks, mean_over_ranks, report_lost_ranks


def test_ranks_come_from_the_environment(monkeypatch):
    for name in 'RANK', 'LOCAL_RANK', 'WORLD_SIZE':
        monkeypatch.delenv(name, raising=False)
    assert get_ranks() == Ranks(rank=0, local_rank=0, world_size=1)
    for name, value in ('RANK', '5'), ('LOCAL_RANK', '1'), ('WORLD_SIZE', '8'):
        monkeypatch.setenv(name, value)
    assert get_ranks() == Ranks(rank=5, local_rank=1, world_size=8)


def test_mean_over_ranks_divides_the_sum(monkeypatch):
    assert mean_over_ranks(torch.tensor(1.5), 2, True) == [1.5, 2.0, 1.0]  # one rank
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 4)
    monkeypatch.setattr(dist, 'all_reduce', lambda tensor: tensor.add_(torch.tensor([6.0, 0.0])))
    assert mean_over_ranks(torch.tensor(2.0), False) == [2.0, 0.0]


@pytest.fixture
def handlers():
    """Put the handlers of signals back after the test."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_to_stop(handlers, number):
    stop = StopSignals()
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested() and stop.exit_status() == 128 + number


def test_a_rank_that_got_no_signal_ends_as_if_by_sigterm(handlers):
    assert StopSignals().exit_status() == 128 + signal.SIGTERM


def test_an_ignored_signal_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    stop = StopSignals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested()


def test_a_second_ctrl_c_stops_at_once(handlers, monkeypatch):
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    stop = StopSignals()
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # only Ctrl-C is impatient
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.exit_status() == 128 + signal.SIGTERM


def test_torchrun_forwards_a_ctrl_c_that_has_arrived_already(handlers, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    stop, now = StopSignals(), [50.0]
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    os.kill(os.getpid(), signal.SIGINT)
    now[0] += 0.9
    os.kill(os.getpid(), signal.SIGINT)  # the echo
    now[0] += 0.2
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested()


@pytest.mark.parametrize('end, said', [
    (None, ''), (UserError('nan'), ''), (SystemExit(130), ''), (ZeroDivisionError(), ''),
    (dist.DistBackendError('NCCL error: out of memory'), ''),  # which `run` tells of
    (dist.DistBackendError('NCCL error in: x.cpp:94, unhandled cuda error\nmore'), 'unhandled cuda error; '),
    (RuntimeError('[gloo/tcp/pair.cc] Connection closed by peer'), 'Connection closed by peer; what was')])
def test_every_end_leaves_the_group_and_a_failed_exchange_is_one_line(monkeypatch, capsys, end, said):
    left = []
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'destroy_process_group', lambda: left.append(True))
    try:
        with report_lost_ranks('RESUME'):
            if end:
                raise end
    except BaseException as raised:
        assert raised is end or (said and isinstance(raised, SystemExit) and raised.code == 1)
    err = capsys.readouterr().err
    assert left == [True] and said in err and err.count('\n') == bool(said)


@pytest.mark.parametrize('name, options', [
    ('cuda:1', {'backend': 'nccl', 'device_id': torch.device('cuda', 1)}), ('cpu', {'backend': 'gloo'})])
def test_how_ranks_join(monkeypatch, name, options):
    joined = []
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setattr(dist, 'init_process_group', lambda **options: joined.append(options))
    monkeypatch.setattr(distributed, 'DistributedDataParallel', lambda model, **options: options)
    assert join_ranks('model', torch.device(name)) == {
        'broadcast_buffers': False, 'gradient_as_bucket_view': True}
    assert joined == [options]


def test_on_several_machines_the_command_leaves_their_options_out(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    command = "torchrun ... --nproc_per_node=2 train.py --init_from resume --out_dir 'my run'"
    assert resume_command('my run') == command
