"""Load the stories of any source as a DatasetDict of the `datasets` library, and map functions over them.

A DatasetDict has a split `train` and maybe `validation`, or one `document`, and one column, `text`. Stories
lie in memory-mapped Arrow files (those of local sources in the folder `cache`), so memory does not grow with
their number. Only a single story, a document and the list in a .json file are read into memory.
"""

import gzip
import os
import re
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from configurator import UserError, script_path, user_errors
from data.splits import group_by_split
from data.tiny_stories import sample_stories
from data.workers import Workers, available_cores, call_in_worker

DELIMITER = '<|endoftext|>'  # between two stories of a .txt
LOADERS = {'.txt': 'ours', '.jsonl': 'json', '.json': 'json', '.csv': 'csv', '.parquet': 'parquet'}
WHAT_WE_READ = ('stories come as .txt, .jsonl, .json, .csv (each also as .gz), .parquet, a folder of these, '
                'or a folder written by save_to_disk')
# JSON files that hold something else: what prepare.py and the datasets library write
NOT_STORIES = 'meta.json', 'tokenizer.json', 'dataset_info.json', 'dataset_dict.json', 'state.json'

SAMPLE_STORIES = 22_000  # stories in the built-in corpus
HUB_NAME = r'((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?'  # user/name:configuration
HUB_TIMEOUT = 5  # seconds to wait for the hub's first answer; the library would retry for minutes


# sources ------------------------------------------------------------------------

def load_stories(source, cache, column='', seed=1337, offline=False):
    """Return (DatasetDict of the stories, one line that says which file is in which split).

    A .txt that is one document has the split `document` alone, with one row.

    source: 'sample' (the built-in corpus), a local path, or a name on the Hugging Face hub.
    column: the column that holds the stories; '' means text or story.
    seed: of the built-in corpus.
    Raises UserError if the source cannot be read or holds no stories.
    """
    path = Path(source)
    if source == 'sample':
        import_datasets(offline=True)
        named = {'sample': built_in_stories(seed)}
    elif is_hub_name(source):
        named = load_from_hub(source, offline)
    elif is_saved_dataset(path):
        import_datasets(offline=True)  # otherwise the library asks the hub about local files, too
        named = load_saved_dataset(path)
    else:
        import_datasets(offline=True)
        return load_story_files(path, cache, column)

    names, files_line = group_by_split(named)
    splits = {}
    for split in names:
        splits[split] = [only_text(named[name], source, column) for name in names[split]]
    return concatenate(splits), files_line


def import_datasets(offline):
    """Import the datasets library and keep it quiet: progress bars only if stderr is a terminal."""
    if offline:
        os.environ['HF_HUB_OFFLINE'] = '1'  # both are read when the library is imported
        os.environ['HF_DATASETS_OFFLINE'] = '1'
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not os.isatty(2):
        datasets.disable_progress_bars()


def built_in_stories(seed):
    """Return the built-in corpus, a Dataset."""
    import datasets

    return datasets.Dataset.from_dict({'text': list(sample_stories.stories(SAMPLE_STORIES, seed))})


def is_hub_name(source):
    """Return whether `source` is written like a name on the hub and is not a local file."""
    path = Path(source)
    return not path.exists() and not file_type(path) and re.fullmatch(HUB_NAME, source) is not None


def load_from_hub(source, offline):
    """Return {split: Dataset} of a dataset on the hub, or in the local cache if the hub cannot be reached."""
    name, configuration = re.fullmatch(HUB_NAME, source).groups()
    unreachable = why_hub_is_unreachable(offline)
    import_datasets(offline=bool(unreachable))
    import datasets
    from huggingface_hub import HfApi

    if unreachable:
        problem = (
            f'is not a file here and not in the cache (as user/name), and {unreachable}: type --source '
            f'sample (built in), or where there is internet hf download --repo-type dataset {name} --include '
            '"data/*" --local-dir stories, bring it over and type --source stories. The library says')
    else:
        problem = 'is not a file here, nor can it be loaded from the hub (as user/name:configuration?)'
    with user_errors(source, problem):
        if '/' not in name and not unreachable:
            name = HfApi().dataset_info(name).id  # the hub knows the user of an old short name
        return datasets.load_dataset(name, configuration)


