"""One self-contained checkpoint: written atomically, read in one place, tensors and plain values only.

A checkpoint is a dict: 'model' (weights), 'config' (of the model), 'tokenizer' (its state), 'settings' (of
train.py), 'iter' (steps done), 'best_val_loss', 'optimizers', 'scaler', and 'fingerprint' (of the data).
"""

import os
import shlex
import zipfile
import zlib
from pathlib import Path

import torch

from configurator import UserError
from model import GPT, GPTConfig


def save_checkpoint(path, checkpoint):
    """Write `checkpoint` to `path`, whole or not at all: what was there stays until the new file is on disk.

    Raises UserError where the disk does not take it.
    """
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save hides what writing to a full disk raised behind an error of its own
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):
            raise UserError(f'cannot save {path} ({cause.strerror or cause}): what was saved there before is '
                            'whole; make room, then go on with --init_from resume') from None
        raise


def sync_folder(folder):
    """Make renames in `folder` outlive a power cut, where the system can (Windows cannot open a folder)."""
    if os.name == 'posix':
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_checkpoint(path, device='cpu'):
    """Read a checkpoint. Raises UserError where there is none, it is damaged, or it is not one of ours."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f'no checkpoint {path}: train first, or name its folder with --out_dir')
    if reason := damage(path):
        raise UserError(f'{path} is damaged or no checkpoint ({reason}){other_checkpoint(path)}')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # weights_only refuses anything but tensors and plain values, in many ways
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'{path} is not a checkpoint of this project, and was not run: {reason}') from None
    missing = {'model', 'config', 'tokenizer', 'settings', 'iter'} - set(checkpoint)
    if missing:
        raise UserError(f"{path} is not a checkpoint of this project: it has no {', '.join(sorted(missing))}")
    return checkpoint


def damage(path):
    """What is wrong with the file itself, '' if nothing is: torch.load does not look at the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        return f'{wrong} does not have its checksum' if wrong else ''
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        return str(error) or type(error).__name__


def other_checkpoint(path):
    """What to use instead of a damaged checkpoint, to end a message with."""
    other = path.with_name({'ckpt.pt': 'best.pt', 'best.pt': 'ckpt.pt'}.get(path.name, path.name))
    if other == path or not other.is_file() or damage(other):
        return ''
    if other.name == 'ckpt.pt':
        return f'; {other} is whole: use it with --ckpt last'
    return f'; {other} is whole: to go on from it, type: {shlex.join(["cp", str(other), str(path)])}'


def load_model(checkpoint, device='cpu'):
    """The GPT of a checkpoint, in evaluation mode, on `device`. Raises UserError where it makes none."""
    try:
        model = GPT(GPTConfig(**checkpoint['config']))
        model.load_state_dict(checkpoint['model'])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f"the checkpoint's config and weights make no model of ours ({reason}): take another "
                        'checkpoint, or train anew') from None
    return model.to(device).eval()
