"""Memory limits: of the machine, of nested control groups, and of the user."""

import subprocess
import sys

import pytest

from core import memory
from core.memory import free_memory
from tests.helpers.scripts import ROOT

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='only Linux has /proc')

MACHINE = 'MemTotal: 9000 kB\nMemAvailable:    5000 kB\nSwapFree:          1000 kB\n'
FREE = 6000 * 1024


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Return write(path, text), for files below the folders proc and cgroup that stand for Linux's own."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    monkeypatch.setattr(memory, 'PROC', tmp_path / 'proc')
    monkeypatch.setattr(memory, 'CGROUPS', tmp_path / 'cgroup')
    write('proc/meminfo', MACHINE)
    write('proc/self/statm', '0 0 0 0 0 100 0')
    return write


def test_free_memory_is_that_of_the_machine_without_control_groups(system):
    assert free_memory() == FREE


@pytest.mark.parametrize('limited', ['', '/slurm', '/slurm/job_5', '/slurm/job_5/step_0'])
def test_free_memory_follows_nested_groups_of_version_2(system, limited):
    system('proc/self/cgroup', '0::/slurm/job_5/step_0\n')
    for group in '', '/slurm', '/slurm/job_5', '/slurm/job_5/step_0':
        system(f'cgroup{group}/memory.max', 'max\n')
    system(f'cgroup{limited}/memory.max', '900000\n')
    system(f'cgroup{limited}/memory.current', '300000\n')
    system(f'cgroup{limited}/memory.stat', 'anon 1\ninactive_file 100000\n')
    assert free_memory() == 900_000 - 200_000


@pytest.mark.parametrize('controllers', ['memory', 'hugetlb,memory'])
def test_free_memory_follows_nested_groups_of_version_1(system, controllers):
    system('proc/self/cgroup', f'5:cpu:/other\n4:{controllers}:/docker/abc\n0::/\n')
    system('cgroup/memory/memory.limit_in_bytes', '9223372036854771712\n')
    system('cgroup/memory/docker/memory.limit_in_bytes', '800000\n')
    system('cgroup/memory/docker/memory.usage_in_bytes', '300000\n')
    system('cgroup/memory/docker/abc/memory.limit_in_bytes', '900000\n')
    system('cgroup/other/memory.max', '5\n')
    assert free_memory() == 500_000
    system('cgroup/memory/docker/abc/memory.usage_in_bytes', '899999\n')
    assert free_memory() == 1


@pytest.mark.parametrize('path', ['cgroup/memory.max', 'cgroup/memory/memory.limit_in_bytes'])
def test_free_memory_of_a_container_that_sees_only_its_own_group(system, path):
    system('proc/self/cgroup', '4:memory:/outside/abc\n0::/outside/abc\n')
    system(path, '700000\n')
    assert free_memory() == 700_000


@pytest.mark.parametrize('path, content', [
    ('proc/self/cgroup', b'\nno colons\n1:2\n::\n'), ('proc/self/cgroup', b'0::/\xff\n'),
    ('proc/self/cgroup', b'0::/a\0b\n0::/' + 5000 * b'c'), ('proc/self/cgroup', b'0::/../../..\n'),
    ('cgroup/memory.max', '\u00b2'.encode()), ('cgroup/memory.max', b'\xff'), ('cgroup/memory.max', b'-1'),
    ('cgroup/memory.max', 5000 * b'9'), ('cgroup/memory.max', None),
    ('cgroup/memory/memory.limit_in_bytes', '\u0663'.encode())])
def test_free_memory_knows_no_limit_from_what_it_cannot_understand(system, path, content):
    """With None, the file cannot be read: it is a folder."""
    system(f'{path}/file' if content is None else path, '')
    file = memory.PROC.parent / path
    if content is not None:
        file.write_bytes(content)
    assert free_memory() == FREE


@pytest.mark.parametrize('path, content', [
    ('proc/meminfo', ''), ('proc/meminfo', f'MemAvailable: {5000 * "9"} kB'), ('proc/self/statm', '1 2 3'),
    ('proc/self/statm', f'0 0 0 0 0 {5000 * "9"} 0')])
def test_limit_memory_changes_nothing_without_the_sizes(system, monkeypatch, path, content):
    import resource

    system(path, content)
    monkeypatch.setattr(resource, 'setrlimit', None)
    memory.limit_memory()


def test_without_proc_nothing_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, 'PROC', tmp_path)
    assert free_memory() is None
    memory.limit_memory()


def test_more_memory_than_there_is_is_refused_at_once(tmp_path):
    """What is asked for is never touched, so the machine need not have it. A limit of the user stays."""
    code = """
import mmap, resource
from core import memory
memory.free_memory = lambda: 10**9
memory.limit_memory()
try:
    mmap.mmap(-1, 2 * 10**9, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    print('granted')
except OSError:
    print('refused')
resource.setrlimit(resource.RLIMIT_DATA, (10**8, -1))
memory.limit_memory()
print(resource.getrlimit(resource.RLIMIT_DATA)[0])
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f'refused\n{10**8}\n'
