"""Find story files and read their stories, one file after another and one story after another.

A reader is given a path, never a pattern, and opens it itself. In memory are only a few stories at a time.
"""

import codecs
import collections
import contextlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from configurator import SettingError, UserError, script_path
from data.files import refuse_stand_in
from data.story_tables import has_rows, read_csv, read_json, read_parquet, read_tsv
from data.text_encoding import CHUNK, check_encoding, describe_undecodable, open_text

DELIMITER = '<|endoftext|>'  # between two stories of a .txt
WHAT_WE_READ = ('stories come as .txt, .jsonl, .json, .csv, .tsv (each also as .gz), .parquet, a folder of '
                'these, or a folder written by save_to_disk')
# JSON files that hold something else: what prepare.py and the datasets library write
NOT_STORIES = 'meta.json', 'tokenizer.json', 'dataset_info.json', 'dataset_dict.json', 'state.json'


@dataclass(frozen=True)
class Format:
    """What the settings say about story files."""

    column: str = ''  # the column of a table that holds the stories; '' means text or story
    encoding: str = 'utf-8'  # of text files
    separator: str = DELIMITER  # between two stories of a .txt


def story_format(column, encoding, separator):
    """Return the Format that the settings mean: in `separator`, \\n is a line break and \\\\ a backslash.

    Raises SettingError if one of them cannot be.
    """
    check_encoding(encoding)
    if not separator:
        raise SettingError('separator is empty: without --separator it is ' + DELIMITER)
    return Format(column, encoding, re.sub(r'\\[nrtf\\]', unescape, separator))


def unescape(typed):
    """Return the character that a match of \\n, \\r, \\t, \\f or \\\\ stands for."""
    return {'n': '\n', 'r': '\r', 't': '\t', 'f': '\f', '\\': '\\'}[typed[0][1]]


def check_format(how, kinds, source):
    """Raise SettingError if a setting was given that has no effect on what `source` is made of.

    kinds: the types of its files, such as .txt; .arrow stands for a dataset on the hub, too.
    """
    if how.column and not set(kinds) - {'.txt'}:
        raise SettingError(f'text_column is for tables, and {source} has none')
    if codecs.lookup(how.encoding).name != Format.encoding and not set(kinds) - {'.parquet', '.arrow'}:
        raise SettingError(f'text_encoding is for text files, and {source} has none')
    if how.separator != Format.separator and '.txt' not in kinds:
        raise SettingError(f'separator is for .txt files, and {source} has none')


# finding files ------------------------------------------------------------------

def find_story_files(path):
    """Return {name: path} of the story files at `path`, sorted. Links to folders are followed.

    Raises UserError if there are no files, or something cannot be read.
    """
    if path.is_file() and file_type(path):
        return {path.name: path}
    if not path.is_dir():
        raise UserError(f'no stories in {path}: --source takes sample, a name on the hub, or a path; '
                        + WHAT_WE_READ)
    files = {}
    for file in sorted(files_below(path)):
        if file_type(file):
            files[file.relative_to(path).as_posix()] = file
    if not files and any(path.glob('*.bin')):
        script = script_path('data/token_files/prepare.py')
        raise UserError(f'{path} holds token files, not stories: type python {script} --source {path}')
    if not files:
        raise UserError(f'the folder {path} holds no stories: {WHAT_WE_READ} (unpack archives first)')
    return files


def prefer_parquet(files):
    """Return (files, names left out): only the .parquet files if one of them has rows, else all files.

    Datasets come with their stories in several formats. files: {name: path}.
    """
    parquet = {name: file for name, file in files.items() if file_type(file) == '.parquet'}
    if not any(has_rows(file) for file in parquet.values()):
        return files, []
    return parquet, [name for name in files if name not in parquet]


