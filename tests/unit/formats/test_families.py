"""Names of weights in Hugging Face's words."""

import pytest
import torch

from formats.families import GPT2, LLAMA, required_block
from model import GPT, GPTConfig
from tests.helpers.models import GPT2_BLOCK


@pytest.mark.parametrize('family, ours, theirs', [
    (LLAMA, 'blocks.12.attn.q.bias', 'model.layers.12.self_attn.q_proj.bias'),
    (LLAMA, 'norm.weight', 'model.norm.weight'),
    (LLAMA, 'lm_head.weight', 'lm_head.weight'),
    (GPT2, 'blocks.3.mlp.up.weight', 'transformer.h.3.mlp.c_fc.weight'),
    (GPT2, 'blocks.3.attn.v.bias', 'transformer.h.3.attn.c_attn.bias')])
def test_their_name_maps_each_part_of_a_name(family, ours, theirs):
    assert family.their_name(ours) == theirs


@pytest.mark.parametrize('family, name, usual', [
    (LLAMA, 'layers.3.mlp.up_proj.weight', 'model.layers.3.mlp.up_proj.weight'),
    (LLAMA, 'model.model.norm.weight', 'model.norm.weight'),
    (LLAMA, '_orig_mod.module.model.embed_tokens.weight', 'model.embed_tokens.weight'),
    (LLAMA, 'module.lm_head.weight', 'lm_head.weight'),
    (LLAMA, 'model.layers.0._orig_mod.input_layernorm.weight', 'model.layers.0.input_layernorm.weight'),
    (GPT2, 'wte.weight', 'transformer.wte.weight'),
    (GPT2, 'module.transformer.h.0.ln_1.bias', 'transformer.h.0.ln_1.bias'),
    (GPT2, 'score.weight', 'score.weight'),
    (LLAMA, 'vision.layers.0.norm.weight', 'vision.layers.0.norm.weight'),
    (LLAMA, 'model', 'model')])
def test_usual_name_is_without_the_names_of_wrappers(family, name, usual):
    assert family.usual_name(name) == usual


def test_gpt2_has_queries_keys_and_values_in_one_tensor():
    weights = dict(GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, **GPT2_BLOCK)).state_dict())
    parts = [weights[f'blocks.1.attn.{part}.weight'] for part in 'qkv']
    theirs = GPT2.rename_to_theirs(weights)
    assert torch.equal(theirs['transformer.h.1.attn.c_attn.weight'], torch.cat(parts))
    assert len(theirs) == len(weights) - 8
    assert not theirs.keys() & weights.keys() - {'lm_head.weight'}


def test_required_block_of_gpt2_has_no_grouped_queries():
    config = GPTConfig(norm='layer', n_head=6, n_kv_head=2)
    assert required_block(config)['n_kv_head'] == 6
    assert 'n_kv_head' not in required_block(GPTConfig(n_head=6, n_kv_head=2))
