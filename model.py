"""The GPT: one decoder-only Transformer with a few named choices, and its KV-cached generation.

The default is the Llama block (RMSNorm, rotary positions, SwiGLU, no biases); with norm='layer',
position='learned', mlp='gelu' and bias=True it is GPT-2.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHOICES = {
    'norm': ('rms', 'layer'),
    'position': ('rope', 'learned', 'sinusoidal'),
    'mlp': ('swiglu', 'gelu', 'relu', 'relu2'),
}


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
        for name in 'block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd':
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1')
        for name in 'n_kv_head', 'mlp_width':
            if getattr(self, name) < 0:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be 0 or more')
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not divisible by n_head {self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}')
        if self.position == 'rope' and (self.n_embd // self.n_head) % 2:
            raise ValueError(f'rope needs an even head width, not n_embd / n_head = {self.head_dim}')
        if self.position == 'sinusoidal' and self.n_embd % 2:
            raise ValueError(f'sinusoidal positions need an even n_embd, not {self.n_embd}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout is {self.dropout}; it must be at least 0 and below 1')
        if not (self.norm_eps > 0 and self.rope_theta > 0):
            raise ValueError(f'norm_eps {self.norm_eps} and rope_theta {self.rope_theta} must be above 0')
        if not self.mlp_width:
            self.mlp_width = 32 * math.ceil(self.n_embd / 12) if self.mlp == 'swiglu' else 4 * self.n_embd

    @property
    def head_dim(self):
        return self.n_embd // self.n_head


def make_norm(config, width):
    if config.norm == 'rms':
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def rope_table(config):
    """Rotary positions (Su et al. 2021): cosines, and sines with signs, both (block_size, 1, head_dim)."""
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    angle = torch.outer(torch.arange(config.block_size), frequency)[:, None]
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + head_dim / 2]), Hugging Face's layout. x: (B, T, heads, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos.type_as(x), torch.cat((b, a), dim=-1), sin.type_as(x))


def sinusoidal_table(config):
    """The fixed positions of Vaswani et al. 2017: a float32 tensor (block_size, n_embd)."""
    frequency = 10000.0 ** -(torch.arange(0, config.n_embd, 2) / config.n_embd)
    angle = torch.outer(torch.arange(config.block_size), frequency)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class KVCache:
    """Keys and values of the tokens seen so far, for `batch_size` sequences of up to block_size tokens."""

    def __init__(self, config, batch_size, device, dtype):
        shape = batch_size, config.n_kv_head, config.block_size, config.head_dim
        self.layers = [[torch.zeros(shape, device=device, dtype=dtype) for _ in 'kv']
                       for _ in range(config.n_layer)]
        self.device, self.length = device, 0

    def extend(self, T):
        """Make room for T tokens and return their places, a slice; `mask` becomes what they may look at."""
        start, self.length = self.length, self.length + T
        self.mask = None  # all before them
        if T > 1 and start:  # is_causal would align the wrong corner
            self.mask = torch.ones(T, self.length, dtype=torch.bool, device=self.device).tril(start)
        return slice(start, self.length)

    def append(self, layer, k, v):
        """Store k and v (B, n_kv_head, T, head_dim) in the room made; return all that is there now."""
        keys, values = self.layers[layer]
        T = k.size(2)
        keys.narrow(2, self.length - T, T).copy_(k)
        values.narrow(2, self.length - T, T).copy_(v)
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)


class StaticCache:
    """A view of a KVCache for compiled steps of one token: no shape changes, and `place` is a tensor."""

    def __init__(self, cache):
        self.layers, self.length = cache.layers, 0
        self.place = torch.zeros(1, dtype=torch.long, device=cache.device)
        for tensor in self.place, *(tensor for layer in self.layers for tensor in layer):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs take no other tensors that change

    def extend(self, T):
        self.mask = (torch.arange(self.layers[0][0].size(2), device=self.place.device) <= self.place)[None]
        return self.place

    def append(self, layer, k, v):
        for kept, new in zip(self.layers[layer], (k, v), strict=True):
            kept.index_copy_(2, self.place, new.type_as(kept))
        return self.layers[layer]


def plain_attention(q, k, v, dropout):
    """Causal attention by two matrix products: in bfloat16 on a CPU 1.3 to 3 times as fast as the flash
    kernel, whose backward pass is slow there. Its memory grows with T squared.
    q, k, v: (B, heads, T, head_dim), computed in the dtype of v."""
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    future = torch.full((q.size(2), q.size(2)), -math.inf, dtype=v.dtype).triu(1)
    scores = (q / math.sqrt(q.size(-1))).type_as(v) @ k.type_as(v).transpose(-2, -1) + future
    return F.dropout(scores.softmax(-1, dtype=v.dtype), dropout) @ v


def cast(x):
    """x in the dtype that autocast would give it, once for all the linear layers that take it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


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
        """Queries, keys and values of x (B, T, n_embd), (B, T, heads * head_dim) each."""
        x = cast(x)
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x, rope, cache):
        B, T, C = x.shape
        head_dim = self.config.head_dim
        q, k, v = (t.view(B, T, -1, head_dim) for t in self.qkv(x))
        if self.config.qk_norm:
            q, k = (norm(t.type_as(norm.weight)) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
        if rope is not None:
            q, k = rotate(torch.cat((q, k), 2), *rope).split_with_sizes((q.size(2), k.size(2)), 2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, head_dim)
        mask, dtype = None, v.dtype
        if cache is not None:  # whose dtype may be another
            (k, v), mask = cache.append(self.layer, k, v), cache.mask
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
        x = cast(x)
        return self.gate(x), self.up(x)

    def forward(self, x):
        if self.kind == 'swiglu':
            gate, up = self.gate_up(x)
            x = F.silu(gate) * up
        elif self.kind == 'gelu':
            x = F.gelu(self.up(x), approximate='tanh')  # GPT-2's
        elif self.kind == 'relu':
            x = F.relu(self.up(x))
        else:
            x = F.relu(self.up(x)).square()  # So et al. 2021
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config, config.n_embd), Attention(config, layer)
        self.mlp_norm, self.mlp = make_norm(config, config.n_embd), MLP(config)
        self.dropout = config.dropout

    def forward(self, x, rope, cache):
        y = self.attn(self.attn_norm(x), rope, cache)
        x = x + (F.dropout(y, self.dropout) if self.training else y)
        y = self.mlp(self.mlp_norm(x))
        return x + (F.dropout(y, self.dropout) if self.training else y)