def files_below(folder):
    """Return the files in `folder` and in its subfolders, each folder once, without what is hidden.

    A linked folder is visited after all others, so a folder that can also be reached without a link keeps its
    own name. Raises UserError if a folder, or a file or link that may hold stories, cannot be read.
    """
    files = []
    folders = [folder]
    links = []
    visited = set()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        if current.resolve() in visited:
            continue
        visited.add(current.resolve())
        for path in list_folder(current):
            if not path.is_dir():
                files.append(path)
            elif path.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    return files


def list_folder(folder):
    """Return the files and folders in a folder, sorted, without what is hidden.

    Raises UserError if the folder, or a file or link in it that may hold stories, cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    return [path for path in paths if not path.name.startswith('.') and is_file_or_folder(path)]


def is_file_or_folder(path):
    """Return whether `path` is a file or a folder, or a link to one.

    Raises UserError if it cannot be read. A link to nothing is ignored if its name is that of a file without
    stories, such as README.md.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.suffix and not file_type(path):
            return False
        raise unreadable(path, error) from error
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def unreadable(path, error):
    """Return the UserError about a part of the source that raised an OSError."""
    what = path
    if os.path.islink(path):  # path.is_symlink() may raise an error, too
        what = f'{path} (a link to {os.readlink(path)})'
    return UserError(f'{what} cannot be read ({error.strerror}): mend this, or move it out of the source')


def file_type(path):
    """Return the ending that says what a story file is (of s.txt.gz: .txt), '' for all other files."""
    ending = path.suffix.lower()
    if ending == '.gz':
        ending = Path(path.stem).suffix.lower()
        if ending == '.parquet':
            return ''  # the library cannot read it
    if ending not in READERS or path.name in NOT_STORIES:
        return ''
    return ending


# reading ------------------------------------------------------------------------

def read_stories(path, how):
    """Yield the stories of a file: str, or None for a row without one.

    how: a Format. Raises UserError with the place if the file is not what its name says; the errors of
    libraries pass through.
    """
    try:
        refuse_stand_in(path)
        yield from READERS[file_type(path)](path, how)
    except UnicodeDecodeError as error:
        raise UserError(describe_undecodable(path, how.encoding)) from error
    except OSError as error:
        if error.errno is None:  # what a library says of a damaged file
            raise
        raise unreadable(path, error) from error


def read_txt(path, how):
    """Yield the parts of a .txt between separators; line breaks after the last one are no part.

    Example: 'One.\\n<|endoftext|>\\nTwo.' has the parts 'One.\\n' and '\\nTwo.'.
    A file without a separator is one part, an empty file none. A separator that is a line of its own, such as
    '\\n---\\n', may be the first or last line, too.
    """
    split = separator_pattern(how.separator).split
    before, after = line_breaks_around(how.separator)
    rest = before  # the beginning of a story that is not complete yet
    is_separated = False
    is_empty = True
    with open_text(path, how.encoding) as file:
        while True:
            # read twice as much if a story is long, so that it is searched for separators only a few times
            chunk = file.read(max(CHUNK, len(rest)))
            if not chunk:
                break
            is_empty = False
            *complete, rest = split(rest + chunk)
            yield from complete
            is_separated = is_separated or len(complete) > 0
    if is_empty:
        return
    *complete, rest = split(rest + after)
    yield from complete
    is_separated = is_separated or len(complete) > 0
    if rest.strip('\r\n') or (rest and not is_separated):
        yield rest


def separator_pattern(separator):
    """Return the compiled pattern of a separator; its line breaks may be those of Windows."""
    _, after = line_breaks_around(separator)
    pattern = re.escape(separator.removesuffix(after)).replace('\\\n', '\r?\n')
    if after:  # it may also be the line break before the next separator
        pattern += '(?=' + '\r?\n' * len(after) + ')'
    # a \r before the first one is left to the story, whose line breaks at the ends do not count
    return re.compile(pattern.removeprefix('\r?'))


def line_breaks_around(separator):
    """Return the line breaks before and after a separator that is a line of its own, '' and '' for others.

    Put at the ends of a text, they let its first and last line be separators.
    """
    found = re.fullmatch(r'(\n+)[^\n].*?(\n+)', separator, re.DOTALL)
    return found.groups() if found else ('', '')


