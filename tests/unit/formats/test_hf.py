"""Hugging Face folders, against transformers and as others publish them."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings

from configurator import UserError
from core.checkpoint import load_model
from formats.hf import HuggingFace
from formats.pretrained import load_pretrained
from tests.helpers.models import UNTIED, damage_file, needs_export_packages, write_random_model
from tests.helpers.tokenizers import any_text, gpt2_file, trained_tokenizer

pytestmark = needs_export_packages
HUGE = 2**31 - 1


@pytest.mark.parametrize('encoding', ['char', 'bpe', 'gpt2'])
def test_transformers_tokenizes_any_text_as_we_do(tmp_path, encoding):
    tokenizer = trained_tokenizer(encoding)
    fmt = HuggingFace()
    write_random_model(fmt, tokenizer, tmp_path)
    fmt.read(tmp_path)

    @settings(max_examples=100, deadline=None)
    @given(any_text)
    def check(text):
        ids = [tokenizer.delimiter, *tokenizer.encode(text)]
        assert fmt.encode(text) == ids
        assert fmt.decode(ids) == text

    check()


def test_transformers_stops_where_the_next_story_would_begin(tmp_path):
    fmt = HuggingFace()
    write_random_model(fmt, trained_tokenizer('char'), tmp_path)
    fmt.read(tmp_path)
    generation = fmt.model.generation_config
    assert generation.eos_token_id == generation.bos_token_id == trained_tokenizer('char').delimiter
    assert generation.do_sample and (generation.temperature, generation.top_p) == (0.8, 0.95)
    assert generation.max_length == 64


def check_same_logits(path, model, tokenizer):
    """Compare what we load from `path` with a model of transformers, on ids that have a token."""
    loaded = load_pretrained(path)
    assert loaded['tokenizer'] == tokenizer.state()
    assert loaded['config']['vocab_size'] == tokenizer.vocab_size
    n_tokens = tokenizer.vocab_size - 2
    ids = torch.arange(50, 590, 10)[None]
    ours = load_model(loaded)(ids)[..., :n_tokens]
    theirs = model(ids).logits[..., :n_tokens]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def randomize(model):
    torch.manual_seed(0)
    for p in model.eval().parameters():
        torch.nn.init.normal_(p, std=0.15, mean=float(p.dim() == 1))


def test_load_reads_a_llama_in_many_files_with_padded_rows(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = trained_tokenizer('bpe')
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=640)
    model = LlamaForCausalLM(config)
    randomize(model)
    model.save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('model*.safetensors'))) > 1
    tokenizer.save(tmp_path)
    check_same_logits(tmp_path, model, tokenizer)


def test_load_reads_gpt2_as_it_is_published(tmp_path):
    """Pickled, without its head and without a prefix to its names, with the causal mask among the tensors."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64))
    randomize(model)
    model.config.save_pretrained(tmp_path)
    tensors = model.transformer.state_dict() | {'h.0.attn.bias': torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
    torch.save(tensors, tmp_path / 'pytorch_model.bin')
    shutil.copy(gpt2_file('encoder.json'), tmp_path / 'vocab.json')
    shutil.copy(gpt2_file('vocab.bpe'), tmp_path / 'merges.txt')
    check_same_logits(tmp_path, model, trained_tokenizer('gpt2'))


def test_load_takes_defaults_for_what_a_config_leaves_out(tmp_path):
    choices = UNTIED | {'norm_eps': 1e-6, 'rope_theta': 500.0}
    checkpoint = write_random_model(HuggingFace(), trained_tokenizer('bpe'), tmp_path, **choices)
    config = json.loads((tmp_path / 'config.json').read_text())
    for name in 'rope_theta', 'rms_norm_eps', 'tie_word_embeddings', 'mlp_bias', 'hidden_act':
        del config[name]
    config['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 500.0}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert load_pretrained(tmp_path)['config'] == checkpoint['config']


def test_load_does_not_need_a_tokenizer(tmp_path):
    write_random_model(HuggingFace(), trained_tokenizer('bpe'), tmp_path)
    (tmp_path / 'tokenizer.json').unlink()
    assert load_pretrained(tmp_path)['tokenizer'] is None


@pytest.mark.parametrize('damage, message', [
    (b'{', 'config.json is damaged'),
    (b'[]', 'config.json is damaged'),
    ({'model_type': 'bert'}, "has model_type 'bert'; only llama and gpt2"),
    ({'model_type': ['llama']}, 'only llama and gpt2'),
    ({'hidden_act': 'gelu'}, "has hidden_act 'gelu'; only 'silu' can be loaded"),
    ({'rope_scaling': {'type': 'linear'}}, "has rope_type 'linear'"),
    ({'rope_scaling': {'rope_type': 'llama3'}}, "has rope_type 'llama3'"),
    ({'rope_scaling': 'llama3'}, "rope_scaling is 'llama3'"),
    ({'hidden_size': '32'}, "n_embd is '32'"),
    ({'num_attention_heads': 0}, 'config.json is damaged'),
    ({'num_attention_heads': True}, 'n_head is True'),
    ({'intermediate_size': 40}, r'has the shape \[48, 32\], but the config makes it \[40, 32\]'),
    ({'num_hidden_layers': 3}, r'blocks\.2\.\S+ is missing'),
    ({'num_hidden_layers': 1}, r'no place for blocks\.1\.'),
    ({'num_hidden_layers': HUGE}, 'is damaged'),
    ({'max_position_embeddings': HUGE}, 'is damaged')])
def test_load_rejects_a_foreign_config_in_one_line(tmp_path, damage, message):
    write_random_model(HuggingFace(), trained_tokenizer('char'), tmp_path)
    damage_file(tmp_path / 'config.json', damage)
    with pytest.raises(UserError, match=message) as error:
        load_pretrained(tmp_path)
    assert '\n' not in str(error.value)


class Payload:
    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.mark.parametrize('content', [
    {'lm_head.weight': Payload()},
    [torch.zeros(3)],
    {1: torch.zeros(3)},
    {'lm_head.weight': 1},
    {'lm_head.weight': torch.zeros(3, 3).to_sparse()},
    {'transformer.h.0.attn.c_attn.weight': torch.zeros(())}])
def test_load_rejects_pickled_weights_that_are_not_tensors_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    torch.save(content, 'pytorch_model.bin')
    with pytest.raises(UserError, match='is damaged or not what it should be') as error:
        load_pretrained(tmp_path)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('damage, message', [
    (-8, r'model\.safetensors is damaged'),
    (None, r'has no model\.safetensors and no pytorch_model\.bin')])
def test_load_rejects_damaged_or_missing_weights(tmp_path, damage, message):
    write_random_model(HuggingFace(), trained_tokenizer('char'), tmp_path)
    damage_file(tmp_path / 'model.safetensors', damage)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def test_load_rejects_a_damaged_tokenizer(tmp_path):
    write_random_model(HuggingFace(), trained_tokenizer('char'), tmp_path)
    damage_file(tmp_path / 'tokenizer.json', {'model': {'vocab': {'a': 0, 'b': 2}}})
    with pytest.raises(UserError, match=r'tokenizer\.json is damaged'):
        load_pretrained(tmp_path)
