"""How a script ends: its exit status, the one line of a user's mistake, the traceback of a bug."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading

import pytest
import torch

from configurator import SettingError, UserError, run, script_path, user_errors
from tests.helpers.scripts import ROOT

DAMAGED = 'f.bin is damaged or not what it should be'
needs_dev_full = pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full (Linux)')
needs_posix = pytest.mark.skipif(os.name != 'posix', reason='needs a POSIX shell or terminal')


def raising(error):
    """Return a function that raises `error`."""
    def main():
        raise error

    return main


def python(code, **options):
    """Run a Python program, with its output buffered as in a pipe; return it when it has ended."""
    environment = os.environ | {'PYTHONUNBUFFERED': '', 'PYTHONPATH': str(ROOT)} | options.pop('env', {})
    streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE} | options
    return subprocess.run([sys.executable, '-c', code], env=environment, **streams)


# run

@pytest.mark.parametrize(('body', 'status', 'line'), [
    ("raise UserError('no data\\nhere')", 1, 'script.py: no data here\n'),
    ("raise SettingError('wrong')", 2, 'script.py: wrong\n'),
    ("open('no_such/file')", 1, 'script.py: no_such/file: No such file or directory\n'),
    ("raise OSError('bad disk')", 1, 'script.py: bad disk\n'),
    ('import no_such_package.part', 1, 'script.py: this needs a package: pip install no_such_package\n'),
    ('raise MemoryError', 1, 'script.py: out of memory\n'),
    ('raise KeyboardInterrupt', 130, ''),
    ('raise BrokenPipeError', 141, ''),
])
def test_run_ends_in_one_line_and_a_status(monkeypatch, capsys, body, status, line):
    monkeypatch.setattr(sys, 'argv', ['some/script.py'])
    with pytest.raises(SystemExit) as exit:
        run(lambda: exec(body, {'UserError': UserError, 'SettingError': SettingError}))
    assert exit.value.code == status
    assert capsys.readouterr() == ('', line)


@pytest.mark.parametrize(('body', 'error'), [
    ('1 / 0', ZeroDivisionError),
    ('no_such_name', NameError),
    ('import core.no_such_module', ModuleNotFoundError),
    ('import configurator.no_such_module', ModuleNotFoundError),
    ('from core.device import no_such_name', ImportError),
    ('raise SystemExit(7)', SystemExit),
])
def test_run_leaves_a_bug_its_traceback(capsys, body, error):
    with pytest.raises(error):
        run(lambda: exec(body))
    assert capsys.readouterr() == ('', '')


def test_run_shows_the_cause_if_asked_to():
    code = """
import json
from configurator import run, user_errors

def main():
    with user_errors('meta.json'):
        json.loads('{')

run(main)
"""
    line = '-c: meta.json is damaged or not what it should be: Expecting property name'
    plain = python(code, text=True)
    full = python(code, text=True, env={'TRACEBACK': '1'})
    assert (plain.returncode, full.returncode) == (1, 1)
    assert plain.stderr.startswith(line) and plain.stderr.count('\n') == 1
    assert 'json.decoder.JSONDecodeError: ' in full.stderr and 'configurator.UserError: ' in full.stderr
    assert full.stderr.splitlines()[-1].startswith(line)


@pytest.mark.parametrize(('rank', 'calls'), [
    ('0', []),
    ('1', [(signal.SIGTERM, signal.SIG_DFL), 5]),  # waits, and torchrun can end it meanwhile
])
def test_run_lets_rank_0_report_first(monkeypatch, capsys, rank, calls):
    found = []
    monkeypatch.setenv('LOCAL_RANK', rank)
    monkeypatch.setattr('configurator.time.sleep', found.append)
    monkeypatch.setattr('configurator.signal.signal', lambda *args: found.append(args))
    with pytest.raises(SystemExit):
        run(raising(UserError('same on every rank')))
    assert found == calls and 'same on every rank' in capsys.readouterr().err


@pytest.mark.parametrize('error', [
    MemoryError(),
    OSError(errno.ENOMEM, 'Cannot allocate memory'),
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
    RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
    RuntimeError('cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED'),
    RuntimeError('MPS backend out of memory (MPS allocated: 17 GB)'),
    RuntimeError('Invalid buffer size: 19.38 GiB'),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes."),
    RuntimeError('[enforce fail] DefaultCPUAllocator: not enough memory: you tried 9 bytes.')])
def test_run_gives_advice_if_memory_runs_out(monkeypatch, capsys, error):
    monkeypatch.setattr(sys, 'argv', ['some/script.py'])
    with pytest.raises(SystemExit) as exit:
        run(raising(error), lambda: 'halve it')
    assert (exit.value.code, capsys.readouterr().err) == (1, 'script.py: out of memory: halve it\n')


def test_run_takes_no_other_error_for_lack_of_memory():
    with pytest.raises(RuntimeError, match='a bug'):
        run(raising(RuntimeError('a bug')), 'halve it')


# streams

PRINT = "from configurator import run; run(lambda: print('text'))"
FAIL = """
from configurator import UserError, run

