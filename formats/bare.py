"""Weights by our names as safetensors, the config as JSON, and the tokenizer's own file: for anyone."""

import json
import struct
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from data.tokenizer import CLASSES, tokenizer_from_state
from model import GPT, GPTConfig


class Bare:
    reader = 'model.py, from the files alone'
    needs = ('safetensors',)
    check_needs = ()
    files = ('config.json', 'model.safetensors', *(kind.file_name for kind in CLASSES.values()))
    log_probs = False
    round_weight = round_input = None

    def obstacles(self, config, tokenizer):
        return []

    def write(self, folder, checkpoint, tokenizer):
        from safetensors.torch import save_file

        tied = checkpoint['config']['tie_embeddings']
        save_file({name: w.float().contiguous() for name, w in checkpoint['model'].items()
                   if not (tied and name == 'lm_head.weight')}, folder / 'model.safetensors')
        config = {'format': 'stories', 'config': checkpoint['config'], 'encoding': tokenizer.encoding,
                  'tokenizer_file': tokenizer.file_name, 'delimiter': tokenizer.delimiter,
                  'blank': tokenizer.blank, 'middle': tokenizer.middle}
        (folder / 'config.json').write_text(json.dumps(config, indent=1) + '\n', encoding='utf-8')
        tokenizer.save(folder)

    def read(self, folder):
        return Reader(folder)


class Reader:
    def __init__(self, folder):
        config, weights, self.tokenizer = load(folder)
        self.model = GPT(config).eval()
        self.model.load_state_dict(weights)

    @torch.inference_mode()
    def logits(self, ids, positions):
        return self.model(torch.tensor([ids]))[0, positions].numpy()

    def encode(self, text):
        return [self.tokenizer.delimiter, *self.tokenizer.encode(text)]

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def is_bare(folder):
    """Whether `folder` was written in this format."""
    try:
        return json.loads(Path(folder, 'config.json').read_bytes())['format'] == 'stories'
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load(folder):
    """(GPTConfig, weights, tokenizer) of a folder. Raises UserError where it is damaged.

    safetensors is 8 bytes, the length of a JSON header; the header, with each tensor's place; the tensors.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / 'config.json').read_bytes())
        config = GPTConfig(**about['config'])
        name = CLASSES[about['encoding']].file_name
        data = (folder / 'model.safetensors').read_bytes()
        length, = struct.unpack_from('<Q', data)
        places = json.loads(data[8:8 + length])
        places.pop('__metadata__', None)
        weights = {}
        for key, tensor in places.items():
            start, end = (8 + length + offset for offset in tensor['data_offsets'])
            array = np.frombuffer(data[start:end], '<f4').reshape(tensor['shape'])
            weights[key] = torch.from_numpy(array.copy())
        if config.tie_embeddings:
            weights['lm_head.weight'] = weights['embedding.weight']
        state = {'encoding': about['encoding'], 'files': {name: (folder / name).read_bytes()}}
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f'{folder} is damaged: {error!r}') from None
    return config, weights, tokenizer_from_state(state, folder)
