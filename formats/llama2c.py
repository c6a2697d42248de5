"""llama2.c's files: model.bin for `run` (version 0, float32) or `runq` (version 2, int8), and tokenizer.bin.

Version 0 of model.bin is seven int32 (n_embd, mlp_width, n_layer, n_head, n_kv_head, vocab_size, block_size;
vocab_size is negative if the head is not tied) and the weights. Versions 1 and 2 are a header of 256 bytes
(MAGIC, version, the seven, one byte: whether the head is tied, and in version 2 the int32 group size) and the
weights. Version 2 stores a matrix as int8 numbers, followed by a float32 scale for each group of neighbours.

tokenizer.bin is the length of the longest piece, and for each id its score (float32), its length (int32) and
its bytes.
"""

import io
import math
import struct
from dataclasses import replace

import numpy as np
import torch

from configurator import UserError, user_errors
from core.checkpoint import parameter_shapes
from data.files import refuse_stand_in
from data.sentencepiece_file import BYTE, NORMAL
from data.tokenizer_files import read_tokenizer
from formats import base
from formats.families import LLAMA
from formats.pieces import pieces_of
from model import GPTConfig, position_angles

MAGIC = 0x616B3432
HEADER_BYTES = 256  # in versions 1 and 2
HEADER_FIELDS = 'n_embd', 'mlp_width', 'n_layer', 'n_head', 'n_kv_head', 'vocab_size', 'block_size'
GROUP_SIZE = 64  # numbers that share a scale, or fewer if 64 does not divide the widths
LAST_PIECE = b'\0<middle>'  # the end of a tokenizer.bin that has <blank> and <middle>
NEVER_MERGED = -1e10  # the score of a piece that `run` must not make by merging

# The tensors of a file by our names, in order; {} stands for a layer, and those of all layers follow one
# another. 'rotation' holds the cosines and sines of the positions, which `run` skips.
ATTENTION = [f'blocks.{{}}.attn.{name}.weight' for name in ('q', 'k', 'v', 'proj')]
MLP = [f'blocks.{{}}.mlp.{name}.weight' for name in ('gate', 'proj', 'up')]
ATTN_NORM, MLP_NORM, LAST_NORM = 'blocks.{}.attn_norm.weight', 'blocks.{}.mlp_norm.weight', 'norm.weight'
EMBEDDING, HEAD = 'embedding.weight', 'lm_head.weight'
ORDER_VERSION_0 = [EMBEDDING, ATTN_NORM, *ATTENTION, MLP_NORM, *MLP, LAST_NORM, 'rotation', HEAD]
ORDER_VERSIONS_1_2 = [ATTN_NORM, MLP_NORM, LAST_NORM, EMBEDDING, *ATTENTION, *MLP, HEAD]


def tensors_in_file(config, version):
    """Yield (name, shape) of all tensors of a model.bin, in order."""
    shapes = parameter_shapes(replace(config, n_layer=1))  # a damaged header may claim any number of layers
    shapes['rotation'] = 2 * config.block_size, config.head_dim // 2
    order = ORDER_VERSION_0 if version == 0 else ORDER_VERSIONS_1_2
    for template in order:
        if template == HEAD and config.tie_embeddings:
            continue
        shape = shapes[template.format(0)]
        n_layers = config.n_layer if '{}' in template else 1
        for layer in range(n_layers):
            yield template.format(layer), shape


class Llama2c(base.Importer):
    """For `run`, or with int8=True for `runq`."""

    files = ('model.bin', 'tokenizer.bin')

    def __init__(self, int8=False):
        self.int8 = int8
        self.dtypes = ('int8',) if int8 else ('f32',)
        self.max_kl = 0.05 if int8 else 1e-6

    def incompatibilities(self, config, tokenizer):
        constants = {'bias': False, 'norm_eps': 1e-5, 'rope_theta': 10000.0}  # fixed in llama2.c's code
        found = base.block_incompatibilities(config, LLAMA.block | constants)
        if tokenizer.encoding == 'gpt2':
            found.append(("its encoder puts a space before and does not split words as GPT-2's does",
                          'prepare with --encoding_type bpe or char'))
        return found

    def write(self, path, checkpoint, tokenizer):
        config = GPTConfig(**checkpoint['config'])
        weights = base.to_interleaved(config, base.own_weights(checkpoint))
        weights['rotation'] = rotation_table(config)
        write_model(path / 'model.bin', config, weights, self.int8)
        write_tokenizer(path / 'tokenizer.bin', tokenizer)

    def read(self, path):
        super().read(path / 'model.bin')

    def load_weights(self, path):
        """Read a .bin of any version. Raises UserError if its length is not what its header says."""
        refuse_stand_in(path)
        with user_errors(path):
            file = io.BytesIO(path.read_bytes())  # never gives more than there is, whatever the header claims
            config, version, group_size = read_header(file)
            weights = read_weights(file, config, version, group_size)
            check_rotation(config, weights.pop('rotation', None))
        return config, base.from_interleaved(config, weights)

    def load_tokenizer(self, path):
        """Read the tokenizer next to the model. Raises UserError if there is none, or it is damaged."""
        tokenizer = read_tokenizer(path.parent)
        if tokenizer is None:
            raise UserError(f'{path.parent} has no tokenizer.bin and no tokenizer.model: '
                            'put the tokenizer of this model there')
        return tokenizer

    def has_infilling_rows(self, path, tokenizer):
        file = path.with_name('tokenizer.bin')
        return file.is_file() and file.read_bytes().endswith(LAST_PIECE)