def main():
    raise UserError('wrong')

run(main)
"""


@needs_posix
def test_a_reader_that_is_gone_is_not_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = python(PRINT, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b'')


@needs_dev_full
def test_a_full_disk_is_one_line():
    with open('/dev/full', 'w') as full:
        done = python(PRINT, stdout=full)
    assert (done.returncode, done.stderr) == (1, b'-c: No space left on device\n')


@needs_dev_full
def test_help_on_a_full_disk_is_one_line(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('from configurator import configure\nseed = 1\nconfigure(globals())')
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, script, '--help'], stdout=full, stderr=subprocess.PIPE,
                              env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert (done.returncode, done.stderr) == (1, b'script.py: No space left on device\n')


@needs_dev_full
def test_a_full_disk_under_stderr_keeps_the_status():
    with open('/dev/full', 'w') as full:
        assert python(FAIL, stdout=full, stderr=full).returncode == 1


@needs_posix
@pytest.mark.parametrize(('code', 'redirection', 'expected'), [
    (PRINT, '>&-', (0, b'', b'')),
    (PRINT, '2>&-', (0, b'text\n', b'')),
    (FAIL, '>&-', (1, b'', b'-c: wrong\n')),
    (FAIL, '2>&-', (1, b'', b'')),
])
def test_streams_may_be_closed(code, redirection, expected):
    command = f'exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirection}'
    done = subprocess.run(['sh', '-c', command], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == expected


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_pipes_get_utf_8_and_the_bytes_of_file_names(encoding, stream):
    code = f"""
import sys
from configurator import run

