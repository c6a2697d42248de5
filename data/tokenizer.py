"""Three tokenizers behind one interface: char, bpe (sentencepiece) and gpt2 (tiktoken).

    encoding  ids, all of which fit uint16
    char      unk 0, bos 1, eos 2, the 256 bytes at 3 to 258, the characters by code point, <blank>, <middle>
    bpe       unk 0, bos 1, eos 2, the 256 bytes at 3 to 258, sentencepiece's own pieces, <blank>, <middle>
    gpt2      GPT-2's 50,256 tokens, <|endoftext|>, <blank>, <middle>

All are lossless, but for a sentencepiece model of others that has no bytes: what it has no piece for is unk,
which spells nothing. No text gives a special id, whatever it spells. char and bpe put one space before text
that is not empty, as sentencepiece and llama2.c do, and `decode` takes it away. sentencepiece writes a space
as U+2581, so that character itself goes as its three bytes, in char too.
"""

import base64
import hashlib
import io
import json
import re
from itertools import chain
from pathlib import Path

import numpy as np

from configurator import SettingError, UserError, user_errors
from data.shards import PREPARE, read_meta

MAX_VOCAB_SIZE = 2**16  # ids are stored as uint16
FIRST_BYTE = 3  # the id of byte 0 in char and bpe
BYTE_PIECES = [b''] * FIRST_BYTE + [bytes([byte]) for byte in range(256)]  # what their ids 0 to 258 stand for
SPACE_MARK = '\u2581'
MAX_SENTENCE = 4096  # characters that bpe learns from at a time
MAX_TEXT = 100_000  # characters that a library encodes at a time: tiktoken fails on a million spaces

# Of the vocabulary in tiktoken's form, as we keep it. tiktoken pins the same for its r50k_base.tiktoken.
GPT2_SHA256 = '306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930'


class Tokenizer:
    """What all three share. A subclass has `encoding`, `file_name` and `_encode_parts`.

    It is made from the bytes of its one file: some error if they are not such a file.
    """

    delimiter = 1  # begins every story: bos
    prefix = ' '
    lossless = True

    def __init__(self, data, pieces):
        """data: its file's content. pieces: list of the bytes that each id, up to <blank>, stands for."""
        self.files = {self.file_name: data}
        self._pieces = [*pieces, b'', b'']
        self.vocab_size = len(self._pieces)
        self.blank, self.middle = self.vocab_size - 2, self.vocab_size - 1
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f'{self.vocab_size} ids do not fit uint16')

    def __reduce__(self):
        # To a worker process it goes as its file: the libraries' own pickles would lose what we changed.
        return tokenizer_from_state, (self.state(),)

    def encode(self, text):
        """The ids of `text` (list of int), [] for ''. UserError at a lone surrogate."""
        return self.encode_pieces([(text, True)])[0][1:].tolist()

    def encode_pieces(self, pieces):
        """Encodes many texts at once, for shards.

        pieces: list of (text, starts_story). Where a story starts, the delimiter and `encode(text)`; where it
        goes on, its tokens alone, no space put before them, so that the parts of a story decode to the whole
        (the first is empty only if the story is). Parts made by `cut` have the whole's tokens.

        Returns the ids (uint16, 1-D) and the number of ids of each piece (int64, 1-D).
        UserError at a lone surrogate.
        """
        parts, owner = [], []
        for i, (text, starts) in enumerate(pieces):
            text = self.prefix + text if starts and text else text
            parts += [(part, starts and not n) for n, part in enumerate(cut(text, MAX_TEXT))]
            owner += [i] * (len(parts) - len(owner))
        ids, sizes = self._encode_parts(parts)
        counts = np.zeros(len(pieces), np.int64)
        np.add.at(counts, owner, sizes)
        return ids, counts

    def decode(self, ids):
        """The text of `ids` (each below vocab_size): special ids give nothing, invalid UTF-8 gives U+FFFD.

        As ids are added the text only grows, but for the U+FFFD at its end of a character not yet whole.
        """
        return b''.join([self._pieces[i] for i in ids]).decode('utf-8', 'replace').removeprefix(self.prefix)

    def n_bytes(self, ids):
        """How many bytes of UTF-8 `ids` (a 1-D array) spell, the space before each story not counted."""
        sizes = np.array([len(piece) for piece in self._pieces])
        return int(sizes[ids].sum()) - len(self.prefix) * int((ids == self.delimiter).sum())

    def n_lost(self, texts, ids):
        """How many characters of `texts`, which data/infill.py has encoded, are not in their `ids`."""
        if self.lossless:
            return 0
        spaces = np.isin(ids, (self.delimiter, self.blank)).sum() - 1  # of which `decode` takes one away
        return sum(map(len, texts)) - len(self.decode(ids)) + spaces

    def state(self):
        """Plain values for a checkpoint; `tokenizer_from_state` is the way back."""
        return {'encoding': self.encoding, 'files': self.files}

    def about(self):
        """What meta.json says of it."""
        names = 'encoding', 'vocab_size', 'delimiter', 'blank', 'middle'
        return {name: getattr(self, name) for name in names}

    def save(self, folder):
        for name, data in self.files.items():
            Path(folder, name).write_bytes(data)


