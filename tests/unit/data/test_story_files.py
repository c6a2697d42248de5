"""Story files: which ones are found, how a .txt is divided, and what is said about one that is not."""

import errno
import re

import pyarrow.parquet
import pytest

from configurator import SettingError, UserError
from data import story_files
from data.story_files import (
    Format,
    check_format,
    describe_unseparated,
    find_story_files,
    guess_separator,
    prefer_parquet,
    read_stories,
    story_format,
)
from tests.helpers.permissions import locked, needs_permissions, rights_of_an_owner


def write(path, text=''):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text, encoding='utf-8', newline='')
    return path


# finding ------------------------------------------------------------------------

def test_find_story_files_follows_links_to_folders_once(tmp_path):
    folder, outside = tmp_path / 's', tmp_path / 'outside'
    for path in folder / 'b/1.txt', folder / '2.json', outside / 'deep/3.csv', folder / '.hidden/4.txt':
        write(path)
    for link, target in ('b/up', '..'), ('self', '.'), ('a', 'b'), ('more', '../outside'), ('twice', 'more'):
        (folder / link).symlink_to(target)
    (outside / 'back').symlink_to(folder)
    (folder / 'linked.txt').symlink_to('b/1.txt')
    names = ['2.json', 'b/1.txt', 'linked.txt', 'more/deep/3.csv']
    assert find_story_files(folder) == {name: folder / name for name in names}


@pytest.mark.parametrize('name', ['x.txt', 'x.JSONL.gz', 'folder'])
def test_find_story_files_reports_a_link_to_nothing(tmp_path, name):
    write(tmp_path / 's/1.txt')
    (tmp_path / 's' / name).symlink_to('gone')
    with pytest.raises(UserError, match=rf's/{name} \(a link to gone\) cannot be read \(No such file or dir'):
        find_story_files(tmp_path / 's')


def test_find_story_files_ignores_a_link_to_nothing_that_is_no_story_file(tmp_path):
    path = write(tmp_path / 's/1.txt')
    for name in 'README.md', 'x.zip', '.hidden':
        (tmp_path / 's' / name).symlink_to('gone')
    assert find_story_files(tmp_path / 's') == {'1.txt': path}


@needs_permissions
@pytest.mark.parametrize('name, says', [
    ('s', 's'), ('s/sub', 's/sub'), ('outside', r's/link \(a link to \.\./outside/in\)'),
    ('outside/in', r's/link \(a link to \.\./outside/in\)')])
def test_find_story_files_names_the_folder_that_cannot_be_read(tmp_path, name, says):
    for path in 's/1.txt', 's/sub/2.txt', 'outside/in/3.txt':
        write(tmp_path / path)
    (tmp_path / 's/link').symlink_to('../outside/in')
    message = rf'^{tmp_path}/{says} cannot be read \(Permission denied\): mend this, or move it out'
    with locked(tmp_path / name), pytest.raises(UserError, match=message):
        find_story_files(tmp_path / 's')


@needs_permissions
def test_find_story_files_reports_a_folder_whose_files_cannot_be_found(tmp_path):
    write(tmp_path / 's/1.txt')
    (tmp_path / 's').chmod(0o600)
    with rights_of_an_owner(), pytest.raises(UserError, match=r's/1\.txt cannot be read \(Permission'):
        find_story_files(tmp_path / 's')
    (tmp_path / 's').chmod(0o700)


@needs_permissions
@pytest.mark.parametrize('name', ['1.txt', '1.csv', '1.parquet'])
def test_read_stories_reports_a_file_that_cannot_be_read(tmp_path, name):
    path = write(tmp_path / 's' / name, 'a')
    assert find_story_files(tmp_path / 's') == {name: path}
    with locked(path), pytest.raises(UserError, match=rf'{name} cannot be read \(Permission denied\): mend'):
        list(read_stories(path, Format()))


def test_read_stories_reports_a_disk_that_fails_while_it_reads(tmp_path, monkeypatch):
    def fail(path, how):
        yield 'a'
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setitem(story_files.READERS, '.txt', fail)
    with pytest.raises(UserError, match=r'1\.txt cannot be read \(Input/output error\)'):
        list(read_stories(write(tmp_path / '1.txt', 'a'), Format()))


def test_prefer_parquet_takes_only_parquet_if_any_has_rows(tmp_path):
    """So stories are not read twice. Which has rows is found out without reading what is damaged."""
    text, empty, zero = (tmp_path / name for name in ('1.txt', '2.parquet', '3.parquet'))
    for path in text, zero:
        write(path)
    pyarrow.parquet.write_table(pyarrow.table({'id': pyarrow.array([], 'int64')}), empty)
    assert prefer_parquet(find_story_files(tmp_path)) == (find_story_files(tmp_path), [])
    assert list(read_stories(empty, Format())) == list(read_stories(zero, Format())) == []
    damaged = write(tmp_path / '4.parquet', 'PAR1')
    files = {path.name: path for path in (empty, zero, damaged)}
    assert prefer_parquet(find_story_files(tmp_path)) == (files, ['1.txt'])
    pyarrow.parquet.write_table(pyarrow.table({'text': ['a']}), damaged)
    assert prefer_parquet(find_story_files(tmp_path)) == (files, ['1.txt'])


@pytest.mark.parametrize('ending', story_files.READERS)
def test_read_stories_finds_none_in_a_file_of_0_bytes(tmp_path, ending):
    assert list(read_stories(write(tmp_path / f's{ending}'), Format())) == []


# separators ---------------------------------------------------------------------

