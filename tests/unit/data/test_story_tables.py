"""Tables: one column of text, whatever the file looks like and whatever the other columns hold."""

import csv
import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from configurator import UserError
from data import story_tables
from data.story_files import Format, read_stories


def read(path, content, **given):
    """Return the stories of a file with this content."""
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return list(read_stories(path, Format(**given)))


# JSON ---------------------------------------------------------------------------

@pytest.mark.parametrize('content, stories', [
    ('{"text": "a"}\n\r\n{"n": 1, "text": "b"}\n{"text": null}\n{}', ['a', 'b', None, None]),
    ('{"text": "a"},\n{"text": "b"},\n', ['a', 'b']),
    ('{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ['a', 'b']),
    (' [\n{"story": "a"}, {"story": "b", "text": "no"}\n]\n', ['a', 'b']),
    ('["a", "b"]', ['a', 'b']),
    ('{"story": "no", "text": "a"}\n{"text": "b"}', ['a', 'b']),
    ('{"note": "late"}\n{"text": "2020-01-01"}\n{"text": "007"}', [None, '2020-01-01', '007']),
    ('{"text": "a", "n": null}\n{"text": "b", "n": {"x": []}}\n{"text": "c", "n": ' + '9' * 5000 + '}',
     ['a', 'b', 'c']),
    ('{"text": "\\ud83d\\ude00\\u00e9 \\n"}', ['\U0001f600é \n']),
    ('', []), (' \n', []), (' [ ]\n', []), ('\ufeff{"text": "a"}', ['a'])])
def test_read_json_takes_objects_and_strings(tmp_path, content, stories):
    for name in 's.json', 's.jsonl', 's.jsonl.gz':
        assert read(tmp_path / name, content) == stories


def test_read_json_is_the_same_however_much_is_read_at_a_time(tmp_path, monkeypatch):
    rng = random.Random(0)
    rows = [{'n': rng.choice([1, -2.5e-7, True, None, [{}], 'x"\\']), 'text': '\t"\\é\U0001f600' * (i % 9)}
            for i in range(60)]
    lines = ''.join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + '\n' for row in rows)
    for content in lines, json.dumps(rows), json.dumps(rows, indent=1):
        for chunk in 1, 2, 3, 7, 50, 1000:
            monkeypatch.setattr(story_tables, 'CHUNK', chunk)
            assert read(tmp_path / 's.json', content) == [row['text'] for row in rows]


@pytest.mark.parametrize('content, says', [
    ('{"text": "a"}\n{"text": "b', 'line 2 is not JSON: Unterminated string$'),
    ('{"text": "a"}\n\n{"text": b}\n', 'line 3 is not JSON: Expecting value$'),
    ('{"text": "a"}\nhello\n', 'line 2 is not JSON'),
    ('{"text": "a"', 'line 1 is not JSON: the file ends too early$'),
    ('[{"text": "a"},\n{"text": "b"},', 'line 2 is not JSON: the file ends too early$'),
    ('[{"text": "a"}]\n[]', 'line 1 is not JSON: there is more after'),
    ('{"text": "a", "n": ' + '[' * 100_000, 'line 1 is not JSON: it is nested too deeply$'),
    ('{"text": "a"}\n{"text": 7}', "row 2: 'text' is a number, not text$"),
    ('{"text": ["a", "b"]}', "row 1: 'text' is a list, not text$"),
    ('{"text": "a"}\n[]', 'row 2 is a list, not an object'),
    ('{"text": "a"}\n{"text": "\\ud83d"}', "row 2: 'text' has half of a surrogate pair"),
    ('{"story": "a"}\n{"text": "b"}', "row 2 has 'text' and no 'story'.*: give both the name 'story', or "),
    ('{"body": "a"}\n{"title": "b"}', 'no column text or story: .* one of body, title, or move the file out'),
    ('{"title": "a", "license": "b", "tags": ["c"]}', 'no column .* one of title, license, tags, or move'),
    ('{"v": 1, "data": [{"text": "a"}]}', "a list of rows .* is under 'data': write each list"),
    ('{"train": ["a"], "validation": ["b"]}', "a list of rows .* under 'train' and 'validation'"),
    (b'{"text": "a"}\n{"text": "caf\xe9"}', r'line 2: byte 0xe9 \(at offset 27\) is not utf-8'),
    ('<!DOCTYPE html>', 'an HTML page')])
