"""Shards: what is written, what numpy alone reads, and which windows a step has."""

import hashlib
import os

import numpy as np
import pytest

from configurator import SettingError, UserError
from data.shards import Batches, Split, fingerprint, read_meta, write_dataset_atomically
from tests.helpers.scripts import prepare

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
    lambda split: Batches(split, 16, 62, 1, seed=0)(0)], ids=['read', 'windows', 'batches'])
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
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}


def test_write_dataset_atomically_keeps_the_old_files_if_writing_fails(folder):
    (folder / 'notes.txt').write_text('mine')
    before = content(folder)
    (folder / '.preparing-killed').mkdir()  # what a killed process left behind
    refused = pytest.raises(UserError, match=r'cannot write .*No space.*--out_dir')
    with refused, write_dataset_atomically(folder) as (new, _):
        (new / 'train_00000.bin').write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    assert content(folder) == before


def test_write_dataset_atomically_replaces_prepared_data_and_nothing_else(folder):
    (folder / 'notes.txt').write_text('mine')
    with write_dataset_atomically(folder) as (new, cache):
        for path in new / 'val_00000.bin', new / 'meta.json', cache / 'other':
            path.write_text('new')
    assert content(folder) == {'notes.txt': b'mine', 'val_00000.bin': b'new', 'meta.json': b'new'}


def test_write_dataset_atomically_deletes_meta_first_and_writes_it_last(folder):
    (folder / 'other').mkdir()  # a file of this name cannot be written
    with pytest.raises(UserError, match='directory'), write_dataset_atomically(folder) as (new, _):
        for name in 'meta.json', 'other':
            (new / name).write_text('new')
    assert not (folder / 'meta.json').exists()


def test_write_dataset_atomically_leaves_no_empty_folder(folder):
    with pytest.raises(KeyError), write_dataset_atomically(folder / 'absent'):
        raise KeyError
    assert not (folder / 'absent').exists()


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
    (lambda folder: (folder / 'meta.json').write_text('[1]'), 'meta.json is damaged'),
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
