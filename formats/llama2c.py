"""llama2.c's files: model.bin for `run` (version 0, float32) or `runq` (version 2, int8), and tokenizer.bin.

Version 0 is seven int32 (n_embd, mlp_width, n_layer, n_head, n_kv_head, vocab_size, block_size; vocab_size is
negative if the head is not tied) and the weights. Versions 1 and 2 are 256 bytes (MAGIC, version, the seven,
a byte: tied, and in version 2 the int32 group size) and the weights. tokenizer.bin is the longest piece's
length, and for each id its score (float32), its length (int32) and its bytes.
"""

import struct
from math import gcd
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from data.tokenizer import FIRST_BYTE, tokenizer_from_state
from formats.families import LLAMA, add_infilling_rows, deinterleave, interleave, round_groups, unlike
from formats.pieces import BYTE, FIRST, INFILLING, NORMAL, pieces_of, tokenizer_of
from model import GPTConfig

MAGIC = 0x616B3432
HEADER = 256  # bytes, of versions 1 and 2
NEVER = -1e10  # a score that `run` never merges to
SIZES = 'n_embd', 'mlp_width', 'n_layer', 'n_head', 'n_kv_head', 'vocab_size', 'block_size'
# The file's tensors, with {} for the layer, by our names
NORMS = 'blocks.{}.attn_norm.weight', 'blocks.{}.mlp_norm.weight', 'norm.weight'
ATTENTION = tuple(f'blocks.{{}}.attn.{name}.weight' for name in ('q', 'k', 'v', 'proj'))
MLP = tuple(f'blocks.{{}}.mlp.{name}.weight' for name in ('gate', 'proj', 'up'))
ROTATED = {ATTENTION[0]: 'n_head', ATTENTION[1]: 'n_kv_head'}


