"""Several processes that are one run: their ranks, the signals that stop them, a rank that ends."""

import contextlib
import os
import shlex
import signal
import sys
import time
import warnings

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import out_of_memory, script_path


def ranks():
    """(rank, local rank, world size), as torchrun tells them; (0, 0, 1) without it."""
    return [int(os.environ.get(*default)) for default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1))]


def join_ranks(model, device):
    """Meet the other ranks, if there are any; returns the model that exchanges its gradients with theirs."""
    if ranks()[2] == 1:
        return model
    backend = {'backend': 'nccl', 'device_id': device} if device.type == 'cuda' else {'backend': 'gloo'}
    dist.init_process_group(**backend)
    with warnings.catch_warnings(action='ignore', category=FutureWarning):  # torch 2.13 has a new name for it
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def leave_ranks():
    """Wait for the others: once a rank has ended, torchrun ends the rest, however far a save is."""
    if dist.is_initialized():
        dist.barrier()


def resume_command(out_dir):
    """What to type to go on with the run in `out_dir`."""
    world_size, here = ranks()[2], int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    nodes = '--standalone' if world_size == here else '...'  # on several nodes, the options of their start
    start = f'torchrun {nodes} --nproc_per_node={here}' if world_size > 1 else 'python'
    return f"{start} {script_path('train.py')} --init_from resume --out_dir {shlex.quote(out_dir)}"


def watch_signals():
    """Ctrl-C, SIGTERM and SIGHUP put their number into the list returned; a second Ctrl-C stops at once, but
    under torchrun not within a second: it hands on what the terminal has told already."""
    caught, first, echo = [], 0.0, float('TORCHELASTIC_RUN_ID' in os.environ)  # seconds

    def note(number, frame):
        nonlocal first
        if caught and number == signal.SIGINT and time.monotonic() - first > echo:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        caught.append(number)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)}:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, note)
    return caught


@contextlib.contextmanager
def lost_ranks_told(out_dir):
    """One line, no traceback, where an exchange with the other ranks fails; at any end the group is left."""
    try:
        yield
    except RuntimeError as error:  # for gloo torch has no class of its own
        if out_of_memory(error) or not (isinstance(error, dist.DistError) or 'gloo' in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends those that hang
        if ranks()[0] < 2:  # rank 0, and one more as rank 0 may have ended
            print(f'train.py: rank {ranks()[0]} does not reach the others, of which one may have ended: '
                  f'{str(error).splitlines()[0]}; what was saved is whole, go on with: '
                  + resume_command(out_dir), file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
