"""Keep the worker processes of the datasets library under control.

`Dataset.map(num_proc=...)` starts workers and a process that manages their queue. Left alone, each worker
prints a traceback on Ctrl-C, all of them outlive a parent that is killed, and the parent may wait forever for
a worker that is killed.
"""

import ctypes
import functools
import os
import signal
import sys

from configurator import UserError

STUCK_SECONDS = 10  # from the end of a worker until we give up waiting for the library
WORKER_KILLED = 'a worker process was killed, perhaps for lack of memory: try --num_proc 1'


def available_cores():
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class Workers:
    """A context for a `map` with worker processes.

    Ctrl-C ends it with KeyboardInterrupt and no other output. A worker that is killed ends it with UserError.
    On Linux, all processes that are started in it end when this process ends.
    """

    active = None  # the Workers whose context this is, or was when it failed: it may still start processes

    def __init__(self):
        self.pid = os.getpid()
        self.is_forking = False
        self.is_interrupted = False

    def __enter__(self):
        if sys.platform == 'win32':
            return
        if sys.platform == 'linux':
            import multiprocess  # which the datasets library uses instead of multiprocessing

            multiprocess.set_start_method('fork', force=True)  # which is not the default of Python 3.14
            register_fork_hooks()
        self.handlers = {
            signal.SIGCHLD: signal.signal(signal.SIGCHLD, self.on_child_end),
            signal.SIGALRM: signal.signal(signal.SIGALRM, self.on_alarm),
        }
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as it is for a background job
            self.handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self.on_interrupt)
        Workers.active = self

    def __exit__(self, kind, error, traceback):
        if sys.platform != 'win32':
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        if error is None:
            Workers.active = None
        else:
            end_children()
        if self.is_interrupted:  # the library turns it into a TimeoutError
            raise KeyboardInterrupt from None
        if was_killed(error):
            raise UserError(WORKER_KILLED) from error

    def on_interrupt(self, *_):
        if os.getpid() == self.pid:  # a worker leaves Ctrl-C to its parent
            self.is_interrupted = True
            self.on_alarm()

    def on_child_end(self, *_):
        # The library notices a killed worker. But if this one was idle, it held the lock of the queue of
        # jobs, and the library's clean-up waits for this lock forever: then give up.
        if not self.is_interrupted:
            signal.setitimer(signal.ITIMER_REAL, STUCK_SECONDS, 1)

    def on_alarm(self, *_):
        if self.is_forking:
            signal.setitimer(signal.ITIMER_REAL, 0.01)  # later: Python drops exceptions while it forks
        elif self.is_interrupted:
            signal.setitimer(signal.ITIMER_REAL, 2, 1)  # again, if the library's clean-up is stuck
            raise KeyboardInterrupt
        else:
            raise UserError(WORKER_KILLED)


def call_in_worker(batch, function, **arguments):
    """Return function(batch, **arguments). A worker leaves Ctrl-C to its parent, even if it is not forked."""
    import multiprocess

    if multiprocess.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return function(batch, **arguments)


def end_children():
    """Kill the library's processes, or Python waits for them at exit if the clean-up was cut short."""
    import multiprocess

    for process in multiprocess.active_children():
        process.kill()


def was_killed(error):
    """Return whether the library ended with this error because one of its processes was killed."""
    if error is None:
        return False
    import multiprocess

    if isinstance(error, RuntimeError):
        return 'abruptly died' in str(error)
    return isinstance(error, multiprocess.TimeoutError | EOFError | ConnectionError)


@functools.cache  # once, because hooks cannot be removed again
def register_fork_hooks():
    """Have every process that is forked in the context `Workers` ignore Ctrl-C and end with its parent."""
    prctl = ctypes.CDLL(None).prctl
    PR_SET_PDEATHSIG = 1

    def before():
        if Workers.active:
            Workers.active.is_forking = True

    def after_in_parent():
        if Workers.active:
            Workers.active.is_forking = False

    def after_in_child():
        if Workers.active:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != Workers.active.pid:  # it has ended before that
                os._exit(1)

    os.register_at_fork(before=before, after_in_parent=after_in_parent, after_in_child=after_in_child)