def test_read_json_names_the_place_of_a_mistake(tmp_path, content, says):
    with pytest.raises(UserError, match=r's\.json[ ,].*' + says):
        read(tmp_path / 's.json', content)


# CSV ----------------------------------------------------------------------------

@pytest.mark.parametrize('name, content, stories', [
    ('s.csv', 'id,text\n1,007\n2,FALSE\n3,NA\n4,\n5,1e5\n', ['007', 'FALSE', 'NA', '', '1e5']),
    ('s.csv', '\ufeff"text";"n"\r\n"a, ""b"";\r\n\rc";1\r\n\r\nd;2\r\n', ['a, "b";\r\n\rc', 'd']),
    ('s.csv', 'text\tn\na,b;c\t1\n', ['a,b;c']),
    ('s.csv', 'n|story\n1|a,b\n', ['a,b']),
    ('s.csv', 'text\na; b\tc\n', ['a; b\tc']),
    ('s.csv', 'text,note\na\nb,c\n', ['a', 'b']),  # empty cells at the end may be left out
    ('s.tsv', 'n\ttext\n1\ta,b;c\n', ['a,b;c']),
    ('s.csv', 'sep=;\r\nid;text\r\n1;"a;b"\r\n', ['a;b']),
    ('s.csv', 'sep=,\ntext\na\n', ['a']),
    ('s.csv', 'id,body\n', []), ('s.csv', '', []), ('s.csv', '\n\n', [])])
def test_read_csv_takes_every_value_as_text(tmp_path, name, content, stories):
    assert read(tmp_path / name, content) == stories


@pytest.mark.parametrize('content, says', [
    ('text\nOnce, twice\n', r"s\.csv, line 2: columns: 2, and 1 in the first line: put quotes .* ','"),
    ('id,text\n1,un\nquoted\n', r's\.csv, line 3: columns: 1, and 2'),
    ('id,text\n1,"a "b" c"\n', r's\.csv, line 2: .*quotes within quotes are doubled'),
    ('id,text\n1,"a\n2,b\n', r's\.csv, line 3: .*unexpected end'),
    ('text;a,story\n1;2,3\n', r"s\.csv can be read in 2 ways, with ',' or ';'"),
    ('text,text\n1,2\n', r"s\.csv has 2 columns 'text'"),
    ('id;body\n1;a\n', r's\.csv has no column text or story in its first line, .* one of id, body, or'),
    ('Once there was a fox.\nHe ran, and ran.\n', r's\.csv .* first line, which must name the columns'),
    ('text\tn\nOnce\ttwice\t3\n', 'put quotes around text that contains a tab or'),
    (b'id,text\n1,caf\xe9\n', r's\.csv, line 2: byte 0xe9 \(at offset 13\)')])
