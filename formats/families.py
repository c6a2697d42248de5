"""The two families of models that other programs know, Llama and GPT-2, in the words of Hugging Face."""

import re
from dataclasses import dataclass

import torch


@dataclass
class Family:
    architecture: str  # name of its class in transformers
    block: dict  # the values of GPTConfig that make up its block
    config_names: dict  # {name of a value in GPTConfig: its name in config.json}
    fixed: dict  # entries of config.json that are the same for all our models
    defaults: dict  # our values for what a config.json leaves out, if not those of GPTConfig
    weight_names: dict  # {part of a weight's name in model.py: its name there}, see `rename_weights`

    def rename_to_theirs(self, weights):
        """Return our weights under their names."""
        return rename_weights(weights, self.weight_names)

    def rename_to_ours(self, weights):
        """Return their weights under our names. Raises ValueError if a name has another form."""
        our_names = {theirs: ours for ours, theirs in self.weight_names.items()}
        return rename_weights(weights, our_names)


class GPT2Family(Family):
    """GPT-2 has queries, keys and values in one tensor, c_attn."""

    def rename_to_theirs(self, weights):
        fused = dict(weights)
        for name in weights:
            if '.attn.q.' in name:
                q, k, v = (weights[name.replace('.q.', f'.{part}.')] for part in 'qkv')
                fused[name.replace('.q.', '.qkv.')] = torch.cat((q, k, v))
        return super().rename_to_theirs(fused)

    def rename_to_ours(self, weights):
        """Raises ValueError if a name has another form, or c_attn does not divide by three."""
        ours = {}
        for name, w in super().rename_to_ours(weights).items():
            if '.qkv.' not in name:
                ours[name] = w
                continue
            if w.dim() == 0 or len(w) == 0 or len(w) % 3 != 0:
                raise ValueError(f'c_attn has the shape {[*w.shape]}')
            for part, rows in zip('qkv', w.chunk(3), strict=True):
                ours[name.replace('.qkv.', f'.{part}.')] = rows
        return ours


LLAMA = Family(
    architecture='LlamaForCausalLM',
    block={'norm': 'rms', 'position': 'rope', 'mlp': 'swiglu', 'qk_norm': False},
    config_names={
        'block_size': 'max_position_embeddings',
        'vocab_size': 'vocab_size',
        'n_layer': 'num_hidden_layers',
        'n_head': 'num_attention_heads',
        'n_kv_head': 'num_key_value_heads',
        'n_embd': 'hidden_size',
        'mlp_width': 'intermediate_size',
        'bias': 'attention_bias',
        'tie_embeddings': 'tie_word_embeddings',
        'norm_eps': 'rms_norm_eps',
        'rope_theta': 'rope_theta',
    },
    fixed={'model_type': 'llama', 'hidden_act': 'silu', 'rope_type': 'default'},
    defaults={'tie_embeddings': False, 'norm_eps': 1e-6},
    weight_names={
        'embedding': 'model.embed_tokens',
        'norm': 'model.norm',
        'lm_head': 'lm_head',
        'blocks': 'model.layers',
        'attn_norm': 'input_layernorm',
        'mlp_norm': 'post_attention_layernorm',
        'attn.q': 'self_attn.q_proj',
        'attn.k': 'self_attn.k_proj',
        'attn.v': 'self_attn.v_proj',
        'attn.proj': 'self_attn.o_proj',
        'mlp.gate': 'mlp.gate_proj',
        'mlp.up': 'mlp.up_proj',
        'mlp.proj': 'mlp.down_proj',
    })

GPT2_BLOCK = {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'qk_norm': False, 'bias': True}
GPT2 = GPT2Family(
    architecture='GPT2LMHeadModel',
    block=GPT2_BLOCK,
    config_names={
        'block_size': 'n_positions',
        'vocab_size': 'vocab_size',
        'n_layer': 'n_layer',
        'n_head': 'n_head',
        'n_embd': 'n_embd',
        'mlp_width': 'n_inner',
        'tie_embeddings': 'tie_word_embeddings',
        'norm_eps': 'layer_norm_epsilon',
    },
    fixed={
        'model_type': 'gpt2',
        'activation_function': 'gelu_new',
        'scale_attn_weights': True,
        'scale_attn_by_inverse_layer_idx': False,
    },
    defaults=GPT2_BLOCK,
    weight_names={
        'embedding': 'transformer.wte',
        'position': 'transformer.wpe',
        'norm': 'transformer.ln_f',
        'lm_head': 'lm_head',
        'blocks': 'transformer.h',
        'attn_norm': 'ln_1',
        'mlp_norm': 'ln_2',
        'attn.qkv': 'attn.c_attn',
        'attn.proj': 'attn.c_proj',
        'mlp.up': 'mlp.c_fc',
        'mlp.proj': 'mlp.c_proj',
    })


def family_of(config):
    """Return the family that a model with this kind of norm may belong to."""
    return LLAMA if config.norm == 'rms' else GPT2


def required_block(config):
    """Return the values that `config` must have to belong to its family."""
    if config.norm == 'rms':
        return LLAMA.block
    return GPT2.block | {'n_kv_head': config.n_head}  # GPT-2 has no grouped queries


def rename_weights(weights, names):
    """Return a dict of those weights whose names consist of parts that `names` maps, under the new names.

    Example: with {'blocks': 'model.layers', 'attn.q': 'self_attn.q_proj'}, blocks.3.attn.q.weight becomes
    model.layers.3.self_attn.q_proj.weight. Raises ValueError if a name has another form.
    """
    renamed = {}
    for name, w in weights.items():
        match = re.fullmatch(r'(?:(.*?)\.(\d+)\.)?(.*)\.(.*)', name)
        if match is None:
            raise ValueError(f'it has a weight {name!r}, which no model of this project has')
        blocks, layer, module, kind = match.groups()
        if module not in names:
            continue
        new_name = f'{names[module]}.{kind}'
        if layer is not None:
            if blocks not in names:
                continue
            new_name = f'{names[blocks]}.{layer}.{new_name}'
        renamed[new_name] = w
    return renamed
