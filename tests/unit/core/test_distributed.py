"""Ranks, signals and lost ranks, without starting several processes."""

import os
import signal
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from configurator import UserError
from core import distributed
from core.checkpoint import resume_command
from core.distributed import (
    MeansOverRanks,
    Ranks,
    StopSignals,
    compare_ranks,
    get_ranks,
    join_ranks,
    leave_ranks,
    report_lost_ranks,
)
from tests.helpers.scripts import rank_variables


def test_ranks_come_from_the_environment(monkeypatch):
    for name in 'RANK', 'LOCAL_RANK', 'WORLD_SIZE':
        monkeypatch.delenv(name, raising=False)
    assert get_ranks() == Ranks(rank=0, local_rank=0, world_size=1)
    for name, value in ('LOCAL_RANK', '0'), ('WORLD_SIZE', '1'), ('RANK', '0'):  # one process needs not all
        monkeypatch.setenv(name, value)
        assert get_ranks() == Ranks(rank=0, local_rank=0, world_size=1)
    for name, value in (rank_variables(5, 8) | {'LOCAL_RANK': '1'}).items():
        monkeypatch.setenv(name, value)
    assert get_ranks() == Ranks(rank=5, local_rank=1, world_size=8)


def test_means_over_ranks_divide_the_sums(monkeypatch):
    assert MeansOverRanks(torch.tensor(1.5), 2, True).read() == [1.5, 2.0, 1.0]  # one rank
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 4)
    monkeypatch.setattr(dist, 'all_reduce', lambda tensor: tensor.add_(torch.tensor([6.0, 0.0])))
    assert MeansOverRanks(torch.tensor(2.0), False).read() == [2.0, 0.0]


def test_means_over_ranks_wait_for_their_own_copy_only(monkeypatch):
    """A GPU copies the means in turn; what it is asked to do later has not to be done when they are read."""
    calls = []

    class OnCuda(torch.Tensor):
        is_cuda = True

        def to(self, *args, **options):
            calls.append((*args, options))
            return self.as_subclass(torch.Tensor)

    class Event:
        def record(self):
            calls.append('record')

        def synchronize(self):
            calls.append('synchronize')

    zeros = torch.zeros
    monkeypatch.setattr(torch, 'zeros', lambda *shape, device: zeros(*shape).as_subclass(OnCuda))
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    means = MeansOverRanks(torch.tensor(1.5), True)
    assert calls == [('cpu', {'non_blocking': True}), 'record']
    assert means.read() == [1.5, 1.0]
    assert calls[2:] == ['synchronize']


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
    (dist.DistBackendError('NCCL error: out of memory'), ''),  # which `run` reports
    (dist.DistBackendError('NCCL error in: x.cpp:94, unhandled cuda error\nmore'), 'unhandled cuda error; '),
    (RuntimeError('[gloo/tcp/pair.cc] Connection closed by peer'), 'Connection closed by peer; what was')])
def test_a_failed_exchange_is_one_line_and_waits_for_no_rank(monkeypatch, capsys, end, said):
    """With NCCL, destroying the group waits for the other ranks, before the reason is printed."""
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'destroy_process_group', None)
    try:
        with report_lost_ranks(lambda: 'RESUME'):
            if end:
                raise end
    except BaseException as raised:
        assert raised is end or (said and isinstance(raised, SystemExit) and raised.code == 1)
    err = capsys.readouterr().err
    assert said in err and err.count('\n') == bool(said)


def test_ranks_that_end_wait_for_each_other_and_then_disconnect(monkeypatch):
    calls = []
    for name in 'barrier', 'destroy_process_group':
        monkeypatch.setattr(dist, name, lambda name=name: calls.append(name))
    leave_ranks()
    assert calls == []
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    leave_ranks()
    assert calls == ['barrier', 'destroy_process_group']


