"""A run's folder: checkpoints written atomically and read in one place, metrics, what there is to go on with.

A checkpoint is a dict: 'model' (weights), 'config' (of the model), 'tokenizer' (its state), 'settings' (of
train.py), 'iter' (steps done), 'best_val_loss', 'best_iter', 'optimizers', 'scaler', 'fingerprint' (of the
data) and 'infill_rate'. It holds tensors and plain values only, so that reading a stranger's runs no code.
"""

import contextlib
import json
import math
import os
import reprlib
import shlex
import shutil
import zipfile
from dataclasses import fields, replace
from functools import partial
from operator import methodcaller
from pathlib import Path

import torch

from configurator import SettingError, UserError, user_errors
from data.files import lock_folder, report_write_errors, write_atomically
from model import GPT, GPTConfig

FILES = {'last': 'ckpt.pt', 'best': 'best.pt'}
KINDS = {'model': dict, 'config': dict, 'tokenizer': dict | None, 'settings': dict, 'iter': int,
         'best_val_loss': float | int, 'best_iter': int, 'optimizers': list, 'scaler': dict,
         'fingerprint': str, 'infill_rate': float | int}


def load_checkpoint(path):
    """Read a checkpoint. Raises UserError where there is none, it is damaged, or it is not one of ours."""
    if not (path := Path(path)).is_file():
        raise UserError(f'no checkpoint {path}: train first, or name its folder with --out_dir')
    if reason := damage(path):
        raise UserError(f'{path} is damaged or no checkpoint ({reason}){other_checkpoint(path)}')
    with user_errors(path, 'is not a checkpoint of this project, and was not run'):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        for name in KINDS.keys() & {'model', 'config', 'tokenizer', 'settings', 'iter', *checkpoint}:
            value = checkpoint[name]
            if not isinstance(value, KINDS[name]) or (isinstance(value, float | int) and not value >= 0):
                raise ValueError(f'its {name} is {reprlib.repr(value)}')
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


def check_size(config, weights):
    """Raises ValueError where a config claims another number of parameters than the weights have: before a
    model of that size is made. One of two layers tells how many a layer has."""
    for field in fields(config):
        if not isinstance(value := getattr(config, field.name), (type(field.default), int)):
            raise ValueError(f'{field.name} is {value!r}')
    if config.block_size > 2**20:
        raise ValueError(f'block_size is {config.block_size:,}')
    with torch.device('meta'):  # where nothing takes memory
        one, two = (GPT(replace(config, n_layer=n)).n_params() for n in (1, 2))
    claimed = one + (config.n_layer - 1) * (two - one)
    if odd := [name for name, w in weights.items() if not w.is_floating_point()]:
        raise ValueError(f'{odd[0]} has no real numbers')
    there = sum(w.numel() for name, w in weights.items()
                if name != 'lm_head.weight' or not config.tie_embeddings)
    if claimed != there:
        raise ValueError(f'{there:,} parameters where the config has {claimed:,}')


def load_model(checkpoint, device='cpu'):
    """The GPT of a checkpoint, in evaluation mode, on `device`. Raises UserError where it makes none."""
    with user_errors("the checkpoint's config and weights", 'make no model of ours'):
        config = GPTConfig(**checkpoint['config'])
        check_size(config, checkpoint['model'])
        model = GPT(config)
        model.load_state_dict(checkpoint['model'])
    return model.to(device).eval()


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
        with report_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock_folder(self.path, 'wait for it, or name another --out_dir')
            self.check()  # once more: a run may have come and gone since
            for left in self.path.glob('*.tmp'):  # by a run that was killed while it saved
                left.unlink()
            if not self.resume:
                self.save(checkpoint)
                for old in (self.path / FILES['best'], self.path / 'loss.png', *self.path.glob('ckpt_*.pt')):
                    old.unlink(missing_ok=True)
            for name in {'metrics.jsonl', 'samples.jsonl'} & {*os.listdir(self.path)}:
                records = [record for record in self.records(name) if record['iter'] < checkpoint['iter']]
                lines = ''.join(json.dumps(record) + '\n' for record in records).encode()
                write_atomically(self.path / name, methodcaller('write', lines))

    def records(self, name='metrics.jsonl'):
        """The lines of a file, a list of dicts of numbers, and of two texts: without what is not ours."""
        path, records = self.path / name, []
        for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
            with contextlib.suppress(Exception):  # half a line, of a killed run
                record = json.loads(line)
                sound = all(isinstance(value, str) if key in ('prompt', 'story') else math.isfinite(value)
                            for key, value in record.items())
                records += [record] if sound and record['iter'] >= 0 else []
        return records

    def record(self, name='metrics.jsonl', **values):
        """Add a line to a file."""
        with report_write_errors(self.path), open(self.path / name, 'a') as file:
            file.write(json.dumps(values) + '\n')

    def save(self, checkpoint, best=False, keep=False):
        """Save the last checkpoint, if it is the best one that too, and one to keep as ckpt_STEP.pt too."""
        # the last one comes last, as it says how good the best one is
        names = [FILES['best']] * best + [f"ckpt_{checkpoint['iter']}.pt"] * keep + [FILES['last']]
        write_atomically(self.path / names[0], partial(torch.save, checkpoint))
        for name in names[1:]:
            with open(self.path / names[0], 'rb') as file:
                write_atomically(self.path / name, partial(shutil.copyfileobj, file))