class Int8Linear:
    """Linear layers for writing on a CPU, as one: int8 weights, a scale for each output, bfloat16 in and out.

    Called with x (B, T, in_features) returns the output of each layer, or of the only one. Where the product
    is large, x is rounded to int8 too, with a scale for each row. No nn.Module: to call one takes as long as
    a small product.
    """

    def __init__(self, *linears):
        if linears[0].in_features % 32:  # the kernel reads beyond the rows of others
            raise ValueError(f'int8 needs widths that 32 divides, not {linears[0].in_features}')
        weight, bias = ([getattr(linear, name) for linear in linears] for name in ('weight', 'bias'))
        weight = torch.cat(weight).detach().float()
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = None if bias[0] is None else torch.cat(bias).detach()
        self.sizes = [linear.out_features for linear in linears]
        self.few = 2**14 // len(weight)  # rows; of so few, rounding x would take longer than it saves

    def __call__(self, x):
        B, T, C = x.shape
        rows = x.view(B * T, C)
        if self.few >= B * T:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            scale = (rows.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-12)
            y = torch._int_mm((rows / scale).round_().to(torch.int8), self.weight.T).float()
            y = y.mul_(scale).mul_(self.scale).bfloat16()
        if self.bias is not None:
            y = y + self.bias
        y = y.view(B, T, -1)
        return y if len(self.sizes) == 1 else y.split_with_sizes(self.sizes, dim=-1)


