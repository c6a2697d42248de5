"""Write and read token shards, flat files of little-endian uint16 that form one stream, and serve batches.

A prepared folder holds train_00000.bin, val_00000.bin and so on, the tokenizer's file, and meta.json:

    {"encoding": "char", "vocab_size": 360, "delimiter": 1, "blank": 358, "middle": 359,
     "source": "roneneldan/TinyStories", "infill_rate": 0.0,
     "splits": {"train": {"stories": 2, "tokens": 150, "bytes": 148,
                          "shards": [{"name": "train_00000.bin", "tokens": 150, "sha256": "..."}]},
                "val": {...}}}
"""

import bisect
import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import reprlib
import shlex
import shutil
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from configurator import SettingError, UserError, script_path, user_errors
from data.files import lock_folder, plain_path, refuse_stand_in, report_read_errors, report_write_errors

SHARD_TOKENS = 100_000_000  # at most, per file
SPLITS = 'train', 'val'
# The tokenizer's own file of each encoding; data/tokenizer.py writes it
TOKENIZER_FILES = {'char': 'tokenizer.json', 'bpe': 'tokenizer.model', 'gpt2': 'tokenizer.tiktoken'}
PREPARED = re.compile(r'meta\.json|(train|val)_\d{5}\.bin|tokenizer\.(json|model|tiktoken)')
TEMPORARY_FOLDERS = 'new', 'cache', 'old'  # the new dataset, intermediate files, the dataset that it replaces
REPLACED = 'replaced.txt'  # lists the files of both datasets, from the moment on when the old one is replaced
MAX_META_BYTES = 100_000_000  # enough for a million shards


# writing ------------------------------------------------------------------------

class ShardWriter:
    """Write one split's tokens to `folder/SPLIT_00000.bin, ...`, at most `shard_tokens` tokens each."""

    def __init__(self, folder, split, shard_tokens=SHARD_TOKENS):
        self.folder = Path(folder)
        self.split = split
        self.shard_tokens = shard_tokens
        self.shards = []  # the entries of meta.json, each with an unfinished hash

    def write(self, tokens):
        """Append `tokens`, a 1-D uint16 array."""
        while len(tokens):
            if not self.shards or self.shards[-1]['tokens'] == self.shard_tokens:
                name = f'{self.split}_{len(self.shards):05d}.bin'
                self.shards.append({'name': name, 'tokens': 0, 'sha256': hashlib.sha256()})
            shard = self.shards[-1]
            room = self.shard_tokens - shard['tokens']
            data = tokens[:room].astype('<u2', copy=False).tobytes()
            mode = 'ab' if shard['tokens'] else 'wb'
            with open(self.folder / shard['name'], mode) as file:
                file.write(data)
            shard['sha256'].update(data)
            shard['tokens'] += len(data) // 2
            tokens = tokens[room:]

    def close(self):
        """Return the shards' entries of meta.json: a list of {name, tokens, sha256}."""
        return [shard | {'sha256': shard['sha256'].hexdigest()} for shard in self.shards]


def write_meta(folder, tokenizer, source, infill_rate, splits):
    """Write meta.json. splits: {split: {stories, tokens, bytes, shards, ...}}."""
    meta = tokenizer.about() | {'source': source, 'infill_rate': infill_rate, 'splits': splits}
    text = json.dumps(meta, indent=1) + '\n'
    (Path(folder) / 'meta.json').write_text(text, encoding='utf-8')


