"""Read the stories of tables: JSON, CSV, Parquet, Arrow.

Only the column of stories is read, and each value is taken as text: another column may hold anything, and 007
stays 007. That is why files are read here and not with `load_dataset`, which guesses a type for every column
of a file, piece by piece, and takes a path for a pattern (s[1].jsonl means s1.jsonl).
"""

import contextlib
import csv
import itertools
import json
import re
from pathlib import Path

from configurator import UserError
from data.text_encoding import CHUNK, open_text

ROWS = 200  # in a batch of an Arrow table


def choose_column(names, column, where):
    """Return which of the columns `names` holds the stories: `column`, or '' for text or story.

    Raises UserError if there is none, or two of that name.
    """
    wanted = [column] if column else ['text', 'story']
    for name in wanted:
        if names.count(name) > 1:
            raise UserError(f'{where} has {names.count(name)} columns {name!r}: rename one')
        if name in names:
            return name
    message = f"{where} has no column {' or '.join(wanted)}"
    advice = 'type --text_column and one of ' + ', '.join(names)[:200]
    if Path(where).is_file():
        advice += ', or move the file out of the folder if it holds no stories'
    if str(where).lower().removesuffix('.gz').endswith(('.csv', '.tsv')):
        message += ' in its first line, which must name the columns'
    raise UserError(f'{message}: {advice}')


def read_json(path, how):
    """Yield the stories of a .json or .jsonl, whose rows are objects with a story, or plain strings.

    Rows may lack the column. Without a given one, the first row that has a text or a story decides.
    """
    wanted = [how.column] if how.column else ['text', 'story']
    column = None  # not known yet
    names = []  # the columns of the rows before
    number = 0
    lists = []  # the columns of the first row that hold rows themselves
    with open_text(path, how.encoding) as file:
        for number, row in enumerate(json_rows(file, path), 1):
            if isinstance(row, str):
                row = {'text': row}
            if not isinstance(row, dict):
                raise UserError(f'{path}, row {number} is {JSON_TYPES[type(row)]}, not an object such as '
                                '{"text": "Once upon a time"}')
            if column not in row:
                found = [name for name in wanted if name in row]
                if found and column:
                    raise UserError(f'{path}, row {number} has {found[0]!r} and no {column!r}, unlike rows '
                                    f'before: give both the name {column!r}, or type --text_column {column} '
                                    'to leave such rows out')
                if found:
                    column = found[0]
                elif number == 1:
                    lists = lists_of_rows(row)
                if not column and len(names) < 100:
                    names += [name for name in row if name not in names]
            story = row.get(column)
            if story is not None:
                check_json_text(story, column, path, number)
            yield story
    if number == 1 and lists and not column:
        raise UserError(f"{path} is an object, and a list of rows is expected, which is under "
                        f"{' and '.join(map(repr, lists))[:200]}: write each list to its own file")
    if names and not column:
        choose_column(names, how.column, path)


def lists_of_rows(row):
    """Return the columns of a JSON row that hold lists of rows, such as train of {"train": [{"text": "a"}]}.

    A list of strings counts if there is nothing else: in {"title": "a", "tags": ["b"]} it is no list of rows.
    """
    lists = {name: value for name, value in row.items() if isinstance(value, list) and value}
    if len(lists) == len(row):
        return list(lists)
    return [name for name, value in lists.items() if isinstance(value[0], dict)]


def check_json_text(story, column, path, number):
    """Raise UserError if a value of a JSON file is not text."""
    if not isinstance(story, str):
        raise UserError(f'{path}, row {number}: {column!r} is {JSON_TYPES[type(story)]}, not text')
    if not story.isascii() and re.search('[\ud800-\udfff]', story):
        raise UserError(f'{path}, row {number}: {column!r} has half of a surrogate pair, such as \\ud83d '
                        'without \\ude00')


JSON_TYPES = {dict: 'an object', list: 'a list', float: 'a number', bool: 'true or false', type(None): 'null'}
BETWEEN_ROWS = re.compile(r'[ \t\r\n]*,?[ \t\r\n]*')


