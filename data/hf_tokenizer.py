"""Hugging Face's tokenizer.json, read if it encodes as Llama's or GPT-2's; and GPT-2's other files.

A tokenizer.json says what happens to a text, step by step: `normalizer` changes it, `pre_tokenizer` splits
it, `model` makes pieces of each part. A file is read only if each step is one that our tokenizers take, too.
"""

import base64
import hashlib
import re
import reprlib

from data.sentencepiece_file import CONTROL, NORMAL, SPACE_MARK
from data.tokenizer import GPT2_SHA256, GPT2Tokenizer, check_n_ids

GPT2_HELP = ('where there is internet, hf download gpt2 vocab.json --local-dir gpt2; bring this folder over, '
             'then type --tokenizer gpt2')
BYTE_LEVEL = "it is a byte-level BPE tokenizer, which this project does not read except GPT-2's own"

# How GPT-2's files spell a byte, in order of the ids: visible Latin-1 as itself, the others as U+0100 and on
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
GPT2_BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(0x100 + i): byte for i, byte in enumerate(HIDDEN)}
GPT2_SPACE = chr(0x120)
END_OF_TEXT = '<|endoftext|>'

BYTE_PIECE = re.compile('<0x[0-9A-F]{2}>')
MAX_PIECE = 256  # characters: splitting longer ones at each place would take long
LAST = 10**9  # the rank of a piece that nothing is merged to
BEGINNING = 100_000  # characters that show what a text is
MERGES_LINES = 5  # so many lines that only merge what lines before have made are no poem
# They are alone on a line in vocabularies only
SPECIAL_PIECES = {'<unk>', '<UNK>', '[UNK]', '<|unk|>', '<pad>', '<PAD>', '[PAD]', '<|pad|>'}

# The three ways in which files of Llama's kind put a space before a text and write spaces
PREPEND_MARK = [{'type': 'Prepend', 'prepend': SPACE_MARK},
                {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE_MARK}]
METASPACE = {'type': 'Metaspace', 'replacement': SPACE_MARK, 'split': False}
DECODER = [{'type': 'ByteFallback'}, {'type': 'Fuse'},
           {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]
MARK_DECODER = [{'type': 'Replace', 'pattern': {'String': SPACE_MARK}, 'content': ' '}, *DECODER]
LLAMA_STEPS = [
    # as transformers 4 converts a sentencepiece model
    {'normalizer': PREPEND_MARK, 'pre_tokenizer': [], 'decoder': MARK_DECODER},
    # as transformers 5 does. Only to a text that begins with a space it adds none
    {'normalizer': [], 'pre_tokenizer': [METASPACE | {'prepend_scheme': 'first'}], 'decoder': MARK_DECODER},
    {'normalizer': [], 'pre_tokenizer': [METASPACE | {'prepend_scheme': 'always'}], 'decoder': MARK_DECODER},
    # as export.py --format hf writes
    {'normalizer': [{'type': 'Prepend', 'prepend': ' '}], 'pre_tokenizer': [], 'decoder': DECODER},
]


# tokenizer.json -----------------------------------------------------------------

def check_model_type(model):
    """Raise ValueError unless the `model` of a tokenizer.json is BPE."""
    kind = model.get('type', 'BPE' if 'merges' in model else None)  # older files name no type
    if kind != 'BPE':
        raise ValueError(f'the type of its model is {reprlib.repr(kind)}; only BPE can be read')


def check_model_options(model):
    """Raise ValueError unless the `model` of a tokenizer.json does nothing but merge, in order."""
    for name in 'dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'ignore_merges':
        if model.get(name):
            raise ValueError(f'its model has {name} {reprlib.repr(model[name])}, which cannot be read')


def vocabulary_of(table):
    """Return a tokenizer.json's {piece: id}. Raises ValueError if it is something else, or too large."""
    vocab = table.get('vocab')
    if isinstance(vocab, dict):
        check_n_ids(len(vocab))
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise ValueError('its vocabulary is not an object of pieces and ids')
    return vocab


def check_ids(vocab):
    """Raise ValueError unless the ids of {piece: id} are 0, 1, and so on."""
    if sorted(vocab.values()) != list(range(len(vocab))):
        highest = max(vocab.values(), default=0)
        raise ValueError(f'its ids are not the numbers from 0 on: {len(vocab):,} pieces, ids up to {highest}')


def merges_of(model):
    """Return the merges of a tokenizer.json, a list of (left, right), from 'a b' or ['a', 'b']."""
    merges = model.get('merges')
    if not isinstance(merges, list):
        raise ValueError('it has no list of merges')
    pairs = []
    for merge in merges:
        parts = merge.split(' ') if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f'{reprlib.repr(merge)} is not a pair of pieces')
        pairs.append(tuple(parts))
    return pairs