@contextlib.contextmanager
def write_dataset_atomically(folder):
    """Yield temporary folders (new, cache). If all goes well, the files in `new` replace the prepared data.

    Only files that a meta.json of ours lists are replaced. It is moved away first, and the new one comes
    last, so it never describes files that are not there. What killed processes left behind is removed.
    Raises UserError if `folder` is in use, cannot be written, or has other files of these names.
    """
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        had_lock = (folder / '.lock').exists()
        with lock_folder(folder, 'wait for it, or name another --out_dir'):
            try:
                for left in folder.glob('.preparing-*'):
                    remove_temporary(folder, left)
                prepared_files(folder)  # raises UserError before the work begins
                with tempfile.TemporaryDirectory(prefix='.preparing-', dir=folder,
                                                 ignore_cleanup_errors=True) as temporary:
                    for name in TEMPORARY_FOLDERS:
                        Path(temporary, name).mkdir()
                    try:
                        with (plain_path(Path(temporary, 'cache')) as cache,
                              report_read_errors(temporary, cache)):
                            yield Path(temporary, 'new'), cache
                    except BaseException as error:
                        forget_variables(error)
                        raise
                    replace_dataset(folder, Path(temporary))
            except BaseException:
                if not had_lock:
                    remove_lock(folder)
                raise


def remove_temporary(folder, left):
    """Remove the temporary folder of a process that was killed, and nothing that only has a similar name.

    If the process was replacing the data in `folder`, files of two datasets are mixed there without a
    meta.json: remove these, too.
    """
    is_ours = re.fullmatch(r'\.preparing-[a-z0-9_]{8}', left.name) and left.is_dir() and not left.is_symlink()
    if not is_ours or not set(os.listdir(left)) <= {*TEMPORARY_FOLDERS, REPLACED}:
        return
    if (left / REPLACED).exists() and not (folder / 'meta.json').exists():
        for name in (left / REPLACED).read_text(encoding='utf-8').splitlines():
            if PREPARED.fullmatch(name):
                (folder / name).unlink(missing_ok=True)
    shutil.rmtree(left)


def prepared_files(folder):
    """Return the names of the files in `folder` that its meta.json lists, meta.json first.

    Raises UserError if there are others of the names that prepare.py writes.
    """
    listed = []
    # it may have no meta.json, or one of another program
    with report_read_errors(), contextlib.suppress(UserError):
        meta = read_meta(folder)
        listed = ['meta.json', TOKENIZER_FILES.get(meta['encoding'])]
        for split in SPLITS:
            listed += [shard['name'] for shard in meta['splits'][split]['shards']]
    names = [name for name in os.listdir(folder) if PREPARED.fullmatch(name)]
    foreign = sorted(set(names) - set(listed))
    if foreign:
        shown = ', '.join(foreign[:5])
        raise UserError(f'{folder} has files that no meta.json of prepare.py lists ({shown}): move them '
                        'away, or name another --out_dir')
    return [name for name in listed if name in names]


