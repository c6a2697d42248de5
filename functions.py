"""What the model computes with backward passes of its own: autograd's take more time or more memory."""

import torch
import torch.nn as nn
from torch.nn import functional as F


def cast(x):
    """x in the dtype that autocast would give it: once, where several linear layers take it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class RMSNormOnCPU(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, cast: half as many passes over memory."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.size(-1)
        scale = (mean + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return cast((x * scale).mul_(weight))

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        products = (grad * x).flatten(0, -2)
        sums = (products @ weight).view_as(scale)  # of each row
        grad_x = (grad * weight).mul_(scale).addcmul_(x, sums * scale**3 / -x.size(-1))
        return grad_x, products.T @ scale.flatten(), None


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        if x.device.type == 'cpu' and torch.is_grad_enabled():  # on a GPU, torch.compile makes one pass of it
            return RMSNormOnCPU.apply(x, self.weight, self.eps)
        return super().forward(x)


def rotated(x, cos, sin):
    halves_swapped = x.roll(x.size(-1) // 2, -1)
    return torch.addcmul(x.flatten(2) * cos, halves_swapped.flatten(2), sin).view_as(x)


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, -sin), None, None


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + head_dim / 2]), Hugging Face's layout.
    x: (B, T, heads, head_dim), cos and sin: (T, heads * head_dim), for each number of a token."""
    turn = Rotation.apply if torch.is_grad_enabled() else rotated  # 4 us less for each token written
    return turn(x, cos.type_as(x), sin.type_as(x))


def log_probs_in_parts(head, x, targets, rows):
    """Yields x, the log-probabilities of head(x) in float32 and the targets, `rows` tokens at a time:
    all at once, they would be the largest tensors by far, 3.3 GB for 16,384 tokens of GPT-2's vocabulary."""
    for part, target in zip(x.split(rows), targets.split(rows), strict=True):
        yield part, head(part).log_softmax(-1, dtype=torch.float32), target


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of the logits x @ weight.T, in parts of `rows` tokens.

    The gradients are made in the forward pass, while a part's probabilities are at hand, as in the fused
    linear cross-entropy of Liger Kernel (Hsu et al. 2024): as fast as all logits at once, in less memory.
    x: (B T, C), weight: (V, C), targets: (B T,), -1 where there is none.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, rows):
        x_, weight_ = cast(x), cast(weight)  # what the matrix products take
        loss, grad_x, grad_weight = x.new_zeros((), dtype=torch.float32), [], torch.zeros_like(weight)
        for part, log_p, target in log_probs_in_parts(lambda x: F.linear(x, weight_), x_, targets, rows):
            loss += F.nll_loss(log_p, target, ignore_index=-1, reduction='sum')
            if ctx.needs_input_grad[0]:  # d loss / d logits: the probabilities, less 1 at the target
                given = (target >= 0)[:, None]
                grad = log_p.exp_().scatter_add_(1, target.clamp(min=0)[:, None], -given.float())
                grad = grad.to(weight_.dtype)
                grad_x.append(grad @ weight_ * given)
                grad_weight += grad.T @ (part * given)
        ctx.grads = (torch.cat(grad_x).type_as(x), grad_weight) if grad_x else None
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.grads
        return grad_x * grad, grad_weight * grad, None, None
