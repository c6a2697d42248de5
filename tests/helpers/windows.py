"""Windows' rule on Linux: a file that is open or mapped cannot be removed, moved or replaced."""

import contextlib
import os
from pathlib import Path
from unittest import mock


def files_in_use():
    """Return the real paths of the files that this process has open or mapped."""
    found = set()
    for link in Path('/proc/self/fd').iterdir():
        with contextlib.suppress(OSError):  # the one of iterdir itself
            found.add(os.readlink(link))
    for line in Path('/proc/self/maps').read_text().splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if len(fields) == 6:
            found.add(fields[5])
    return found


def refuse_files_in_use(path, dir_fd=None):
    """Raise PermissionError if this process uses the file `path`, or a file in the folder `path`."""
    folder = os.readlink(f'/proc/self/fd/{dir_fd}') if dir_fd is not None else os.getcwd()
    real = Path(os.path.realpath(folder), os.fsdecode(path))
    real = real.parent.resolve() / real.name
    for used in files_in_use():
        if used == str(real) or used.startswith(f'{real}/'):
            raise PermissionError(13, 'another program uses this file', str(path))


@contextlib.contextmanager
def windows_files():
    """A context in which os, shutil and pathlib treat files in use as Windows does."""
    remove, rename, replace = os.remove, os.rename, os.replace

    def checked_remove(path, *, dir_fd=None):
        refuse_files_in_use(path, dir_fd)
        remove(path, dir_fd=dir_fd)

    def checked_move(move):
        def checked(source, target, *, src_dir_fd=None, dst_dir_fd=None):
            refuse_files_in_use(source, src_dir_fd)
            refuse_files_in_use(target, dst_dir_fd)
            move(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        return checked

    with mock.patch.multiple(os, remove=checked_remove, unlink=checked_remove, rename=checked_move(rename),
                             replace=checked_move(replace)):
        yield