def replace_dataset(folder, temporary):
    """Move the prepared data in `folder` to `temporary/old`, and that in `temporary/new` to its place.

    If a file cannot be moved, as Windows refuses for files in use, the others are moved back.
    """
    old, new = temporary / 'old', temporary / 'new'
    old_names = prepared_files(folder)
    new_names = sorted(os.listdir(new))
    new_names.remove('meta.json')
    new_names.append('meta.json')  # the last one
    (temporary / REPLACED).write_text('\n'.join(old_names + new_names), encoding='utf-8')
    moves = [(folder / name, old / name) for name in old_names]
    moves += [(new / name, folder / name) for name in new_names]
    done = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def forget_variables(error):
    """Clear the variables of the functions that `error` has ended: Windows removes no file that they map."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def remove_lock(folder):
    """Remove our lock from a folder in which nothing was prepared, and the folder if it is empty then."""
    with contextlib.suppress(OSError):  # other files are there, or Windows does not remove a file in use
        (folder / '.lock').unlink()
        folder.rmdir()


# reading ------------------------------------------------------------------------

def prepared_folder(dataset):
    """Return the folder that a `dataset` setting means: the path itself, or a folder under data/.

    A folder without prepared data, which only has the same name, does not hide the other one.
    """
    path = Path(dataset)
    under_data = Path(__file__).parent / dataset
    for folder in path, under_data:
        if (folder / 'meta.json').is_file():
            return folder
    return path if path.is_dir() else under_data


def how_to_prepare(folder):
    """Return the advice at the end of a message about a folder whose data is missing or damaged."""
    script = script_path('data/tiny_stories/prepare.py')
    return f'run python {script} --out_dir {shlex.quote(str(folder))}, or name prepared data with --dataset'


def read_meta(folder):
    """Return the meta.json of a prepared folder, a dict. Raises UserError if it is missing or damaged."""
    path = Path(folder) / 'meta.json'
    if not path.is_file():
        raise UserError(f'{folder} holds no prepared data (no meta.json): {how_to_prepare(folder)}')
    with user_errors(path, f'is damaged (remove it with its .bin files, then {how_to_prepare(folder)})'):
        refuse_stand_in(path)
        if path.stat().st_size > MAX_META_BYTES:
            raise ValueError(f'it has {path.stat().st_size:,} bytes')
        meta = json.loads(path.read_text(encoding='utf-8'))
        check_meta(meta)
    return meta


def check_meta(meta):
    """Check the entries of meta.json that we read. Raises ValueError."""
    entry(meta, 'encoding', str)
    vocab_size = count(meta, 'vocab_size')
    if vocab_size > 2**16:
        raise ValueError(f'vocab_size is {vocab_size}, and tokens are uint16')
    rate = meta.get('infill_rate', 0)
    if type(rate) not in (int, float) or not 0 <= rate <= 1:
        raise ValueError(f'infill_rate is {reprlib.repr(rate)}')
    for name in 'delimiter', 'blank', 'middle':
        if rate > 0 and count(meta, name) >= vocab_size:  # nobody reads them without infilling
            raise ValueError(f'{name} is {meta[name]}, beyond the vocabulary of {vocab_size}')
    splits = entry(meta, 'splits', dict)
    names = set()
    for split in SPLITS:
        about = entry(splits, split, dict)
        count(about, 'bytes')
        for shard in entry(about, 'shards', list):
            name = entry(shard, 'name', str)
            if not re.fullmatch(r'[\w.-]{1,200}', name):
                raise ValueError(f'shard name {name[:200]!r} is not a plain file name')
            if name in names:
                raise ValueError(f'shard {name} is listed twice')
            names.add(name)
            count(shard, 'tokens')
            entry(shard, 'sha256', str)


def entry(table, name, kind):
    """Return table[name]. Raises ValueError if `table` is not a dict or the entry is not of this type."""
    if not isinstance(table, dict):
        raise ValueError(f'{reprlib.repr(table)} has no entry {name!r}')
    value = table.get(name)
    if type(value) is not kind:  # a bool is no int
        raise ValueError(f'{name} is {reprlib.repr(value)}')
    return value


def count(table, name):
    """Return table[name], a positive number that fits 64 bits. Raises ValueError if it is not one."""
    value = entry(table, name, int)
    if not 0 < value < 2**63:
        raise ValueError(f'{name} is {reprlib.repr(value)}')
    return value


def fingerprint(meta):
    """Return a hex digest of the data: it changes if any token of any shard does."""
    hashes = []
    for split in SPLITS:
        hashes += [shard['sha256'] for shard in meta['splits'][split]['shards']]
    return hashlib.sha256(json.dumps([meta['encoding'], meta['vocab_size'], hashes]).encode()).hexdigest()


class Split:
    """One split of a prepared folder: its memory-mapped shards as one stream of `n_tokens` tokens."""

    def __init__(self, folder, split, verify=False):
        """Map the shards. verify: compare their hashes with meta.json (their lengths always are).

        Raises UserError if a shard is missing or not as meta.json says.
        """
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        about = self.meta['splits'][split]
        self.n_bytes = about['bytes']  # of text
        self.names = [shard['name'] for shard in about['shards']]
        self.maps = []
        self.shards = []  # uint16 arrays
        self.starts = []  # the position of each shard's first token in the stream
        self.n_tokens = 0
        for shard in about['shards']:
            mapped = self.map_shard(shard)
            tokens = np.frombuffer(mapped, '<u2')
            if verify and hashlib.sha256(tokens).hexdigest() != shard['sha256']:
                path = self.folder / shard['name']
                raise self.damaged(f'{path} does not have the sha256 in meta.json')
            self.maps.append(mapped)
            self.shards.append(tokens)
            self.starts.append(self.n_tokens)
            self.n_tokens += shard['tokens']
        if self.n_tokens < 2:
            raise self.damaged(f'{self.folder} has no {split} token to predict')

    def damaged(self, problem):
        """Return the UserError about a folder that is not as its meta.json says."""
        return UserError(f'{problem}: {how_to_prepare(self.folder)}')

    def map_shard(self, shard):
        """Return a shard's mapped file. Raises UserError if its length is not that in meta.json."""
        path = self.folder / shard['name']
        if not path.is_file():
            raise self.damaged(f'{path} is missing, though meta.json names it')
        size = path.stat().st_size
        if size != 2 * shard['tokens']:
            refuse_stand_in(path)
            raise self.damaged(f"{path} has {size:,} bytes for {shard['tokens']:,} tokens of 2 bytes")
        with open(path, 'rb') as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, start, length):
        """Return tokens start to start + length of the stream, a uint16 array; fewer at the stream's end.

        Raises UserError if a shard was cut short meanwhile or has tokens beyond the vocabulary.
        """
        tokens = self.gather(start, length)
        self.check_tokens(tokens)
        return tokens

    def gather(self, start, length):
        """Return what `read` returns, without a check of the tokens."""
        parts = []
        i = bisect.bisect_right(self.starts, start) - 1  # the shard with token `start`
        while length > 0 and i < len(self.shards):
            self.check_length(i)
            offset = start - self.starts[i]
            part = self.shards[i][offset:offset + length]
            parts.append(part)
            start += len(part)
            length -= len(part)
            i += 1
        return np.concatenate(parts)

    def check_length(self, i):
        """Raise UserError if shard i was cut short meanwhile: reading beyond its end is a fatal bus error."""
        if self.maps[i].size() != self.shards[i].nbytes:
            raise self.damaged(f'{self.folder / self.names[i]} has changed its length meanwhile')

    def check_tokens(self, tokens):
        """Raise UserError if any of the tokens is beyond the vocabulary."""
        if tokens.size and tokens.max() >= self.meta['vocab_size']:
            raise self.damaged(f'{self.folder} has a shard with token {tokens.max()}, beyond the vocabulary '
                               f"of {self.meta['vocab_size']}")

    def windows(self, starts, block_size):
        """Return inputs and targets of the windows that begin at `starts`; targets are one token further.

        Returns int64 arrays x, y of shape (len(starts), block_size). Targets beyond the end of the split
        are -1, which the loss ignores.
        """
        starts = np.asarray(starts, dtype=np.int64)
        tokens = self.gather_windows(starts, block_size + 1)
        self.check_tokens(tokens)
        # contiguous arrays: a GPU copies no others while it computes
        x = tokens[:, :-1].astype(np.int64, order='C')
        y = tokens[:, 1:].astype(np.int64, order='C')
        for row in np.flatnonzero(starts + block_size >= self.n_tokens):
            n_targets = max(0, self.n_tokens - 1 - starts[row])
            y[row, n_targets:] = -1
        return x, y

    def gather_windows(self, starts, length):
        """Return `length` tokens from each of the positions `starts`, uint16 (len(starts), length).

        Beyond the end of the stream they are 0.
        """
        tokens = np.zeros((len(starts), length), np.uint16)
        shard_of_row = np.searchsorted(self.starts, starts, side='right') - 1
        for i in np.unique(shard_of_row):
            rows = np.flatnonzero(shard_of_row == i)
            offsets = starts[rows] - self.starts[i]
            is_inside = offsets + length <= len(self.shards[i])
            # windows inside the shard: all at once
            if is_inside.any():
                self.check_length(i)
                windows = np.lib.stride_tricks.sliding_window_view(self.shards[i], length)
                tokens[rows[is_inside]] = windows[offsets[is_inside]]
            # windows that go on in the next shard, or beyond the end of the stream
            for row in rows[~is_inside]:
                found = self.gather(int(starts[row]), length)
                tokens[row, :len(found)] = found
        return tokens


