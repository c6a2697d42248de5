"""Token shards, flat little-endian uint16 files that are one stream: write them, map them, serve batches."""

import bisect
import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from configurator import SettingError, UserError, user_errors
from data.files import lock_folder

SHARD_TOKENS = 100_000_000
SPLITS = 'train', 'val'
PREPARED = re.compile(r'(train|val)_\d{5}\.bin|tokenizer\.(json|model|tiktoken)')  # what prepare.py writes
PREPARE = 'run data/tiny_stories/prepare.py, or name a prepared folder with --dataset'


class ShardWriter:
    """Writes one split's tokens to `folder/SPLIT_00000.bin, ...`, at most `shard_tokens` each."""

    def __init__(self, folder, split, shard_tokens=SHARD_TOKENS):
        self.folder, self.split, self.shard_tokens = Path(folder), split, shard_tokens
        self.shards = []  # what meta.json says of each, but for the hash, which is not finished

    def write(self, tokens):
        """Append `tokens`, a 1-D uint16 array."""
        while len(tokens):
            if not self.shards or self.shards[-1]['tokens'] == self.shard_tokens:
                name = f'{self.split}_{len(self.shards):05d}.bin'
                self.shards.append({'name': name, 'tokens': 0, 'sha256': hashlib.sha256()})
            shard = self.shards[-1]
            head, tokens = np.split(tokens, [self.shard_tokens - shard['tokens']])
            data = head.astype('<u2', copy=False).tobytes()
            with open(self.folder / shard['name'], 'ab' if shard['tokens'] else 'wb') as file:
                file.write(data)
            shard['sha256'].update(data)
            shard['tokens'] += len(head)

    def close(self):
        """What meta.json says of the shards: a list of {name, tokens, sha256}."""
        return [shard | {'sha256': shard['sha256'].hexdigest()} for shard in self.shards]


def is_count(value):
    return isinstance(value, int) and 0 < value < 2**63


def read_meta(folder):
    """The meta.json of a prepared folder, a dict. Raises UserError where there is none or it is damaged."""
    path = Path(folder) / 'meta.json'
    if not path.is_file():
        raise UserError(f'{folder} holds no prepared data (no meta.json): {PREPARE}')
    with user_errors(path, f'is damaged ({PREPARE})'):
        meta = json.loads(path.read_text(encoding='utf-8'))
        for split in SPLITS:
            for shard in meta['splits'][split]['shards']:
                if Path(shard['name']).name != shard['name']:
                    raise UserError(f"{path}: shard name {shard['name']!r} is not a plain file name")
                if not (is_count(shard['tokens']) and isinstance(shard['sha256'], str)):
                    raise ValueError(f"{shard['name']} has no tokens or no hash")
            if not is_count(meta['splits'][split]['bytes']):
                raise ValueError(f'{split} has no text')
        ids = [meta[name] for name in ('delimiter', 'blank', 'middle') if name in meta]
        if not (isinstance(meta['encoding'], str) and all(map(is_count, (meta['vocab_size'], *ids)))):
            raise ValueError('encoding, vocab_size or a special id')
        if not 0 <= meta.get('infill_rate', 0) <= 1:
            raise ValueError(f"infill_rate {meta['infill_rate']}")
    return meta


def fingerprint(meta):
    """Hex digest that names the data: it changes when any token of any shard does."""
    hashes = [shard['sha256'] for split in SPLITS for shard in meta['splits'][split]['shards']]
    return hashlib.sha256(json.dumps([meta['encoding'], meta['vocab_size'], hashes]).encode()).hexdigest()


class Split:
    """One split of a prepared folder: its memory-mapped shards as one stream of `n_tokens` tokens."""

    def __init__(self, folder, split, verify=False):
        """Raises UserError where the shards are not as meta.json says: their lengths, and if `verify` their
        hashes."""
        self.folder, self.meta = Path(folder), read_meta(folder)
        info = self.meta['splits'][split]
        self.n_bytes = info['bytes']
        self.names = [shard['name'] for shard in info['shards']]
        self.maps, self.shards, self.starts, self.n_tokens = [], [], [], 0
        for shard in info['shards']:
            path = self.folder / shard['name']
            if not path.is_file():
                raise UserError(f'{path} is missing, though meta.json names it: {PREPARE}')
            if (size := path.stat().st_size) != 2 * shard['tokens']:
                raise UserError(f"{path} has {size:,} bytes for {shard['tokens']:,} tokens of 2: {PREPARE}")
            with open(path, 'rb') as file:
                self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self.shards.append(np.frombuffer(self.maps[-1], '<u2'))
            if verify and hashlib.sha256(self.shards[-1]).hexdigest() != shard['sha256']:
                raise UserError(f'{path} does not have the sha256 that meta.json says: {PREPARE}')
            self.starts.append(self.n_tokens)
            self.n_tokens += shard['tokens']
        if self.n_tokens < 2:
            raise UserError(f'{self.folder} has no {split} token to predict: {PREPARE}')

    def read(self, start, length):
        """Tokens start to start + length of the stream, as a uint16 array; fewer at its end."""
        parts = []
        i = bisect.bisect_right(self.starts, start) - 1
        while length > 0 and i < len(self.shards):
            offset = start - self.starts[i]
            if self.maps[i].size() != self.shards[i].nbytes:  # what is gone cannot be read: a bus error
                raise UserError(f'{self.folder / self.names[i]} has changed its length meanwhile: {PREPARE}')
            part = self.shards[i][offset:offset + length]
            if len(part) and part.max() >= self.meta['vocab_size']:
                raise UserError(f"{self.folder / self.names[i]} has token {part.max()}, beyond the "
                                f"vocabulary of {self.meta['vocab_size']}: {PREPARE}")
            parts.append(part)
            start, length, i = start + len(part), length - len(part), i + 1
        return np.concatenate(parts)

    def windows(self, starts, block_size):
        """Inputs and targets of windows: the tokens from each of `starts` on, and one further.

        Returns int64 arrays x, y of shape (len(starts), block_size). Targets beyond the end of the split
        are -1, which the loss ignores.
        """
        xy = np.full((len(starts), block_size + 1), -1, dtype=np.int64)
        for row, start in zip(xy, starts, strict=True):
            tokens = self.read(int(start), block_size + 1)
            row[:len(tokens)] = tokens
        return np.maximum(xy[:, :-1], 0), xy[:, 1:]


