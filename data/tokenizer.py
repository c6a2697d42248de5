"""Three tokenizers behind one interface: char, bpe (sentencepiece) and gpt2 (tiktoken).

    encoding  ids, all of which fit uint16
    char      unk 0, bos 1, eos 2, the 256 bytes at 3 to 258, the characters by code point, <blank>, <middle>
    bpe       unk 0, bos 1, eos 2, the 256 bytes at 3 to 258, sentencepiece's other pieces, <blank>, <middle>
    gpt2      GPT-2's 50,256 tokens, <|endoftext|>, <blank>, <middle>

decode(encode(text)) == text for every text. Only a foreign sentencepiece model without bytes loses what it
has no piece for: it becomes unk, which decodes to nothing. No text encodes to a special id, even if it spells
one. char and bpe put one space before a text that is not empty, as sentencepiece and llama2.c do, and
`decode` removes it. All spaces are kept, even if a foreign model says remove_extra_whitespaces. sentencepiece
writes a space as U+2581, so that character itself is encoded as its three bytes, in char too.
"""

import base64
import hashlib
import io
import json
import re
import reprlib
from itertools import chain
from pathlib import Path

import numpy as np

from configurator import SettingError, UserError, user_errors
from data.files import refuse_stand_in
from data.sentencepiece_file import SPACE_MARK, count_pieces
from data.shards import TOKENIZER_FILES, how_to_prepare, read_meta

MAX_VOCAB_SIZE = 2**16  # ids are stored as uint16
MAX_IDS = MAX_VOCAB_SIZE - 2  # without <blank> and <middle>
FIRST_BYTE = 3  # the id of byte 0 in char and bpe
BYTE_PIECES = [b''] * FIRST_BYTE + [bytes([byte]) for byte in range(256)]  # the bytes that ids 0 to 258 spell
MAX_FILE_SIZE = 2**24  # bytes of a tokenizer's file: five times that of 65,536 ids
MAX_SENTENCE = 4096  # characters of the longest line that bpe learns from
MAX_TEXT = 100_000  # characters that a library encodes at a time: tiktoken fails on a million spaces

# sha256 of GPT-2's vocabulary in tiktoken's form; tiktoken pins the same for its r50k_base.tiktoken
GPT2_SHA256 = '306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930'


