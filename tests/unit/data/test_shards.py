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
    return prepare(folder, train, val, shard_tokens=400, vocab_size=60_000)


def test_shards_are_one_stream_which_any_reader_of_uint16_reads(folder):
    shards, split = read_meta(folder)['splits']['train']['shards'], Split(folder, 'train')
    assert [(shard['name'], shard['tokens']) for shard in shards] == [
        ('train_00000.bin', 400), ('train_00001.bin', 400), ('train_00002.bin', 203)]
    files = [(folder / shard['name']).read_bytes() for shard in shards]
    assert [shard['sha256'] for shard in shards] == [hashlib.sha256(data).hexdigest() for data in files]
    assert np.array_equal(np.frombuffer(b''.join(files), '<u2'), TOKENS)
    assert split.n_tokens == 1003 and split.n_bytes == 3009
    for start, length in (0, 5), (390, 20), (395, 500), (1000, 10), (0, 2000):
        assert np.array_equal(split.read(start, length), TOKENS[start:start + length])


def test_windows_have_their_targets_one_further_and_minus_one_beyond_the_end(folder):
    x, y = Split(folder, 'train').windows([0, 61 * 16, 62 * 16, 63 * 16], 16)
    assert np.array_equal(x[1], TOKENS[61 * 16:62 * 16])
    assert np.array_equal(y[1], TOKENS[61 * 16 + 1:62 * 16 + 1])
    assert np.array_equal(y[2, :10], TOKENS[993:]) and (y[2, 10:] == -1).all()  # 992 + 16 > 1003
    assert (y[3] == -1).all()


