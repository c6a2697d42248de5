"""Generation with a KV cache, from single tokens up to whole stories.

    generate          yields the next token of each prompt of a batch
    generate_until    continues prompts of different lengths, each until its story ends
    generate_stories  continues any number of prompts, in batches that fit into memory
    sample_story      returns the text of one story

Shapes: B sequences, T tokens each, V = vocab_size.
"""

import math
from functools import partial
from random import Random

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from configurator import UserError
from core.native import NativeModel
from data import infill

# Attention backends for generation: all but cuDNN, which an H100 would choose. cuDNN makes a new plan for
# each length of the cache, which takes up to 0.1 s per token.
SDPA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


# KV caches ----------------------------------------------------------------------

class KVCache:
    """Keys and values of the tokens seen so far, for B sequences of up to block_size tokens.

    The model calls `extend` once per forward pass and then `append` in each layer.
    """

    def __init__(self, config, B, device, dtype):
        shape = (B, config.n_kv_head, config.block_size, config.head_dim)
        self.layers = []
        for _ in range(config.n_layer):
            keys = torch.zeros(shape, device=device, dtype=dtype)
            values = torch.zeros(shape, device=device, dtype=dtype)
            self.layers.append((keys, values))
        self.device = device
        self.length = 0  # tokens in the cache
        self.mask = None  # (T, length), which tokens each new token attends to; None: see `extend`

    def extend(self, T):
        """Make room for T tokens and return their positions, a slice. Set `mask` for their attention."""
        start = self.length
        self.length += T
        if T == 1 or start == 0:  # all tokens, or plain causal attention: the model needs no mask
            self.mask = None
        else:  # is_causal would align its triangle with the wrong corner
            self.mask = torch.ones(T, self.length, dtype=torch.bool, device=self.device).tril(start)
        return slice(start, self.length)

    def append(self, layer, k, v):
        """Store k and v (B, n_kv_head, T, head_dim) of the newest T tokens; return those of all tokens."""
        keys, values = self.layers[layer]
        T = k.size(2)
        keys.narrow(2, self.length - T, T).copy_(k)
        values.narrow(2, self.length - T, T).copy_(v)
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)


def make_cache(model, B):
    """Return an empty cache for B sequences. model: a GPT, or a NativeModel."""
    if isinstance(model, NativeModel):
        return model.make_cache(B)
    dtype = model.embedding.weight.dtype
    if model.device.type == 'cpu':  # attention to 16-bit keys takes four times as long there
        dtype = torch.float32
    return KVCache(model.config, B, model.device, dtype)


class StaticCache:
    """A view of a KVCache for a compiled step of one token: shapes are fixed, the position is a tensor."""

    def __init__(self, cache):
        self.layers = cache.layers
        self.length = 0  # the position is in `position`; this only passes the model's check of the length
        self.position = torch.zeros(1, dtype=torch.long, device=cache.device)
        torch._dynamo.mark_static_address(self.position)  # CUDA graphs allow no other tensors to change
        for keys, values in self.layers:
            torch._dynamo.mark_static_address(keys)
            torch._dynamo.mark_static_address(values)

    def extend(self, T):
        keys, _ = self.layers[0]
        block_size = keys.size(2)
        self.mask = (torch.arange(block_size, device=keys.device) <= self.position)[None]
        return self.position

    def append(self, layer, k, v):
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.position, k.type_as(keys))
        values.index_copy_(2, self.position, v.type_as(values))
        return keys, values


# one token after another --------------------------------------------------------

def prefill(model, cache, idx):
    """Fill the cache with the tokens idx (B, T) and return the logits (B, V) of the next token.

    Raises UserError if they are not finite.
    """
    cache.length = 0
    logits = model(idx, cache=cache)[:, -1]
    check_logits(logits.amax(-1))
    return logits


def decode_one_token(model, cache, token):
    """Add the tokens (B,) to the cache and return the logits (B, V) of the next token."""
    return model(token[:, None], cache=cache)[:, -1]


