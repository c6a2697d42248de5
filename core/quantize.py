"""int8 weights for generation on a CPU, where the time per token is mostly that of reading the weights."""

import torch
import torch.nn as nn
from torch.nn import functional as F


def round_to_int8(weight):
    """Round a matrix (out, in) to int8; returns it and one bfloat16 scale per row: weight = int8 * scale."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()
    rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)
    return rounded.to(torch.int8), scale


class Int8Linear:
    """Linear layers of the same input as one product with int8 weights; bfloat16 in and out.

    Called with x (B, T, in_features), it returns the output of each layer, or that of the only layer. It is
    not an nn.Module, because calling a module takes as long as a small product. Raises ValueError if 32 does
    not divide in_features.
    """

    def __init__(self, *linears):
        in_features = linears[0].in_features
        if in_features % 32 != 0:  # the kernel would read beyond the end of the rows
            raise ValueError(f'dtype int8 needs widths that are multiples of 32, not {in_features}')
        self.weight, self.scale = round_to_int8(torch.cat([linear.weight for linear in linears]))
        self.bias = None
        if linears[0].bias is not None:
            self.bias = torch.cat([linear.bias for linear in linears]).detach()
        self.sizes = [linear.out_features for linear in linears]
        # With so few rows, rounding x takes longer than an int8 product saves. On a CPU with AMX,
        # torch._int_mm also rearranges all weights first.
        self.few_rows = 2**14 // len(self.weight)
        if torch.cpu._is_amx_tile_supported():
            self.few_rows = max(self.few_rows, 4)

    def __call__(self, x):
        B, T, C = x.shape
        rows = x.view(B * T, C)
        if len(rows) <= self.few_rows:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = self.multiply_in_int8(rows)
        if self.bias is not None:
            y = y + self.bias
        y = y.view(B, T, -1)
        if len(self.sizes) == 1:
            return y
        return y.split_with_sizes(self.sizes, dim=-1)

    def multiply_in_int8(self, rows):
        """Round the rows (n, in_features) to int8, too, with one scale each, and multiply int8 by int8."""
        row_scale = (rows.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-12)
        rounded = (rows / row_scale).round_().to(torch.int8)
        y = torch._int_mm(rounded, self.weight.T).float()
        return y.mul_(row_scale).mul_(self.scale).bfloat16()


def make_norm_function(norm):
    """Return a function that computes what the module `norm` does, in less time per call."""
    if isinstance(norm, nn.LayerNorm):
        return norm.forward
    C = norm.weight.numel()
    weight = torch.cat((norm.weight, norm.weight)).detach()

    def rms_norm(x):
        # LayerNorm has a fast kernel. The mean of (x, -x) is 0, so its LayerNorm is the RMSNorm of x.
        both = F.layer_norm(torch.cat((x, -x), -1), (2 * C,), weight, None, norm.eps)
        return both[..., :C].contiguous()

    return rms_norm


def replace_module(parent, name, function):
    """Replace the submodule `name` by a function: calling a module takes as long as a small product."""
    delattr(parent, name)
    setattr(parent, name, function)


def to_int8(model):
    """Convert a GPT to bfloat16 and its linear layers to int8, in place; returns the model.

    From then on it can only generate, on a CPU. Raises ValueError if 32 does not divide one of its widths.
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
            replace_module(mlp, 'up', Int8Linear(mlp.up))
        replace_module(attn, 'proj', Int8Linear(attn.proj))
        replace_module(mlp, 'proj', Int8Linear(mlp.proj))
        replace_module(block, 'attn_norm', make_norm_function(block.attn_norm))
        replace_module(block, 'mlp_norm', make_norm_function(block.mlp_norm))
        replace_module(block, 'attn', attn.forward)
        replace_module(block, 'mlp', mlp.forward)
    replace_module(model, 'norm', make_norm_function(model.norm))
    replace_module(model, 'lm_head', Int8Linear(model.lm_head))
    replace_module(model, 'blocks', [block.forward for block in model.blocks])
    return model
