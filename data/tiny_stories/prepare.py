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
from data import blocks, infill
from data.shards import ShardWriter
from data.sources import document, open_source
from data.tiny_stories import sample_stories
from data.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    cut,
    open_tokenizer,
    tokenizer_from_state,
)
from data.workers import in_order

source = 'roneneldan/TinyStories'  # user/name on the hub, a local file or folder, or sample (built in)
encoding_type = 'auto'  # char, bpe or gpt2; auto: bpe for the built-in corpus, char for all others
# 4096 and not 30,000: at 288 wide, 30,000 rows of the embedding are 8.6M parameters, more than all layers
# of a 15M model; and the few words of these stories are nearly all whole tokens in 4096 rows already.
vocab_size = 0  # of bpe, the two infilling tokens counted; 0: 4096, and 1536 for the built-in corpus
tokenizer = ''  # of a checkpoint, a prepared folder, a .model, a folder with GPT-2's, a published model
data_percentage = 100.0  # of the stories to use; a smaller share is part of a larger one
val_percentage = 1.0  # of the stories to hold out for validation, where the source has no validation split
infill_rate = 0.0  # share of the stories, 0 to 1, turned around so that a model learns to write middles
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
    used: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))  # stories
    bytes: np.ndarray = field(default_factory=lambda: np.zeros(2, np.int64))  # of UTF-8, of the stories used
    least: np.ndarray = field(default_factory=lambda: np.full(2, _LAST, np.uint64))  # smallest second number
    low: int = _LAST  # smallest and largest first number
    high: int = 0
    blank: int = 0  # stories of white space alone
    characters: set = field(default_factory=set)  # of the stories used for training
    places: list = field(default_factory=list)  # a block's stories, a byte each: 0 train, 1 val, 2 not used

    def add(self, other):
        self.stories += other.stories
        self.used += other.used
        self.bytes += other.bytes
        self.least = np.minimum(self.least, other.least)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.blank += other.blank
        self.characters |= other.characters
        self.places += other.places


# One block, in a worker process


def _survey(block, choice, with_characters):
    """The Survey of one block, which decides where each of its stories goes."""
    texts = blocks.texts(block)
    utf8 = [text.encode() for text in texts]
    blank = np.array([not text or text.isspace() for text in texts], bool) & (block.kind != 'piece')
    hashes = np.zeros((len(texts), 2), np.uint64)
    if choice.hashed and texts:
        digests = [block.digest or blocks.new_hash(data).digest() for data in utf8]
        hashes = np.frombuffer(b''.join(digests), '<u8').reshape(-1, 2)
    if block.split:
        split = np.full(len(texts), _SPLITS.index(block.split))
    else:
        split = (hashes[:, 0] <= np.uint64(choice.val)).astype(int)
    used = ~blank & (hashes[:, 1] <= np.array(choice.keep, np.uint64)[split])
    places = np.where(used, split, 2).astype(np.uint8)
    characters = set()
    if with_characters:  # as set(text) gives them, in a tenth of the time
        data = b''.join(itertools.compress(utf8, places == 0))
        common = {byte for byte in set(data[:4096]) if byte < 128}
        characters = {*map(chr, common), *data.translate(None, delete=bytes(common)).decode()}
    sizes = np.fromiter(map(len, utf8), np.int64, len(utf8))
    return Survey(
        stories=np.bincount(split[~blank], minlength=2) * block.starts,
        used=np.bincount(split[used], minlength=2) * block.starts,
        bytes=np.array([sizes[places == i].sum() for i in (0, 1)]),
        least=np.array([hashes[~blank & (split == i), 1].min(initial=_LAST) for i in (0, 1)]),
        low=int(hashes[~blank, 0].min(initial=_LAST)),
        high=int(hashes[~blank, 0].max(initial=0)),
        blank=int(blank.sum()),
        characters=characters,
        places=[places.tobytes()],
    )


def _used(block, places):
    """The texts of a block that are used: a list for training, a list for validation."""
    texts, places = blocks.texts(block), np.frombuffer(places, np.uint8)
    return [list(itertools.compress(texts, places == split)) for split in (0, 1)]


