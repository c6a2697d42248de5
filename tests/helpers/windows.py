"""Windows' rule on Linux: a file that this process has open or mapped cannot be removed or replaced."""

import contextlib
import os
from unittest import mock

REFUSED = 'The process cannot access the file because it is being used by another process'


@contextlib.contextmanager
def windows_files():
    """Let os.remove, os.unlink, os.rename and os.replace refuse files that are open or mapped here.

    pathlib and shutil call these functions, so their methods refuse, too.
    """
    with contextlib.ExitStack() as stack:
        for name in 'remove', 'unlink', 'rename', 'replace':
            stack.enter_context(mock.patch.object(os, name, refusing(getattr(os, name))))
        yield


def refusing(function):
    """Return `function`, one of os that takes a path or two, with Windows' rule."""

    def checked(*paths, dir_fd=None, **options):
        used = files_in_use()
        for path in paths:
            if used & identities(path, dir_fd):
                raise PermissionError(13, REFUSED, str(path))
        return function(*paths, **options) if dir_fd is None else function(*paths, dir_fd=dir_fd, **options)

    return checked


def identities(path, dir_fd=None):
    """Return {(device, inode)} of a file, which no other file has, or of the files in a folder."""
    try:
        status = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:
        return set()
    if not os.path.stat.S_ISDIR(status.st_mode):
        return {(status.st_dev, status.st_ino)}
    found = set()
    for folder, _, names in os.walk(path):
        for name in names:
            found |= identities(os.path.join(folder, name))
    return found


def files_in_use():
    """Return the identities of the files that this process has open or mapped."""
    used = set()
    for name in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
            status = os.stat(f'/proc/self/fd/{name}')
            used.add((status.st_dev, status.st_ino))
    with open('/proc/self/maps') as maps:
        for line in maps:
            _, _, _, device, inode, *_ = line.split(maxsplit=5)
            major, minor = device.split(':')
            used.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return used
