"""Weights by our names as safetensors, the config as JSON, and the tokenizer's own file: for anyone."""

import json

from data.tokenizer import CLASSES
from data.tokenizer_files import read_tokenizer
from formats import base
from model import GPTConfig


class Safetensors(base.Importer):
    files = ('config.json', 'model.safetensors', *(kind.file_name for kind in CLASSES.values()))

    def write(self, path, checkpoint, tokenizer):
        from safetensors.torch import save_file
        save_file(base.own_weights(checkpoint), path / 'model.safetensors')
        about = {'format': 'stories', 'config': checkpoint['config'], 'encoding': tokenizer.encoding,
                 'tokenizer_file': tokenizer.file_name, 'delimiter': tokenizer.delimiter,
                 'blank': tokenizer.blank, 'middle': tokenizer.middle}
        (path / 'config.json').write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')
        tokenizer.save(path)

    def load_weights(self, path):
        from safetensors.torch import load_file
        config = GPTConfig(**json.loads((path / 'config.json').read_bytes())['config'])
        return config, load_file(path / 'model.safetensors')

    def load_tokenizer(self, path):
        tokenizer = read_tokenizer(path)
        if tokenizer.vocab_size != json.loads((path / 'config.json').read_bytes())['config']['vocab_size']:
            raise ValueError(f'{tokenizer.file_name} is of another model')
        return tokenizer