def layout(config, version, tied):
    """The file's tensors in their order: a list of (our name or '', shape, number of layers)."""
    d, kv, layers = config.n_embd, config.n_kv_head * config.head_dim, config.n_layer
    rows = {ATTENTION[1]: (kv, d), ATTENTION[2]: (kv, d), MLP[1]: (d, config.mlp_width)}
    norms = [(NORMS[0], (d,), layers), (NORMS[1], (d,), layers), (NORMS[2], (d,), 1)]
    embedding = [('embedding.weight', (config.vocab_size, d), 1)]
    attention = [(name, rows.get(name, (d, d)), layers) for name in ATTENTION]
    mlp = [(name, rows.get(name, (config.mlp_width, d)), layers) for name in MLP]
    head = [] if tied else [('lm_head.weight', (config.vocab_size, d), 1)]
    if version:
        return norms + embedding + attention + mlp + head
    table = [('', (config.block_size, config.head_dim // 2), 2)]  # cosines and sines, which `run` skips
    return [*embedding, norms[0], *attention, norms[1], *mlp, norms[2], *table, *head]


def quantize(x, group_size):
    """float32 `x` as int8 (groups, group_size), and the float32 scale of each group of neighbours."""
    groups = x.reshape(-1, group_size)
    scale = np.abs(groups).max(1) / np.float32(127)
    return np.rint(groups / np.where(scale > 0, scale, 1)[:, None]).astype(np.int8), scale


def spell(text, kind):
    """The bytes of a piece in tokenizer.bin.

    `run` ends at an empty piece, and prints the others up to their first 0: so tokens without a text begin
    with one. But the delimiter must not look empty, or its encoder would merge it with what follows.
    """
    return text.encode() if kind in (NORMAL, BYTE) or text == '<s>' else b'\0' + text.encode()


class Llama2c:
    """For `run`, or with int8 for `runq`; group_size 0 is the largest of 64, 32 ... that fits."""

    reader = 'a reader of the files that imitates llama2.c'
    needs = check_needs = ()
    files = ('model.bin', 'tokenizer.bin')
    log_probs = False

    def __init__(self, int8=False, group_size=0):
        self.int8, self.group_size = int8, group_size
        if not int8:
            self.round_weight = self.round_input = None

    def obstacles(self, config, tokenizer):
        # The last two stand in its code
        wanted = LLAMA | {'bias': False, 'norm_eps': 1e-5, 'rope_theta': 10000.0}
        found = unlike(config, wanted)
        if tokenizer.encoding == 'gpt2':
            found.append(("its encoder puts a space before and does not split words as GPT-2's does",
                          'prepare with --encoding_type bpe or char'))
        if self.int8:
            common = gcd(config.n_embd, config.mlp_width)
            self.group_size = self.group_size or gcd(common, 64)
            if common % self.group_size:
                fit = [size for size in range(1, common + 1) if common % size == 0]
                nearest = min(fit, key=lambda size: abs(size - self.group_size))
                found.append((f'group_size {self.group_size} does not divide n_embd {config.n_embd} and '
                              f'mlp_width {config.mlp_width}', f'type --group_size {nearest}'))
        return found

    def round_weight(self, w):
        return round_groups(w, self.group_size)

    round_input = round_weight
    half_gelu = False

    def write(self, folder, checkpoint, tokenizer):
        config, weights = GPTConfig(**checkpoint['config']), checkpoint['model']
        sizes = [getattr(config, name) for name in SIZES]
        with open(folder / 'model.bin', 'wb') as file:
            if self.int8:
                head = struct.pack('<Ii7iBi', MAGIC, 2, *sizes, config.tie_embeddings, self.group_size)
                file.write(head.ljust(HEADER, b'\0'))
            else:
                sizes[5] *= 1 if config.tie_embeddings else -1
                file.write(struct.pack('<7i', *sizes))
            for name, shape, layers in layout(config, 2 if self.int8 else 0, config.tie_embeddings):
                for layer in range(layers):
                    self._write_tensor(file, config, weights, name, layer, shape)
        with open(folder / 'tokenizer.bin', 'wb') as file:
            pieces = [(spell(text, kind), score if kind == NORMAL else NEVER)
                      for text, score, kind in pieces_of(tokenizer)]
            file.write(struct.pack('<i', max(len(piece) for piece, _ in pieces)))
            for piece, score in pieces:
                file.write(struct.pack('<fi', score, len(piece)) + piece)

    def _write_tensor(self, file, config, weights, name, layer, shape):
        if not name:
            angle = np.outer(np.arange(shape[0]), 10000.0 ** -(np.arange(shape[1]) / shape[1]))
            file.write((np.sin if layer else np.cos)(angle).astype('<f4').tobytes())
            return
        w = weights[name.format(layer)].float().cpu().numpy()
        if name in ROTATED:
            w = interleave(w, getattr(config, ROTATED[name]))
        if self.int8 and len(shape) == 2:
            whole, scale = quantize(w, self.group_size)
            file.write(whole.tobytes() + scale.astype('<f4').tobytes())
        else:
            file.write(w.astype('<f4').tobytes())

    def read(self, folder):
        return Reader(folder / 'model.bin', folder / 'tokenizer.bin')


def read_model(path):
    """A .bin of any version: (GPTConfig, group size or 0, {our name: float32 array, laid out as there}).

    Raises UserError where the file is not what its first bytes say.
    """
    path = Path(path)
    with open(path, 'rb') as file:
        head = file.read(HEADER).ljust(HEADER, b'\0')
    magic, version = struct.unpack_from('<Ii', head)
    version = version if magic == MAGIC else 0
    sizes = dict(zip(SIZES, struct.unpack_from('<7i', head, 8 if version else 0), strict=True))
    tied = head[36] == 1 if version else sizes['vocab_size'] > 0
    group_size = struct.unpack_from('<i', head, 37)[0] if version == 2 else 0
    try:
        config = GPTConfig(**sizes | {'vocab_size': abs(sizes['vocab_size'])}, tie_embeddings=tied)
        if version > 2 or min(sizes['n_kv_head'], sizes['mlp_width']) < 1 or group_size < (version == 2):
            raise ValueError(f'version {version}, group size {group_size}, {sizes}')
        tensors = layout(config, version, tied)
        bits = 8 + 32 / group_size if group_size else 32
        size = sum(layers * int(np.prod(shape, dtype=object)) * (bits if len(shape) == 2 else 32) / 8
                   for _, shape, layers in tensors) + (HEADER if version else 28)
        if size != path.stat().st_size:
            raise ValueError(f'{path.stat().st_size:,} bytes, {size:,.0f} by its header')
    except ValueError as error:
        raise UserError(f'{path} is no whole llama2.c model ({error})') from None
    data = np.memmap(path, mode='r')
    place, weights = HEADER if version else 28, {}

    def take(kind, count):
        nonlocal place
        start, place = place, place + count * np.dtype(kind).itemsize
        return data[start:place].view(kind)

    for name, shape, layers in tensors:
        for layer in range(layers):
            count = int(np.prod(shape))
            if group_size and len(shape) == 2:
                w = take('i1', count).reshape(-1, group_size) * take('<f4', count // group_size)[:, None]
            else:
                w = take('<f4', count)
            if name:
                weights[name.format(layer)] = w.reshape(shape)
    if tied:
        weights['lm_head.weight'] = weights['embedding.weight']
    return config, group_size, weights


def read_pieces(path):
    """tokenizer.bin: a list of (bytes, score). Raises UserError where it is damaged."""
    data, place, pieces = Path(path).read_bytes(), 4, []
    try:
        while place < len(data):
            score, length = struct.unpack_from('<fi', data, place)
            place += 8 + length
            if length < 1 or place > len(data):
                raise struct.error
            pieces.append((data[place - length:place], score))
    except struct.error:
        raise UserError(f"{path} is no llama2.c tokenizer.bin: it breaks off at byte {place:,}") from None
    return pieces


class Reader:
    """What llama2.c's `run` (`runq` if the weights are int8) makes of two files, computed by numpy."""

    def __init__(self, model, tokenizer):
        self.config, self.group_size, self.weights = read_model(model)
        self.pieces = read_pieces(tokenizer)[:self.config.vocab_size]  # `run` reads that many
        self.ids = {piece: i for i, (piece, _) in enumerate(self.pieces)}

    def logits(self, ids, positions):
        c, w = self.config, self.weights
        x = w['embedding.weight'][ids]
        angle = np.outer(np.arange(len(ids)), 10000.0 ** (-np.arange(0, c.head_dim, 2) / c.head_dim))
        turn = np.exp(1j * angle).astype(np.complex64)[:, None]  # (T, 1, head_dim / 2)
        hidden = np.triu(np.ones((len(ids), len(ids)), bool), 1)
        for layer in range(c.n_layer):
            q, k, v, proj, gate, down, up = (w[name.format(layer)] for name in ATTENTION + MLP)
            y = self.norm(x, w[NORMS[0].format(layer)])
            q, k, v = (self.times(y, m).reshape(len(ids), -1, c.head_dim) for m in (q, k, v))
            # Neighbours are the parts of a complex number, which is rotated
            q, k = ((np.ascontiguousarray(t).view(np.complex64) * turn).view(np.float32) for t in (q, k))
            k, v = (t.repeat(c.n_head // c.n_kv_head, axis=1) for t in (k, v))
            score = np.einsum('qhd,khd->hqk', q, k) / np.float32(c.head_dim**0.5)
            score[:, hidden] = -np.inf
            weight = np.exp(score - score.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            x = x + self.times(np.einsum('hqk,khd->qhd', weight, v).reshape(len(ids), -1), proj)
            y = self.norm(x, w[NORMS[1].format(layer)])
            z = self.times(y, gate)
            x = x + self.times(z / (1 + np.exp(-z)) * self.times(y, up), down)
        return self.times(self.norm(x, w[NORMS[2]])[positions], w['lm_head.weight'])

    def norm(self, x, weight):
        return weight * (x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)))

    def times(self, x, matrix):
        if self.group_size:  # `runq` rounds what it multiplies, too
            whole, scale = quantize(x, self.group_size)
            x = (whole * scale[:, None]).reshape(x.shape)
        return x @ matrix.T

    def encode(self, text):
        tokens = [1] + ([self.ids[b' ']] if text else [])
        for char in map(str.encode, text):
            tokens += [self.ids[char]] if char in self.ids else [FIRST_BYTE + byte for byte in char]
        while True:
            best = NEVER, None, None
            for at in range(len(tokens) - 1):
                merged = self.ids.get(self.pieces[tokens[at]][0] + self.pieces[tokens[at + 1]][0])
                if merged is not None and self.pieces[merged][1] > best[0]:
                    best = self.pieces[merged][1], at, merged
            if best[1] is None:
                return tokens
            tokens[best[1]:best[1] + 2] = [best[2]]

    def decode(self, ids):
        """What `run` prints, and what it leaves out: bytes that are no ASCII, control codes."""
        pieces = [self.pieces[i][0] for i in ids[1:]]
        pieces = [bytes([int(piece[3:5], 16)]) if piece.startswith(b'<0x') else piece for piece in pieces
                  if len(piece) == 1 or piece[0]]
        return b''.join(pieces).removeprefix(b' ').decode('utf-8', 'replace')


def load(path):
    """(GPTConfig, weights, tokenizer) of a .bin with tokenizer.bin or tokenizer.model beside it.

    The weights are those of our GPT. The infilling rows are added where the tokenizer has none.
    """
    path = Path(path)
    config, _, arrays = read_model(path)
    weights = {}
    for name, array in arrays.items():
        heads = [ROTATED[key] for key in ROTATED if name.endswith(key[9:])]
        array = deinterleave(array, getattr(config, heads[0])) if heads else array
        weights[name] = torch.from_numpy(array.astype(np.float32))
    tokenizer, infilling = read_tokenizer(path.parent)
    if not infilling:
        add_infilling_rows(weights, tokenizer.vocab_size - 2)
        config.vocab_size = tokenizer.vocab_size
    return config, weights, tokenizer


def read_tokenizer(folder):
    """(tokenizer, whether the infilling tokens are its own) out of tokenizer.bin or else tokenizer.model."""
    if (folder / 'tokenizer.bin').is_file():
        pieces = read_pieces(folder / 'tokenizer.bin')
        infilling = [piece for piece, _ in pieces[-2:]] == [spell(text, kind) for text, _, kind in INFILLING]
        own = pieces[:-2] if infilling else pieces
        try:
            known = [(piece.decode(), score, NORMAL) for piece, score in own]
            if any(a[0] != b[0] for a, b in zip(known[FIRST_BYTE:], FIRST[FIRST_BYTE:], strict=False)):
                raise ValueError('its ids 3 to 258 are not the bytes')
            return tokenizer_of(known), infilling
        except ValueError as error:
            raise UserError(f'{folder}/tokenizer.bin cannot be used: {error}') from None
    model = folder / 'tokenizer.model'
    if not model.is_file():
        raise UserError(f'{folder} has no tokenizer.bin and no tokenizer.model: put the one there that the '
                        'model was trained with')
    state = {'encoding': 'bpe', 'files': {'tokenizer.model': model.read_bytes()}}
    return tokenizer_from_state(state, folder), False
