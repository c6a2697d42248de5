"""What ends a script: its status, its one line, and what a door makes of an error."""

import errno
import os
import shlex
import signal
import subprocess
import sys

import pytest
import torch

from configurator import SettingError, UserError, run, script, until_run, user_errors
from tests.helpers.scripts import ROOT


@pytest.mark.parametrize(('body', 'status', 'line'), [
    ("raise UserError('no data\\nhere')", 1, 'script.py: no data here\n'),
    ("raise SettingError('wrong')", 2, 'script.py: wrong\n'),
    ("open('no_such/file')", 1, 'script.py: no_such/file: No such file or directory\n'),
    ("raise OSError('bad disk')", 1, 'script.py: bad disk\n'),
    ('import no_such_package', 1, 'script.py: this needs a package: pip install no_such_package\n'),
    ('raise MemoryError', 1, 'script.py: out of memory\n'),
    ('raise KeyboardInterrupt', 130, ''),
    ('raise BrokenPipeError', 141, ''),
])
def test_run(monkeypatch, capsys, body, status, line):
    monkeypatch.setattr(sys, 'argv', ['some/script.py'])
    with pytest.raises(SystemExit) as exit:
        run(lambda: exec(body, {'UserError': UserError, 'SettingError': SettingError}))
    assert exit.value.code == status
    assert capsys.readouterr() == ('', line)


def test_run_leaves_a_bug_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


@pytest.mark.parametrize(('rank', 'expected'), [
    ('0', []), ('1', [(signal.SIGTERM, signal.SIG_DFL), 5])])  # so torchrun can end it as it waits
def test_rank_0_tells_of_a_mistake_of_all_ranks(monkeypatch, capsys, rank, expected):
    calls = []
    monkeypatch.setenv('LOCAL_RANK', rank)
    monkeypatch.setattr('configurator.time.sleep', calls.append)
    monkeypatch.setattr('configurator.signal.signal', lambda *args: calls.append(args))
    monkeypatch.setattr('configurator.signal.getsignal', lambda number: None)  # Ctrl-C has its own test
    with pytest.raises(SystemExit):
        run(lambda: os.stat('no_such/file'))
    assert calls == expected and 'no_such/file' in capsys.readouterr().err


def python(code, stdout):
    """A Python, ended, that has buffered what it prints."""
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=os.environ | {'PYTHONUNBUFFERED': ''},
                          stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one_line():
    reader, gone = os.pipe()
    os.close(reader)
    full = os.open('/dev/full', os.O_WRONLY)
    for stdout, status, line in (gone, 141, ''), (full, 1, '-c: No space left on device\n'):
        done = python("from errors import run; run(lambda: print('said'))", stdout)
        os.close(stdout)
        assert (done.returncode, done.stderr) == (status, line)


@pytest.mark.parametrize('error', [
    MemoryError(), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
    RuntimeError('MPS backend out of memory (MPS allocated: 17 GB)'),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried 9 bytes.')])
def test_want_of_memory_is_one_line(monkeypatch, capsys, error):
    def main():
        raise error

    monkeypatch.setattr(sys, 'argv', ['some/script.py'])
    with pytest.raises(SystemExit) as exit:
        run(main, 'halve it')
    assert (exit.value.code, capsys.readouterr().err) == (1, 'script.py: out of memory: halve it\n')
    error = RuntimeError('a bug')
    with pytest.raises(RuntimeError, match='a bug'):
        run(main, 'halve it')


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
def test_files_and_pipes_are_utf_8_with_the_bytes_of_file_names(monkeypatch, encoding):
    monkeypatch.setenv('PYTHONIOENCODING', encoding)
    code = "import sys; from errors import run; run(lambda: print('\\ufffd\\udcff', file=sys.{}))"
    for name in 'stdout', 'stderr':
        done = subprocess.run([sys.executable, '-c', code.format(name)], cwd=ROOT, capture_output=True)
        assert (done.returncode, getattr(done, name)) == (0, b'\xef\xbf\xbd\xff\n')


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo-terminal')
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch):
    monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
    reader, terminal = os.openpty()
    code = "from errors import run; run(lambda: print('caf\\xe9 \\ufffd'))"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, stdout=terminal)
    assert (done.returncode, os.read(reader, 100)) == (0, b'caf? ?\r\n')


