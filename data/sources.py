"""Where stories come from: the built-in corpus, local files and folders, saved datasets, the hub."""

import bisect
import json
import os
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configurator import UserError
from data import blocks

SUFFIXES = ('.txt', '.jsonl', '.json', '.parquet')
KINDS = 'stories come as .txt, .jsonl, .json, .parquet, a folder of these, or what save_to_disk writes'
HUB_PATIENCE = 5  # seconds to wait for the hub's answer; a library would retry for minutes


@dataclass
class Source:
    """Stories, as parts in their order that `blocks.read` reads."""

    parts: list  # of (split, part); split: 'train', 'val', or '' where each story's hash decides
    size: int  # bytes on disk
    has_val: bool = False
    left_out: list = field(default_factory=list)  # names of test files and splits

    def blocks(self):
        """Yields every block, each time the same ones in the same order. UserError if one cannot be read."""
        for split, part in self.parts:
            for block in blocks.read(part):
                block.split = split
                yield block


def open_source(name, sample, offline):
    """The Source that `name` means: 'sample', a local path, or a hub dataset.

    sample: gives the texts of the built-in corpus. With `offline` no socket is opened. Raises UserError where
    there is no such source, or no file of stories in it.
    """
    if name == 'sample':
        texts = list(sample())
        return Source([('', texts)], sum(map(len, texts)))
    path = Path(name).expanduser()
    if path.is_dir():
        files = _folder(path)
    elif path.exists():
        if path.suffix.lower() not in SUFFIXES or not path.is_file():
            raise UserError(f'{path} is not a file of stories: {KINDS}')
        files = {path.name: path}
    elif re.fullmatch(r'[A-Za-z0-9][\w.-]*/[\w.-]+', name) and path.suffix.lower() not in SUFFIXES:
        files = _hub(name, offline)
    else:
        raise UserError(f'no such file: {name} (--source takes a path, user/name on the hub, or sample)')
    return _by_split(files)


def _folder(path):
    """{name: path} of the files of stories in a folder, in order."""
    if (path / 'dataset_dict.json').is_file():  # save_to_disk of a DatasetDict: a folder for each split
        names = _entry(path / 'dataset_dict.json', 'splits')
        return {f'{name} {file.name}': file for name in names for file in _saved(path / name)}
    if (path / 'state.json').is_file():  # save_to_disk of a Dataset
        return {file.name: file for file in _saved(path)}
    prepared = (path / 'meta.json').is_file()  # stories and what we made of them may share a folder
    files = {}
    for file in sorted(path.rglob('*')):
        name = file.relative_to(path)
        ours = prepared and file.parent == path and (name.name == 'meta.json' or name.stem == 'tokenizer')
        hidden = any(part.startswith('.') for part in name.parts)
        if name.suffix.lower() in SUFFIXES and not ours and not hidden and file.is_file():
            files[name.as_posix()] = file
    parquet = {name: file for name, file in files.items() if file.suffix.lower() == '.parquet'}
    if not files:
        raise UserError(f'the folder {path} holds no stories: {KINDS} (unpack archives first)')
    return parquet or files


def _saved(path):
    """The Arrow files of one dataset that save_to_disk wrote."""
    return [path / Path(file['filename']).name for file in _entry(path / 'state.json', '_data_files')]


