"""Foreign formats, one a file; and which of all that can be read, ours included, a path is.

What needs torch is imported where it is used, as prepare.py comes here for a tokenizer alone.
"""

import json
from pathlib import Path

from configurator import UserError, user_errors
from data.tokenizer import load_tokenizer, tokenizer_from_state
from data.tokenizer_files import in_cache, read_tokenizer


def load_pretrained(path):
    """The model at `path` as a checkpoint of ours: of a pretrained one no step is done, and no setting known.

    path: a checkpoint (.pt, or a run's folder), a Hugging Face folder of the Llama or GPT-2 family (its
    'tokenizer' may be None) or cache, a folder that export.py wrote as safetensors, or llama2.c's .bin with
    its tokenizer beside it. Raises UserError where it is none of these, or is damaged.
    """
    path = in_cache(Path(path))
    if checkpoint := own_checkpoint(path):
        return checkpoint
    importer = importer_of(path)
    if not importer:
        raise UserError(f'{path} is no model to begin with: name a Hugging Face folder (with config.json; hf '
                        'download gpt2 --local-dir gpt2 makes one), a llama2.c model (.bin, tokenizer.bin '
                        'beside it), or a run of ours (with best.pt)')
    return importer.load(path)


def load_with_tokenizer(path):
    """(checkpoint, Tokenizer) of a run's file or of what `load_pretrained` reads. Raises UserError where it
    is neither, is damaged, or has no tokenizer."""
    checkpoint = load_pretrained(path)
    if not checkpoint['tokenizer']:
        raise UserError(f'{path} has no tokenizer beside it: put the one there that it was trained with')
    return checkpoint, tokenizer_from_state(checkpoint['tokenizer'])


def open_tokenizer(path):
    """The tokenizer of a prepared folder, of what `load_pretrained` reads, its model there or not, or of what
    `read_tokenizer` does. Raises UserError where `path` is none of these, or is damaged."""
    path = in_cache(Path(path))
    if (path / 'meta.json').is_file():
        return load_tokenizer(path)
    with user_errors(path):
        if checkpoint := own_checkpoint(path):
            return tokenizer_from_state(checkpoint['tokenizer'], path)
        importer = importer_of(path)
        if tokenizer := importer.load_tokenizer(path) if importer else read_tokenizer(path):
            return tokenizer
    raise UserError(f'{path} is no tokenizer: name a checkpoint (.pt or its folder), a prepared folder, '
                    'tokenizer.model, .json or .bin, vocab.json, their folder, or a .txt for its characters')


def own_checkpoint(path):
    """The checkpoint that is `path` (.pt) or lies in that folder; None if there is none."""
    files = [path / 'best.pt', path / 'ckpt.pt'] if path.is_dir() else [path]
    for file in files:
        if file.suffix == '.pt' and (file.is_file() or file == path):
            from core.checkpoint import load_checkpoint
            return load_checkpoint(file)
    return None


def importer_of(path):
    """The format that reads the pretrained model at `path`; None if none does."""
    path, config = Path(path), Path(path, 'config.json')
    if path.suffix == '.bin' and path.is_file():
        with open(path, 'rb') as file:
            if b'<unk>' in file.read(32):
                return None  # a tokenizer.bin
        from formats.llama2c import Llama2c
        return Llama2c()
    if not config.is_file():
        return None
    from formats.hf import HuggingFace
    from formats.plain import Safetensors
    with user_errors(config):
        return Safetensors() if json.loads(config.read_bytes()).get('format') == 'stories' else HuggingFace()
