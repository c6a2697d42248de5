"""One page that writes stories in a browser: what formats/page/tokenizer.js is told of a tokenizer."""

import io
import json
import struct
from itertools import chain

from configurator import UserError
from data.tokenizer import BYTE_PIECES, FIRST_BYTE
from data.tokenizer_files import CONTROL, GPT2_BYTES, NORMAL, UNUSED
from formats.pieces import pieces_of

BPE, USER_DEFINED = 2, 4  # sentencepiece's numbers of a kind of model, and of a kind of piece
CLASSES = {'L': r'\p{L}', 'N': r'\p{N}', 's': r'\s'}  # of characters, in GPT-2's pattern


def vocabulary(tokenizer):
    """All of a tokenizer, as plain values not much longer than its pieces. UserError if the page has no such.

    pieces: those of the ids from `first` on. char has them in one string; so has gpt2, with spaces between
    them and a letter for each byte, as in GPT-2's files.
    """
    data, first = tokenizer.files[tokenizer.file_name], len(BYTE_PIECES) if tokenizer.lossless else FIRST_BYTE
    about = tokenizer.about() | {'prefix': tokenizer.prefix, 'lossless': tokenizer.lossless}
    if tokenizer.encoding == 'char':
        return about | {'first': first, 'pieces': ''.join(json.loads(data))}
    if tokenizer.encoding == 'bpe':
        return about | {'first': first} | sentencepiece_vocabulary(data, first)
    letters = ''.join(sorted(GPT2_BYTES, key=GPT2_BYTES.get))
    tokens = [text for text, _, kind in pieces_of(tokenizer) if kind == NORMAL]
    return about | {'pieces': ' '.join(tokens), 'letters': letters,
                    'classes': {name: ranges(pattern) for name, pattern in CLASSES.items()}}


def sentencepiece_vocabulary(data, first):
    """Of a BPE model: its pieces, '' for control ones, and what is unusual in how they are merged."""
    model = [*fields(data)]  # pieces (1), trainer_spec (2), normalizer_spec (3)
    trainer = dict(chain.from_iterable(fields(value) for name, value in model if name == 2))
    normalizer = dict(chain.from_iterable(fields(value) for name, value in model if name == 3))
    if trainer.get(3) != BPE or normalizer.get(5) == 0:  # model_type, escape_whitespaces
        raise UserError('the page reads no sentencepiece model but of the usual bpe kind: type --format '
                        'safetensors')
    pieces = [{2: bytes(4), 3: NORMAL} | dict(fields(value)) for name, value in model if name == 1][first:]
    pieces = [(piece[1].decode(), *struct.unpack('<f', piece[2]), piece[3]) for piece in pieces]
    found = {'pieces': ['' if kind == CONTROL else text for text, _, kind in pieces],
             'unused': [text for text, _, kind in pieces if kind == UNUSED],
             'userDefined': [text for text, _, kind in pieces if kind == USER_DEFINED]}
    scores = [score for _, score, _ in pieces]
    best = sorted({*scores}, reverse=True)
    if scores != best:  # else each piece is merged before those of higher ids
        rank = {score: i for i, score in enumerate(best)}
        found['ranks'] = [rank[score] for score in scores]
    return found


def fields(message):
    """Yields (number, value) of each field of a protocol buffer: an int, or the bytes of all but varints."""
    stream = io.BytesIO(message)
    while tag := varint(stream):
        kind = tag & 7
        yield tag >> 3, varint(stream) if kind == 0 else stream.read({1: 8, 5: 4}.get(kind) or varint(stream))


def varint(stream):
    """0 at the end."""
    value = shift = 0
    for byte in iter(lambda: stream.read(1), b''):
        value |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            break
    return value


def ranges(pattern):
    """What is in [] in a regular expression for the characters that `pattern` has in tiktoken's engine: which
    they are depends on its version of Unicode."""
    import tiktoken
    each_byte = {bytes([byte]): byte for byte in range(256)}
    finder = tiktoken.Encoding('finder', pat_str=pattern, mergeable_ranks=each_byte, special_tokens={})
    every = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    found = bytes(finder.encode_ordinary(every)).decode()  # what does not match has no tokens
    points = {*map(ord, found)}
    starts = [point for point in sorted(points) if point - 1 not in points]
    ends = [point for point in sorted(points) if point + 1 not in points]
    return ''.join(f'{chr(start)}-{chr(end)}' for start, end in zip(starts, ends, strict=True))
