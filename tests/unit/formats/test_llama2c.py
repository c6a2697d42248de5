"""llama2.c's files, against what run.c and runq.c read."""

import struct
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from configurator import UserError
from data.tokenizer import BPETokenizer
from formats.llama2c import Llama2c, quantize
from formats.pretrained import load_pretrained
from tests.helpers.models import damage_file, random_checkpoint, write_random_model
from tests.helpers.tokenizers import BUILT_IN_STORIES, any_text, trained_tokenizer

HUGE = 2**31 - 1
HEADER_1 = struct.pack('<4si7iB', b'24ka', 1, 32, 48, 2, 4, 2, 598, 64, 1).ljust(256, b'\0')


def weights_in_order(checkpoint, version):
    """Return [(name, array)] as memory_map_weights of run.c and runq.c walks over them.

    Row 2i of a head of q and k is our row i, row 2i + 1 our row i + 4.
    """
    def both_layers(*modules):
        return [f'blocks.{layer}.{module}.weight' for module in modules for layer in range(2)]

    attention = both_layers('attn.q', 'attn.k', 'attn.v', 'attn.proj')
    mlp = both_layers('mlp.gate', 'mlp.proj', 'mlp.up')
    if version == 0:
        order = ['embedding.weight', *both_layers('attn_norm'), *attention, *both_layers('mlp_norm'), *mlp,
                 'norm.weight', 'cos', 'sin']
    else:
        order = [*both_layers('attn_norm', 'mlp_norm'), 'norm.weight', 'embedding.weight', *attention, *mlp]
    if not checkpoint['config']['tie_embeddings']:
        order.append('lm_head.weight')
    weights = {name: w.numpy() for name, w in checkpoint['model'].items()}
    angles = np.outer(np.arange(64), 10000 ** (-np.arange(0, 8, 2) / 8))
    weights['cos'] = np.cos(angles)
    weights['sin'] = np.sin(angles)
    for name in both_layers('attn.q', 'attn.k'):
        heads = weights[name].reshape(-1, 8, 32)
        weights[name] = heads[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1, 32)
    return [(name, weights[name]) for name in order]


@pytest.mark.parametrize('tied', [True, False])
def test_version_0_has_each_tensor_where_run_reads_it(tmp_path, tied):
    checkpoint = write_random_model(Llama2c(), trained_tokenizer('char'), tmp_path, tie_embeddings=tied)
    data = (tmp_path / 'model.bin').read_bytes()
    n = checkpoint['config']['vocab_size']
    assert struct.unpack_from('<7i', data) == (32, 48, 2, 4, 2, n if tied else -n, 64)
    offset = 28
    for _, w in weights_in_order(checkpoint, 0):
        np.testing.assert_allclose(np.frombuffer(data, '<f4', w.size, offset).reshape(w.shape), w, atol=1e-6)
        offset += 4 * w.size
    assert offset == len(data)


@pytest.mark.parametrize('tied', [True, False])
def test_version_2_has_each_tensor_where_runq_reads_it(tmp_path, tied):
    """Matrices as int8 and a scale for each 16 neighbours: 16 is the common divisor of 32, 48 and 64."""
    checkpoint = write_random_model(Llama2c(int8=True), trained_tokenizer('char'), tmp_path,
                                    tie_embeddings=tied)
    data = (tmp_path / 'model.bin').read_bytes()
    n = checkpoint['config']['vocab_size']
    header = struct.pack('<4si7iBi', b'24ka', 2, 32, 48, 2, 4, 2, n, 64, tied, 16)
    assert data.startswith(header.ljust(256, b'\0'))
    loaded = dict(weights_in_order(load_pretrained(tmp_path / 'model.bin'), 2))
    offset = 256
    for name, w in weights_in_order(checkpoint, 2):
        if w.ndim == 1:
            stored = np.frombuffer(data, '<f4', w.size, offset)
            np.testing.assert_array_equal(stored, w)
            offset += 4 * w.size
        else:
            groups = w.reshape(-1, 16)
            scales = np.frombuffer(data, '<f4', len(groups), offset + w.size)[:, None]
            integers = np.frombuffer(data, 'i1', w.size, offset).reshape(-1, 16)
            np.testing.assert_allclose(127 * scales, abs(groups).max(1, keepdims=True), rtol=1e-6)
            assert (abs(integers * scales - groups) <= 0.5001 * scales).all()
            stored = (integers * scales).reshape(w.shape)
            offset += w.size * 5 // 4
        np.testing.assert_allclose(loaded[name], stored, atol=1e-6)
    assert offset == len(data)


