"""Vocabularies as foreign files hold them: a piece for each id.

A piece is (text, score, kind). In the text a space is ' ', but GPT-2's are spelt as in its files; the pair
whose union scores highest is merged first; the kind is a number below, as in sentencepiece and in GGUF.
"""

import base64
import json
import struct
from itertools import pairwise

from data.tokenizer import SPACE_MARK, BPETokenizer, CharTokenizer

NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
FIRST = [('<unk>', 0.0, UNKNOWN), ('<s>', 0.0, CONTROL), ('</s>', 0.0, CONTROL),
         *((f'<0x{byte:02X}>', 0.0, BYTE) for byte in range(256))]
INFILLING = [('<blank>', 0.0, CONTROL), ('<middle>', 0.0, CONTROL)]

# How GPT-2's files spell a byte, in order of the ids: visible Latin-1 as itself, the others by U+0100 and on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
GPT2_BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(HIDDEN)}


def pieces_of(tokenizer):
    """The piece of each id, the infilling ones last."""
    data = tokenizer.files[tokenizer.file_name]
    if tokenizer.encoding == 'gpt2':
        letters = {byte: letter for letter, byte in GPT2_BYTES.items()}
        texts = [''.join(map(letters.get, base64.b64decode(line.split()[0]))) for line in data.splitlines()]
        own = [(text, -float(rank), NORMAL) for rank, text in enumerate(texts)]
        return [*own, ('<|endoftext|>', 0.0, CONTROL), *INFILLING]
    if tokenizer.encoding == 'char':
        return [*FIRST, *((char, 0.0, NORMAL) for char in json.loads(data)), *INFILLING]
    import sentencepiece
    model, own = sentencepiece.SentencePieceProcessor(model_proto=data), []
    for i in range(len(FIRST), model.get_piece_size()):
        kind = CONTROL if model.is_control(i) else UNUSED if model.is_unused(i) else NORMAL
        own.append((model.id_to_piece(i).replace(SPACE_MARK, ' '), model.get_score(i), kind))
    return [*FIRST, *own, *INFILLING]


def merges_of(pieces):
    """The pairs of pieces that make a piece, those to be merged first before."""
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    return [(text[:i], text[i:]) for text in sorted(scores, key=lambda text: -scores[text])
            for i in range(1, len(text)) if text[:i] in scores and text[i:] in scores]


def tokenizer_of(pieces):
    """The tokenizer with these pieces, the infilling ones not among them. ValueError if it cannot be ours."""
    if [text for text, _, _ in pieces[3:len(FIRST)]] != [text for text, _, _ in FIRST[3:]]:
        raise ValueError('its ids 3 to 258 are not the bytes')
    own = pieces[len(FIRST):]
    if all(len(text) == 1 for text, _, _ in own):  # nothing to merge
        return CharTokenizer(json.dumps([text for text, _, _ in own], ensure_ascii=False).encode())
    return BPETokenizer(sentencepiece_model(FIRST + own))


def sentencepiece_model(pieces):
    """The bytes of a sentencepiece BPE model with these pieces, a protocol buffer: tags and values."""
    model = b''
    for text, score, kind in pieces:  # pieces (1): piece (1), score (2), type (3)
        text = text.replace(' ', SPACE_MARK).encode()
        piece = b'\x0a' + varint(len(text)) + text + struct.pack('<cfcB', b'\x15', score, b'\x18', kind)
        model += b'\x0a' + varint(len(piece)) + piece
    # trainer_spec (2): model_type (3) BPE, vocab_size (4), byte_fallback (35)
    trainer = b'\x18\x02\x20' + varint(len(pieces)) + b'\x98\x02\x01'
    # normalizer_spec (3): name (1), add_dummy_prefix (3), and remove_extra_whitespaces (4) off
    return model + b'\x12' + varint(len(trainer)) + trainer + b'\x1a\x0e\x0a\x08identity\x18\x01\x20\x00'


def varint(n):
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def gpt2_merges(pieces):
    """As GPT-2's files have them, one for a token: what its letters become by the merges before it."""
    tokens = [text for text, _, kind in pieces if kind == NORMAL]
    ranks, merges = {token: rank for rank, token in enumerate(tokens)}, []
    for rank, token in enumerate(tokens[len(GPT2_BYTES):], len(GPT2_BYTES)):
        parts = list(token)
        while len(parts) > 2:
            _, i = min((ranks.get(a + b, rank), i) for i, (a, b) in enumerate(pairwise(parts)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(tuple(parts))
    return merges
