"""Foreign formats, one a file; and which of all that can be read, ours included, a path is.

What needs torch is imported where it is used, as prepare.py comes here for a tokenizer alone.
"""

import json
from pathlib import Path

from data.tokenizer import BPETokenizer, load_tokenizer, tokenizer_from_state
from errors import UserError, reading
from formats import gpt2


def load_pretrained(path):
    """The model at `path` as a checkpoint of ours: of a pretrained one no step is done, and no setting known.

    path: a checkpoint (.pt, or a run's folder), a Hugging Face folder of the Llama or GPT-2 family (its
    'tokenizer' may be None), a folder that export.py wrote as safetensors, or llama2.c's .bin with its
    tokenizer beside it. Raises UserError where it is none of these, or is damaged.
    """
    if checkpoint := own_checkpoint(path):
        return checkpoint
    importer = importer_of(path)
    if not importer:
        raise UserError(f'{path} is no model to begin with: name a Hugging Face folder (with config.json), '
                        'a llama2.c model (.bin, tokenizer.bin beside it), or a run of ours (with best.pt)')
    return importer.load(Path(path))


def open_tokenizer(path):
    """The tokenizer of a prepared folder, a sentencepiece model, a folder with GPT-2's vocabulary, or what
    `load_pretrained` reads. Raises UserError where `path` is none of these, or is damaged."""
    path = Path(path)
    if (path / 'meta.json').is_file():
        return load_tokenizer(path)
    with reading(path):
        if checkpoint := own_checkpoint(path):
            tokenizer = tokenizer_from_state(checkpoint['tokenizer'], path)
        elif path.suffix == '.model' and path.is_file():
            tokenizer = BPETokenizer(path.read_bytes())
        elif importer := importer_of(path):
            tokenizer = importer.load_tokenizer(path)
        else:
            tokenizer = gpt2.from_folder(path)
    if not tokenizer:
        raise UserError(f'{path} is no tokenizer: name a checkpoint (.pt or its folder), a prepared folder, '
                        'a sentencepiece model (.model), or a folder with vocab.json and merges.txt')
    return tokenizer


def own_checkpoint(path):
    """The checkpoint that is `path` or lies in that folder; None if there is none."""
    for file in Path(path), Path(path, 'best.pt'), Path(path, 'ckpt.pt'):
        if file.suffix == '.pt' and file.is_file():
            from checkpoint import load_checkpoint
            return load_checkpoint(file)
    return None


def importer_of(path):
    """The format that reads the pretrained model at `path`; None if none does."""
    path, config = Path(path), Path(path, 'config.json')
    if path.suffix == '.bin' and path.is_file():
        from formats.llama2c import Llama2c
        return Llama2c()
    if not config.is_file():
        return None
    from formats.hf import HuggingFace
    from formats.safetensors import Safetensors
    with reading(config):
        return Safetensors() if json.loads(config.read_bytes()).get('format') == 'stories' else HuggingFace()
