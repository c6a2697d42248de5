"""Turns stories into token shards, meta.json and a tokenizer: all that train.py needs.

    python data/tiny_stories/prepare.py                                  # TinyStories, one token a character
    python data/tiny_stories/prepare.py --source stories.txt --encoding_type bpe --out_dir data/mine

The stories are read twice, to see and choose and then to encode, and in between once more for bpe to learn.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any working directory

import numpy as np
from tqdm import tqdm

from configurator import SettingError, UserError, configure, run
from data import blocks
from data.shards import ShardWriter
from data.sources import document, open_source
from data.tiny_stories import sample_stories
from data.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, cut, open_tokenizer
from data.workers import in_order

source = 'roneneldan/TinyStories'  # user/name on the hub, a local file or folder, or sample (built in)
encoding_type = 'char'  # char, bpe or gpt2
# 4096 and not 30,000: at 288 wide, 30,000 rows of the embedding are 8.6M parameters, more than all the layers of
# a 15M model; and the few words of these stories are nearly all whole tokens in 4096 rows already.
vocab_size = 4096  # of bpe, the two infilling tokens counted
tokenizer = ''  # use this one: a checkpoint, a prepared folder, a .model, a folder with GPT-2's vocabulary
data_percentage = 100.0  # of the stories to use; a smaller share is part of a larger one
val_percentage = 1.0  # of the stories to hold out for validation, where the source has no validation split
out_dir = ''  # where the data goes; '' is the folder of this script
num_proc = 0  # worker processes; 0 is one a core
seed = 1337  # of the built-in corpus, and of the sample that bpe learns from
offline = False  # open no socket: take hub datasets and GPT-2's vocabulary from their caches

_HERE = Path(__file__).resolve().parent
_SPLITS = ('train', 'val')
_SAMPLE_STORIES = 22_000
_LEARN_BYTES = 100_000_000  # of stories that bpe learns from, at most
_POOL_BYTES = 16 << 20  # of source; less is encoded before worker processes have started
_OURS = re.compile(r'(train|val)_\d{5}\.bin|tokenizer\.(json|model|tiktoken)')  # what meta.json tells of
_LAST = 2**64 - 1  # the largest hash


@dataclass(frozen=True)
class Choice:
    """Which stories go where. A story's hash is two numbers below 2**64, whatever the other stories are."""

    val: int  # validation, where the source does not say: those whose first number is at most this
    keep: tuple  # used, of train and of val: those whose second number is at most this
    hashed: bool  # False where the source says all, so that no hash is needed


@dataclass
class Survey:
    """What the first pass saw. Arrays are (2,), for train and val."""

    stories: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))
    kept: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))  # stories used
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))  # of UTF-8, of the stories used
    least: np.ndarray = field(default_factory=lambda: np.full(2, _LAST, np.uint64))  # smallest second number
    low: int = _LAST  # smallest and largest first number
    high: int = 0
    blank: int = 0  # stories of white space alone, which are left out
    blocks: int = 0
    characters: set = field(default_factory=set)  # of the stories used for training

    def __add__(self, other):
        return Survey(
            self.stories + other.stories, self.kept + other.kept, self.bytes + other.bytes,
            np.minimum(self.least, other.least), min(self.low, other.low), max(self.high, other.high),
            self.blank + other.blank, self.blocks + other.blocks, self.characters | other.characters,
        )


# One block, in a worker process


def _assigned(block, choice):
    """Where the stories of a block go that are not blank.

    Returns the number of blank ones, lists of texts and of their UTF-8 bytes, and three arrays: (n,) the splits,
    0 or 1; (n,) whether used; (n, 2) hashes.
    """
    everything = blocks.texts(block)
    texts = everything
    if block.kind != 'piece':
        texts = [text for text in everything if text and not text.isspace()]
    utf8 = [text.encode() for text in texts]
    hashes = np.zeros((len(texts), 2), np.uint64)
    if choice.hashed and texts:
        digests = [block.digest or blocks.new_hash(data).digest() for data in utf8]
        hashes = np.frombuffer(b''.join(digests), '<u8').reshape(-1, 2)
    if block.split:
        split = np.full(len(texts), _SPLITS.index(block.split))
    else:
        split = (hashes[:, 0] <= np.uint64(choice.val)).astype(int)
    used = hashes[:, 1] <= np.array(choice.keep, np.uint64)[split]
    return len(everything) - len(texts), texts, utf8, split, used, hashes


