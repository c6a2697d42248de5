"""Load the stories of any source as a DatasetDict of the `datasets` library, and map functions over them.

A DatasetDict has a split `train` and maybe `validation`, or one `document`, and one column, `text`. Stories
lie in memory-mapped Arrow files in the folder `cache`, so memory does not grow with their number. Only a
single story and a document are read into memory.
"""

import contextlib
import json
import os
import re
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from configurator import UserError, one_line, user_errors
from data.files import plain_name, refuse_stand_in
from data.splits import group_by_split, list_names
from data.story_files import (
    check_format,
    describe_unseparated,
    file_type,
    files_below,
    find_story_files,
    list_folder,
    prefer_parquet,
    read_document,
    read_stories,
)
from data.story_tables import ROWS, arrow_stories, choose_text_column
from data.tiny_stories import sample_stories
from data.workers import Workers, available_cores, call_in_worker

SAMPLE_STORIES = 22_000  # stories in the built-in corpus
HUB_NAME = r'((?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?'  # user/name:configuration
HUB_TIMEOUT = 5  # seconds to wait for the hub's first answer; the library would retry for minutes


# sources ------------------------------------------------------------------------

def load_stories(source, cache, how, seed=1337, offline=False):
    """Return (DatasetDict of the stories, lines that say what was read: first, which file is in which split).

    A .txt that is one document has the split `document` alone, with one row.

    source: 'sample' (the built-in corpus), a local path, or a name on the Hugging Face hub.
    cache: the folder for the Arrow files.
    how: a Format, what the settings say about story files.
    seed: of the built-in corpus.
    Raises UserError if the source cannot be read.
    """
    path = Path(source)
    if source == 'sample':
        check_format(how, [], source)
        import_datasets(offline=True)
        named = {'sample': sample_stories.stories(SAMPLE_STORIES, seed)}
    elif is_hub_name(source):
        check_format(how, ['.arrow'], source)
        named = load_from_hub(source, offline, how.column)
    elif is_saved_dataset(path):
        check_format(how, ['.arrow'], source)
        import_datasets(offline=True)  # otherwise the library asks the hub about local files, too
        named = load_saved_dataset(path, how.column)
    else:
        import_datasets(offline=True)
        return load_story_files(path, cache, how)

    names, files_line = group_by_split(named)
    splits = {}
    for split in names:
        parts = [(source, named[name]) for name in names[split]]
        splits[split], _ = write_stories(parts, split, cache)
    return dataset_dict(splits), [one_line(files_line)]


def import_datasets(offline):
    """Import the datasets library and keep it quiet: progress bars only if stderr is a terminal."""
    if offline:
        os.environ['HF_HUB_OFFLINE'] = '1'  # both are read when the library is imported
        os.environ['HF_DATASETS_OFFLINE'] = '1'
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not os.isatty(2):
        datasets.disable_progress_bars()


def is_hub_name(source):
    """Return whether `source` is written like a name on the hub and is not a local file."""
    path = Path(source)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        path.stat()  # an OSError if it cannot be read, which path.exists() hides in some versions of Python
        return False
    return not file_type(path) and re.fullmatch(HUB_NAME, source) is not None


def load_from_hub(source, offline, column):
    """Return {split: iterator of its stories} of a dataset on the hub, or of the library's cache."""
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
        splits = datasets.load_dataset(name, configuration)
    named = {}
    for split, dataset in splits.items():
        chosen = choose_text_column(dataset.data.schema, column, source)
        batches = dataset.select_columns(chosen).with_format('arrow').iter(ROWS)
        named[split] = arrow_stories(batches, chosen, source)
    return named


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
    """Return whether `path` is a folder that save_to_disk wrote. Raises UserError if it cannot be read."""
    if not path.is_dir():
        return False
    names = [file.name for file in list_folder(path)]
    return 'dataset_dict.json' in names or bool(folders_with_arrow(path))


def folders_with_arrow(path):
    """Return the folders with .arrow files: `path` itself, or folders directly below it."""
    files = [*path.glob('*.arrow'), *path.glob('*/*.arrow')]
    return sorted({file.parent for file in files})


def load_saved_dataset(path, column):
    """Return {split: iterator of its stories} of a folder that save_to_disk wrote.

    A folder of several splits may lack its dataset_dict.json.
    """
    if (path / 'dataset_dict.json').is_file():
        with user_errors(path / 'dataset_dict.json'):
            names = json.loads((path / 'dataset_dict.json').read_bytes())['splits']
            folders = [path / plain_name(name) for name in names]
    else:
        folders = folders_with_arrow(path)
        others = {file.parent for file in files_below(path) if file_type(file)} - set(folders)
        if others:
            raise UserError(f'{path} has what save_to_disk writes, and files in {min(others)}: '
                            'name one of them')
    named = {}
    for folder in folders:
        named[folder.name] = saved_stories(folder, column)
    return named


