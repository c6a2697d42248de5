"""A naive sample.py, after docs/writing.md: no cache, the whole context at each step, one story at a time.

It shares no code with the project, but for the format of a checkpoint: a dict of plain values and tensors.
"""

import json
import math

import torch

CHARACTERS = sorted(' abcdefghijklmnop.,!')
DELIMITER, FIRST = 1, 259  # ids: that of the delimiter, that of the first character
VOCAB_SIZE = FIRST + len(CHARACTERS) + 2
BLANK, MIDDLE = VOCAB_SIZE - 2, VOCAB_SIZE - 1
STD = 0.4  # of the weights
SHAPE = {'block_size': 24, 'vocab_size': VOCAB_SIZE, 'n_layer': 2, 'n_head': 4, 'n_kv_head': 2, 'n_embd': 32,
         'norm': 'rms', 'position': 'rope', 'mlp': 'swiglu', 'mlp_width': 48, 'qk_norm': False, 'bias': False,
         'tie_embeddings': False, 'dropout': 0.0, 'rope_theta': 10000.0, 'norm_eps': 1e-5}


# a checkpoint -----------------------------------------------------------------

def random_weights(config, seed):
    """Return weights by their names, large enough for each of them to matter."""
    generator = torch.Generator().manual_seed(seed)
    width, kv_width = config['n_embd'], config['n_embd'] // config['n_head'] * config['n_kv_head']
    shapes = {'embedding': (config['vocab_size'], width), 'lm_head': (config['vocab_size'], width)}
    for i in range(config['n_layer']):
        shapes |= {f'blocks.{i}.attn.q': (width, width), f'blocks.{i}.attn.k': (kv_width, width),
                   f'blocks.{i}.attn.v': (kv_width, width), f'blocks.{i}.attn.proj': (width, width),
                   f'blocks.{i}.mlp.gate': (config['mlp_width'], width),
                   f'blocks.{i}.mlp.up': (config['mlp_width'], width),
                   f'blocks.{i}.mlp.proj': (width, config['mlp_width'])}
    weights = {}
    for name, shape in shapes.items():
        weights[f'{name}.weight'] = STD * torch.randn(shape, generator=generator)
    norms = ['norm']
    for i in range(config['n_layer']):
        norms += [f'blocks.{i}.attn_norm', f'blocks.{i}.mlp_norm']
    for name in norms:
        weights[f'{name}.weight'] = 1 + 0.2 * torch.randn(width, generator=generator)
    return weights


def prefer(weights, config, biases):
    """Add a number to the logit of each token of {id: number}, whatever the context.

    Feature 0 is made a constant of the residual stream; the head reads it.
    """
    weights['embedding.weight'][:, 0] = 2.0
    weights['norm.weight'][0] = 1.0
    for i in range(config['n_layer']):
        weights[f'blocks.{i}.attn.proj.weight'][0] = 0.0
        weights[f'blocks.{i}.mlp.proj.weight'][0] = 0.0
    weights['lm_head.weight'][:, 0] = 0.0
    for token, bias in biases.items():
        weights['lm_head.weight'][token, 0] = bias


def make_checkpoint(seed=0, delimiter_bias=0.0, characters=CHARACTERS, **changes):
    """Return a checkpoint that draws characters, the delimiter and, if it may, <blank> and <middle>."""
    config = SHAPE | {'vocab_size': FIRST + len(characters) + 2} | changes
    weights = random_weights(config, seed)
    never = dict.fromkeys([*range(FIRST)], -1e6)  # bytes and the like, which no text shows as they are
    biases = never | {DELIMITER: delimiter_bias, config['vocab_size'] - 2: 3.0, config['vocab_size'] - 1: 3.0}
    prefer(weights, config, biases)
    file = json.dumps([*characters], ensure_ascii=False).encode()
    tokenizer = {'encoding': 'char', 'files': {'tokenizer.json': file}}
    return {'model': weights, 'config': config, 'tokenizer': tokenizer, 'settings': {}, 'iter': 5,
            'infill_rate': 0.5}


# the model --------------------------------------------------------------------

