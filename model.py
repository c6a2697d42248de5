"""The GPT: a decoder-only Transformer with a few named choices.

The default is the Llama block (RMSNorm, rotary positions, SwiGLU, no biases). With norm='layer',
position='learned', mlp='gelu' and bias=True it is GPT-2.

This file is the specification: plain PyTorch, except that the loss is computed in chunks to save memory.
On a CPU, core/kernels.py overrides Attention.qkv, rotate and attend, MLP.gate_up and nn.RMSNorm with faster
equivalents, and on a GPU Attention.qkv and MLP.gate_up: if you change one of these here, change it there too,
or take it out of `use_fast_cpu_kernels` and `use_joined_products`.
Generation with a key-value cache is in core/generate.py.

Shapes: B sequences, T tokens each, C = n_embd, V = vocab_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


def gelu(x):
    """GELU in GPT-2's tanh approximation."""
    return F.gelu(x, approximate='tanh')


def relu2(x):
    """Squared ReLU (So et al. 2021)."""
    return F.relu(x).square()


ACTIVATIONS = {'gelu': gelu, 'relu': F.relu, 'relu2': relu2}
CHOICES = {
    'norm': ('rms', 'layer'),
    'position': ('rope', 'learned', 'sinusoidal'),
    'mlp': ('swiglu', *ACTIVATIONS),
}


