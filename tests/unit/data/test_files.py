"""Files: one process at a time in a folder, files that are written whole or not at all."""

import builtins
import errno
import glob
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import UserError
from data.files import (
    lock_folder,
    plain_name,
    plain_path,
    report_write_errors,
    write_atomically,
    write_bytes_atomically,
)
from tests.helpers.scripts import ROOT


@pytest.fixture
def holder(tmp_path):
    """Return a process that has locked tmp_path, until it is killed or reads a line."""
    code = ('from data.files import lock_folder\n'
            f'lock = lock_folder({str(tmp_path)!r}, "")\n'
            'print("locked", flush=True)\n'
            'input()')
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'locked\n'
    yield process
    process.kill()
    process.wait()


def test_lock_folder_refuses_a_folder_in_use(holder, tmp_path):
    with pytest.raises(UserError, match=f'{tmp_path} is in use by another process: wait$'):
        lock_folder(tmp_path, 'wait')


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_lock_ends_with_its_process(holder, tmp_path, number):
    holder.send_signal(number)
    holder.wait()
    assert os.listdir(tmp_path) == ['.lock']
    with lock_folder(tmp_path, ''):
        pass


def test_lock_can_be_taken_again_after_its_context(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path, ''):
            assert os.listdir(tmp_path) == ['.lock']


@pytest.mark.parametrize('error', [
    OSError(errno.ENOSPC, 'No space left on device'),
    RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)')], ids=repr)
def test_report_write_errors_reports_a_full_disk(error):
    line = r'^cannot write out/a \(No space left on device\): free some space or name another --path; what'
    with pytest.raises(UserError, match=line), report_write_errors('out/a', '--path'):
        raise error


def test_report_write_errors_passes_bugs_through():
    with pytest.raises(RuntimeError, match='a bug'), report_write_errors('out/a'):
        raise RuntimeError('a bug')


def test_write_atomically_keeps_the_old_file_if_writing_fails(tmp_path):
    path = tmp_path / 'a'
    write_atomically(path, lambda file: file.write(b'old'))

    def fail(file):
        file.write(b'new')
        raise OSError(errno.ENOSPC, 'No space left on device')

    with pytest.raises(UserError, match='cannot write'):
        write_atomically(path, fail)
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['a']


def test_write_atomically_does_not_follow_a_link_in_place_of_its_temporary_file(tmp_path):
    (tmp_path / 'thesis').write_text('mine')
    (tmp_path / '.a.unfinished').symlink_to(tmp_path / 'thesis')
    write_atomically(tmp_path / 'a', lambda file: file.write(b'new'))
    assert (tmp_path / 'thesis').read_text() == 'mine'
    assert (tmp_path / 'a').read_bytes() == b'new' and not (tmp_path / 'a').is_symlink()
    assert sorted(os.listdir(tmp_path)) == ['a', 'thesis']


def test_write_atomically_leaves_other_files_alone(tmp_path):
    names = 'a.tmp', '.a.tmp', 'a.unfinished', 'a~'
    for name in names:
        (tmp_path / name).write_text('mine')
    write_bytes_atomically(tmp_path / 'a', b'new')
    assert (tmp_path / 'a').read_bytes() == b'new'
    assert [(tmp_path / name).read_text() for name in names] == 4 * ['mine']


@pytest.mark.parametrize('name', ['unlink', 'open', 'fsync', 'replace'])
def test_write_atomically_names_the_setting_wherever_writing_fails(tmp_path, monkeypatch, name):
    """On a file system that is read-only even the removal of a file that is not there fails."""
    def fail(*_, **__):
        raise OSError(errno.EROFS, 'Read-only file system')

    monkeypatch.setattr(builtins if name == 'open' else os, name, fail)
    line = r'cannot write .*/a \(Read-only file system\): name another --path; what'
    with pytest.raises(UserError, match=line):
        write_bytes_atomically(tmp_path / 'a', b'new', '--path')


def test_plain_name_is_no_path_to_somewhere_else():
    assert plain_name('train') == 'train' and plain_name('data-00000.arrow') == 'data-00000.arrow'
    for name in '', '.', '..', 'a/b', '/a', '../a', 'a/', None, 3:
        with pytest.raises(ValueError, match='is not a plain name'):
            plain_name(name)


@pytest.mark.parametrize('name, message', [
    ('file', r'file is a file, not a folder\): name another --out_dir$'),
    ('file/run', r'file is a file, not a folder\): name another --out_dir$'),
    ('dangling', r'dangling is a link to /nowhere, which does not exist\): name another --out_dir$'),
    ('dangling/run', r'dangling is a link to /nowhere, which does not exist\): name')])
def test_report_write_errors_says_what_stands_in_the_way(tmp_path, name, message):
    (tmp_path / 'file').touch()
    (tmp_path / 'dangling').symlink_to('/nowhere')
    with pytest.raises(UserError, match=message), report_write_errors(tmp_path / name):
        (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message), report_write_errors(tmp_path / name):
        (tmp_path / name / 'best.pt').write_text('')


def test_report_write_errors_asks_for_room_only_if_there_is_none():
    line = r'\(Permission denied\): name another --out_dir; what was saved'
    with pytest.raises(UserError, match=line), report_write_errors('out/a'):
        raise PermissionError(errno.EACCES, 'Permission denied', 'out/a')


def test_report_write_errors_tells_a_removed_folder_from_one_that_cannot_be_made(tmp_path):
    with pytest.raises(UserError, match='was removed or renamed'), report_write_errors('out'):
        (tmp_path / 'gone' / 'file').write_text('')
    with pytest.raises(UserError, match='name another --out_dir'), report_write_errors('out'):
        (tmp_path / 'file').touch()
        (tmp_path / 'file' / 'folder').mkdir()


@pytest.mark.parametrize('name', ['plain', 'odd ::a', 'a[1]', 'b*', 'c?', 'data:x'])
def test_plain_path_leads_to_the_folder_and_is_no_pattern_and_no_address(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    with plain_path(Path(name)) as path:
        (path / 'file').write_text('x')
        assert path.is_absolute() and glob.escape(str(path)) == str(path) and '::' not in str(path)
        assert (path == tmp_path / name) == (name in ('plain', 'data:x'))
    assert (tmp_path / name / 'file').read_text() == 'x'
    assert path.exists() == (name in ('plain', 'data:x'))