def to_int8(model):
    """Turn a model into bfloat16 and its linear layers into int8; returns it. Raises ValueError.

    It then is for writing alone: its modules give way to their bare functions.
    """
    def swap(module, name, function):
        delattr(module, name)
        setattr(module, name, function)

    def bare(norm):
        if isinstance(norm, nn.LayerNorm):
            return norm.forward
        weight, C = torch.cat((norm.weight, norm.weight)).detach(), norm.weight.numel()

        def rms_norm(x):  # LayerNorm, which has a kernel of its own, of (x, -x), whose mean is 0
            both = F.layer_norm(torch.cat((x, -x), -1), (2 * C,), weight, None, norm.eps)
            return both[..., :C].contiguous()

        return rms_norm

    model.bfloat16()
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        attn.qkv = Int8Linear(attn.q, attn.k, attn.v)
        del attn.q, attn.k, attn.v
        if mlp.kind == 'swiglu':
            mlp.gate_up = Int8Linear(mlp.gate, mlp.up)
            del mlp.gate, mlp.up
        else:
            swap(mlp, 'up', Int8Linear(mlp.up))
        swap(attn, 'proj', Int8Linear(attn.proj))
        swap(mlp, 'proj', Int8Linear(mlp.proj))
        for name in 'attn_norm', 'mlp_norm':
            swap(block, name, bare(getattr(block, name)))
        for name in 'attn', 'mlp':
            swap(block, name, getattr(block, name).forward)
    swap(model, 'norm', bare(model.norm))
    swap(model, 'lm_head', Int8Linear(model.lm_head))
    swap(model, 'blocks', [block.forward for block in model.blocks])
    return model


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_logits = 2**62  # that the loss computes at a time; train.py sets it by the memory
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        if config.position == 'learned':
            self.position = nn.Embedding(config.block_size, config.n_embd)
        elif config.position == 'sinusoidal':
            self.register_buffer('sinusoids', sinusoidal_table(config), persistent=False)
        else:
            for name, table in zip(('cos', 'sin'), rope_table(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.init_weights()

    def init_weights(self):
        """Normal weights of deviation 0.02, of the projections back into the residual stream
        1 / sqrt(2 n_layer) of that (Radford et al. 2019), biases 0, norms 1."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if 'proj' in name else 0.02)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)

    def n_params(self):
        """Number of parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Operations to train on one token of a full window (Chowdhery et al. 2022, appendix B)."""
        c = self.config
        matrices = sum(p.numel() for block in self.blocks for p in block.parameters() if p.dim() == 2)
        return 6 * (matrices + c.vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size

    def forward(self, idx, targets=None, cache=None):
        """Logits of the next token at each position, or the mean loss against `targets`.

        idx: (B, T) token ids, T (with what the cache holds) at most block_size.
        targets: (B, T) token ids, -1 where there is none. Returns the mean cross-entropy in nats per token.
        cache: a KVCache with the tokens before idx; it takes in idx.
        Without targets returns the logits (B, T, vocab_size).
        """
        length = idx.size(1) + (0 if cache is None else cache.length)
        if length > self.config.block_size:
            raise ValueError(f'{length} tokens do not fit into block_size {self.config.block_size}')
        here = slice(length) if cache is None else cache.extend(idx.size(1))
        x, rope = self.embedding(idx), None
        if self.config.position == 'learned':
            x = x + self.position.weight[here]
        elif self.config.position == 'sinusoidal':  # embeddings scaled up, as in the paper
            x = x * math.sqrt(self.config.n_embd) + self.sinusoids[here]
        else:
            rope = self.cos[here], self.sin[here]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, rope, cache)
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x)
        x, targets = x.flatten(0, 1), targets.flatten()
        rows = max(1, self.max_logits // self.config.vocab_size)
        if len(x) <= rows:
            loss = self.summed_loss(x, targets)
        else:  # the logits of one part at a time, once more in the backward pass; torch's own is less exact
            loss = sum(checkpoint(self.summed_loss, *part, use_reentrant=False)
                       for part in zip(x.split(rows), targets.split(rows), strict=True))
        return loss / (targets >= 0).sum()

    def summed_loss(self, x, targets):
        """The summed cross-entropy of targets (N,) after the last norm's output x (N, n_embd)."""
        return F.cross_entropy(self.lm_head(x), targets, ignore_index=-1, reduction='sum')

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, stop=-1, never=(), seed=0,
                 compile=False):
        """Continue the prompts idx (B, T), T at most block_size; yields the next token of each, (B,).

        temperature 0 is greedy; top_k keeps the k likeliest tokens (0: all), top_p the smallest set of them
        whose probability reaches p (Holtzman et al. 2019; 1: all); no token of `never` is drawn. Ends after
        max_new_tokens, or when each sequence has emitted `stop`; what a sequence emits after its `stop`
        means nothing. When the context is full, its last half is prefilled anew. `compile` compiles the step
        from a token to the next, on a GPU into a CUDA graph.
        """
        config, device = self.config, idx.device
        # On a CPU attention to 16-bit keys takes four times as long as to 32-bit ones.
        dtype = torch.float32 if device.type == 'cpu' else self.embedding.weight.dtype
        cache = KVCache(config, idx.size(0), device, dtype)
        if compile:
            static = StaticCache(cache)
            step = torch.compile(partial(self, cache=static), dynamic=False, mode='reduce-overhead')
        generator = torch.Generator(device).manual_seed(seed)
        never = torch.tensor(never, dtype=torch.long, device=device)
        context, ended = idx, torch.zeros(idx.size(0), dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            if cache.length + idx.size(1) > config.block_size:
                context = context[:, -max(config.block_size // 2, 1):]
                idx, cache.length = context, 0
            if compile and idx.size(1) == 1:
                static.place.fill_(cache.extend(1).start)
                logits = step(idx)[:, -1].float()
            else:
                logits = self(idx, cache=cache)[:, -1].float()
            logits.index_fill_(-1, never, -math.inf)
            token = pick(logits, temperature, top_k, top_p, generator)
            yield token
            ended |= token == stop
            if stop >= 0 and ended.all():
                return
            idx = token[:, None]
            context = torch.cat((context, idx), dim=1)


def pick(logits, temperature, top_k, top_p, generator):
    """Draw one token id a row from logits (B, vocab_size); returns (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, kept = logits / temperature, None
    if 0 < top_k < logits.size(-1):
        logits, kept = logits.topk(top_k)
    probs = logits.softmax(-1)
    if top_p < 1:
        # All below (1 - top_p) / vocab_size together make up less than 1 - top_p: only the rest need sorting.
        likely = (probs * probs.size(-1) > 1 - top_p).sum(-1).max()
        probs, order = probs.topk(max(likely.item(), 1))
        kept = order if kept is None else kept.gather(-1, order)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # what reaches top_p stays
    if probs.device.type == 'cpu':  # multinomial draws a number for each id of the vocabulary; two will do
        width = math.gcd(probs.size(-1), 256)
        blocks = probs.unflatten(-1, (-1, width))
        block = draw(blocks.sum(-1), generator)
        drawn = block * width + draw(blocks[torch.arange(len(blocks)), block[:, 0]], generator)
    else:
        drawn = torch.multinomial(probs, 1, generator=generator)
    return (drawn if kept is None else kept.gather(-1, drawn))[:, 0]


def draw(weights, generator):
    """Draw an index a row in proportion to weights (B, n), none below 0; returns (B, 1)."""
    sums = weights.cumsum(-1)
    return torch.searchsorted(sums, sums[:, -1:] * (1 - torch.rand(len(sums), 1, generator=generator)))
