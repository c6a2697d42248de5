"""Names of weights in Hugging Face's words."""

import pytest
import torch

from formats.families import GPT2, LLAMA, family_of, rename_weights, required_block
from model import GPT, GPTConfig
from tests.helpers.models import GPT2_BLOCK

NAMES = {'blocks': 'model.layers', 'attn.q': 'self_attn.q_proj', 'norm': 'model.norm'}


def test_rename_weights_maps_each_part_of_a_name():
    weights = {'blocks.3.attn.q.weight': 1, 'blocks.12.attn.q.bias': 2, 'norm.weight': 3}
    assert rename_weights(weights, NAMES) == {
        'model.layers.3.self_attn.q_proj.weight': 1, 'model.layers.12.self_attn.q_proj.bias': 2,
        'model.norm.weight': 3}


def test_rename_weights_leaves_out_unknown_names():
    weights = {'blocks.3.attn.rotary.inv_freq': 1, 'layers.3.attn.q.weight': 2, 'head.weight': 3}
    assert rename_weights(weights, NAMES) == {}


@pytest.mark.parametrize('name', ['', 'weight', 'norm\nweight'])
def test_rename_weights_rejects_names_of_another_form(name):
    with pytest.raises(ValueError, match='which no model of this project has'):
        rename_weights({name: 1}, NAMES)


@pytest.mark.parametrize('choices', [{'bias': True, 'tie_embeddings': False}, GPT2_BLOCK])
def test_renaming_there_and_back_keeps_every_weight(choices):
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=4, vocab_size=9, **choices))
    weights = dict(model.state_dict())
    family = family_of(model.config)
    assert family is (GPT2 if 'norm' in choices else LLAMA)
    theirs = family.rename_to_theirs(weights)
    assert not theirs.keys() & weights.keys() - {'lm_head.weight'}
    back = family.rename_to_ours(theirs)
    assert back.keys() == weights.keys()
    for name, w in back.items():
        assert torch.equal(w, weights[name])


@pytest.mark.parametrize('shape', [(), (0, 8), (16, 8)])
def test_gpt2_rejects_an_attention_tensor_that_does_not_divide_by_three(shape):
    with pytest.raises(ValueError, match='c_attn has the shape'):
        GPT2.rename_to_ours({'transformer.h.0.attn.c_attn.weight': torch.zeros(shape)})


def test_required_block_of_gpt2_has_no_grouped_queries():
    config = GPTConfig(norm='layer', n_head=6, n_kv_head=2)
    assert required_block(config)['n_kv_head'] == 6
    assert 'n_kv_head' not in required_block(GPTConfig(n_head=6, n_kv_head=2))
