"""The two families of models that other programs know, Llama and GPT-2, in the words of Hugging Face."""

import re
from dataclasses import dataclass

import torch

# Entries of a config.json that would change the arithmetic, and the value with which they do not (or null)
NEUTRAL = {
    'quantization_config': None,
    'sliding_window': None,
    'attention_window': None,
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'clip_qkv': None,
    'num_experts': None,
    'num_local_experts': None,
    'partial_rotary_factor': 1,
    'logit_scale': 1,
    'logits_scaling': 1,
    'embedding_multiplier': 1,
    'residual_multiplier': 1,
    'attention_multiplier': 1,
    'qk_norm': False,
    'use_qk_norm': False,
    'add_cross_attention': False,
}

# Names that wrappers add to those of the weights: anywhere (torch.compile, FSDP), or in front
WRAPPERS = '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'
WRAPPERS_IN_FRONT = 'module', 'model', 'transformer'
TOP_LEVEL = 'embedding', 'position', 'norm', 'lm_head', 'blocks'


@dataclass
class Family:
    architecture: str  # name of its class in transformers
    block: dict  # the values of GPTConfig that make up its block
    config_names: dict  # {name of a value in GPTConfig: its name in config.json}
    aliases: dict  # {other name of an entry of config.json: its name}
    fixed: dict  # entries of config.json that are the same for all our models
    defaults: dict  # our values for what a config.json leaves out: those of its class in transformers
    derived: str  # pattern for the names of tensors in older files that follow from the config
    weight_names: dict  # {part of a weight's name in model.py: its name there}

    def their_name(self, name):
        """Return the name there of a weight of model.py.

        Example: blocks.3.attn.q.weight is model.layers.3.self_attn.q_proj.weight in a Llama.
        """
        blocks, layer, module, kind = re.fullmatch(r'(?:(.*?)\.(\d+)\.)?(.*)\.(.*)', name).groups()
        theirs = f'{self.weight_names[module]}.{kind}'
        if layer is None:
            return theirs
        return f'{self.weight_names[blocks]}.{layer}.{theirs}'

    def rename_to_theirs(self, weights):
        """Return our weights under their names."""
        return {self.their_name(name): w for name, w in weights.items()}

    def usual_name(self, name):
        """Return the name that transformers gives a weight, whatever it was wrapped in when it was saved.

        Example: both layers.3.mlp.up_proj.weight and _orig_mod.module.model.layers.3.mlp.up_proj.weight are
        model.layers.3.mlp.up_proj.weight in a Llama. Other names are returned as they are.
        """
        parts = [part for part in name.split('.') if part not in WRAPPERS]
        while parts and parts[0] in WRAPPERS_IN_FRONT:
            parts.pop(0)
        for ours in TOP_LEVEL:
            theirs = self.weight_names.get(ours)
            if theirs and parts and theirs.split('.')[-1] == parts[0]:
                return '.'.join([theirs, *parts[1:]])
        return name


class GPT2Family(Family):
    """GPT-2 has queries, keys and values in one tensor, c_attn."""

    def their_name(self, name):
        return super().their_name(re.sub(r'\.attn\.[qkv]\.', '.attn.qkv.', name))

    def rename_to_theirs(self, weights):
        theirs = {}
        fused = {}
        for name, w in weights.items():
            if '.attn.q.' in name:
                k = weights[name.replace('.q.', '.k.')]
                v = weights[name.replace('.q.', '.v.')]
                fused[self.their_name(name)] = torch.cat((w, k, v))
            elif '.attn.k.' not in name and '.attn.v.' not in name:
                theirs[self.their_name(name)] = w
        return theirs | fused


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
    aliases={},
    fixed={'model_type': 'llama', 'hidden_act': 'silu', 'rope_type': 'default'},
    defaults={
        'block_size': 2048,
        'vocab_size': 32000,
        'n_layer': 32,
        'n_head': 32,
        'n_embd': 4096,
        'mlp_width': 11008,
        'bias': False,
        'tie_embeddings': False,
        'norm_eps': 1e-6,
        'rope_theta': 10000.0,
    },
    derived=r'(.*\.)?(rotary_emb\.inv_freq|position_ids)',
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
    aliases={
        'max_position_embeddings': 'n_positions',
        'num_hidden_layers': 'n_layer',
        'num_attention_heads': 'n_head',
        'hidden_size': 'n_embd',
    },
    fixed={
        'model_type': 'gpt2',
        'activation_function': 'gelu_new',
        'scale_attn_weights': True,
        'scale_attn_by_inverse_layer_idx': False,
    },
    defaults=GPT2_BLOCK | {
        'block_size': 1024,
        'vocab_size': 50257,
        'n_layer': 12,
        'n_head': 12,
        'n_embd': 768,
        'tie_embeddings': True,
        'norm_eps': 1e-5,
    },
    derived=r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',
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