def json_rows(file, path):
    """Yield the rows of JSON lines or of a JSON list, however they are spread over lines.

    The json module wants a whole text. So one row after another is decoded from what has been read so far,
    and if the text ends within a row, more is read. Commas between rows may be missing.
    Raises UserError with the number of the line.
    """
    # an int may have 4,300 digits only, and what is in other columns does not matter
    decode = json.JSONDecoder(parse_int=float).raw_decode
    text = file.read(CHUNK)
    is_list = text.lstrip().startswith('[')
    end = text.index('[') + 1 if is_list else 0  # of the previous row
    line = 1  # the number of the line in which `text` begins
    while True:
        start = BETWEEN_ROWS.match(text, end).end()
        if is_list and text[start:start + 1] == ']':
            rest = text[start + 1:] + file.read(CHUNK)
            if rest.strip():
                line += text.count('\n', 0, start)
                raise UserError(f'{path}, line {line} is not JSON: there is more after the end of the list')
            return
        try:
            row, end = decode(text, start)
        except (ValueError, RecursionError) as error:
            # read twice as much if a row is long, so that it is decoded only a few times
            more = file.read(max(CHUNK, len(text) - start)) if is_cut_off(error, text) else ''
            if more:
                line += text.count('\n', 0, start)
                text = text[start:] + more
                end = 0
                continue
            if start == len(text) and not is_list:
                return
            line += text.count('\n', 0, getattr(error, 'pos', start))
            raise UserError(f'{path}, line {line} is not JSON: {json_problem(error, text)}') from error
        yield row


