"""Token files that others made, as nanoGPT and llama2.c write them: flat uint16, in each split one stream.

nanoGPT's train.bin and val.bin hold GPT-2's ids, or numbers of characters: the place of each among the sorted
characters of the text, which is therefore given as the tokenizer (its meta.pkl says the same, but to read a
pickle is to run it). llama2.c's data00.bin, data01.bin, ... hold the ids of a sentencepiece model; the first
is for validation.
"""

from pathlib import Path

import numpy as np

from configurator import UserError
from data.shards import ShardWriter

CHUNK = 1 << 22  # tokens read at a time


def token_files(source):
    """{split: [paths]} of the token files in the folder `source`, {} where there are none: where stories lie
    beside them under the same names, as llama2.c has them, those are what counts."""
    files = sorted(file for file in Path(source).glob('*.bin') if file.is_file())
    val, train, data = ([file for file in files if file.stem.startswith(name)]
                        for name in ('val', 'train', 'data'))
    if data and not (val or train):
        val, train = (data[:1], data[1:]) if len(data) > 1 else ([], data)
    stories = [file for file in train + val if file.with_suffix('.json').exists()]
    return {'train': train, 'val': val} if train and not stories else {}


def write_streams(files, enc, tokenizer, val_share, share, folder):
    """Writes the shards of {split: [paths]} into `folder`. Returns the splits of meta.json, and what to say.

    enc: the tokenizer, out of the path `tokenizer`: a .txt is the text of nanoGPT's characters. val_share: of
    the tokens, the last, for validation where no file is. share: of each split's tokens, the first, that are
    used. Both are from 0 to 1. Raises UserError where a file does not hold such tokens.
    """
    ids = characters_of(enc, tokenizer) if tokenizer.endswith('.txt') else np.arange(enc.blank, dtype='<u2')
    streams = {split: opened(paths) for split, paths in files.items()}
    n_train, n_val = (sum(len(tokens) for _, tokens in streams[split]) for split in ('train', 'val'))
    bounds = {'train': (0, n_train), 'val': (0, n_val)}
    if files['val'] and not n_val:
        raise UserError(f"{files['val'][0]} is empty: remove it, and the end of the others is for validation")
    if not n_val:
        cut = n_train - max(2, int(n_train * val_share))
        streams['val'], bounds = streams['train'], {'train': (0, cut), 'val': (cut, n_train)}
    splits, unknown = {}, 0
    for split, (start, stop) in bounds.items():
        if stop - start < 2:
            raise UserError(f"{files['train'][0].parent} has too few tokens for training and validation")
        writer, stories, n_bytes = ShardWriter(folder, split), 0, 0
        for path, tokens in chunks(streams[split], start, start + max(2, int((stop - start) * share))):
            if tokens.max() >= len(ids):
                raise UserError(f"{path} has token {tokens.max()}, beyond the {len(ids):,} of "
                                f"{tokenizer or 'GPT-2'}: name the tokenizer that it was made with")
            tokens = ids[tokens]
            writer.write(tokens)
            stories, n_bytes = stories + int((tokens == enc.delimiter).sum()), n_bytes + enc.n_bytes(tokens)
            unknown += 0 if enc.lossless else int((tokens == 0).sum())
        shards = writer.close()
        splits[split] = {'stories': stories, 'tokens': sum(shard['tokens'] for shard in shards),
                         'bytes': n_bytes, 'shards': shards, 'infilled': 0, 'too_short': 0}
    names = ', '.join(file.name for paths in files.values() for file in paths)[:200]
    first = enc.decode(np.fromfile(folder / 'val_00000.bin', '<u2', 40))
    return splits, [f'tokens of {names}, such as {first!r} (no text? then another tokenizer made them)',
                    *[f'lost: {unknown:,} tokens are unknown, and stand for no text'] * (unknown > 0)]


def characters_of(enc, path):
    """What nanoGPT's numbers of the characters in the text `path` are in its CharTokenizer: uint16, 1-D."""
    ids = [enc.encode(char)[1:] for char in sorted({*Path(path).read_text(encoding='utf-8')})]
    if any(len(of_char) > 1 for of_char in ids):
        raise UserError(f'{path} has U+2581, which is three tokens here: no token file can have it')
    return np.array(ids, '<u2')[:, 0]


def opened(paths):
    """[(path, its memory-mapped tokens)]. Raises UserError for a file that ends in half a token."""
    for path in paths:
        if path.stat().st_size % 2:
            raise UserError(f'{path} has {path.stat().st_size:,} bytes: tokens of uint16 have two each')
    return [(path, np.memmap(path, '<u2', 'r')) for path in paths if path.stat().st_size]


def chunks(stream, start, stop):
    """Yields (path, tokens), in all the tokens start to stop of a stream that `opened` gives."""
    for path, tokens in stream:
        part = tokens[max(start, 0):max(stop, 0)]
        yield from ((path, part[i:i + CHUNK]) for i in range(0, len(part), CHUNK))
        start, stop = start - len(tokens), stop - len(tokens)
