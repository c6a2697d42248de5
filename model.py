"""The GPT: one decoder-only Transformer with a few named choices.

The default is the Llama block (RMSNorm, rotary positions, SwiGLU, no biases); with norm='layer',
position='learned', mlp='gelu' and bias=True it is GPT-2. generate.py writes with it. In shapes, B is the
number of sequences, T of tokens, C = n_embd, V = vocab_size.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F

from functions import LinearCrossEntropy, RMSNorm, cast, rotate

ACTIVATIONS = {
    'gelu': partial(F.gelu, approximate='tanh'),  # GPT-2's
    'relu': F.relu,
    'relu2': lambda x: F.relu(x).square(),  # So et al. 2021
}
POSITIONS = 'rope', 'learned', 'sinusoidal'
CHOICES = {'norm': ('rms', 'layer'), 'position': POSITIONS, 'mlp': ('swiglu', *ACTIVATIONS)}


@dataclass
class GPTConfig:
    block_size: int = 256
    vocab_size: int = 4096
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0  # grouped queries (Ainslie et al. 2023); 0: n_head
    n_embd: int = 288
    norm: str = 'rms'
    position: str = 'rope'
    mlp: str = 'swiglu'
    mlp_width: int = 0  # 0: 8/3 n_embd rounded up to 32 for swiglu, else 4 n_embd
    qk_norm: bool = False
    bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        """Fill in what 0 leaves to us. Raises ValueError where the choices do not make a model."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(choices)}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.mlp_width = self.mlp_width or (
            32 * math.ceil(self.n_embd / 12) if self.mlp == 'swiglu' else 4 * self.n_embd)
        for name in 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'mlp_width':
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1')
        self.head_dim = self.n_embd // self.n_head
        in_pairs = {'rope': self.head_dim, 'sinusoidal': self.n_embd}.get(self.position, 0)
        for holds, wanted in (
            (self.n_embd % self.n_head == 0, f'n_head {self.n_head} must divide n_embd {self.n_embd}'),
            (self.n_head % self.n_kv_head == 0,
             f'n_kv_head {self.n_kv_head} must divide n_head {self.n_head}'),
            (in_pairs % 2 == 0, f'{self.position} positions need an even width, not {in_pairs}'),
            (0 <= self.dropout < 1, f'dropout must be at least 0 and below 1, not {self.dropout}'),
            (min(self.norm_eps, self.rope_theta) > 0, 'norm_eps and rope_theta must be above 0'),
        ):
            if not holds:
                raise ValueError(wanted)


def make_norm(config, width):
    if config.norm == 'rms':
        return RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


# positions --------------------------------------------------------------------

def angles(length, width, base):
    """Of each position t and pair i, t * base^(-2 i / width): a float32 tensor (length, width / 2)."""
    return torch.outer(torch.arange(length), base ** -(torch.arange(0, width, 2) / width))


# the block --------------------------------------------------------------------