class Batches:
    """The training batches of one rank: a pure function of the step.

    Each epoch is a seeded permutation of all windows. The windows of the first epoch begin at the stream's
    first token; those of a later epoch are shifted by a seeded offset below block_size, so that no two epochs
    cut the stories alike. Epoch after epoch these windows form an endless sequence, of which the global batch
    of step s is windows s * global_batch_size to (s + 1) * global_batch_size, however many ranks there are.
    A rank takes its share of them in `grad_accum_steps` micro-batches, none larger than batch_size.
    """

    def __init__(self, split, block_size, batch_size, accumulation_steps, seed, rank=0, world_size=1):
        """accumulation_steps: micro-batches per step, over all ranks together.

        Raises SettingError if the ranks cannot share a step, UserError if the split is too short.
        """
        self.split = split
        self.block_size = block_size
        self.seed = seed
        self.global_batch_size = batch_size * accumulation_steps
        self.grad_accum_steps = math.ceil(accumulation_steps / world_size)
        micro_batches = world_size * self.grad_accum_steps
        if self.global_batch_size % micro_batches:
            below = self.global_batch_size // micro_batches * micro_batches
            nearest = f'{below} or {below + micro_batches}' if below else f'{micro_batches}'
            raise SettingError(
                f'{self.global_batch_size} sequences per step (batch_size {batch_size} * '
                f'gradient_accumulation_steps {accumulation_steps}) do not divide among {world_size} ranks '
                f'with {self.grad_accum_steps} micro-batches each; the nearest: {nearest}')
        self.n_windows = (split.n_tokens - 1) // block_size
        if self.n_windows < 1:
            raise UserError(f'{split.folder} has {split.n_tokens:,} training tokens, fewer than one window '
                            f'of {block_size} and its target: prepare more text or lower --block_size')
        share = self.global_batch_size // world_size
        self.micro_batch_size = share // self.grad_accum_steps
        self.local_rows = slice(rank * share, (rank + 1) * share)  # this rank's part of a global batch
        self.epoch = -1  # the epoch whose window starts are in `epoch_starts`
        self.epoch_starts = None

    def starts(self, step):
        """Return where the windows of step's global batch begin, an int array (global_batch_size,)."""
        first = step * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size)
        epochs = positions // self.n_windows
        starts = np.empty(self.global_batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            if epoch != self.epoch:
                self.epoch = epoch
                self.epoch_starts = self.shuffle(epoch)
            in_epoch = epochs == epoch
            starts[in_epoch] = self.epoch_starts[positions[in_epoch] % self.n_windows]
        return starts

    def shuffle(self, epoch):
        """Return where the windows of an epoch begin, in the epoch's order, an int array (n_windows,)."""
        rng = np.random.default_rng((self.seed, epoch))
        starts = rng.permutation(self.n_windows) * self.block_size
        if epoch > 0:
            starts += rng.integers(self.block_size)
        return starts

    def __call__(self, step):
        """Return this rank's micro-batches of `step`: a list of (inputs, targets), int64 (B, block_size)."""
        x, y = self.split.windows(self.starts(step)[self.local_rows], self.block_size)
        x = np.split(x, self.grad_accum_steps)
        y = np.split(y, self.grad_accum_steps)
        return list(zip(x, y, strict=True))

    def from_step(self, step):
        """Yield the micro-batches of `step` and of all following steps; the next ones are read ahead."""
        with ThreadPoolExecutor(1) as loader:
            upcoming = loader.submit(self, step)
            for next_step in itertools.count(step + 1):
                micro_batches = upcoming.result()
                upcoming = loader.submit(self, next_step)
                yield micro_batches