class CharTokenizer(Tokenizer):
    """One id a character; a character not in the vocabulary goes as its UTF-8 bytes."""

    encoding = 'char'
    file_name = 'tokenizer.json'  # a list of the characters

    def __init__(self, data):
        chars = json.loads(data)
        if not isinstance(chars, list) or any(not isinstance(char, str) or len(char) != 1 for char in chars):
            raise ValueError('not a list of characters')
        if ' ' not in chars or SPACE_MARK in chars or len(set(chars)) < len(chars):
            raise ValueError('no space, U+2581, or a character twice')
        super().__init__(data, BYTE_PIECES + [char.encode() for char in chars])
        self._ids = np.zeros(0x110000, np.uint16)  # of every code point; 0 if it goes as bytes
        self._ids[[ord(char) for char in chars]] = np.arange(len(BYTE_PIECES), self.blank)

    @classmethod
    def train(cls, texts):
        """All characters of `texts` (iterable of str), and ' '; of more than uint16 can hold, the lowest."""
        chars = sorted({*characters(texts), ' '} - {SPACE_MARK})[:MAX_VOCAB_SIZE - len(BYTE_PIECES) - 2]
        return cls(json.dumps(chars, ensure_ascii=False).encode())

    def _encode_parts(self, parts):
        # All texts in one look into a table; a space keeps the place of each delimiter.
        texts = [' ' + text if starts else text for text, starts in parts]
        bounds = np.cumsum([0, *map(len, texts)])
        points = _code_points(''.join(texts))
        ids = self._ids.take(points)
        if not ids.all():
            rare = points[ids == 0]
            widths = np.ones(len(ids), np.int64)
            widths[ids == 0] = 1 + (rare >= 0x80) + (rare >= 0x800) + (rare >= 0x10000)  # bytes of UTF-8
            ids = ids.repeat(widths)
            utf8 = np.frombuffer(rare.tobytes().decode('utf-32-le').encode(), np.uint8)
            ids[ids == 0] = utf8 + np.uint16(FIRST_BYTE)
            bounds = np.concatenate([[0], widths.cumsum()])[bounds]
        starts = np.array([starts for _, starts in parts], bool)
        ids[bounds[:-1][starts]] = self.delimiter
        return ids, np.diff(bounds)


