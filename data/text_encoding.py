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


def check_encoding(name):
    """Raise SettingError if Python does not know a text encoding of this name."""
    try:
        b'a'.decode(name)
    except LookupError as error:
        raise SettingError(f'text_encoding {name!r} is not known: try utf-8, utf-16, cp1252 (Windows in the '
                           'West), or another name in the list "standard encodings" of Python') from error
    except UnicodeError:
        pass  # the encoding is known; in utf-16, one byte is not a text


def open_bytes(path):
    """Open a file or a .gz for reading bytes."""
    opener = gzip.open if path.suffix.lower() == '.gz' else open
    return opener(path, 'rb')


def open_text(path, encoding):
    """Open a text file or a .gz: with or without a byte order mark, line breaks as they are."""
    return io.TextIOWrapper(open_bytes(path), codec_of(path, encoding), newline='')


def codec_of(path, encoding):
    """Return the codec that reads a text file. Raises UserError if its first bytes show another encoding."""
    with open_bytes(path) as file:
        start = file.read(100)
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
    decoder = codecs.getincrementaldecoder(codec_of(path, encoding))()
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
            return (f'{path}, line {line}: byte 0x{value:02x} (at offset {offset:,}) is not {encoding}: '
                    'correct the file, or type --text_encoding and its encoding, such as cp1252')
    return f'{path} is not {encoding}: type --text_encoding and its encoding, such as cp1252'