def doubled(checkpoint):
    """Return the weights in float64, converted once."""
    if 'float64' not in checkpoint:
        checkpoint['float64'] = {name: w.double() for name, w in checkpoint['model'].items()}
    return checkpoint['float64']


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, theta):
    """Rotate the pairs (i, i + head_dim / 2) of x (B, T, heads, head_dim) by angles that grow with T."""
    half = x.size(-1) // 2
    first, second = x[..., :half], x[..., half:]
    positions, rates = torch.arange(x.size(1)).double(), theta ** -(torch.arange(half).double() / half)
    angles = (positions[:, None] * rates)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def attention(x, weights, name, config):
    B, T, width = x.shape
    heads, kv_heads = config['n_head'], config['n_kv_head']
    q, k, v = (x @ weights[f'{name}.{part}.weight'].T for part in 'qkv')
    q = rotate(q.view(B, T, heads, -1), config['rope_theta'])
    k = rotate(k.view(B, T, kv_heads, -1), config['rope_theta'])
    v = v.view(B, T, kv_heads, -1)
    future, out = torch.full((T, T), -math.inf, dtype=x.dtype).triu(1), []
    for head in range(heads):
        kv_head = head * kv_heads // heads
        scores = q[:, :, head] @ k[:, :, kv_head].mT / math.sqrt(width // heads)
        out.append((scores + future).softmax(-1) @ v[:, :, kv_head])
    return torch.cat(out, -1) @ weights[f'{name}.proj.weight'].T


def all_logits(checkpoint, rows):
    """Return the logits (B, T, V) in float64 after each of the tokens `rows`, lists of one length."""
    config, eps = checkpoint['config'], checkpoint['config']['norm_eps']
    weights = doubled(checkpoint)
    x = weights['embedding.weight'][torch.tensor(rows)]
    for i in range(config['n_layer']):
        block = f'blocks.{i}'
        y = rms_norm(x, weights[f'{block}.attn_norm.weight'], eps)
        x = x + attention(y, weights, f'{block}.attn', config)
        y = rms_norm(x, weights[f'{block}.mlp_norm.weight'], eps)
        gate, up = y @ weights[f'{block}.mlp.gate.weight'].T, y @ weights[f'{block}.mlp.up.weight'].T
        x = x + (gate * gate.sigmoid() * up) @ weights[f'{block}.mlp.proj.weight'].T
    return rms_norm(x, weights['norm.weight'], eps) @ weights['lm_head.weight'].T


# writing ----------------------------------------------------------------------

def in_sight(ids, block_size):
    """Return the ids that the next token is predicted from.

    A context grows to block_size tokens. As the next one does not fit, only the last half is kept, and grows.
    """
    half = max(block_size // 2, 1)
    start, length = 0, min(len(ids), 1)
    while start + length < len(ids):
        length += 1
        if length > block_size:
            start, length = start + length - half, half
    return ids[start:]


def next_logits(checkpoint, rows):
    """Return the logits (B, V) of the next token after `rows`, lists of one length.

    <blank> and <middle> are never written.
    """
    block_size = checkpoint['config']['block_size']
    logits = all_logits(checkpoint, [in_sight(ids, block_size) for ids in rows])[:, -1]
    logits[:, -2:] = -math.inf
    return logits


def drawing_probabilities(logits, temperature, top_k, top_p):
    """Return the probabilities (V,) that a token is drawn with from its logits (V,)."""
    order = logits.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
    probs = (logits[order] / temperature).softmax(-1).tolist()
    kept, reached = {}, 0.0
    for token, p in zip(order, probs, strict=True):
        if reached < top_p:
            kept[token] = p
        reached += p
    out = torch.zeros(len(logits), dtype=torch.float64)
    for token, p in kept.items():
        out[token] = p / sum(kept.values())
    return out


def greedy(checkpoint, prompt, max_new_tokens, min_new_tokens=0):
    """Return the new ids, without the delimiter that ends them, and whether it came."""
    new = []
    while len(new) < max_new_tokens:
        token = next_logits(checkpoint, [prompt + new])[0].argmax().item()
        if token == DELIMITER and len(new) >= min(min_new_tokens, max_new_tokens - 1):
            return new, True
        new.append(token)
    return new, False


def encode(text, characters=CHARACTERS):
    """Return the ids of a text, with the space that is put before it; what is no character goes as bytes."""
    ids = []
    for char in ' ' + text if text else '':
        if char in characters:
            ids.append(FIRST + characters.index(char))
        else:
            ids += [3 + byte for byte in char.encode()]
    return ids


def decode(ids, characters=CHARACTERS):
    """Return the text of `ids`, without the space before it; special ids give nothing."""
    data = b''
    for i in ids:
        if 3 <= i < FIRST:
            data += bytes([i - 3])
        elif FIRST <= i < FIRST + len(characters):
            data += characters[i - FIRST].encode()
    return data.decode('utf-8', 'replace').removeprefix(' ')


def text_of(ids, characters=CHARACTERS):
    """Return the text of ids that begin with a delimiter: a line `---` stands where another story begins."""
    stories = []
    for i in ids:
        if i == DELIMITER:
            stories.append([])
        else:
            stories[-1].append(i)
    return '\n---\n'.join(decode(story, characters) for story in stories)
