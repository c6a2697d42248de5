"""What several formats share: importers, checks of weights, and our own bugs, which keep their traceback."""

import pytest
import torch

from configurator import UserError
from core.checkpoint import load_model
from data.tokenizer import tokenizer_from_state
from formats import base
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.plain import Safetensors
from formats.pretrained import load_pretrained
from model import GPTConfig
from tests.helpers.models import (
    GPT2_BLOCK,
    UNTIED,
    needs_export_packages,
    random_checkpoint,
    write_random_model,
)
from tests.helpers.tokenizers import BUILT_IN_STORIES, NASTY, trained_tokenizer

LLAMA2C_CASES = [(block, encoding) for block in ({}, UNTIED) for encoding in ('char', 'bpe', 'lossy')]
FOLDER_CASES = [({}, 'char'), (UNTIED, 'bpe'), ({'bias': True}, 'bpe'), ({}, 'lossy'),
                (GPT2_BLOCK | UNTIED, 'char'), (GPT2_BLOCK, 'gpt2')]


@needs_export_packages
@pytest.mark.parametrize('fmt, block, encoding', [
    *((Llama2c(), *case) for case in LLAMA2C_CASES),
    *((HuggingFace(), *case) for case in FOLDER_CASES),
    *((Safetensors(), *case) for case in FOLDER_CASES)])
def test_importers_load_exactly_what_was_written(tmp_path, fmt, block, encoding):
    tokenizer = trained_tokenizer(encoding)
    checkpoint = write_random_model(fmt, tokenizer, tmp_path, **block)
    loaded = load_pretrained(tmp_path / 'model.bin' if isinstance(fmt, Llama2c) else tmp_path)
    assert loaded['config'] == checkpoint['config']
    assert loaded['settings'] == {} and loaded['iter'] == 0
    torch.testing.assert_close(loaded['model'], dict(checkpoint['model']), rtol=0, atol=0)
    loaded_tokenizer = tokenizer_from_state(loaded['tokenizer'])
    assert loaded_tokenizer.encoding == tokenizer.encoding
    assert loaded_tokenizer.vocab_size == tokenizer.vocab_size
    assert loaded_tokenizer.lossless == (encoding != 'lossy')
    for text in BUILT_IN_STORIES[:9] + NASTY:
        assert loaded_tokenizer.encode(text) == tokenizer.encode(text)


class MemoryImporter(base.Importer):
    """An importer whose file is in memory."""

    def __init__(self, checkpoint, tokenizer=None):
        self.checkpoint = checkpoint
        self.tokenizer = tokenizer

    def load_weights(self, path):
        return GPTConfig(**self.checkpoint['config']), dict(self.checkpoint['model'])

    def load_tokenizer(self, path):
        return self.tokenizer


def test_importer_accepts_a_file_that_also_holds_a_tied_head():
    checkpoint = random_checkpoint(trained_tokenizer('char'))
    checkpoint['model']['lm_head.weight'] = checkpoint['model']['embedding.weight'].clone()
    loaded = MemoryImporter(checkpoint).load('x')
    assert loaded['model']['lm_head.weight'] is loaded['model']['embedding.weight']
    assert loaded['config']['tie_embeddings'] and loaded['tokenizer'] is None


def test_importer_uses_a_head_that_is_not_the_embedding_whatever_the_config_says():
    checkpoint = random_checkpoint(trained_tokenizer('char'))
    head = torch.rand_like(checkpoint['model']['embedding.weight'])
    checkpoint['model']['lm_head.weight'] = head
    loaded = MemoryImporter(checkpoint).load('x')
    assert not loaded['config']['tie_embeddings']
    assert torch.equal(load_model(loaded).lm_head.weight, head)


@pytest.mark.parametrize('name, change, message', [
    ('norm.weight', None, 'norm.weight is missing'),
    ('norm.bias', torch.zeros(32), 'the config has no place for norm.bias'),
    ('norm.weight', torch.ones(31), r'norm.weight has the shape \[31\]'),
    ('norm.weight', torch.ones(32, dtype=torch.int8), 'norm.weight is not a tensor of real numbers')])
def test_importer_rejects_weights_that_do_not_fit_the_config(name, change, message):
    checkpoint = random_checkpoint(trained_tokenizer('char'))
    checkpoint['model'][name] = change
    if change is None:
        del checkpoint['model'][name]
    with pytest.raises(UserError, match=f'x is damaged or not what it should be: .*{message}'):
        MemoryImporter(checkpoint).load('x')


@pytest.mark.parametrize('tied', [True, False])
def test_importer_gives_infilling_tokens_the_mean_row(tied):
    tokenizer = trained_tokenizer('char')
    n_tokens = tokenizer.vocab_size - 2
    checkpoint = random_checkpoint(tokenizer, vocab_size=n_tokens + 7, tie_embeddings=tied)  # padded rows
    loaded = MemoryImporter(checkpoint, tokenizer).load('x')
    assert loaded['config']['vocab_size'] == tokenizer.vocab_size
    for name in 'embedding.weight', 'lm_head.weight':
        rows, original = loaded['model'][name], checkpoint['model'][name]
        assert torch.equal(rows[:n_tokens], original[:n_tokens])
        assert len(rows) == n_tokens + 2
        torch.testing.assert_close(rows[n_tokens:], original[:n_tokens].mean(0).expand(2, -1))


