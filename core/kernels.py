"""Faster equivalents of parts of model.py, for training. They compute the same, except for rounding.

`use_fast_cpu_kernels(model)` puts in place those for a CPU, which take fewer passes over memory. On a GPU
torch.compile does that by itself, from model.py. `use_joined_products(model)` is for a GPU, which multiplies
faster by one large matrix than by several small ones.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from model import MLP, Attention, to_autocast_dtype

# Longest context for which attention by two matrix products is used: its memory grows with T squared.
LONGEST_MATH_ATTENTION = 512


# for a CPU --------------------------------------------------------------------

class RMSNormFunction(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, cast to the autocast dtype.

    Takes half as many passes over memory as autograd's version.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.size(-1)
        scale = (mean_square + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return to_autocast_dtype((x * scale).mul_(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        products = (grad * x).flatten(0, -2)
        row_sums = (products @ weight).view_as(scale)
        grad_x = (grad * weight).mul_(scale).addcmul_(x, row_sums * scale**3 / -x.size(-1))
        grad_weight = products.T @ scale.flatten()
        return grad_x, grad_weight, None


class FastRMSNorm(nn.RMSNorm):
    def forward(self, x):
        if not torch.is_grad_enabled():
            return super().forward(x)
        return RMSNormFunction.apply(x, self.weight, self.eps)


def rotate_all_heads(x, cos, sin):
    """Rotate x (B, T, heads, head_dim) by cos and sin (T, heads * head_dim), one entry per number of x."""
    halves_swapped = x.roll(x.size(-1) // 2, -1)
    return torch.addcmul(x.flatten(2) * cos, halves_swapped.flatten(2), sin).view_as(x)


class RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate_all_heads(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate_all_heads(grad, cos, -sin), None, None  # the inverse rotation


def math_attention(q, k, v, dropout):
    """Causal attention as two matrix products, in the dtype of v.

    On a CPU in bfloat16 this is 1.3x to 3x faster than the flash kernel, whose backward pass is slow there.
    q: (B, n_head, T, head_dim). k, v: (B, n_kv_head, T, head_dim).
    """
    B, n_head, T, head_dim = q.shape
    group = n_head // k.size(1)
    q = q.flatten(0, 1)
    k = k.repeat_interleave(group, dim=1).flatten(0, 1)
    v = v.repeat_interleave(group, dim=1).flatten(0, 1)
    future = torch.full((T, T), -math.inf, dtype=v.dtype).triu(1)
    scores = torch.baddbmm(future, q, k.mT, alpha=1 / math.sqrt(head_dim))
    weights = F.dropout(scores.softmax(-1, dtype=v.dtype), dropout)
    return (weights @ v).view(B, n_head, T, head_dim)


class FastAttention(Attention):
    def qkv(self, x):
        return super().qkv(to_autocast_dtype(x))

    def rotate(self, q, k, cos, sin):
        """Rotate queries and keys together: one pass over memory instead of two.

        cos, sin: (T, (n_head + n_kv_head) * head_dim), as `use_fast_cpu_kernels` makes them.
        """
        both = torch.cat((q, k), dim=2)
        cos, sin = cos.type_as(both), sin.type_as(both)
        if torch.is_grad_enabled():
            both = RopeFunction.apply(both, cos, sin)
        else:
            both = rotate_all_heads(both, cos, sin)
        return both.split_with_sizes((q.size(2), k.size(2)), dim=2)

    def attend(self, q, k, v, mask, is_causal):
        T = q.size(2)
        if not is_causal or T > LONGEST_MATH_ATTENTION or not torch.is_autocast_enabled('cpu'):
            return super().attend(q, k, v, mask, is_causal)
        dropout = self.config.dropout if self.training else 0.0
        return math_attention(to_autocast_dtype(q), to_autocast_dtype(k), to_autocast_dtype(v), dropout)


class FastMLP(MLP):
    def gate_up(self, x):
        return super().gate_up(to_autocast_dtype(x))


def use_fast_cpu_kernels(model):
    """Replace the RMSNorms, attentions and MLPs of a GPT on a CPU with faster equivalents, in place.

    Parameters stay the same tensors under the same names. The rotary tables become one row per position with
    an entry for every number of queries and keys.
    """
    faster = {nn.RMSNorm: FastRMSNorm, Attention: FastAttention, MLP: FastMLP}
    for module in model.modules():
        if type(module) in faster:
            module.__class__ = faster[type(module)]  # same parameters, other methods
    if model.config.position == 'rope':
        heads = model.config.n_head + model.config.n_kv_head
        model.cos = torch.cat((model.cos, model.cos), dim=-1).repeat(1, heads)
        model.sin = torch.cat((-model.sin, model.sin), dim=-1).repeat(1, heads)


# for a GPU --------------------------------------------------------------------

def multiply_by_joined(x, *linears):
    """Apply linear layers of the same input as one product; return the output of each.

    The weights stay parameters of their own, so they are joined each time. torch.compile does that while it
    casts them to the autocast dtype, where it copies them anyway.
    """
    weight = torch.cat([linear.weight for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears])
    sizes = [linear.out_features for linear in linears]
    return F.linear(x, weight, bias).split_with_sizes(sizes, dim=-1)


class JoinedAttention(Attention):
    def qkv(self, x):
        return multiply_by_joined(x, self.q, self.k, self.v)


class JoinedMLP(MLP):
    def gate_up(self, x):
        return multiply_by_joined(x, self.gate, self.up)


def use_joined_products(model):
    """Let a GPT compute queries, keys and values as one product, and gate and up as one, in place.

    Parameters stay the same tensors under the same names.
    """
    for block in model.blocks:
        block.attn.__class__ = JoinedAttention  # same parameters, other methods
        block.mlp.__class__ = JoinedMLP
