"""What is a person's mistake, and no bug: one line on stderr and an exit status, never a traceback."""

import contextlib
import ctypes
import errno
import os
import re
import shlex
import signal
import sys
import time
import warnings


class UserError(Exception):
    """A person's mistake: `run` prints it as one line on stderr and exits with `status`."""
    status = 1


class SettingError(UserError):
    """A mistake in the settings, on the command line or in a config file."""
    status = 2


def script(name):
    """How to type a script of ours, from wherever we are."""
    return shlex.quote(os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), name)))


def until_run():
    """Have Ctrl-C end this process without ado until `run`: while imports run, it would be a traceback."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # and it is not ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def interruptible():
    """In here, Ctrl-C is a KeyboardInterrupt, whatever it was before and will be afterwards."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) != before:
            signal.signal(signal.SIGINT, before)


@interruptible()
def run(main, less_memory=''):
    """Call `main()`: a mistake, an OSError or Ctrl-C ends in one line and a status, a bug in a traceback.

    less_memory: what to do where memory runs out.
    """
    message = ''
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):
            if stream.isatty():  # what it cannot show is no reason to end
                stream.reconfigure(errors='replace')
            else:  # names of files may have bytes that are no UTF-8
                stream.reconfigure(encoding='utf-8', errors='surrogateescape')
    try:
        main()
        print(end='', flush=True)  # a full disk or a closed pipe shows here at the latest
        return
    except (KeyboardInterrupt, BrokenPipeError) as error:  # the latter as in `sample.py | head`
        status = 130 if isinstance(error, KeyboardInterrupt) else 141
    except UserError as error:
        status, message = error.status, str(error)
    except ModuleNotFoundError as error:  # an optional package, imported where it is used
        status, message = 1, f'this needs a package: pip install {error.name}'
    except OSError as error:
        status, message = 1, ': '.join(map(str, filter(None, (error.filename, error.strerror or error))))
    except Exception as error:
        if not out_of_memory(error):
            raise
        status, message = 1, ': '.join(filter(None, ('out of memory', less_memory)))
    try:
        print(end='', flush=True)
    except OSError:  # what stdout will not take is dropped, or Python would complain of it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        if int(os.environ.get('LOCAL_RANK', 0)):
            # mostly it is one of all ranks: rank 0 tells of it, and torchrun ends those that wait here
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        from tqdm import tqdm

        message = f'{os.path.basename(sys.argv[0])}: {" ".join(printable(message).splitlines())[:2000]}'
        tqdm.write(message, file=sys.stderr)  # above a bar that stands there
    raise SystemExit(status)


def printable(text):
    """`text` with U+FFFD for each character that a terminal would obey, or that no file can have."""
    # lone surrogates but those that stand for bytes of file names
    return re.sub('[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]', '\N{REPLACEMENT CHARACTER}', text)


def be_a_worker():
    """In a worker process: Ctrl-C is the parent's to tell of, and no worker outlives its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def out_of_memory(error):
    """Whether memory has run out: torch has one exception for CUDA and mere words for MPS and CPUs."""
    words = ("out of memory|can't allocate memory|annot allocate memory|not enough memory|bad_alloc|"
             'Resource temporarily unavailable')  # the last of a thread that cannot be started
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and bool(re.search(words, str(error))))


@contextlib.contextmanager
def reading(what, problem='is damaged or not what it should be'):
    """The door for what comes from outside: any error in here is one line, "WHAT PROBLEM: reason".

    UserErrors pass as they are, and so does the want of a package, of memory or of room on the disk.
    """
    try:
        with warnings.catch_warnings(action='ignore'):  # what a library says of the file is said below
            yield
    except Exception as error:  # of one broken file, many libraries have many
        while error.__cause__:
            error = error.__cause__
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if full or out_of_memory(error) or isinstance(error, (UserError, ModuleNotFoundError)):
            raise error from None
        reason = f'no entry {error}' if isinstance(error, KeyError) else str(error) or type(error).__name__
        reason = re.sub(r'\x1b\[[\d;]*m', '', reason)  # colours
        advice = 'trust|weights_only|allowlist|documentation|issue'  # of libraries: to run what is there
        reason = [part for part in re.split(r'(?<=\.)\s+|\n+', reason) if not re.search(advice, part)]
        reason = ' '.join(' '.join(reason).split())
        raise UserError(f'{what} {problem}: {reason[:300]}') from None