class Tokenizer:
    """What the three tokenizers share.

    A subclass has `encoding`, `file_name` and `_encode_parts(parts)`. It is made from the content of its one
    file, and raises an error if the content is not such a file.
    """

    delimiter = 1  # begins every story: bos
    prefix = ' '  # encode puts it before a text
    lossless = True

    def __init__(self, data, pieces):
        """data: the file's content. pieces: list of the bytes that each id spells, except the last two."""
        self.files = {self.file_name: data}
        check_n_ids(len(pieces))
        self._pieces = [*pieces, b'', b'']
        self.vocab_size = len(self._pieces)
        self.blank = self.vocab_size - 2
        self.middle = self.vocab_size - 1

    def __reduce__(self):
        # Worker processes get the file: the libraries' own pickles would lose what we change in them.
        return tokenizer_from_state, (self.state(),)

    def encode(self, text):
        """Return the ids of `text`, a list of int. Raises UserError if it has a lone surrogate."""
        ids, _ = self.encode_pieces([(text, True)])
        return ids[1:].tolist()  # without the delimiter

    def encode_pieces(self, pieces):
        """Encode many texts at once, for shards.

        pieces: list of (text, starts_story). A text that starts a story gives the delimiter and then
        `encode(text)`. A text that continues a story gives its tokens only, with no space before them, so
        that the pieces of a story decode to the whole story. (Its first piece may be empty only if the story
        is.)

        Returns the ids (uint16, 1-D) and the number of ids of each piece (int64, 1-D).
        Example: [('The cat', True), (' sat.', False)] may give [1, 300, 301, 302, 303], [3, 2].
        Raises UserError if there is a lone surrogate.
        """
        parts = []  # (text, whether the delimiter comes before it): long texts are cut for the libraries
        owners = []  # the piece that each part belongs to
        for i, (text, starts_story) in enumerate(pieces):
            if starts_story and text:
                text = self.prefix + text
            needs_delimiter = starts_story
            for part in cut(text, MAX_TEXT):
                parts.append((part, needs_delimiter))
                owners.append(i)
                needs_delimiter = False
        ids, sizes = self._encode_parts(parts)
        counts = np.zeros(len(pieces), np.int64)
        np.add.at(counts, owners, sizes)
        return ids, counts

    def decode(self, ids):
        """Return the text of `ids` (each below vocab_size).

        Special ids give nothing, invalid UTF-8 gives U+FFFD. If ids are appended, the text only grows, except
        for the U+FFFD of a character at its end whose bytes are not complete yet.
        """
        text = b''.join([self._pieces[i] for i in ids]).decode('utf-8', 'replace')
        return text.removeprefix(self.prefix)

    def n_bytes(self, ids):
        """Return how many bytes of UTF-8 `ids` (a 1-D array) spell, without the space before each story.

        A delimiter at the end of `ids` is taken for that of a story which goes on with a space.
        """
        sizes = np.array([len(piece) for piece in self._pieces])
        n_bytes = int(sizes[ids].sum())
        if self.prefix:
            has_space = np.array([piece.startswith(b' ') for piece in self._pieces])
            begins_story = ids[:-1] == self.delimiter  # an empty story has no space
            n_bytes -= int((begins_story & has_space[ids[1:]]).sum()) + int(ids[-1] == self.delimiter)
        return n_bytes

    def n_lost(self, texts, ids):
        """Return how many characters of `texts` are not in `ids`, to which infill.encode has encoded them."""
        if self.lossless:
            return 0
        # each text, and each suffix of an infilled one, has a space before it; `decode` removes the first
        n_spaces = np.isin(ids, (self.delimiter, self.blank)).sum() - 1
        n_characters = sum(len(text) for text in texts)
        return n_characters - (len(self.decode(ids)) - n_spaces)

    def state(self):
        """Return plain values for a checkpoint, from which `tokenizer_from_state` makes the tokenizer."""
        return {'encoding': self.encoding, 'files': self.files}

    def about(self):
        """Return the tokenizer's entries of meta.json."""
        return {'encoding': self.encoding, 'vocab_size': self.vocab_size, 'delimiter': self.delimiter,
                'blank': self.blank, 'middle': self.middle}

    def save(self, folder):
        """Write the tokenizer's file into a folder."""
        for name, data in self.files.items():
            Path(folder, name).write_bytes(data)


class CharTokenizer(Tokenizer):
    """One id per character; a character that is not in the vocabulary becomes its UTF-8 bytes."""

    encoding = 'char'
    file_name = TOKENIZER_FILES['char']  # a list of the characters

    def __init__(self, data):
        chars = json.loads(data)
        if isinstance(chars, list):
            check_n_ids(len(BYTE_PIECES) + len(chars))
        if not isinstance(chars, list) or any(not isinstance(char, str) or len(char) != 1 for char in chars):
            raise ValueError('not a list of characters')
        if ' ' not in chars or SPACE_MARK in chars or len(set(chars)) < len(chars):
            raise ValueError('no space, U+2581, or a character twice')
        super().__init__(data, BYTE_PIECES + [char.encode() for char in chars])
        self._ids = np.zeros(0x110000, np.uint16)  # id of every code point; 0 if it becomes bytes
        self._ids[[ord(char) for char in chars]] = np.arange(len(BYTE_PIECES), self.blank)

    @classmethod
    def train(cls, texts):
        """Return a tokenizer with all characters of `texts` (iterable of str), and ' '.

        If there are more than fit uint16, those with the lowest code points are taken.
        """
        chars = {' '}
        for text in texts:
            chars.update(unique_characters([text]))
        chars -= {SPACE_MARK}
        room = MAX_IDS - len(BYTE_PIECES)
        return cls(json.dumps(sorted(chars)[:room], ensure_ascii=False).encode())

    def _encode_parts(self, parts):
        # Look up all texts at once. A space in front of a text holds the place of its delimiter.
        texts = [' ' + text if needs_delimiter else text for text, needs_delimiter in parts]
        bounds = np.cumsum([0, *(len(text) for text in texts)])
        points = code_points(''.join(texts))
        ids = self._ids.take(points)
        if not ids.all():
            # replace the 0 of every unknown character by its 1 to 4 bytes of UTF-8
            unknown = points[ids == 0]
            widths = np.ones(len(ids), np.int64)
            widths[ids == 0] += (unknown >= 0x80).astype(int) + (unknown >= 0x800) + (unknown >= 0x10000)
            ids = ids.repeat(widths)
            utf8 = np.frombuffer(unknown.tobytes().decode('utf-32-le').encode(), np.uint8)
            ids[ids == 0] = utf8 + np.uint16(FIRST_BYTE)
            bounds = np.concatenate([[0], widths.cumsum()])[bounds]
        has_delimiter = np.array([needs_delimiter for _, needs_delimiter in parts], bool)
        ids[bounds[:-1][has_delimiter]] = self.delimiter
        return ids, np.diff(bounds)


