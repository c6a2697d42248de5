"""One self-contained checkpoint: written atomically, read in one place, tensors and plain values only.

A checkpoint is a dict: 'model' (weights), 'config' (of the model), 'tokenizer' (its state), 'settings' (of
train.py), 'iter' (steps done), 'best_val_loss', 'optimizers', 'scaler', and 'fingerprint' (of the data).
"""

import os
import zipfile
from pathlib import Path

import torch

from configurator import UserError
from model import GPT, GPTConfig


def save_checkpoint(path, checkpoint):
    """Write `checkpoint` to `path`, whole or not at all: what was there stays until the new file is on the disk."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        damaged = error
    if damaged:
        raise UserError(f'{path} is damaged or no checkpoint ({damaged}){other_checkpoints(path)}')
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except Exception as error:  # weights_only refuses anything but tensors and plain values, in many ways
        reason = str(error).strip().splitlines()[0]
        raise UserError(f'{path} is not a checkpoint of this project, and was not run: {reason}') from None
    missing = {'model', 'config', 'tokenizer', 'settings', 'iter'} - set(checkpoint)
    if missing:
        raise UserError(f"{path} is not a checkpoint of this project: it has no {', '.join(sorted(missing))}")
    return checkpoint


def other_checkpoints(path):
    """What else could be gone on from, to end a message with."""
    others = [name for name in ('ckpt.pt', 'best.pt') if name != path.name and (path.parent / name).is_file()]
    return f"; {' and '.join(str(path.parent / name) for name in others)} may be whole" if others else ''


def load_model(checkpoint, device='cpu'):
    """The GPT of a checkpoint, in evaluation mode, on `device`."""
    model = GPT(GPTConfig(**checkpoint['config']))
    model.load_state_dict(checkpoint['model'])
    return model.to(device).eval()
