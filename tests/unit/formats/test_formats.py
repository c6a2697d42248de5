"""Foreign formats against their descriptions and their own programs; what is refused of strangers' files."""

import json
import os
import shutil
import socket
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from core.checkpoint import load_model
from data.tokenizer import BPETokenizer, tokenizer_from_state
from data.tokenizer_files import FIRST, NORMAL, load_gpt2, tokenizer_of
from formats.gguf import GGUF
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.plain import Safetensors
from formats.pretrained import load_pretrained, open_tokenizer
from tests.helpers.models import GPT2_BLOCK, UNTIED, needs_export_packages, random_checkpoint
from tests.helpers.tokenizers import BUILT_IN_STORIES as STORIES
from tests.helpers.tokenizers import gpt2_file, trained_tokenizer

pytestmark = needs_export_packages
NASTY = ['', ' ', 'x', '  two  spaces   ', '\u2581a\u2581', '\r\n\t\n', 'caf\u00e9 e\u0301\x00a\ufffd',
         '<s></s><unk> <0x41><blank> <middle><|endoftext|>', "It's I'LL \U0001f600 \u4f60\ufb01\u3000\u00a0"]
ANY_TEXT = (st.text(st.characters(exclude_categories=['Cs'])) | st.text(' aeT"t.\n\u2581<s>')
            | st.sampled_from(STORIES + NASTY))
HUGE, WEIGHTS, HF = 2**31 - 1, 'model.safetensors', HuggingFace()


def write(fmt, tokenizer, path, **choices):
    checkpoint = random_checkpoint(tokenizer, **choices)
    fmt.write(path, checkpoint, tokenizer)
    return checkpoint


@pytest.mark.parametrize('fmt, block, encoding', [
    *((Llama2c(), block, encoding) for block in ({}, UNTIED) for encoding in ('char', 'bpe', 'lossy')),
    *((fmt, block, encoding) for fmt in (HF, Safetensors()) for block, encoding in (
        ({}, 'char'), (UNTIED, 'bpe'), ({'bias': True}, 'bpe'), ({}, 'lossy'), (GPT2_BLOCK | UNTIED, 'char'),
        (GPT2_BLOCK, 'gpt2')))])
def test_there_and_back_is_exact(tmp_path, fmt, block, encoding):
    tokenizer = trained_tokenizer(encoding)
    checkpoint = write(fmt, tokenizer, tmp_path, **block)
    path = tmp_path / 'model.bin' if isinstance(fmt, Llama2c) else tmp_path
    back = load_pretrained(path)
    assert back['config'] == checkpoint['config'] and (back['settings'], back['iter']) == ({}, 0)
    torch.testing.assert_close(back['model'], dict(checkpoint['model']), rtol=0, atol=0)
    for read in tokenizer_from_state(back['tokenizer']), open_tokenizer(path):
        assert (read.encoding, read.vocab_size) == (tokenizer.encoding, tokenizer.vocab_size)
        assert read.lossless == (encoding != 'lossy')
        assert all(read.encode(text) == tokenizer.encode(text) for text in STORIES[:9] + NASTY)


def test_which_path_is_what(tmp_path):
    checkpoint, bpe = random_checkpoint(trained_tokenizer('char')), trained_tokenizer('bpe')
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    assert open_tokenizer(str(tmp_path)).state() == checkpoint['tokenizer']
    torch.save(checkpoint | {'iter': 2}, tmp_path / 'best.pt')
    assert load_pretrained(str(tmp_path))['iter'] == 2 and load_pretrained(tmp_path / 'ckpt.pt')['iter'] == 3
    bpe.save(tmp_path)
    assert open_tokenizer(tmp_path / 'tokenizer.model').state() == bpe.state()
    for read, what in (open_tokenizer, r'tokenizer: .* vocab.json'), (load_pretrained, 'model to begin with'):
        with pytest.raises(UserError, match=f'absent is no {what}'):
            read(tmp_path / 'absent')


