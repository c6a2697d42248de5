"""Shards: what is written, what numpy alone reads, and which windows a step has."""

import hashlib
import os
import re
import sys

import numpy as np
import pytest

from configurator import SettingError, UserError
from data import shards
from data.shards import Batches, Split, fingerprint, prepared_folder, read_meta, write_dataset_atomically
from data.tokenizer import CLASSES, load_tokenizer
from tests.helpers.permissions import locked, needs_permissions
from tests.helpers.scripts import prepare
from tests.helpers.windows import windows_files

linux_only = pytest.mark.skipif(sys.platform != 'linux', reason='forks, or reads /proc')

TOKENS = np.random.default_rng(0).integers(0, 60_000, 1003).astype(np.uint16)


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path)


def make(folder, train=TOKENS, val=TOKENS[:100]):
    """Write a prepared folder with shards of 400 tokens; return `folder`."""
    return prepare(folder, train, val, shard_tokens=400, vocab_size=60_000)


def test_shard_writer_writes_one_stream_of_uint16(folder):
    shards = read_meta(folder)['splits']['train']['shards']
    assert [(shard['name'], shard['tokens']) for shard in shards] == [
        ('train_00000.bin', 400), ('train_00001.bin', 400), ('train_00002.bin', 203)]
    files = [(folder / shard['name']).read_bytes() for shard in shards]
    assert [shard['sha256'] for shard in shards] == [hashlib.sha256(data).hexdigest() for data in files]
    assert np.array_equal(np.frombuffer(b''.join(files), '<u2'), TOKENS)


@pytest.mark.parametrize('start, length', [(0, 5), (390, 20), (395, 500), (1000, 10), (0, 2000)])
def test_split_reads_across_shards(folder, start, length):
    split = Split(folder, 'train')
    assert split.n_tokens == 1003 and split.n_bytes == 3009
    assert np.array_equal(split.read(start, length), TOKENS[start:start + length])


def test_windows_have_targets_one_token_further_and_minus_one_beyond_the_end(folder):
    x, y = Split(folder, 'train').windows([0, 61 * 16, 62 * 16, 63 * 16], 16)
    assert np.array_equal(x[1], TOKENS[61 * 16:62 * 16])
    assert np.array_equal(y[1], TOKENS[61 * 16 + 1:62 * 16 + 1])
    assert np.array_equal(y[2, :10], TOKENS[993:])
    assert (y[2, 10:] == -1).all()  # 992 + 16 > 1003
    assert (y[3] == -1).all()


def naive_windows(tokens, starts, block_size):
    """Return inputs and targets of each window, token by token."""
    xs, ys = [], []
    for start in starts:
        padded = [*tokens[start:start + block_size + 1]] + [-1] * (block_size + 1)
        xs.append([max(token, 0) for token in padded[:block_size]])
        ys.append(padded[1:block_size + 1])
    return np.array(xs), np.array(ys)


@pytest.mark.parametrize('shard_tokens', [1, 7, 8, 9, 40, 100])
def test_windows_of_random_shards_equal_the_naive_ones(tmp_path, shard_tokens):
    """In any order and more than once; inside shards, across them, at the end and beyond it."""
    rng = np.random.default_rng(shard_tokens)
    tokens = rng.integers(0, 2**16, 103).astype(np.uint16)
    split = Split(prepare(tmp_path, tokens, TOKENS, shard_tokens, vocab_size=2**16), 'train')
    starts = rng.permutation([*range(106), 5, 5, 99])
    for block_size in 1, 8, 40:
        x, y = split.windows(starts, block_size)
        expected_x, expected_y = naive_windows(tokens.tolist(), starts, block_size)
        assert np.array_equal(x, expected_x) and np.array_equal(y, expected_y)
        assert x.dtype == y.dtype == np.int64
    assert split.windows([], 8)[1].shape == (0, 8)


def test_micro_batches_are_contiguous_so_that_a_gpu_copies_them_while_it_computes(folder):
    for x, y in Batches(Split(folder, 'train'), 16, 4, 2, seed=1)(0):
        assert x.flags.c_contiguous and y.flags.c_contiguous