@pytest.mark.parametrize('sequences', [4, 5, 100])
def test_each_epoch_has_every_window_once(folder, sequences):
    """In the first they begin at token 0, later elsewhere; the last target of each is there."""
    batches, same, other = (Batches(Split(folder, 'train'), 16, sequences, 1, seed) for seed in (7, 7, 8))
    n = 62  # (1003 - 1) // 16
    stream = np.concatenate([batches.starts(step) for step in range(9 * n // sequences + 1)])
    epochs = [stream[i * n:(i + 1) * n] for i in range(9)]
    shifts = [min(epoch) for epoch in epochs]
    assert shifts[0] == 0 and len({*shifts}) > 3 and max(shifts) < 16
    for epoch, shift in zip(epochs, shifts, strict=True):
        assert sorted(epoch) == [shift + 16 * k for k in range(n)]
    assert not np.array_equal(epochs[0], epochs[1] - shifts[1])
    assert np.array_equal(same.starts(1), stream[sequences:2 * sequences])  # no memory of earlier steps
    assert not np.array_equal(other.starts(0), stream[:sequences])
    _, y = batches.split.windows([epochs[0].max() + 15], 16)
    assert (y >= 0).sum() == 1003 - 1 - (epochs[0].max() + 15)


@pytest.mark.parametrize('accumulation_steps, ranks, micro_steps', [
    (1, 2, 1), (1, 4, 1), (6, 1, 6), (6, 2, 3), (6, 4, 2)])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(folder, accumulation_steps, ranks, micro_steps):
    split = Split(folder, 'train')
    whole = Batches(split, 16, 8 * accumulation_steps, 1, seed=1)(20)[0]
    parts = [Batches(split, 16, 8, accumulation_steps, 1, rank, ranks)(20) for rank in range(ranks)]
    assert all(len(part) == micro_steps and len(x) <= 8 for part in parts for x, _ in part)
    assert np.array_equal(np.concatenate([xy for part in parts for xy in part], axis=1), whole)


@pytest.mark.parametrize('batch_size, accumulation_steps, ranks, nearest', [
    (12, 1, 8, '8 or 16'), (4, 1, 8, '8'), (2, 3, 2, '4 or 8')])
def test_batches_that_ranks_cannot_share_are_refused(folder, batch_size, accumulation_steps, ranks, nearest):
    with pytest.raises(SettingError, match=f' {ranks} ranks .* nearest: {nearest}$'):
        Batches(Split(folder, 'train'), 16, batch_size, accumulation_steps, 0, 0, ranks)


def test_batches_come_ahead_in_order(folder):
    batches, ahead = (Batches(Split(folder, 'train'), 16, 4, 2, seed=1) for _ in range(2))
    for step, ready in zip((5, 6, 7), ahead.from_step(5), strict=False):
        assert np.array_equal(ready, batches(step))


def test_a_shard_cut_while_it_is_read_is_told(folder):
    """A bus error would end the process without a word."""
    split = Split(folder, 'train')
    os.truncate(folder / 'train_00001.bin', 8)
    assert np.array_equal(split.read(0, 400), TOKENS[:400])
    with pytest.raises(UserError, match=r'train_00001\.bin has changed its length meanwhile'):
        split.read(390, 20)


def test_the_fingerprint_changes_with_any_token(tmp_path):
    changed = [np.where(np.arange(1003) == i, 0, TOKENS).astype(np.uint16) for i in range(3)]
    prints = {fingerprint(read_meta(make(tmp_path, **{split: tokens})))
              for split in ('train', 'val') for tokens in changed}
    assert len(prints) == 6


def test_new_files_replace_old_ones_only_when_complete(folder):
    (folder / '.preparing-killed').mkdir()
    (folder / 'notes.txt').write_text('mine')
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    refused = pytest.raises(UserError, match=r"cannot write .*No space.*--out_dir")
    with refused, write_dataset_atomically(folder) as (new, _):
        (new / 'train_00000.bin').write_bytes(b'half')
        raise OSError(28, 'No space left on device')
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with write_dataset_atomically(folder) as (new, cache):
        for path in new / 'val_00000.bin', new / 'meta.json', cache / 'other':
            path.write_text('new')
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        'notes.txt': 'mine', 'val_00000.bin': 'new', 'meta.json': 'new'}
    (folder / 'other').mkdir()
    with pytest.raises(UserError, match='directory'), write_dataset_atomically(folder) as (new, _):
        for name in 'meta.json', 'other':
            (new / name).write_text('newer')
    assert not (folder / 'meta.json').exists()  # it goes first and comes last
    with pytest.raises(KeyError), write_dataset_atomically(folder / 'absent'):
        raise KeyError
    assert not (folder / 'absent').exists()


def meta(old, new):  # changes meta.json
    def harm(folder):
        text = (folder / 'meta.json').read_text()
        (folder / 'meta.json').write_text(text.replace(old, new))
    return harm


@pytest.mark.parametrize('harm, named', [
    (lambda folder: (folder / 'meta.json').unlink(), 'no meta.json.*prepare.py'),
    (meta('{', ''), 'meta.json is damaged'),
    (meta('"splits"', '"split"'), 'meta.json is damaged'),
    (meta('train_00001.bin', '../train_00001.bin'), 'not a plain file name'),
    (meta('"tokens": 100', '"tokens": 0'), 'meta.json is damaged'),
    (lambda folder: (folder / 'val_00000.bin').write_bytes(bytes(200)), 'val_00000.bin .* the sha256'),
    (lambda folder: (folder / 'train_00001.bin').unlink(), 'train_00001.bin is missing'),
    (lambda folder: os.truncate(folder / 'train_00001.bin', 700), '700 bytes for 400 tokens of 2'),
    (lambda folder: prepare(folder, TOKENS, TOKENS, 400, vocab_size=int(TOKENS.max())), 'the vocabulary of'),
    (lambda folder: make(folder, train=TOKENS[:16]), 'fewer than one window of 16'),
    (lambda folder: make(folder, val=TOKENS[:1]), 'no val token to predict'),
])
def test_damage_is_refused_with_its_name(folder, harm, named):
    harm(folder)
    with pytest.raises(UserError, match=named):
        Split(folder, 'val', verify=True), Batches(Split(folder, 'train'), 16, 62, 1, seed=0)(0)