def rotation_table(config):
    """Return the cosines, then the sines of all positions: (2 * block_size, head_dim / 2)."""
    angles = position_angles(config.block_size, config.head_dim, config.rope_theta)
    return torch.cat((angles.cos(), angles.sin()))


# writing ----------------------------------------------------------------------

def write_model(path, config, weights, int8):
    """Write a model.bin of version 0, or of version 2 if `int8`."""
    group_size = math.gcd(config.n_embd, config.mlp_width, GROUP_SIZE)
    version = 2 if int8 else 0
    with open(path, 'wb') as file:
        if int8:
            file.write(header_of_version_2(config, group_size))
        else:
            file.write(header_of_version_0(config))
        for name, shape in tensors_in_file(config, version):
            w = weights[name].numpy()
            if int8 and len(shape) == 2:
                w, scales = quantize(w, group_size)
                file.write(w.tobytes())
                file.write(scales.astype('<f4').tobytes())
            else:
                file.write(w.astype('<f4').tobytes())


def header_of_version_0(config):
    numbers = {name: getattr(config, name) for name in HEADER_FIELDS}
    if not config.tie_embeddings:
        numbers['vocab_size'] *= -1
    return struct.pack('<7i', *numbers.values())


def header_of_version_2(config, group_size):
    numbers = [getattr(config, name) for name in HEADER_FIELDS]
    header = struct.pack('<Ii7i?i', MAGIC, 2, *numbers, config.tie_embeddings, group_size)
    return header.ljust(HEADER_BYTES, b'\0')


def quantize(w, group_size):
    """Return int8 numbers (n_groups, group_size) and the scale of each group (n_groups, 1)."""
    groups = w.reshape(-1, group_size)
    scales = np.abs(groups).max(1, keepdims=True) / np.float32(127)
    nonzero = np.where(scales > 0, scales, 1)
    return np.rint(groups / nonzero).astype('i1'), scales


def write_tokenizer(path, tokenizer):
    """Write tokenizer.bin."""
    pieces = []
    for text, score, kind in pieces_of(tokenizer):
        if kind != NORMAL:
            score = NEVER_MERGED
        pieces.append((score, bytes_of_piece(text, kind)))
    with open(path, 'wb') as file:
        file.write(struct.pack('<i', max(len(data) for _, data in pieces)))
        for score, data in pieces:
            file.write(struct.pack('<fi', score, len(data)) + data)


def bytes_of_piece(text, kind):
    """Return the bytes of a piece in tokenizer.bin.

    `run` stops at an empty piece and prints the others up to their first 0 byte. So pieces that stand for no
    text begin with a 0 byte. <s> must not: the encoder of `run` would merge it with more pieces.
    """
    if kind in (NORMAL, BYTE) or text == '<s>':
        return text.encode()
    return b'\0' + text.encode()


# reading ----------------------------------------------------------------------

def read_header(file):
    """Return (GPTConfig, version, group size) of a model.bin. Raises ValueError if they make no model.

    The group size is 0 in versions without int8.
    """
    magic, version = struct.unpack('<Ii', read_exactly(file, 8))
    if magic == MAGIC:
        *numbers, is_tied, group_size = struct.unpack('<7i?i', read_exactly(file, 33))
        file.seek(HEADER_BYTES)
    else:
        file.seek(0)
        numbers = struct.unpack('<7i', read_exactly(file, 28))
        version, group_size = 0, 0
        is_tied = numbers[HEADER_FIELDS.index('vocab_size')] > 0
    sizes = {name: abs(number) for name, number in zip(HEADER_FIELDS, numbers, strict=True)}
    if version not in (0, 1, 2) or (version == 2) != (group_size > 0) or 0 in sizes.values():
        raise ValueError(f'version {version}, group size {group_size}, {sizes}')
    return GPTConfig(**sizes, tie_embeddings=is_tied), version, group_size


def check_rotation(config, rotation):
    """Raise ValueError unless a file's table of rotations, or None, is the one that the config gives."""
    if rotation is not None and not torch.allclose(rotation, rotation_table(config), atol=0.05):
        raise ValueError(f'its table of rotary positions is not for a rope_theta of {config.rope_theta:g}')


def read_weights(file, config, version, group_size):
    """Return {name: tensor} of a model.bin. Raises ValueError if the file is shorter or longer."""
    weights = {}
    for name, shape in tensors_in_file(config, version):
        if group_size and len(shape) == 2:
            w = read_quantized(file, math.prod(shape), group_size)
        else:
            w = read_floats(file, math.prod(shape))
        weights[name] = torch.tensor(w.reshape(shape))
    if file.read(1):
        raise ValueError(f'it goes on after its {len(weights)} tensors')
    return weights


def read_quantized(file, n, group_size):
    """Return n numbers that are stored as int8 with a scale for each group, as float32."""
    if n % group_size != 0:
        raise ValueError(f'its group size {group_size} does not divide a matrix of {n:,} numbers')
    groups = np.frombuffer(read_exactly(file, n), 'i1').reshape(-1, group_size)
    scales = read_floats(file, n // group_size)
    return groups * scales[:, None]


def read_floats(file, n):
    return np.frombuffer(read_exactly(file, 4 * n), '<f4')


def read_exactly(file, n_bytes):
    """Return the next `n_bytes` bytes. Raises ValueError if the file has fewer."""
    data = file.read(n_bytes)
    if len(data) < n_bytes:
        raise ValueError(f'it ends after {file.tell():,} bytes, too early')
    return data