def is_cut_off(error, text):
    """Return whether an error of the json module may come from the end of `text`, which is not all."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    # what is cut within a word such as true or \u00e9 fails at its beginning
    return error.pos > len(text) - 10 or error.msg.startswith('Unterminated string')


def json_problem(error, text):
    """Return what is wrong with a row, in the words of the json module if it names a place."""
    if isinstance(error, RecursionError):
        return 'it is nested too deeply'
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    if error.pos >= len(text):
        return 'the file ends too early'
    return re.sub('( starting)? at$', '', error.msg)


def read_csv(path, how):
    """Yield the stories of a .csv, whose columns may be separated by a comma, a semicolon, a tab or a bar."""
    return rows_of_csv(path, how, find_separator(path, how))


def read_tsv(path, how):
    """Yield the stories of a .tsv, which is written plainly or with quotes.

    Most are plain: a line is a row, and a quote is a character of the text. pandas and Excel put quotes
    around a value with a tab, a quote or a line break, and double the quotes in it, as in a .csv. If only one
    of the two readings gives rows with the columns of the first line, it is meant. If both do and differ, the
    quotes are meant if every value that begins with one has doubled ones, as no plain text would.
    Raises UserError with the line of the first such value if that is not so.
    """
    line, is_doubled = find_quotes(path, how)
    if not line:
        yield from rows_of_csv(path, how, '\t', csv.QUOTE_NONE)
        return
    plain_problem = find_problem(rows_of_csv(path, how, '\t', csv.QUOTE_NONE))
    quoted_problem = find_problem(rows_of_csv(path, how, '\t'))
    if plain_problem and quoted_problem:
        if plain_problem == quoted_problem:
            raise UserError(plain_problem)
        raise UserError(f'{plain_problem}; nor can quotes stand around values: {quoted_problem}')
    if plain_problem:
        yield from rows_of_csv(path, how, '\t')
        return
    if not quoted_problem and find_difference(path, how):
        if not is_doubled:
            raise UserError(f'{path}, line {line}: a value begins with a quote, which may be text or stand '
                            'around the value: if it stands around it, rename the file to .csv, else write '
                            'the stories as .jsonl')
        yield from rows_of_csv(path, how, '\t')
        return
    yield from rows_of_csv(path, how, '\t', csv.QUOTE_NONE)


def find_quotes(path, how):
    """Return (line of the first value in a .tsv that begins with a quote, 0 if there is none; is_doubled).

    is_doubled: whether all such values are in quotes and have doubled ones, each on its line.
    """
    first = 0
    with open_text(path, how.encoding) as file:
        for number, line in enumerate(file, 1):
            if '"' not in line:
                continue
            for value in line.rstrip('\r\n').split('\t'):
                if value.startswith('"'):
                    first = first or number
                    if not has_doubled_quotes(value):
                        return first, False
    return first, True


def has_doubled_quotes(value):
    """Return whether a value is in quotes and has doubled ones and no others, such as '"Say ""yes""."'."""
    inner = value[1:-1]
    return len(value) > 1 and value.endswith('"') and '""' in inner and '"' not in inner.replace('""', '')


def find_problem(stories):
    """Read an iterator of stories to its end. Return the message if that fails, or ''."""
    try:
        for _ in stories:
            pass
    except UserError as error:
        return str(error)
    return ''


def find_difference(path, how):
    """Return whether the two readings of a .tsv give different stories."""
    plain = rows_of_csv(path, how, '\t', csv.QUOTE_NONE)
    quoted = rows_of_csv(path, how, '\t')
    return any(story != other for story, other in itertools.zip_longest(plain, quoted))


def rows_of_csv(path, how, separator, quoting=csv.QUOTE_MINIMAL):
    """Yield the stories of a .csv whose columns are separated by `separator`. Empty lines are skipped.

    Raises UserError with the number of the line if a row has other columns than the first line.
    """
    csv.field_size_limit(2**31 - 1)
    with open_text(path, how.encoding) as file:
        reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
        try:
            header = next_row(reader)
            if SEPARATOR_LINE.fullmatch(separator.join(header)):
                header = next_row(reader)
            place = None  # of the story in a row; without any row, it does not matter
            for row in reader:
                if not row:
                    continue
                if place is None:
                    place = header.index(choose_column(header, how.column, path))
                # programs leave out empty cells at the end of a row, but only there
                if len(row) > len(header) or len(row) <= place:
                    raise UserError(f'{path}, line {reader.line_num}: columns: {len(row)}, and {len(header)} '
                                    'in the first line: put quotes around text that contains '
                                    f'{SEPARATORS.get(separator, repr(separator))} or line breaks')
                yield row[place]
        except csv.Error as error:
            problem = str(error).replace("'\t'", SEPARATORS['\t'])
            raise UserError(f'{path}, line {reader.line_num}: {problem} (quotes within quotes are doubled: '
                            '"He said ""yes"".")') from error


# What may be between columns, and its name in messages
SEPARATORS = {',': "','", ';': "';'", '\t': 'a tab', '|': "'|'"}
SEPARATOR_LINE = re.compile('sep=(.)')  # what a .csv of Excel may begin with


def next_row(reader):
    """Return the next row of a csv.reader that is not an empty line; [] at the end."""
    for row in reader:
        if row:
            return row
    return []


def find_separator(path, how):
    """Return what separates the columns of a .csv: with it, the first line names the column of stories.

    Raises UserError if several characters would do.
    """
    wanted = {how.column} if how.column else {'text', 'story'}
    found = {}  # {separator: number of columns}
    others = {',': 1}  # where the first line does not name it
    for separator in SEPARATORS:
        with open_text(path, how.encoding) as file, contextlib.suppress(csv.Error):
            header = next_row(csv.reader(file, delimiter=separator, strict=True))
            given = SEPARATOR_LINE.fullmatch(separator.join(header))
            if given:
                return given[1]
            if wanted & set(header):
                found[separator] = len(header)
            else:
                others[separator] = len(header)
    several = [separator for separator, n_columns in found.items() if n_columns > 1]
    if len(several) > 1:
        names = [SEPARATORS[separator] for separator in several]
        raise UserError(f'the first line of {path} can be read in {len(several)} ways, with '
                        f'{" or ".join(names)} between columns: put quotes around names that contain one')
    if several:
        return several[0]
    if found:
        return ','
    return max(others, key=others.get)  # so that the message lists the columns that there are


def has_rows(path):
    """Return whether a .parquet may have rows: one that is damaged or cannot be read may."""
    import pyarrow.parquet

    try:
        with open(path, 'rb') as file:
            if not file.read(1):
                return False
            return pyarrow.parquet.ParquetFile(file).metadata.num_rows > 0
    except (pyarrow.ArrowException, OSError):
        return True


def read_parquet(path, how):
    """Yield the stories of a .parquet. Without rows, its columns do not matter."""
    import pyarrow.parquet

    if not has_rows(path):
        return
    with open(path, 'rb') as file:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=CHUNK)
        column = choose_text_column(table.schema_arrow, how.column, path)
        yield from arrow_stories(table.iter_batches(ROWS, columns=[column]), column, path)


def choose_text_column(schema, column, where):
    """Return which column of an Arrow schema holds the stories. Raises UserError if it is not text."""
    import pyarrow

    column = choose_column(schema.names, column, where)
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    # a column without any value has the type null
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.null()):
        raise UserError(f'{where} has no text in its column {column!r} but {kind}')
    return column


def arrow_stories(batches, column, where):
    """Yield the stories in a column of text that comes in Arrow batches.

    Raises UserError with the number of the row if one is not UTF-8, which Arrow does not check.
    """
    n_rows = 0
    for batch in batches:
        stories = batch.column(column).cast('large_string')  # Arrow has several types of text
        try:
            texts = stories.to_pylist()
        except UnicodeDecodeError as error:
            number = n_rows + first_undecodable(stories) + 1
            raise UserError(f'{where}, row {number}: {column!r} is not UTF-8, as it must be: write the file '
                            'again') from error
        yield from texts
        n_rows += len(texts)


def first_undecodable(stories):
    """Return the index of the first story of an Arrow array that is not UTF-8."""
    for i, story in enumerate(stories):
        try:
            story.as_py()
        except UnicodeDecodeError:
            return i
    return 0