def _entry(path, key):
    """What a file of save_to_disk says of `key`."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))[key]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} is damaged: save the dataset again') from None


def _by_split(files):
    """The Source of {name: path}. Names tell the split; beside `train`, those with `test` are left out."""
    named = {name: set(re.split('[^a-z]+', name.lower())) for name in files}
    val = [name for name, words in named.items() if 'val' in words or 'valid' in name.lower()]
    rest = [name for name in files if name not in val]
    left_out = []
    if any('train' in named[name] for name in rest):
        left_out = [name for name in rest if 'test' in named[name] and 'train' not in named[name]]
    train = [name for name in rest if name not in left_out]
    has_val = bool(train and val)
    if not has_val:
        train, val = train + val, []
    split = 'train' if has_val else ''
    parts = [(split, files[name]) for name in train] + [('val', files[name]) for name in val]
    size = sum(part.stat().st_size for _, part in parts)
    return Source(parts, size, has_val, left_out)


def document(source, percentage):
    """A Source that is a single text without delimiter, divided by position; any other as it is.

    The first nine tenths of its characters are for training (as in nanoGPT), the rest for validation; of both
    parts the first `percentage` percent are taken.
    """
    path = source.parts[0][1]
    if len(source.parts) > 1 or not isinstance(path, Path) or path.suffix.lower() != '.txt':
        return source
    with open(path, 'rb', buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if blocks.find_delimiter(file, 0) < size:
            return source
        starts = range(blocks.after_mark(file), size, blocks.BLOCK)
        blank, ends = True, [0]
        for start in starts:
            data = blocks.read_at(file, start, size)
            blank = blank and data.isspace()
            ends.append(ends[-1] + len(_characters(data)))
        if blank:
            return source

        def offset(character):
            """Where a character begins, in bytes; the end of the file for the one after the last."""
            if character == ends[-1]:
                return size
            block = bisect.bisect_right(ends, character) - 1
            data = blocks.read_at(file, starts[block], size)
            return starts[block] + int(_characters(data)[character - ends[block]])

        cut = int(0.9 * ends[-1])
        if not cut:
            raise UserError(f'{path} is one character, too few for training and validation')
        parts = []
        for split, start, stop in ('train', 0, cut), ('val', cut, ends[-1]):
            stop = start + max(1, int((stop - start) * percentage / 100))
            parts.append((split, (path, offset(start), offset(stop))))
    return Source(parts, size, has_val=True)


def _characters(data):
    """Where in `data` (bytes of UTF-8) characters begin, an int array."""
    return np.flatnonzero(np.frombuffer(data, np.uint8) & 0xC0 != 0x80)


def _hub(name, offline):
    """{split and number: path} of the Arrow files of a hub dataset, downloaded or cached."""
    endpoint = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
    offline = offline or any(os.environ.get(key, '').upper() in ('1', 'ON', 'YES', 'TRUE')
                             for key in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'))
    why = 'we are offline' if offline else _unreachable(endpoint)
    if why:
        os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'  # datasets reads it on import
    import datasets
    datasets.logging.set_verbosity_error()
    if not os.isatty(2):
        datasets.disable_progress_bars()
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # a library's many ways to say that the dataset cannot be had
        if why:
            raise UserError(
                f'{name} is not in the cache, and {why}: type --source sample (built in), or --source and a '
                f'local path, or on a machine with internet: hf download --repo-type dataset {name} '
                '--local-dir stories, bring that folder over, and type --source stories'
            ) from None
        reason = ' '.join(str(error.__cause__ or error).split()) or repr(error)
        raise UserError(f'cannot load {name} from {endpoint}: {reason}') from None
    return {f'{split} {i:05d}': Path(file['filename']) for split, dataset in splits.items()
            for i, file in enumerate(dataset.cache_files)}


def _unreachable(endpoint):
    """Why the hub does not answer, or ''. A thread asks, as looking up a name has no limit in time."""
    answer = []

    def ask():
        request = urllib.request.Request(endpoint, method='HEAD')
        try:
            urllib.request.urlopen(request, timeout=HUB_PATIENCE).close()
            answer.append('')
        except urllib.error.HTTPError as error:  # also an answer, but for a gateway's excuse
            answer.append('' if error.code < 500 else str(error))
        except (OSError, ValueError) as error:
            answer.append(str(getattr(error, 'reason', error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE)
    why = answer[0] if answer else f'no answer in {HUB_PATIENCE} seconds'
    return why and f'{endpoint} cannot be reached ({why})'