@pytest.mark.parametrize('batch_size', [4, 5, 100])
def test_each_epoch_has_every_window_once(folder, batch_size):
    """The windows of the first epoch begin at token 0, those of later epochs elsewhere."""
    batches, same, other = (Batches(Split(folder, 'train'), 16, batch_size, 1, seed) for seed in (7, 7, 8))
    n = 62  # (1003 - 1) // 16
    assert (batches.n_windows, batches.global_batch_size) == (n, batch_size)
    n_steps = 9 * n // batch_size + 1
    stream = np.concatenate([batches.starts(step) for step in range(n_steps)])
    epochs = [stream[i * n:(i + 1) * n] for i in range(9)]
    shifts = [min(epoch) for epoch in epochs]
    assert shifts[0] == 0 and len(set(shifts)) > 3 and max(shifts) < 16
    for epoch, shift in zip(epochs, shifts, strict=True):
        assert sorted(epoch) == [shift + 16 * k for k in range(n)]
    assert not np.array_equal(epochs[0], epochs[1] - shifts[1])
    assert np.array_equal(same.starts(1), stream[batch_size:2 * batch_size])  # no memory of earlier steps
    assert not np.array_equal(other.starts(0), stream[:batch_size])
    _, y = batches.split.windows([epochs[0].max() + 15], 16)  # the last window at the largest shift
    assert (y >= 0).sum() == 1003 - 1 - (epochs[0].max() + 15)


def test_batches_of_a_seed_never_change(folder):
    """A run that is resumed, also one of an older version, must get the batches it would have got."""
    batches = Batches(Split(folder, 'train'), 16, 4, 1, seed=1337)
    digest = hashlib.sha256()
    for step in 0, 1, 15, 16, 100:
        digest.update(batches.starts(step).astype('<i8').tobytes())
    assert digest.hexdigest() == '9794940f5a4f89e77083eaadcd506b30fbebc5eab8fc7030af4d394fdd2e5afb'


@pytest.mark.parametrize('accumulation_steps, ranks, grad_accum_steps', [
    (1, 2, 1), (1, 4, 1), (6, 1, 6), (6, 2, 3), (6, 4, 2)])
def test_global_batch_is_the_same_for_any_ranks(folder, accumulation_steps, ranks, grad_accum_steps):
    split = Split(folder, 'train')
    whole = Batches(split, 16, 8 * accumulation_steps, 1, seed=1)(20)[0]
    of_ranks = [Batches(split, 16, 8, accumulation_steps, 1, rank, ranks)(20) for rank in range(ranks)]
    micro_batches = []
    for of_rank in of_ranks:
        assert len(of_rank) == grad_accum_steps
        micro_batches += of_rank
    assert all(len(x) <= 8 for x, _ in micro_batches)
    assert np.array_equal(np.concatenate(micro_batches, axis=1), whole)


@pytest.mark.parametrize('batch_size, accumulation_steps, ranks, nearest', [
    (12, 1, 8, '8 or 16'), (4, 1, 8, '8'), (2, 3, 2, '4 or 8')])
def test_batches_that_ranks_cannot_share_are_refused(folder, batch_size, accumulation_steps, ranks, nearest):
    with pytest.raises(SettingError, match=f' {ranks} ranks .* nearest: {nearest}$'):
        Batches(Split(folder, 'train'), 16, batch_size, accumulation_steps, 0, 0, ranks)


def test_from_step_yields_the_batches_of_the_following_steps(folder):
    batches, same = (Batches(Split(folder, 'train'), 16, 4, 2, seed=1) for _ in range(2))
    for step, micro_batches in zip((5, 6, 7), same.from_step(5), strict=False):
        assert np.array_equal(micro_batches, batches(step))


@pytest.mark.parametrize('use', [
    lambda split: split.read(390, 20),
    lambda split: split.windows([390], 16),
    lambda split: split.windows([450], 16),
    lambda split: Batches(split, 16, 62, 1, seed=0)(0)], ids=['read', 'across', 'inside', 'batches'])
