"""Hugging Face folders: LlamaForCausalLM and, for GPT-2's block, GPT2LMHeadModel; written and read."""

import json
import re
import reprlib
from dataclasses import replace

import torch

from configurator import UserError, user_errors
from core.checkpoint import config_of, parameter_shapes
from data.files import plain_name, refuse_stand_in
from data.sentencepiece_file import CONTROL, UNKNOWN
from data.tokenizer_files import find_tokenizer_file, read_tokenizer
from formats import base
from formats.families import GPT2, LLAMA, NEUTRAL, family_of, required_block
from formats.pieces import gpt2_merges, merges_of, pieces_of
from model import GPTConfig


class HuggingFace(base.Importer):
    reader = 'transformers'
    dtypes = tuple(base.DTYPES)
    files = ('config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
             'tokenizer_config.json', 'vocab.json', 'merges.txt')

    def __init__(self, dtype='f32'):
        """dtype: f32, f16 or bf16, for all weights."""
        self.dtype = dtype

    @property
    def max_kl(self):
        return base.MAX_KL[self.dtype]

    def incompatibilities(self, config, tokenizer):
        return base.block_incompatibilities(config, required_block(config))

    def write(self, path, checkpoint, tokenizer):
        config = GPTConfig(**checkpoint['config'])
        weights = base.own_weights(checkpoint, self.dtype)
        tensors = transpose_gpt2_matrices(family_of(config).rename_to_theirs(weights))
        base.write_safetensors(path / 'model.safetensors', tensors, {'format': 'pt'})
        write_json(path / 'config.json', their_config(config, tokenizer, self.dtype))
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
        family = family_of_config(path, theirs)
        with user_errors(path / 'config.json'):
            theirs = flatten(theirs, family)
            config = our_config(theirs, family)
        check_entries(path, theirs, family, config)
        tensors = read_all_tensors(path)
        with user_errors(path):
            check_tensors(tensors)
            tensors = use_usual_names(tensors, family)
            if config.n_layer > len(tensors):  # or the names of all layers would take long
                raise ValueError(f'it has {len(tensors)} tensors for {config.n_layer:,} layers')
            find_tied_embedding(tensors, family, config)
            add_absent_biases(tensors, family, config, modules_without_bias(theirs, config))
            weights = our_weights(tensors, family, config)
        return config, weights

    def load_tokenizer(self, path):
        return read_tokenizer(path)

    def has_infilling_rows(self, path, tokenizer):
        file = find_tokenizer_file(path)
        if file.name != 'tokenizer.json':
            return False
        added = base.read_json_object(file).get('added_tokens') or []
        ids = {token['content']: token.get('id') for token in added}
        return ids.get('<blank>') == tokenizer.blank and ids.get('<middle>') == tokenizer.middle


# config.json ------------------------------------------------------------------

def their_config(config, tokenizer, dtype):
    """Return the content of config.json for our `config`. dtype: that of the weights, such as f16."""
    family = family_of(config)
    torch_dtype = str(base.DTYPES[dtype]).removeprefix('torch.')
    theirs = {'architectures': [family.architecture], 'torch_dtype': torch_dtype}
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


def family_of_config(path, theirs):
    """Return the family that a config.json names. Raises UserError if it is neither of the two."""
    model_type = theirs.get('model_type')
    if model_type == 'llama':
        return LLAMA
    if model_type == 'gpt2' or (model_type is None and 'n_embd' in theirs):  # GPT-2's first files have none
        return GPT2
    raise UserError(f'{path} has model_type {reprlib.repr(model_type)}; only llama (LlamaForCausalLM) and '
                    'gpt2 (GPT2LMHeadModel) can be loaded')


def flatten(theirs, family):
    """Return their config with aliases resolved, and what it says of rotary positions at the top level.

    That is in `rope_parameters`, in older files in `rope_scaling`, where rope_type may be called type. Raises
    ValueError if it is not an object of plain values.
    """
    rope = theirs.get('rope_scaling') or theirs.get('rope_parameters') or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f'its rope_parameters or rope_scaling are {reprlib.repr(rope)}')
    flat = theirs | {'rope_type': rope.get('type')} | rope
    for alias, name in family.aliases.items():
        flat.setdefault(name, theirs.get(alias))
    return flat


def check_entries(path, theirs, family, config):
    """Raise UserError if an entry of their config asks for arithmetic that model.py does not have."""
    for name, value in (NEUTRAL | family.fixed | {'head_dim': config.head_dim}).items():
        if theirs.get(name) not in (value, None):
            only = 'a model without it' if value is None else f'{value!r}'
            raise UserError(f'{path} has {name} {reprlib.repr(theirs[name])}; only {only} can be loaded')


def our_config(theirs, family):
    """Return the GPTConfig for a config.json of a family. Raises ValueError if a value is wrong.

    Values that are absent or null are those of `family.defaults`, or GPTConfig's own.
    """
    values = dict(family.defaults)
    for ours, name in family.config_names.items():
        if theirs.get(name) is not None:
            values[ours] = theirs[name]
    if theirs.get('mlp_bias') and family is LLAMA:
        values['bias'] = True
    return config_of(values)


