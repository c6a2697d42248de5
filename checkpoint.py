"""A run's folder: checkpoints written atomically and read in one place, metrics, what there is to go on with.

A checkpoint is a dict: 'model' (weights), 'config' (of the model), 'tokenizer' (its state), 'settings' (of
train.py), 'iter' (steps done), 'best_val_loss', 'best_iter', 'optimizers', 'scaler', 'fingerprint' (of the
data) and 'infill_rate'. It holds tensors and plain values only, so that reading a stranger's runs no code.
"""

import contextlib
import json
import os
import shlex
import shutil
import zipfile
from functools import partial
from operator import methodcaller
from pathlib import Path

import torch

from errors import SettingError, UserError, reading
from locking import lock
from model import GPT, GPTConfig

FILES = {'last': 'ckpt.pt', 'best': 'best.pt'}


@contextlib.contextmanager
def written(path):
    """UserError where the disk does not take what is written to `path` in here."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save hides the former behind the latter
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f'cannot write {path} ({cause.strerror or cause}); what was saved before is whole: '
                        'make room or name another --out_dir, then go on with --init_from resume') from None


def write_whole(path, write):
    """write(file) to `path`, whole or not at all: what was there stays until the new file is on disk.
    Raises UserError where the disk does not take it."""
    temporary = path.with_name(path.name + '.tmp')
    try:
        with written(path), open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == 'posix':  # so that the new name outlives a power cut; Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path):
    """Read a checkpoint. Raises UserError where there is none, it is damaged, or it is not one of ours."""
    if not (path := Path(path)).is_file():
        raise UserError(f'no checkpoint {path}: train first, or name its folder with --out_dir')
    if reason := damage(path):
        raise UserError(f'{path} is damaged or no checkpoint ({reason}){other_checkpoint(path)}')
    with reading(path, 'is not a checkpoint of this project, and was not run'):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    if missing := {'model', 'config', 'tokenizer', 'settings', 'iter'} - set(checkpoint):
        raise UserError(f"{path} is not a checkpoint of this project: it has no {', '.join(sorted(missing))}")
    return checkpoint


def damage(path):
    """What is wrong with the file itself, '' if nothing is: torch.load does not look at the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        return f'{wrong} does not have its checksum' if wrong else ''
    except Exception as error:  # what is no archive, or half a one, fails in many ways
        return str(error) or type(error).__name__


def other_checkpoint(path):
    """What to use instead of a damaged checkpoint, to end a message with."""
    other = path.with_name('best.pt' if path.name == 'ckpt.pt' else 'ckpt.pt')
    if path.name not in FILES.values() or not other.is_file() or damage(other):
        return ''
    copy = shlex.join(['cp', str(other), str(path)])
    return f'; {other} is whole: ' + ('use it with --ckpt last' if path.name == 'best.pt' else f'type {copy}')


def load_model(checkpoint, device='cpu'):
    """The GPT of a checkpoint, in evaluation mode, on `device`. Raises UserError where it makes none."""
    with reading("the checkpoint's config and weights", 'make no model of ours'):
        model = GPT(GPTConfig(**checkpoint['config']))
        model.load_state_dict(checkpoint['model'])
    return model.to(device).eval()


def prepared_folder(dataset):
    """The path that a `dataset` setting means: itself, or a folder under data/."""
    return Path(dataset) if Path(dataset).is_dir() else Path(__file__).parent / 'data' / dataset


class RunFolder:
    """The `out_dir` of a run that trains: ckpt.pt (last), best.pt, ckpt_STEP.pt, metrics.jsonl,
    samples.jsonl; and what progress.py draws and writes of them."""

    def __init__(self, path, resume=False, overwrite=False):
        """Raises SettingError where it holds a run that nobody has said to go on with or to replace."""
        self.path, again = Path(path), os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0'
        # torchrun --max-restarts starts the same command again
        self.resume = resume or (again and (self.path / FILES['last']).exists())
        self.overwrite = overwrite
        self.check()

    def check(self):
        there = any((self.path / name).exists() for name in (*FILES.values(), 'metrics.jsonl'))
        if there and not (self.resume or self.overwrite):
            raise SettingError(f'{self.path} holds another run: go on with it (--init_from resume), replace '
                               'it (--overwrite), or name another folder (--out_dir)')

    def begin(self, checkpoint):
        """Until here there is the old run to go on with, from here on this one, at `checkpoint`. Raises
        UserError where another process trains in the folder."""
        with written(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock(self.path, 'wait for it, or name another --out_dir')
            self.check()  # once more: a run may have come and gone since
            for left in self.path.glob('*.tmp'):  # by a run that was killed while it saved
                left.unlink()
            if not self.resume:
                self.save(checkpoint)
                for old in (self.path / FILES['best'], self.path / 'loss.png', *self.path.glob('ckpt_*.pt')):
                    old.unlink(missing_ok=True)
            for name in 'metrics.jsonl', 'samples.jsonl':
                records = [record for record in self.records(name) if record['iter'] < checkpoint['iter']]
                lines = ''.join(json.dumps(record) + '\n' for record in records).encode()
                write_whole(self.path / name, methodcaller('write', lines))

    def records(self, name='metrics.jsonl'):
        """The lines of a file, a list of dicts."""
        path, records = self.path / name, []
        for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, of a killed run
                record = json.loads(line)
                records += [record] if record['iter'] >= 0 else []
        return records

    def record(self, name='metrics.jsonl', **values):
        """Add a line to a file."""
        with written(self.path), open(self.path / name, 'a') as file:
            file.write(json.dumps(values) + '\n')

    def save(self, checkpoint, best=False, keep=False):
        """Save the last checkpoint, if it is the best one that too, and one to keep as ckpt_STEP.pt too."""
        # the last one comes last, as it says how good the best one is
        names = [FILES['best']] * best + [f"ckpt_{checkpoint['iter']}.pt"] * keep + [FILES['last']]
        write_whole(self.path / names[0], partial(torch.save, checkpoint))
        for name in names[1:]:
            with open(self.path / names[0], 'rb') as file:
                write_whole(self.path / name, partial(shutil.copyfileobj, file))
