"""Hugging Face folders: LlamaForCausalLM or, for GPT-2's block, GPT2LMHeadModel, and the way back."""

import json
import re

import torch

from configurator import UserError, user_errors
from data.tokenizer_files import CONTROL, UNKNOWN, read_tokenizer
from formats import base
from formats.pieces import gpt2_merges, merges_of, pieces_of
from model import GPTConfig

# Their names of our choices; what a config.json says, or leaves out, of every model of ours
LLAMA_CONFIG = {
    'block_size': 'max_position_embeddings', 'vocab_size': 'vocab_size', 'n_layer': 'num_hidden_layers',
    'n_head': 'num_attention_heads', 'n_kv_head': 'num_key_value_heads', 'n_embd': 'hidden_size',
    'mlp_width': 'intermediate_size', 'bias': 'attention_bias', 'tie_embeddings': 'tie_word_embeddings',
    'norm_eps': 'rms_norm_eps', 'rope_theta': 'rope_theta'}
LLAMA_FIXED = {'model_type': 'llama', 'hidden_act': 'silu', 'rope_type': 'default'}
GPT2_CONFIG = {
    'block_size': 'n_positions', 'vocab_size': 'vocab_size', 'n_layer': 'n_layer', 'n_head': 'n_head',
    'n_embd': 'n_embd', 'mlp_width': 'n_inner', 'tie_embeddings': 'tie_word_embeddings',
    'norm_eps': 'layer_norm_epsilon'}
GPT2_FIXED = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'scale_attn_weights': True,
              'scale_attn_by_inverse_layer_idx': False}


class HuggingFace(base.Importer):
    reader = 'transformers'
    files = ('config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
             'tokenizer_config.json', 'vocab.json', 'merges.txt')

    def mismatches(self, config, tokenizer):
        return base.unlike(config)

    def write(self, path, checkpoint, tokenizer):
        from safetensors.torch import save_file
        config = GPTConfig(**checkpoint['config'])
        tensors = base.by_hugging_face(config, base.own_weights(checkpoint))
        save_file(transposed(tensors), path / 'model.safetensors', {'format': 'pt'})
        llama = config.norm == 'rms'
        names, fixed = (LLAMA_CONFIG, LLAMA_FIXED) if llama else (GPT2_CONFIG, GPT2_FIXED)
        ids = {'bos_token_id': tokenizer.delimiter, 'eos_token_id': tokenizer.delimiter}
        (path / 'config.json').write_text(json.dumps({
            'architectures': ['LlamaForCausalLM' if llama else 'GPT2LMHeadModel'], 'torch_dtype': 'float32',
            **{name: getattr(config, ours) for ours, name in names.items()}, 'mlp_bias': config.bias,
            **{f'{name}_pdrop': config.dropout for name in ('embd', 'resid', 'attn')}, **fixed, **ids}))
        (path / 'generation_config.json').write_text(json.dumps({  # as sample.py writes
            **ids, 'pad_token_id': tokenizer.delimiter, 'max_length': config.block_size, 'do_sample': True,
            'temperature': 0.8, 'top_k': 0, 'top_p': 0.95}))
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
        from safetensors.torch import load_file
        theirs = json.loads((path / 'config.json').read_bytes())
        llama = theirs.get('model_type') == 'llama'
        rope = theirs.get('rope_parameters') or theirs.get('rope_scaling') or {}
        theirs |= {'rope_type': rope.get('type')} | rope
        for name, value in (LLAMA_FIXED if llama else GPT2_FIXED).items():
            if theirs.get(name) not in (value, None):
                raise UserError(f'{path} has {name} {theirs[name]!r}; a model of ours has {value!r}')
        # what else it may leave out is as in ours, but for these
        absent = {'tie_embeddings': False, 'norm_eps': 1e-6} if llama else base.GPT2
        names = LLAMA_CONFIG if llama else GPT2_CONFIG
        config = GPTConfig(**absent | {ours: theirs[name] for ours, name in names.items()
                                       if theirs.get(name) is not None})
        files = sorted(path.glob('model*.safetensors')) or sorted(path.glob('pytorch_model*.bin'))
        if not files:
            raise UserError(f'{path} has no model.safetensors and no pytorch_model.bin')
        tensors = {}
        for file in files:  # all that are there: no name in an index leads anywhere
            with user_errors(file):
                tensors |= (load_file(file) if file.suffix == '.safetensors' else
                            torch.load(file, map_location='cpu', weights_only=True))
        if not llama:  # a pretrained one has no head, the names have no prefix
            tensors = {re.sub('^(?!transformer|lm_head)', 'transformer.', name): w
                       for name, w in tensors.items()}
        back = {new: old for old, new in (base.LLAMA_NAMES if llama else base.GPT2_NAMES).items()}
        weights = {}
        for name, w in base.named(transposed(tensors), back).items():
            parts = w.float().chunk(3) if '.qkv.' in name else [w.float()]
            weights |= {name.replace('qkv', x): part for x, part in zip('qkv', parts, strict=False)}
        return config, weights

    load_tokenizer = staticmethod(read_tokenizer)


def write_tokenizer(path, tokenizer, block_size):
    """tokenizer.json and what goes with it; no tokenizer.model, which AutoTokenizer reads otherwise."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    pieces = pieces_of(tokenizer)
    vocab = {text: i for i, (text, _, _) in enumerate(pieces[:-2])}
    if tokenizer.encoding == 'gpt2':
        theirs = Tokenizer(models.BPE(vocab, gpt2_merges(pieces)))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
    else:
        theirs = Tokenizer(models.BPE(vocab, merges_of(pieces), unk_token='<unk>', fuse_unk=True,
                                      byte_fallback=tokenizer.lossless))
        # Spaces stay spaces: then U+2581, which is no space, goes as its bytes.
        theirs.normalizer = normalizers.Prepend(' ')
        theirs.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)])
    theirs.add_special_tokens([text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    delimiter = theirs.id_to_token(tokenizer.delimiter)
    theirs.post_processor = processors.TemplateProcessing(  # a story begins with it
        single=f'{delimiter} $A', special_tokens=[(delimiter, tokenizer.delimiter)])
    theirs.save(str(path / 'tokenizer.json'))
    (path / 'tokenizer_config.json').write_text(json.dumps({
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': delimiter, 'eos_token': delimiter,
        'pad_token': delimiter, 'clean_up_tokenization_spaces': False, 'model_max_length': block_size,
        'model_input_names': ['input_ids', 'attention_mask'],
        'split_special_tokens': True}))  # no text spells one


def transposed(tensors):
    """`tensors`, by their names here, with the matrices of GPT-2's blocks transposed: there, and back."""
    return {name: w.T.contiguous() if w.dim() == 2 and name.startswith('transformer.h.') else w
            for name, w in tensors.items()}
