"""Stories of any source, as a DatasetDict of the `datasets` library with one column, `text`.

One story is held in memory whole, and so are a .txt that is one document and the list of a .json file. All
else lies in Arrow files, those of local sources in the folder `cache`, however many stories there are.
"""

import gzip
import os
import re
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.request import Request, urlopen

from configurator import UserError, user_errors

DELIMITER = '<|endoftext|>'  # between the stories of a .txt
LOADERS = {'.txt': 'ours', '.jsonl': 'json', '.json': 'json', '.csv': 'csv', '.parquet': 'parquet'}
KINDS = ('stories come as .txt, .jsonl, .json, .csv (each also as .gz), .parquet, a folder of these or what '
         'save_to_disk writes, or tokens as .bin with their --tokenizer')
NO_STORIES = 'meta.json', 'tokenizer.json', 'dataset_info.json', 'dataset_dict.json', 'state.json'
HUB_NAME = r'((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?'  # and a configuration
HUB_PATIENCE = 5  # seconds to wait for the hub's answer; the library would retry for minutes
HUB_HELP = ('is no file here and not in the cache (as user/name), and {1}: type --source sample (built in), '
            'or where there is internet hf download --repo-type dataset {0} --include "data/*" --local-dir '
            'stories, and with this folder brought over --source stories. The library says')


def load_stories(source, cache, sample, percentage=100.0, offline=False, column=''):
    """(DatasetDict of the stories of `source`, a remark on its test split or ''). Raises UserError.

    source: 'sample', whose texts sample() gives; a local path; or a name on the hub, `name`, `user/name` or
    `user/name:configuration`. column: that of the stories, '' for text or story. The splits are `train` and
    `validation`, or `train` alone. A lone .txt without delimiters is one document: nine tenths of its
    characters are for training, as in nanoGPT, and of both parts the first `percentage` percent are taken.
    """
    path, why = Path(source), ''
    on_hub = re.fullmatch(HUB_NAME, source) if not (path.exists() or kind(path)) else None
    if not on_hub or (why := unreachable(offline)):  # else the library asks the hub about local files, too
        os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'  # read when it is imported
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not os.isatty(2):
        datasets.disable_progress_bars()
    if source == 'sample':
        named = {'train': datasets.Dataset.from_dict({'text': list(sample())})}
    elif on_hub:
        with user_errors(source, HUB_HELP.format(on_hub[1], why) if why else
                     'is no file here, nor can it be loaded from the hub (as user/name:configuration?)'):
            from huggingface_hub import HfApi
            name, configuration = on_hub.groups()  # the hub knows the users of old names, the cache does not
            name = name if '/' in name or why else HfApi().dataset_info(name).id
            named = datasets.load_dataset(name, configuration)
    elif (path / 'dataset_dict.json').is_file():
        with user_errors(path):
            named = datasets.load_from_disk(path)
    elif saved := sorted({file.parent for place in ('*.arrow', '*/*.arrow') for file in path.glob(place)}):
        if others := {file.parent for file in path.rglob('*') if kind(file)} - {*saved}:
            raise UserError(f'{path} has what save_to_disk writes, and files in {min(others)}: name one')
        with user_errors(path):
            named = {folder.name: datasets.load_from_disk(folder) for folder in saved}
    else:
        named = story_files(path)
    splits, remark = by_split(named)
    for split, names in splits.items():
        parts = [named[name] for name in names]
        parts = load_files(parts, cache, split, column) if isinstance(parts[0], Path) else parts
        splits[split] = datasets.concatenate_datasets([only_text(part, source, column) for part in parts])
    if is_document(path, splits['train']):
        document = splits['train'][0]['text']
        cut, share = int(0.9 * len(document)), percentage / 100
        for split, part in ('train', document[:cut]), ('validation', document[cut:]):
            splits[split] = datasets.Dataset.from_dict({'text': [part[:max(1, int(len(part) * share))]]})
    return datasets.DatasetDict(splits), remark


def story_files(path):
    """{name: path} of the files of stories at `path`, in order. Where there is parquet, that alone counts."""
    if path.is_file() and kind(path):
        return {path.name: path}
    if not path.is_dir():
        raise UserError(f'no stories in {path}: --source takes sample, a name on the hub, or a path; {KINDS}')
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob('*')) if kind(file)}
    files = {name: file for name, file in files.items() if '/.' not in f'/{name}' and file.is_file()}
    if not files:
        raise UserError(f'the folder {path} holds no stories: {KINDS} (unpack archives first)')
    return {name: file for name, file in files.items() if kind(file) == '.parquet'} or files


