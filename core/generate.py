"""The KV caches, the loop from token to token, drawing a token."""

import itertools
import math
from functools import partial
from random import Random

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from configurator import UserError
from data import infill

# For attention to a cache. cuDNN, which an H100 would take, plans anew for each length: up to 0.1 s a token
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class KVCache:
    """Keys and values of the tokens seen so far, for B sequences of up to block_size tokens."""

    def __init__(self, config, B, device, dtype):
        shape = B, config.n_kv_head, config.block_size, config.head_dim
        self.layers = [[torch.zeros(shape, device=device, dtype=dtype) for _ in 'kv']
                       for _ in range(config.n_layer)]
        self.device, self.length = device, 0

    def extend(self, T):
        """Make room for T tokens and return their positions, a slice; `mask` is what they may look at."""
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
    """A view of a KVCache for compiled steps of one token: no shape changes, and `pos` is a tensor."""

    def __init__(self, cache):
        self.layers, self.length = cache.layers, 0
        self.pos = torch.zeros(1, dtype=torch.long, device=cache.device)
        for tensor in self.pos, *(tensor for layer in self.layers for tensor in layer):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs take no other tensors that change

    def extend(self, T):
        self.mask = (torch.arange(self.layers[0][0].size(2), device=self.pos.device) <= self.pos)[None]
        return self.pos

    def append(self, layer, k, v):
        for kept, new in zip(self.layers[layer], (k, v), strict=True):
            kept.index_copy_(2, self.pos, new.type_as(kept))
        return self.layers[layer]


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, suppress=(), seed=0,
             compile=False, given=None):
    """Continue the prompts idx (B, T), T at most block_size; yields the next token of each, (B,).

    temperature 0 is greedy; top_k keeps the k likeliest tokens (0: all), top_p the smallest set of them whose
    probability reaches p (Holtzman et al. 2019; 1: all); no token of `suppress` is drawn. given: (B, n), what
    comes first in place of drawn tokens, -1 for none, so that a row's prompt may be longer than T.
    `compile` compiles the step from a token to the next, on a GPU into a CUDA graph.
    """
    block_size, device = model.config.block_size, idx.device
    # on a CPU attention to 16-bit keys takes four times as long as to 32-bit ones
    dtype = torch.float32 if device.type == 'cpu' else model.embedding.weight.dtype
    cache = KVCache(model.config, idx.size(0), device, dtype)
    if compile:
        static = StaticCache(cache)
        compiled_model = torch.compile(partial(model, cache=static), dynamic=False, mode='reduce-overhead')
    generator = torch.Generator(device).manual_seed(seed)
    suppress = torch.tensor(suppress, dtype=torch.long, device=device)
    context = idx
    with sdpa_kernel(KERNELS):
        for step in range(max_new_tokens):
            if cache.length + idx.size(1) > block_size:  # full: its last half is prefilled anew
                idx, cache.length = context[:, -max(block_size // 2, 1):], 0
            if compile and idx.size(1) == 1:
                static.pos.fill_(cache.extend(1).start)
                logits = compiled_model(idx)
            else:  # prefill, or one token
                logits = model(idx, cache=cache)
            logits = logits[:, -1].float().index_fill_(-1, suppress, -math.inf)
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if given is not None and step < given.size(-1):
                token = torch.where(given[:, step] >= 0, given[:, step], token)
            yield token
            idx = token[:, None]
            context = torch.cat((context, idx), dim=1)


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draw one token id a row from logits (B, V); returns (B,)."""
    kept = None
    if temperature > 0 and 0 < top_k < logits.size(-1):
        logits, kept = logits.topk(top_k)
    likeliest, token = logits.max(-1, keepdim=True)
    if not likeliest.isfinite().all():
        raise UserError("the model predicts no numbers: its weights are ruined, as by a run that diverged")
    if temperature == 0:
        return token[:, 0]
    probs = ((logits - likeliest) / temperature).softmax(-1)  # however small that is
    if top_p < 1:
        # all below (1 - top_p) / V together make up less than 1 - top_p: only the rest need sorting
        likely = (probs * probs.size(-1) > 1 - top_p).sum(-1).max()
        probs, order = probs.topk(max(likely.item(), 1))
        kept = order if kept is None else kept.gather(-1, order)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)  # what reaches top_p stays
    if probs.device.type == 'cpu':  # multinomial draws a number for each id of the vocabulary; two will do
        width = math.gcd(probs.size(-1), 256)
        groups = probs.unflatten(-1, (-1, width))
        group = sample_index(groups.sum(-1), generator)
        chosen = group * width + sample_index(groups[torch.arange(len(groups)), group[:, 0]], generator)
    else:
        chosen = torch.multinomial(probs, 1, generator=generator)
    return (chosen if kept is None else kept.gather(-1, chosen))[:, 0]


def sample_index(weights, generator):
    """Draw an index a row in proportion to weights (B, n), none below 0; returns (B, 1)."""
    sums = weights.cumsum(-1)
    return torch.searchsorted(sums, sums[:, -1:] * (1 - torch.rand(len(sums), 1, generator=generator)))


# from prompts to whole stories --------------------------------------------------

def generate_until(model, prompts, stop, max_new_tokens, min_new_tokens=0, **drawing):
    """Continue prompts, lists of ids of any lengths, side by side, until each has written `stop`.

    Yields, after each step, (rows, growing): the list of new ids of each, and the set of those that are not
    whole. A `stop` that ends a row is not in it; one before min_new_tokens stays and ends nothing. A row of
    max_new_tokens was cut. drawing: for `generate`.
    """
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    prompt = torch.tensor([ids + [-1] * (longest - len(ids)) for ids in prompts],
                          device=next(model.parameters()).device)
    idx, given = prompt[:, :shortest], prompt[:, shortest:]
    rows, growing = [[] for _ in prompts], {*range(len(prompts))}
    steps = generate(model, idx, max_new_tokens + longest - shortest, given=given, **drawing)
    for step, tokens in enumerate(steps):
        for i, token in enumerate(tokens.tolist()):
            if i in growing and step >= len(prompts[i]) - shortest:
                ended = token == stop and len(rows[i]) >= min(min_new_tokens, max_new_tokens - 1)
                rows[i] += [] if ended else [token]
                if ended or len(rows[i]) == max_new_tokens:
                    growing.remove(i)
        yield rows, growing
        if not growing:
            return


def stories_at_once(model):
    """How many have their keys and values, in float32, in 1 GB of memory or 8 of a GPU's; on a CPU more than
    128 bring nothing."""
    c, on_cpu = model.config, next(model.parameters()).device.type == 'cpu'
    size = 8 * c.n_layer * c.n_kv_head * c.head_dim * c.block_size
    return max(min(2**30 // size, 128) if on_cpu else 2**33 // size, 1)


def generate_stories(model, prompts, stop, max_new_tokens, seed, name='writing', **drawing):
    """Continue any number of prompts, as many side by side as there is room for. Yields the new ids of each,
    in their order, once they and those before them are whole. name: of the bar. drawing: as `continued`."""
    at_once, seeds = stories_at_once(model), Random(seed)
    for first in range(0, len(prompts), at_once):
        steps = generate_until(model, prompts[first:first + at_once], stop, max_new_tokens,
                          seed=seeds.getrandbits(63) if first else seed, **drawing)
        shown = 0
        for rows, growing in tqdm(steps, f'{name}, from {first + 1:,} of {len(prompts):,}', max_new_tokens,
                                  leave=False, disable=None, unit=' tokens'):
            while shown < len(rows) and shown not in growing:
                yield rows[shown]
                shown += 1


def opening(split, tokenizer, longest):
    """How the first story of a split begins: its first four words as ids, a list of at most `longest`."""
    special = tokenizer.delimiter, tokenizer.blank, tokenizer.middle
    ids = split.read(0, 200).tolist()
    ids = itertools.takewhile(lambda token: token not in special, ids[ids[0] == tokenizer.delimiter:])
    return first_words(tokenizer.decode([*ids]), tokenizer, longest)


def first_words(text, tokenizer, longest):
    """Its first four words as ids, a list of at most `longest`."""
    return tokenizer.encode(' '.join(text.split(' ')[:4]))[:longest]


def sample_story(model, tokenizer, seed, prompt=(), stopped=lambda: False):
    """A story that begins with the ids `prompt`, for a person to see; cut short once stopped() is true."""
    steps = generate_until(model, [[tokenizer.delimiter, *prompt]], tokenizer.delimiter,
                           model.config.block_size, temperature=0.8,
                           suppress=(tokenizer.blank, tokenizer.middle), seed=seed)
    for (story,), growing in steps:
        if not growing or stopped():
            return infill.decode(tokenizer, [*prompt, *story])