class BPETokenizer(Tokenizer):
    """A sentencepiece model, its first ids in Llama's order."""

    encoding = 'bpe'
    file_name = TOKENIZER_FILES['bpe']

    # Protocol buffers that are concatenated are merged. This one is a normalizer_spec (field 3 of a model)
    # with an empty precompiled_charsmap (2), and add_dummy_prefix (3) and remove_extra_whitespaces (4) off:
    # sentencepiece does not change the text, and we put the space before it. The file itself keeps
    # add_dummy_prefix, for other programs.
    NO_NORMALIZATION = b'\x1a\x06\x12\x00\x18\x00\x20\x00'

    def __init__(self, data):
        import sentencepiece

        check_n_ids(count_pieces(data))  # before the library does work for each
        model = sentencepiece.SentencePieceProcessor(model_proto=data + self.NO_NORMALIZATION)
        n_first = check_first_ids(model)
        pieces = BYTE_PIECES[:n_first]
        for i in range(n_first, model.get_piece_size()):
            text = '' if model.is_control(i) else model.id_to_piece(i)
            pieces.append(text.replace(SPACE_MARK, ' ').encode())
        super().__init__(data, pieces)
        self._model = model
        self.lossless = n_first > FIRST_BYTE
        self._space_mark_ids = [FIRST_BYTE + byte for byte in SPACE_MARK.encode()] if self.lossless else [0]

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn a vocabulary from `texts` (iterable of str).

        Raises VocabSizeError if vocab_size does not suit them, UserError if there is nothing to learn from.
        """
        import sentencepiece

        if vocab_size > MAX_VOCAB_SIZE:
            raise SettingError(f'vocab_size {vocab_size} does not fit uint16: type at most {MAX_VOCAB_SIZE}')
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=training_lines(texts),
                model_writer=model,
                model_type='bpe',
                # without <blank> and <middle>; below 4, its error does not say which size would do
                vocab_size=max(vocab_size - 2, 4),
                byte_fallback=True,
                character_coverage=0.99999,  # no ids for characters rarer than 1 in 100,000
                normalization_rule_name='identity',
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=4 * MAX_SENTENCE,  # bytes; it would leave out longer ones
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
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
            bound_name = 'at least' if bound[1] else 'at most'
            nearest = int(bound[1] or bound[2]) + 2
            if nearest > MAX_VOCAB_SIZE:
                raise UserError(f'this text has so many characters that bpe needs {nearest:,} ids, and '
                                f'{MAX_VOCAB_SIZE:,} fit uint16: type --encoding_type char') from None
            raise VocabSizeError(vocab_size, bound_name, nearest) from None
        return cls(model.getvalue())

    def _encode_parts(self, parts):
        texts = []
        for text, _ in parts:
            check_surrogates(text)
            texts.append(text)
        lists = self._model.encode(texts, num_threads=1)
        for i, (text, needs_delimiter) in enumerate(parts):
            if SPACE_MARK in text:
                lists[i] = self._encode_space_marks(text)
            if needs_delimiter:
                lists[i].insert(0, self.delimiter)
        return concatenate(lists)

    def _encode_space_marks(self, text):
        """Return the ids of a text with U+2581, which sentencepiece would take for a space."""
        ids = []
        for i, part in enumerate(self._model.encode(text.split(SPACE_MARK), num_threads=1)):
            if i > 0:
                ids += self._space_mark_ids
            ids += part
        return ids


class VocabSizeError(UserError):
    """A vocabulary size that does not suit a text. `nearest` is the size closest to it that does."""

    def __init__(self, vocab_size, bound_name, nearest):
        super().__init__(f'vocab_size {vocab_size} does not suit this text: type {bound_name} {nearest}')
        self.nearest = nearest


def check_first_ids(model):
    """Return how many ids of a sentencepiece model are in Llama's order: 3, or 259 if it has the 256 bytes.

    Raises ValueError if its first ids are others.
    """
    byte_ids = [i for i in range(model.get_piece_size()) if model.is_byte(i)]
    byte_names = [model.id_to_piece(i) for i in byte_ids]
    first = [model.unk_id(), model.bos_id(), model.eos_id(), *byte_ids]
    in_order = first == list(range(len(first)))
    if not in_order or (byte_names and byte_names != [f'<0x{byte:02X}>' for byte in range(256)]):
        raise ValueError('its ids are not unk 0, bos 1, eos 2, and the bytes 3 to 258 or none')
    return len(first)


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level vocabulary."""

    encoding = 'gpt2'
    file_name = TOKENIZER_FILES['gpt2']  # a line for each token: its bytes in base64, its id
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
        self._bpe = tiktoken.Encoding(
            'gpt2', pat_str=r50k_pat_str, mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
            special_tokens={self._separator: self.delimiter})

    def _encode_parts(self, parts):
        texts = [text for text, _ in parts]
        joined = self._separator.join(['', *texts])
        check_surrogates(joined)  # tiktoken would replace them
        if joined.count(self._separator) > len(parts):
            # a text spells the separator, which is not a special token there
            lists = []
            for text, needs_delimiter in parts:
                ids = self._bpe.encode_ordinary(text)
                lists.append([self.delimiter, *ids] if needs_delimiter else ids)
            return concatenate(lists)

        # encoding all texts at once, a delimiter before each, takes a sixth less time
        ids = self._bpe.encode_to_numpy(joined, allowed_special='all').astype(np.uint16)
        first = np.flatnonzero(ids == self.delimiter)
        needs_delimiter = np.array([needs_delimiter for _, needs_delimiter in parts], bool)
        sizes = np.diff(first, append=len(ids)) - ~needs_delimiter
        return np.delete(ids, first[~needs_delimiter]), sizes