def compile_decoding(model, cache):
    """Return `decode_one_token` as a compiled function of the tokens; on a GPU it is one CUDA graph."""
    static_cache = StaticCache(cache)
    step = partial(model, cache=static_cache)
    compiled_step = torch.compile(step, dynamic=False, mode='reduce-overhead')

    def decode(token):
        positions = cache.extend(1)
        static_cache.position.fill_(positions.start)
        return compiled_step(token[:, None])[:, -1]

    return decode


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, suppress=(), seed=0,
             compile=False, forced_tokens=None):
    """Continue the prompts idx (B, T), T at most block_size. Yields the next token of each prompt, (B,).

    When the context is full, its last half is prefilled again.

    temperature: below 1 prefers likely tokens; 0 always takes the likeliest.
    top_k: sample from the k likeliest tokens; 0: from all.
    top_p: sample from the smallest set of tokens whose probability reaches top_p; 1: from all.
    suppress: token ids that are never sampled.
    compile: compile the step from one token to the next.
    forced_tokens: (B, n) tokens that replace the sampled ones of the first n steps, -1 for none. With them a
        row can have a longer prompt than T tokens.
    """
    block_size = model.config.block_size
    device = idx.device
    cache = make_cache(model, idx.size(0))
    decode = compile_decoding(model, cache) if compile else partial(decode_one_token, model, cache)
    generator = torch.Generator(device).manual_seed(seed)
    suppressed = torch.tensor(suppress, dtype=torch.long, device=device)

    context = idx
    with sdpa_kernel(SDPA_BACKENDS):
        logits = prefill(model, cache, idx)
        for step in range(max_new_tokens):
            logits = logits.float().index_fill(-1, suppressed, -math.inf)
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if forced_tokens is not None and step < forced_tokens.size(1):
                forced = forced_tokens[:, step]
                token = torch.where(forced >= 0, forced, token)
            yield token
            if step == max_new_tokens - 1:
                return
            context = torch.cat((context, token[:, None]), dim=1)
            if cache.length < block_size:
                logits = decode(token)
            else:
                logits = prefill(model, cache, context[:, -max(block_size // 2, 1):])


# sampling -----------------------------------------------------------------------

def check_logits(highest):
    """Raise UserError if the highest logits are not finite. This waits for a GPU."""
    if not highest.isfinite().all():
        raise UserError("the model's logits are not finite: did its training diverge?")


def sample_token(logits, temperature, top_k, top_p, generator):
    """Sample one token id per row of logits (B, V); returns (B,).

    Raises UserError if they are not finite, but only on a CPU: elsewhere that would wait for the GPU at each
    token, so `prefill` alone looks.
    """
    highest, likeliest = logits.max(-1, keepdim=True)
    if logits.device.type == 'cpu':
        check_logits(highest)
    if temperature == 0:
        return likeliest[:, 0]
    ids = None  # the token ids of the columns of `probs`, if they are not 0, 1, 2, ...
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    # with the maximum subtracted first, no quotient is +inf, however small the temperature
    probs = ((logits - highest) / temperature).softmax(-1)
    if top_p < 1:
        probs, order = keep_top_p(probs, top_p)
        ids = order if ids is None else ids.gather(-1, order)
    column = sample_index(probs, generator)
    if ids is None:
        return column[:, 0]
    return ids.gather(-1, column)[:, 0]


def keep_top_p(probs, top_p):
    """Keep the smallest set of tokens whose probability reaches top_p (nucleus sampling, Holtzman 2019).

    probs: (B, V). Returns the likeliest candidates, sorted, and their columns in `probs`, (B, n) each. The
    probability of a candidate that is not kept is 0.
    """
    # All tokens below (1 - top_p) / V together have less than 1 - top_p: only the others need sorting.
    n_candidates = (probs * probs.size(-1) > 1 - top_p).sum(-1).max()
    probs, order = probs.topk(max(n_candidates.item(), 1))
    likelier = probs.cumsum(-1) - probs  # the probability of all tokens before this one
    return probs.masked_fill(likelier >= top_p, 0.0), order


def sample_index(probs, generator):
    """Sample one column per row in proportion to probs (B, n); returns (B, 1)."""
    if probs.device.type != 'cpu':
        return torch.multinomial(probs, 1, generator=generator)
    # On a CPU torch.multinomial draws a random number for each entry of the vocabulary. We need only two:
    # one for a group of up to 256 columns, and one for a column in this group.
    width = math.gcd(probs.size(-1), 256)
    groups = probs.unflatten(-1, (-1, width))  # (B, n / width, width)
    group = search_index(groups.sum(-1), generator)
    rows = torch.arange(len(groups))
    column = search_index(groups[rows, group[:, 0]], generator)
    return group * width + column


def search_index(weights, generator):
    """Sample one column per row in proportion to weights (B, n) by a search in their sums; returns (B, 1)."""
    sums = weights.cumsum(-1)
    points = 1 - torch.rand(len(sums), 1, generator=generator)  # in (0, 1], so that no weight of 0 is hit
    return torch.searchsorted(sums, sums[:, -1:] * points)


# from prompts to stories --------------------------------------------------------

def generate_until(model, prompts, stop, max_new_tokens, min_new_tokens=0, **sampling):
    """Continue several prompts side by side, each until it writes the token `stop`.

    prompts: lists of token ids, of any lengths.
    max_new_tokens: a row of so many tokens ends without `stop`: it was cut.
    min_new_tokens: a `stop` before so many tokens is kept and does not end the row.
    sampling: further arguments of `generate`.

    Yields (rows, unfinished) after each step. rows: the new tokens of each prompt so far, lists of ids
    without the `stop` that ended them. unfinished: the indices of the rows that still grow, a set.
    """
    shortest = min(len(ids) for ids in prompts)
    longest = max(len(ids) for ids in prompts)
    padded = torch.tensor([ids + [-1] * (longest - len(ids)) for ids in prompts], device=model.device)
    # the model reads what all prompts have; the rest of the longer ones is forced, step by step
    idx, forced_tokens = padded[:, :shortest], padded[:, shortest:]
    n_steps = longest - shortest + max_new_tokens
    earliest_stop = min(min_new_tokens, max_new_tokens - 1)

    rows = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    steps = generate(model, idx, n_steps, forced_tokens=forced_tokens, **sampling)
    for step, tokens in enumerate(steps):
        for i, token in enumerate(tokens.tolist()):
            in_prompt = shortest + step < len(prompts[i])
            if in_prompt or i not in unfinished:
                continue
            if token == stop and len(rows[i]) >= earliest_stop:
                unfinished.remove(i)
                continue
            rows[i].append(token)
            if len(rows[i]) == max_new_tokens:
                unfinished.remove(i)
        yield rows, unfinished
        if not unfinished:
            return


def max_stories_at_once(model):
    """Return how many stories are written side by side: as many as have room for their keys and values.

    In float32, these take at most 1 GB of a computer's memory. On a GPU they take a quarter of what is free,
    at most 8 GB: the logits of the prompts may take more.
    """
    config = model.config
    bytes_per_story = 2 * 4 * config.n_layer * config.n_kv_head * config.head_dim * config.block_size
    device = model.device
    if device.type == 'cpu':
        at_once = min(2**30 // bytes_per_story, 128)  # more are not faster on a CPU
        return max(at_once, 1)
    at_once = max(min(free_gpu_memory(device) // 4, 2**33) // bytes_per_story, 1)
    # A power of two, because the stories of a seed depend on this number, and free memory varies a little.
    return 2 ** int(math.log2(at_once))


def free_gpu_memory(device):
    """Return the free bytes of a CUDA or MPS device."""
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()


def generate_stories(model, prompts, stop, max_new_tokens, seed, name='writing', **sampling):
    """Continue any number of prompts (lists of token ids), in batches that fit into memory.

    Yields the new token ids of each prompt, in the order of the prompts, as soon as it and all before it are
    finished. name: shown by the progress bar. sampling: further arguments of `generate_until`.
    """
    batch_size = max_stories_at_once(model)
    seeds = Random(seed)
    for first in range(0, len(prompts), batch_size):
        batch_seed = seed if first == 0 else seeds.getrandbits(63)
        batch = prompts[first:first + batch_size]
        steps = generate_until(model, batch, stop, max_new_tokens, seed=batch_seed, **sampling)
        description = f'{name}, from {first + 1:,} of {len(prompts):,}'
        bar = tqdm(steps, description, max_new_tokens, unit=' tokens', leave=False, disable=None)
        n_yielded = 0
        for rows, unfinished in bar:
            while n_yielded < len(rows) and n_yielded not in unfinished:
                yield rows[n_yielded]
                n_yielded += 1


def sample_story(model, tokenizer, seed, prompt=(), should_stop=None):
    """Write one story that begins with the token ids `prompt`, and return its text.

    should_stop: called after each token; once it returns true, the story is cut short.
    """
    prompt = list(prompt)
    steps = generate_until(
        model, [[tokenizer.delimiter, *prompt]], tokenizer.delimiter, model.config.block_size,
        temperature=0.8, suppress=(tokenizer.blank, tokenizer.middle), seed=seed)
    for rows, unfinished in steps:
        if not unfinished or (should_stop is not None and should_stop()):
            return infill.decode(tokenizer, prompt + rows[0])


def first_words(text, tokenizer, max_tokens):
    """Return the first four words of a text as at most `max_tokens` token ids."""
    words = text.split(' ')[:4]
    return tokenizer.encode(' '.join(words))[:max_tokens]


def first_story_words(split, tokenizer, max_tokens):
    """Return the first four words of a split's first story as at most `max_tokens` token ids."""
    ids = split.read(0, 200).tolist()
    if ids[0] == tokenizer.delimiter:
        ids = ids[1:]
    special = (tokenizer.delimiter, tokenizer.blank, tokenizer.middle)
    story = []
    for token in ids:
        if token in special:
            break
        story.append(token)
    return first_words(tokenizer.decode(story), tokenizer, max_tokens)
