"""prepare.py: every kind of source, which stories go where, what a killed run leaves, and the hub."""

import csv
import gzip
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest

from configurator import SettingError, UserError, settings
from data import infill, stories
from data.files import lock_folder
from data.shards import read_meta
from data.tiny_stories import prepare
from data.tiny_stories.sample_stories import stories as built_in_stories
from data.tokenizer import CharTokenizer, load_tokenizer
from tests.helpers.hub import Hub
from tests.helpers.permissions import locked, needs_permissions
from tests.helpers.scripts import ROOT, script
from tests.helpers.windows import windows_files

PREPARE = 'data/tiny_stories/prepare.py'
DELIMITER = '<|endoftext|>'
# What must come back exactly: white space at the ends, odd line breaks, characters of one to four bytes
STORIES = [f'Once there was a cat with {i} hats.\n\n"Hello!" said Tom {i % 7}.' for i in range(300)] + [
    ' a space before and after ', 'a tab\tand\u2028odd\x85breaks\r\rhere', 'x',
    'caf\u00e9 \U0001f600 \u2581\u4f60', 'NUL \0 and   runs    of     spaces',
]
TRAIN, VAL = STORIES[:-20], STORIES[-20:]
BIG = [f'{i} ' + 'The cat sat. ' * 800 for i in range(2000)]  # enough for worker processes

