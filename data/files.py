"""Safe writing: files that are written whole or not at all, and one process at a time per folder."""

import contextlib
import glob
import os
import re
import reprlib
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock, Timeout

from configurator import UserError, out_of_memory


def lock_folder(folder, advice):
    """Lock `folder` for this process and return the lock, a context manager that releases it.

    Keep what is returned: the lock ends when it is deleted, and with the process, however that ends. The file
    `.lock` stays in the folder; it does not matter.
    Raises UserError, which ends in `advice`, if another process holds the lock.
    """
    try:
        return FileLock(Path(folder, '.lock')).acquire(blocking=False)
    except Timeout:
        raise UserError(f'{folder} is in use by another process: {advice}') from None


@contextlib.contextmanager
def report_write_errors(path, flag='--out_dir'):
    """Turn an error while writing to `path` (disk full, read-only, folder gone) into a UserError.

    flag: the setting with which a user names another place.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = write_error(error)
        if not reason or out_of_memory(error):
            raise
        obstacle = find_obstacle(error)
        advice = f'name another {flag}; what was saved before is whole'
        if obstacle:
            reason = obstacle
            advice = f'name another {flag}'
        elif folder_is_gone(error):
            advice = 'the folder was removed or renamed while in use'
        elif re.search('space|quota|room|too large', reason, re.IGNORECASE):
            advice = f'free some space or {advice}'
        raise UserError(f'cannot write {path} ({reason}): {advice}') from error


@contextlib.contextmanager
def report_read_errors(*written):
    """Turn an error of the system about a file, except in the folders `written`, into a UserError.

    Work within report_write_errors that also reads other files needs this: else an error of reading would be
    reported as one of writing.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if not isinstance(name, str) or any(Path(name).is_relative_to(folder) for folder in written):
            raise
        raise UserError(f'{name}: {error.strerror}') from error


def write_error(error):
    """Return why the file system refused to write, or '' if `error` has another cause.

    torch.save raises an error of its own while it handles an OSError; libraries in Rust only quote it.
    """
    quoted = re.search(r'([\w ]+) \(os error \d+\)', str(error))
    if quoted:
        return quoted[1].strip()
    for cause in error, error.__context__:
        if isinstance(cause, OSError):
            return cause.strerror or f'no room: {cause}'
    return ''


def find_obstacle(error):
    """Return in words what stands where a folder is needed, '' if nothing does."""
    for cause in error, error.__context__:
        if isinstance(cause, (FileExistsError, NotADirectoryError, FileNotFoundError)) and cause.filename:
            return describe_obstacle(Path(cause.filename))
    return ''


def describe_obstacle(path):
    """Return in words what stands where `path` needs a folder, '' if nothing does.

    Example: 'out is a link to /mnt/disk/out, which does not exist'
    """
    for place in path, *path.parents:
        if os.path.islink(place) and not os.path.exists(place):
            return f'{place} is a link to {os.readlink(place)}, which does not exist'
        if os.path.isfile(place):
            return f'{place} is a file, not a folder'
    return ''


def folder_is_gone(error):
    """Return whether a file could not be written because its folder no longer exists."""
    for cause in error, error.__context__:
        if isinstance(cause, FileNotFoundError) and cause.filename is not None:
            return not Path(cause.filename).parent.exists()
    return False


@contextlib.contextmanager
def plain_path(folder):
    """Yield a path of `folder` that a library takes for this path, and not for a pattern or an address.

    The datasets library takes one with :: for a chain of addresses, and would write somewhere else.
    """
    folder = folder.absolute()  # data:x is an address, and /home/data:x is none
    if '::' not in str(folder) and glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary, 'folder')
        link.symlink_to(folder, target_is_directory=True)
        yield link


def plain_name(name):
    """Return the name of a file or folder. Raises ValueError if it is a path to somewhere else."""
    if not isinstance(name, str) or name in ('', '..') or name != Path(name).name:
        raise ValueError(f'{reprlib.repr(name)} is not a plain name')
    return name


def unfinished_name(path):
    """Return the name of what will be `path` while it is written. No other program uses such names."""
    return f'.{path.name}.unfinished'


def write_atomically(path, write, flag='--out_dir'):
    """Call write(file) and put the result at `path`, whole or not at all.

    The previous file stays until the new one is on disk. flag: the setting with which a user names another
    place. Raises UserError if it cannot be written.
    """
    temporary = path.with_name(unfinished_name(path))
    with report_write_errors(path, flag):
        try:
            temporary.unlink(missing_ok=True)  # left by a process that was killed
            with open(temporary, 'xb') as file:  # x: a link that somebody put there is not followed
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if os.name == 'posix':  # so that the new name survives a power cut; Windows cannot open a folder
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes_atomically(path, data, flag='--out_dir'):
    """Put `data` at `path`, whole or not at all, as `write_atomically` does."""

    def write(file):
        file.write(data)

    write_atomically(path, write, flag)


# what stands in for a file --------------------------------------------------------

DOWNLOAD_AGAIN = 'the download failed, so download it again'
# How a stand-in begins, without regard to case: (pattern, what it is, how to get the file itself)
STAND_INS = [
    (rb'version https://git-lfs\.github\.com/spec/', 'a Git LFS pointer',
     'type git lfs pull in its folder, or download the file with hf download'),
    (rb'/annex/objects/', 'a git-annex pointer', 'type git annex get and its name'),
    (rb'(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype html|html)\b', 'an HTML page',
     'the download gave an error or a login page, so download it again'),
    (rb'(<\?xml[^>]*>\s*)?<error>', "a storage service's error", DOWNLOAD_AGAIN),
    # what GitHub and the Hugging Face hub send instead of a file, and nothing else
    (rb'(404: not found|(entry|repository|revision|file) not found|invalid username or password\.?'
     rb'|access to (model|dataset) \S+ is restricted.{,300}|\{"error":"[^"]{,300}"\})\s*\Z',
     'the answer of a server', DOWNLOAD_AGAIN),
]


def refuse_stand_in(path):
    """Raise UserError if a file only stands in for the one that was meant.

    Such are the pointer that git leaves without its LFS extension, and the page of a download that failed.
    """
    with open(path, 'rb') as file:
        start = file.read(1024)
    start = start.removeprefix(b'\xef\xbb\xbf').lstrip()
    for pattern, what, advice in STAND_INS:
        if re.match(pattern, start, re.IGNORECASE | re.DOTALL):
            raise UserError(f'{path} is {what}, not the file itself: {advice}')


def check_stored(archive):
    """Raise ValueError unless each record of a ZipFile is stored as it is, in a place of its own.

    torch maps records into memory, and would take the bytes of a compressed one for weights. And a small
    archive could hold records of any size.
    """
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f'{record.filename} is compressed: torch.save stores records as they are')
    size = os.path.getsize(archive.filename)
    n_bytes = sum(record.file_size for record in archive.infolist())
    if n_bytes > size:
        raise ValueError(f'it has {size:,} bytes, and records of {n_bytes:,}')
