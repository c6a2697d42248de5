"""int8 linear layers, for writing on a CPU: the weights of one token's step are what a CPU waits for."""

import torch
import torch.nn as nn
from torch.nn import functional as F


def round_to_int8(weight):
    """A matrix as int8 numbers, and a scale for each row in bfloat16."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
    return (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear:
    """Linear layers as one product: int8 weights, a scale for each output, bfloat16 in and out.

    Called with x (B, T, in_features) returns the output of each layer, or of the only one. Where the product
    is large, x is rounded to int8 too, with a scale for each row. No nn.Module: to call one takes as long as
    a small product. Raises ValueError for a width that 32 does not divide.
    """

    def __init__(self, *linears):
        if linears[0].in_features % 32:  # the kernel reads beyond the rows of others
            raise ValueError(f'int8 needs widths that 32 divides, not {linears[0].in_features}')
        weight, bias = ([getattr(linear, name) for linear in linears] for name in ('weight', 'bias'))
        self.weight, self.scale = round_to_int8(torch.cat(weight))
        self.bias = None if bias[0] is None else torch.cat(bias).detach()
        self.sizes = [linear.out_features for linear in linears]
        # rows: of so few, rounding x would take longer than it saves, as does AMX, which orders weights anew
        self.few = max(2**14 // len(weight), 4 * torch.cpu._is_amx_tile_supported())

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


def fast_norm(norm):
    """A function that computes as the module `norm` does."""
    if isinstance(norm, nn.LayerNorm):
        return norm.forward
    weight, C = torch.cat((norm.weight, norm.weight)).detach(), norm.weight.numel()

    def rms_norm(x):  # LayerNorm, which has a kernel of its own, of (x, -x), whose mean is 0
        both = F.layer_norm(torch.cat((x, -x), -1), (2 * C,), weight, None, norm.eps)
        return both[..., :C].contiguous()

    return rms_norm


def replace(module, name, function):
    """Put a function in the place of a submodule: calling a module costs more than a small product."""
    delattr(module, name)
    setattr(module, name, function)


def to_int8(model):
    """Turn a GPT into bfloat16 and its linear layers into int8; returns it, which then is for writing alone.

    Raises ValueError where a width does not suit.
    """
    model.bfloat16()
    for block in model.blocks:
        attn, mlp = block.attn, block.mlp
        attn.qkv = Int8Linear(attn.q, attn.k, attn.v)
        del attn.q, attn.k, attn.v
        if mlp.kind == 'swiglu':
            mlp.gate_up = Int8Linear(mlp.gate, mlp.up)
            del mlp.gate, mlp.up
        else:
            replace(mlp, 'up', Int8Linear(mlp.up))
        for layer in attn, mlp:
            replace(layer, 'proj', Int8Linear(layer.proj))
        for name in 'attn', 'mlp':
            replace(block, f'{name}_norm', fast_norm(getattr(block, f'{name}_norm')))
            replace(block, name, getattr(block, name).forward)
    replace(model, 'norm', fast_norm(model.norm))
    replace(model, 'lm_head', Int8Linear(model.lm_head))
    replace(model, 'blocks', [block.forward for block in model.blocks])
    return model