class BPETokenizer(Tokenizer):
    """A sentencepiece model, its first ids in Llama's order."""

    encoding = 'bpe'
    file_name = 'tokenizer.model'

    # Protocol buffers that follow one another are merged. This one is a normalizer_spec (field 3 of a model)
    # with precompiled_charsmap (2) empty, add_dummy_prefix (3) and remove_extra_whitespaces (4) off: text as
    # it is, and the space before it ours to put. The file keeps add_dummy_prefix, for other programs.
    AS_IT_IS = b'\x1a\x06\x12\x00\x18\x00\x20\x00'

    def __init__(self, data):
        import sentencepiece

        self._model = model = sentencepiece.SentencePieceProcessor(model_proto=data + self.AS_IT_IS)
        ids = range(model.get_piece_size())
        first = [model.unk_id(), model.bos_id(), model.eos_id(), *filter(model.is_byte, ids)]
        if first not in (list(range(FIRST_BYTE)), list(range(len(BYTE_PIECES)))):
            raise ValueError('its ids are not unk 0, bos 1, eos 2, and the bytes 3 to 258 or none')
        texts = ['' if model.is_control(i) else model.id_to_piece(i) for i in ids[len(first):]]
        pieces = [text.replace(SPACE_MARK, ' ').encode() for text in texts]
        super().__init__(data, BYTE_PIECES[:len(first)] + pieces)
        self.lossless = len(first) > FIRST_BYTE
        self._mark = [FIRST_BYTE + byte for byte in SPACE_MARK.encode()] if self.lossless else [0]

    @classmethod
    def train(cls, texts, vocab_size):
        """Learns from `texts` (iterable of str). UserError if vocab_size does not suit them."""
        import sentencepiece

        if vocab_size > MAX_VOCAB_SIZE:
            raise SettingError(f'vocab_size {vocab_size} does not fit uint16: type at most {MAX_VOCAB_SIZE}')
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sentences(texts),
                model_writer=model,
                model_type='bpe',
                vocab_size=max(vocab_size - 2, 4),  # without ours; below 4 its error names no size
                byte_fallback=True,
                character_coverage=0.99999,  # rows for letters, none for what comes once in 100,000
                normalization_rule_name='identity',
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * MAX_SENTENCE,  # bytes; longer ones would be left out
                **{'unk_id': 0, 'bos_id': 1, 'eos_id': 2, 'pad_id': -1},
                minloglevel=3,
            )
        except (RuntimeError, SystemError) as error:
            if 'KeyboardInterrupt' in f'{error} {error.__cause__!r}':  # sentencepiece wraps it
                raise KeyboardInterrupt from None
            if 'sentences_.empty()' in str(error):
                raise UserError('no text to learn a vocabulary from: every story is blank') from None
            bound = re.search(r'\d+ vs (\d+)|value <= (\d+)', str(error))
            if not bound:
                raise
            size = f'at least {int(bound[1]) + 2}' if bound[1] else f'at most {int(bound[2]) + 2}'
            raise UserError(f'vocab_size {vocab_size} does not suit this text: type {size}') from None
        return cls(model.getvalue())

    def _encode_parts(self, parts):
        lists = self._model.encode([_utf(text) for text, _ in parts], num_threads=1)
        for i, (text, starts) in enumerate(parts):
            if SPACE_MARK in text:
                head, *tail = self._model.encode(text.split(SPACE_MARK), num_threads=1)
                lists[i] = head + [j for part in tail for j in self._mark + part]
            if starts:
                lists[i].insert(0, self.delimiter)
        return _flat(lists)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level vocabulary."""

    encoding = 'gpt2'
    file_name = 'tokenizer.tiktoken'  # a line for each token: its bytes in base64, its id
    delimiter = 50256  # <|endoftext|>
    prefix = ''
    _separator = '<|endoftext|>'

    def __init__(self, data):
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        if hashlib.sha256(data).hexdigest() != GPT2_SHA256:
            raise ValueError(f"its sha256 is not that of GPT-2's vocabulary, {GPT2_SHA256}")
        tokens = [base64.b64decode(line.split()[0]) for line in data.splitlines()]
        super().__init__(data, [*tokens, b''])
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._bpe = tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                      special_tokens={self._separator: self.delimiter})

    def _encode_parts(self, parts):
        joined = self._separator.join(['', *(text for text, _ in parts)])
        _utf(joined)  # tiktoken would replace a lone surrogate
        if joined.count(self._separator) > len(parts):  # one text spells it, which is no token there
            return _flat([[self.delimiter] * new + self._bpe.encode_ordinary(text) for text, new in parts])
        # all texts at once, a delimiter before each, take a sixth less time
        ids = self._bpe.encode_to_numpy(joined, allowed_special='all').astype(np.uint16)
        first, starts = np.flatnonzero(ids == self.delimiter), np.array([starts for _, starts in parts], bool)
        return np.delete(ids, first[~starts]), np.diff(first, append=len(ids)) - ~starts


def cut(text, size):
    """Yields `text` in parts of at most `size` characters, if it can where the tokens are those of the whole.

    That is before a space between two letters, as no token reaches over it. What has none is cut at `size`.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        space = text.rfind(' ', start + 1, end + 1)
        while space > 0 and not (text[space - 1].isalpha() and text[space + 1 : space + 2].isalpha()):
            space = text.rfind(' ', start + 1, space)
        end = space if space > 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def load_tokenizer(folder):
    """The tokenizer of a folder that prepare.py wrote. UserError if there is none."""
    meta = read_meta(folder)
    with user_errors(f'the tokenizer of {folder}', f'is missing or damaged ({PREPARE})'):
        name = CLASSES[meta['encoding']].file_name
        files = {name: Path(folder, name).read_bytes()}
        tokenizer = tokenizer_from_state({'encoding': meta['encoding'], 'files': files}, folder)
        if tokenizer.vocab_size != meta['vocab_size']:
            raise ValueError(f"{name} has {tokenizer.vocab_size} ids, meta.json {meta['vocab_size']}")
    return tokenizer