@pytest.mark.parametrize('variables, message', [
    ('RANK=1', "has RANK='1', where all of RANK, LOCAL_RANK and WORLD_SIZE must be numbers: unset them"),
    ('LOCAL_RANK=1', "has LOCAL_RANK='1', where all of RANK"),
    ('WORLD_SIZE=2', "has WORLD_SIZE='2', where all of RANK"),
    ('RANK=0 WORLD_SIZE=2', "has RANK='0', WORLD_SIZE='2', where all of RANK"),
    ('RANK= LOCAL_RANK=0 WORLD_SIZE=1', "has RANK='', LOCAL_RANK='0', WORLD_SIZE='1', where all of RANK"),
    ('RANK=0 LOCAL_RANK=x WORLD_SIZE=1', "LOCAL_RANK='x'"),
    ('RANK=-1 LOCAL_RANK=0 WORLD_SIZE=1', "RANK='-1'"),
    ('RANK=2 LOCAL_RANK=0 WORLD_SIZE=2', "WORLD_SIZE='2', which cannot be: "),
    ('RANK=0 LOCAL_RANK=1 WORLD_SIZE=2', 'which cannot be: '),
    ('RANK=0 LOCAL_RANK=0 WORLD_SIZE=0', 'which cannot be: '),
    ('RANK=1 LOCAL_RANK=1 WORLD_SIZE=2', 'has no MASTER_ADDR and no MASTER_PORT, by which ranks'),
    ('RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost', 'has no MASTER_PORT, by which'),
    ('RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x',
     "has MASTER_PORT='x', which must be a number from 1 to 65535"),
    ('RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=65536', "MASTER_PORT='65536'"),
    ('RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=0', "MASTER_PORT='0'")])
def test_variables_that_make_no_ranks_are_refused(monkeypatch, variables, message):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split('='))
    with pytest.raises(UserError, match=message):
        get_ranks()


@pytest.mark.parametrize('theirs, message', [
    ({'step': 40, 'seed': 1}, None),
    ({'step': 30, 'seed': 1}, 'step is 30 on rank 2, but 40 on rank 0: start'),
    ({'step': 40, 'seed': 7}, 'seed is 7 on rank 2, but 1 on rank 0')])
def test_ranks_with_other_facts_are_refused(monkeypatch, theirs, message):
    def gather(found, facts):
        found[:] = [facts, facts, theirs, facts]

    monkeypatch.setattr(dist, 'get_world_size', lambda: 4)
    monkeypatch.setattr(dist, 'all_gather_object', gather)
    if message is None:
        compare_ranks({'step': 40, 'seed': 1})
        return
    with pytest.raises(UserError, match=message):
        compare_ranks({'step': 40, 'seed': 1})


@pytest.mark.parametrize('name, options', [
    ('cuda:1', {'backend': 'nccl', 'device_id': torch.device('cuda', 1)}), ('cpu', {'backend': 'gloo'})])
def test_how_ranks_join(monkeypatch, name, options):
    """They wait for as long as rank 0 may work alone: with 10 million parameters, five minutes and a bit."""
    joined = []
    model = SimpleNamespace(n_params=lambda: 10**7)
    for variable, value in rank_variables(0, 2).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(dist, 'init_process_group', lambda **options: joined.append(options))
    monkeypatch.setattr(distributed, 'DistributedDataParallel', lambda model, **options: options)
    monkeypatch.setattr(distributed, 'compare_ranks', joined.append)
    assert join_ranks(model, torch.device(name), 'facts') == {
        'broadcast_buffers': False, 'gradient_as_bucket_view': True}
    assert joined == [options | {'timeout': timedelta(seconds=303.6)}, 'facts']


def test_on_several_machines_the_command_leaves_their_options_out(monkeypatch):
    for name, value in (rank_variables(0, 4) | {'LOCAL_WORLD_SIZE': '2'}).items():
        monkeypatch.setenv(name, value)
    command = "torchrun ... --nproc_per_node=2 train.py --init_from resume --out_dir 'my run'"
    assert resume_command('my run') == command
