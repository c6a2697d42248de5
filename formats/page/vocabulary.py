"""What the page's tokenizer.js needs to know of a tokenizer, as plain values."""

import io
import json
import struct

from configurator import UserError
from data.hf_tokenizer import GPT2_BYTES
from data.sentencepiece_file import CONTROL, NORMAL, UNUSED
from data.tokenizer import BYTE_PIECES, FIRST_BYTE
from formats.pieces import pieces_of

# numbers in sentencepiece_model.proto
MODEL_TYPE_BPE = 2
USER_DEFINED = 4  # a kind of piece: never split and never merged
PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3  # fields of the model
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3  # fields of a piece
MODEL_TYPE = 3  # a field of trainer_spec
ESCAPE_WHITESPACES = 5  # a field of normalizer_spec

# how values are stored in a protocol buffer
VARINT, FIXED_64_BITS, LENGTH_DELIMITED, FIXED_32_BITS = 0, 1, 2, 5

GPT2_CLASSES = {'L': r'\p{L}', 'N': r'\p{N}', 's': r'\s'}  # classes of characters in GPT-2's pattern


def page_vocabulary(tokenizer):
    """Return everything that the page needs of a tokenizer: a dict that is little longer than its pieces.

    'pieces' are those of the ids from 'first' on. char has them in one string; gpt2 too, with spaces between
    them and a letter for each byte, as in GPT-2's files. Raises UserError if the page has no such tokenizer.
    """
    data = tokenizer.files[tokenizer.file_name]
    about = tokenizer.about() | {'prefix': tokenizer.prefix, 'lossless': tokenizer.lossless}
    if tokenizer.encoding == 'gpt2':
        return about | gpt2_vocabulary(tokenizer)
    about['first'] = len(BYTE_PIECES) if tokenizer.lossless else FIRST_BYTE
    if tokenizer.encoding == 'char':
        return about | {'pieces': ''.join(json.loads(data))}
    return about | sentencepiece_vocabulary(data, about['first'])


def gpt2_vocabulary(tokenizer):
    tokens = [text for text, _, kind in pieces_of(tokenizer) if kind == NORMAL]
    return {
        'pieces': ' '.join(tokens),
        'letters': ''.join(sorted(GPT2_BYTES, key=GPT2_BYTES.get)),
        'classes': {name: character_ranges(pattern) for name, pattern in GPT2_CLASSES.items()},
    }


def character_ranges(pattern):
    """Return the characters that match `pattern`, as ranges for the [] of a regular expression: 'A-Za-z...'.

    tiktoken's engine finds them, as it decides how GPT-2's tokenizer splits a text: which characters are
    letters, say, depends on the engine's version of Unicode.
    """
    import tiktoken

    each_byte = {bytes([byte]): byte for byte in range(256)}
    finder = tiktoken.Encoding('finder', pat_str=pattern, mergeable_ranks=each_byte, special_tokens={})
    code_points = [*range(0xD800), *range(0xE000, 0x110000)]  # all but surrogates
    every_character = ''.join(chr(point) for point in code_points)
    matching = bytes(finder.encode_ordinary(every_character)).decode()  # the others get no tokens
    points = {ord(char) for char in matching}
    starts = sorted(point for point in points if point - 1 not in points)
    ends = sorted(point for point in points if point + 1 not in points)
    return ''.join(f'{chr(start)}-{chr(end)}' for start, end in zip(starts, ends, strict=True))


# sentencepiece's file ---------------------------------------------------------

def sentencepiece_vocabulary(data, first):
    """Return the vocabulary of a sentencepiece BPE model, from id `first` on.

    data: the bytes of tokenizer.model, a protocol buffer. Returns
        'pieces'        the texts; '' for control pieces, which no text may spell
        'unused'        texts of pieces that are split again
        'userDefined'   texts of pieces that are neither split nor merged
        'ranks'         the order in which pieces are merged, if it is not the order of their ids
    Raises UserError if the model is not BPE, or keeps spaces as they are.
    """
    model = read_message(data)
    trainer = dict(fields_of_all(model, TRAINER_SPEC))
    normalizer = dict(fields_of_all(model, NORMALIZER_SPEC))
    if trainer.get(MODEL_TYPE) != MODEL_TYPE_BPE or normalizer.get(ESCAPE_WHITESPACES) == 0:
        raise UserError('the page can use only the usual kind of sentencepiece model, BPE: type --format '
                        'safetensors')
    pieces = read_pieces(model)[first:]
    vocabulary = {
        'pieces': ['' if kind == CONTROL else text for text, _, kind in pieces],
        'unused': [text for text, _, kind in pieces if kind == UNUSED],
        'userDefined': [text for text, _, kind in pieces if kind == USER_DEFINED],
    }
    scores = [score for _, score, _ in pieces]
    falling = sorted(set(scores), reverse=True)
    if scores != falling:  # else a piece is merged before those of higher ids
        rank_of = {score: rank for rank, score in enumerate(falling)}
        vocabulary['ranks'] = [rank_of[score] for score in scores]
    return vocabulary


def read_pieces(model):
    """Return the pieces of a model, [(field, value)], as [(text, score, kind)]."""
    pieces = []
    for number, message in model:
        if number != PIECES:
            continue
        piece = dict(read_message(message))
        [score] = struct.unpack('<f', piece.get(PIECE_SCORE, bytes(4)))
        pieces.append((piece[PIECE_TEXT].decode(), score, piece.get(PIECE_TYPE, NORMAL)))
    return pieces


def fields_of_all(message, number):
    """Return the fields of all messages that are in the field `number`: together they are one message."""
    fields = []
    for field, value in message:
        if field == number:
            fields += read_message(value)
    return fields


def read_message(data):
    """Return the fields of a protocol buffer as [(number, value)]; `data` is a whole message, bytes.

    A message is a sequence of fields. Each begins with a tag, a varint: the number of the field in the .proto
    file times 8, plus how the value is stored. A value is a varint (returned as an int), 8 or 4 bytes, or a
    varint n and n bytes: a text or another message (all returned as bytes).

    Example: 0a 02 68 69 18 01 -> [(1, b'hi'), (3, 1)]

    https://protobuf.dev/programming-guides/encoding
    """
    stream = io.BytesIO(data)
    fields = []
    while stream.tell() < len(data):
        tag = read_varint(stream)
        number, storage = tag >> 3, tag & 7
        if storage == VARINT:
            value = read_varint(stream)
        elif storage == FIXED_64_BITS:
            value = stream.read(8)
        elif storage == FIXED_32_BITS:
            value = stream.read(4)
        elif storage == LENGTH_DELIMITED:
            value = stream.read(read_varint(stream))
        else:
            raise ValueError(f'field {number} of a protocol buffer is stored in an unknown way, {storage}')
        fields.append((number, value))
    return fields


def read_varint(stream):
    """Read an int of any size: seven bits per byte, the lowest first; the eighth says that more follow.

    Example: ac 02 -> 0x2c + (2 << 7) = 300
    """
    value = shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value
