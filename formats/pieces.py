"""Our tokenizers as the vocabularies of foreign files: a piece for each id, and merges."""

import base64
import json
from itertools import pairwise

from data.tokenizer import SPACE_MARK
from data.tokenizer_files import CONTROL, FIRST, GPT2_BYTES, INFILLING, NORMAL, UNUSED


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
    first = FIRST if tokenizer.lossless else FIRST[:3]
    for i in range(len(first), model.get_piece_size()):
        kind = CONTROL if model.is_control(i) else UNUSED if model.is_unused(i) else NORMAL
        own.append((model.id_to_piece(i).replace(SPACE_MARK, ' '), model.get_score(i), kind))
    return [*first, *own, *INFILLING]


def merges_of(pieces):
    """The pairs of pieces that make a piece, those to be merged first before."""
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    return [(text[:i], text[i:]) for text in sorted(scores, key=lambda text: -scores[text])
            for i in range(1, len(text)) if text[:i] in scores and text[i:] in scores]


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