CLASSES = {kind.encoding: kind for kind in (CharTokenizer, BPETokenizer, GPT2Tokenizer)}
FILE_NAMES = [kind.file_name for kind in CLASSES.values()]


# loading ------------------------------------------------------------------------

def load_tokenizer(folder):
    """Return the tokenizer of a prepared folder. Raises UserError if it is missing or damaged."""
    meta = read_meta(folder)
    with user_errors(f'the tokenizer of {folder}', f'is missing or damaged ({how_to_prepare(folder)})'):
        if meta['encoding'] not in CLASSES:
            raise ValueError(f"no encoding {meta['encoding']!r}")
        name = CLASSES[meta['encoding']].file_name
        data = read_file(Path(folder, name))
        tokenizer = tokenizer_from_state({'encoding': meta['encoding'], 'files': {name: data}}, folder)
        if tokenizer.vocab_size != meta['vocab_size']:
            raise ValueError(f"{name} has {tokenizer.vocab_size} ids, meta.json {meta['vocab_size']}")
    return tokenizer


def tokenizer_from_state(state, where='the checkpoint'):
    """Return the tokenizer whose `state()` this is. Raises UserError if it is not one.

    where: what the state is from, for the error's message.
    """
    with user_errors(f'the tokenizer of {where}'):
        encoding = state.get('encoding') if isinstance(state, dict) else None
        files = state.get('files') if isinstance(state, dict) else None
        if not isinstance(encoding, str) or encoding not in CLASSES or not isinstance(files, dict):
            raise ValueError(f'{reprlib.repr(state)} is not a tokenizer')
        tokenizer_class = CLASSES[encoding]
        data = files.get(tokenizer_class.file_name)
        if not isinstance(data, bytes):
            raise ValueError(f'it has no {tokenizer_class.file_name}')
        check_size(len(data))
        return tokenizer_class(data)


