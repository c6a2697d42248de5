"""Greedy generation without a cache, as a reference for core/generate.py."""

import torch


def next_context(context, block_size):
    """Return what is left of the token ids (B, T) once they exceed the context: their last half."""
    if context.size(1) <= block_size:
        return context
    return context[:, -max(block_size // 2, 1):]


def greedy_tokens(model, ids, max_new_tokens, stop=-1, min_new_tokens=0):
    """Return the tokens that a model without a cache adds to the list `ids`, greedily, until `stop`."""
    context = torch.tensor([ids])
    new = []
    while len(new) < max_new_tokens:
        context = next_context(context, model.config.block_size)
        token = model(context)[0, -1].argmax().item()
        if token == stop and len(new) >= min_new_tokens:
            break
        new.append(token)
        context = torch.cat((context, torch.tensor([[token]])), 1)
    return new
