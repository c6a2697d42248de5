"""Find out what a path contains and load it: a checkpoint of this project, or a model of another one."""

from pathlib import Path

from configurator import UserError
from core.checkpoint import load_checkpoint
from data.files import refuse_stand_in
from data.tokenizer import tokenizer_from_state
from data.tokenizer_files import in_cache, is_llama2c_model
from formats.base import read_json_object
from formats.hf import HuggingFace
from formats.llama2c import Llama2c
from formats.plain import FORMAT_NAME, Safetensors


def load_pretrained(path):
    """Load the model at `path` as a checkpoint. That of another project has no settings, and 'iter' is 0.

    path: one of
        a checkpoint (.pt), or the folder of a run
        a Hugging Face folder of the Llama or GPT-2 family, or the cache that has one; its 'tokenizer' may
            be None
        a folder that export.py wrote with --format safetensors
        a model.bin of llama2.c with its tokenizer next to it
    Raises UserError if it is none of these, or damaged.
    """
    path = in_cache(Path(path))
    if path.is_file():
        refuse_stand_in(path)
    checkpoint_file = find_checkpoint(path)
    if checkpoint_file is not None:
        return load_checkpoint(checkpoint_file)
    check_is_whole_model(path)
    importer = find_importer(path)
    if importer is None:
        raise UserError(f'{path} does not hold a model: name the folder of a run (with best.pt), a Hugging '
                        'Face folder (with config.json; hf download gpt2 --local-dir gpt2 makes one), or a '
                        'model of llama2.c (.bin, with tokenizer.bin next to it)')
    return importer.load(path)


def load_with_tokenizer(path):
    """Return (checkpoint, Tokenizer) of what `load_pretrained` reads. Raises UserError if it has none."""
    checkpoint = load_pretrained(path)
    if not checkpoint['tokenizer']:
        raise UserError(f'{path} has no tokenizer: put the one that the model was trained with next to it')
    return checkpoint, tokenizer_from_state(checkpoint['tokenizer'])


def find_checkpoint(path):
    """Return the path of the checkpoint that `path` names: itself, or a file in that folder; None if none."""
    if path.suffix == '.pt' and not path.is_dir():
        return path  # even if it is missing: then reading it says so
    for name in 'best.pt', 'ckpt.pt':
        if (path / name).is_file():
            return path / name
    return None


def check_is_whole_model(path):
    """Raise UserError if `path` has only a part of a model."""
    if (path / 'adapter_config.json').is_file():
        raise UserError(f'{path} holds an adapter (adapter_config.json): merge it into its model '
                        '(merge_and_unload of peft), save that, and name its folder')
    is_weights = path.suffix == '.safetensors' or path.name.startswith('pytorch_model')
    if is_weights and (path.parent / 'config.json').is_file():
        raise UserError(f'{path} is one file of a model: name its folder, {path.parent}')


def find_importer(path):
    """Return the format that reads the model at `path`, or None if it is not such a model."""
    if is_llama2c_model(path):
        return Llama2c()
    if (path / 'config.json').is_file():
        content = read_json_object(path / 'config.json')
        return Safetensors() if content.get('format') == FORMAT_NAME else HuggingFace()
    return None
