"""Memory beyond what there is; cores that others keep busy."""

import os
import subprocess
import sys

import pytest
import torch

from core.device import IdleCores
from tests.helpers.scripts import ROOT


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere there are no such limits')
@pytest.mark.parametrize('limit, refused', [('max\n', False), (f'{10**9}\n', True)])
def test_more_than_a_container_has_is_refused_at_once(tmp_path, limit, refused):
    """What is asked for is never touched, so that the machine need not have it."""
    (tmp_path / 'memory.max').write_text(limit)
    code = f"""import mmap
from core import device as machine
machine.LIMITS = {str(tmp_path / 'memory.max')!r}, 'none'
machine.limit_memory()
try:
    mmap.mmap(-1, {2 * 10**9}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    print('granted')
except OSError:
    print('refused')
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ('refused\n' if refused else 'granted\n')


@pytest.mark.parametrize('busy, own, threads', [
    (2.0, 2.0, 4), (4.0, 4.0, 4), (4.0, 3.3, 3), (4.0, 1.9, 2), (4.0, 0.1, 1), (2.2, 2.0, 4), (0.0, 0.1, 4)])
def test_others_have_the_cores_that_they_keep_busy(monkeypatch, busy, own, threads):
    """busy: cores of four, own: our part of them."""
    now = [100.0, 7.0, 3.0]
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(sys, 'platform', 'linux')
    monkeypatch.setattr(IdleCores, 'times', lambda _: (*now,))
    monkeypatch.setattr('core.device.time.monotonic', lambda: now[0])
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    asked = []
    monkeypatch.setattr(torch, 'set_num_threads', asked.append)
    give_way = IdleCores()
    give_way()
    assert not asked
    for passed in 0.6, 2.0:
        now[:] = now[0] + passed, now[1] + busy * passed, now[2] + own * passed
        give_way()
        give_way()
    assert asked == [threads, threads]
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    fixed = IdleCores()
    now[0] += 9
    fixed()
    assert len(asked) == 2


@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_times_are_those_of_this_machine(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    give_way = IdleCores()
    while (now := give_way.times())[2] - give_way.before[2] < 0.3:  # busy ourselves
        pass
    passed, busy, own = (after - before for after, before in zip(now, give_way.before, strict=True))
    assert own <= passed + 0.1 and own - 0.05 < busy < passed * len(os.sched_getaffinity(0)) + 0.1
