"""prepare.py: every kind of source, which stories go where, what a mistake says, what a killed run leaves."""

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configurator import SettingError, UserError
from data import blocks, sources
from data.shards import read_meta
from data.tiny_stories import prepare
from data.tokenizer import load_tokenizer

SCRIPT = Path(prepare.__file__)
DELIMITER = '<|endoftext|>'
# What must come back exactly: white space at the ends, odd line breaks, characters of one to four bytes
STORIES = [f'Once there was a cat with {i} hats.\n\n"Hello!" said Tom {i % 7}.' for i in range(300)] + [
    ' a space before and after ', 'a tab\tand\u2028odd\x85breaks', 'caf\u00e9 \U0001f600 \u2581\u4f60', 'x',
]


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """prepared(source, out_dir, **settings) runs prepare.main() and gives what `read` finds."""
    defaults = {name: getattr(prepare, name) for name in (
        'encoding_type', 'vocab_size', 'tokenizer', 'data_percentage', 'val_percentage', 'num_proc')}

    def run(source, out_dir=tmp_path / 'out', **settings):
        settings = {**defaults, 'offline': True, 'source': str(source), 'out_dir': str(out_dir), **settings}
        for name, value in settings.items():
            monkeypatch.setattr(prepare, name, value)
        prepare.main()
        return read(out_dir)
    return run


def read(folder):
    """{split: [texts]} of a prepared folder, by a reader that knows only "uint16"."""
    meta, tokenizer = read_meta(folder), load_tokenizer(folder)
    found = {}
    for split, about in meta['splits'].items():
        files = sorted(Path(folder).glob(f'{split}_*.bin'))
        assert [path.name for path in files] == [shard['name'] for shard in about['shards']]
        tokens = np.concatenate([np.fromfile(path, '<u2') for path in files])
        assert len(tokens) == about['tokens'] and tokens[0] == meta['delimiter']
        parts = np.split(tokens, np.flatnonzero(tokens == meta['delimiter']))[1:]
        found[split] = [tokenizer.decode(part[1:].tolist()) for part in parts]
        assert len(found[split]) == about['stories']
        assert sum(len(text.encode()) for text in found[split]) == about['bytes']
    return found


def write_text(path, stories=STORIES):
    path.write_bytes(''.join(f'{story}\n{DELIMITER}\n' for story in stories).encode())
    return path


def write_jsonl(path, stories=STORIES, name='text'):
    path.write_text(''.join(json.dumps({'n': 1, name: story}) + '\n' for story in stories))
    return path


def write_parquet(path, stories=STORIES, name='text'):
    import pyarrow
    import pyarrow.parquet
    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pyarrow.table({'n': [1] * len(stories), name: stories}), path)
    return path


def write_all_data(folder):
    folder.mkdir()
    for i in range(3):
        records = [{'story': story, 'instruction': {'prompt': 'p', 'words': []}} for story in STORIES[i::3]]
        (folder / f'data{i:02d}.json').write_text(json.dumps(records, indent=i or None))
    return folder


def write_saved(folder, split):
    import datasets
    made = datasets.Dataset.from_dict({'text': STORIES})
    if split:
        made = datasets.DatasetDict(train=datasets.Dataset.from_dict({'text': STORIES[:-20]}),
                                    validation=datasets.Dataset.from_dict({'text': STORIES[-20:]}))
    made.save_to_disk(folder)
    return folder


def write_folder(folder, write, suffix, train='train-0', val='nested/valid-1'):
    """A folder with a validation file: the last 20 stories."""
    for name, stories in (train, STORIES[:-20]), (val, STORIES[-20:]):
        path = folder / (name + suffix)
        path.parent.mkdir(exist_ok=True, parents=True)
        write(path, stories)
    return folder


@pytest.mark.parametrize('make', [
    lambda tmp: write_text(tmp / 's.txt'),
    lambda tmp: write_jsonl(tmp / 's.jsonl'),
    lambda tmp: write_jsonl(tmp / 's.jsonl', name='story'),
    lambda tmp: write_jsonl(tmp / 's.json'),
    lambda tmp: write_parquet(tmp / 's.parquet'),
    lambda tmp: write_parquet(tmp / 's.parquet', name='story'),
    lambda tmp: write_saved(tmp / 's', split=False),
    lambda tmp: write_all_data(tmp / 's'),
], ids=['txt', 'jsonl', 'story', 'json-lines', 'parquet', 'parquet-story', 'saved', 'all_data'])
def test_source_without_validation(tmp_path, prepared, make):
    """Each kind of source gives back every story, exactly, and the same split whatever the kind and order."""
    found = prepared(make(tmp_path))
    assert sorted(found['train'] + found['val']) == sorted(STORIES)
    other = write_text(tmp_path / 't.txt', STORIES[::-1])
    assert set(found['val']) == set(prepared(other)['val'])