def test_load_rejects_a_table_of_other_rotary_positions(tmp_path):
    """Old versions of `run` used it, new ones and we compute with a rope_theta of 10,000."""
    write_random_model(Llama2c(), trained_tokenizer('char'), tmp_path, rope_theta=500.0)
    with pytest.raises(UserError, match='its table of rotary positions is not for a rope_theta of 10000'):
        load_pretrained(tmp_path / 'model.bin')


def test_quantize_keeps_zeros():
    integers, scales = quantize(np.zeros((2, 4), np.float32), 4)
    assert not integers.any() and not scales.any()


def read_tokenizer_bin(path):
    """Return the scores and the pieces of a tokenizer.bin, and the longest length that it claims."""
    data = path.read_bytes()
    [longest] = struct.unpack_from('<i', data)
    offset, scores, pieces = 4, [], []
    while offset < len(data):
        score, length = struct.unpack_from('<fi', data, offset)
        offset += 8 + length
        scores.append(score)
        pieces.append(data[offset - length:offset])
    return scores, pieces, longest


@pytest.mark.parametrize('encoding', ['char', 'bpe'])
def test_tokenizer_bin_has_a_piece_for_each_row_of_the_model(tmp_path, encoding):
    """`run` reads as many pieces as the model has rows, and stops writing at an empty one."""
    tokenizer = trained_tokenizer(encoding)
    write_random_model(Llama2c(), tokenizer, tmp_path)
    _, pieces, longest = read_tokenizer_bin(tmp_path / 'tokenizer.bin')
    assert len(pieces) == tokenizer.vocab_size
    assert all(pieces)
    assert pieces[-2:] == [b'\0<blank>', b'\0<middle>']
    assert longest == max(len(piece) for piece in pieces)


@pytest.mark.parametrize('encoding', ['char', 'bpe'])
def test_run_tokenizes_any_text_as_we_do(tmp_path, encoding):
    """Against the encoder of run.c, written out: bytes, then the pair whose union scores highest."""
    tokenizer = trained_tokenizer(encoding)
    write_random_model(Llama2c(), tokenizer, tmp_path)
    scores, pieces, _ = read_tokenizer_bin(tmp_path / 'tokenizer.bin')
    ids = {piece: i for i, piece in enumerate(pieces)}
    texts = [piece.partition(b'\0')[0] for piece in pieces]  # as strings of C

    @settings(max_examples=100, deadline=None)
    @given(text=any_text)
    def check(text):
        text = text[:200]
        tokens = [1]
        if text:
            tokens.append(ids[b' '])
        for char in text:
            data = char.encode()
            tokens += [ids[data]] if data in ids else [3 + byte for byte in data]
        while len(tokens) > 1:
            unions = [ids.get(texts[left] + texts[right], 0) for left, right in pairwise(tokens)]
            best = max(range(len(unions)), key=lambda i: scores[unions[i]])
            if scores[unions[best]] <= -1e10:
                break
            tokens[best:best + 2] = [unions[best]]
        assert tokens == [1, *tokenizer.encode(text)]

    check()


def write_version_1(path, checkpoint):
    """Write a model as llama2.c publishes them: without rows for infilling tokens."""
    weights = b''.join(w.tobytes() for _, w in weights_in_order(checkpoint, 1))
    path.write_bytes(HEADER_1 + weights)