linux_only = pytest.mark.skipif(sys.platform != 'linux', reason='needs fork and prctl')


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Return prepared(source, out_dir, **settings): it runs prepare.main() and returns what `read` finds."""
    defaults = settings(vars(prepare))

    def run(source, out_dir=tmp_path / 'out', **given):
        always = {'offline': True, 'source': str(source), 'out_dir': str(out_dir)}
        for name, value in (defaults | always | given).items():
            monkeypatch.setattr(prepare, name, value)
        prepare.main()
        return read(out_dir)
    return run


def read(folder):
    """Return {split: [texts]} of a prepared folder, by a reader that knows only "uint16"."""
    meta, enc = read_meta(folder), load_tokenizer(folder)
    found = {}
    for split, about in meta['splits'].items():
        files = sorted(folder.glob(f'{split}_*.bin'))
        assert [path.name for path in files] == [shard['name'] for shard in about['shards']]
        tokens = np.concatenate([np.fromfile(path, '<u2') for path in files])
        assert tokens[0] == meta['delimiter']
        parts = np.split(tokens, np.flatnonzero(tokens == meta['delimiter']))[1:]
        found[split] = [infill.decode(enc, part[1:].tolist()) for part in parts]
        assert (len(found[split]), len(tokens)) == (about['stories'], about['tokens'])
        assert sum(len(text.encode()) for text in found[split]) == about['bytes']
        assert sum(enc.middle in part for part in parts) == about['infilled']
    return found


def both(found):
    return sorted(found['train'] + found['val'])


def write(path, texts=STORIES, column='text'):
    """Write stories as the kind of file that `path` ends in, or by save_to_disk; return `path`."""
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == '.gz':
        path.write_bytes(gzip.compress(write(path.with_suffix(''), texts, column).read_bytes()))
        path.with_suffix('').unlink()
        return path
    if path.suffix == '.txt':
        path.write_bytes(''.join(f'{text}\n{DELIMITER}\n' for text in texts).encode())
        return path
    table = datasets.Dataset.from_dict({column: texts, 'n': range(len(texts))})
    if path.suffix == '.parquet':
        table.cast_column(column, datasets.Value('large_string')).to_parquet(path)  # as pandas has it
    elif path.suffix == '.csv':
        with open(path, 'w', encoding='utf-8', newline='') as file:
            csv.writer(file).writerows([(column, 'n'), *zip(texts, range(len(texts)), strict=True)])
    elif path.suffix:
        table.to_json(path, lines=path.suffix == '.jsonl')
    else:
        table.save_to_disk(path)
    return path


def write_all(folder, files, column='text'):
    for name, texts in files.items():
        write(folder / name, texts, column)
    return folder


@pytest.mark.parametrize('names', [['s.txt'], ['s.jsonl'], ['s.parquet'], ['saved'], ['s.csv'], [
    'data00.json', 'data01.json'], ['s.txt.gz', 's.json.gz'], ['s.csv.gz']], ids=str)
def test_every_source_gives_back_its_stories_and_the_same_split(tmp_path, prepared, names):
    files = {name: STORIES[i::len(names)] for i, name in enumerate(names)}
    folder = write_all(tmp_path / 's', files, column='story')
    found = prepared(folder / names[0] if len(names) == 1 else folder)
    assert both(found) == sorted(STORIES)
    other = write(tmp_path / 't.txt', STORIES[::-1])
    assert set(found['val']) == set(prepared(other)['val'])


@pytest.mark.parametrize('train, val', [
    ('V2-GPT4-train.txt', 'V2-GPT4-valid.txt'), ('train-0.jsonl', 'nested/val.jsonl'),
    ('train', 'validation'), ('train.csv.gz', 'test.csv.gz')])  # the third has no dataset_dict.json
def test_files_with_val_in_their_names_are_the_validation_split(tmp_path, prepared, train, val):
    assert prepared(write_all(tmp_path / 's', {train: TRAIN, val: VAL})) == {'train': TRAIN, 'val': VAL}


def test_val_percentage_is_refused_if_the_source_has_a_validation_split(tmp_path, prepared):
    source = write_all(tmp_path / 's', {'train.txt': TRAIN, 'dev.txt': VAL})
    with pytest.raises(SettingError, match=r'val_percentage 50 has no effect, .*validation: dev.txt\)'):
        prepared(source, val_percentage=50.0)


def test_saved_dataset_dict_keeps_its_splits(tmp_path, prepared):
    saved = {split: datasets.Dataset.from_dict({'text': texts})
             for split, texts in (('train', TRAIN), ('validation', VAL))}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / 's')
    assert prepared(tmp_path / 's') == {'train': TRAIN, 'val': VAL}


def test_text_column_may_be_any_column_of_text(tmp_path, prepared):
    path = write(tmp_path / 's.csv', ['NA', 'null', '', 'a,"b"\r\n7', ' 007'], column='tale, told')
    assert both(prepared(path, text_column='tale, told')) == [' 007', 'NA', 'a,"b"\r\n7', 'null']
    assert both(prepared(path, text_column='n')) == ['0', '1', '2', '3', '4']
    for column, message in ('', 'no column text or story.*: type --text_column and one of tale, told, n'), (
            'm', 'no column m.*: type'):
        with pytest.raises(UserError, match=message):
            prepared(path, text_column=column)


def test_folder_with_parquet_ignores_other_files_test_splits_and_hidden_files(tmp_path, prepared, capsys):
    files = {'train-0.parquet': TRAIN, 'validation-1.parquet': VAL, 'test-0.parquet': ['a test'],
             '.cache/train-1.parquet': ['hidden'], 'train.txt': ['text']}
    assert prepared(write_all(tmp_path / '.mine', files)) == {'train': TRAIN, 'val': VAL}
    assert 'test-0.parquet' in capsys.readouterr().out


def test_folder_may_hold_its_own_prepared_data_and_is_read_again(tmp_path, prepared):
    write(tmp_path / 'mine.json')
    for texts in ['one more'], ['edited', 'again']:
        write(tmp_path / 'more.txt', texts)
        assert both(prepared(tmp_path, tmp_path)) == sorted(STORIES + texts)


def test_folder_takes_text_files_without_delimiters_as_one_story_each(tmp_path, prepared, capsys):
    """The last file has a delimiter, and a story that is longer than what is read at a time."""
    long = 'the cat sat on the mat ' * 100_000
    for i, text in enumerate([*STORIES, f'one{DELIMITER}\n{long}']):
        (tmp_path / f'{i}.txt').write_text(text + '\n', encoding='utf-8', newline='')
    assert both(prepared(tmp_path)) == sorted([*STORIES, 'one', long])
    assert '--separator' not in capsys.readouterr().out


def test_single_document_is_split_by_position_and_stays_plain(tmp_path, prepared):
    text = '\n' + ' \u00e9\u4f60. \U0001f600 Word.\r\n'.join(map(str, range(400))) + '\n'
    path = tmp_path / 's.txt'
    path.write_bytes(b'\xef\xbb\xbf' + text.encode())  # a byte order mark is not text
    (tmp_path / 's.TXT.GZ').write_bytes(gzip.compress(path.read_bytes()))
    cut = int(0.9 * len(text))
    assert prepared(path) == prepared(tmp_path / 's.TXT.GZ') == {'train': [text[:cut]], 'val': [text[cut:]]}
    with pytest.raises(UserError, match=r's.txt is one document, .*: leave out --infill_rate'):
        prepared(path, infill_rate=1.0)
    found = prepared(path, data_percentage=10.0)
    assert found == {'train': [text[:cut // 10]], 'val': [text[cut:][:(len(text) - cut) // 10]]}


def test_line_breaks_around_a_delimiter_and_blank_stories_are_dropped(tmp_path, prepared, capsys):
    write(tmp_path / 's/blank.jsonl', ['', ' \u2003\n', None])
    text = '\n one \r\n|\r\n\ttwo\n\n \n\n|three|\n \n|\n\n'
    (tmp_path / 's/s.txt').write_bytes(text.replace('|', DELIMITER).encode())
    assert both(prepared(tmp_path / 's', val_percentage=50.0)) == ['\ttwo\n\n ', ' one ', 'three']
    assert ' 4 blank' in capsys.readouterr().out


def test_equal_stories_are_in_one_split_and_no_split_is_empty(tmp_path, prepared):
    for texts in ['a', 'b'], ['x', 'y'], ['a'] * 50 + ['b'] * 50, [str(i % 40) for i in range(200)]:
        # the hash of '' is below those of a and b, and above those of x and y
        path = write(tmp_path / 's.txt', [*texts, ''])
        for percentage in 0.001, 30.0, 99.999:
            found = prepared(path, val_percentage=percentage)
            assert found['train'] and found['val'] and not set(found['train']) & set(found['val'])
            assert both(found) == sorted(texts)


def test_smaller_percentage_is_part_of_a_larger_one(tmp_path, prepared):
    path, before = write(tmp_path / 's.txt'), {'train': set(), 'val': set()}
    for percentage in 0.0001, 10.0, 50.0, 100.0:
        found = prepared(path, data_percentage=percentage, val_percentage=20.0)
        for split, texts in found.items():
            assert texts and before[split] <= set(texts)
            before[split] = set(texts)
        if percentage == 50:
            assert 100 < len(found['train']) < 150 and 15 < len(found['val']) < 45


@pytest.mark.parametrize('given', [{}, {'encoding_type': 'bpe', 'vocab_size': 350}], ids=['char', 'bpe'])
def test_tokenizer_is_trained_on_training_stories_only_and_can_be_reused(tmp_path, prepared, given):
    """Each story has a character of its own, which becomes three bytes if it is not in the vocabulary."""
    texts = [chr(0x4e00 + i) * 5 for i in range(100)]
    found = prepared(write(tmp_path / 's.txt', texts), val_percentage=50.0, **given)
    enc = load_tokenizer(tmp_path / 'out')
    assert [text for text in texts if len(enc.encode(text[0])) < 4] == found['train']
    source, out = write(tmp_path / 'other.txt'), tmp_path / 'second'
    assert both(prepared(source, out, tokenizer=str(tmp_path / 'out'))) == sorted(STORIES)
    assert load_tokenizer(out).state() == enc.state()


def test_bpe_takes_the_size_that_fits_if_none_is_given(tmp_path, prepared, capsys):
    source = write(tmp_path / 's.txt')
    prepared(source, encoding_type='bpe')
    printed = capsys.readouterr().out
    said = re.search(r'^vocab_size: (\d+), because 4096 does not suit this text$', printed, re.MULTILINE)
    assert load_tokenizer(tmp_path / 'out').vocab_size == int(said[1])
    with pytest.raises(UserError, match=f'vocab_size 4096 does not suit this text: type at most {said[1]}'):
        prepared(source, tmp_path / 'second', encoding_type='bpe', vocab_size=4096)


def test_infill_rate_rearranges_so_many_stories(tmp_path, prepared, capsys):
    texts = [*STORIES, 'Short.', 'Only. Two.', *(f'The {i}. Two. Three.' for i in range(800))]
    path = write(tmp_path / 's.jsonl', texts)
    for rate, least, most in (0.0, 0, 0), (0.5, 500, 610), (1.0, len(texts), len(texts)):
        assert both(prepared(path, infill_rate=rate)) == sorted(texts)
        meta = read_meta(tmp_path / 'out')
        infilled, too_short = (sum(split[key] for split in meta['splits'].values())
                               for key in ('infilled', 'too_short'))
        assert meta['infill_rate'] == rate and least <= infilled + too_short <= most
        assert (f'for infilling: {infilled}; {too_short} chosen' in capsys.readouterr().out) == (rate > 0)


def test_number_of_workers_does_not_change_the_tokens(tmp_path):
    """The tokens are those of all stories, in their order."""
    source = write_all(tmp_path / 's', {'train.txt': BIG, 'valid.txt': BIG[:2]})
    expected = CharTokenizer.train(BIG).encode_pieces([(text, True) for text in BIG])[0]
    out = tmp_path / 'out'
    for n in 1, 2:
        done = script(PREPARE, '--source', source, '--out_dir', out, '--num_proc', n, '--offline', cwd='/')
        assert done.err == '' and 'stories: 2,000 for' in done.out and 'MB/s' in done.out
        train = os.path.relpath(ROOT / 'train.py', '/')
        assert done.out.splitlines()[-1] == f'next: python {train} --dataset {out}'
        assert np.array_equal(np.fromfile(out / 'train_00000.bin', '<u2'), expected)


def test_folder_mixes_kinds_of_files(tmp_path, prepared):
    """The library reads them as two types of text."""
    write_all(tmp_path / 's', {'a.txt': STORIES[:100], 'b.csv': STORIES[100:200], 'c.jsonl': STORIES[200:]})
    assert both(prepared(tmp_path / 's')) == sorted(STORIES)


ODD_NAME = 'odd ::a[1]*?#%41'


@pytest.mark.parametrize('name, meant', [
    ('s[1].jsonl', 's1.jsonl'), ('s*.csv', 's1.csv'), ('s?.json', 's1.json'), ('s::1.parquet', '1.parquet'),
    ('s#%41 .txt.gz', 's#A.txt.gz'), ('s [1]::', 's 1')])
def test_names_are_paths_and_neither_patterns_nor_addresses(tmp_path, prepared, name, meant):
    """`meant` is a decoy, what the name means as a pattern or an address. The library cannot write there."""
    folder = tmp_path / ODD_NAME
    folder.mkdir()
    for name_there, texts in (name, STORIES), (meant, ['a decoy', 'another']):
        ending = ''.join(Path(name_there.replace('#%41 ', '')).suffixes)
        write(tmp_path / f'plain{ending}', texts).rename(folder / name_there)
    assert both(prepared(folder / name, folder / 'o*::ut')) == sorted(STORIES)


def test_out_dir_may_have_any_name_for_worker_processes_too(tmp_path):
    out = tmp_path / ODD_NAME
    source = write(tmp_path / 's.txt', BIG)
    script(PREPARE, '--source', source, '--out_dir', out, '--num_proc', 2, '--offline')
    assert both(read(out)) == sorted(BIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ODD_NAME, 's.txt']


@pytest.mark.parametrize('name', ['s.txt', 's.jsonl', 's.csv', 's.parquet', 'saved', 'folder'])
def test_line_breaks_at_the_ends_are_not_part_of_a_story(tmp_path, prepared, name):
    texts = ['\n\nOne.\n', 'Two.\r\n', '\n \tThree. \n\nEnd.']
    if name == 'folder':
        for i, text in enumerate(texts):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f'{i}.txt').write_bytes(text.encode())
    else:
        write(tmp_path / name, texts)
    assert both(prepared(tmp_path / name)) == sorted([' \tThree. \n\nEnd.', 'One.', 'Two.'])


def test_files_without_stories_are_counted_in_one_line(tmp_path, prepared, capsys):
    """The name of one of them would change the colour of a terminal."""
    write_all(tmp_path / 's', {'b.txt': STORIES[:9], 'c.jsonl': STORIES[9:]})
    empty = {'header.csv': b'id,title\n', 'list.json': b'[]', 'none.jsonl.gz': gzip.compress(b''),
             '\x1b[31mred\n.tsv': b'', 'zero.txt': b'', 'zero.parquet': b''}
    for name, content in empty.items():
        (tmp_path / 's' / name).write_bytes(content)
    assert both(prepared(tmp_path / 's')) == sorted(STORIES)
    names = 'zero.txt, \N{REPLACEMENT CHARACTER}[31mred .tsv, header.csv, list.json, none.jsonl.gz, ...'
    assert f'\n6 of 8 files hold no stories: {names}\n' in capsys.readouterr().out


@pytest.mark.parametrize('empty, other, says', [
    ('validation.txt', 'train.txt', 'the val split .*: fill it, or remove it, so that a part'),
    ('train.txt', 'validation.txt', 'the train split of .* holds no stories, or only blank ones: fill it$')])
def test_split_without_stories_is_refused_with_a_way_out(tmp_path, prepared, empty, other, says):
    write(tmp_path / 's' / other)
    write(tmp_path / 's' / empty, [])
    with pytest.raises(UserError, match=says):
        prepared(tmp_path / 's')


@needs_permissions
@pytest.mark.parametrize('name', ['s', 's/train', 's/train/1.txt', 's/2.csv', 'saved', 'saved/state.json'])
def test_source_that_cannot_be_read_is_named_and_not_the_out_dir(tmp_path, prepared, name):
    for path in 's/train/1.txt', 's/2.csv', 'saved':
        write(tmp_path / path)
    message = rf'^{tmp_path}/{name}( cannot be read \(|: )Permission denied'
    with locked(tmp_path / name), pytest.raises(UserError, match=message):
        prepared(tmp_path / name.split('/')[0])
    assert not (tmp_path / 'out').exists()


@needs_permissions
@pytest.mark.parametrize('name', ['folder/s.txt', 'folder/s'])
def test_source_in_a_folder_that_cannot_be_read_is_not_looked_for_elsewhere(tmp_path, prepared, name):
    write(tmp_path / name)
    with locked(tmp_path / 'folder'), pytest.raises(UserError, match=rf'{name}: Permission denied$'):
        prepared(tmp_path / name)


@needs_permissions
def test_tokenizer_that_cannot_be_read_is_named_and_not_the_out_dir(tmp_path, prepared):
    write(tmp_path / 's.txt')
    path = write(tmp_path / 'tokenizer.txt')
    with locked(path), pytest.raises(UserError, match=rf'^{path}: Permission denied$'):
        prepared(tmp_path / 's.txt', tokenizer=str(path))


@linux_only
def test_advice_if_memory_runs_out(tmp_path):
    """A long document is read into memory as a whole."""
    (tmp_path / 's.txt').write_text('Once there was a dog. ' * 10_000_000)
    code = (f'import resource, runpy; resource.setrlimit(resource.RLIMIT_DATA, (5 * 10**8, -1)); '
            f'runpy.run_path({PREPARE!r}, run_name="__main__")')
    for num_proc, advice in (0, 'type --num_proc 1, for one process at a time'), (
            1, 'name smaller files with --source, or what is between the stories of a long text'):
        words = ['--source', tmp_path / 's.txt', '--out_dir', tmp_path / 'out', f'--num_proc={num_proc}']
        done = subprocess.run([sys.executable, '-c', code, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and f': out of memory: {advice}' in done.stderr, done.stderr
        assert 'Traceback' not in done.stderr and not (tmp_path / 'out').exists()


def test_folder_of_token_files_is_refused_with_the_script_for_them(tmp_path, prepared):
    (tmp_path / 'train.bin').write_bytes(bytes(100))
    with pytest.raises(UserError, match=rf'type python .*data/token_files/prepare\.py --source {tmp_path}$'):
        prepared(tmp_path)


def test_folder_in_use_is_refused(tmp_path, prepared):
    out = tmp_path / 'out'
    prepared(write(tmp_path / 's.txt'))
    before = read(out)
    assert (out / '.lock').exists()  # it does not matter
    prepared(tmp_path / 's.txt')
    with lock_folder(out, ''), pytest.raises(UserError, match=f'{out} is in use by another process: wait'):
        prepared(tmp_path / 's.txt')
    assert read(out) == before


@linux_only
@pytest.mark.parametrize('num_proc, texts', [(1, STORIES), (2, BIG)], ids=['one process', 'workers'])
def test_files_are_closed_before_they_are_removed_or_replaced(tmp_path, prepared, num_proc, texts):
    """Windows cannot remove files in use. Stories lie in mapped files of a temporary folder in out_dir."""
    source, out = write(tmp_path / 's.jsonl', texts), tmp_path / 'out'
    with windows_files():
        for _ in range(2):
            assert both(prepared(source, num_proc=num_proc)) == sorted(texts)
        with pytest.raises(UserError, match='vocab_size'):
            prepared(source, num_proc=num_proc, encoding_type='bpe', vocab_size=60000)
    assert sorted(os.listdir(out)) == ['.lock', 'meta.json', 'tokenizer.json', 'train_00000.bin',
                                       'val_00000.bin']


@linux_only
@pytest.mark.parametrize('umask', [0o002, 0o077])
def test_files_have_the_permissions_that_the_umask_gives(tmp_path, prepared, umask):
    before = os.umask(umask)
    try:
        prepared(write(tmp_path / 's.txt'), tmp_path / 'new/out', encoding_type='bpe', vocab_size=400)
    finally:
        os.umask(before)
    for path in tmp_path / 'new', tmp_path / 'new/out':
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask, path
    files = list(tmp_path.glob('new/out/*'))
    assert len(files) == 5
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_seed_chooses_the_built_in_stories(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(stories, 'SAMPLE_STORIES', 200)
    for seed in 1, 2:
        found = prepared('sample', seed=seed, encoding_type='char')
        assert both(found) == sorted(built_in_stories(200, seed))


def test_unknown_setting_bundle_is_refused():
    done = script(PREPARE, '--bundle', 'a.tar', status=2)
    assert done.err.startswith("prepare.py: unknown setting 'bundle'")


def test_run_is_a_tokenizer_without_torch(tmp_path):
    """Nor do the libraries of prepare.py import torch."""
    run = tmp_path / 'out-x'
    run.mkdir()
    CharTokenizer.train(STORIES).save(run)
    (run / 'ckpt.pt').write_bytes(b'never read')
    code = ('import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__"); '
            'print("torch" in sys.modules)')
    words = [sys.executable, '-c', code, ROOT / PREPARE, '--source', write(tmp_path / 's.txt'),
             '--tokenizer', run, '--out_dir', tmp_path / 'out']
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ['False'], done
    assert both(read(tmp_path / 'out')) == sorted(STORIES)


@pytest.fixture
def start(tmp_path):
    """Return start(*flags, **environment), which starts prepare.py in a new process group."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith('HF_')}
    inherited |= {'HF_HOME': str(tmp_path / 'home'), 'no_proxy': '*'}

    def run(*flags, **environment):
        return subprocess.Popen(
            [sys.executable, ROOT / PREPARE, '--out_dir', tmp_path / 'out', *flags], cwd=tmp_path, text=True,
            env=inherited | environment, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # background jobs ignore it
    return run


def end(process):
    """Return the exit status and stderr, once the process and all workers (which share stderr) have ended."""
    err = process.communicate(timeout=60)[1]
    return process.returncode, err


def children(process):
    """Return the ids of the processes that a process has started, the first one first."""
    found = subprocess.run(['pgrep', '-P', f'{process.pid}'], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


@pytest.mark.parametrize('kill, ended', [
    (lambda run: os.killpg(run.pid, signal.SIGINT), (130, '')),
    (lambda run: run.kill(), (-signal.SIGKILL, '')),
    (lambda run: os.kill(children(run)[0], signal.SIGKILL),
     (1, 'prepare.py: a worker process was killed, perhaps for lack of memory: try --num_proc 1\n')),
], ids=['ctrl-c', 'kill', 'kill a worker'])
@linux_only
def test_killed_run_leaves_the_old_data_and_no_worker(tmp_path, prepared, start, kill, ended):
    old = prepared(write(tmp_path / 's.txt'))
    run = start('--source', write(tmp_path / 'big.txt', BIG * 3), '--num_proc', '2', '--offline')
    while len(children(run)) < 3:  # two workers, and the process that manages their queue
        assert run.poll() is None
        time.sleep(0.01)
    kill(run)
    assert end(run) == ended
    assert read(tmp_path / 'out') == old


def test_source_on_the_hub_is_downloaded_resumed_and_cached(tmp_path, start):
    """This is how most users begin: without --source. The second time, the hub is gone."""
    long = random.Random(0).randbytes(6_000_000).hex()  # the library saves a download in steps of 10 MB
    texts = {'data/train-0-of-2.parquet': TRAIN, 'data/train-1-of-2.parquet': [long],
             'data/validation-0-of-1.parquet': VAL}
    stories = {'train': [*TRAIN, long], 'val': VAL}
    files = {name: (write_all(tmp_path, texts) / name).read_bytes() for name in texts}
    with Hub('roneneldan/TinyStories', files | {'TinyStories-train.txt': b'not read'}) as hub:
        hub.break_off['data/train-1-of-2.parquet'] = 10_600_000
        assert end(start(HF_ENDPOINT=hub.endpoint))[0] == 0
        assert read(tmp_path / 'out') == stories
        train, other, val = files
        assert hub.downloaded == [(train, 0), (other, 0), (other, 10 * 2**20), (val, 0)]  # resumed
        status, err = end(start('--source', 'someone/nothing', HF_ENDPOINT=hub.endpoint))
        assert status == 1 and err.count('\n') == 1
        assert 'someone/nothing is not a file here, nor can it' in err
    for flags in [], ['--offline']:
        assert end(start(*flags, HF_ENDPOINT=hub.endpoint)) == (0, '')
        assert read(tmp_path / 'out') == stories


def test_hub_name_may_lack_the_user_and_have_a_configuration(tmp_path, start):
    """There are two configurations; without one in the name, the library says which there are."""
    files = {f'{name}/train.jsonl': (write(tmp_path / f'{name}.jsonl', texts)).read_bytes()
             for name, texts in (('long', ['no', 'not this']), ('short', STORIES))}
    configs = ''.join(f'- config_name: {name}\n  data_files: {name}/*\n' for name in ('long', 'short'))
    with Hub('someone/tales', files | {'README.md': f'---\nconfigs:\n{configs}---\n'.encode()}) as hub:
        assert end(start('--source', 'tales:short', HF_ENDPOINT=hub.endpoint)) == (0, '')
        assert both(read(tmp_path / 'out')) == sorted(STORIES)
        status, err = end(start('--source', 'tales', HF_ENDPOINT=hub.endpoint))
    assert status == 1 and err.count('\n') == 1 and "['long', 'short']" in err and 'user/name:config' in err
    assert 'as user/name' in end(start('--source', 'tales:short', '--offline'))[1]
    assert end(start('--source', 'someone/tales:short', '--offline')) == (0, '')
    assert both(read(tmp_path / 'out')) == sorted(STORIES)


def test_silent_hub_is_reported_within_seconds(tmp_path, start):
    with socket.create_server(('127.0.0.1', 0)) as silent:
        endpoint = 'http://{}:{}'.format(*silent.getsockname())
        status, err = end(start(HF_ENDPOINT=endpoint))
    assert status == 1 and err.count('\n') == 1
    download = 'hf download --repo-type dataset roneneldan/TinyStories --include "data/*"'
    for way in f'{endpoint} cannot be reached', '--source sample', download:
        assert way in err


NO_CONNECTION = """import os, sys
def refuse(event, given):
    if event == 'socket.getaddrinfo' or (event == 'socket.__new__' and given[1] != 1):  # 1: AF_UNIX
        os._exit(99)
sys.addaudithook(refuse)
"""


@pytest.mark.parametrize('source, environment, status, says', [
    ('someone/stories', {}, 1, 'we are offline: type --source sample'),
    ('someone/stories', {'HF_HUB_OFFLINE': '1'}, 1, 'we are offline: type --source sample'),
    ('big.txt', {}, 0, ''), ('big.parquet', {}, 0, ''), ('big.parquet', {'HF_HOME': '/nowhere'}, 0, '')])
@linux_only
def test_offline_opens_no_connection(tmp_path, start, source, environment, status, says):
    if not source.startswith('someone'):
        write(tmp_path / source, BIG)
    (tmp_path / 'sitecustomize.py').write_text(NO_CONNECTION)  # which Python imports first
    flags = [] if environment else ['--offline']
    ended = end(start('--source', source, *flags, **environment, PYTHONPATH=str(tmp_path)))
    assert ended[0] == status and says in ended[1], ended