@pytest.mark.parametrize('make', [
    lambda folder: write_folder(folder, write_text, '.txt'),
    lambda folder: write_folder(folder, write_text, '.txt', 'V2-GPT4-train', 'V2-GPT4-valid'),
    lambda folder: write_folder(folder, write_jsonl, '.jsonl', val='val'),
    lambda folder: write_folder(folder, write_parquet, '.parquet', 'data/train-0', 'data/validation-0'),
    lambda folder: write_saved(folder, split=True),
], ids=['txt', 'tinystories', 'jsonl', 'parquet', 'saved'])
def test_source_with_validation(tmp_path, prepared, make):
    found = prepared(make(tmp_path / 's'))
    assert found == {'train': STORIES[:-20], 'val': STORIES[-20:]}


def test_folder_takes_parquet_alone_and_no_test_split_nor_hidden_file(tmp_path, prepared, capsys):
    folder = write_folder(tmp_path / 's', write_parquet, '.parquet')
    write_parquet(folder / 'test-0.parquet', ['a test'])
    write_parquet(folder / '.cache/train-1.parquet', ['hidden'])
    write_text(folder / 'train.txt', ['text'])
    found = prepared(folder)
    assert found == {'train': STORIES[:-20], 'val': STORIES[-20:]}
    assert 'test-0.parquet' in capsys.readouterr().out


def test_folder_may_hold_its_own_prepared_data(tmp_path, prepared):
    write_jsonl(tmp_path / 'mine.json')
    first = prepared(tmp_path, tmp_path)
    assert prepared(tmp_path, tmp_path) == first


