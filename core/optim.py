"""The optimizers: Muon for the matrices of the blocks, AdamW for everything else."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

# coefficients of x, (x x') x and (x x')^2 x, chosen for the steepest slope at 0 (Jordan 2024)
NEWTON_SCHULZ = 3.4445, -4.775, 2.0315
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalized (Jordan 2024).

    Every row of the momentum is scaled to the same norm first (MuonEq-R). Matrices of one shape are stacked,
    so that one batched product serves all of them. With several ranks, each orthogonalizes its share of a
    stack and the shares are exchanged. The learning rate of a matrix that is taller than wide is larger by
    sqrt(rows / columns). Every parameter must have a gradient.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.9):
        super().__init__(params, {'lr': lr, 'weight_decay': weight_decay, 'momentum': momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = dict.fromkeys(p.shape for p in group['params'])  # in order, each once
            for shape in shapes:
                params = [p for p in group['params'] if p.shape == shape]
                self.step_stack(params, group)

    def step_stack(self, params, group):
        """Update all matrices of one shape."""
        rows, columns = params[0].shape
        momentum = group['momentum']
        buffers = [self.momentum_buffer(p) for p in params]
        grads = torch.stack([p.grad for p in params])
        mean = torch.stack(buffers).lerp_(grads, 1 - momentum)
        torch._foreach_copy_(buffers, mean.unbind())
        nesterov = grads.lerp_(mean, momentum)
        updates = orthogonalize_on_all_ranks(nesterov)
        lr = group['lr'] * max(1, rows / columns) ** 0.5
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, updates.unbind(), alpha=-lr)

    def momentum_buffer(self, p):
        state = self.state[p]
        if 'momentum_buffer' not in state:
            state['momentum_buffer'] = torch.zeros_like(p)
        return state['momentum_buffer']


def orthogonalize(stack):
    """Return the matrices of a stack (n, rows, columns) with singular values near 1 (0.7 to 1.2).

    Each row is scaled to norm 1 first. Then come five steps of a Newton-Schulz iteration in bfloat16, as in
    torch.optim.Muon.
    """
    x = stack / stack.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    x = x.bfloat16()
    is_tall = stack.size(1) > stack.size(2)
    if is_tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT if is_tall else x


def orthogonalize_on_all_ranks(stack):
    """Return orthogonalize(stack); every rank computes a share, as all have the same gradients."""
    if not dist.is_initialized():
        return orthogonalize(stack)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = math.ceil(len(stack) / world_size)
    missing = share * world_size - len(stack)
    padded = F.pad(stack, (0, 0, 0, 0, 0, missing))
    ours = orthogonalize(padded[rank * share:(rank + 1) * share]).contiguous()
    everything = ours.new_empty(padded.shape)
    # torch 2.13 has a new name for it; as bytes, because gloo has no bfloat16
    all_gather = getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)
    all_gather(everything.view(torch.uint8), ours.view(torch.uint8))
    return everything[:len(stack)]


def make_optimizers(model, optimizer, learning_rate, weight_decay, betas):
    """Return optimizers that together update all parameters; the schedule scales each group's 'peak_lr'.

    optimizer: 'muon' (the matrices of the blocks; AdamW takes embeddings, head, norms and biases) or 'adamw'
    (everything). learning_rate: AdamW's peak; Muon's is twice that. 0: 0.01 with Muon, 1e-3 without.
    """
    if learning_rate == 0:
        learning_rate = 0.01 if optimizer == 'muon' else 1e-3
    muon_params, decayed, not_decayed = [], [], []
    for name, p in model.named_parameters():
        if p.dim() != 2:
            not_decayed.append(p)
        elif optimizer == 'muon' and name.startswith('blocks.'):
            muon_params.append(p)
        else:
            decayed.append(p)
    groups = [{'params': decayed, 'weight_decay': weight_decay}, {'params': not_decayed, 'weight_decay': 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    if muon_params:
        optimizers.insert(0, Muon(muon_params, lr=2 * learning_rate, weight_decay=weight_decay))
    for opt in optimizers:
        for group in opt.param_groups:
            group['peak_lr'] = group['lr']
    return optimizers


def set_learning_rate(optimizers, factor):
    """Set every learning rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = factor * group['peak_lr']


def clip_and_step(model, optimizers, scaler, grad_clip):
    """Clip the gradients to the norm `grad_clip` (0: do not clip), update, and return their norm before.

    In float16 an inf or nan in the gradients skips the update and halves the loss scale. That is decided
    here, not by scaler.step(): it looks at the gradients of each optimizer on its own, so that one optimizer
    could step while the other does not, and clip_grad_norm_ has spread the inf or nan to all gradients.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    if scaler.is_enabled() and not grad_norm.isfinite():
        scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
        scaler.load_state_dict(scaler.state_dict() | {'_growth_tracker': 0})  # count good steps from here
    else:
        for optimizer in optimizers:
            optimizer.step()
        scaler.update()
    model.zero_grad(set_to_none=True)
    return grad_norm
