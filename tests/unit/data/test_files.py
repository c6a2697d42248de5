"""One process at a time in a folder; what the disk does not take."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from configurator import UserError
from core.checkpoint import RunFolder, load_checkpoint
from data.files import lock_folder, report_write_errors
from tests.helpers.scripts import ROOT, Script, script


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path, until it is killed or reads a line."""
    code = f'import files; files.lock_folder({str(tmp_path)!r}, ""); print(0, flush=True); input()'
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_told_of_the_first(holder, tmp_path):
    with pytest.raises(UserError, match=f'{tmp_path} is in use by process {holder.pid} of .*: wait$'):
        lock_folder(tmp_path, 'wait')
    with pytest.raises(UserError, match='is in use'):
        RunFolder(tmp_path).begin({'iter': 0})
    assert os.listdir(tmp_path) == ['.lock']


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_death_frees_it(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    assert os.listdir(tmp_path) == ['.lock']  # which is stale
    with lock_folder(tmp_path, ''):
        assert (tmp_path / '.lock').read_text().startswith(f'{os.getpid()} of ')
    assert not os.listdir(tmp_path)


def test_an_end_leaves_nothing(holder, tmp_path):
    holder.communicate(b'\n')
    assert not os.listdir(tmp_path)


def test_a_lock_that_was_removed_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """Between the opening and the files of the file: another process's lock would be on another file."""
    opened, real = [], open

    def slow(path, mode, **opener):
        opened.append(real(path, mode, **opener))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr('builtins.open', slow)
    with lock_folder(tmp_path, ''):
        assert len(opened) == 2 and (tmp_path / '.lock').stat().st_ino == os.fstat(opened[1].fileno()).st_ino


def test_a_folder_that_cannot_be_locked_is_used_with_a_word(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, 'Function not implemented')

    monkeypatch.setattr('files.lockf', refuse)
    with lock_folder(tmp_path, ''):
        assert 'cannot be locked (Function not implemented)' in capsys.readouterr().err


def test_a_second_run_is_refused_and_the_first_stays_whole(data, tmp_path):
    words = ['train.py', f'--dataset={data}', f'--out_dir={tmp_path}/out', '--device=cpu', '--n_layer=1',
             '--n_embd=16', '--n_head=2', '--block_size=16', '--eval_interval=5']
    first = Script(*words, '--max_iters=100000')
    first.wait_for('step 5:')
    for flags in ['--overwrite'], ['--init_from=resume']:
        second = script(*words[:4], *flags, status=1)
        assert second.err.startswith(f'train.py: {tmp_path}/out is in use by process {first.process.pid} of ')
    script('sample.py', f'--out_dir={tmp_path}/out', '--num_samples=1', '--max_new_tokens=5', '--device=cpu')
    first.process.terminate()
    first.finish(143)
    assert load_checkpoint(tmp_path / 'out' / 'ckpt.pt')['iter'] >= 5


def test_two_that_prepare(holder, tmp_path):
    done = script('data/tiny_stories/prepare.py', '--source=sample', f'--out_dir={tmp_path}', status=1)
    assert f'{tmp_path} is in use by process {holder.pid}' in done.err
    assert os.listdir(tmp_path) == ['.lock']


@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, 'No space left on device'),
    RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)')], ids=repr)
def test_a_full_disk_is_told_in_whatever_words_it_comes(error):
    told = r'^cannot write out/a \(No space left on device\): make room or name another --path; what was'
    with pytest.raises(UserError, match=told), report_write_errors('out/a', '--path'):
        raise error
    with pytest.raises(RuntimeError, match='a bug'), report_write_errors('out/a'):
        raise RuntimeError('a bug')