def test_sample(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(prepare, '_SAMPLE_STORIES', 500)
    found = prepared('sample', tmp_path)
    assert len(found['train']) + len(found['val']) == 500 and not set(found['train']) & set(found['val'])


@pytest.mark.parametrize('encoding', ['char', 'bpe'])
def test_long_stories_come_in_pieces(tmp_path, prepared, monkeypatch, encoding):
    """Stories longer than a block, one of them with no space to cut at, beside short ones."""
    monkeypatch.setattr(blocks, 'BLOCK', 512)
    long = ['the cat sat on the mat ' * 400, '\U0001f600\u4f60' * 700, 'b' * 3000]
    texts = [*STORIES[:30], *long, *STORIES[30:]]
    settings = {'encoding_type': encoding} | ({'vocab_size': 400} if encoding == 'bpe' else {})
    for path in write_text(tmp_path / 's.txt', texts), write_jsonl(tmp_path / 's.jsonl', texts):
        found = prepared(path, **settings)
        assert sorted(found['train'] + found['val']) == sorted(texts)
    folder = tmp_path / 'documents'
    folder.mkdir()
    for i, text in enumerate(texts[-40:] + texts[29:33]):
        (folder / f'{i}.txt').write_text(text + '\n', encoding='utf-8')
    found = prepared(folder, **settings)
    assert sorted(found['train'] + found['val']) == sorted(text + '\n' for text in texts[-40:] + texts[29:33])


@pytest.mark.parametrize('block', [64, 1 << 16])
def test_single_document_is_split_by_position(tmp_path, prepared, monkeypatch, block):
    monkeypatch.setattr(blocks, 'BLOCK', block)
    text = '\n' + ' \u00e9\u4f60\U0001f600 word'.join(map(str, range(400))) + '\n'
    path = tmp_path / 's.txt'
    path.write_bytes(b'\xef\xbb\xbf' + text.encode())  # a byte order mark is no text
    cut = int(0.9 * len(text))
    assert prepared(path) == {'train': [text[:cut]], 'val': [text[cut:]]}
    found = prepared(path, data_percentage=10.0)
    assert found == {'train': [text[:cut // 10]], 'val': [text[cut:][:(len(text) - cut) // 10]]}


def test_newlines_around_the_delimiter_are_dropped_and_no_more(tmp_path, prepared):
    path = tmp_path / 's.txt'
    text = '\n one \r\n|\r\n\ttwo\n\n \n\n|three|\n \n|\n\n'
    path.write_bytes(text.replace('|', DELIMITER).encode())
    found = prepared(path, val_percentage=50.0)
    assert sorted(found['train'] + found['val']) == ['\ttwo\n\n ', ' one ', 'three']


def test_blank_stories_are_counted(tmp_path, prepared, capsys):
    prepared(write_jsonl(tmp_path / 's.jsonl', [*STORIES, '', ' \u2003\n', None]))
    assert ' 3 blank' in capsys.readouterr().out


def test_equal_stories_are_on_one_side_and_both_sides_have_some(tmp_path, prepared):
    for stories in ['a', 'b'], ['a'] * 50 + ['b'] * 50, [str(i % 40) for i in range(200)]:
        path = write_text(tmp_path / 's.txt', stories)
        for percentage in 0.001, 30.0, 99.999:
            found = prepared(path, val_percentage=percentage)
            assert found['train'] and found['val'] and not set(found['train']) & set(found['val'])
            assert sorted(found['train'] + found['val']) == sorted(stories)


def test_smaller_shares_are_part_of_larger_ones(tmp_path, prepared):
    path, before = write_text(tmp_path / 's.txt'), {'train': set(), 'val': set()}
    for percentage in 0.0001, 10.0, 50.0, 100.0:
        found = prepared(path, data_percentage=percentage, val_percentage=20.0)
        for split, texts in found.items():
            assert texts and before[split] <= set(texts)
            before[split] = set(texts)
        if percentage == 50:
            assert 100 < len(found['train']) < 150 and 15 < len(found['val']) < 45


def test_characters_come_from_the_stories_used(tmp_path, prepared):
    folder = tmp_path / 's'
    folder.mkdir()
    write_text(folder / 'train.txt', ['abc', 'cab'])
    write_text(folder / 'valid.txt', ['xyz'])
    assert prepared(folder) == {'train': ['abc', 'cab'], 'val': ['xyz']}
    assert json.loads((tmp_path / 'out/tokenizer.json').read_text()) == [' ', 'a', 'b', 'c']


def test_bpe_learns_from_training_stories_alone(tmp_path, prepared, monkeypatch):
    learned, train = [], prepare.BPETokenizer.train

    def noted(texts, vocab_size):
        learned.extend(texts)
        return train(learned, vocab_size)

    monkeypatch.setattr(prepare.BPETokenizer, 'train', noted)
    found = prepared(write_text(tmp_path / 's.txt'), encoding_type='bpe', vocab_size=500, val_percentage=30.0)
    assert found['val'] and learned == found['train']


def test_given_tokenizer(tmp_path, prepared):
    first, second = tmp_path / 'first', tmp_path / 'second'
    prepared(write_text(tmp_path / 's.txt'), first, encoding_type='bpe', vocab_size=500)
    other = write_text(tmp_path / 'o.txt', ['Something else.', 'Quite \u00f8ther.'])
    found = prepared(other, second, tokenizer=str(first))
    assert sorted(found['train'] + found['val']) == ['Quite \u00f8ther.', 'Something else.']
    assert read_meta(second)['encoding'] == 'bpe'
    assert (first / 'tokenizer.model').read_bytes() == (second / 'tokenizer.model').read_bytes()


def test_workers_change_nothing(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(prepare, '_POOL_BYTES', 0)
    monkeypatch.setattr(blocks, 'BLOCK', 512)
    path, made = write_text(tmp_path / 's.txt', STORIES * 5), []
    for processes in 1, 2:
        out = tmp_path / str(processes)
        prepared(path, out, encoding_type='bpe', vocab_size=500, num_proc=processes)
        made.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert made[0] == made[1]
    with open(path, 'ab') as file:
        file.write(b'\xff')
    with pytest.raises(UserError, match='not UTF-8'):
        prepared(path, num_proc=2)


def damaged(tmp, name, content):
    path = tmp / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize('make, expected', [
    (lambda tmp: tmp / 'none.txt', 'no such file'),
    (lambda tmp: damaged(tmp, 's.txt', b''), 'no stories'),
    (lambda tmp: damaged(tmp, 's.txt', b' \n\n'), 'no stories'),
    (lambda tmp: damaged(tmp, 's.txt', b' ' * 200_000), 'no stories'),
    (lambda tmp: damaged(tmp, 's.txt', f'\n{DELIMITER}\n \n{DELIMITER}\n'.encode()), 'no stories, and'),
    (lambda tmp: damaged(tmp, 's.txt', f'one\n{DELIMITER}\n'.encode()), 'only one story'),
    (lambda tmp: damaged(tmp, 's.txt', f'one\n{DELIMITER}\none\n{DELIMITER}\n'.encode()), 'only one story'),
    (lambda tmp: damaged(tmp, 's.txt', b'a'), 'one character'),
    (lambda tmp: damaged(tmp, 's.txt', b'two\nlines\nbad \xff here'), r's\.txt:3: byte 14 is not UTF-8'),
    (lambda tmp: damaged(tmp, 's.jsonl', b'{"text": "a"}\n{"text": "\xff"}\n'), 'jsonl:2: byte 24 is not'),
    (lambda tmp: damaged(tmp, 's.json', b'[{"text": "a"},\n{"text": "\xff"}]'), 'json:2: byte 26 is not'),
    (lambda tmp: damaged(tmp, 's.jsonl', b'{"text": "a"}\n\n{"text": "b\n'), r's\.jsonl:3: broken JSON'),
    (lambda tmp: damaged(tmp, 's.jsonl', b'["a"]\n'), r's\.jsonl:1: a record must be an object'),
    (lambda tmp: damaged(tmp, 's.jsonl', b'{"a": 1, "b": 2}\n'), r"s\.jsonl:1: no field .* only 'a', 'b'"),
    (lambda tmp: damaged(tmp, 's.jsonl', b'{"text": 5}\n'), r"s\.jsonl:1: 'text' holds no text but int"),
    (lambda tmp: damaged(tmp, 's.jsonl', b'{"text": "a"}\n{"text": "\\ud83d"}\n'), 'jsonl:2: .* surrogate'),
    (lambda tmp: damaged(tmp, 's.jsonl', b'[' * 100_000), r's\.jsonl:1: nested too deeply'),
    (lambda tmp: damaged(tmp, 's.json', b'[{"text": "a"},\n{"text": "b"}'), 'no end'),
    (lambda tmp: damaged(tmp, 's.json', b'[{"text": "a"},\n{"text": "b'), r's\.json:2: broken JSON'),
    (lambda tmp: damaged(tmp, 's.json', b'[{"text": "a"},\n{"story": 1}]'), "json:2: 'story' holds no text"),
    (lambda tmp: damaged(tmp, 's.parquet', b'PAR1 no'), r's\.parquet cannot be read'),
    (lambda tmp: write_parquet(tmp / 's.parquet', ['a'], 'title'), "no column 'text' .* only n, title"),
    (lambda tmp: damaged(tmp, 's.csv', b'text\na\n'), 'not a file of stories'),
    (lambda tmp: damaged(tmp, 's.txt.gz', gzip.compress(b'a')), 'not a file of stories'),
    (lambda tmp: damaged(tmp, 's/a.csv', b'a').parent, 'holds no stories'),
    (lambda tmp: damaged(tmp, 's/state.json', b'{').parent, 'damaged'),
    (lambda tmp: write_folder(tmp / 's', lambda path, _: path.write_text(''), '.txt'), 'no stories'),
])
def test_mistakes_in_sources(tmp_path, prepared, make, expected):
    with pytest.raises(UserError, match=expected):
        prepared(make(tmp_path))
    assert not list((tmp_path / 'out').glob('*'))


@pytest.mark.parametrize('settings', [
    {'encoding_type': 'word'}, {'encoding_type': 'char', 'vocab_size': 8000},
    {'encoding_type': 'bpe', 'vocab_size': 65_537},
    {'encoding_type': 'bpe', 'vocab_size': -1}, {'data_percentage': 0.0}, {'data_percentage': 101.0},
    {'val_percentage': 0.0}, {'val_percentage': 100.0}, {'num_proc': -1},
])
def test_mistakes_in_settings(prepared, settings):
    with pytest.raises(SettingError, match=next(reversed(settings))):
        prepared('sample', **settings)


def test_new_files_replace_old_ones_only_when_complete(tmp_path, prepared, monkeypatch):
    good, out = write_text(tmp_path / 's.txt'), tmp_path / 'out'
    prepared(good, out, encoding_type='bpe', vocab_size=500)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(*_):
        raise OSError(28, 'No space left on device')
    with monkeypatch.context() as context:
        context.setattr(prepare.ShardWriter, 'close', full_disk)
        with pytest.raises(OSError, match='No space'):
            prepared(good, out, encoding_type='char')
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    (out / '.preparing-killed').mkdir()
    (out / 'train_00001.bin').write_bytes(b'of a larger run')
    (out / 'notes.txt').write_text('mine')
    prepared(good, out, encoding_type='char')
    assert {path.name for path in out.iterdir()} == {
        'meta.json', 'train_00000.bin', 'val_00000.bin', 'tokenizer.json', 'notes.txt'}


def test_unwritable_folder(tmp_path, prepared):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot write to .*--out_dir'):
        prepared(write_text(tmp_path / 's.txt'), tmp_path / 'file')


def start(*flags, **environment):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, flags)], cwd='/', env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    )


def test_as_a_user(tmp_path):
    run = start('--source', write_text(tmp_path / 's.txt'), '--out_dir', tmp_path / 'out')
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (0, '')
    assert 'stories:' in out and 'MB/s' in out
    assert out.splitlines()[-1] == f'next: python train.py --dataset {tmp_path / "out"}'
    found = read(tmp_path / 'out')
    assert sorted(found['train'] + found['val']) == sorted(STORIES)


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_killed_run_leaves_the_old_data_and_no_worker(tmp_path, prepared, number, status):
    out = tmp_path / 'out'
    old = prepared(write_text(tmp_path / 's.txt'))
    big = write_text(tmp_path / 'big.txt', STORIES * 2000)
    run = start('--source', big, '--out_dir', out, '--encoding_type', 'bpe', '--vocab_size', 400,
                '--num_proc', 2)
    deadline = time.monotonic() + 30
    while not list(out.glob('.preparing-*')) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)  # into the passes
    os.killpg(run.pid, number) if number == signal.SIGINT else run.send_signal(number)
    _, err = run.communicate(timeout=30)  # returns when all workers are gone too, as they share its stderr
    assert run.returncode == status, err
    assert not err or number == signal.SIGKILL  # Python's own clean-up may speak then
    assert read(out) == old


# The hub


NO_SOCKET = '''
import os, runpy, sys
sys.addaudithook(lambda event, _: os._exit(99) if event in ('socket.__new__', 'socket.getaddrinfo') else None)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''


def run_offline(cache, *flags):
    """Exit status, stdout and stderr of prepare.py --offline; the status is 99 if it opens a socket."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('HF_')}
    run = subprocess.run(
        [sys.executable, '-c', NO_SOCKET, SCRIPT, '--offline', *map(str, flags)],
        env={**environment, 'HF_HOME': cache}, capture_output=True, text=True, timeout=60,
    )
    return run.returncode, run.stdout, run.stderr


def test_offline_opens_no_socket(tmp_path):
    out = tmp_path / 'out'
    status, _, err = run_offline(tmp_path / 'cache', '--source', 'someone/stories', '--out_dir', out)
    assert status == 1 and len(err.splitlines()) == 1 and 'we are offline: type --source sample' in err
    path = write_text(tmp_path / 's.txt')
    status, _, err = run_offline(tmp_path / 'cache', '--source', path, '--out_dir', out)
    assert (status, err) == (0, '')


def test_offline_takes_a_dataset_from_the_cache(tmp_path):
    import datasets
    write_folder(tmp_path / 's', write_parquet, '.parquet', 'train', 'validation')
    files = {'train': str(tmp_path / 's/train.parquet'), 'validation': str(tmp_path / 's/validation.parquet')}
    cache = tmp_path / 'cache/datasets'
    datasets.load_dataset('parquet', data_files=files, cache_dir=str(cache))
    for path in cache.rglob('parquet-*.arrow'):  # named as if it had come from the hub
        path.rename(path.with_name(path.name.replace('parquet', 'stories')))
    config, = (cache / 'parquet').iterdir()
    config.rename(config.with_name('default'))
    (cache / 'parquet').rename(cache / 'someone___stories')
    out = tmp_path / 'out'
    assert run_offline(tmp_path / 'cache', '--source', 'someone/stories', '--out_dir', out)[::2] == (0, '')
    assert read(out) == {'train': STORIES[:-20], 'val': STORIES[-20:]}


def test_unreachable_hub_is_told_within_seconds(tmp_path):
    """A server that accepts and never answers is the slowest way of not being reached."""
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        server.listen()
        endpoint = f'http://127.0.0.1:{server.getsockname()[1]}'
        began = time.monotonic()
        run = start('--out_dir', tmp_path / 'out', HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path), no_proxy='*',
                    HF_HUB_OFFLINE='0', HF_DATASETS_OFFLINE='0')
        _, err = run.communicate(timeout=60)
    assert time.monotonic() - began < sources.HUB_PATIENCE + 10
    assert run.returncode == 1 and len(err.splitlines()) == 1
    download = 'hf download --repo-type dataset roneneldan/TinyStories'
    for way in f'{endpoint} cannot be reached', '--source sample', download:
        assert way in err
    assert not (tmp_path / 'out').exists()