def chat_tokens_in_tokenizer_json(folder, tokenizer):
    file = folder / 'tokenizer.json'
    text = file.read_text()
    assert text.count('"<blank>"') == text.count('"<middle>"') == 1
    file.write_text(text.replace('<blank>', '<|im_start|>').replace('<middle>', '<|im_end|>'))


def tokenizer_model_without_infilling(folder, tokenizer):
    (folder / 'tokenizer.bin').unlink(missing_ok=True)
    tokenizer.save(folder)


@needs_export_packages
@pytest.mark.parametrize('fmt, change', [
    (HuggingFace(), chat_tokens_in_tokenizer_json),
    (HuggingFace(), tokenizer_model_without_infilling),
    (Llama2c(), tokenizer_model_without_infilling)])
def test_two_rows_more_are_those_of_infilling_only_if_the_tokenizer_says_so(tmp_path, fmt, change):
    """A model with two tokens for chats has as many rows."""
    tokenizer = trained_tokenizer('bpe')
    checkpoint = write_random_model(fmt, tokenizer, tmp_path)
    change(tmp_path, tokenizer)
    loaded = load_pretrained(tmp_path / 'model.bin' if isinstance(fmt, Llama2c) else tmp_path)
    assert tokenizer_from_state(loaded['tokenizer']).vocab_size == tokenizer.vocab_size
    rows = loaded['model']['embedding.weight']
    original = checkpoint['model']['embedding.weight']
    assert rows.shape == original.shape
    assert torch.equal(rows[:-2], original[:-2])
    torch.testing.assert_close(rows[-2:], original[:-2].mean(0).expand(2, -1))


def test_importer_rejects_the_tokenizer_of_a_larger_model():
    tokenizer = trained_tokenizer('char')
    checkpoint = random_checkpoint(tokenizer, vocab_size=tokenizer.vocab_size - 3)
    with pytest.raises(UserError, match=r'rows for .* tokens: put the tokenizer of this model next to it'):
        MemoryImporter(checkpoint, tokenizer).load('x')


@pytest.mark.parametrize('error', [NameError, AttributeError, TypeError, KeyError, ValueError])
def test_a_bug_in_our_own_logic_keeps_its_traceback(monkeypatch, error):
    def buggy(*_):
        raise error('a bug')

    tokenizer = trained_tokenizer('char')
    checkpoint = random_checkpoint(tokenizer, vocab_size=tokenizer.vocab_size - 2)
    monkeypatch.setattr(base, 'add_infilling_rows', buggy)
    with pytest.raises(error, match='a bug'):
        MemoryImporter(checkpoint, tokenizer).load('x')


def test_own_weights_are_float32_without_a_tied_head():
    checkpoint = random_checkpoint(trained_tokenizer('char'))
    checkpoint['model'] = {name: w.bfloat16() for name, w in checkpoint['model'].items()}
    weights = base.own_weights(checkpoint)
    assert weights.keys() == checkpoint['model'].keys() - {'lm_head.weight'}
    for name, w in weights.items():
        assert w.dtype == torch.float32 and torch.equal(w, checkpoint['model'][name].float())
    checkpoint['config']['tie_embeddings'] = False
    assert base.own_weights(checkpoint).keys() == checkpoint['model'].keys()


def test_interleaving_pairs_the_rows_that_rotate_together():
    """With a head_dim of 8, rows 0 and 4, 1 and 5 ... of each head of q and k become neighbours."""
    config = GPTConfig(n_head=2, n_kv_head=1, n_embd=16)
    q, k = torch.arange(16.0)[:, None].expand(16, 16), torch.arange(8.0)
    weights = {'blocks.0.attn.q.weight': q, 'blocks.0.attn.k.bias': k, 'blocks.0.attn.v.weight': q}
    interleaved = base.to_interleaved(config, weights)
    assert interleaved['blocks.0.attn.q.weight'][:, 0].tolist() == [
        0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert interleaved['blocks.0.attn.k.bias'].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleaved['blocks.0.attn.v.weight'] is q
    for name, w in base.from_interleaved(config, interleaved).items():
        assert torch.equal(w, weights[name])


def test_block_incompatibilities_name_each_difference_and_a_way_out():
    config = GPTConfig(mlp='relu2', qk_norm=True)
    block = {'norm': 'rms', 'mlp': 'swiglu', 'qk_norm': False}
    assert base.block_incompatibilities(config, block) == [
        ('mlp relu2, qk_norm True', 'train config/tiny_stories.py with --mlp swiglu --qk_norm False')]
    [(_, way_out)] = base.block_incompatibilities(config, {'norm': 'layer'})
    assert way_out == 'train config/gpt2_89m.py with --norm layer'
    assert base.block_incompatibilities(config, {'mlp': 'relu2'}) == []


@pytest.mark.parametrize('content', [b'{', b'[]', b'1', b'\xff', b'[' * 99999])
def test_read_json_object_rejects_anything_else(tmp_path, content):
    (tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(UserError, match=r'config\.json is damaged'):
        base.read_json_object(tmp_path / 'config.json')
    with pytest.raises(UserError, match=r'absent\.json is damaged'):
        base.read_json_object(tmp_path / 'absent.json')