def read_file(path):
    """Return the content of a tokenizer's file.

    Raises UserError if it only stands in for the file, ValueError if it is too large to be one.
    """
    refuse_stand_in(path)
    check_size(path.stat().st_size)
    return path.read_bytes()


def check_size(n_bytes):
    """Raise ValueError if a file is larger than any tokenizer that this project can use."""
    if n_bytes > MAX_FILE_SIZE:
        raise ValueError(f'it has {n_bytes:,} bytes, and a tokenizer of {MAX_VOCAB_SIZE:,} ids less than '
                         f'{MAX_FILE_SIZE:,}')


def check_n_ids(n_ids):
    """Raise ValueError if so many ids, without <blank> and <middle>, cannot be stored."""
    if n_ids > MAX_IDS:
        raise ValueError(f'it has {n_ids:,} ids, and at most {MAX_IDS:,} fit 16 bits (2 are for infilling)')


# texts --------------------------------------------------------------------------

def cut(text, size):
    """Yield `text` in parts of at most `size` characters, cut where the tokens stay those of the whole text.

    That is before a space between two letters, because no token continues across it. If there is none, the
    text is cut at `size`.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        space = text.rfind(' ', start + 1, end + 1)
        while space > 0 and not (text[space - 1].isalpha() and text[space + 1:space + 2].isalpha()):
            space = text.rfind(' ', start + 1, space)
        if space > 0:
            end = space
        yield text[start:end]
        start = end
    yield text[start:]


def unique_characters(texts):
    """Return a string with every character of `texts`, a list. Raises UserError at a lone surrogate."""
    text = ''.join(texts)
    check_surrogates(text)
    data = text.encode()
    # fast, because nearly all characters are the ASCII ones of the first 4 KB, and bytes are quickly deleted
    common = bytes(byte for byte in set(data[:4096]) if byte < 128)
    rare = set(data.translate(None, delete=common).decode())
    return common.decode() + ''.join(rare)


def check_surrogates(text):
    """Raise UserError if `text` has a lone surrogate, which is half a character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[max(error.start - 20, 0):error.start]
        raise UserError(f'lone surrogate U+{ord(text[error.start]):04X} in a text, after {before!r}: '
                        'put U+FFFD there') from None


def code_points(text):
    """Return the code points of `text`, a 1-D uint32 array. Raises UserError at a lone surrogate."""
    try:
        return np.frombuffer(text.encode('utf-32-le'), '<u4')
    except UnicodeEncodeError:
        check_surrogates(text)
        raise


def concatenate(lists):
    """Return all ids of some lists as one uint16 array, and the length of each list."""
    ids = np.fromiter(chain.from_iterable(lists), np.uint16)
    return ids, np.array([len(ids) for ids in lists], np.int64)


def training_lines(texts):
    """Yield the lines of `texts`, in parts short enough for sentencepiece's trainer.

    Lines end at a line feed, at U+2581 and at U+2585 (sentencepiece drops lines with it), so these become
    bytes. Lone surrogates are replaced: the stories are encoded later, which reports them, while an error
    raised here would be lost in the library.
    """
    for text in texts:
        text = text.encode('utf-8', 'replace').decode()
        for line in re.split('[\n\u2581\u2585]', text):
            yield from cut(line, MAX_SENTENCE)