class Batches:
    """The training batches of one rank: a pure function of the step.

    Each epoch is a seeded permutation of all windows, the first one from the stream's first token on, each
    later one from a seeded token below block_size, so that no two cut the stories alike. The global batch of
    step s is sequences s * sequences to (s + 1) * sequences of that endless stream of windows, whatever the
    number of ranks. A rank takes its share in `grad_accum_steps` micro-batches, none larger than batch_size.
    """

    def __init__(self, split, block_size, batch_size, accumulation_steps, seed, rank=0, world_size=1):
        """Raises SettingError where the ranks cannot share a step, UserError for too little text."""
        self.split, self.block_size, self.seed = split, block_size, seed
        self.global_batch_size = batch_size * accumulation_steps
        self.grad_accum_steps = math.ceil(accumulation_steps / world_size)
        unit = world_size * self.grad_accum_steps
        if self.global_batch_size % unit:
            below = self.global_batch_size // unit * unit
            nearest = ' or '.join(str(n) for n in (below, below + unit) if n)
            raise SettingError(f'{self.global_batch_size} sequences a step (batch_size {batch_size} * '
                               f'gradient_accumulation_steps {accumulation_steps}) do not divide among '
                               f'{world_size} ranks with {self.grad_accum_steps} micro-batches each; the nearest: '
                               + nearest)
        self.n_windows = (split.n_tokens - 1) // block_size
        if self.n_windows < 1:
            raise UserError(f'{split.folder} has {split.n_tokens:,} training tokens, fewer than one window '
                            f'of {block_size} and its target: prepare more text or lower --block_size')
        share = self.global_batch_size // world_size
        self.rows = slice(rank * share, (rank + 1) * share)
        self.epoch, self.order = -1, None  # the tokens that the windows of an epoch start at

    def starts(self, step):
        """The tokens that the windows of the global batch of `step` start at, an int array (sequences,)."""
        position = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        out = np.empty(self.global_batch_size, dtype=np.int64)
        for epoch in np.unique(position // self.n_windows):
            if epoch != self.epoch:
                self.epoch, rng = epoch, np.random.default_rng((self.seed, epoch))
                self.order = rng.permutation(self.n_windows) * self.block_size
                self.order += rng.integers(self.block_size) if epoch else 0
            here = position // self.n_windows == epoch
            out[here] = self.order[position[here] % self.n_windows]
        return out

    def __call__(self, step):
        """This rank's micro-batches of `step`: a list of (inputs, targets), int64 (B, block_size) each."""
        xy = self.split.windows(self.starts(step)[self.rows], self.block_size)
        return list(zip(*(np.split(a, self.grad_accum_steps) for a in xy), strict=True))

    def from_step(self, step):
        """Yields the micro-batches of `step` and all that follow, each read while those before are used."""
        with ThreadPoolExecutor(1) as loader:
            coming = loader.submit(self, step)
            for following in itertools.count(step + 1):
                ready, coming = coming.result(), loader.submit(self, following)
                yield ready


# prepared folders -------------------------------------------------------------

def prepared_folder(dataset):
    """Return the folder that a `dataset` setting means: the path itself, or a folder under data/."""
    if Path(dataset).is_dir():
        return Path(dataset)
    return Path(__file__).parent / dataset


@contextlib.contextmanager
def write_dataset_atomically(folder):
    """Yield temporary folders (new, cache). If all goes well, the files in `new` replace the prepared data.

    meta.json is deleted first and written last, so it never describes files that are not there. What killed
    processes left behind is removed. Raises UserError if `folder` is in use or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (lock_folder(folder, 'wait for it, or name another --out_dir'),
              tempfile.TemporaryDirectory(prefix='.preparing-', dir=folder,
                                          ignore_cleanup_errors=True) as temporary):
            for left in folder.glob('.preparing-*'):
                if left != Path(temporary):
                    shutil.rmtree(left)
            new, cache = Path(temporary, 'new'), Path(temporary, 'cache')
            new.mkdir()
            cache.mkdir()
            yield new, cache
            (folder / 'meta.json').unlink(missing_ok=True)
            for old in folder.iterdir():
                if PREPARED.fullmatch(old.name):
                    old.unlink()
            files = [file for file in sorted(new.iterdir()) if file.name != 'meta.json']
            for file in [*files, new / 'meta.json']:
                file.replace(folder / file.name)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'cannot write to {folder} ({reason}): name another folder with --out_dir') from None
    finally:
        if folder.is_dir() and os.listdir(folder) == ['.lock']:  # nothing was prepared
            (folder / '.lock').unlink()
            folder.rmdir()