def saved_stories(folder, column):
    """Yield the stories of one split that save_to_disk wrote.

    Not with load_from_disk, which takes a path with :: for a chain of addresses.
    """
    import pyarrow

    if not (folder / 'state.json').is_file():
        raise UserError(f'{folder} has .arrow files and no state.json, which save_to_disk writes: '
                        'save it again with the datasets library')
    with user_errors(folder / 'state.json'):
        files = json.loads((folder / 'state.json').read_bytes())['_data_files']
        names = [plain_name(file['filename']) for file in files]
    for name in names:
        refuse_stand_in(folder / name)
        with open(folder / name, 'rb') as file, pyarrow.ipc.open_stream(file) as batches:
            chosen = choose_text_column(batches.schema, column, folder)
            yield from arrow_stories(batches, chosen, folder / name)


# story files --------------------------------------------------------------------

def load_story_files(path, cache, how):
    """Return (DatasetDict, lines) of a file or a folder of files, as load_stories does."""
    files, left_out = prefer_parquet(find_story_files(path))
    check_format(how, {file_type(file) for file in files.values()}, path)
    names, files_line = group_by_split(files)
    splits = {}
    n_stories = {}  # of each file
    for split in names:
        paths = in_reading_order([files[name] for name in names[split]])
        parts = [(file, read_stories(file, how)) for file in paths]
        splits[split], counts = write_stories(parts, split, cache)
        n_stories.update(zip(paths, counts, strict=True))
    stories = dataset_dict(splits)
    lines = [files_line, describe_empty(n_stories), describe_unseparated(n_stories, how)]
    if left_out:
        lines.append(f'left out, as there are .parquet files: {list_names(left_out)}')
    if len(splits) == 1 and sum(n_stories.values()) == 1:
        document = only_document(n_stories, how)
        if document is not None:
            whole, _ = write_stories([(path, [document])], 'document', cache, strip='')
            stories = dataset_dict({'document': whole})
            lines = lines[1:]
    return stories, [one_line(line) for line in lines if line]


def in_reading_order(paths):
    """Return the paths of story files in the order in which they are read: .txt first, the others sorted."""
    texts = [path for path in paths if file_type(path) == '.txt']
    return texts + sorted(path for path in paths if file_type(path) != '.txt')


def describe_empty(n_stories):
    """Return a line about the files without stories, '' if there are none. n_stories: {path: number}."""
    empty = [path.name for path, n in n_stories.items() if n == 0]
    if not empty:
        return ''
    names = ', '.join(empty[:5])
    if len(empty) > 5:
        names += ', ...'
    return f'{len(empty):,} of {len(n_stories):,} files hold no stories: {names}'


def only_document(n_stories, how):
    """Return the text of the only file that is not empty, or None if it is not a .txt without separators."""
    for path, n in n_stories.items():
        if n == 1 and file_type(path) == '.txt':
            return read_document(path, how)
    return None


# writing ------------------------------------------------------------------------

BATCH = 1 << 20  # characters in a batch of an Arrow file


def write_stories(parts, split, cache, strip='\r\n'):
    """Write stories to an Arrow file. Return it as a Dataset, and the number of stories in each part.

    parts: a list of (path or name, for messages; an iterator of stories: str, or None for a blank one).
    strip: characters to leave out at the ends of a story. Line breaks between stories are not part of them.
    """
    import datasets
    import pyarrow
    from tqdm import tqdm

    path = cache / f'{split}.arrow'
    schema = pyarrow.schema({'text': pyarrow.large_string()})
    counts = []
    with (open(path, 'wb') as file, pyarrow.ipc.new_stream(file, schema) as writer,
          tqdm(desc=f'read {split}', unit=' stories', disable=not os.isatty(2)) as bar):
        for what, stories in parts:
            counts.append(0)
            with user_errors(what):
                for batch in in_batches(stories, strip):
                    writer.write_batch(pyarrow.record_batch([batch], schema))
                    counts[-1] += len(batch)
                    bar.update(len(batch))
    return datasets.Dataset.from_file(str(path)), counts


def in_batches(stories, strip):
    """Yield lists of stories of about BATCH characters each, without the characters `strip` at their ends."""
    batch = []
    size = 0
    for story in stories:
        if story is not None:
            story = story.strip(strip) if strip else story
            size += len(story)
        batch.append(story)
        if size >= BATCH or len(batch) == 10_000:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def dataset_dict(splits):
    """Return a DatasetDict of {split: Dataset}."""
    import datasets

    return datasets.DatasetDict(splits)


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
