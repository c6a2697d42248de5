"""llama2.c's files: model.bin for `run` (version 0, float32) or `runq` (version 2, int8), and tokenizer.bin.

Version 0 is seven int32 (n_embd, mlp_width, n_layer, n_head, n_kv_head, vocab_size, block_size; vocab_size is
negative if the head is not tied) and the weights. Versions 1 and 2 are 256 bytes (MAGIC, version, the seven,
a byte: tied, and in version 2 the int32 group size) and the weights. tokenizer.bin is the longest piece's
length, and for each id its score (float32), its length (int32) and its bytes.
"""

import io
import math
import struct
from dataclasses import replace

import numpy as np
import torch

from configurator import UserError
from data.tokenizer_files import BYTE, NORMAL, read_tokenizer
from formats import base
from formats.pieces import pieces_of
from model import GPT, GPTConfig, position_angles

MAGIC = 0x616B3432
HEADER = 256  # bytes, of versions 1 and 2
SIZES = 'n_embd', 'mlp_width', 'n_layer', 'n_head', 'n_kv_head', 'vocab_size', 'block_size'
# The file's tensors by our names, {} being the layer; those of all layers follow one another
NORMS = 'blocks.{}.attn_norm.weight', 'blocks.{}.mlp_norm.weight', 'norm.weight'
ATTENTION = [f'blocks.{{}}.attn.{name}.weight' for name in ('q', 'k', 'v', 'proj')]
MLP = [f'blocks.{{}}.mlp.{name}.weight' for name in ('gate', 'proj', 'up')]
ORDER_0 = ['embedding.weight', NORMS[0], *ATTENTION, NORMS[1], *MLP, NORMS[2], 'rotation', 'lm_head.weight']
ORDER = [*NORMS, 'embedding.weight', *ATTENTION, *MLP, 'lm_head.weight']


def layout(config, version):
    """The file's tensors in their order: [(name, shape, layers)]."""
    with torch.device('meta'):
        weights = GPT(replace(config, n_layer=1)).state_dict()
    shapes = {name.replace('.0.', '.{}.'): tuple(w.shape) for name, w in weights.items()}
    shapes['rotation'] = 2 * config.block_size, config.head_dim // 2  # cosines, sines: `run` skips them
    order = (ORDER if version else ORDER_0)[:-1 if config.tie_embeddings else None]
    return [(name, shapes[name], config.n_layer if '{}' in name else 1) for name in order]


class Llama2c(base.Importer):
    """For `run`, or with int8 for `runq`, which rounds each group of neighbours in a row to 255 levels."""

    files = ('model.bin', 'tokenizer.bin')

    def __init__(self, int8=False):
        self.int8, self.bound = int8, 0.05 if int8 else 1e-6

    def mismatches(self, config, tokenizer):
        found = base.unlike(config, base.LLAMA | {  # the last two stand in its code
            'bias': False, 'norm_eps': 1e-5, 'rope_theta': 10000.0})
        if tokenizer.encoding == 'gpt2':
            found.append(("its encoder puts a space before and does not split words as GPT-2's does",
                          'prepare with --encoding_type bpe or char'))
        return found

    def write(self, path, checkpoint, tokenizer):
        config = GPTConfig(**checkpoint['config'])
        weights = base.interleave(config, base.own_weights(checkpoint))
        angle = position_angles(config.block_size, config.head_dim, config.rope_theta)
        weights['rotation'] = torch.cat((angle.cos(), angle.sin()))
        sizes = [getattr(config, name) for name in SIZES]
        group = math.gcd(config.n_embd, config.mlp_width, 64)  # neighbours with one scale
        if self.int8:
            head = struct.pack('<Ii7i?i', MAGIC, 2, *sizes, config.tie_embeddings, group).ljust(HEADER, b'\0')
        else:
            sizes[5] *= 1 if config.tie_embeddings else -1
            head = struct.pack('<7i', *sizes)
        with open(path / 'model.bin', 'wb') as file:
            file.write(head)
            for name, shape, layers in layout(config, 2 if self.int8 else 0):
                for layer in range(layers):
                    w = weights[name.format(layer)].numpy()
                    if self.int8 and len(shape) == 2:  # the integers, and after them the scales
                        groups = w.reshape(-1, group)
                        w = np.abs(groups).max(1, keepdims=True) / np.float32(127)
                        file.write(np.rint(groups / np.where(w > 0, w, 1)).astype('i1').tobytes())
                    file.write(w.astype('<f4').tobytes())
        pieces = [(score if kind == NORMAL else -1e10, spell(text, kind))  # `run` never merges to -1e10
                  for text, score, kind in pieces_of(tokenizer)]
        with open(path / 'tokenizer.bin', 'wb') as file:
            file.write(struct.pack('<i', max(len(text) for _, text in pieces)))
            for score, text in pieces:
                file.write(struct.pack('<fi', score, len(text)) + text)

    def read(self, path):
        super().read(path / 'model.bin')

    def load_weights(self, path):
        """Of a .bin of any version. ValueError where its length is not what its first bytes say."""
        data = io.BytesIO(path.read_bytes())  # which reads no more than there is, whatever the sizes claim
        magic, version = struct.unpack('<Ii', data.read(8))
        if magic == MAGIC:
            *sizes, tied, group_size = struct.unpack('<7i?i', data.read(33))
            data.seek(HEADER)
        else:
            data.seek(0)
            sizes = struct.unpack('<7i', data.read(28))
            version, tied, group_size = 0, sizes[5] > 0, 0
        sizes = dict(zip(SIZES, map(abs, sizes), strict=True))
        if version not in (0, 1, 2) or (version == 2) != (group_size > 0) or 0 in sizes.values():
            raise ValueError(f'version {version}, group size {group_size}, {sizes}')
        config, weights = GPTConfig(**sizes, tie_embeddings=tied), {}
        for name, shape, layers in layout(config, version):
            for layer in range(layers):
                n = math.prod(shape)
                if group_size and len(shape) == 2:
                    w = np.frombuffer(data.read(n), 'i1').reshape(-1, group_size)
                    w = w * np.frombuffer(data.read(4 * n // group_size), '<f4')[:, None]
                else:
                    w = np.frombuffer(data.read(4 * n), '<f4')
                weights[name.format(layer)] = torch.tensor(w.reshape(shape))
        if data.read(1):
            raise ValueError(f'it goes on after the {len(weights)} tensors of {sizes}')
        weights.pop('rotation', None)
        return config, base.interleave(config, weights, back=True)

    def load_tokenizer(self, path):
        """The one beside the model."""
        if tokenizer := read_tokenizer(path.parent):
            return tokenizer
        raise UserError(f'{path.parent} has no tokenizer.bin and no tokenizer.model: put its own there')


def spell(text, kind):
    """The bytes of a piece in tokenizer.bin. `run` ends at an empty one and prints the others up to their
    first 0: tokens without a text begin with one, but not <s>, which its encoder would merge with more."""
    return text.encode() if kind in (NORMAL, BYTE) or text == '<s>' else b'\0' + text.encode()
