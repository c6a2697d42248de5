"""The same function on many items in worker processes: in order, with bounded memory, ending as one."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from configurator import UserError

TASK = 16  # items sent at a time: sending has a price of its own


def in_order(function, items, processes):
    """Yields function(item) for each item, in order; few are under way at a time. 1 process is this one.

    Raises what a worker raised, UserError if one has died. Workers end with their parent, even a killed one.
    """
    if processes == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context('spawn'), _start, (function,))
    items, pending = iter(items), collections.deque()
    try:
        while (task := list(itertools.islice(items, TASK))) or pending:
            if task:
                with _interrupts_held():
                    pending.append(pool.submit(_call, task))
            if not task or len(pending) > 2 * processes:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        raise UserError('a worker process was killed, for lack of memory? Try a smaller --num_proc') from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function):
    global _function
    _function = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(task):
    return [_function(item) for item in task]


@contextlib.contextmanager
def _interrupts_held():
    """A terminal's Ctrl-C reaches all its processes. One started in here never sees it; we do, afterwards."""
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
