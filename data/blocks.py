"""Stories as blocks of bounded size, whatever the size of a file or of a story in it.

`read` cuts files into blocks, which costs little, so one process can feed many; `texts` parses a block.
"""

import codecs
import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass

from configurator import UserError

DELIMITER = b'<|endoftext|>'
BLOCK = 1 << 16  # bytes of source in a block: what is made of it stays in the processor's cache
RECORD_LIMIT = 1 << 25  # bytes of one JSON record; longer texts belong in a .txt, which is read in pieces
FIELDS = ('text', 'story')
TOO_LONG = f'no JSON record ends within {RECORD_LIMIT >> 20} MB: it is broken, or belongs in a .txt'
new_hash = functools.partial(hashlib.blake2b, digest_size=16)  # decides where a story goes
BETWEEN_RECORDS = re.compile(r'[\s,\[\]]*')
BETWEEN_WORDS = re.compile(rb'[A-Za-z](?= [A-Za-z])')  # no token goes across the end of a match


@dataclass
class Block:
    """Some whole stories, or a piece of a long one.

    kind: 'stories' (text with delimiters), 'document' (text that is one story), 'piece' (of a long story),
    'lines' (of JSON) or 'texts' (a list of str).
    """

    kind: str
    data: bytes | list
    path: str = ''
    offset: int = 0  # of data in its file, in bytes, for messages
    split: str = ''  # 'train', 'val', or '' where each story's hash decides
    starts: bool = True  # False for the later pieces of a story
    digest: bytes = b''  # of a piece: that of the whole story


def read(part):
    """Yields the blocks of a part: a path, (path, start, stop) of a document's bytes, or a list of texts.

    They are the same ones, in the same order, each time. Raises UserError for what cannot be read.
    """
    if isinstance(part, list):
        yield from _grouped(part)
    elif isinstance(part, tuple):
        path, start, stop = part
        with open(path, 'rb', buffering=0) as file:
            yield from _pieces(file, start, stop)
    elif part.suffix.lower() == '.txt':
        yield from _text(part)
    elif part.suffix.lower() == '.jsonl':
        yield from _lines(part)
    elif part.suffix.lower() == '.json':
        yield from _grouped(_json(part))
    else:
        yield from _grouped(_table(part))


