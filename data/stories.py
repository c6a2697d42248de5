"""Stories of any source, as a DatasetDict of the `datasets` library with one column, `text`.

One story is held in memory whole, and so are a .txt that is one document and the list of a .json file. All
else lies in Arrow files, those of local sources in the folder `cache`, however many stories there are.
"""

import os
import re
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.request import Request, urlopen

from errors import UserError, reading

DELIMITER = '<|endoftext|>'  # between the stories of a .txt
SUFFIXES = '.txt', '.jsonl', '.json', '.parquet'
KINDS = 'stories come as .txt, .jsonl, .json, .parquet, a folder of these, or what save_to_disk writes'
HUB_PATIENCE = 5  # seconds to wait for the hub's answer; the library would retry for minutes
HUB_HELP = (
    'is not in the cache, and {1}: type --source sample (built in); or, where there is internet, hf download '
    '--repo-type dataset {0} --include "data/*" --local-dir stories, and with this folder brought over '
    '--source stories. The library says')


def load_stories(source, cache, sample, percentage=100.0, offline=False):
    """(DatasetDict of the stories of `source`, names of the splits that are left out).

    source: 'sample', whose texts sample() gives; a local path; or user/name on the hub, which the library has
    a cache for. The splits are `train` and `validation`, or `train` alone where the source does not tell them
    apart. A lone .txt without delimiters is one document: nine tenths of its characters are for training, as
    in nanoGPT, and of both parts the first `percentage` percent are taken. Raises UserError.
    """
    path, why = Path(source).expanduser(), ''
    on_hub = re.fullmatch(r'[A-Za-z0-9][\w.-]*/[\w.-]+', source) and not path.exists()
    if on_hub and (why := unreachable(offline)):
        os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'  # read when it is imported
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not os.isatty(2):
        datasets.disable_progress_bars()
    if source == 'sample':
        named = {'train': datasets.Dataset.from_dict({'text': list(sample())})}
    elif on_hub:
        with reading(source, HUB_HELP.format(source, why) if why else 'cannot be loaded'):
            named = datasets.load_dataset(source)
    elif (path / 'dataset_dict.json').is_file() or (path / 'state.json').is_file():
        with reading(path):
            saved = datasets.load_from_disk(path)
        named = saved if isinstance(saved, dict) else {'train': saved}
    else:
        named = story_files(path)
    splits, left_out = by_split(named)
    for split, names in splits.items():
        parts = [named[name] for name in names]
        parts = load_files(parts, cache, split) if isinstance(parts[0], Path) else parts
        splits[split] = datasets.concatenate_datasets([only_text(part, source) for part in parts])
    if is_document(path, splits['train']):
        document = splits['train'][0]['text']
        cut = int(0.9 * len(document))
        for split, part in ('train', document[:cut]), ('validation', document[cut:]):
            part = part[:max(1, int(len(part) * percentage / 100))]
            splits[split] = datasets.Dataset.from_dict({'text': [part]})
    return datasets.DatasetDict(splits), left_out


def story_files(path):
    """{name: path} of the files of stories at `path`, in order. Where there is parquet, that alone counts."""
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return {path.name: path}
    if not path.is_dir():
        raise UserError(f'no stories in {path}: --source takes sample, a name on the hub, or a path; {KINDS}')
    ours = 'meta.json', 'tokenizer.json'  # which may lie beside their stories
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob('*'))
             if file.suffix.lower() in SUFFIXES and file.is_file() and file.name not in ours
             and not any(part.startswith('.') for part in file.relative_to(path).parts)}
    if not files:
        raise UserError(f'the folder {path} holds no stories: {KINDS} (unpack archives first)')
    return {name: file for name, file in files.items() if file.suffix.lower() == '.parquet'} or files


def load_files(paths, cache, split):
    """Yields the Datasets of files: one of all .txt, and one of each other file."""
    import datasets
    import pyarrow
    texts = [path for path in paths if path.suffix.lower() == '.txt']
    arrow, schema = f'{cache}/{split}.arrow', pyarrow.schema({'text': pyarrow.string()})
    # not by the library's own loader, which takes \r for the end of a line
    with pyarrow.OSFile(arrow, 'wb') as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for stories in read_texts(texts):
            writer.write_batch(pyarrow.record_batch([stories], schema))
    yield datasets.Dataset.from_file(arrow)
    for path in sorted(path for path in set(paths) - set(texts) if path.stat().st_size):
        kind = 'parquet' if path.suffix.lower() == '.parquet' else 'json'
        with reading(path):
            yield datasets.load_dataset(kind, data_files=str(path), cache_dir=str(cache), split='train')


def read_texts(paths):
    """Yields lists of stories of .txt files: line breaks at a delimiter belong to it; without, all is one."""
    for path in paths:
        with reading(path), open(path, encoding='utf-8-sig', newline='') as file:
            rest, delimited = '', False
            while chunk := file.read(max(1 << 20, len(rest))):  # doubling: a long story is searched few times
                *stories, rest = (rest + chunk).split(DELIMITER)
                yield [story.strip('\r\n') for story in stories]
                delimited = delimited or bool(stories)
            if rest.strip('\r\n') or not delimited:
                yield [rest.strip('\r\n') if delimited else rest]


def is_document(path, stories):
    """Whether `path` is a .txt without delimiters: then no byte of it is not the story's, but for a BOM."""
    size = path.stat().st_size if path.suffix.lower() == '.txt' and path.is_file() else 0
    return len(stories) == 1 and 0 < size <= len(stories[0]['text'].encode()) + 3


def by_split(names):
    """({split: names}, names left out): names tell the split; test splits beside `train` are left out."""
    words = {name: set(re.split('[^a-z]+', name.lower())) for name in names}
    val = [name for name in names if 'val' in words[name] or 'valid' in name.lower()]
    train = [name for name in names if name not in val]
    if any('train' in words[name] for name in train):
        train = [name for name in train if 'test' not in words[name] or 'train' in words[name]]
    splits = {'train': train, 'validation': val} if train and val else {'train': train + val}
    return splits, [name for name in names if name not in train + val]


def only_text(dataset, name):
    """The column of stories alone. Raises UserError where there is none."""
    column = 'text' if 'text' in dataset.column_names else 'story'
    if column not in dataset.column_names:
        raise UserError(f"{name} has no column 'text' or 'story', only {', '.join(dataset.column_names)}")
    if getattr(dataset.features[column], 'dtype', '') not in ('string', 'large_string'):
        raise UserError(f'{name} has no text in its column {column!r} but {dataset.features[column]}')
    return dataset.select_columns(column).rename_columns({column: 'text'})


def unreachable(offline):
    """Why the hub does not answer, or ''. A thread asks, as looking up a name has no limit in time."""
    if offline or os.environ.get('HF_HUB_OFFLINE', '0').upper() in ('1', 'ON', 'YES', 'TRUE'):
        return 'we are offline'
    endpoint = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
    try:
        request = Request(endpoint, method='HEAD')
        ThreadPool(1).apply_async(urlopen, (request, None, HUB_PATIENCE)).get(HUB_PATIENCE)
    except Exception as error:
        if getattr(error, 'code', 500) >= 500:  # less is an answer, too; more a gateway's excuse
            why = getattr(error, 'reason', error)
            return f"{endpoint} cannot be reached ({why or f'no answer in {HUB_PATIENCE} seconds'})"
    return ''