def steps_of(content, name):
    """Return the steps of a `normalizer`, `pre_tokenizer` or `decoder`, a list of dicts."""
    step = content.get(name)
    if step is None:
        return []
    if not isinstance(step, dict):
        raise ValueError(f'its {name} is {reprlib.repr(step)}')
    if step.get('type') != 'Sequence':
        return [step]
    for key in 'normalizers', 'pretokenizers', 'decoders':
        steps = step.get(key)
        if isinstance(steps, list) and all(isinstance(step, dict) for step in steps):
            return steps
    raise ValueError(f'its {name} is {reprlib.repr(step)}')


def is_byte_level(content):
    """Return whether a tokenizer.json writes bytes as GPT-2 does."""
    for name in 'normalizer', 'pre_tokenizer', 'decoder':
        for step in steps_of(content, name):
            if step.get('type') == 'ByteLevel':
                return True
    return False


def special_tokens(content, known):
    """Return `known`, a set of special tokens, and the texts of the `added_tokens` of a tokenizer.json.

    Raises ValueError if one is not special: the library looks for it in each text before the model does.
    """
    tokens = content.get('added_tokens') or []
    if not isinstance(tokens, list):
        raise ValueError('its added_tokens are not a list')
    texts = set(known)
    for token in tokens:
        text = token.get('content') if isinstance(token, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{reprlib.repr(token)} is not an added token')
        if token.get('special') is not True and text not in known:
            raise ValueError(f'its added_tokens have {reprlib.repr(text)}, which is not special: '
                             'such tokens cannot be read')
        texts.add(text)
    return texts


# Llama's kind ---------------------------------------------------------------------

def llama_pieces(content):
    """Return the pieces of a tokenizer.json of Llama's kind: (text, score, kind), in order of the ids.

    Such a file is made from a sentencepiece model. Raises ValueError if the tokenizers library would give
    other ids for a text than sentencepiece does with these pieces.
    """
    space = check_llama_steps(content)
    model = content['model']
    check_model_options(model)
    vocab = vocabulary_of(model)
    check_ids(vocab)
    check_unknown_characters(model, has_bytes='<0x00>' in vocab)

    special = special_tokens(content, known={'<unk>', '<s>', '</s>'})
    texts = sorted(vocab, key=vocab.get)
    normal = [text for text in texts if text not in special and not BYTE_PIECE.fullmatch(text)]
    other_space = SPACE_MARK if space == ' ' else ' '
    for text in normal:
        if other_space in text:
            raise ValueError(f'it writes a space as {space!r}, and has a piece {reprlib.repr(text)}')
    ranks = merge_ranks(merges_of(model), texts, normal)
    pieces = []
    for text in texts:
        kind = CONTROL if text in special else NORMAL
        pieces.append((text.replace(space, ' '), -float(ranks.get(text, LAST)), kind))
    return pieces


def check_llama_steps(content):
    """Return how a tokenizer.json of Llama's kind writes a space.

    Raises ValueError, naming the field, if its steps are not those of Llama's kind.
    """
    steps = {name: steps_of(content, name) for name in ('normalizer', 'pre_tokenizer', 'decoder')}
    if steps in LLAMA_STEPS:
        return ' ' if steps['decoder'] == DECODER else SPACE_MARK
    for name in steps:
        if steps[name] not in [known[name] for known in LLAMA_STEPS]:
            raise ValueError(f"its {name} is {reprlib.repr(content.get(name))}, not Llama's or GPT-2's")
    raise ValueError('its normalizer, pre_tokenizer and decoder do not belong together')


def check_unknown_characters(model, has_bytes):
    """Raise ValueError unless a character without a piece becomes its bytes or, without bytes, <unk>."""
    byte_fallback = bool(model.get('byte_fallback'))
    if byte_fallback != has_bytes:
        what = 'has bytes' if has_bytes else 'has no bytes'
        raise ValueError(f'its model has byte_fallback {byte_fallback}, but its vocabulary {what}')
    if not has_bytes and (model.get('unk_token') != '<unk>' or not model.get('fuse_unk')):
        raise ValueError('its vocabulary has no bytes, and its model not unk_token <unk> with fuse_unk')


def merge_ranks(merges, texts, normal):
    """Return {piece: rank} of the pieces that merges make, those that are merged first come first.

    merges: list of (left, right). texts: all pieces. normal: those that are text, in order of the ids.
    sentencepiece merges any two pieces whose union is a piece. Raises ValueError if these merges do not.
    """
    known = set(texts)
    normal_set = set(normal)
    ranks = {}
    last = None
    for left, right in merges:
        union = left + right
        if not {left, right, union} <= known:
            raise ValueError(f'it merges {reprlib.repr((left, right))} and lacks a piece for it')
        if union not in normal_set:  # such as </s>: here it is no special token if a text spells it
            continue
        if union != last and union in ranks:
            raise ValueError(f'it merges {reprlib.repr(union)} at two places of its list')
        ranks.setdefault(union, len(ranks) + 1)
        last = union

    listed = set(merges)
    for i, text in enumerate(normal):
        if i == 0 and text not in ranks:
            # transformers 4 left out the merges of the piece with the score 0, the first that was learned
            ranks[text] = 0
            continue
        for pair in splits(text, normal_set):
            if pair not in listed:
                raise ValueError(f'its merges leave out {reprlib.repr(pair)}, which sentencepiece merges')
    return ranks


def splits(text, pieces):
    """Return all (left, right) of two pieces that make `text`. Raises ValueError if it is very long."""
    if len(text) > MAX_PIECE:
        raise ValueError(f'it has a piece of {len(text):,} characters')
    pairs = []
    for i in range(1, len(text)):
        if text[:i] in pieces and text[i:] in pieces:
            pairs.append((text[:i], text[i:]))
    return pairs


# GPT-2's vocabulary ---------------------------------------------------------------

def gpt2_of_tokenizer_json(content):
    """Return GPT-2's tokenizer from its tokenizer.json. Raises ValueError if it is another tokenizer."""
    model = content['model']
    tokens = gpt2_tokens(vocabulary_of(model))
    data = gpt2_data(tokens)

    check_model_options(model)
    pre_tokenizer = {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': True}
    # older files have no use_regex; trim_offsets is about positions in the text, not about ids
    steps = [{'use_regex': True} | step for step in steps_of(content, 'pre_tokenizer')]
    for step in steps:
        step.pop('trim_offsets', None)
    if steps != [pre_tokenizer]:
        raise ValueError(f"its pre_tokenizer is {reprlib.repr(content.get('pre_tokenizer'))}, not GPT-2's")
    if steps_of(content, 'normalizer'):
        raise ValueError(f"its normalizer is {reprlib.repr(content['normalizer'])}, and GPT-2 has none")
    merged = [left + right for left, right in merges_of(model)]
    if merged != tokens[len(GPT2_BYTES):]:
        raise ValueError("its merges are not GPT-2's")
    special_tokens(content, known={END_OF_TEXT})
    return GPT2Tokenizer(data)


def gpt2_of_vocabulary(vocab):
    """Return GPT-2's tokenizer from its vocab.json or encoder.json, {token: id}.

    Raises ValueError if it is another.
    """
    tokens = gpt2_tokens(vocabulary_of({'vocab': vocab}))
    return GPT2Tokenizer(gpt2_data(tokens))


def gpt2_of_merges(text):
    """Return GPT-2's tokenizer from its merges.txt or vocab.bpe. Raises ValueError if it is another."""
    check_n_ids(text.count('\n'))  # before there is a list of them
    merged = [line.replace(' ', '') for line in text.splitlines() if not line.startswith('#version')]
    tokens = [*GPT2_BYTES, *merged]  # the bytes come first, then what each line merges
    return GPT2Tokenizer(gpt2_data(tokens))


def gpt2_tokens(vocab):
    """Return the tokens of {token: id} in order of the ids, without <|endoftext|>."""
    check_ids(vocab)
    return sorted(vocab.keys() - {END_OF_TEXT}, key=vocab.get)


def gpt2_data(tokens):
    """Return GPT-2's vocabulary in tiktoken's form, from its tokens in the spelling of its files, by id.

    Raises ValueError if they are others.
    """
    check_n_ids(len(tokens))
    lines = []
    for rank, token in enumerate(tokens):
        token_bytes = bytes(GPT2_BYTES.get(letter, 0) for letter in token)
        lines.append(base64.b64encode(token_bytes) + b' %d\n' % rank)
    data = b''.join(lines)
    if hashlib.sha256(data).hexdigest() == GPT2_SHA256:
        return data
    if any(GPT2_SPACE in token for token in tokens):
        raise ValueError(BYTE_LEVEL)
    raise ValueError(f"it is not GPT-2's vocabulary: {GPT2_HELP}")


def is_merges(text):
    """Return whether a text begins like a list of merges, such as GPT-2's merges.txt.

    Each line has two pieces, a piece of several characters was made by a line before it, and no line comes
    twice. (Not quite all: a file that lacks a line is a damaged list of merges rather than a text.)
    """
    lines = first_lines(text)
    if lines and '#version:' in lines[0]:
        return True
    made = set()
    n_merges = 0
    for line in lines:
        parts = line.split(' ')
        if len(parts) != 2:
            return False
        n_merges += line not in made and all(len(part) == 1 or part in made for part in parts)
        made.update([line, ''.join(parts)])
    return len(lines) >= MERGES_LINES and n_merges > 0.9 * len(lines)


def first_lines(text):
    """Return the first whole lines of a text, at most 100."""
    lines = text[:BEGINNING].splitlines(keepends=True)
    if lines and not lines[-1].endswith(('\n', '\r')):
        lines.pop()  # it may be cut
    return [line.rstrip('\r\n') for line in lines[:100]]


def describe_vocabulary(text):
    """Return what a text begins like if it is a vocabulary, '' for any other text.

    Nearly each line has one piece, and maybe a number. A text may be so, too, but has no special piece.
    """
    lines = first_lines(text)
    pieces = {line.partition('\t')[0] for line in text[:BEGINNING].splitlines()}
    if pieces & SPECIAL_PIECES:
        if most_match(r'\S+', lines):
            return "a vocabulary, such as BERT's vocab.txt"
        if most_match(r'\S+\t-?\d+(\.\d+)?(e-?\d+)?', lines):
            return "sentencepiece's list of pieces: name its .model"
    if most_match(r'[A-Za-z0-9+/]+={1,2} \d+', lines):  # single bytes in base64 come first
        return 'a vocabulary of tiktoken: rename it to .tiktoken'
    if text.lstrip().startswith('{') and re.search('"(added_tokens|merges)": *\\[', text[:BEGINNING]):
        return 'a tokenizer.json: rename it to .json'
    return ''


def most_match(pattern, lines):
    """Return whether more than nine of ten lines match a pattern as a whole."""
    return sum(1 for line in lines if re.fullmatch(pattern, line)) > 0.9 * len(lines)