def why_hub_is_unreachable(offline):
    """Return why the hub does not answer, '' if it does."""
    if offline or os.environ.get('HF_HUB_OFFLINE', '0').upper() in ('1', 'ON', 'YES', 'TRUE'):
        return 'we are offline'
    endpoint = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
    request = Request(endpoint, method='HEAD')
    try:
        # in a thread, because looking up a host name has no timeout
        ThreadPool(1).apply_async(urlopen, (request, None, HUB_TIMEOUT)).get(HUB_TIMEOUT)
    except HTTPError as error:
        if error.code >= 500:  # a gateway's error; anything less is an answer of the hub
            return f'{endpoint} cannot be reached ({error.reason or error})'
    except Exception as error:  # no connection, no such host, no answer in time
        reason = str(getattr(error, 'reason', error))
        if not reason:  # the thread's TimeoutError
            reason = f'no answer in {HUB_TIMEOUT} seconds'
        return f'{endpoint} cannot be reached ({reason})'
    return ''


def is_saved_dataset(path):
    """Return whether `path` is a folder that save_to_disk wrote."""
    return (path / 'dataset_dict.json').is_file() or bool(folders_with_arrow(path))


def folders_with_arrow(path):
    """Return the folders with .arrow files: `path` itself, or folders directly below it."""
    files = [*path.glob('*.arrow'), *path.glob('*/*.arrow')]
    return sorted({file.parent for file in files})


def load_saved_dataset(path):
    """Return {split: Dataset} of a folder that save_to_disk wrote, with or without its dataset_dict.json."""
    import datasets

    if (path / 'dataset_dict.json').is_file():
        with user_errors(path):
            return datasets.load_from_disk(path)
    folders = folders_with_arrow(path)
    others = {file.parent for file in path.rglob('*') if file_type(file)} - set(folders)
    if others:
        raise UserError(f'{path} has what save_to_disk writes, and files in {min(others)}: name one of them')
    with user_errors(path):
        return {folder.name: datasets.load_from_disk(folder) for folder in folders}


# story files --------------------------------------------------------------------

def load_story_files(path, cache, column):
    """Return (DatasetDict, line) of a file or a folder of files, as load_stories does."""
    files = find_story_files(path)
    names, files_line = group_by_split(files)
    splits = {}
    for split in names:
        parts = load_files([files[name] for name in names[split]], cache / f'{split}.arrow', column)
        splits[split] = [only_text(part, path, column) for part in parts]
    stories = concatenate(splits)
    if is_document(path, stories['train']):
        stories['document'] = stories.pop('train')
    return stories, files_line


def find_story_files(path):
    """Return {name: path} of the story files at `path`, sorted. If there are .parquet files, only those."""
    if path.is_file() and file_type(path):
        return {path.name: path}
    if not path.is_dir():
        raise UserError(f'no stories in {path}: --source takes sample, a name on the hub, or a path; '
                        + WHAT_WE_READ)
    files = {}
    for file in sorted(path.rglob('*')):
        name = file.relative_to(path).as_posix()
        is_hidden = '/.' in f'/{name}'
        if file_type(file) and not is_hidden and file.is_file():
            files[name] = file
    if not files and any(path.glob('*.bin')):
        script = script_path('data/token_files/prepare.py')
        raise UserError(f'{path} holds token files, not stories: type python {script} --source {path}')
    if not files:
        raise UserError(f'the folder {path} holds no stories: {WHAT_WE_READ} (unpack archives first)')
    parquet = {name: file for name, file in files.items() if file_type(file) == '.parquet'}
    return parquet or files


def file_type(path):
    """Return the ending that says what a story file is (of s.txt.gz: .txt), '' for all other files."""
    ending = path.suffix.lower()
    if ending == '.gz':
        ending = Path(path.stem).suffix.lower()
        if ending == '.parquet':
            return ''  # the library cannot read it
    if ending not in LOADERS or path.name in NOT_STORIES:
        return ''
    return ending


def load_files(paths, arrow_path, column):
    """Return a list of Datasets: one for all .txt files, written to `arrow_path`, and one for each other."""
    import datasets
    from pandas.errors import ParserWarning

    texts = [path for path in paths if file_type(path) == '.txt']
    tables = sorted(path for path in paths if path not in texts)
    write_arrow(texts, arrow_path, column or 'text')
    loaded = [datasets.Dataset.from_file(str(arrow_path))]
    for path in tables:
        if not path.stat().st_size:
            continue  # the library refuses empty files
        options = {}
        if file_type(path) == '.csv':  # 'NA' is a text, and an extra column is an error
            options = {'keep_default_na': False, 'index_col': False}
        with user_errors(path), warnings.catch_warnings(action='error', category=ParserWarning):
            loaded.append(datasets.load_dataset(
                LOADERS[file_type(path)], data_files=str(path), cache_dir=str(arrow_path.parent),
                split='train', **options))
    return loaded


