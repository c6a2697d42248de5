"""Turns stories into token shards, meta.json and a tokenizer: all that train.py needs.

    python data/tiny_stories/prepare.py                                  # TinyStories, one token a character
    python data/tiny_stories/prepare.py --source stories.txt --encoding_type bpe --out_dir data/mine
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any working directory

import json
import os
import shlex
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from hashlib import blake2b

import numpy as np
from tqdm import tqdm

from configurator import SettingError, UserError, configure, in_range, one_of, run, script_path
from data import infill
from data.bundle import unpack, write_bundle
from data.files import write_dataset_atomically
from data.shards import ShardWriter
from data.stories import load_stories
from data.tiny_stories import sample_stories
from data.token_files.prepare import token_files, write_streams
from data.tokenizer import BPETokenizer, CharTokenizer, characters
from data.tokenizer_files import load_gpt2
from formats.pretrained import open_tokenizer

source = 'roneneldan/TinyStories'  # user/name on the hub, a file, folder or bundle, or sample (built in)
text_column = ''  # of the stories, in a table; '' is text or story
encoding_type = 'auto'  # char, bpe or gpt2; auto: bpe for the built-in corpus, char for all others
# 4096, not 30,000: of 288 wide these are 8.6M parameters, more than all layers of a 15M model
vocab_size = 0  # of bpe, the two infilling tokens counted; 0: 4096, and 1536 for the built-in corpus
tokenizer = ''  # of a checkpoint, a prepared folder, a pretrained model, a file, or characters of a .txt
data_percentage = 100.0  # of the stories to use; a smaller share is part of a larger one
val_percentage = 1.0  # of the stories to hold out for validation, where the source has no validation split
infill_rate = 0.0  # share of the stories, 0 to 1, turned around so that a model learns to write middles
out_dir = ''  # where the data goes; '' is the folder of this script
num_proc = 0  # worker processes; 0 is one a core
seed = 1337  # of the built-in corpus, and of the sample that bpe learns from
offline = False  # open no connection: take hub datasets and GPT-2's vocabulary from their caches
bundle = ''  # only write this .tar: the source, GPT-2's vocabulary and requirements, for where is no internet


def check_settings():
    """Raises SettingError for a setting that cannot be."""
    one_of(('auto', 'char', 'bpe', 'gpt2'), encoding_type=encoding_type)
    if vocab_size and (encoding() != 'bpe' or tokenizer):
        raise SettingError('vocab_size is for a new bpe tokenizer: type --encoding_type bpe, no --tokenizer')
    in_range(at_least=0, at_most=2**16, vocab_size=vocab_size)  # tokens are stored in 16 bits
    in_range(above=0, at_most=100, data_percentage=data_percentage)
    in_range(above=0, below=100, val_percentage=val_percentage)
    in_range(at_least=0, at_most=1, infill_rate=infill_rate)
    in_range(at_least=0, num_proc=num_proc, seed=seed)


def encoding():
    """What `encoding_type` means: with bpe the little model of the quickstart learns whose story it tells."""
    return {'auto': 'bpe' if source == 'sample' else 'char'}.get(encoding_type, encoding_type)


def given_tokenizer(bundled):
    """The tokenizer that the settings name, GPT-2's maybe in the folder `bundled`; None: to be learned."""
    if not tokenizer and encoding() != 'gpt2':
        return None
    found = tokenizer or (bundled if bundled.is_dir() else '')
    enc = open_tokenizer(found) if found else load_gpt2(offline)
    if encoding_type not in ('auto', enc.encoding):
        raise SettingError(f'{tokenizer} is {enc.encoding}: leave out --encoding_type {encoding_type}')
    return enc


# what `map` calls with a batch, {'text': list of str}, mostly in a worker process -------------

def look(batch):
    """Of each story: two numbers below 2**64, whatever the other stories are; its bytes, 0 if it is blank."""
    utf8 = [b'' if not text or text.isspace() else text.encode() for text in batch['text']]
    digests = b''.join(blake2b(data, digest_size=16).digest() for data in utf8)
    numbers = np.frombuffer(digests, '<u8').reshape(-1, 2)
    return {'split': numbers[:, 0], 'share': numbers[:, 1], 'bytes': [*map(len, utf8)]}


