"""Several processes that form one run: their ranks, the signals that stop them, a rank that is lost."""

import contextlib
import os
import re
import signal
import sys
import time
import warnings
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError, out_of_memory

START_ADVICE = 'unset them, or start the processes with torchrun'


class Ranks(NamedTuple):
    """The place of this process among all processes of the run."""
    rank: int = 0
    local_rank: int = 0  # among the processes of this machine
    world_size: int = 1


def get_ranks():
    """Return the Ranks that torchrun has put into the environment; without torchrun there is one process.

    Raises UserError if these variables contradict each other.
    """
    alone = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '1'}
    given = {name: os.environ[name] for name in alone if name in os.environ}
    if given.items() <= alone.items():  # one process needs none of them
        return Ranks()
    if len(given) < len(alone) or not all(re.fullmatch(r'\d{1,9}', text) for text in given.values()):
        raise UserError(f'the environment has {describe(given)}, where all of RANK, LOCAL_RANK and '
                        f'WORLD_SIZE must be numbers: {START_ADVICE}')
    ranks = Ranks(int(given['RANK']), int(given['LOCAL_RANK']), int(given['WORLD_SIZE']))
    if not ranks.local_rank <= ranks.rank < ranks.world_size:
        raise UserError(f'the environment has {describe(given)}, which cannot be: {START_ADVICE}')
    if ranks.world_size > 1:
        check_master()
    return ranks


def check_master():
    """Raise UserError if the environment does not say where the ranks find each other."""
    missing = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if missing:
        raise UserError(f"the environment has no {' and no '.join(missing)}, by which ranks find each other: "
                        + START_ADVICE)
    port = os.environ['MASTER_PORT']
    if not re.fullmatch(r'\d{1,5}', port) or not 0 < int(port) < 2**16:
        raise UserError(f'the environment has MASTER_PORT={port!a}, which must be a number from 1 to 65535')


def describe(variables):
    """Return environment variables {name: value} in words, such as 'RANK=0, LOCAL_RANK=0'."""
    return ', '.join(f'{name}={value!a}' for name, value in variables.items())


def join_ranks(model, device, facts):
    """Connect to the other ranks and return `model` wrapped in DDP; with one rank, return it as it is.

    facts: {name: value} of what must be the same on all ranks. Raises UserError if they differ.
    """
    if get_ranks().world_size == 1:
        return model
    timeout = longest_wait(model.n_params())
    if device.type == 'cuda':
        dist.init_process_group(backend='nccl', device_id=device, timeout=timeout)
    else:
        dist.init_process_group(backend='gloo', timeout=timeout)
    compare_ranks(facts)
    with warnings.catch_warnings(action='ignore', category=FutureWarning):  # torch 2.13 renamed an argument
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def longest_wait(n_params):
    """Return how long a rank waits for the others before it gives up, a timedelta.

    After an evaluation all wait for rank 0. It writes a story and draws, for which five minutes are enough,
    and saves up to three files. With AdamW they have 12 bytes per parameter; a slow disk takes 100 MB/s.
    """
    seconds_to_save = 3 * 12 * n_params / 100e6
    return timedelta(seconds=300 + seconds_to_save)


def compare_ranks(facts):
    """Exchange `facts` with the other ranks. Raises UserError, on all ranks, if they are not the same.

    Ranks with other data or settings would train on a mixture, and with other steps wait for each other.
    """
    facts_of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(facts_of_ranks, facts)
    for rank, theirs in enumerate(facts_of_ranks):
        for name, value in facts_of_ranks[0].items():
            if theirs.get(name) != value:
                raise UserError(f'{name} is {theirs.get(name)} on rank {rank}, but {value} on rank 0: start '
                                'all ranks with the same command, data and checkpoints')


def leave_ranks():
    """Wait for the other ranks and disconnect: once one ends, torchrun ends the rest, even while it saves.

    A rank that fails must not call this: NCCL would wait for what the other ranks still exchange.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


class MeansOverRanks:
    """The means over all ranks of some values (scalar tensors or numbers), which a GPU may still compute."""

    def __init__(self, *values):
        device = next((value.device for value in values if torch.is_tensor(value)), torch.device('cpu'))
        stacked = torch.zeros(len(values), device=device)
        for i, value in enumerate(values):
            stacked[i] = value  # a number is filled in by the GPU itself: to copy it there would wait
        if dist.is_initialized():
            dist.all_reduce(stacked)
            stacked /= dist.get_world_size()
        # copied now, so that `read` does not wait for what the GPU is asked to do after this
        self.means = stacked.to('cpu', non_blocking=stacked.is_cuda)
        self.copied = None
        if stacked.is_cuda:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self):
        """Return the means, a list of floats, as soon as they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.means.tolist()


class StopSignals:
    """Collects SIGINT (Ctrl-C), SIGTERM and SIGHUP, so that the training loop can save before it ends.

    A second Ctrl-C raises KeyboardInterrupt. torchrun forwards the first Ctrl-C once more, so under torchrun
    another one is ignored for a second. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self):
        self.received = []
        self.first_time = 0.0
        self.echo_seconds = 1.0 if 'TORCHELASTIC_RUN_ID' in os.environ else 0.0
        sighup = getattr(signal, 'SIGHUP', signal.SIGTERM)  # Windows has none
        for number in {signal.SIGINT, signal.SIGTERM, sighup}:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        if not self.received:
            self.first_time = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.first_time > self.echo_seconds:
            raise KeyboardInterrupt
        self.received.append(number)

    def requested(self):
        """Return whether this process has been asked to stop."""
        return len(self.received) > 0

    def exit_status(self):
        """Return the exit status of a process that ends because of a signal; another rank may have got it."""
        number = self.received[0] if self.received else signal.SIGTERM
        return 128 + number


@contextlib.contextmanager
def report_lost_ranks(resume_command):
    """Print one line instead of a traceback if an exchange with the other ranks fails.

    resume_command: a function that returns what to type to resume the run.
    """
    try:
        yield
    except RuntimeError as error:
        from_gloo = 'gloo' in str(error)  # torch has no class for its errors
        if out_of_memory(error) or not (isinstance(error, dist.DistError) or from_gloo):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends ranks that hang
        rank = get_ranks().rank
        if rank < 2:  # rank 0, and one more as rank 0 itself may be the one that ended
            reason = str(error).splitlines()[0]
            print(f'train.py: rank {rank} cannot reach the other ranks, one of them may have ended: '
                  f'{reason}; what was saved is whole, resume with: {resume_command()}', file=sys.stderr)
        raise SystemExit(1) from None
