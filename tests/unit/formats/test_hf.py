"""Hugging Face folders, against transformers and as others publish them."""

import json
import os
import re
import shutil

import pytest
import torch
from hypothesis import given, settings

from configurator import UserError
from core.checkpoint import load_model
from formats.families import GPT2, LLAMA
from formats.hf import HuggingFace
from formats.pretrained import load_pretrained
from tests.helpers.models import (
    GPT2_BLOCK,
    UNTIED,
    damage_file,
    needs_export_packages,
    write_random_model,
)
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


def llama(**changes):
    """Return a small Llama of transformers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
             'vocab_size': 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes))
    randomize(model)
    return model


def gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {'n_embd': 16, 'n_layer': 2, 'n_head': 2, 'n_positions': 64, 'vocab_size': 40}
    model = GPT2LMHeadModel(GPT2Config(**sizes | changes))
    randomize(model)
    return model


def check_loads(path, model):
    """Check that what we load from `path` predicts what a model of transformers does."""
    ids = torch.arange(3, 35)[None]
    torch.testing.assert_close(load_model(load_pretrained(path))(ids), model(ids).logits, rtol=0, atol=1e-4)


def save_changed(path, model, rename=str, add=None, remove=(), **config):
    """Save a model of transformers to `path`, with changed tensors and entries of config.json.

    rename: a function from a tensor's name to the one in the file. add: {name: tensor}. remove: names.
    """
    from safetensors.torch import save_file

    model.config.save_pretrained(path)
    damage_file(path / 'config.json', config)
    tensors = dict(add or {})
    for name, w in model.state_dict().items():
        if name not in remove:
            tensors[rename(name)] = w.clone()
    save_file(tensors, path / 'model.safetensors')


@pytest.mark.parametrize('make', [llama, gpt2])
def test_load_uses_a_head_of_its_own_in_a_model_that_claims_to_be_tied(tmp_path, make):
    from transformers import AutoModelForCausalLM

    save_changed(tmp_path, make(tie_word_embeddings=False), tie_word_embeddings=True)
    check_loads(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize('make', [llama, gpt2])
@pytest.mark.parametrize('remove', ['lm_head.weight', 'embedding'])
def test_load_reads_a_tied_matrix_that_is_stored_once(tmp_path, make, remove):
    """safetensors' own save_model keeps the head and not the embedding."""
    model = make(tie_word_embeddings=True)
    embedding = 'model.embed_tokens.weight' if make is llama else 'transformer.wte.weight'
    save_changed(tmp_path, model, remove=[embedding if remove == 'embedding' else remove])
    check_loads(tmp_path, model)
    assert load_pretrained(tmp_path)['config']['tie_embeddings']


@pytest.mark.parametrize('make, prefix, replacement', [
    (llama, '^', '_orig_mod.'),
    (llama, '^', 'module.'),
    (llama, '^', 'model._orig_mod.'),
    (llama, '^model[.]', ''),
    (llama, 'self_attn', '_orig_mod.self_attn'),
    (gpt2, '^', 'module.'),
    (gpt2, '^transformer[.]', '')])
def test_load_reads_names_that_wrappers_changed(tmp_path, make, prefix, replacement):
    model = make(tie_word_embeddings=False)
    save_changed(tmp_path, model, lambda name: re.sub(prefix, replacement, name))
    check_loads(tmp_path, model)


@pytest.mark.parametrize('attention_bias, mlp_bias', [(True, False), (False, True), (True, True)])
def test_load_reads_a_llama_with_biases_on_one_side(tmp_path, attention_bias, mlp_bias):
    model = llama(attention_bias=attention_bias, mlp_bias=mlp_bias)
    save_changed(tmp_path, model)
    check_loads(tmp_path, model)


ZERO = torch.zeros(8)