@dataclass
class GPTConfig:
    """The shape of a model. Its fields, except vocab_size, are settings of train.py: add new ones to both."""

    block_size: int = 256  # context length in tokens
    vocab_size: int = 4096
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 0  # heads of keys and values (grouped queries, Ainslie et al. 2023); 0: n_head
    n_embd: int = 288
    norm: str = 'rms'
    position: str = 'rope'
    mlp: str = 'swiglu'
    mlp_width: int = 0  # 0: 8/3 n_embd rounded up to a multiple of 32 for swiglu, else 4 n_embd
    qk_norm: bool = False
    bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        """Derive the values that are 0. Raises ValueError if the choices do not make a model."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, not one of {', '.join(choices)}")
        if self.n_kv_head == 0:
            self.n_kv_head = self.n_head
        if self.mlp_width == 0 and self.mlp == 'swiglu':
            self.mlp_width = 32 * math.ceil(8 / 3 * self.n_embd / 32)
        elif self.mlp_width == 0:
            self.mlp_width = 4 * self.n_embd
        for name in 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'mlp_width':
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f'{name} is {value}; it must be at least 1')
        if self.n_embd % self.n_head != 0:
            raise ValueError(f'n_head {self.n_head} must divide n_embd {self.n_embd}')
        self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head != 0:
            raise ValueError(f'n_kv_head {self.n_kv_head} must divide n_head {self.n_head}')
        if self.position == 'rope' and self.head_dim % 2 != 0:
            raise ValueError(f'rope positions need an even n_embd / n_head, not {self.head_dim}')
        if self.position == 'sinusoidal' and self.n_embd % 2 != 0:
            raise ValueError(f'sinusoidal positions need an even n_embd, not {self.n_embd}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout must be at least 0 and below 1, not {self.dropout}')
        if min(self.norm_eps, self.rope_theta) <= 0:
            raise ValueError('norm_eps and rope_theta must be above 0')


def make_norm(config, width):
    if config.norm == 'rms':
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


# positions --------------------------------------------------------------------

def position_angles(length, width, base):
    """Return the angles t * base^(-2i / width) of position t and pair i, float32 (length, width / 2)."""
    frequencies = base ** -(torch.arange(0, width, 2) / width)
    return torch.outer(torch.arange(length), frequencies)


def apply_rope(x, cos, sin):
    """Rotate each pair (x[i], x[i + head_dim / 2]) by the angle of its position (Su et al. 2021).

    The pairs are those of Hugging Face's Llama. x: (B, T, heads, head_dim). cos, sin: (T, head_dim / 2).
    """
    cos = cos[:, None, :].type_as(x)  # (T, 1, head_dim / 2), the same for all heads
    sin = sin[:, None, :].type_as(x)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


# the block --------------------------------------------------------------------

class Attention(nn.Module):
    """Causal self-attention. core/kernels.py overrides single methods."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.layer = layer  # index of this layer's keys and values in a cache
        kv_width = config.n_kv_head * config.head_dim
        self.q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.k = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.v = nn.Linear(config.n_embd, kv_width, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, config.head_dim)
            self.k_norm = make_norm(config, config.head_dim)

    def qkv(self, x):
        """Project x (B, T, C) to queries, keys and values."""
        return self.q(x), self.k(x), self.v(x)

    def rotate(self, q, k, cos, sin):
        """Apply rotary positions to queries and keys (B, T, heads, head_dim)."""
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    def attend(self, q, k, v, mask, is_causal):
        """Compute the attention of queries to keys and values.

        q: (B, n_head, T, head_dim). k, v: (B, n_kv_head, S, head_dim), S is T or, with a cache, more.
        """
        if q.is_cuda and self.config.n_head != self.config.n_kv_head:
            # on a GPU, enable_gqa may fall back to a kernel that stores all (T, T) scores: repeat the heads
            k = k.repeat_interleave(self.config.n_head // self.config.n_kv_head, dim=1)
            v = v.repeat_interleave(self.config.n_head // self.config.n_kv_head, dim=1)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1),
            dropout_p=self.config.dropout if self.training else 0.0)

    def forward(self, x, rope, cache):
        B, T, C = x.shape
        q, k, v = self.qkv(x)
        dtype = v.dtype
        q = q.view(B, T, self.config.n_head, self.config.head_dim)
        k = k.view(B, T, self.config.n_kv_head, self.config.head_dim)
        v = v.view(B, T, self.config.n_kv_head, self.config.head_dim)
        if self.config.qk_norm:  # autocast makes q and k bfloat16, the weights of the norms are float32
            q = self.q_norm(q.type_as(self.q_norm.weight))
            k = self.k_norm(k.type_as(self.k_norm.weight))
        if rope is not None:
            q, k = self.rotate(q, k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        mask = None
        if cache is not None:  # keys and values of all tokens so far, possibly in the cache's own dtype
            k, v = cache.append(self.layer, k, v)
            mask = cache.mask
        q, v = q.type_as(k), v.type_as(k)
        # a single new token attends to everything in the cache, so it needs no mask
        y = self.attend(q, k, v, mask, is_causal=T > 1 and mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.proj(y.to(dtype))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        self.up = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        if self.kind == 'swiglu':  # Shazeer 2020
            self.gate = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def gate_up(self, x):
        """Return the gate and up projections of x (B, T, C)."""
        return self.gate(x), self.up(x)

    def forward(self, x):
        if self.kind == 'swiglu':
            gate, up = self.gate_up(x)
            return self.proj(F.silu(gate) * up)
        activation = ACTIVATIONS[self.kind]
        return self.proj(activation(self.up(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = make_norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x, rope, cache):
        x = x + F.dropout(self.attn(self.attn_norm(x), rope, cache), self.dropout, self.training)
        x = x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)
        return x


# the loss ---------------------------------------------------------------------

def to_autocast_dtype(x):
    """Cast x to the autocast dtype once, instead of once per matrix product."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type):
        return x
    return x.to(torch.get_autocast_dtype(device_type))


def loss_chunk_size(device, vocab_size):
    """Return for how many tokens at once the loss is computed on a device (a torch.device).

    A large GPU is busy only with large products, and torch.compile compiles every chunk anew. 2**27 logits
    take 512 MB in float32.
    """
    if device.type == 'cuda':
        return max(1024, 2**27 // vocab_size)
    return 1024


def log_probs_by_chunk(head, x, targets, chunk_size):
    """Yield (x, log-probabilities in float32, targets) for `chunk_size` tokens at a time.

    The log-probabilities of all tokens at once would be the largest tensor by far: 3.3 GB for 16,384 tokens
    of GPT-2's vocabulary. head: maps hidden states (N, C) to logits. x: (N, C). targets: (N,).
    """
    for x_chunk, target in zip(x.split(chunk_size), targets.split(chunk_size), strict=True):
        yield x_chunk, head(x_chunk).log_softmax(-1, dtype=torch.float32), target


def logits_gradient(log_p, targets):
    """Return d loss / d logits of a summed cross-entropy: the probabilities, minus 1 at the targets.

    log_p: log-probabilities (N, V), which may be overwritten. targets: (N,); rows with the target -1 must be
    masked afterwards.
    """
    if torch.compiler.is_compiling():  # a comparison is fused with what is around it, but not a scatter
        is_target = torch.arange(log_p.size(1), device=log_p.device) == targets[:, None]
        return log_p.exp() - is_target.float()
    minus_one = log_p.new_full((len(targets), 1), -1)
    return log_p.exp_().scatter_add_(1, targets.clamp(min=0)[:, None], minus_one)


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of the logits x @ weight.T, computed in chunks of tokens.

    Gradients are computed in the forward pass, while the probabilities of a chunk are in memory, as in the
    fused linear cross-entropy of Liger Kernel (Hsu et al. 2024): as fast as all logits at once, in a fraction
    of the memory. x: (N, C). weight: (V, C). targets: (N,), -1 is ignored.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk_size):
        x_cast = to_autocast_dtype(x)
        weight_cast = to_autocast_dtype(weight)
        loss = x.new_zeros((), dtype=torch.float32)
        grad_x = []
        grad_weight = torch.zeros_like(weight)

        def head(x):
            return F.linear(x, weight_cast)

        for x_chunk, log_p, target in log_probs_by_chunk(head, x_cast, targets, chunk_size):
            loss += F.nll_loss(log_p, target, ignore_index=-1, reduction='sum')
            if ctx.needs_input_grad[0]:  # training
                grad = logits_gradient(log_p, target).to(weight_cast.dtype)
                # masking these two (chunk, C) products is cheaper than masking the (chunk, V) gradient
                has_target = (target >= 0)[:, None]
                grad_x.append((grad @ weight_cast) * has_target)
                grad_weight += grad.T @ (x_chunk * has_target)
        if grad_x:
            ctx.grads = torch.cat(grad_x).type_as(x), grad_weight  # results, not inputs: nothing to save
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.grads
        return grad_x * grad_loss, grad_weight * grad_loss, None, None


# the model --------------------------------------------------------------------

class GPT(nn.Module):
    """The model. If you add or rename a parameter, change `parameter_shapes` in core/checkpoint.py, too."""

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
            angles = position_angles(config.block_size, config.n_embd, 10000.0)
            table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)  # (block_size, C)
            self.register_buffer('sinusoids', table, persistent=False)
        else:
            angles = position_angles(config.block_size, config.head_dim, config.rope_theta)
            self.register_buffer('cos', angles.cos(), persistent=False)  # (block_size, head_dim / 2)
            self.register_buffer('sin', angles.sin(), persistent=False)
        self.init_weights()

    def init_weights(self):
        """Initialize matrices with a standard deviation of 0.02, biases with 0 and norms with 1.

        Projections back into the residual stream are scaled by 1 / sqrt(2 n_layer) (Radford et al. 2019). For
        an embedding that is not also the head, and to which no positions are added, the standard deviation is
        0.3: it learns sooner (docs/lab/experiments.md).
        """
        for name, p in self.named_parameters():
            if name.endswith('proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)
        if self.config.position == 'rope' and not self.config.tie_embeddings:
            nn.init.normal_(self.embedding.weight, std=0.3)

    @property
    def device(self):
        return self.embedding.weight.device

    def n_params(self):
        """Return the number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Return the FLOPs of training on one token of a full window (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        in_blocks = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        in_head = c.vocab_size * c.n_embd
        in_attention = c.n_layer * c.n_embd * c.block_size
        return 6 * (in_blocks + in_head) + 12 * in_attention

    def hidden(self, idx, cache=None):
        """Return the final hidden states (B, T, C), before the LM head.

        Raises ValueError if the tokens do not fit into block_size.
        """
        T = idx.size(1)
        length = T if cache is None else cache.length + T
        if length > self.config.block_size:
            raise ValueError(f'{length} tokens do not fit into block_size {self.config.block_size}')
        if cache is None:
            positions = slice(T)
        else:
            positions = cache.extend(T)  # a slice; this also sets cache.mask
        x = self.embedding(idx)
        rope = None
        if self.config.position == 'learned':
            x = x + self.position.weight[positions]
        elif self.config.position == 'sinusoidal':  # embeddings are scaled up, as in the paper
            x = x * math.sqrt(self.config.n_embd) + self.sinusoids[positions]
        else:
            rope = self.cos[positions], self.sin[positions]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, rope, cache)
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None, chunk_size=0):
        """Return the logits (B, T, V) of the next token at each position, or the mean loss on `targets`.

        idx: (B, T) token ids; T plus the tokens in the cache is at most block_size.
        targets: (B, T) token ids, -1 is ignored; the loss is in nats per token.
        cache: a cache of core/generate.py with the tokens before idx; the tokens of idx are added to it.
        chunk_size: number of tokens whose logits are in memory at once while the loss is computed; 0: as
            many as suit the device.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x)
        if chunk_size == 0:
            chunk_size = loss_chunk_size(x.device, self.config.vocab_size)
        loss = LinearCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), chunk_size)
        return loss / (targets >= 0).sum()