def tokenizer_from_state(state, where='the checkpoint'):
    """The tokenizer whose `state()` this is. UserError, saying `where` it was, if it is none."""
    with user_errors(f'the tokenizer of {where}'):
        tokenizer_class = CLASSES[state['encoding']]
        return tokenizer_class(state['files'][tokenizer_class.file_name])


CLASSES = {kind.encoding: kind for kind in (CharTokenizer, BPETokenizer, GPT2Tokenizer)}


def characters(texts):
    """A string with every character of `texts` (a list of str). UserError at a lone surrogate."""
    data = _utf(''.join(texts))
    common = bytes({*data[:4096]} - {*range(128, 256)})  # nearly all: a set of the others is soon made
    return common.decode() + ''.join({*data.translate(None, delete=common).decode()})


def _utf(text, form='utf-8'):
    """`text` as bytes. UserError at a lone surrogate, which is half a character and has no UTF."""
    try:
        return text.encode(form)
    except UnicodeEncodeError as error:
        half, before = f'U+{ord(text[error.start]):04X}', text[max(error.start - 20, 0) : error.start]
        raise UserError(f'lone surrogate {half} in a text, after {before!r}: put U+FFFD there') from None


def _code_points(text):
    return np.frombuffer(_utf(text, 'utf-32-le'), '<u4')


def _flat(lists):
    """All ids as one array, and the number of each list's."""
    return np.fromiter(chain.from_iterable(lists), np.uint16), np.array([len(ids) for ids in lists], np.int64)


def _sentences(texts):
    """Lines, in parts short enough for sentencepiece's trainer.

    So line feeds, U+2581 and U+2585 (it leaves out the lines that have this one) go as bytes. A lone
    surrogate is told of where the text is encoded: the library would lose the error raised here.
    """
    for text in texts:
        for line in re.split('[\n\u2581\u2585]', text.encode('utf-8', 'replace').decode()):
            yield from cut(line, MAX_SENTENCE)
