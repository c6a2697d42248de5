"""Open text files in any encoding, and say what is wrong if the encoding is another one."""

import codecs
import gzip
import io

from configurator import SettingError, UserError

CHUNK = 1 << 20  # characters to read at a time

# What a text file may begin with, and the codec that reads the rest. The first one that fits is meant.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: 'utf-8-sig',
    codecs.BOM_UTF32_LE: 'utf-32',
    codecs.BOM_UTF32_BE: 'utf-32',
    codecs.BOM_UTF16_LE: 'utf-16',
    codecs.BOM_UTF16_BE: 'utf-16',
}

# Python calls these encodings, and files are not written in them
NOT_OF_FILES = 'idna', 'punycode', 'undefined', 'raw_unicode_escape', 'unicode_escape'

# How files begin that are no text: {first bytes: (what it is, what to do)}
ARCHIVE = 'unpack it first'
CONVERT = 'save its text as .txt'
BINARY_FILES = {
    b'\x1f\x8b': ('gzip', 'unpack it with gzip -dc'),
    b'PK\x03\x04': ('a zip archive (or .docx, .xlsx, .epub)', 'unpack it, or save its text as .txt'),
    b'PK\x05\x06': ('an empty zip archive', 'remove it'),
    b'\x28\xb5\x2f\xfd': ('zstd', 'unpack it with zstd -dc'),
    b'\xfd7zXZ\x00': ('xz', 'unpack it with xz -dc'),
    b'BZh91AY&SY': ('bzip2', 'unpack it with bzip2 -dc'),
    b'\x04\x22\x4d\x18': ('lz4', 'unpack it with lz4 -dc'),
    b'7z\xbc\xaf\x27\x1c': ('a 7z archive', ARCHIVE),
    b'Rar!\x1a\x07': ('a rar archive', ARCHIVE),
    b'PAR1': ('Parquet', 'rename it to .parquet'),
    b'ARROW1': ('Arrow', 'write it as .parquet'),  # alone; what save_to_disk writes begins as the next one
    b'\xff\xff\xff\xff': ('Arrow', 'name the folder that save_to_disk wrote, or write it as .parquet'),
    b'SQLite format 3\x00': ('an SQLite database', 'export its stories as .csv or .jsonl'),
    b'%PDF-': ('a PDF', CONVERT),
    b'\xd0\xcf\x11\xe0': ('a document of Word or Excel', CONVERT),
    b'{\\rtf': ('RTF', CONVERT),
    b'\x89PNG': ('a PNG picture', 'move it out of the source'),
    b'\xff\xd8\xff': ('a JPEG picture', 'move it out of the source'),
    b'GIF8': ('a GIF picture', 'move it out of the source'),
    b'\x93NUMPY': ('a NumPy array', 'write its stories as .jsonl'),
    b'\x80\x04\x95': ('a pickle', 'write its stories as .jsonl'),
}


def check_encoding(name):
    """Raise SettingError if Python does not know a text encoding of this name."""
    try:
        b'a'.decode(name)
        is_known = True
    except UnicodeError:
        is_known = True  # in utf-16, one byte is not a text
    except LookupError:
        is_known = False
    if not is_known or codecs.lookup(name).name.replace('-', '_') in NOT_OF_FILES:
        raise SettingError(f'text_encoding {name!r} is not known as one of text files: try utf-8, utf-16, '
                           'cp1252 (Windows in the West), or another name in the list "standard encodings" '
                           'of Python')


def read_start(path):
    """Return the first bytes of a text file, or of what a .gz holds. Raises UserError if it is no text."""
    try:
        with open_bytes(path) as file:
            start = file.read(1000)
    except gzip.BadGzipFile as error:
        raise UserError(f'{path} is not gzip, as its name says: take .gz off its name') from error
    for beginning, (what, advice) in BINARY_FILES.items():
        if start.startswith(beginning):
            raise UserError(f'{path} is not a text file but {what}: {advice}')
    return start


def open_bytes(path):
    """Open a file or a .gz for reading bytes."""
    opener = gzip.open if path.suffix.lower() == '.gz' else open
    return opener(path, 'rb')


def open_text(path, encoding):
    """Open a text file or a .gz: with or without a byte order mark, line breaks as they are."""
    return io.TextIOWrapper(open_bytes(path), codec_of(path, encoding), newline='')


def codec_of(path, encoding):
    """Return the codec that reads a text file. Raises UserError if its first bytes show another encoding."""
    start = read_start(path)
    given = codecs.lookup(encoding).name
    for mark, codec in BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            family = codec.removesuffix('-sig')
            if not given.startswith(family):
                raise UserError(f'{path} is {family} (its byte order mark says so), not {encoding}: '
                                f'type --text_encoding {family}')
            return codec
    if start and given in ('utf-16', 'utf-32'):
        raise UserError(f'{path} has no byte order mark: type --text_encoding {given}-le or {given}-be')
    if not given.startswith(('utf-16', 'utf-32')):
        even, odd = start[::2].count(0), start[1::2].count(0)
        if abs(even - odd) > len(start) / 4:
            order = 'le' if odd > even else 'be'
            raise UserError(f'{path} looks like utf-16 (every second byte is 0), not {encoding}: '
                            f'type --text_encoding utf-16-{order}')
    return encoding


def describe_undecodable(path, encoding):
    """Return a message that names the first byte of a file that is not text in this encoding."""
    return (find_undecodable(path, encoding, codec_of(path, encoding))
            + ': correct the file, or type --text_encoding and its encoding, such as cp1252')


def find_undecodable(path, encoding, codec):
    """Return a line without advice that names the first byte of a file that a codec cannot read."""
    decoder = codecs.getincrementaldecoder(codec)()
    line = 1
    n_bytes = 0
    with open_bytes(path) as file:
        try:
            for data in file:
                n_bytes += len(data)
                line += decoder.decode(data).count('\n')
            decoder.decode(b'', final=True)
        except UnicodeDecodeError as error:
            # error.object ends with what was read last, and is text until error.start
            line += error.object[:error.start].decode(error.encoding, 'replace').count('\n')
            offset = n_bytes - len(error.object) + error.start
            value = error.object[error.start]
            return f'{path}, line {line}: byte 0x{value:02x} (at offset {offset:,}) is not {encoding}'
    return f'{path} is not {encoding}'
