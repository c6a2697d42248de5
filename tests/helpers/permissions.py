"""Files that cannot be read: permissions that hold for root, too."""

import contextlib
import ctypes
import os
import sys

import pytest

needs_permissions = pytest.mark.skipif(
    os.name != 'posix' or (os.geteuid() == 0 and sys.platform != 'linux'), reason='permissions do not hold')

CAPABILITIES_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


@contextlib.contextmanager
def locked(path):
    """Let nobody read `path` in this context."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with rights_of_an_owner():
            yield
    finally:
        path.chmod(mode)


@contextlib.contextmanager
def rights_of_an_owner():
    """Have root obey the permissions of files, as any other owner of them does."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION_3, 0)  # 0: this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and those of numbers above 31
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    try:
        sets[0] = effective & ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
        assert libc.capset(header, sets) == 0
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0
