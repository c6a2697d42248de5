"""Our tokenizers as vocabularies for foreign files: a piece for each id, and merges.

A piece is (text, score, kind), as in data/tokenizer_files.py. The BPE encoders of other projects merge the
pair of pieces whose union scores highest, or work through a list of merges in order.
"""

import base64
import json
from itertools import pairwise

from data.hf_tokenizer import GPT2_BYTES
from data.sentencepiece_file import CONTROL, NORMAL, SPACE_MARK, UNUSED
from data.tokenizer_files import FIRST, INFILLING


def pieces_of(tokenizer):
    """Return the piece of each id; <blank> and <middle> are the last two."""
    data = tokenizer.files[tokenizer.file_name]
    if tokenizer.encoding == 'gpt2':
        return gpt2_pieces(data)
    if tokenizer.encoding == 'char':
        return FIRST + [(char, 0.0, NORMAL) for char in json.loads(data)] + INFILLING
    return bpe_pieces(data, tokenizer.lossless)


def gpt2_pieces(data):
    """Return the pieces of GPT-2's vocabulary, spelled as in its own files.

    data: lines in tiktoken's form, a token in base64 and its rank.
    """
    letter_of = {byte: letter for letter, byte in GPT2_BYTES.items()}
    pieces = []
    for rank, line in enumerate(data.splitlines()):
        token = base64.b64decode(line.split()[0])
        text = ''.join(letter_of[byte] for byte in token)
        pieces.append((text, -float(rank), NORMAL))
    return [*pieces, ('<|endoftext|>', 0.0, CONTROL), *INFILLING]


def bpe_pieces(data, lossless):
    """Return the pieces of a sentencepiece model. lossless: it has the 256 bytes."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = list(FIRST if lossless else FIRST[:3])
    for i in range(len(pieces), model.get_piece_size()):
        if model.is_control(i):
            kind = CONTROL
        elif model.is_unused(i):
            kind = UNUSED
        else:
            kind = NORMAL
        text = model.id_to_piece(i).replace(SPACE_MARK, ' ')
        pieces.append((text, model.get_score(i), kind))
    return pieces + INFILLING


def merges_of(pieces):
    """Return all pairs of pieces whose union is a piece too, in the order in which to merge them.

    Example: [('t', 'h'), ('th', 'e'), ('t', 'he')]
    """
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    merges = []
    for text in sorted(scores, key=scores.get, reverse=True):
        for i in range(1, len(text)):
            left, right = text[:i], text[i:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges


def gpt2_merges(pieces):
    """Return the merges of GPT-2's own files: one pair for each token that is longer than a byte.

    The pair is what earlier merges make of the letters of the token.
    """
    tokens = [text for text, _, kind in pieces if kind == NORMAL]
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        if rank < len(GPT2_BYTES):  # a single byte
            continue
        parts = list(token)
        while len(parts) > 2:  # merge the pair of the lowest rank, of equals the leftmost
            ranks = [rank_of.get(left + right, rank) for left, right in pairwise(parts)]
            i = ranks.index(min(ranks))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(tuple(parts))
    return merges
