"""Several processes that form one run: their ranks, the signals that stop them, a rank that is lost."""

import contextlib
import os
import signal
import sys
import time
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import out_of_memory


class Ranks(NamedTuple):
    """The place of this process among all processes of the run."""
    rank: int = 0
    local_rank: int = 0  # among the processes of this machine
    world_size: int = 1


def get_ranks():
    """Return the Ranks that torchrun has put into the environment; without torchrun there is one process."""
    names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE'
    return Ranks(*(int(os.environ.get(name, default)) for name, default in zip(names, Ranks(), strict=True)))


def join_ranks(model, device):
    """Connect to the other ranks and return `model` wrapped in DDP; with one rank, return it as it is."""
    if get_ranks().world_size == 1:
        return model
    if device.type == 'cuda':
        dist.init_process_group(backend='nccl', device_id=device)
    else:
        dist.init_process_group(backend='gloo')
    with warnings.catch_warnings(action='ignore', category=FutureWarning):  # torch 2.13 renamed an argument
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def wait_for_ranks():
    """Wait for the other ranks: once one has ended, torchrun ends the rest, even in the middle of a save."""
    if dist.is_initialized():
        dist.barrier()


def mean_over_ranks(*values):
    """Return the mean over all ranks of each value (scalar tensors or numbers), as a list of floats.

    This waits for the GPU.
    """
    device = next((value.device for value in values if torch.is_tensor(value)), 'cpu')
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked /= dist.get_world_size()
    return stacked.tolist()


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

    The process group is destroyed in any case. resume_command: what to type to resume the run.
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
                  f'{reason}; what was saved is whole, resume with: {resume_command}', file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
