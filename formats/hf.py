"""Hugging Face folders: LlamaForCausalLM and, for GPT-2's block, GPT2LMHeadModel; written and read."""

import json
import re
import reprlib

import torch

from configurator import UserError, user_errors
from core.checkpoint import config_of
from data.sentencepiece_file import CONTROL, UNKNOWN
from data.tokenizer_files import read_tokenizer
from formats import base
from formats.families import GPT2, LLAMA, family_of, required_block
from formats.pieces import gpt2_merges, merges_of, pieces_of
from model import GPTConfig


class HuggingFace(base.Importer):
    reader = 'transformers'
    files = ('config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
             'tokenizer_config.json', 'vocab.json', 'merges.txt')

    def incompatibilities(self, config, tokenizer):
        return base.block_incompatibilities(config, required_block(config))

    def write(self, path, checkpoint, tokenizer):
        from safetensors.torch import save_file

        config = GPTConfig(**checkpoint['config'])
        tensors = family_of(config).rename_to_theirs(base.own_weights(checkpoint))
        save_file(transpose_gpt2_matrices(tensors), path / 'model.safetensors', {'format': 'pt'})
        write_json(path / 'config.json', their_config(config, tokenizer))
        write_json(path / 'generation_config.json', generation_config(config, tokenizer))
        write_tokenizer(path, tokenizer, config.block_size)

    def read(self, path):
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).float().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def logits(self, ids, positions):
        return self.model(torch.tensor([ids])).logits[0, positions]

    def encode(self, text):
        return self.tokenizer(text)['input_ids']

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def load_weights(self, path):
        theirs = base.read_json_object(path / 'config.json')
        family = family_of_model_type(path, theirs.get('model_type'))
        with user_errors(path / 'config.json'):
            theirs = flatten_rope(theirs)
            check_fixed_entries(path, theirs, family)
            config = our_config(theirs, family)
        tensors = read_all_tensors(path)
        if family is GPT2:
            tensors = add_gpt2_prefix(tensors)
        with user_errors(path):
            check_tensors(tensors)
            weights = family.rename_to_ours(transpose_gpt2_matrices(tensors))
        return config, {name: w.float() for name, w in weights.items()}

    def load_tokenizer(self, path):
        return read_tokenizer(path)


# config.json ------------------------------------------------------------------

def their_config(config, tokenizer):
    """Return the content of config.json for our `config`."""
    family = family_of(config)
    theirs = {'architectures': [family.architecture], 'torch_dtype': 'float32'}
    for ours, name in family.config_names.items():
        theirs[name] = getattr(config, ours)
    theirs['mlp_bias'] = config.bias
    for place in 'embd', 'resid', 'attn':
        theirs[f'{place}_pdrop'] = config.dropout
    return theirs | family.fixed | special_ids(tokenizer)


def generation_config(config, tokenizer):
    """Return the content of generation_config.json: `generate` then samples as sample.py does by default."""
    return special_ids(tokenizer) | {
        'pad_token_id': tokenizer.delimiter, 'max_length': config.block_size, 'do_sample': True,
        'temperature': 0.8, 'top_k': 0, 'top_p': 0.95}


def special_ids(tokenizer):
    """A story begins with the delimiter and ends where the next one would begin."""
    return {'bos_token_id': tokenizer.delimiter, 'eos_token_id': tokenizer.delimiter}


def family_of_model_type(path, model_type):
    """Return the family that a config.json names. Raises UserError if it is neither of the two."""
    if model_type == 'llama':
        return LLAMA
    if model_type in ('gpt2', None):
        return GPT2
    raise UserError(f'{path} has model_type {reprlib.repr(model_type)}; only llama and gpt2 can be loaded')


def flatten_rope(theirs):
    """Return their config with what it says of rotary positions at the top level, as `rope_type` and so on.

    It is in `rope_parameters`, in older files in `rope_scaling`, where rope_type may be called type. Raises
    ValueError if that is not an object.
    """
    rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}
    if not isinstance(rope, dict):
        raise ValueError(f'rope_parameters or rope_scaling is {reprlib.repr(rope)}')
    return theirs | {'rope_type': rope.get('type')} | rope


def check_fixed_entries(path, theirs, family):
    """Raise UserError if an entry that all our models have in common has another value."""
    for name, value in family.fixed.items():
        if theirs.get(name) not in (value, None):
            raise UserError(f'{path} has {name} {reprlib.repr(theirs[name])}; only {value!r} can be loaded')