def write_arrow(paths, arrow_path, column):
    """Write the stories of .txt files to an Arrow file.

    The library's own loader would take every \\r for the end of a line.
    """
    import pyarrow

    schema = pyarrow.schema({column: pyarrow.string()})
    with pyarrow.OSFile(str(arrow_path), 'wb') as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for path in paths:
            with user_errors(path), open_text(path) as text:
                for stories in read_stories(text):
                    writer.write_batch(pyarrow.record_batch([stories], schema))


def read_stories(file):
    """Yield lists of the stories in a .txt; the line breaks around a delimiter are not part of a story.

    Example: 'One.\\n<|endoftext|>\\nTwo.' has the stories 'One.' and 'Two.'.
    A file without a delimiter is one story, unchanged.
    """
    rest = ''  # the beginning of a story that is not complete yet
    is_delimited = False
    while True:
        # read twice as much if a story is long, so that it is searched for delimiters only a few times
        chunk = file.read(max(1 << 20, len(rest)))
        if not chunk:
            break
        *complete, rest = (rest + chunk).split(DELIMITER)
        yield [story.strip('\r\n') for story in complete]
        is_delimited = is_delimited or len(complete) > 0
    if not is_delimited:
        yield [rest]
    elif rest.strip('\r\n'):
        yield [rest.strip('\r\n')]


def open_text(path):
    """Open a .txt or .txt.gz: UTF-8 with or without a byte order mark, line breaks as they are."""
    opener = gzip.open if path.suffix.lower() == '.gz' else open
    return opener(path, 'rt', encoding='utf-8-sig', newline='')


def is_document(path, stories):
    """Return whether `path` is a .txt that is one document: one story and no delimiter."""
    if len(stories) != 1 or file_type(path) != '.txt' or not path.is_file():
        return False
    with open_text(path) as file:
        return DELIMITER not in file.read()


# columns ------------------------------------------------------------------------

def only_text(dataset, name, column):
    """Return the Dataset with only its column of stories, named `text`. Raises UserError if it has none."""
    wanted = [column] if column else ['text', 'story']
    found = [column for column in wanted if column in dataset.column_names]
    if not found:
        others = ', '.join(dataset.column_names)[:200]
        raise UserError(f"{name} has no column {' or '.join(wanted)}: type --text_column and one of {others}")
    feature = dataset.features[found[0]]
    if getattr(feature, 'dtype', '') not in ('string', 'large_string'):
        raise UserError(f'{name} has no text in its column {found[0]!r} but {feature}')
    return dataset.select_columns(found[0]).rename_columns({found[0]: 'text'})


def concatenate(splits):
    """Return a DatasetDict of {split: list of Datasets}."""
    import datasets

    types = set()
    for parts in splits.values():
        types |= {part.features['text'].dtype for part in parts}
    concatenated = {}
    for split, parts in splits.items():
        if len(types) > 1:  # CSV files come as large_string, other files as string
            with Workers():
                parts = [part.cast_column('text', datasets.Value('large_string')) for part in parts]
        concatenated[split] = datasets.concatenate_datasets(parts)
    return datasets.DatasetDict(concatenated)


# map ----------------------------------------------------------------------------

SMALL = 1 << 24  # bytes of stories for which starting processes would take longer than the work


def map_stories(stories, function, description, columns, cache, num_proc=0, **arguments):
    """Return stories.map(function): a Dataset with `columns` ({name: type}), an Arrow file in `cache`.

    function(batch, **arguments) gets {'text': list of str, ...} and returns {column: list}.
    description: what the progress bar shows.
    num_proc: number of worker processes; 0: one per CPU core, 1: none.
    Raises UserError if a worker process is killed.
    """
    import datasets

    processes = num_proc or available_cores()
    if processes == 1 or stories.data.nbytes < SMALL:
        processes = None
    with Workers():
        return stories.map(
            call_in_worker,
            fn_kwargs={'function': function} | arguments,
            batched=True,
            num_proc=processes,
            desc=description,
            remove_columns=stories.column_names,
            features=datasets.Features({name: datasets.Value(kind) for name, kind in columns.items()}),
            cache_file_name=str(cache / f'{description}.arrow'),
        )
