"""The optimizers: Muon for the matrices of the blocks, AdamW for the rest."""

import torch


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
        optimizers.insert(0, torch.optim.Muon(matrices, lr=2 * adamw_lr, weight_decay=weight_decay))
    for group in (group for opt in optimizers for group in opt.param_groups):
        group['peak_lr'] = group['lr']
    return optimizers