@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, 'full'), MemoryError(), OSError(errno.ENOMEM, 'Cannot allocate memory')])
def test_want_of_room_is_no_damage(error):
    with pytest.raises(type(error)) as raised, user_errors('f.bin'):
        raise error
    assert raised.value is error


def test_a_worker_leaves_ctrl_c_to_its_parent():
    code = "import os, errors; errors.be_a_worker(); os.kill(os.getpid(), 2); print('goes on')"
    assert python(code, subprocess.PIPE).stdout == 'goes on\n'


SCRIPTS = 'train', 'sample', 'export', 'report', 'bench', 'data/tiny_stories/prepare'


@pytest.mark.parametrize('name', SCRIPTS)
def test_ctrl_c_while_imports_run_is_no_traceback(tmp_path, name):
    """It comes at the first import that is not ours or Python's; `python -I` puts no folder into sys.path."""
    for library in 'numpy', 'torch', 'tqdm':
        (tmp_path / f'{library}.py').write_text('import os, time; os.kill(os.getpid(), 2); time.sleep(5)')
    code = f"""import runpy, sys
sys.path.insert(0, {str(tmp_path)!r})
runpy.run_path({f'{ROOT}/{name}.py'!r}, run_name='__main__')"""
    done = subprocess.run([sys.executable, '-I', '-c', code], capture_output=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b'')


@pytest.mark.parametrize('ignored', [signal.SIG_IGN, signal.SIG_DFL])
def test_ctrl_c_is_what_it_was_before_and_after(ignored):
    """Ignored, as of a command that a shell has put into the background, or deadly until `run`."""
    before, within = signal.signal(signal.SIGINT, ignored), []
    try:
        until_run()
        run(lambda: within.append(signal.getsignal(signal.SIGINT)))
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert after == ignored
    assert within == [signal.SIG_IGN if ignored == signal.SIG_IGN else signal.default_int_handler]


def test_a_printed_command_runs_from_where_one_is(tmp_path, monkeypatch):
    assert script('train.py') == 'train.py'
    (tmp_path / "a b's").mkdir()
    monkeypatch.chdir(tmp_path / "a b's")
    assert os.path.samefile(shlex.split(script('data/tiny_stories/prepare.py'))[0],
                            ROOT / 'data/tiny_stories/prepare.py')


def test_a_message_obeys_no_escape_code(capsys):
    def main():
        raise UserError('a\x1b[2Jb\x9bc\ud800')

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err.endswith(': a\ufffd[2Jb\ufffdc\ufffd\n')


@pytest.mark.parametrize('times', [0, 1, 2])  # that libraries have wrapped it in errors of their own
@pytest.mark.parametrize('error, line', [
    (ValueError('bad  thing\nin lines'), 'f.bin is damaged or not what it should be: bad thing in lines'),
    (ValueError('x' * 999), 'f.bin is damaged or not what it should be: ' + 'x' * 300),
    (ValueError('\x1b[31mRed.\x1b[0m Set weights_only=False if you trust it.\nBad code 7.'),
     'f.bin is damaged or not what it should be: Red. Bad code 7.'),
    (KeyError('n_layer'), "f.bin is damaged or not what it should be: no entry 'n_layer'"),
    (RecursionError(), 'f.bin is damaged or not what it should be: RecursionError'),
    (UserError('as it is'), 'as it is'),
])
def test_any_error_behind_the_door_is_one_line(error, line, times):
    for _ in range(times):
        inner, error = error, KeyError('wrapped')
        error.__cause__ = inner
    with pytest.raises(UserError) as told, user_errors('f.bin'):
        raise error
    assert str(told.value) == line
