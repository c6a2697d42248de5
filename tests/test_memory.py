"""Memory beyond what there is."""

import subprocess
import sys

import pytest

from tests.tiny import ROOT


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere there are no such limits')
@pytest.mark.parametrize('limit, refused', [('max\n', False), (f'{10**9}\n', True)])
def test_more_than_a_container_has_is_refused_at_once(tmp_path, limit, refused):
    """What is asked for is never touched, so that the machine need not have it."""
    (tmp_path / 'memory.max').write_text(limit)
    code = f"""import mmap, memory
memory.LIMITS = {str(tmp_path / 'memory.max')!r}, 'none'
memory.limit_memory()
try:
    mmap.mmap(-1, {2 * 10**9}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    print('granted')
except OSError:
    print('refused')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ('refused\n' if refused else 'granted\n')