def _sample(item, bound, seed):
    """The texts of an item (block, places) that bpe learns from: those for training of low seeded hash."""
    key = str(seed).encode()
    return [
        text for text in _used(*item)[0]
        if int.from_bytes(blake2b(text.encode(), digest_size=8, key=key).digest(), 'little') <= bound
    ]


def _encode(item, coder, rate):
    """The tokens of an item (block, places), two uint16 arrays: for training, for validation.

    With them comes what became of the stories: how many are plain, infilled and too short for it, (2, 3).
    """
    starts = item[0].starts
    train, val = _used(*item)
    kinds = np.zeros((2, 3), np.int64)
    if item[0].kind != 'piece' and sum(map(len, train + val)) < 10 * blocks.BLOCK:
        tokens, lengths, became = infill.encode(coder, train + val, rate)
        for i, part in enumerate(np.split(became, [len(train)])):
            kinds[i] = np.bincount(part, minlength=3)
        return np.split(tokens, [lengths[:len(train)].sum()]), kinds
    tokens = []
    for texts in train, val:  # long ones, in pieces one by one, to bound the memory
        pieces = ((n == 0, piece) for text in texts for n, piece in enumerate(cut(text, blocks.BLOCK)))
        tokens.append([coder.encode_pieces([(piece, starts and first)])[0] for first, piece in pieces])
    return [np.concatenate(parts or [np.zeros(0, np.uint16)]) for parts in tokens], kinds


# All blocks