def kind(path):
    """The ending that says what a file is, mostly that before .gz; '' where it holds no stories."""
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    ending = inner if suffix == '.gz' and inner != '.parquet' else suffix
    return ending if ending in LOADERS and path.name not in NO_STORIES else ''


def load_files(paths, cache, split, column):
    """Yields the Datasets of files: one of all .txt, with that column, and one of each other file."""
    import datasets
    import pyarrow
    from pandas.errors import ParserWarning
    texts = [path for path in paths if kind(path) == '.txt']
    arrow, schema = f'{cache}/{split}.arrow', pyarrow.schema({column or 'text': pyarrow.string()})
    # not by the library's own loader, which takes \r for the end of a line
    with pyarrow.OSFile(arrow, 'wb') as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for stories in read_texts(texts):
            writer.write_batch(pyarrow.record_batch([stories], schema))
    yield datasets.Dataset.from_file(arrow)
    for path in sorted(path for path in set(paths) - set(texts) if path.stat().st_size):
        exactly = {'keep_default_na': False, 'index_col': False} if kind(path) == '.csv' else {}
        with user_errors(path), warnings.catch_warnings(action='error', category=ParserWarning):
            yield datasets.load_dataset(LOADERS[kind(path)], data_files=str(path), cache_dir=str(cache),
                                        split='train', **exactly)


def read_texts(paths):
    """Yields lists of stories of .txt files: line breaks at a delimiter belong to it; without, all is one."""
    for path in paths:
        with user_errors(path), opened(path) as file:
            rest, delimited = '', False
            while chunk := file.read(max(1 << 20, len(rest))):  # doubling: a long story is searched few times
                *stories, rest = (rest + chunk).split(DELIMITER)
                yield [story.strip('\r\n') for story in stories]
                delimited = delimited or bool(stories)
            if rest.strip('\r\n') or not delimited:
                yield [rest.strip('\r\n') if delimited else rest]


def opened(path):
    return (gzip.open if path.suffix.lower() == '.gz' else open)(path, 'rt', encoding='utf-8-sig', newline='')


def is_document(path, stories):
    """Whether `path` is a .txt with one story and no delimiter."""
    if len(stories) != 1 or kind(path) != '.txt' or not path.is_file():
        return False
    with opened(path) as file:
        return DELIMITER not in file.read()


def by_split(names):
    """({split: names}, a remark): names tell the split. A test split beside `train` is left out, or serves as
    the validation split where there is no other."""
    words = {name: set(re.split('[^a-z]+', name.lower())) for name in names}
    val = [name for name in names if 'val' in words[name] or 'valid' in name.lower()]
    test = [name for name in names if {'test', 'train'} & words[name] == {'test'} and name not in val]
    train = [name for name in names if name not in val + test]
    if not any('train' in words[name] for name in train):
        train, test = train + test, []
    remark = 'left out, as a test split' if val else 'for validation, as there is no other split'
    val = val or test
    splits = {'train': train, 'validation': val} if train and val else {'train': train + val}
    return splits, f'{remark}: {", ".join(test)}' if test else ''


def only_text(dataset, name, column):
    """The column of stories alone. Raises UserError where there is none."""
    names = [column] if column else ['text', 'story']
    column = next((name for name in names if name in dataset.column_names), None)
    if not column:
        raise UserError(f"{name} has no column {' or '.join(names)}: type --text_column and one of "
                        + ', '.join(dataset.column_names)[:200])
    if getattr(dataset.features[column], 'dtype', '') not in ('string', 'large_string'):
        raise UserError(f'{name} has no text in its column {column!r} but {dataset.features[column]}')
    return dataset.select_columns(column).rename_columns({column: 'text'})


def unreachable(offline):
    """Why the hub does not answer, or ''. A thread asks, as looking up a name has no limit in time."""
    if offline or os.environ.get('HF_HUB_OFFLINE', '0').upper() in ('1', 'ON', 'YES', 'TRUE'):
        return 'we are offline'
    endpoint = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
    asked = Request(endpoint, method='HEAD'), None, HUB_PATIENCE
    try:
        ThreadPool(1).apply_async(urlopen, asked).get(HUB_PATIENCE)
    except Exception as error:
        if getattr(error, 'code', 500) >= 500:  # less is an answer, too; more a gateway's excuse
            why = getattr(error, 'reason', error)
            return f"{endpoint} cannot be reached ({why or f'no answer in {HUB_PATIENCE} seconds'})"
    return ''