def _text(path):
    with open(path, 'rb', buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = first = after_mark(file)
        while start < size:
            data = read_at(file, start, size)
            end = data.rfind(DELIMITER)
            if start + len(data) == size:  # the rest of the file
                if start == first and end < 0:
                    yield Block('document', data, str(path), start)
                elif data[max(end, 0):].removeprefix(DELIMITER).strip(b'\r\n'):
                    yield Block('stories', data, str(path), start)
                elif end >= 0:  # the last delimiter ends the file, and no blank story follows it
                    yield Block('stories', data[:end], str(path), start)
                return
            if end >= 0:
                yield Block('stories', data[:end], str(path), start)
                start += end + len(DELIMITER)
            else:  # a story longer than a block
                end = find_delimiter(file, start)
                delimited = start > first or end < size
                yield from _pieces(file, start, end, delimited, may_be_blank=True)
                start = end + len(DELIMITER)


def after_mark(file):
    """Where text begins: Windows' editors put a byte order mark before it, which is not text."""
    file.seek(0)
    return len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def read_at(file, start, stop):
    """At most BLOCK bytes from `start`, none beyond `stop`."""
    file.seek(start)
    data = file.read(min(BLOCK, stop - start))
    if not data:
        raise UserError(f'{file.name} was cut short while we read it: start again when it is complete')
    return data


def find_delimiter(file, start):
    """Offset of the first delimiter at or after `start`; without one, of the end of the file."""
    size = os.fstat(file.fileno()).st_size
    while start < size:
        data = read_at(file, start, size)
        if (found := data.find(DELIMITER)) >= 0:
            return start + found
        start += len(data) if start + len(data) == size else max(1, len(data) - len(DELIMITER) + 1)
    return size


def _pieces(file, start, stop, delimited=False, may_be_blank=False):
    """Yields the story at bytes start to stop in pieces of at most BLOCK, cut between words if possible."""
    if delimited:
        data = read_at(file, start, stop)
        start += len(data) - len(data.lstrip(b'\r\n'))
        data = read_at(file, max(start, stop - BLOCK), stop)
        stop -= len(data) - len(data.rstrip(b'\r\n'))
    whole, blank, at = new_hash(), may_be_blank, start
    while at < stop:
        data = read_at(file, at, stop)
        whole.update(data)
        blank = blank and data.isspace()
        at += len(data)
    if blank:
        yield Block('document', b'')
        return
    at = start
    while at < stop:
        data = read_at(file, at, stop)
        if at + len(data) < stop:
            words = [match.end() for match in BETWEEN_WORDS.finditer(data, len(data) * 99 // 100)]
            characters = [i for i in range(len(data) - 4, len(data)) if data[i] & 0xC0 != 0x80]
            data = data[:(words or characters or [len(data)])[-1]]
        yield Block('piece', data, file.name, at, starts=at == start, digest=whole.digest())
        at += len(data)


def _lines(path):
    with open(path, 'rb', buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = after_mark(file)
        while start < size:
            data = read_at(file, start, size)
            end = data.rfind(b'\n') + 1
            while not end and start + len(data) < size:  # a line longer than a block
                if len(data) > RECORD_LIMIT:
                    raise UserError(f'{path}:{_line(path, start)}: {TOO_LONG}')
                data += read_at(file, start + len(data), size)
                end = data.rfind(b'\n', -BLOCK) + 1
            if start + len(data) == size:
                end = len(data)
            yield Block('lines', data[:end], str(path), start)
            start += end


def _json(path):
    """Yields the stories of a .json file: an array of records, or records one after another."""
    raw_decode, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder('utf-8')()
    with open(path, 'rb') as file:
        offset = after_mark(file)
        file.seek(offset)
        text, at, line, complete, opened = '', 0, 1, False, False
        while True:
            gap = BETWEEN_RECORDS.match(text, at).group()
            start = at + len(gap)
            opened = opened or '[' in gap
            if start < len(text):
                try:
                    record, end = raw_decode(text, start)
                    yield _story(record)
                except (ValueError, RecursionError) as error:
                    unfinished = isinstance(error, json.JSONDecodeError) and not complete
                    if not unfinished or len(text) - start > RECORD_LIMIT:
                        line += text.count('\n', 0, getattr(error, 'pos', start))
                        reason = TOO_LONG if unfinished else _reason(error)
                        raise UserError(f'{path}:{line}: {reason}') from None
                else:
                    at = end
                    continue
            elif complete:
                break
            data = file.read(max(BLOCK, len(text) - at))  # doubling: a long record is parsed few times
            line += text.count('\n', 0, at)
            pending = len(utf8.getstate()[0])
            try:
                text, at = text[at:] + utf8.decode(data, final=not data), 0
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - pending + error.start) from None
            offset += len(data)
            complete = not data
    if opened and ']' not in gap:
        raise UserError(f'{path}: its array has no end: the file is incomplete, fetch it again')


def _grouped(stories):
    """Yields lists of stories as blocks of about BLOCK characters."""
    group, size = [], 0
    for story in stories:
        group.append(story)
        size += len(story)
        if size >= BLOCK:
            yield Block('texts', group)
            group, size = [], 0
    yield Block('texts', group)


def _table(path):
    """Yields the stories of a Parquet file, or of an Arrow file as `datasets` writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    row = 0
    try:
        if path.suffix.lower() == '.parquet':
            file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # never a whole row group
            name = _column(path, file.schema_arrow)
            batches = file.iter_batches(256, columns=[name], use_threads=False)
        else:
            file = pa.OSFile(str(path))  # not memory_map: its pages would count as ours
            batches = pa.ipc.open_stream(file)
            name = _column(path, batches.schema)
        with file:
            for batch in batches:
                for text in batch.column(name).to_pylist():
                    row += 1
                    yield _checked(text, name)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f'{path} cannot be read, fetch it again: {_reason(error)}') from None
    except ValueError as error:  # a UnicodeDecodeError is one
        raise UserError(f'{path}, after row {row}: {_reason(error)}') from None


def _column(path, schema):
    """The name of the column of stories."""
    for name in FIELDS:
        if name in schema.names:
            return name
    raise UserError(f"{path} has no column 'text' or 'story', only {', '.join(schema.names)}")


def texts(block):
    """The stories of a block as a list of str, blank ones included. Raises UserError where it is damaged."""
    if block.kind == 'texts':
        return block.data
    try:
        text = block.data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(block.path, block.offset + error.start) from None
    if block.kind == 'lines':
        return _line_texts(text, block)
    if block.kind == 'stories':
        return [story.strip('\r\n') for story in text.split(DELIMITER.decode())]
    return [text]


def _line_texts(text, block):
    found = []
    for number, line in enumerate(text.split('\n')):
        if line and not line.isspace():
            try:
                found.append(_story(json.loads(line)))
            except (ValueError, RecursionError) as error:
                number += _line(block.path, block.offset)
                raise UserError(f'{block.path}:{number}: {_reason(error)}') from None
    return found


def _story(record):
    """The story of a JSON record; '' for null. Raises ValueError where there is none."""
    if not isinstance(record, dict):
        raise ValueError('a record must be an object such as {"text": "..."}')
    for name in FIELDS:
        if name in record:
            break
    else:
        raise ValueError(f"no field 'text' or 'story', only {', '.join(map(repr, record)) or 'nothing'}")
    return _checked(record[name], name)


def _checked(text, name):
    if text is None:
        return ''
    if not isinstance(text, str):
        raise ValueError(f'{name!r} holds no text but {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'{name!r} has half a surrogate pair, {text[error.start]!a}') from None
    return text


def _reason(error):
    """An error in one line."""
    if isinstance(error, json.JSONDecodeError):
        return f'broken JSON: {error.msg}'
    return 'nested too deeply' if isinstance(error, RecursionError) else ' '.join(str(error).split())


def _not_utf8(path, offset):
    return UserError(f'{path}:{_line(path, offset)}: byte {offset} is not UTF-8: save the file as UTF-8')


def _line(path, offset):
    """The number, from 1, of the line that holds byte `offset`. Only for messages: it reads the file."""
    with open(path, 'rb', buffering=0) as file:
        return 1 + sum(read_at(file, at, offset).count(b'\n') for at in range(0, offset, BLOCK))