def plain_attention(q, k, v, dropout):
    """Causal attention as two matrix products: in bfloat16 on a CPU 1.3 to 3 times as fast as the flash
    kernel, whose backward pass is slow there. Its memory grows with T squared.
    q, k, v: (B, heads, T, head_dim), computed in the dtype of v."""
    B, heads, T, head_dim = q.shape
    k, v = (t.repeat_interleave(heads // k.size(1), dim=1) for t in (k, v))
    q, k, v = (t.flatten(0, 1).type_as(v) for t in (q, k, v))
    future = torch.full((T, T), -math.inf, dtype=v.dtype).triu(1)
    scores = torch.baddbmm(future, q, k.mT, alpha=1 / math.sqrt(head_dim))
    return (F.dropout(scores.softmax(-1, dtype=v.dtype), dropout) @ v).view(B, heads, T, head_dim)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        kv_width = config.n_kv_head * config.head_dim
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.v = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = make_norm(config, config.head_dim), make_norm(config, config.head_dim)

    def qkv(self, x):
        """Queries, keys and values of x (B, T, C). A method, as quantize.py has one product in its place."""
        x = cast(x)
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x, rope, cache):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, -1, self.config.head_dim) for t in self.qkv(x))  # (B, T, heads, head_dim)
        if self.config.qk_norm:
            q, k = (norm(t.type_as(norm.weight)) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        if rope is not None:  # q and k at once: one pass over memory in place of two
            q, k = rotate(torch.cat((q, k), 2), *rope).split_with_sizes((q.size(2), k.size(2)), 2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        mask, dtype = None, v.dtype
        if cache is not None:  # it gives the keys and values of all tokens so far, perhaps in another dtype
            (k, v), mask = cache.append(self.layer, k, v), cache.mask
        if x.is_cuda and q.size(1) > k.size(1):  # where flash cannot run, enable_gqa would hold T x T scores
            k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        dropout = self.config.dropout if self.training else 0.0
        if cache is None and T <= 512 and x.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
            y = plain_attention(q, k, v, dropout)
        else:
            y = F.scaled_dot_product_attention(
                q.type_as(k), k, v.type_as(k), attn_mask=mask, is_causal=T > 1 and mask is None,
                dropout_p=dropout, enable_gqa=q.size(1) != k.size(1))
        return self.proj(y.transpose(1, 2).reshape(B, T, C).to(dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        if self.kind == 'swiglu':  # Shazeer 2020
            self.gate = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def gate_up(self, x):
        """Both of x (B, T, C). A method, as quantize.py has one product in its place."""
        x = cast(x)
        return self.gate(x), self.up(x)

    def forward(self, x):
        if self.kind == 'swiglu':
            gate, up = self.gate_up(x)
            return self.proj(F.silu(gate) * up)
        return self.proj(ACTIVATIONS[self.kind](self.up(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config, config.n_embd), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config, config.n_embd), MLP(config)
        self.dropout = config.dropout

    def forward(self, x, rope, cache):
        x = x + F.dropout(self.attn(self.attn_norm(x), rope, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


# the model --------------------------------------------------------------------

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        if config.position == 'learned':
            self.position = nn.Embedding(config.block_size, config.n_embd)
        elif config.position == 'sinusoidal':  # Vaswani et al. 2017
            angle = angles(config.block_size, config.n_embd, 10000.0)
            table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
            self.register_buffer('sinusoids', table, persistent=False)
        else:  # rotary: cosines, and sines with signs, of all heads of q and k (Su et al. 2021)
            angle = angles(config.block_size, config.head_dim, config.rope_theta)
            heads = config.n_head + config.n_kv_head
            cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
            self.register_buffer('cos', cos.repeat(1, heads), persistent=False)
            self.register_buffer('sin', sin.repeat(1, heads), persistent=False)
        self.init_weights()

    def init_weights(self):
        """Normal weights of deviation 0.02, of the projections back into the residual stream
        1 / sqrt(2 n_layer) of that (Radford et al. 2019), biases 0, norms 1. An embedding that is neither
        the head nor has positions added begins at 0.3, which learns sooner (docs/experiments.md)."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if 'proj' in name else 0.02)
            else:
                nn.init.constant_(p, 0.0 if name.endswith('bias') else 1.0)
        if self.config.position == 'rope' and not self.config.tie_embeddings:
            nn.init.normal_(self.embedding.weight, std=0.3)

    def n_params(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Operations to train on one token of a full window (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        matrices = sum(p.numel() for block in self.blocks for p in block.parameters() if p.dim() == 2)
        return 6 * (matrices + c.vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size

    def hidden(self, idx, cache=None):
        """What the head reads: (B, T, C). Raises ValueError where the tokens do not fit into block_size."""
        length = idx.size(1) + (0 if cache is None else cache.length)
        if length > self.config.block_size:
            raise ValueError(f'{length} tokens do not fit into block_size {self.config.block_size}')
        pos = slice(length) if cache is None else cache.extend(idx.size(1))  # a cache knows how far it is
        x, rope = self.embedding(idx), None
        if self.config.position == 'learned':
            x = x + self.position.weight[pos]
        elif self.config.position == 'sinusoidal':  # embeddings scaled up, as in the paper
            x = x * math.sqrt(self.config.n_embd) + self.sinusoids[pos]
        else:
            rope = self.cos[pos], self.sin[pos]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, rope, cache)
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None, rows=1024):
        """Logits (B, T, V) of the next token at each position, or the mean loss against `targets`.

        idx: (B, T) token ids, T (with what the cache holds) at most block_size.
        targets: (B, T) token ids, -1 where there is none; the loss is in nats per token.
        cache: one of generate.py's with the tokens before idx; it takes in idx.
        rows: tokens whose logits the loss computes at a time.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x)
        loss = LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), rows)
        return loss / (targets >= 0).sum()