def test_read_csv_names_the_place_of_a_mistake(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        read(tmp_path / 's.csv', content)


@pytest.mark.parametrize('rows, stories', [
    (['"Hello" said Tom', '"Go.', 'He "ran".', 'The end."'],) * 2,
    (['"Go.', '"He ran."', 'Hm" "'],) * 2,
    (['"a\tb"', '"Yes."'], ['a\tb', 'Yes.']),
    (['"Once.\n\nThen ""he"" ran."', 'b'], ['Once.\n\nThen "he" ran.', 'b']),
    (['"""Go,"" he said."', 'b "c" d'], ['"Go," he said.', 'b "c" d']),
    ([], [])])
def test_read_tsv_finds_out_whether_quotes_are_text(tmp_path, rows, stories):
    content = 'title\ttext\n' + ''.join(f'T\t{row}\n' for row in rows)
    for name in 's.tsv', 's.tsv.gz':
        assert read(tmp_path / name, content) == stories


def test_read_tsv_reads_what_pandas_and_others_write(tmp_path):
    rng = random.Random(0)
    stories = [''.join(rng.choices('ab "\t\n,\'', k=9)) for _ in range(200)]
    for quoting in csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC:
        with open(tmp_path / 's.tsv', 'w', newline='', encoding='utf-8') as file:
            rows = [(i, story) for i, story in enumerate(stories)]
            csv.writer(file, delimiter='\t', quoting=quoting).writerows([('n', 'text'), *rows])
        assert list(read_stories(tmp_path / 's.tsv', Format())) == stories


@pytest.mark.parametrize('content, says', [
    ('id\ttext\n1\t"Go.\n2\tHe ran.\n3\tThe end."\n4\tMore\n', r's\.tsv, line 2: .* text or stand around'),
    ('id\ttext\n1\ta\n2\t"Go."\n', r's\.tsv, line 3: .* rename the file to \.csv, else .* \.jsonl'),
    ('id\ttext\n1\ta\tb\n', 'line 2: columns: 3, and 2 in the first line: .* contains a tab or line breaks'),
    ('id\ttext\n1\t"a" b\n2\ta\tb\n', 'line 3: columns: 3.*; nor can quotes .* line 2: a tab expected'),
    ('id\tbody\n1\t"a"\n', 'has no column text or story in its first line, .* one of id, body, or move')])
def test_read_tsv_refuses_what_can_be_read_in_two_ways_or_none(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        read(tmp_path / 's.tsv', content)


def test_read_csv_finds_a_named_column_with_any_separator(tmp_path):
    for separator in ',;\t|':
        content = separator.join(['n', 'my tale']) + '\n' + separator.join(['1', 'a']) + '\n'
        assert read(tmp_path / 's.csv', content, column='my tale') == ['a']


# Parquet ------------------------------------------------------------------------

def parquet(path, **columns):
    with open(path, 'wb') as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return path


@pytest.mark.parametrize('kind', ['string', 'large_string', 'string_view', 'dictionary', 'null'])
def test_read_parquet_takes_every_type_of_text(tmp_path, kind):
    stories = [f'é {i % 7}' for i in range(1000)] + [None]
    if kind == 'null':
        text = pyarrow.nulls(3)
    elif kind == 'dictionary':
        text = pyarrow.array(stories).dictionary_encode()
    else:
        text = pyarrow.array(stories, getattr(pyarrow, kind)())
    other = [{'text': 'no'}] * len(text)
    path = parquet(tmp_path / 's[1]::.parquet', **{'text.b': other, 'text': text, 'n': range(len(text))})
    assert list(read_stories(path, Format())) == ([None] * 3 if kind == 'null' else stories)


def test_read_parquet_refuses_what_is_not_text(tmp_path):
    path = parquet(tmp_path / 's.parquet', text=[1, 2], blob=[b'a', b'b'])
    for column, kind in ('', 'int64'), ('blob', 'binary'):
        with pytest.raises(UserError, match=f's.parquet has no text in its column .* but {kind}'):
            list(read_stories(path, Format(column)))
    empty = parquet(tmp_path / 'empty.parquet', n=pyarrow.array([], 'int64'))
    assert list(read_stories(empty, Format())) == []


def test_read_parquet_names_the_row_that_is_not_utf8(tmp_path):
    rows = [b'ok'] * 777 + [b'caf\xe9', b'ok']
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(rows), pyarrow.array(rows).buffers())
    path = parquet(tmp_path / 's.parquet', text=text)
    with pytest.raises(UserError, match=r"s\.parquet, row 778: 'text' is not UTF-8"):
        list(read_stories(path, Format()))