def test_shard_that_is_cut_short_while_in_use_is_reported(folder, use):
    """A bus error would end the process without a message."""
    split = Split(folder, 'train')
    os.truncate(folder / 'train_00001.bin', 8)
    assert np.array_equal(split.read(0, 400), TOKENS[:400])
    with pytest.raises(UserError, match=r'train_00001\.bin has changed its length meanwhile'):
        use(split)


@pytest.mark.parametrize('use', [
    lambda split: split.read(0, 1003),
    lambda split: split.windows([0], 1002)], ids=['read', 'windows'])
def test_token_beyond_the_vocabulary_is_reported(tmp_path, use):
    folder = prepare(tmp_path, TOKENS, TOKENS, 400, vocab_size=int(TOKENS.max()))
    with pytest.raises(UserError, match=rf'token {TOKENS.max()}, beyond the vocabulary of {TOKENS.max()}'):
        use(Split(folder, 'train'))


def test_fingerprint_changes_with_any_token(tmp_path):
    changed = [np.where(np.arange(1003) == i, 0, TOKENS).astype(np.uint16) for i in range(3)]
    fingerprints = set()
    for split in 'train', 'val':
        for tokens in changed:
            folder = make(tmp_path, **{split: tokens})
            fingerprints.add(fingerprint(read_meta(folder)))
    assert len(fingerprints) == 6


