"""Text files: every encoding, with and without a byte order mark, and what is said about another one."""

import bz2
import gzip
import lzma

import pytest

from configurator import SettingError, UserError
from data.text_encoding import check_encoding, describe_undecodable, open_text

TEXT = 'Un café\r\nà Paris,\rnon\n'


@pytest.mark.parametrize('written, given', [
    ('utf-8', 'utf-8'), ('utf-8', 'UTF8'), ('utf-8-sig', 'utf-8'), ('utf-16', 'utf-16'),
    ('utf-16-be', 'utf-16-be'), ('utf-16', 'utf-16-le'), ('utf-32', 'utf-32'), ('cp1252', 'cp1252'),
    ('cp1252', 'latin-1')])
def test_open_text_reads_what_was_written(tmp_path, written, given):
    (tmp_path / 's.txt').write_bytes(TEXT.encode(written))
    (tmp_path / 's.txt.gz').write_bytes(gzip.compress(TEXT.encode(written)))
    for name in 's.txt', 's.txt.gz':
        with open_text(tmp_path / name, given) as file:
            assert file.read() == TEXT


@pytest.mark.parametrize('written, given, says', [
    ('utf-16', 'utf-8', 'is utf-16 .* type --text_encoding utf-16$'),
    ('utf-16', 'cp1252', 'is utf-16 .* type --text_encoding utf-16$'),
    ('utf-32', 'utf-16', 'is utf-32 .* type --text_encoding utf-32$'),
    ('utf-8-sig', 'cp1252', 'is utf-8 .* type --text_encoding utf-8$'),
    ('utf-16-le', 'utf-8', 'every second byte is 0.* type --text_encoding utf-16-le$'),
    ('utf-16-be', 'cp1252', 'every second byte is 0.* type --text_encoding utf-16-be$'),
    ('utf-8', 'utf-16', 'no byte order mark: type --text_encoding utf-16-le or utf-16-be$')])
def test_open_text_refuses_another_encoding(tmp_path, written, given, says):
    (tmp_path / 's.txt').write_bytes(TEXT.encode(written))
    with pytest.raises(UserError, match=says):
        open_text(tmp_path / 's.txt', given)


@pytest.mark.parametrize('data, encoding, line, byte, offset', [
    (b'a\nb\xff', 'utf-8', 2, 0xff, 3),
    (b'\xef\xbb\xbfa\n\n\xc3\xa9\xe9 b\n', 'utf-8', 3, 0xe9, 8),
    (b'x' * 3_000_000 + b'\ncut \xe2\x80', 'utf-8', 2, 0xe2, 3_000_005),
    (b'a\n\x81', 'cp1252', 2, 0x81, 2),
    ('a\nb'.encode('utf-16-le') + b'\x00\xdc', 'utf-16-le', 2, 0x00, 6)])
def test_describe_undecodable_names_the_place(tmp_path, data, encoding, line, byte, offset):
    for name, content in ('s.txt', data), ('s.txt.gz', gzip.compress(data)):
        (tmp_path / name).write_bytes(content)
        message = describe_undecodable(tmp_path / name, encoding)
        place = f'{name}, line {line}: byte 0x{byte:02x} (at offset {offset:,}) is not {encoding}: '
        assert place in message and 'type --text_encoding' in message


@pytest.mark.parametrize('name', ['', 'utf-99', 'hex', 'rot13', 'base64', 'idna', 'punycode',
                                  'undefined', 'unicode_escape'])
def test_check_encoding_knows_encodings_of_text_alone(name):
    for known in 'utf-16', 'utf8', 'cp1252', 'latin-1', 'shift_jis':
        check_encoding(known)
    with pytest.raises(SettingError, match=f"'{name}' is not known"):
        check_encoding(name)


@pytest.mark.parametrize('data, says', [
    (gzip.compress(b'a', mtime=0), 'gzip: unpack it'), (b'PK\x03\x04\x14', 'a zip archive'),
    (b'PAR1\x15', r'\.parquet$'), (b'\x28\xb5\x2f\xfd\x04', 'zstd: unpack it'),
    (b'%PDF-1.7\n', 'a PDF'), (lzma.compress(b'a'), 'xz: unpack'),
    (bz2.compress(b'a'), 'bzip2: unpack'), (b'ARROW1\0\0', 'Arrow'), (b'\x89PNG\r\n', 'a PNG'),
    (b'SQLite format 3\0', 'an SQLite')])
def test_open_text_says_what_a_binary_file_is(tmp_path, data, says):
    (tmp_path / 's.txt').write_bytes(data)
    (tmp_path / 's.txt.gz').write_bytes(gzip.compress(data))
    for name in 's.txt', 's.txt.gz':
        for encoding in 'utf-8', 'latin-1':
            with pytest.raises(UserError, match=f'{name} is not a text file.* {says}'):
                open_text(tmp_path / name, encoding)
    (tmp_path / 'plain.gz').write_bytes(b'a story')
    with pytest.raises(UserError, match=r'plain\.gz is not gzip'):
        open_text(tmp_path / 'plain.gz', 'utf-8')