@pytest.mark.parametrize('make, name', [
    (llama, 'model.layers.0.self_attn.q_norm.weight'),
    (llama, 'model.layers.0.self_attn.q_proj.bias'),
    (llama, 'model.layers.1.mlp.up_proj.weight.absmax'),
    (llama, 'model.layers.0.self_attn.q_proj.qweight'),
    (llama, 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'),
    (llama, 'vision.patches.weight'),
    (llama, ''),
    (gpt2, 'transformer.h.0.crossattention.c_attn.weight'),
    (gpt2, 'score.weight')])
def test_load_names_a_tensor_that_it_has_no_place_for(tmp_path, make, name):
    save_changed(tmp_path, make(), add={name: ZERO})
    with pytest.raises(UserError, match=f'it has {re.escape(name)}, for which a model of .* has no place'):
        load_pretrained(tmp_path)


def test_load_names_a_bias_that_the_config_excludes(tmp_path):
    model = llama(attention_bias=True)
    save_changed(tmp_path, model, add={'model.layers.1.mlp.up_proj.bias': ZERO})
    with pytest.raises(UserError, match=r'up_proj\.bias, though config\.json says'):
        load_pretrained(tmp_path)


def test_load_rejects_a_tensor_that_is_there_twice(tmp_path):
    save_changed(tmp_path, llama(), add={'norm.weight': ZERO})
    with pytest.raises(UserError, match=r'norm\.weight twice, once as norm\.weight'):
        load_pretrained(tmp_path)


def test_load_ignores_what_follows_from_the_config(tmp_path):
    model = llama()
    names = ['model.layers.0.self_attn.rotary_emb.inv_freq', 'model.rotary_emb.inv_freq', 'position_ids']
    save_changed(tmp_path, model, add={name: ZERO.clone() for name in names})
    check_loads(tmp_path, model)


@pytest.mark.parametrize('change, refused', [
    ({'activation_function': 'gelu'}, True),
    ({'scale_attn_weights': False}, True),
    ({'scale_attn_by_inverse_layer_idx': True}, True),
    ({'reorder_and_upcast_attn': True}, False),  # the same in another order
    ({'layer_norm_epsilon': 0.1}, False),
    ({'n_inner': 24}, False)])
def test_load_computes_what_the_config_of_a_gpt2_says_or_refuses_it(tmp_path, change, refused):
    model = gpt2(**change)
    save_changed(tmp_path, model)
    if not refused:
        check_loads(tmp_path, model)
        return
    with pytest.raises(UserError, match=f'has {min(change)} .*; only .* can be loaded'):
        load_pretrained(tmp_path)


def test_load_knows_the_other_names_for_the_sizes_of_a_gpt2(tmp_path):
    """n_head is what no shape shows."""
    model = gpt2()
    save_changed(tmp_path, model, num_attention_heads=2, hidden_size=16)
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['n_head'], config['n_embd']
    (tmp_path / 'config.json').write_text(json.dumps(config))
    check_loads(tmp_path, model)


def test_defaults_are_those_of_transformers():
    from transformers import GPT2Config, LlamaConfig

    for family, theirs in (LLAMA, LlamaConfig()), (GPT2, GPT2Config()):
        for ours, name in family.config_names.items():
            if ours in ('mlp_width', 'n_kv_head') and family.defaults.get(ours) is None:
                continue  # depends on the others
            expected = theirs.rope_parameters if name == 'rope_theta' else theirs.to_dict()
            assert family.defaults[ours] == expected[name], name


@pytest.mark.parametrize('missing, index, message', [
    (2, True, r'has no model-00002-of-0000\d\.safetensors, one of the \d files'),
    (2, False, r'has no model-00002-of-0000\d\.safetensors, one of the \d files'),
    (None, True, ''),
    (None, False, '')])
def test_load_names_a_missing_shard(tmp_path, missing, index, message):
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size='20KB')
    if not index:
        (tmp_path / 'model.safetensors.index.json').unlink()
    if missing is None:
        check_loads(tmp_path, model)
        return
    [file] = tmp_path.glob(f'model-{missing:05}-of-*')
    file.unlink()
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


