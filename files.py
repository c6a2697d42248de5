"""Files that are written whole or not at all, and folders that one process writes into at a time."""

import atexit
import contextlib
import errno
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

from errors import UserError

try:
    from fcntl import LOCK_EX, LOCK_NB, lockf
except ImportError:  # Windows
    from msvcrt import LK_NBLCK, locking

PREPARED = re.compile(r'(train|val)_\d{5}\.bin|tokenizer\.(json|model|tiktoken)')  # beside meta.json


def no_link(path, flags):
    return os.open(path, flags | getattr(os, 'O_NOFOLLOW', 0), 0o666)  # it could lead to any file


def lock(folder, way_out):
    """Have `folder` for this process alone until it ends, or leaves the context that is returned.

    The file .lock in it says whose it is; one that a killed process has left there is nobody's. Raises
    UserError, with `way_out`, where another process has the folder.
    """
    path, same = Path(folder, '.lock'), False
    while not same:  # it may have been removed, by the process that had it, before it was ours
        file = open(path, 'a+', opener=no_link)  # noqa: SIM115
        try:
            lockf(file, LOCK_EX | LOCK_NB) if os.name == 'posix' else locking(file.fileno(), LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise UserError(f'{folder} is in use by process {file.read().strip()}: {way_out}') from None
            print(f'{folder} cannot be locked ({error.strerror}): see that nothing else writes into it',
                  file=sys.stderr)
            return contextlib.closing(file)
        with contextlib.suppress(OSError):
            same = os.path.samestat(os.fstat(file.fileno()), path.stat())
    file.truncate(0)
    file.write(f'{os.getpid()} of {platform.node()}')
    file.flush()

    held = contextlib.ExitStack()
    held.callback(file.close)
    held.callback(path.unlink, missing_ok=True)  # before that, so that it is not another's by then
    atexit.register(held.close)
    return held


@contextlib.contextmanager
def written(path, flag='--out_dir'):
    """UserError where the disk does not take what is written to `path` in here."""
    try:
        yield
    except Exception as error:  # torch.save hides an OSError behind its own, what is Rust in words
        cause = error if isinstance(error, OSError) else error.__context__
        in_words = re.search(r'[\w ]+(?= \(os error \d+\))', str(error))
        if isinstance(error, UserError) or not (isinstance(cause, OSError) or in_words):
            raise
        reason = in_words[0].strip() if in_words else cause.strerror or f'no room: {cause}'
        way_out = ('the folder was removed or renamed meanwhile' if isinstance(cause, FileNotFoundError) else
                   f'make room or name another {flag}; what was saved before, if anything, is whole')
        raise UserError(f'cannot write {path} ({reason}): {way_out}') from None


def write_whole(path, write):
    """write(file) to `path`, whole or not at all: what was there stays until the new file is on disk.
    Raises UserError where the disk does not take it."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with written(path), open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == 'posix':  # so that the new name outlives a power cut; Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staging(target):
    """Yields where to write what is to become `target`; it is gone afterwards, or after the next export."""
    stage = target.with_name(f'.{target.name}.unfinished')
    if stage.is_symlink():
        raise UserError(f'{stage} is a link to another folder: remove it')
    stage.mkdir(parents=True, exist_ok=True)
    with lock(stage, f'it exports to {target}, too'):
        try:
            for left in stage.glob('[!.]*'):  # by a killed one
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield stage / 'export'
        finally:
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def replacing(folder):
    """Yields temporary folders (new, cache): if all went well, what is in `new` replaces what was prepared.

    meta.json goes first and comes last, so that at no moment it tells of files that are not its own. What
    killed runs left is removed. Raises UserError where it cannot write to `folder`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (lock(folder, 'wait for it, or name another --out_dir'),
              tempfile.TemporaryDirectory('', '.preparing-', folder, ignore_cleanup_errors=True) as path):
            for left in {*folder.glob('.preparing-*')} - {Path(path)}:
                shutil.rmtree(left)
            new, cache = Path(path, 'new'), Path(path, 'cache')
            new.mkdir()
            cache.mkdir()
            yield new, cache
            (folder / 'meta.json').unlink(missing_ok=True)
            for old in folder.iterdir():
                if PREPARED.fullmatch(old.name):
                    old.unlink()
            for file in sorted(new.iterdir(), key=lambda file: file.name == 'meta.json'):
                file.replace(folder / file.name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'cannot write to {folder} ({reason}): name another folder with --out_dir') from None
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # empty, where nothing came of it