def our_config(theirs, family):
    """Return the GPTConfig for a config.json of a family. Raises ValueError if a value is wrong.

    Values that are absent or null are those of `family.defaults`, or GPTConfig's own.
    """
    values = dict(family.defaults)
    for ours, name in family.config_names.items():
        if theirs.get(name) is not None:
            values[ours] = theirs[name]
    return config_of(values)


def write_json(path, content):
    path.write_text(json.dumps(content))


# weights ----------------------------------------------------------------------

def read_all_tensors(path):
    """Return {name: tensor} of all weights in a folder. Raises UserError if there are none, or damaged."""
    files = sorted(path.glob('model*.safetensors')) or sorted(path.glob('pytorch_model*.bin'))
    if not files:
        raise UserError(f'{path} has no model.safetensors and no pytorch_model.bin')
    tensors = {}
    for file in files:  # all of them; an index file could name files anywhere
        tensors |= read_tensors(file)
    return tensors


def read_tensors(file):
    """Return {name: tensor} of a file, .safetensors or a pickled .bin. Raises UserError if it is damaged."""
    from safetensors.torch import load_file

    with user_errors(file):
        if file.suffix == '.safetensors':
            return load_file(file)
        tensors = torch.load(file, map_location='cpu', weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise ValueError('it does not hold named tensors')
        return tensors


def check_tensors(tensors):
    """Raise ValueError unless all values are tensors that can be transposed, split and converted."""
    for name, w in tensors.items():
        if not isinstance(w, torch.Tensor) or w.layout != torch.strided or w.is_quantized or w.is_complex():
            raise ValueError(f'{name} is not a plain tensor of real numbers')


def add_gpt2_prefix(tensors):
    """Put `transformer.` before names without it: GPT-2 was published as the model without its head."""
    return {re.sub('^(?!transformer|lm_head)', 'transformer.', name): w for name, w in tensors.items()}


def transpose_gpt2_matrices(tensors):
    """Return `tensors`, under their names here, with the matrices of GPT-2's blocks transposed.

    GPT-2 stores them as (in, out), model.py as (out, in); the function is its own inverse.
    """
    transposed = {}
    for name, w in tensors.items():
        if name.startswith('transformer.h.') and w.dim() == 2:
            w = w.T.contiguous()
        transposed[name] = w
    return transposed


# the tokenizer ----------------------------------------------------------------

def write_tokenizer(path, tokenizer, block_size):
    """Write tokenizer.json and tokenizer_config.json.

    There is no tokenizer.model: AutoTokenizer would read it instead.
    """
    from tokenizers import processors

    pieces = pieces_of(tokenizer)
    if tokenizer.encoding == 'gpt2':
        theirs = make_gpt2_tokenizer(pieces)
    else:
        theirs = make_llama_tokenizer(pieces, tokenizer.lossless)
    theirs.add_special_tokens([text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    delimiter = theirs.id_to_token(tokenizer.delimiter)
    theirs.post_processor = processors.TemplateProcessing(  # a story begins with the delimiter
        single=f'{delimiter} $A', special_tokens=[(delimiter, tokenizer.delimiter)])
    theirs.save(str(path / 'tokenizer.json'))
    write_json(path / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': delimiter, 'eos_token': delimiter,
        'pad_token': delimiter, 'clean_up_tokenization_spaces': False, 'model_max_length': block_size,
        'model_input_names': ['input_ids', 'attention_mask'],
        'split_special_tokens': True})  # no text can spell a special token


def make_gpt2_tokenizer(pieces):
    """Return GPT-2's tokenizer as one of the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    theirs = Tokenizer(models.BPE(ids_of(pieces), gpt2_merges(pieces)))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    return theirs


def make_llama_tokenizer(pieces, lossless):
    """Return a char or bpe tokenizer as one of the tokenizers library. lossless: it has the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    theirs = Tokenizer(models.BPE(ids_of(pieces), merges_of(pieces), unk_token='<unk>', fuse_unk=True,
                                  byte_fallback=lossless))
    # Spaces are not replaced by U+2581, so a U+2581 in a text is a character like any other.
    theirs.normalizer = normalizers.Prepend(' ')
    theirs.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    return theirs


def ids_of(pieces):
    """Return {text: id} of all pieces but the two for infilling, which become special tokens."""
    return {text: i for i, (text, _, _) in enumerate(pieces[:-2])}
