"""Plain files for any program: weights under our names as safetensors, the config as JSON, the tokenizer."""

import json

from configurator import UserError, user_errors
from core.checkpoint import config_of
from data.files import refuse_stand_in
from data.tokenizer import FILE_NAMES
from data.tokenizer_files import read_tokenizer
from formats import base

FORMAT_NAME = 'stories'  # in config.json, tells our files from Hugging Face's


class Safetensors(base.Importer):
    files = ('config.json', 'model.safetensors', *FILE_NAMES)
    dtypes = tuple(base.DTYPES)

    def __init__(self, dtype='f32'):
        """dtype: f32, f16 or bf16, for all weights."""
        self.dtype = dtype

    @property
    def max_kl(self):
        return base.MAX_KL[self.dtype]

    def write(self, path, checkpoint, tokenizer):
        weights = base.own_weights(checkpoint, self.dtype)
        base.write_safetensors(path / 'model.safetensors', weights)
        about = {'format': FORMAT_NAME, 'config': checkpoint['config'], 'encoding': tokenizer.encoding,
                 'tokenizer_file': tokenizer.file_name, 'delimiter': tokenizer.delimiter,
                 'blank': tokenizer.blank, 'middle': tokenizer.middle}
        (path / 'config.json').write_text(json.dumps(about, indent=1) + '\n', encoding='utf-8')
        tokenizer.save(path)

    def load_weights(self, path):
        from safetensors.torch import load_file

        config = read_config(path)
        file = path / 'model.safetensors'
        if file.is_file():
            refuse_stand_in(file)
        with user_errors(file):
            return config, load_file(file)

    def load_tokenizer(self, path):
        """Read the tokenizer. Raises UserError if there is none, or it belongs to another model."""
        tokenizer = read_tokenizer(path)
        if tokenizer is None:
            raise UserError(f'{path} has no tokenizer')
        if tokenizer.vocab_size != read_config(path).vocab_size:
            raise UserError(f'{path / tokenizer.file_name} belongs to another model: '
                            'it does not have the vocab_size of config.json')
        return tokenizer

    def has_infilling_rows(self, path, tokenizer):
        return True


def read_config(path):
    """Return the GPTConfig of a folder. Raises UserError if config.json is damaged."""
    content = base.read_json_object(path / 'config.json')
    with user_errors(path / 'config.json'):
        values = content.get('config')
        if not isinstance(values, dict):
            raise ValueError('its config is not an object')
        return config_of(values)