@pytest.mark.parametrize('separator, text, parts', [
    ('<|endoftext|>', '\n a \r\n<|endoftext|>b<|endoftext|>\n', ['\n a \r\n', 'b']),
    ('</s>', 'a</s>\nb<|endoftext|></s></s>c', ['a', '\nb<|endoftext|>', '', 'c']),
    (r'\n', 'a\r\nb\nc\rd\n', ['a\r', 'b', 'c\rd']),
    (r'\n\n', 'a\nb\n\nc\r\n\r\nd\r\n', ['a\nb', 'c\r', 'd\r\n']),
    (r'\n---\n', 'a --- b\r\n---\r\nc', ['\na --- b\r', '\r\nc\n']),
    (r'\n---\n', '---\na\n---\n---\r\nb\n---', ['', '\na', '', '\r\nb']),
    (r'\n---\n', '---', ['']), (r'\n---\n', '', []), (r'\n---\n', '----\na\n ---', ['\n----\na\n ---\n']),
    (r'\n\n=\n\n', '=\n\na\n=\nb\n\n=\n\nc\n\n=', ['', '\n\na\n=\nb', '\n\nc']),
    (r'\f', 'a\n\fb', ['a\n', 'b']),
    (r'\t\\n', 'a\t\\nb\\nc', ['a', 'b\\nc']),
    ('.*', 'a.*b', ['a', 'b']),
    ('<|endoftext|>', 'a\n', ['a\n']), ('<|endoftext|>', '\n', ['\n']), ('<|endoftext|>', '', [])])
def test_read_txt_divides_at_the_separator(tmp_path, monkeypatch, separator, text, parts):
    path = write(tmp_path / 's.txt', text)
    for chunk in 1, 2, 5, 1 << 20:
        monkeypatch.setattr(story_files, 'CHUNK', chunk)
        assert list(read_stories(path, story_format('', 'utf-8', separator))) == parts


@pytest.mark.parametrize('text, guess', [
    ('a</s>b</s>', ('</s>', 2)), ('<s>a</s><s>b</s>', ('</s>', 2)),
    ('a<|end_of_text|>b\n\nc', ('<|end_of_text|>', 1)),
    ('<|im_start|>a<|im_end|>\n<|im_start|>b<|im_end|>', ('<|im_end|>', 2)), ('a [EOS] b', ('[EOS]', 1)),
    ('a --- b\r\n---\r\nc\n----\nd\n---\ne', ('\n---\n', 2)), ('a\nb\n\nc\r\n\r\nd\n\n\ne', ('\n\n', 3)),
    ('---\na\r\n---\r\nb\n---', ('\n---\n', 3)), ('a\n* * *\nb\n* * *', ('\n* * *\n', 2)),
    ('a\fb', ('\f', 1)),
    ('a\nb\n\nc\n\nd', ('', 0)), ('a\nb\nc\n\nd\ne\nf\n', ('\n', 6)),
    ('a\nb\nc\n', ('\n', 2)), ('a < b [1] c', ('', 0)), ('', ('', 0))])
def test_guess_separator_finds_marks_then_blank_lines_then_lines(text, guess):
    assert guess_separator(text) == guess


def test_describe_unseparated_says_what_to_type(tmp_path):
    book = write(tmp_path / 'book.txt', 'To be\n\nor not\n\nto be\n\nor so')
    marked = write(tmp_path / 'marked.txt', 'a</s>b\n\n')
    table = write(tmp_path / 's.jsonl')
    alone = describe_unseparated({book: 1}, Format())
    assert alone == (f"{book} has no '<|endoftext|>', so it is one document; it has blank lines (3): "
                     r"type --separator '\n\n' if they are between stories")
    assert 'book.txt' in describe_unseparated({book: 1, table: 1}, Format())
    # blank lines are in the stories of a folder, and a mark is not
    assert describe_unseparated({book: 1, table: 9}, Format()) == ''
    assert re.search(r"marked\.txt .* </s> \(1\): type --separator '</s>'",
                     describe_unseparated({book: 1, marked: 1, table: 9}, Format()))
    lines = write(tmp_path / 'lines.txt', '{"text": "a"}\n{"text": "b"}\n')
    assert re.search(r'lines\.txt .* holds JSON lines: rename it to \.jsonl$',
                     describe_unseparated({lines: 1, book: 1, table: 9}, Format()))
    pages = write(tmp_path / 'pages.txt', 'a\f\nb')
    assert r"form feeds (1): type --separator '\f'" in describe_unseparated({pages: 1}, Format())
    dashes = write(tmp_path / 'dashes.txt', '---\na\n')
    assert describe_unseparated({dashes: 1}, Format(separator='\n---\n')) == ''
    # without a single one that is divided, a given separator is wrong
    assert describe_unseparated({book: 1, marked: 2}, Format(separator='</s>')) == ''
    with pytest.raises(UserError, match=r"no \.txt of the source has the separator '='"):
        describe_unseparated({book: 1, table: 9}, Format(separator='='))


def test_check_format_refuses_settings_without_effect():
    encoded, divided, column = Format(encoding='cp1252'), Format(separator='</s>'), Format(column='tale')
    for how, kinds in (encoded, ['.csv', '.parquet']), (divided, ['.txt', '.csv']), (column, ['.arrow']), (
            Format(encoding='UTF8'), ['.parquet']):
        check_format(how, kinds, 's')
    for how, kinds, name in (
            (encoded, ['.parquet'], 'text_encoding'), (encoded, ['.arrow'], 'text_encoding'),
            (divided, ['.csv'], 'separator'), (column, ['.txt'], 'text_column'), (column, [], 'text_column')):
        with pytest.raises(SettingError, match=f'{name} is for .*, and s has none'):
            check_format(how, kinds, 's')