def modules_without_bias(theirs, config):
    """Return the modules of a block, attn or mlp, that have no bias in a Llama with a bias in the other one.

    model.py has biases everywhere or nowhere; a bias of zeros is as good as none.
    """
    if not config.bias or config.norm != 'rms':
        return []
    entries = {'attn': 'attention_bias', 'mlp': 'mlp_bias'}
    return [module for module, entry in entries.items() if not theirs.get(entry)]


def write_json(path, content):
    path.write_text(json.dumps(content))


# weights ----------------------------------------------------------------------

def read_all_tensors(path):
    """Return {name: tensor} of all weights in a folder. Raises UserError if a file is missing or damaged."""
    tensors = {}
    for file in weight_files(path):
        found = read_tensors(file)
        twice = tensors.keys() & found.keys()
        if twice:
            raise UserError(f'{file.name} and another file in {path} both have {min(twice)}: '
                            'download the model again')
        tensors |= found
    return tensors


def weight_files(path):
    """Return the files with the weights of a folder; of several kinds, transformers' first choice.

    Raises UserError if there are none, or one is missing.
    """
    for name in 'model.safetensors', 'pytorch_model.bin':
        if (path / name).is_file():
            return [path / name]
        names = names_in_index(path / f'{name}.index.json') or names_of_shards(path, name)
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(f'{path} has no {missing[0]}, one of the {len(names)} files of its weights: '
                            'download it again')
        if names:
            return [path / name for name in names]
    raise UserError(f'{path} has no model.safetensors and no pytorch_model.bin')


def names_in_index(index):
    """Return the names of the files that an index lists, all in its folder; [] if there is no index."""
    if not index.is_file():
        return []
    weight_map = base.read_json_object(index).get('weight_map')
    with user_errors(index):
        if not isinstance(weight_map, dict):
            raise ValueError('it has no weight_map')
        return sorted({plain_name(name) for name in weight_map.values()})


def names_of_shards(path, name):
    """Return the names of the files that weights were split into, as any of them tells; [] if there are none.

    Example: ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    stem, suffix = name.split('.')
    for file in path.glob(f'{stem}-*-of-*.{suffix}'):
        total = re.fullmatch(rf'{stem}-\d{{5}}-of-(\d{{5}})\.{suffix}', file.name)
        if total:
            return [f'{stem}-{i:05}-of-{total[1]}.{suffix}' for i in range(1, int(total[1]) + 1)]
    return []


def read_tensors(file):
    """Return {name: tensor} of a file, .safetensors or a pickled .bin. Raises UserError if it is damaged."""
    from safetensors.torch import load_file

    refuse_stand_in(file)
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


def use_usual_names(tensors, family):
    """Return `tensors` under the names of transformers, without those that follow from the config.

    Raises ValueError if two have the same name then.
    """
    usual = {}
    for name, w in tensors.items():
        usual_name = family.usual_name(name)
        if re.fullmatch(family.derived, usual_name):
            continue
        if usual_name in usual:
            raise ValueError(f'it has {usual_name} twice, once as {name}')
        usual[usual_name] = w
    return usual


def find_tied_embedding(tensors, family, config):
    """Rename a tied head that is stored in place of the embedding, as safetensors' `save_model` does."""
    embedding = family.their_name('embedding.weight')
    if config.tie_embeddings and embedding not in tensors and 'lm_head.weight' in tensors:
        tensors[embedding] = tensors.pop('lm_head.weight')


def add_absent_biases(tensors, family, config, modules):
    """Add biases of zeros to `tensors` for modules that have none. Raises ValueError if one has a bias."""
    for ours, shape in parameter_shapes(config).items():
        if not ours.endswith('.bias') or not any(f'.{module}.' in ours for module in modules):
            continue
        theirs = family.their_name(ours)
        if theirs in tensors:
            raise ValueError(f'it has {theirs}, though config.json says that there is no such bias')
        tensors[theirs] = torch.zeros(shape)


def our_weights(tensors, family, config):
    """Return their tensors under our names. Raises ValueError if there are too many or too few."""
    if 'lm_head.weight' in tensors:  # some files hold a tied head as well
        config = replace(config, tie_embeddings=False)
    our_names = {}  # {their name: ours}; c_attn is three of ours
    for ours in parameter_shapes(config):
        our_names.setdefault(family.their_name(ours), []).append(ours)
    check_names(tensors, our_names)
    weights = {}
    for theirs, w in transpose_gpt2_matrices(tensors).items():
        ours = our_names[theirs]
        if w.dim() == 0 or len(w) == 0 or len(w) % len(ours) != 0:
            raise ValueError(f'{theirs} has the shape {[*w.shape]}')
        weights |= zip(ours, w.chunk(len(ours)), strict=True)
    return weights


def check_names(tensors, expected):
    """Raise ValueError unless the names of `tensors` are those expected."""
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        others = f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''
        raise ValueError(f'it has {unknown[0]}{others}, for which a model of its config.json has no place')
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        others = f' and {len(missing) - 1} more' if len(missing) > 1 else ''
        raise ValueError(f'it has no {missing[0]}{others}')


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
        'pad_token': delimiter, 'padding_side': 'left',  # a batch of prompts is continued at its right end
        'clean_up_tokenization_spaces': False, 'model_max_length': block_size,
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
