"""Shards: what is written, what numpy alone reads, and which windows a step has."""

import hashlib
import json

import numpy as np
import pytest

from configurator import UserError
from data.shards import Batches, ShardWriter, Split, fingerprint

TOKENS = np.random.default_rng(0).integers(0, 60_000, 1003).astype(np.uint16)


def prepare(folder, train=TOKENS, val=TOKENS[:100], shard_tokens=400, **changes):
    splits = {}
    for split, tokens in ('train', train), ('val', val):
        writer = ShardWriter(folder, split, shard_tokens)
        for part in np.array_split(tokens, 7):
            writer.write(part)
        splits[split] = {
            'stories': 1,
            'tokens': len(tokens),
            'bytes': 3 * len(tokens),
            'shards': writer.close(),
        }
    meta = {'encoding': 'char', 'vocab_size': 60_000, 'splits': splits} | changes
    (folder / 'meta.json').write_text(json.dumps(meta))
    return meta


def test_a_reader_that_knows_only_uint16_reads_them(tmp_path):
    meta = prepare(tmp_path)
    shards = meta['splits']['train']['shards']
    assert [(shard['name'], shard['tokens']) for shard in shards] == [
        ('train_00000.bin', 400),
        ('train_00001.bin', 400),
        ('train_00002.bin', 203),
    ]
    read = np.concatenate([np.fromfile(tmp_path / shard['name'], '<u2') for shard in shards])
    assert np.array_equal(read, TOKENS)
    for shard in shards:
        assert shard['sha256'] == hashlib.sha256((tmp_path / shard['name']).read_bytes()).hexdigest()


def test_a_split_is_one_stream_across_its_shards(tmp_path):
    prepare(tmp_path)
    split = Split(tmp_path, 'train')
    assert split.n_tokens == 1003 and split.n_bytes == 3009
    for start, length in (0, 5), (390, 20), (395, 500), (1000, 10), (0, 2000):
        assert np.array_equal(split.read(start, length), TOKENS[start : start + length])


def test_windows_have_their_targets_one_further_and_minus_one_beyond_the_end(tmp_path):
    prepare(tmp_path)
    x, y = Split(tmp_path, 'train').windows([0, 61, 62, 63], 16)
    assert np.array_equal(x[1], TOKENS[61 * 16 : 62 * 16]) and np.array_equal(
        y[1], TOKENS[61 * 16 + 1 : 62 * 16 + 1]
    )
    assert np.array_equal(y[2, :10], TOKENS[993:]) and (y[2, 10:] == -1).all()  # 992 + 16 > 1003
    assert (y[3] == -1).all()


@pytest.mark.parametrize('sequences', [4, 5, 100])
def test_each_epoch_has_every_window_once(tmp_path, sequences):
    prepare(tmp_path)
    batches = Batches(Split(tmp_path, 'train'), 16, sequences, seed=7)
    n = 62  # (1003 - 1) // 16
    stream = np.concatenate([batches.indices(step) for step in range(3 * n // sequences + 1)])
    epochs = [stream[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert not np.array_equal(epochs[0], epochs[1])
    fresh = Batches(batches.split, 16, sequences, seed=7)
    assert np.array_equal(fresh.indices(1), stream[sequences : 2 * sequences])  # no memory of earlier steps
    assert not np.array_equal(Batches(batches.split, 16, sequences, seed=8).indices(0), stream[:sequences])


@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(tmp_path, world_size):
    prepare(tmp_path)
    split = Split(tmp_path, 'train')
    expected = Batches(split, 16, 8, seed=1)(20)
    ranks = [Batches(split, 16, 8, 1, rank, world_size)(20) for rank in range(world_size)]
    for i in range(2):
        assert np.array_equal(np.concatenate([rank[i] for rank in ranks]), expected[i])


def test_the_fingerprint_changes_with_any_token(tmp_path):
    prints = set()
    for i in range(3):
        changed = TOKENS.copy()
        changed[i] = 0
        prints |= {fingerprint(prepare(tmp_path, train=changed)), fingerprint(prepare(tmp_path, val=changed))}
    assert len(prints) == 6


def truncate(folder):
    with open(folder / 'train_00001.bin', 'r+b') as file:
        file.truncate(700)


@pytest.mark.parametrize(
    'harm, named',
    [
        (lambda folder: (folder / 'meta.json').unlink(), 'prepare.py'),
        (lambda folder: (folder / 'meta.json').write_text('{'), 'meta.json is damaged'),
        (lambda folder: (folder / 'meta.json').write_text('{"encoding": "char"}'), 'meta.json is damaged'),
        (lambda folder: (folder / 'train_00001.bin').unlink(), 'train_00001.bin is missing'),
        (truncate, '700 bytes; meta.json says 400 tokens, 800 bytes'),
        (lambda folder: prepare(folder, vocab_size=50_000), 'beyond the vocabulary of 50000'),
        (lambda folder: prepare(folder, train=TOKENS[:16]), 'fewer than one window of 16'),
        (
            lambda folder: (folder / 'meta.json').write_text(
                (folder / 'meta.json').read_text().replace('train_00000', '../train_00000')
            ),
            'not a plain file name',
        ),
    ],
)
def test_damage_is_refused_with_its_name(tmp_path, harm, named):
    prepare(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=named):
        batches = Batches(Split(tmp_path, 'train'), 16, 62, seed=0)
        batches(0)