def test_load_reads_version_1_and_adds_rows_for_infilling(tmp_path):
    bpe = trained_tokenizer('bpe')
    checkpoint = random_checkpoint(bpe, vocab_size=598)
    write_version_1(tmp_path / 'stories.bin', checkpoint)
    bpe.save(tmp_path)
    loaded = load_pretrained(tmp_path / 'stories.bin')
    assert loaded['config']['vocab_size'] == bpe.vocab_size == 600
    assert loaded['tokenizer'] == bpe.state()
    for name, w in checkpoint['model'].items():
        assert torch.equal(loaded['model'][name][:len(w)], w)
        for row in loaded['model'][name][len(w):]:
            torch.testing.assert_close(row, w.mean(0))


def test_load_needs_the_tokenizer_of_the_model(tmp_path):
    write_version_1(tmp_path / 'stories.bin', random_checkpoint(trained_tokenizer('bpe'), vocab_size=598))
    with pytest.raises(UserError, match=r'no tokenizer\.bin and no tokenizer\.model'):
        load_pretrained(tmp_path / 'stories.bin')
    BPETokenizer.train(BUILT_IN_STORIES, 700).save(tmp_path)
    with pytest.raises(UserError, match='598 rows for 698 tokens'):
        load_pretrained(tmp_path / 'stories.bin')


def test_load_prefers_tokenizer_bin_to_tokenizer_model(tmp_path):
    trained_tokenizer('bpe').save(tmp_path)
    write_random_model(Llama2c(), trained_tokenizer('char'), tmp_path)
    assert load_pretrained(tmp_path / 'model.bin')['tokenizer']['encoding'] == 'char'


def header_2(n_layer=2, group_size=16):
    header = struct.pack('<4si7iBi', b'24ka', 2, 32, 48, n_layer, 4, 2, 300, 64, 1, group_size)
    return header.ljust(256, b'\0')


@pytest.mark.parametrize('damage, message', [
    (b'', 'it ends after 0 bytes'),
    (99, 'it ends after 99 bytes'),
    (-4, 'it ends after'),
    (bytes(28), 'version 0'),
    (b'Once upon. ' * 99, ''),
    (b'24ka\7\0\0\0' + bytes(999), 'version 7'),
    (struct.pack('<7i', *[HUGE] * 7), ''),
    (struct.pack('<7i', 32, 48, HUGE, 4, 2, 300, 64), 'it ends after 28 bytes'),
    (header_2(n_layer=HUGE) + bytes(999), 'it ends after'),
    (header_2(group_size=-16) + bytes(99999), 'group size -16'),
    (header_2(group_size=7) + bytes(99999), 'group size 7 does not divide')])
def test_load_rejects_a_damaged_model_in_one_line(tmp_path, damage, message):
    write_random_model(Llama2c(), trained_tokenizer('char'), tmp_path)
    damage_file(tmp_path / 'model.bin', damage)
    with pytest.raises(UserError, match=rf'model\.bin is damaged.*{message}') as error:
        load_pretrained(tmp_path / 'model.bin')
    assert '\n' not in str(error.value)


def test_load_rejects_a_model_that_goes_on(tmp_path):
    write_random_model(Llama2c(), trained_tokenizer('char'), tmp_path)
    with open(tmp_path / 'model.bin', 'ab') as file:
        file.write(b'\0')
    with pytest.raises(UserError, match='it goes on after its 21 tensors'):
        load_pretrained(tmp_path / 'model.bin')


@pytest.mark.parametrize('damage', [
    b'', 200, -3, struct.pack('<ifi', 9, 0, HUGE) + bytes(9), struct.pack('<ifi', 9, 0, -8) + bytes(9)])
def test_load_rejects_a_damaged_tokenizer(tmp_path, damage):
    write_random_model(Llama2c(), trained_tokenizer('char'), tmp_path)
    damage_file(tmp_path / 'tokenizer.bin', damage)
    with pytest.raises(UserError, match=r'tokenizer\.bin is damaged'):
        load_pretrained(tmp_path / 'model.bin')