def in_order(checkpoint, version):
    """[(name, tensor)] as memory_map_weights of llama2.c's run.c and runq.c walks over them: row 2 i of a
    head of q and k is our row i, row 2 i + 1 our row i + 4."""
    matrices = [f'blocks.{i}.{name}.weight' for name in (
        'attn.q', 'attn.k', 'attn.v', 'attn.proj', 'mlp.gate', 'mlp.proj', 'mlp.up') for i in range(2)]
    attn, mlp = ([f'blocks.{i}.{name}_norm.weight' for i in range(2)] for name in ('attn', 'mlp'))
    order = [*attn, *mlp, 'norm.weight', 'embedding.weight', *matrices] if version else [
        'embedding.weight', *attn, *matrices[:8], *mlp, *matrices[8:], 'norm.weight', 'cos', 'sin']
    order += [] if checkpoint['config']['tie_embeddings'] else ['lm_head.weight']
    angle = np.outer(np.arange(64), 10000 ** (-np.arange(0, 8, 2) / 8))
    weights = {name: w.numpy() for name, w in checkpoint['model'].items()}
    weights |= {'cos': np.cos(angle), 'sin': np.sin(angle)}
    for name in matrices[:4]:
        weights[name] = weights[name].reshape(-1, 8, 32)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(-1, 32)
    return [(name, weights[name]) for name in order]


