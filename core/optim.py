"""The optimizers: Muon for the matrices of the blocks, AdamW for the rest."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

NEWTON_SCHULZ = 3.4445, -4.775, 2.0315  # of x, x x' x and x x' x x' x: steepest at 0 (Jordan 2024)


class Muon(torch.optim.Optimizer):
    """Adds to each matrix its momentum made nearly orthogonal (Jordan 2024), its rows of equal norm before.

    Matrices of one shape are stacked: 12 products for all of them, not 12 for each. With several ranks each
    orthogonalises its share of a stack and hands it on, as all have the same gradients. The rate of a matrix
    taller than wide is larger by sqrt(rows / columns). Every parameter must have a gradient.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.9):
        super().__init__(params, {'lr': lr, 'weight_decay': weight_decay, 'momentum': momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group['lr'], group['momentum']
            for rows, columns in dict.fromkeys(p.shape for p in group['params']):
                params = [p for p in group['params'] if p.shape == (rows, columns)]
                buffers = [self.state[p].setdefault('momentum_buffer', torch.zeros_like(p)) for p in params]
                grads = torch.stack([p.grad for p in params])
                mean = torch.stack(buffers).lerp_(grads, 1 - momentum)
                torch._foreach_copy_(buffers, mean.unbind())
                steps = in_shares(grads.lerp_(mean, momentum))  # Nesterov's: a step ahead
                torch._foreach_mul_(params, 1 - lr * group['weight_decay'])
                torch._foreach_add_(params, steps.unbind(), alpha=-lr * max(1, rows / columns) ** 0.5)


def in_shares(stack):
    """orthogonalised(stack), of which each rank computes a part."""
    if not dist.is_initialized():
        return orthogonalised(stack)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = -(-len(stack) // world_size)
    padded = F.pad(stack, (0, 0, 0, 0, 0, share * world_size - len(stack)))
    part = orthogonalised(padded[rank * share:(rank + 1) * share]).contiguous()
    whole = part.new_empty(padded.shape)
    dist.all_gather_into_tensor(whole.view(torch.uint8), part.view(torch.uint8))  # gloo knows no bfloat16
    return whole[:len(stack)]


def orthogonalised(stack):
    """Each matrix of a stack (n, rows, columns) with rows of one norm (MuonEq-R) and then singular values
    near 1 (0.7 to 1.2): by five steps of Newton-Schulz, in bfloat16 as those of torch.optim.Muon."""
    x = (stack / stack.norm(dim=-1, keepdim=True).clamp(min=1e-30)).bfloat16()
    x = x.mT if x.size(1) > x.size(2) else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if stack.size(1) > stack.size(2) else x


def make_optimizers(model, optimizer, learning_rate, weight_decay, betas):
    """A list of optimizers that share out all parameters; each group's `peak_lr` is what the schedule scales.

    Muon (Jordan 2024) takes the matrices of the blocks, AdamW embeddings, head, norms and biases; or it takes
    all, where `optimizer` is 'adamw'. learning_rate: of AdamW; 0: as train.py says.
    """
    in_blocks = {name for name, p in model.named_parameters() if p.dim() == 2 and name.startswith('blocks.')}
    by_muon = in_blocks if optimizer == 'muon' else set()
    adamw_lr = learning_rate or (0.01 if optimizer == 'muon' else 1e-3)
    rest = [p for name, p in model.named_parameters() if name not in by_muon]
    groups = [{'params': [p for p in rest if p.dim() == 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest if p.dim() != 2], 'weight_decay': 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=adamw_lr, betas=betas, fused=True)]
    if by_muon:
        matrices = [p for name, p in model.named_parameters() if name in by_muon]
        optimizers.insert(0, Muon(matrices, lr=2 * adamw_lr, weight_decay=weight_decay))
    for group in (group for opt in optimizers for group in opt.param_groups):
        group['peak_lr'] = group['lr']
    return optimizers