def content(folder):
    """Return {name: bytes} of the files in a folder, without the lock."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != '.lock']
    return {path.name: path.read_bytes() for path in files}


def test_write_dataset_atomically_keeps_the_old_files_if_writing_fails(folder):
    (folder / 'notes.txt').write_text('mine')
    before = content(folder)
    (folder / '.preparing-ab12_34z' / 'cache').mkdir(parents=True)  # what a killed process left behind
    refused = pytest.raises(UserError, match=r'cannot write .*No space.*--out_dir')
    with refused, write_dataset_atomically(folder) as (new, _):
        (new / 'train_00000.bin').write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    assert content(folder) == before
    assert not list(folder.glob('.preparing*'))


def test_write_dataset_atomically_tells_errors_of_reading_from_errors_of_writing(folder, tmp_path):
    before = content(folder)
    refused = pytest.raises(UserError, match=rf'^{tmp_path}/source: Permission denied$')
    with refused, write_dataset_atomically(folder):
        raise PermissionError(13, 'Permission denied', str(tmp_path / 'source'))
    refused = pytest.raises(UserError, match=r'^cannot write .*\(Permission denied\): name another --out_dir')
    for i in 0, 1:
        with refused, write_dataset_atomically(folder) as folders:
            raise PermissionError(13, 'Permission denied', str(folders[i] / 'shard'))
    with pytest.raises(OSError, match='Cannot allocate'), write_dataset_atomically(folder):
        raise OSError(12, 'Cannot allocate memory')
    assert content(folder) == before


def test_write_dataset_atomically_replaces_prepared_data_and_nothing_else(folder):
    (folder / 'notes.txt').write_text('mine')
    with write_dataset_atomically(folder) as (new, cache):
        for path in new / 'val_00000.bin', new / 'meta.json', cache / 'other':
            path.write_text('new')
    assert content(folder) == {'notes.txt': b'mine', 'val_00000.bin': b'new', 'meta.json': b'new'}


def replace(folder):
    """Replace the dataset in a folder by a smaller one."""
    with write_dataset_atomically(folder) as (new, _):
        make(new, train=TOKENS[:7])


@pytest.fixture
def smaller(tmp_path):
    """Return the files of the dataset that `replace` writes, {name: bytes}."""
    (tmp_path / 'smaller').mkdir()
    return content(make(tmp_path / 'smaller', train=TOKENS[:7]))


@needs_permissions
@pytest.mark.parametrize('name, use', [
    ('meta.json', read_meta), ('meta.json', replace), ('tokenizer.json', load_tokenizer)])
def test_prepared_data_that_cannot_be_read_is_not_called_damaged(folder, name, use):
    with locked(folder / name), pytest.raises((UserError, PermissionError)) as raised:
        use(folder)
    assert name in str(raised.value) and 'Permission denied' in str(raised.value)
    assert not re.search('damaged|remove|--out_dir', str(raised.value))


def test_write_dataset_atomically_puts_everything_back_if_a_file_cannot_be_moved(folder, monkeypatch):
    before, move, states = content(folder), os.replace, []

    def fail_once(source, target):
        """Fail to move the third file of the new dataset."""
        states.append({path.name for path in folder.glob('*.*')} & set(before))
        if source.name == 'val_00000.bin' and source.parent.name == 'new':
            monkeypatch.setattr(os, 'replace', move)
            raise PermissionError(13, 'in use')
        move(source, target)

    monkeypatch.setattr(os, 'replace', fail_once)
    with pytest.raises(UserError, match=r'cannot write .*in use.* what was saved before is whole'):
        replace(folder)
    assert not any('meta.json' in state for state in states[1:]), 'it would list files that are not there'
    assert states[-1] == {'tokenizer.json', 'train_00000.bin'}
    assert content(folder) == before


@linux_only
def test_write_dataset_atomically_refuses_to_replace_mapped_files_on_windows(tmp_path, smaller):
    folder = make(tmp_path)
    before, split = content(folder), Split(folder, 'val')
    with windows_files(), pytest.raises(UserError, match=r'cannot write .*used by another process'):
        replace(folder)
    assert content(folder) == before
    del split
    with windows_files():
        replace(folder)
    assert content(folder) == smaller


@linux_only
def test_write_dataset_atomically_recovers_from_a_kill_at_any_moment(tmp_path, smaller):
    """It moves the six files of the old dataset away and four new ones in."""
    for n_moves in range(11):
        (tmp_path / f'{n_moves}').mkdir()
        folder = make(tmp_path / f'{n_moves}')
        (folder / 'notes.txt').write_text('mine')
        pid = os.fork()
        if pid == 0:
            move, moves = os.replace, iter(range(n_moves))

            def move_or_die(source, target, move=move, moves=moves):
                if next(moves, None) is None:
                    os._exit(1)
                move(source, target)

            os.replace = move_or_die
            replace(folder)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == (n_moves < 10)
        assert (folder / 'meta.json').exists() == (n_moves in (0, 10))
        replace(folder)
        assert content(folder) == smaller | {'notes.txt': b'mine'}


@pytest.mark.parametrize('names', [
    ['tokenizer.json', 'config.json'], ['meta.json'], ['train_00001.bin'], ['train_00003.bin']], ids=str)
def test_write_dataset_atomically_refuses_files_of_others(tmp_path, names):
    """The last of these lies next to a dataset of ours, which does not list it."""
    folder = make(tmp_path) if names == ['train_00003.bin'] else tmp_path
    for name in names:
        (folder / name).write_text('{"theirs": 1}')
    before = content(folder)
    with pytest.raises(UserError, match=rf'that no meta.json .* lists \({names[0]}\): move them away, or'):
        replace(folder)
    assert content(folder) == before
    assert not (folder / '.lock').exists()


def test_write_dataset_atomically_removes_temporary_folders_of_ours_alone(tmp_path):
    """Without a meta.json, what a killed process was replacing is removed, too, but no other file."""
    folder = tmp_path / 'data'
    for name in 'thursday/plan.txt', 'notes/new', 'ab12_34z/new/meta.json', 'abcdefgh/replaced.txt':
        path = folder / f'.preparing-{name}'
        path.parent.mkdir(parents=True)
        path.write_text('train_00009.bin\n../thesis.txt\nthesis.txt')
    (folder / '.preparing-link5678').symlink_to(tmp_path)
    for path in tmp_path / 'thesis.txt', folder / 'thesis.txt', folder / 'train_00009.bin':
        path.write_text('mine')
    replace(folder)
    assert (tmp_path / 'thesis.txt').exists() and (folder / 'thesis.txt').exists()
    assert not (folder / 'train_00009.bin').exists()
    assert {path.name for path in folder.glob('.preparing*')} == {
        '.preparing-thursday', '.preparing-notes', '.preparing-link5678'}


def test_write_dataset_atomically_leaves_no_empty_folder(folder):
    with pytest.raises(KeyError), write_dataset_atomically(folder / 'absent'):
        raise KeyError
    assert not (folder / 'absent').exists()


def test_prepared_folder_is_not_hidden_by_another_folder_of_its_name(tmp_path, monkeypatch):
    """A path comes first if it holds prepared data; what the message advises makes it do so."""
    monkeypatch.setattr(shards, '__file__', str(tmp_path / 'data' / 'shards.py'))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    assert prepared_folder('tales') == tmp_path / 'data' / 'tales'  # neither is there
    (tmp_path / 'tales').mkdir()
    folder = prepared_folder('tales')
    with pytest.raises(UserError, match=r'^tales holds no .*prepare\.py --out_dir tales, or name'):
        read_meta(folder)
    make(tmp_path / 'data' / 'tales')
    assert prepared_folder('tales') == tmp_path / 'data' / 'tales'
    make(tmp_path / 'tales')
    assert str(prepared_folder('tales')) == 'tales'


def test_tokenizer_files_are_those_that_the_tokenizers_write():
    assert {name: kind.file_name for name, kind in CLASSES.items()} == shards.TOKENIZER_FILES


def change_meta(old, new):
    """Return a function that replaces a text in the meta.json of a folder."""
    def harm(folder):
        text = (folder / 'meta.json').read_text()
        (folder / 'meta.json').write_text(text.replace(old, new))
    return harm


@pytest.mark.parametrize('harm, message', [
    (lambda folder: (folder / 'meta.json').unlink(), 'no meta.json.*prepare.py'),
    (change_meta('{', ''), 'meta.json is damaged'),
    (change_meta('"splits"', '"split"'), 'meta.json is damaged .*splits is None'),
    (change_meta('train_00001.bin', '../train_00001.bin'), 'not a plain file name'),
    (change_meta('"tokens": 400', '"tokens": 0'), 'meta.json is damaged .*tokens is 0'),
    (change_meta('"tokens": 400', '"tokens": "400"'), "meta.json is damaged .*tokens is '400'"),
    (change_meta('"tokens": 400', '"tokens": true'), 'meta.json is damaged .*tokens is True'),
    (change_meta('"delimiter": 1', '"infill_rate": 1, "delimiter": 60000'),
     'delimiter is 60000, beyond the vocabulary'),
    (change_meta('"delimiter": 1', '"infill_rate": 0.5'), 'meta.json is damaged .*delimiter is None'),
    (change_meta('train_00001.bin', 'train_00000.bin'), 'shard train_00000.bin is listed twice'),
    (change_meta('"vocab_size": 60000', '"vocab_size": 70000'), 'vocab_size is 70000, and tokens are uint16'),
    (lambda folder: (folder / 'meta.json').write_text('[1]'), 'meta.json is damaged'),
    (lambda folder: (folder / 'meta.json').write_text('[' * 10**6), 'meta.json is damaged'),
    (lambda folder: os.truncate(folder / 'meta.json', 2**31), 'meta.json is damaged .*2,147,483,648 bytes'),
    (lambda folder: (folder / 'val_00000.bin').write_bytes(bytes(200)), 'val_00000.bin .* the sha256'),
    (lambda folder: (folder / 'train_00001.bin').unlink(), 'train_00001.bin is missing'),
    (lambda folder: os.truncate(folder / 'train_00001.bin', 700), '700 bytes for 400 tokens of 2 bytes'),
    (lambda folder: make(folder, train=TOKENS[:16]), 'fewer than one window of 16'),
    (lambda folder: make(folder, val=TOKENS[:1]), 'no val token to predict'),
])
def test_damaged_folder_is_refused_with_the_name_of_what_is_wrong(folder, harm, message):
    harm(folder)
    with pytest.raises(UserError, match=message):
        Split(folder, 'val', verify=True), Batches(Split(folder, 'train'), 16, 62, 1, seed=0)(0)