run(lambda: print('\\ufffd\\udcff', file=sys.{stream}))
"""
    done = python(code, env={'PYTHONIOENCODING': encoding})
    assert (done.returncode, getattr(done, stream)) == (0, b'\xef\xbf\xbd\xff\n')


@needs_posix
def test_a_terminal_shows_a_question_mark_for_what_it_cannot_show():
    reader, terminal = os.openpty()
    code = "from configurator import run; run(lambda: print('caf\\xe9 \\ufffd'))"
    done = python(code, stdout=terminal, env={'PYTHONIOENCODING': 'ascii'})
    assert (done.returncode, os.read(reader, 100)) == (0, b'caf? ?\r\n')
    os.close(terminal)
    os.close(reader)


def test_a_message_contains_no_escape_codes(capsys):
    with pytest.raises(SystemExit):
        run(raising(UserError('a\x1b[2Jb\x9bc\ud800')))
    assert capsys.readouterr().err.endswith(': a\ufffd[2Jb\ufffdc\ufffd\n')


def test_script_path_leads_to_the_script_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert script_path('train.py') == 'train.py'
    (tmp_path / "a b's").mkdir()
    monkeypatch.chdir(tmp_path / "a b's")
    assert os.path.samefile(shlex.split(script_path('core/device.py'))[0], ROOT / 'core/device.py')


# user_errors

LIBRARY_ERRORS = [
    (ValueError('bad  thing\nin lines'), f'{DAMAGED}: bad thing in lines'),
    (ValueError('x' * 999), f'{DAMAGED}: ' + 'x' * 300),
    (ValueError('\x1b[31mRed.\x1b[0m Set weights_only=False if you trust it.\nBad code 7.'),
     f'{DAMAGED}: Red. Bad code 7.'),
    (KeyError('n_layer'), f"{DAMAGED}: no entry 'n_layer'"),
    (RecursionError(), f'{DAMAGED}: RecursionError'),
    (UserError('as it is'), 'as it is'),
]


@pytest.mark.parametrize('n_wrappers', [0, 1, 2])  # libraries wrap errors in errors of their own
@pytest.mark.parametrize(('error', 'line'), LIBRARY_ERRORS)
def test_user_errors_gives_the_reason_in_one_line(error, line, n_wrappers):
    for _ in range(n_wrappers):
        wrapper = KeyError('wrapper')
        wrapper.__cause__ = error
        error = wrapper
    with pytest.raises(UserError) as raised, user_errors('f.bin'):
        raise error
    assert str(raised.value) == line
    if line != 'as it is':
        assert raised.value.__cause__ is error


def test_user_errors_keeps_a_user_error_whatever_caused_it():
    with pytest.raises(UserError, match=r'^line 7 is wrong$'), user_errors('f.bin'):
        raise UserError('line 7 is wrong') from ValueError('bad byte')


@pytest.mark.parametrize(('read', 'reason'), [
    (lambda: json.loads(5), 'the JSON object must be str'),  # a TypeError
    (lambda: json.load(5), "'int' object has no attribute 'read'"),  # an AttributeError
    (lambda: threading.Thread(group=1), 'group argument must be None'),  # an AssertionError
])
def test_user_errors_reports_errors_that_a_library_raises(read, reason):
    with pytest.raises(UserError, match=f'{DAMAGED}: {reason}'), user_errors('f.bin'):
        read()


def wrapped(bug):
    """Call bug() as a library calls a function of ours, and wrap its error."""
    try:
        bug()
    except Exception as error:
        raise ValueError('generation failed') from error


def unbound():
    if not unbound:
        local = 1
    return local


BUGS = [
    (lambda: no_such_name, NameError),  # noqa: F821
    (unbound, UnboundLocalError),
    (lambda: ''.no_such_method(), AttributeError),
    (lambda: len(5), TypeError),
    (lambda: exec('import core.no_such_module'), ModuleNotFoundError),
    (lambda: exec('from core.device import no_such_name'), ImportError),
]


@pytest.mark.parametrize('call', [lambda bug: bug(), wrapped], ids=['direct', 'wrapped'])
@pytest.mark.parametrize(('bug', 'error'), BUGS)
def test_user_errors_lets_a_bug_of_ours_through(bug, error, call):
    with pytest.raises(error) as raised, user_errors('f.bin'):
        call(bug)
    assert type(raised.value) is error


def test_user_errors_lets_a_failed_assertion_through():
    with pytest.raises(AssertionError), user_errors('f.bin'):
        assert not DAMAGED


def test_a_bug_in_user_errors_ends_a_script_in_its_traceback(tmp_path):
    """The repository may also be reached by a symbolic link."""
    (tmp_path / 'link').symlink_to(ROOT)
    code = """
import data.shards
from configurator import run, user_errors

def main():
    data.shards.json = None  # a bug in a line of ours
    with user_errors('meta.json'):
        data.shards.fingerprint({'splits': {'train': {'shards': []}, 'val': {'shards': []}},
                                 'encoding': 'char', 'vocab_size': 2})

run(main)
"""
    for root in ROOT, tmp_path / 'link':
        done = python(code, text=True, env={'PYTHONPATH': str(root)})
        assert done.returncode == 1 and 'damaged' not in done.stderr
        assert done.stderr.startswith('Traceback') and 'AttributeError' in done.stderr.splitlines()[-1]


@pytest.mark.parametrize('n_wrappers', [0, 1])
@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, 'No space left'), PermissionError(errno.EACCES, 'Permission denied', 'f.bin'),
    OSError(errno.EIO, 'Input/output error'), MemoryError(), OSError(errno.ENOMEM, 'Cannot allocate memory'),
    ModuleNotFoundError('no package', name='package')])
def test_user_errors_does_not_blame_the_file_for_the_machine(error, n_wrappers):
    wrapper = RuntimeError('generation failed')
    wrapper.__cause__ = error
    with pytest.raises(type(error)) as raised, user_errors('f.bin'):
        raise wrapper if n_wrappers else error
    assert raised.value is error