def test_load_opens_no_file_outside_the_folder(tmp_path):
    llama().save_pretrained(tmp_path, max_shard_size='20KB')
    damage_file(tmp_path / 'model.safetensors.index.json', {'weight_map': {'a': '../model.safetensors'}})
    with pytest.raises(UserError, match=r"index\.json is damaged .*: '\.\./model\.safetensors' is not a pl"):
        load_pretrained(tmp_path)


def test_load_prefers_one_file_to_several(tmp_path):
    """As transformers does, if two models were saved in one folder."""
    llama(hidden_act='silu').save_pretrained(tmp_path, max_shard_size='20KB')
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / 'b')
    shutil.copy(tmp_path / 'b' / 'model.safetensors', tmp_path)
    check_loads(tmp_path, model)


@pytest.mark.parametrize('dtype, torch_dtype', [('f16', torch.float16), ('bf16', torch.bfloat16)])
def test_write_rounds_all_weights_and_says_so(tmp_path, dtype, torch_dtype):
    from transformers import AutoModelForCausalLM

    checkpoint = write_random_model(HuggingFace(dtype), trained_tokenizer('char'), tmp_path, **UNTIED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch_dtype
    assert torch.equal(model.lm_head.weight, checkpoint['model']['lm_head.weight'].to(torch_dtype))
    loaded = load_pretrained(tmp_path)['model']
    for name, w in checkpoint['model'].items():
        assert torch.equal(loaded[name], w.to(torch_dtype).float())


@pytest.mark.parametrize('block', [{}, GPT2_BLOCK])
def test_transformers_continues_prompts_of_different_length_in_one_batch(tmp_path, block):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_random_model(HuggingFace(), trained_tokenizer('bpe'), tmp_path, **block)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()

    def write(prompts):
        stories = model.generate(**tokenizer(prompts, return_tensors='pt', padding=True), do_sample=False,
                                 max_length=None, max_new_tokens=20)
        return tokenizer.batch_decode(stories, skip_special_tokens=True)

    prompts = ['Once', 'Once upon a time, there was a little dog named Max']
    assert write(prompts) == [write([prompt])[0] for prompt in prompts]


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
    ({'model_type': 'bert'}, r"model_type 'bert'; only llama \(Llama.*\) and gpt2 \(GPT2.*\) can be loaded"),
    ({'model_type': ['llama']}, r"model_type \['llama'\]; only llama"),
    ({'model_type': None}, 'model_type None; only llama'),
    ({'hidden_act': 'gelu'}, "has hidden_act 'gelu'; only 'silu' can be loaded"),
    ({'rope_scaling': {'type': 'linear'}}, "has rope_type 'linear'"),
    ({'rope_scaling': {'rope_type': 'llama3'}}, "has rope_type 'llama3'"),
    ({'rope_scaling': 'llama3'}, "rope_scaling are 'llama3'"),
    ({'rope_scaling': {'type': 'linear'}, 'rope_parameters': {'rope_type': 'default'}}, "rope_type 'linear'"),
    ({'rope_parameters': {'full_attention': {'rope_theta': 5.0}}}, 'rope_parameters or rope_scaling are'),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'has partial_rotary_factor 0.5; only 1 can'),
    ({'head_dim': 16}, 'has head_dim 16; only 8 can be loaded'),
    ({'sliding_window': 8}, 'has sliding_window 8; only a model without it can be loaded'),
    ({'final_logit_softcapping': 30.0}, 'has final_logit_softcapping 30.0'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'has quantization_config'),
    ({'hidden_size': '32'}, "n_embd is '32'"),
    ({'num_attention_heads': 0}, 'config.json is damaged'),
    ({'num_attention_heads': True}, 'n_head is True'),
    ({'intermediate_size': 40}, r'has the shape \[48, 32\], but the config makes it \[40, 32\]'),
    ({'num_hidden_layers': 3}, r'it has no model\.layers\.2\.input_layernorm\.weight and 8 more'),
    ({'num_hidden_layers': 1}, r'it has model\.layers\.1\.\S+ and 8 more, for which .* has no place'),
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
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n', 'is a Git LFS pointer'),
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
