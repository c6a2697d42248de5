"""Turn token files of other projects (nanoGPT, llama2.c) into our token shards, meta.json and a tokenizer.

    python data/token_files/prepare.py --source nanoGPT/data/openwebtext --encoding_type gpt2
    python data/token_files/prepare.py --source nanoGPT/data/shakespeare_char --tokenizer input.txt
    python data/token_files/prepare.py --source llama2.c/data/tok4096 --tokenizer tok4096.model

The files are flat uint16, without a header. nanoGPT's train.bin and val.bin hold GPT-2's ids, or numbers of
characters: the place of each in the sorted characters of the text, so give this text (a .txt) as the
tokenizer. (nanoGPT's meta.pkl says the same, but reading a pickle runs code.) llama2.c's data00.bin,
data01.bin, ... hold ids of a sentencepiece model; the first file is for validation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for the imports below

import re
import shlex
import struct

import numpy as np

from configurator import SettingError, UserError, configure, in_range, one_of, run, script_path
from data.files import refuse_stand_in
from data.shards import ShardWriter, write_dataset_atomically, write_meta
from data.tokenizer_files import load_gpt2, open_tokenizer

source = ''  # the folder of the token files
tokenizer = ''  # what made the tokens: a run, prepared folder, pretrained model, file, or nanoGPT's .txt
encoding_type = 'auto'  # gpt2 for GPT-2's vocabulary without a --tokenizer; auto: that of the tokenizer
data_percentage = 100.0  # percentage of each split's tokens to use, from its start
val_percentage = 0.0  # percentage of the tokens, at the end, for validation; 0: 1, or the files for it
out_dir = ''  # where to write; '' is the folder of this script
offline = False  # never use the network: read GPT-2's vocabulary from a cache

_CHUNK = 1 << 22  # tokens read at a time
_TEXT = b'\t\n\r' + bytes(range(32, 127))  # the bytes of ASCII text

# How files begin that are not flat tokens: {first bytes: what they are}
_HEADERS = {
    struct.pack('<i', 20240520): 'has the header of llm.c and modded-nanogpt: leave out its first 1,024 '
                                 'bytes, with tail -c +1025 FILE > FOLDER/train.bin',
    struct.pack('<i', 20240801): "has llm.c's header for tokens of 4 bytes, which do not fit uint16",
    b'LITPKDS': "has the header of litgpt's packed datasets",
    b'\x93NUMPY': 'is an .npy file: write its tokens into another folder, with '
                  "numpy.load(NAME).astype('<u2').tofile('train.bin')",
    b'PK\x03\x04': 'is a zip archive, such as a model of torch',
    b'\x1f\x8b': 'is compressed: unpack it with gunzip',
}

# -----------------------------------------------------------------------------

def main():
    check_settings()
    files = find_token_files(Path(source))
    folder = Path(out_dir or Path(__file__).resolve().parent)
    with write_dataset_atomically(folder) as (new, _):
        enc = load_tokenizer()
        our_ids = ids_of_their_tokens(enc)
        split_meta = {}
        n_unknown = 0
        for split, tokens in split_tokens(files).items():
            split_meta[split], unknown = write_shards(split, tokens, our_ids, enc, new)
            n_unknown += unknown
        enc.save(new)
        write_meta(new, enc, source, 0.0, split_meta)
        sample = enc.decode(np.fromfile(new / 'val_00000.bin', '<u2', 40))

    print_files(files)
    print(f'the first of validation: {sample!r} (if this is not text, another tokenizer made them)')
    if n_unknown:
        print(f'lost: {n_unknown:,} tokens are unknown, and stand for no text')
    n_tokens = split_meta['train']['tokens'] + split_meta['val']['tokens']
    print(f'tokens: {n_tokens:,} ({enc.encoding}, {enc.vocab_size:,} ids)')
    print('next: python', script_path('train.py'), '--dataset', shlex.quote(out_dir or 'token_files'))


def check_settings():
    """Check the settings. Raises SettingError."""
    if not source:
        raise SettingError('name the folder of the token files with --source')
    one_of(('auto', 'gpt2'), encoding_type=encoding_type)
    if not tokenizer and encoding_type != 'gpt2':
        raise SettingError('name the tokenizer that made the tokens: --tokenizer and its path (for the '
                           'characters of nanoGPT, their .txt), or --encoding_type gpt2')
    in_range(above=0, at_most=100, data_percentage=data_percentage)
    in_range(at_least=0, below=100, val_percentage=val_percentage)


def load_tokenizer():
    """Return the tokenizer that made the tokens."""
    if not tokenizer:
        return load_gpt2(offline)
    enc = open_tokenizer(tokenizer)
    if encoding_type not in ('auto', enc.encoding):
        raise SettingError(f'{tokenizer} is {enc.encoding}: leave out --encoding_type {encoding_type}')
    return enc


def find_token_files(folder):
    """Return {'train': paths, 'val': paths, 'unused': paths} of a folder.

    Raises UserError if files for training are missing, or a file is not flat uint16.
    """
    if folder.is_file():
        raise UserError(f'{folder} is a file: name its folder, with train*.bin and val*.bin, or data*.bin')
    files = []
    if folder.is_dir():  # not with glob, for which a folder that cannot be read is empty
        files = sorted(file for file in folder.iterdir() if file.suffix == '.bin' and file.is_file())
    train = [file for file in files if re.match('train(?![a-z])', file.stem)]
    val = [file for file in files if re.match('val(?![a-z])', file.stem)]
    shards = [file for file in files if re.match('data(?![a-z])', file.stem)]  # llama2.c's
    if not train and not val and len(shards) > 1:
        val, train = shards[:1], shards[1:]
    elif not train and not val:
        train = shards
    unused = [file for file in files if file not in train + val]
    if not train and files:
        raise UserError(f'{folder} has {files[0].name}, but no train*.bin (or data*.bin): name the files for '
                        'training so')
    if not train:
        raise UserError(f'{folder} holds no token files: train*.bin and val*.bin, or data*.bin')
    for file in train + val:
        check_layout(file)
    if val and not any(file.stat().st_size for file in val):
        raise UserError(f'{val[0]} is empty: remove it, and the end of the others is for validation')
    if val and val_percentage > 0:
        raise SettingError(f'val_percentage is for files without a validation split, but {folder} has '
                           f'{val[0].name}: leave it out, or move that file away')
    return {'train': train, 'val': val, 'unused': unused}


def check_layout(path):
    """Raise UserError unless a file is flat uint16, as far as its size, beginning and pattern show."""
    refuse_stand_in(path)
    size = path.stat().st_size
    with open(path, 'rb') as file:
        start = file.read(4096)
    for beginning, what in _HEADERS.items():
        if start.startswith(beginning):
            what = what.replace('FILE', shlex.quote(str(path))).replace('NAME', repr(str(path)))
            raise UserError(f'{path} {what}')
    if len(start) >= 64 and all(byte in _TEXT for byte in start):
        raise UserError(f'{path} is text, not tokens: data/tiny_stories/prepare.py reads text, from a .txt')
    if size % 2:
        raise UserError(f'{path} has {size:,} bytes: tokens of uint16 have two each')
    dtype = token_type(np.fromfile(path, '<u2', _CHUNK))
    if dtype != '<u2':
        raise UserError(
            f'{path} has {dtype[-1]} bytes for each token, where two are expected: write them into another '
            f"folder, with numpy.fromfile({str(path)!r}, '{dtype}').astype('<u2').tofile('train.bin'); ids "
            'above 65,535 do not fit')


def token_type(numbers):
    """Return the NumPy type of the tokens in a file, seen from its first uint16 numbers.

    Example: the tokens 5, 70000, 9 in four bytes each are the numbers 5, 0, 4464, 1, 9, 0. Every second one
    is 0, or in a large vocabulary at most 3, as none has 2**18 tokens.
    """
    numbers = numbers[:len(numbers) // 4 * 4].reshape(-1, 4)
    if len(numbers) < 4:  # too few to tell
        return '<u2'
    limit = 3 if numbers.max() > 255 else 0
    is_small = tuple(bool(highest <= limit) for highest in numbers.max(axis=0))
    types = {
        (False, True, False, True): '<u4',
        (False, True, True, True): '<u8',
        (True, False, True, False): '>u4',
        (True, True, True, False): '>u8',
    }
    return types.get(is_small, '<u2')


def print_files(files):
    """Print which files are for training and for validation, and which are not used."""
    names = {use: ', '.join(file.name for file in paths)[:200] for use, paths in files.items()}
    val = names['val'] or f"the last {val_percentage or 1:g}% of these tokens"
    print(f"training: {names['train']}; validation: {val}")
    if names['unused']:
        print(f"not used: {names['unused']}")


def split_tokens(files):
    """Return {split: its tokens}, as `token_chunks` yields them.

    Without files for validation, these are the last `val_percentage` percent of the tokens (0: 1 percent). Of
    each split, the first `data_percentage` percent are taken. Raises UserError if a split has fewer than two
    tokens.
    """
    n_train = count_tokens(files['train'])
    n_val = count_tokens(files['val'])
    if n_val:
        parts = {'train': (files['train'], 0, n_train), 'val': (files['val'], 0, n_val)}
    else:
        cut = n_train - max(2, int(n_train * ((val_percentage or 1) / 100)))
        parts = {'train': (files['train'], 0, cut), 'val': (files['train'], cut, n_train)}
    splits = {}
    for split, (paths, start, stop) in parts.items():
        if stop - start < 2:
            raise UserError(f'{paths[0].parent} has too few tokens for training and validation')
        n_used = max(2, int((stop - start) * (data_percentage / 100)))
        splits[split] = token_chunks(paths, start, start + n_used)
    return splits


def count_tokens(paths):
    return sum(path.stat().st_size // 2 for path in paths)


def token_chunks(paths, start, stop):
    """Yield (path, uint16 array) for tokens start to stop of the files, which are one stream."""
    offset = 0  # the stream's position of the file's first token
    for path in paths:
        n_tokens = count_tokens([path])
        if n_tokens:
            tokens = np.memmap(path, '<u2', 'r')
            first = max(start - offset, 0)
            last = min(stop - offset, n_tokens)
            for i in range(first, last, _CHUNK):
                yield path, tokens[i:min(i + _CHUNK, last)]
        offset += n_tokens


def ids_of_their_tokens(enc):
    """Return our id of each of their tokens, a uint16 array.

    They are the same, unless a .txt was given: then their token i is the i-th character of the text, sorted.
    """
    if not tokenizer.endswith('.txt'):
        return np.arange(enc.blank, dtype='<u2')
    ids = []
    for char in sorted(set(Path(tokenizer).read_text(encoding='utf-8'))):
        of_char = enc.encode(char)[1:]  # without the space before it
        if len(of_char) > 1:
            raise UserError(f'{tokenizer} has U+2581, which is three tokens here: no token file can have it')
        ids += of_char
    return np.array(ids, '<u2')


def write_shards(split, chunks, our_ids, enc, folder):
    """Write the shards of a split into `folder`. Return (entry of meta.json, number of unknown tokens).

    Raises UserError if there is a token that the tokenizer does not have.
    """
    writer = ShardWriter(folder, split)
    counts = {'stories': 0, 'tokens': 0, 'bytes': 0}
    n_unknown = 0
    for path, their_tokens in chunks:
        highest = their_tokens.max()
        if highest >= len(our_ids):
            raise UserError(f"{path} has token {highest}, beyond the {len(our_ids):,} of "
                            f"{tokenizer or 'GPT-2'}: name the tokenizer that it was made with")
        tokens = our_ids[their_tokens]
        writer.write(tokens)
        counts['stories'] += int((tokens == enc.delimiter).sum())
        counts['tokens'] += len(tokens)
        counts['bytes'] += enc.n_bytes(tokens)
        if not enc.lossless:
            n_unknown += int((tokens == 0).sum())
    if counts['bytes'] <= 0:
        raise UserError(f'the {split} tokens of {source} spell no text: name the tokenizer that made them')
    return counts | {'infilled': 0, 'too_short': 0, 'shards': writer.close()}, n_unknown


if __name__ == '__main__':
    configure(globals())
    run(main)
