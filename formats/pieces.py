"""The vocabulary of a char or bpe tokenizer as the list of pieces that foreign files hold, and the way back.

A piece is (text, score, kind): a space in the text is ' ', the score is sentencepiece's (the pair whose union
scores highest is merged first), the kind is a number below, the same in sentencepiece and in GGUF.
"""

import json
import struct

from data.tokenizer import BYTE_PIECES, SPACE_MARK, BPETokenizer, CharTokenizer

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
FIRST = [('<unk>', 0.0, UNKNOWN), ('<s>', 0.0, CONTROL), ('</s>', 0.0, CONTROL),
         *((f'<0x{byte:02X}>', 0.0, BYTE) for byte in range(256))]
INFILLING = [('<blank>', 0.0, CONTROL), ('<middle>', 0.0, CONTROL)]


def pieces_of(tokenizer):
    """The piece of each id of a char or bpe tokenizer, the infilling ones last."""
    data = tokenizer.files[tokenizer.file_name]
    if tokenizer.encoding == 'char':
        return [*FIRST, *((char, 0.0, NORMAL) for char in json.loads(data)), *INFILLING]
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=data)

    def piece(i):
        kind = CONTROL if model.is_control(i) else UNUSED if model.is_unused(i) else NORMAL
        return model.id_to_piece(i).replace(SPACE_MARK, ' '), model.get_score(i), kind

    return [*FIRST, *map(piece, range(len(FIRST), model.get_piece_size())), *INFILLING]


def tokenizer_of(pieces):
    """The tokenizer with these pieces, the infilling ones not among them. ValueError if it cannot be ours."""
    if len(pieces) <= len(BYTE_PIECES):
        raise ValueError(f'it has {len(pieces)} tokens, not unk, bos, eos, the 256 bytes, and more')
    own = pieces[len(BYTE_PIECES):]
    if all(len(text) == 1 for text, _, _ in own):  # nothing to merge
        return CharTokenizer(json.dumps([text for text, _, _ in own], ensure_ascii=False).encode())
    return BPETokenizer(sentencepiece_model(FIRST + own))


def sentencepiece_model(pieces):
    """The bytes of a sentencepiece BPE model, a protocol buffer, with these pieces."""
    model = [_field(1, text.replace(' ', SPACE_MARK).encode()) + _field(2, score) + _field(3, kind)
             for text, score, kind in pieces]
    trainer = _field(3, 2) + _field(4, len(pieces)) + _field(35, 1)  # BPE, vocab_size, byte_fallback
    normalizer = _field(1, b'identity') + _field(3, 1) + _field(4, 0)  # a space before, none removed
    return b''.join(_field(1, piece) for piece in model) + _field(2, trainer) + _field(3, normalizer)


def _field(number, value):
    """A field of a protocol buffer: an int as a varint, a float as 32 bits, bytes with their length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack('<f', value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(n):
    out = b''
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])
