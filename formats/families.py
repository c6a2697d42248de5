"""The two families of blocks that foreign programs know, Llama's and GPT-2's, and what a format must offer.

A format is an object with

    reader            who reads it back, in words
    needs             optional packages without which it cannot be written
    check_needs       optional packages without which it cannot be read back
    is_file           whether it is one file, not a folder
    log_probs         whether its reader gives log-probabilities, logits being kept to itself
    obstacles(config, tokenizer)             why it cannot hold a model: a list of (reason, way out)
    write(path, checkpoint, tokenizer)       writes the file, or the files into an existing folder
    read(path)                               a reader of what was written:
        logits(ids, positions)               float32 (len(positions), vocab_size), after ids[:position + 1]
        encode(text), decode(ids)            as the format's program does, the delimiter first
    round_weight(w), round_input(x)          what a lossy one does to a matrix and what it multiplies; or None
    half_gelu                                whether a lossy one takes and gives GELU in float16
"""

import torch

from configurator import UserError

LLAMA = {'norm': 'rms', 'position': 'rope', 'mlp': 'swiglu', 'qk_norm': False}
GPT2 = {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'qk_norm': False, 'bias': True}


def unlike(config, wanted):
    """Where `config` is not as `wanted`, {name: value}: [(reason, way out)], with one entry or none."""
    names = [name for name, value in wanted.items() if getattr(config, name) != value]
    if not names:
        return []
    recipe = 'tiny_stories.py' if wanted['norm'] == 'rms' else 'gpt2_89m.py'
    return [(', '.join(f'{name} {getattr(config, name)}' for name in names),
             f'train config/{recipe} with ' + ' '.join(f'--{name} {wanted[name]}' for name in names))]


def family(config):
    """The family that `config` is nearer to: LLAMA or GPT2."""
    def distance(wanted):
        return sum(getattr(config, name) != value for name, value in wanted.items())

    return min(LLAMA, GPT2, key=distance)


def unlike_family(config):
    """Where `config` is not wholly of its family, as `unlike` says it. GPT-2 has no grouped queries."""
    wanted = family(config)
    return unlike(config, wanted if wanted is LLAMA else wanted | {'n_kv_head': config.n_head})


def interleave(w, n_head):
    """Rows of q or k (a matrix or a bias, array or tensor) for programs that rotate neighbours.

    Ours rotates rows i and i + head_dim / 2 of a head; llama2.c and GGUF's Llama rotate 2 i and 2 i + 1.
    """
    return w.reshape(n_head, 2, len(w) // n_head // 2, -1).swapaxes(1, 2).reshape(w.shape)


def deinterleave(w, n_head):
    """The way back from `interleave`."""
    return w.reshape(n_head, len(w) // n_head // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def add_infilling_rows(weights, n_tokens):
    """Cut the embedding and the head to the tokenizer's own `n_tokens` rows, and add <blank> and <middle>.

    What is cut are rows that no token has. The new ones are the mean of the others: read as an average word,
    and written, by Jensen's inequality, with a probability of at most 1 / n_tokens each.
    """
    for name in 'embedding.weight', 'lm_head.weight':
        own = weights[name][:n_tokens]
        if len(own) < n_tokens:
            raise UserError(f'{name} has {len(own)} rows, the tokenizer beside it {n_tokens} tokens: put the '
                            'one there that the model was trained with')
        weights[name] = torch.cat((own, own.mean(0, keepdim=True).expand(2, -1)))


def round_groups(x, size, half_scale=False):
    """`x` as signed 8-bit integers, one scale for each `size` neighbours of a row, and back to float32."""
    groups = x.reshape(-1, size)
    scale = groups.abs().amax(1, keepdim=True) / 127
    whole = (groups / scale.where(scale > 0, 1)).round()
    return (whole * (scale.half().float() if half_scale else scale)).view_as(x)