def alphabet(batch):
    """One row: every character of the stories."""
    return {'text': [characters(batch['text'])]}


def encode(batch, enc, rate):
    """One row: the stories' tokens, how many were infilled or too short for it, and how many characters of
    theirs the tokenizer has nothing for."""
    ids, kinds = infill.encode(enc, batch['text'], rate)
    _, infilled, too_short = np.bincount(kinds, minlength=3)
    lost = enc.n_lost(batch['text'], ids)
    return {'ids': [ids.tobytes()], 'infilled': [infilled], 'too_short': [too_short], 'lost': [lost]}


def map_piece(rows, stories, function, columns, cache, arguments):
    """The path of an Arrow file with the results for these rows."""
    import datasets
    datasets.disable_progress_bars()  # there is one for all pieces
    features = datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()})
    path = f'{cache}/{function.__name__}_{rows[0]}.arrow'
    stories.select(rows).map(function, batched=True, fn_kwargs=arguments, remove_columns='text',
                             features=features, cache_file_name=path)
    return path


def each_piece(stories, rows, function, columns, cache, **arguments):
    """Yields the results of stories.map(function) for these rows, about 16 MB of stories at a time: what a
    process reads of a mapped file counts as its memory. The processes are not those of `map`, which waits
    forever for one that is killed. columns: {name: type} of the results; cache: a folder for their files."""
    from datasets import Dataset

    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    pieces = np.array_split(rows, min(len(rows), 1 + stories.data.nbytes // 2**24))
    work = partial(map_piece, stories=stories, function=function, columns=columns, cache=cache,
                   arguments=arguments)
    pool = ProcessPoolExecutor(num_proc or cores)
    try:
        paths = map(work, pieces) if len(pieces) == 1 else pool.map(work, pieces)
        for path in tqdm(paths, function.__name__, len(pieces), unit=' pieces', disable=None):
            yield Dataset.from_file(path)
            Path(path).unlink()
    except BrokenExecutor:
        raise UserError('a worker process was killed, for lack of memory? Try --num_proc 1') from None
    finally:
        pool.shutdown(cancel_futures=True)


# the steps --------------------------------------------------------------------

def choose(loaded, cache):
    """Which stories to use: (all, {split: (rows, the bytes of each)}, number of blank ones). By their hashes:
    equal ones are in one split, and a smaller share is part of a larger one, whatever the order.
    Raises UserError where there are not stories for both splits."""
    from datasets import concatenate_datasets
    stories = concatenate_datasets([*loaded.values()])
    if not len(stories):
        raise UserError(f'{source} holds no stories')
    columns = {'split': 'uint64', 'share': 'uint64', 'bytes': 'int64'}
    tables = [piece.with_format('arrow')[:]
              for piece in each_piece(stories, np.arange(len(stories)), look, columns, cache)]
    split, share, size = (np.concatenate([table[name].to_numpy() for table in tables]) for name in columns)
    if not size.any():
        raise UserError(f'{source} holds no stories, and {len(stories):,} blank ones')
    val = np.arange(len(stories)) >= len(loaded['train'])
    if 'validation' not in loaded:
        first, last = split[size > 0].min(), split[size > 0].max()
        if first == last:
            raise UserError(f'{source} holds only one story, and training and validation need one each')
        bound = np.uint64(val_percentage / 100 * 2**64)
        val = split <= min(max(bound, first), last - np.uint64(1))  # of few stories, one at least in each
    used = {}
    for name, side in ('train', ~val & (size > 0)), ('val', val & (size > 0)):
        if not side.any():
            raise UserError(f'the {name} files of {source} hold no stories: remove them or fill them')
        side &= (share <= data_percentage / 100 * 2.0**64) | (share == share[side].min())
        used[name] = np.flatnonzero(side), size[side]
    return stories, used, int((size == 0).sum())


def learn(stories, rows, size, cache):
    """The tokenizer that `encoding_type` asks for, learned from the stories for training."""
    if encoding() == 'char':
        pieces = each_piece(stories, rows, alphabet, {'text': 'string'}, cache)
        return CharTokenizer.train([row['text'] for piece in pieces for row in piece])
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen = np.sort(order[size[order].cumsum() <= 100_000_000])
    pieces = each_piece(stories, rows[chosen], dict, {'text': 'string'}, cache)
    texts = [text for piece in pieces for text in piece['text']]
    return BPETokenizer.train(texts, vocab_size or (1536 if source == 'sample' else 4096))


def write_shards(split, stories, rows, size, enc, rate, folder, cache):
    """Writes the shards of a split into `folder`. Returns its entry of meta.json."""
    writer, counts = ShardWriter(folder, split), {'infilled': 0, 'too_short': 0, 'lost': 0}
    columns = {'ids': 'large_binary'} | dict.fromkeys(counts, 'int64')
    for piece in each_piece(stories, rows, encode, columns, cache, enc=enc, rate=rate):
        for row in piece:
            writer.write(np.frombuffer(row['ids'], '<u2'))
            counts = {name: n + row[name] for name, n in counts.items()}
    shards = writer.close()
    return {'stories': len(rows), 'tokens': sum(shard['tokens'] for shard in shards),
            'bytes': int(size.sum()), 'shards': shards} | counts


def main():
    began = time.perf_counter()
    check_settings()
    load = partial(load_stories, sample=partial(sample_stories.stories, 22_000, seed), offline=offline,
                   column=text_column)
    if bundle:
        return print(write_bundle(bundle, partial(load, source), offline))
    folder = Path(out_dir or Path(__file__).parent)
    with write_dataset_atomically(folder) as (new, cache):
        place = unpack(source, cache / 'bundle') if source.endswith('.tar') else source
        enc = given_tokenizer(cache / 'bundle' / 'gpt2')
        if files := token_files(source) if enc else {}:
            if infill_rate:
                raise SettingError(f'infill_rate is for stories, and {source} has tokens: leave it out')
            shares = val_percentage / 100, data_percentage / 100
            splits, said = write_streams(files, enc, tokenizer, *shares, new)
        else:
            # the stories, and which of them are for training and which for validation
            loaded, remark = load(place, cache, percentage=data_percentage)
            stories, used, blank = choose(loaded, cache)
            n_train, n_val = (len(rows) for rows, _ in used.values())
            said = [f'stories: {n_train:,} for training, {n_val:,} for validation, {blank:,} blank',
                    *[remark] * bool(remark)]
            # their tokens, by a tokenizer that is given or learned
            enc = enc or learn(stories, *used['train'], cache)
            rate = infill_rate if len(stories) > 2 else 0.0  # a document, divided, stays plain
            splits = {split: write_shards(split, stories, *chosen, enc, rate, new, cache)
                      for split, chosen in used.items()}
            if infill_rate and not splits['train']['infilled']:
                raise UserError(f'no story of {source} can be infilled: leave out --infill_rate')
        enc.save(new)
        meta = enc.about() | {'source': source, 'infill_rate': infill_rate, 'splits': splits}
        (new / 'meta.json').write_text(json.dumps(meta, indent=1) + '\n', encoding='utf-8')

    seconds = time.perf_counter() - began
    total = {key: sum(split.get(key, 0) for split in splits.values())
             for key in ('tokens', 'bytes', 'infilled', 'too_short', 'lost')}
    print(*said, sep='\n')
    if infill_rate:
        print(f"for infilling: {total['infilled']:,}; {total['too_short']:,} chosen but plain, as shorter "
              'than three sentences')
    if total['lost']:
        print(f"lost: {total['lost']:,} characters, for which {tokenizer} has no piece and no bytes")
    size, tokens = total['bytes'], total['tokens']
    print(f'tokens: {tokens:,} of {size / tokens:.2f} bytes each ({enc.encoding}, {enc.vocab_size:,} ids)')
    print(f'text: {size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s')
    recipe = '_'.join(['quickstart'] * (source == 'sample') + ['infill'] * (infill_rate > 0))
    dataset = f' --dataset {shlex.quote(out_dir)}' if out_dir else ''
    config = f" {script_path(f'config/{recipe}.py')}" if recipe else ''
    print('next: python', script_path('train.py') + config + dataset)


if __name__ == '__main__':
    configure(globals())
    run(main)