@pytest.mark.parametrize('int8, tied', [(False, True), (False, False), (True, True), (True, False)])
def test_each_tensor_lies_where_run_reads_it(tmp_path, int8, tied):
    checkpoint = write(Llama2c(int8), trained_tokenizer('char'), tmp_path, tie_embeddings=tied)
    data, n = (tmp_path / 'model.bin').read_bytes(), checkpoint['config']['vocab_size']
    head = struct.pack('<7i', 32, 48, 2, 4, 2, n if tied else -n, 64)
    if int8:
        head = struct.pack('<4si7iBi', b'24ka', 2, 32, 48, 2, 4, 2, n, 64, tied, 16).ljust(256, b'\0')
    assert data.startswith(head)
    offset, back = len(head), dict(in_order(load_pretrained(tmp_path / 'model.bin'), int8))
    for name, w in in_order(checkpoint, int8):
        if int8 and w.ndim == 2:
            scale = np.frombuffer(data, '<f4', w.size // 16, offset + w.size)[:, None]
            found = (np.frombuffer(data, 'i1', w.size, offset).reshape(-1, 16) * scale).reshape(w.shape)
            np.testing.assert_allclose(127 * scale, abs(w).reshape(-1, 16).max(1, keepdims=True), rtol=1e-6)
            assert (abs(found - w).reshape(-1, 16) <= 0.5001 * scale).all()
            offset += w.size * 5 // 4
        else:
            found = np.frombuffer(data, '<f4', w.size, offset).reshape(w.shape)
            np.testing.assert_allclose(found, w, atol=1e-6)
            offset += w.size * 4
        np.testing.assert_allclose(back[name], found, atol=1e-6)
    assert offset == len(data)


@pytest.mark.parametrize('encoding', ['char', 'bpe'])
def test_run_reads_any_text_as_we_do(tmp_path, encoding):
    tokenizer = trained_tokenizer(encoding)
    write(Llama2c(), tokenizer, tmp_path)
    data, offset, pieces, scores = (tmp_path / 'tokenizer.bin').read_bytes(), 4, [], []
    while offset < len(data):
        score, length = struct.unpack_from('<fi', data, offset)
        offset += 8 + length
        pieces, scores = [*pieces, data[offset - length:offset]], [*scores, score]
    # `run` ends at an empty piece, and looks for as many as the model has rows
    assert len(pieces) == tokenizer.vocab_size and all(pieces) and pieces[-1] == b'\0<middle>'
    assert struct.unpack_from('<i', data) == (max(map(len, pieces)),)
    ids = {piece: i for i, piece in enumerate(pieces)}
    texts = [piece.partition(b'\0')[0] for piece in pieces]  # as C sees them

    @settings(max_examples=100, deadline=None)
    @given(text=ANY_TEXT)
    def same(text):
        tokens = [1] + ([ids[b' ']] if text else [])
        for char in map(str.encode, text[:200]):
            tokens += [ids[char]] if char in ids else [3 + byte for byte in char]
        while True:  # merge the pair whose union scores highest
            unions = [ids.get(texts[a] + texts[b], 0) for a, b in pairwise(tokens)]
            i = max(range(len(unions)), key=lambda i: scores[unions[i]], default=None)
            if i is None or scores[unions[i]] <= -1e10:
                break
            tokens[i:i + 2] = [unions[i]]
        assert tokens == [1, *tokenizer.encode(text[:200])]

    same()


def test_a_pretrained_llama2c_model(tmp_path):
    """Version 1, with a tokenizer that knows no infilling: its rows are the mean of the others."""
    bpe, path = trained_tokenizer('bpe'), tmp_path / 'stories.bin'
    checkpoint = random_checkpoint(bpe, vocab_size=598)
    head = struct.pack('<4si7iB', b'24ka', 1, 32, 48, 2, 4, 2, 598, 64, 1).ljust(256, b'\0')
    path.write_bytes(head + b''.join(w.tobytes() for _, w in in_order(checkpoint, 1)))
    with pytest.raises(UserError, match=r'no tokenizer.bin and no tokenizer.model'):
        load_pretrained(path)
    BPETokenizer.train(STORIES, 700).save(tmp_path)
    with pytest.raises(UserError, match='598 rows for 698 tokens'):
        load_pretrained(path)
    bpe.save(tmp_path)
    back = load_pretrained(path)
    assert back['config']['vocab_size'] == bpe.vocab_size and back['tokenizer'] == bpe.state()
    for name, w in checkpoint['model'].items():
        assert torch.equal(back['model'][name][:len(w)], w)
        assert all(torch.allclose(row, w.mean(0)) for row in back['model'][name][len(w):])
    write(Llama2c(), trained_tokenizer('char'), tmp_path)  # its tokenizer.bin is looked for before tokenizer.model
    assert load_pretrained(tmp_path / 'model.bin')['tokenizer']['encoding'] == 'char'


def test_a_piece_of_128_bytes_keeps_its_length():
    pieces = [('a' * 2**i, float(i), NORMAL) for i in range(8)]
    assert tokenizer_of([*FIRST, *pieces]).encode('a' * 128)[-1] == len(FIRST) + 7


@pytest.mark.parametrize('encoding', ['char', 'bpe', 'gpt2'])
@pytest.mark.parametrize('fmt', [HF, GGUF()])
def test_their_own_program_reads_any_text_as_we_do(tmp_path, fmt, encoding):
    tokenizer, path = trained_tokenizer(encoding), tmp_path if fmt.files else tmp_path / 'model.gguf'
    write(fmt, tokenizer, path)
    fmt.read(path)
    if fmt.files:  # for `generate`: a story ends where the next would begin
        assert fmt.model.generation_config.eos_token_id == tokenizer.delimiter

    @settings(max_examples=100 if fmt.files else 30, deadline=None)
    @given(text=ANY_TEXT if fmt.files else  # U+2581 is a space to llama.cpp
           st.sampled_from([text for text in STORIES[:10] + NASTY if '\u2581' not in text]))
    def same(text):
        ids = [tokenizer.delimiter, *tokenizer.encode(text)]
        assert fmt.encode(text) == ids and fmt.decode(ids) == text

    same()


@pytest.mark.parametrize('encoding', ['bpe', 'gpt2'])
def test_a_pretrained_folder(tmp_path, encoding):
    """As transformers writes it, in many files, with rows that no token has; as GPT-2 is published, pickled
    and without its head."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = trained_tokenizer(encoding)
    shape = {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4}
    model = (GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64)) if encoding == 'gpt2'
             else LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=640)))
    for p in model.eval().parameters():
        torch.nn.init.normal_(p, std=0.15, mean=float(p.dim() == 1))
    if encoding == 'bpe':
        model.save_pretrained(tmp_path, max_shard_size='20KB')
        tokenizer.save(tmp_path)
    else:
        model.config.save_pretrained(tmp_path)
        torch.save(model.transformer.state_dict(), tmp_path / 'pytorch_model.bin')
        shutil.copy(gpt2_file('encoder.json'), tmp_path / 'vocab.json')
        shutil.copy(gpt2_file('vocab.bpe'), tmp_path / 'merges.txt')
    back = load_pretrained(tmp_path)
    assert back['config']['vocab_size'] == tokenizer.vocab_size and back['tokenizer'] == tokenizer.state()
    ids, own = torch.arange(50, 590, 10)[None], tokenizer.vocab_size - 2
    torch.testing.assert_close(
        load_model(back)(ids)[..., :own], model(ids).logits[..., :own], rtol=0, atol=1e-4)


def test_a_folder_as_llama_has_it(tmp_path):
    """U+2581 for a space, and merges as text; a config of today, that leaves out what is usual."""
    bpe, path, config = trained_tokenizer('bpe'), tmp_path / 'tokenizer.json', tmp_path / 'config.json'
    checkpoint = write(HF, bpe, tmp_path, **UNTIED, norm_eps=1e-6, rope_theta=500.0)
    model, spell = json.loads(path.read_text())['model'], lambda text: text.replace(' ', '\u2581')
    model['vocab'] = {spell(text): i for text, i in model['vocab'].items()}
    model['merges'] = [' '.join(map(spell, pair)) for pair in model['merges']]
    path.write_text(json.dumps({'model': model}))
    (tmp_path / 'vocab.json').write_text('{}')  # tokenizer.json is looked at first
    assert all(open_tokenizer(tmp_path).encode(text) == bpe.encode(text) for text in STORIES[:9] + NASTY)
    usual = 'rope_theta', 'rms_norm_eps', 'tie_word_embeddings', 'mlp_bias', 'hidden_act'
    about = {name: value for name, value in json.loads(config.read_text()).items() if name not in usual}
    config.write_text(json.dumps(about | {'rope_parameters': {'rope_type': 'default', 'rope_theta': 500.0}}))
    assert load_pretrained(tmp_path)['config'] == checkpoint['config']
    path.unlink()
    (tmp_path / 'vocab.json').unlink()
    assert load_pretrained(tmp_path)['tokenizer'] is None


class Payload:
    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.mark.parametrize('fmt, file, harm, message', [
    *((HF, 'config.json', harm, message) for harm, message in (
        ({'model_type': 'bert'}, "has model_type 'bert'"), ({'rope_scaling': {'type': 'linear'}}, "'linear'"),
        ({'hidden_act': 'gelu'}, "has hidden_act 'gelu'; a model of ours has 'silu'"),
        ({'rope_scaling': {'rope_type': 'llama3'}}, "'llama3'"), (b'{', 'config.json is damaged'),
        ({'intermediate_size': 40}, 'where the config has 23,936'), ({'hidden_size': '32'}, 'damaged'),
        ({'num_hidden_layers': 3}, 'where the config has 33,216'), ({'num_attention_heads': 0}, 'damaged'),
        ({'num_hidden_layers': HUGE}, 'damaged'), ({'max_position_embeddings': HUGE}, 'damaged'))),
    (HF, 'tokenizer.json', {'model': {'vocab': {'a': 0, 'b': 2}}}, 'tokenizer.json is damaged'),
    (HF, WEIGHTS, None, r'no model.safetensors and no pytorch_model.bin'), (HF, WEIGHTS, -8, 'is damaged'),
    (HF, WEIGHTS, Payload(), r'pytorch_model.bin is damaged'), (Safetensors(), WEIGHTS, -8, 'is damaged'),
    (Safetensors(), 'tokenizer.json', b'[" ", "a"]', 'tokenizer.json is of another model'),
    *((Llama2c(), 'model.bin', harm, 'model.bin is damaged') for harm in (
        b'', 99, -4, bytes(28), b'Once upon. ' * 99, b'24ka\7\0\0\0' + bytes(999),
        struct.pack('<7i', *[HUGE] * 7), struct.pack('<7i', 32, 48, HUGE, 4, 2, 300, 64),
        struct.pack('<4si7iBi', b'24ka', 2, 32, 48, HUGE, 4, 2, 300, 64, 1, 16) + bytes(999))),
    *((Llama2c(), 'tokenizer.bin', harm, 'tokenizer.bin is damaged') for harm in (
        b'', 200, -3, struct.pack('<ifi', 9, 0, HUGE) + bytes(9), struct.pack('<ifi', 9, 0, -8) + bytes(9)))])
def test_what_strangers_may_do(tmp_path, monkeypatch, fmt, file, harm, message):
    monkeypatch.chdir(tmp_path)
    write(fmt, trained_tokenizer('char'), tmp_path)
    content = Path(file).read_bytes()
    Path(file).unlink()
    if isinstance(harm, Payload):
        torch.save({'lm_head.weight': harm}, 'pytorch_model.bin')
    elif harm is not None:
        Path(file).write_bytes(json.dumps(json.loads(content) | harm).encode() if isinstance(harm, dict) else
                               content[:harm] if isinstance(harm, int) else harm)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained('model.bin' if isinstance(fmt, Llama2c) else '.')
    assert '\n' not in str(error.value) and not Path('ran').exists()


def test_gpt2_files_as_they_are_found(tmp_path):
    """Any of them, by itself or in a folder with a config and no model, in the cache of Hugging Face too."""
    merges = gpt2_file('vocab.bpe').read_text(encoding='utf-8')
    vocab = json.dumps(json.loads(gpt2_file('encoder.json').read_bytes()), indent=1)
    pairs = [line.split(' ') for line in merges.splitlines()[1:]]
    whole = json.dumps({'version': '1.0', 'added_tokens': [{'id': 50256, 'content': '<|endoftext|>'}],
                        'model': {'type': 'BPE', 'vocab': json.loads(vocab), 'merges': pairs}})
    files = {'vocab.json': vocab, 'encoder.json': vocab, 'tokenizer.json': whole, 'vocab.bpe': merges,
             'merges.txt': merges.replace('\n', '\r\n')}
    for name, content in files.items():
        cache = tmp_path / name / 'hub'
        folder = cache / 'models--gpt2' / 'snapshots' / '607a30d'
        folder.mkdir(parents=True)
        (cache / 'models--other--one' / 'snapshots' / 'f').mkdir(parents=True)
        (folder.parent / 'older').mkdir()
        (folder / name).write_bytes(content.encode())
        (folder / 'config.json').write_text('{"model_type": "gpt2", "n_layer": 12}')
        for path in folder / name, folder, cache / 'models--gpt2', cache, cache.parent:
            assert open_tokenizer(path).state() == trained_tokenizer('gpt2').state()
        with pytest.raises(UserError, match=r'has no model\.safetensors'):
            load_pretrained(cache)
    for name, harm in (
            ('merges.txt', merges.replace('h e\n', '', 1)), ('merges.txt', merges + '\u0120 \u03a9\n'),
            ('vocab.json', vocab.replace('"!"', '"!!!!!"')), ('tokenizer.json', whole[:-9])):
        (tmp_path / name / name).write_text(harm, encoding='utf-8')
        with pytest.raises(UserError, match=f"{name} is (not GPT-2's|damaged)"):
            open_tokenizer(tmp_path / name / name)


def test_gpt2_is_downloaded_into_the_cache_and_read_there(tmp_path, monkeypatch):
    def no_network(*args, **options):
        raise OSError('no network')

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    for offline, message in (False, r'downloaded \(ConnectionError\)'), (True, rf"'s\) or {tmp_path}"):
        monkeypatch.setattr(socket, 'getaddrinfo', None if offline else no_network)  # None: nobody asks
        with pytest.raises(UserError, match=rf'{message}: .*hf download gpt2 .* --tokenizer gpt2'):
            load_gpt2(offline)
    snapshot = tmp_path / 'models--openai-community--gpt2' / 'snapshots' / '607a30d'
    snapshot.mkdir(parents=True)
    shutil.copy(gpt2_file('encoder.json'), snapshot / 'vocab.json')
    assert load_gpt2().state() == trained_tokenizer('gpt2').state()
    shutil.rmtree(snapshot)
    with monkeypatch.context() as online:
        online.setattr(requests, 'head', lambda url, timeout: None)
        online.setattr(tiktoken.load, 'read_file', lambda url: gpt2_file(url.split('/')[-1]).read_bytes())
        load_gpt2()
    monkeypatch.setattr(socket, 'socket', no_network)
    assert load_gpt2(offline=True).state() == load_gpt2().state() == trained_tokenizer('gpt2').state()