READERS = {'.txt': read_txt, '.jsonl': read_json, '.json': read_json, '.csv': read_csv, '.tsv': read_tsv,
           '.parquet': read_parquet}


# texts without the separator ------------------------------------------------------

# What other projects put between two stories: <|end_of_text|>, </s>, [EOS], a line of --- or * * *, \f
MARKS = (r'<(?:\|\w{1,30}\|>|/?(?:s|eos|EOS|end|END|sep|SEP)>)', r'\[(?:EOS|END|SEP)\]',
         r'\n[-*=#~_+](?: ?[-*=#~_+]){2,}(?=\r?\n)', r'\f')


def read_document(path, how):
    """Return the text of a .txt that has no separator, or None if it has one."""
    with open_text(path, how.encoding) as file:
        text = file.read()
    before, after = line_breaks_around(how.separator)
    if separator_pattern(how.separator).search(before + text + after):
        return None
    return text


def describe_unseparated(n_stories, how):
    """Return a line about .txt files that are one story each, if their text seems to hold several, or ''.

    n_stories: {path: number of stories} of all files of the source.
    Raises UserError if a separator was given and is in no file.
    """
    line = ''
    n_texts = 0
    n_unseparated = 0
    for path, n in n_stories.items():
        if n == 0 or file_type(path) != '.txt':
            continue
        n_texts += 1
        text = read_document(path, how) if n == 1 else None
        if text is None:
            continue
        n_unseparated += 1
        if not line:
            line = describe_document(path, text, how, is_alone=sum(n_stories.values()) <= 2)
    if n_texts and n_texts == n_unseparated and how.separator != Format.separator:
        raise UserError(line or f'no .txt of the source has the separator {how.separator!r}')
    return line


def describe_document(path, text, how, is_alone):
    """Return a line on what may be between the stories of a .txt without our separator, '' if nothing is.

    is_alone: whether it is all there is. Only then line breaks may be between stories, and not just in them.
    """
    if is_json_lines(text):
        return f'{path} is one document without {how.separator!r}, and holds JSON lines: rename it to .jsonl'
    separator, n = guess_separator(text)
    if not separator or (separator in ('\n', '\n\n') and not is_alone):
        return ''
    found = {'\n': 'line breaks', '\n\n': 'blank lines', '\f': 'form feeds'}.get(separator, separator.strip())
    typed = repr(separator).replace('\\x0c', '\\f')
    return (f'{path} has no {how.separator!r}, so it is one document; it has {found} ({n:,}): '
            f'type --separator {typed} if they are between stories')


def is_json_lines(text):
    """Return whether a text begins with a line that is a JSON object."""
    line, _, _ = text.lstrip().partition('\n')
    with contextlib.suppress(ValueError, RecursionError):
        return line.startswith('{') and isinstance(json.loads(line), dict)
    return False


def guess_separator(text):
    """Return (what may be between the stories of a text, how often it is there), ('', 0) if there is nothing.

    Example: 'One.</s>Two.</s>' gives ('</s>', 2).
    """
    marks = collections.Counter()
    for pattern in MARKS:
        for found in re.finditer(pattern, '\n' + text + '\n'):
            mark = found[0]
            marks[mark + '\n' if mark.startswith('\n') else mark] += 1
    if marks:
        most = max(marks.values())
        frequent = [mark for mark in marks if marks[mark] == most]
        ends = [mark for mark in frequent if re.search('/|end|eo', mark.lower())]  # </s> rather than <s>
        return (ends or frequent)[0], most
    text = text.strip('\r\n')
    blank_lines = len(separator_pattern('\n\n').findall(text))
    if blank_lines > 2:
        return '\n\n', blank_lines
    line_breaks = len(separator_pattern('\n').findall(text))
    if line_breaks > 4 * blank_lines:  # one or two blank lines are in a story, or by mistake
        return '\n', line_breaks
    return '', 0