def _survey(block, choice, with_characters):
    """The Survey of one block."""
    blank, texts, utf8, split, used, hashes = _assigned(block, choice)
    sizes = np.fromiter(map(len, utf8), np.int64, len(utf8))
    characters = set()
    if with_characters:  # as set(text) gives them, in a tenth of the time
        data = b''.join(itertools.compress(utf8, used & (split == 0)))
        common = {byte for byte in data[:4096] if byte < 128}
        characters = {*map(chr, common), *data.translate(None, delete=bytes(common)).decode()}
    return Survey(
        stories=np.bincount(split, minlength=2) * block.starts,
        kept=np.bincount(split[used], minlength=2) * block.starts,
        bytes=np.array([sizes[used & (split == i)].sum() for i in (0, 1)]),
        least=np.array([hashes[split == i, 1].min(initial=_LAST) for i in (0, 1)]),
        low=int(hashes[:, 0].min(initial=_LAST)),
        high=int(hashes[:, 0].max(initial=0)),
        blank=blank,
        blocks=1,
        characters=characters,
    )


def _sample(block, choice, bound, seed):
    """The texts of a block that bpe learns from: of those used for training, the ones of low seeded hash."""
    _, texts, utf8, split, used, _ = _assigned(block, choice)
    key = str(seed).encode()[:blake2b.MAX_KEY_SIZE]
    return [
        text for text, data in itertools.compress(zip(texts, utf8, strict=True), used & (split == 0))
        if int.from_bytes(blake2b(data, digest_size=8, key=key).digest(), 'little') <= bound
    ]


def _encode(block, choice, coder):
    """The tokens of a block, two uint16 arrays: for training, for validation."""
    _, texts, _, split, used, _ = _assigned(block, choice)
    tokens = []
    for i in 0, 1:
        pieces = [
            (piece, block.starts and n == 0)
            for text in itertools.compress(texts, used & (split == i))
            for n, piece in enumerate(cut(text, blocks.BLOCK))
        ]
        size = sum(len(piece) for piece, _ in pieces)
        step = 1 if size > 4 * blocks.BLOCK else len(pieces) or 1  # long texts one by one, to bound the memory
        parts = [coder.encode_pieces(pieces[j:j + step])[0] for j in range(0, len(pieces), step)]
        tokens.append(np.concatenate(parts) if parts else np.zeros(0, np.uint16))
    return tokens


# All blocks


def _each(function, stories, total=None):
    """Yields function(block) for each block of a Source, in order, behind a progress bar."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    processes = 1 if stories.size < _POOL_BYTES else num_proc or cores
    name = function.func.__name__.strip('_')
    bar = tqdm(stories.blocks(), name, total, unit=' blocks', disable=None)  # None: if stderr is no terminal
    return in_order(function, bar, processes)


def choose(stories, with_characters):
    """The first pass over a Source: a Choice that leaves stories in both splits, and its Survey."""

    def bound(percentage):
        return min(_LAST, round(percentage / 100 * 2**64))

    hashed = not stories.has_val or data_percentage < 100
    choice = Choice(bound(val_percentage), (bound(data_percentage),) * 2, hashed)
    while True:
        work = functools.partial(_survey, choice=choice, with_characters=with_characters)
        survey = sum(_each(work, stories), Survey())
        if not survey.stories.any():
            raise UserError(f'{source} holds no stories, and {survey.blank:,} blank ones')
        empty = [split for split, n in zip(_SPLITS, survey.stories, strict=True) if not n]
        if empty and stories.has_val:
            raise UserError(f'the {empty[0]} files of {source} hold no stories: remove them or fill them')
        if empty and survey.low == survey.high:
            raise UserError(f'{source} holds only one story, and training and validation need one each')
        if empty:  # there are few: hold out the one with the smallest hash, or all but that with the largest
            choice = replace(choice, val=survey.low if empty == ['val'] else survey.high - 1)
        elif not survey.kept.all():
            keep = np.where(survey.kept, np.array(choice.keep, np.uint64), survey.least)
            choice = replace(choice, keep=tuple(map(int, keep)))
        else:
            return choice, survey


def learn(stories, choice, survey):
    """The tokenizer that `encoding_type` asks for, learned from the stories used for training."""
    if encoding_type == 'char':
        return CharTokenizer.train(survey.characters)
    bound = min(_LAST, _LAST * _LEARN_BYTES // int(survey.bytes[0]))
    work = functools.partial(_sample, choice=choice, bound=bound, seed=seed)
    texts, size = [], 0
    for text in itertools.chain.from_iterable(_each(work, stories, survey.blocks)):
        size += len(text.encode())
        if size <= _LEARN_BYTES:
            texts.append(text)
    return BPETokenizer.train(texts, vocab_size)


def encode(stories, choice, survey, coder, folder):
    """The last pass: writes the shards into `folder`. Returns the entry `splits` of meta.json."""
    writers = [ShardWriter(folder, split) for split in _SPLITS]
    work = functools.partial(_encode, choice=choice, coder=coder)
    for tokens in _each(work, stories, survey.blocks):
        for writer, part in zip(writers, tokens, strict=True):
            writer.write(part)
    splits = {}
    for i, split in enumerate(_SPLITS):
        shards = writers[i].close()
        splits[split] = {
            'stories': int(survey.kept[i]), 'tokens': sum(shard['tokens'] for shard in shards),
            'bytes': int(survey.bytes[i]), 'shards': shards,
        }
    return splits


# Files


@contextlib.contextmanager
def staging(folder):
    """A temporary folder inside `folder`, which is made if need be. What killed runs left is removed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob('.preparing-*'):
            shutil.rmtree(left)
        path = Path(tempfile.mkdtemp(prefix='.preparing-', dir=folder))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f'cannot write to {folder} ({reason}): name another folder with --out_dir') from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def install(new, folder):
    """Puts the files of folder `new` in the place of an earlier run's in `folder`.

    meta.json goes first and comes last, so that at no moment it tells of files that are not its own.
    """
    (folder / 'meta.json').unlink(missing_ok=True)
    for old in folder.iterdir():
        if _OURS.fullmatch(old.name):
            old.unlink()
    for path in sorted(new.iterdir(), key=lambda path: path.name == 'meta.json'):
        os.replace(path, folder / path.name)