def _each(function, stories, survey=None):
    """Yields function(block) for each block of a Source, in order; after a survey, of (block, places)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    if encoding() == 'char' and not tokenizer and cores < 4:
        cores = 1  # characters are encoded sooner than two workers' tokens have come back
    processes = 1 if stories.size < _POOL_BYTES else num_proc or cores
    items = zip(stories.blocks(), survey.places, strict=True) if survey else stories.blocks()
    name, total = function.func.__name__.strip('_'), len(survey.places) if survey else None
    bar = tqdm(items, name, total, unit=' blocks', disable=None)  # None: where stderr is no terminal
    return in_order(function, bar, processes)


def choose(stories, with_characters):
    """The first pass over a Source: a Survey with stories in both splits. UserError if there is none."""

    def bound(percentage):
        return min(_LAST, round(percentage / 100 * 2**64))

    hashed = not stories.has_val or data_percentage < 100
    choice = Choice(bound(val_percentage), (bound(data_percentage),) * 2, hashed)
    while True:
        survey = Survey()
        work = functools.partial(_survey, choice=choice, with_characters=with_characters)
        for part in _each(work, stories):
            survey.add(part)
        if not survey.stories.any():
            raise UserError(f'{source} holds no stories, and {survey.blank:,} blank ones')
        empty = [split for split, n in zip(_SPLITS, survey.stories, strict=True) if not n]
        if empty and stories.has_val:
            raise UserError(f'the {empty[0]} files of {source} hold no stories: remove them or fill them')
        if empty and survey.low == survey.high:
            raise UserError(f'{source} holds only one story, and training and validation need one each')
        if empty:  # there are few: hold out the one with the smallest hash, or all but that with the largest
            choice = replace(choice, val=survey.low if empty == ['val'] else survey.high - 1)
        elif not survey.used.all():
            keep = np.where(survey.used, np.array(choice.keep, np.uint64), survey.least)
            choice = replace(choice, keep=tuple(map(int, keep)))
        else:
            return survey


def learn(stories, survey):
    """The tokenizer that `encoding_type` asks for, learned from the stories used for training."""
    if encoding() == 'char':
        return CharTokenizer.train(survey.characters)
    bound = min(_LAST, _LAST * _LEARN_BYTES // int(survey.bytes[0]))
    texts, size = [], 0
    samples = _each(functools.partial(_sample, bound=bound, seed=seed), stories, survey)
    for text in itertools.chain.from_iterable(samples):
        size += len(text.encode())
        if size <= _LEARN_BYTES:
            texts.append(text)
    return BPETokenizer.train(texts, vocab_size or (1536 if source == 'sample' else 4096))


def encode(stories, survey, coder, folder):
    """The last pass: writes the shards into `folder`. Returns the entry `splits` of meta.json."""
    writers = [ShardWriter(folder, split) for split in _SPLITS]
    kinds = np.zeros((2, 3), np.int64)
    work = functools.partial(_encode, coder=coder, rate=infill_rate)
    for tokens, became in _each(work, stories, survey):
        kinds += became
        for writer, part in zip(writers, tokens, strict=True):
            writer.write(part)
    splits = {}
    for i, split in enumerate(_SPLITS):
        shards = writers[i].close()
        splits[split] = {
            'stories': int(survey.used[i]), 'tokens': sum(shard['tokens'] for shard in shards),
            'bytes': int(survey.bytes[i]), 'shards': shards,
            'infilled': int(kinds[i, infill.INFILLED]), 'too_short': int(kinds[i, infill.TOO_SHORT]),
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
        with contextlib.suppress(OSError):
            folder.rmdir()  # empty, where nothing came of it


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
    if encoding_type not in ('auto', 'char', 'bpe', 'gpt2'):
        raise SettingError(f'encoding_type {encoding_type!r}: type auto, char, bpe or gpt2')
    if vocab_size and (encoding() != 'bpe' or tokenizer):
        raise SettingError('vocab_size is for a new bpe tokenizer: type --encoding_type bpe, no --tokenizer')
    if not 0 <= vocab_size <= 2**16:
        raise SettingError(f'vocab_size {vocab_size}: type at most {2**16}, as tokens are stored in 16 bits')
    if not 0 < data_percentage <= 100:
        raise SettingError(f'data_percentage {data_percentage}: type a number above 0, at most 100')
    if not 0 < val_percentage < 100:
        raise SettingError(f'val_percentage {val_percentage}: type a number between 0 and 100')
    if not 0 <= infill_rate <= 1:
        raise SettingError(f'infill_rate {infill_rate}: type a number from 0 to 1')
    if num_proc < 0:
        raise SettingError(f'num_proc {num_proc}: type the number of processes, or 0 for one a core')


def encoding():
    """What `encoding_type` means: with bpe the little model of the quickstart learns whose story it tells."""
    if encoding_type != 'auto':
        return encoding_type
    return 'bpe' if source == 'sample' else 'char'


def given_tokenizer():
    """The tokenizer that the settings name; None where one is to be learned."""
    if not tokenizer:
        return GPT2Tokenizer.load(offline) if encoding() == 'gpt2' else None
    if tokenizer.endswith('.bin') or Path(tokenizer, 'config.json').is_file():
        from formats import load_foreign  # imports torch

        given = tokenizer_from_state(load_foreign(tokenizer)['tokenizer'], tokenizer)
    else:
        given = open_tokenizer(tokenizer)
    if encoding_type not in ('auto', given.encoding):
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
        survey = choose(stories, with_characters=coder is None and encoding() == 'char')
        coder = coder or learn(stories, survey)
        splits = encode(stories, survey, coder, new)
        coder.save(new)
        meta = {
            'encoding': coder.encoding, 'vocab_size': coder.vocab_size,
            'delimiter': coder.delimiter, 'blank': coder.blank, 'middle': coder.middle,
            'source': source, 'infill_rate': infill_rate, 'splits': splits,
        }
        (new / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')
        install(new, folder)

    seconds = time.perf_counter() - started
    size, tokens = sum(survey.bytes), sum(split['tokens'] for split in splits.values())
    train, val = survey.used
    print(f'stories: {train:,} for training, {val:,} for validation, {survey.blank:,} blank ones skipped')
    if stories.left_out:
        print(f'left out, as a test split: {", ".join(stories.left_out)}')
    if infill_rate:
        infilled, short = [sum(split[key] for split in splits.values()) for key in ('infilled', 'too_short')]
        print(f'for infilling: {infilled:,}; {short:,} chosen but plain, as shorter than three sentences')
    kind = f'{coder.encoding}, vocabulary of {coder.vocab_size:,}'
    print(f'tokens: {tokens:,} of {size / tokens:.2f} bytes each ({kind})')
    print(f'text: {size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s')
    recipe = ' config/quickstart.py' if source == 'sample' else ''
    if infill_rate:
        recipe = ' config/quickstart_infill.py' if source == 'sample' else ' config/infill.py'
    place = '' if folder.resolve() == _HERE else f' --dataset {shlex.quote(str(folder))}'
    print(f'next: python train.py{recipe}{place}')


if __name__ == '__main__':
    configure(globals())
    run(main)