def check_settings():
    """Raises SettingError for a setting that cannot be."""
    if encoding_type not in ('char', 'bpe', 'gpt2'):
        raise SettingError(f'encoding_type {encoding_type!r}: type char, bpe or gpt2')
    if vocab_size != 4096 and (encoding_type != 'bpe' or tokenizer):
        raise SettingError('vocab_size is for a new bpe tokenizer: type --encoding_type bpe, no --tokenizer')
    if not 0 < vocab_size <= 2**16:
        raise SettingError(f'vocab_size {vocab_size}: type at most {2**16}, as tokens are stored in 16 bits')
    if not 0 < data_percentage <= 100:
        raise SettingError(f'data_percentage {data_percentage}: type a number above 0, at most 100')
    if not 0 < val_percentage < 100:
        raise SettingError(f'val_percentage {val_percentage}: type a number between 0 and 100')
    if num_proc < 0:
        raise SettingError(f'num_proc {num_proc}: type the number of processes, or 0 for one a core')


def given_tokenizer():
    """The tokenizer that the settings name; None where one is to be learned."""
    if not tokenizer:
        return GPT2Tokenizer.load(offline) if encoding_type == 'gpt2' else None
    given = open_tokenizer(tokenizer)
    if encoding_type not in ('char', given.encoding):  # char is also the default, and means nothing here
        raise SettingError(f'{tokenizer} is {given.encoding}: leave out --encoding_type {encoding_type}')
    return given


def main():
    started = time.perf_counter()
    check_settings()
    folder = Path(out_dir).expanduser() if out_dir else _HERE
    coder = given_tokenizer()
    stories = open_source(source, functools.partial(sample_stories.stories, _SAMPLE_STORIES, seed), offline)
    stories = document(stories, data_percentage)
    with staging(folder) as new:
        choice, survey = choose(stories, with_characters=coder is None and encoding_type == 'char')
        coder = coder or learn(stories, choice, survey)
        splits = encode(stories, choice, survey, coder, new)
        coder.save(new)
        meta = {
            'encoding': coder.encoding, 'vocab_size': coder.vocab_size,
            'delimiter': coder.delimiter, 'blank': coder.blank, 'middle': coder.middle,
            'source': source, 'splits': splits,
        }
        (new / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
        install(new, folder)

    seconds = time.perf_counter() - started
    size, tokens = sum(survey.bytes), sum(split['tokens'] for split in splits.values())
    train, val = survey.kept
    print(f'stories: {train:,} for training, {val:,} for validation, {survey.blank:,} blank ones skipped')
    if stories.left_out:
        print(f'left out, as a test split: {", ".join(stories.left_out)}')
    kind = f'{coder.encoding}, vocabulary of {coder.vocab_size:,}'
    print(f'tokens: {tokens:,} of {size / tokens:.2f} bytes each ({kind})')
    print(f'text: {size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s')
    recipe = ' config/quickstart.py' if source == 'sample' else ''
    place = '' if folder.resolve() == _HERE else f' --dataset {shlex.quote(str(folder))}'
    print(f'next: python train.py{recipe}{place}')


if __name__ == '__main__':
    configure(globals())
    run(main)
