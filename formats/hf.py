"""Hugging Face folders: LlamaForCausalLM or, for GPT-2's block, GPT2LMHeadModel, and the way back."""

import base64
import json
from itertools import pairwise
from pathlib import Path

import torch

from configurator import UserError
from data.tokenizer import GPT2_BYTES, SPACE_MARK, GPT2Tokenizer, tokenizer_from_state
from formats.families import GPT2, LLAMA, add_infilling_rows, family, unlike_family
from formats.pieces import CONTROL, FIRST, INFILLING, NORMAL, UNKNOWN, pieces_of, tokenizer_of
from model import GPTConfig

ACTIVATIONS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'relu': 'relu', 'relu2': 'relu2'}
SAFETENSORS = 'pip install safetensors'

# Their names of our tensors, {} being the layer
LLAMA_NAMES = {'embedding': 'model.embed_tokens', 'norm': 'model.norm', 'lm_head': 'lm_head'} | {
    f'blocks.{{}}.{ours}': f'model.layers.{{}}.{theirs}' for ours, theirs in {
        'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm',
        'attn.q': 'self_attn.q_proj', 'attn.k': 'self_attn.k_proj', 'attn.v': 'self_attn.v_proj',
        'attn.proj': 'self_attn.o_proj', 'mlp.gate': 'mlp.gate_proj', 'mlp.up': 'mlp.up_proj',
        'mlp.proj': 'mlp.down_proj'}.items()}
GPT2_NAMES = {'embedding': 'transformer.wte', 'position': 'transformer.wpe', 'norm': 'transformer.ln_f',
              'lm_head': 'lm_head'} | {
    f'blocks.{{}}.{ours}': f'transformer.h.{{}}.{theirs}' for ours, theirs in {
        'attn_norm': 'ln_1', 'mlp_norm': 'ln_2', 'attn.qkv': 'attn.c_attn', 'attn.proj': 'attn.c_proj',
        'mlp.up': 'mlp.c_fc', 'mlp.proj': 'mlp.c_proj'}.items()}


def renamed(weights, names, n_layer):
    """`weights` under other names: those that `names` maps, whatever follows the last dot."""
    full = {old.format(i): new.format(i) for old, new in names.items() for i in range(n_layer)}
    out = {}
    for name, w in weights.items():
        stem, _, kind = name.rpartition('.')
        if stem in full:
            out[f'{full[stem]}.{kind}'] = w
    return out


def gpt2_tensors(config, weights):
    """Our weights as GPT-2's files have them: q, k and v as one, all matrices but embeddings transposed."""
    out = {name: w.T.contiguous() if w.dim() == 2 and name.startswith('blocks.') else w
           for name, w in weights.items() if name.split('.')[-2] not in ('q', 'k', 'v')}
    for i in range(config.n_layer):
        for kind in 'weight', 'bias':
            qkv = torch.cat([weights[f'blocks.{i}.attn.{name}.{kind}'] for name in 'qkv'])
            out[f'blocks.{i}.attn.qkv.{kind}'] = qkv.t().contiguous()
    return out


class HuggingFace:
    reader = 'transformers'
    needs = ('safetensors',)
    check_needs = ('transformers',)
    files = ('config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
             'tokenizer_config.json', 'vocab.json', 'merges.txt', 'README.md')
    log_probs = False
    round_weight = round_input = None

    def obstacles(self, config, tokenizer):
        return unlike_family(config)

    def write(self, folder, checkpoint, tokenizer):
        from safetensors.torch import save_file

        config = GPTConfig(**checkpoint['config'])
        weights = {name: w.float().contiguous() for name, w in checkpoint['model'].items()  # none twice
                   if not (config.tie_embeddings and name == 'lm_head.weight')}
        llama = family(config) is LLAMA
        if not llama:
            weights = gpt2_tensors(config, weights)
        tensors = renamed(weights, LLAMA_NAMES if llama else GPT2_NAMES, config.n_layer)
        save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
        special = {'bos_token_id': tokenizer.delimiter, 'eos_token_id': tokenizer.delimiter}
        files = {
            'config.json': (llama_config if llama else gpt2_config)(config) | special,
            # As sample.py does; a story ends where the next would begin
            'generation_config.json': special | {
                'pad_token_id': tokenizer.delimiter, 'max_length': config.block_size, 'do_sample': True,
                'temperature': 0.8, 'top_k': 0, 'top_p': 0.95},
            **tokenizer_files(tokenizer, config.block_size)}
        for name, content in files.items():
            if not isinstance(content, str):
                content = json.dumps(content, ensure_ascii=False, indent=1) + '\n'
            (folder / name).write_text(content, encoding='utf-8')
        (folder / 'README.md').write_text(model_card(checkpoint, config, tokenizer, llama), encoding='utf-8')

    def read(self, folder):
        return Reader(folder)


class Reader:
    """What transformers makes of a folder, offline."""

    def __init__(self, folder):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.inference_mode()
    def logits(self, ids, positions):
        return self.model(torch.tensor([ids])).logits[0, positions].numpy()

    def encode(self, text):
        return self.tokenizer(text)['input_ids']

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def llama_config(config):
    return {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'torch_dtype': 'float32',
            'vocab_size': config.vocab_size, 'max_position_embeddings': config.block_size,
            'hidden_size': config.n_embd, 'intermediate_size': config.mlp_width,
            'num_hidden_layers': config.n_layer, 'num_attention_heads': config.n_head,
            'num_key_value_heads': config.n_kv_head, 'head_dim': config.head_dim, 'hidden_act': 'silu',
            'attention_bias': config.bias, 'mlp_bias': config.bias, 'rms_norm_eps': config.norm_eps,
            'rope_theta': config.rope_theta, 'tie_word_embeddings': config.tie_embeddings}


def gpt2_config(config):
    return {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2', 'torch_dtype': 'float32',
            'vocab_size': config.vocab_size, 'n_positions': config.block_size, 'n_embd': config.n_embd,
            'n_layer': config.n_layer, 'n_head': config.n_head, 'n_inner': config.mlp_width,
            'activation_function': 'gelu_new', 'layer_norm_epsilon': config.norm_eps,
            'embd_pdrop': config.dropout, 'resid_pdrop': config.dropout, 'attn_pdrop': config.dropout,
            'tie_word_embeddings': config.tie_embeddings}


def tokenizer_files(tokenizer, block_size):
    """The contents of tokenizer.json and what goes with it, {file name: JSON value or text}.

    A tokenizer.model is not written: AutoTokenizer makes something else of it, without a word.
    """
    if tokenizer.encoding == 'gpt2':
        tokens = gpt2_tokens(tokenizer)
        vocab = {token: i for i, token in enumerate([*tokens, '<|endoftext|>'])}
        merges = gpt2_merges(tokens)
        model = {'type': 'BPE', 'vocab': vocab, 'merges': merges}
        special = {'<|endoftext|>': tokenizer.delimiter}
        spelling = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
        rules = {'pre_tokenizer': spelling, 'decoder': spelling}
        lines = ['#version: 0.2', *map(' '.join, merges), '']
        more = {'vocab.json': vocab, 'merges.txt': '\n'.join(lines)}
    else:
        pieces = pieces_of(tokenizer)
        vocab = {text: i for i, (text, _, _) in enumerate(pieces[:-len(INFILLING)])}
        model = {'type': 'BPE', 'unk_token': '<unk>', 'byte_fallback': True, 'vocab': vocab,
                 'merges': merges_of(pieces)}
        special = {text: i for i, (text, _, kind) in enumerate(pieces[:-2]) if kind in (UNKNOWN, CONTROL)}
        # Spaces stay spaces: then U+2581, which is no space, goes as its bytes.
        rules = {'normalizer': {'type': 'Prepend', 'prepend': ' '},
                 'decoder': {'type': 'Sequence', 'decoders': [
                     {'type': 'ByteFallback'}, {'type': 'Fuse'},
                     {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}]}}
        more = {}
    special |= {'<blank>': tokenizer.blank, '<middle>': tokenizer.middle}
    delimiter = next(text for text, i in special.items() if i == tokenizer.delimiter)
    # A story begins with the delimiter
    first = {'SpecialToken': {'id': delimiter, 'type_id': 0}}
    rules['post_processor'] = {
        'type': 'TemplateProcessing', 'single': [first, {'Sequence': {'id': 'A', 'type_id': 0}}],
        'pair': [first, {'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}],
        'special_tokens': {delimiter: {'id': delimiter, 'ids': [tokenizer.delimiter], 'tokens': [delimiter]}}}
    rules['added_tokens'] = [
        {'id': i, 'content': text, 'single_word': False, 'lstrip': False, 'rstrip': False,
         'normalized': False, 'special': True} for text, i in special.items()]
    return {
        'tokenizer.json': {'version': '1.0', 'truncation': None, 'padding': None, 'normalizer': None,
                           'pre_tokenizer': None, **rules, 'model': model},
        'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': delimiter, 'eos_token': delimiter,
            'pad_token': delimiter, 'clean_up_tokenization_spaces': False, 'model_max_length': block_size,
            'model_input_names': ['input_ids', 'attention_mask'],
            'split_special_tokens': True,  # no text spells one
            **({} if tokenizer.encoding == 'gpt2' else {'unk_token': '<unk>'})},
        **more}


def merges_of(pieces):
    """The pairs of pieces that make a piece, in the order in which sentencepiece would merge them."""
    ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind == NORMAL}
    made = sorted((text for text in ids if len(text) > 1), key=lambda text: -pieces[ids[text]][1])
    return [[text[:at], text[at:]] for text in made for at in range(1, len(text))
            if text[:at] in ids and text[at:] in ids]


def gpt2_tokens(tokenizer):
    """GPT-2's tokens, in order of their ids, spelt as its vocab.json spells them."""
    letters = {byte: letter for letter, byte in GPT2_BYTES.items()}
    lines = tokenizer.files[tokenizer.file_name].splitlines()
    return [''.join(letters[byte] for byte in base64.b64decode(line.split()[0])) for line in lines]


def gpt2_merges(tokens):
    """The pair that each token after the bytes was merged from: what its letters become by earlier merges."""
    ranks, merges = {token: rank for rank, token in enumerate(tokens)}, []
    for rank, token in enumerate(tokens[len(GPT2_BYTES):], len(GPT2_BYTES)):
        parts = list(token)
        while len(parts) > 2:
            _, at = min((ranks.get(a + b, rank), at) for at, (a, b) in enumerate(pairwise(parts)))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        merges.append(parts)
    return merges


def model_card(checkpoint, config, tokenizer, llama):
    """README.md of the folder: what the model is, and how it was trained."""
    s, loss = checkpoint['settings'], checkpoint.get('best_val_loss')
    n_params = sum(w.numel() for name, w in checkpoint['model'].items()
                   if not (config.tie_embeddings and name == 'lm_head.weight'))
    figures = {
        'parameters': f'{n_params:,}',
        'layers': config.n_layer, 'width': config.n_embd, 'heads': config.n_head,
        'key-value heads': config.n_kv_head,
        'context': f'{config.block_size} tokens',
        'tokenizer': f'{tokenizer.encoding}, {tokenizer.vocab_size:,} tokens',
        'steps': f"{checkpoint['iter']:,}",
    }
    if s:
        sequences = s['batch_size'] * s['gradient_accumulation_steps']
        figures |= {'tokens a step': f'{sequences * config.block_size:,}',
                    'tokens seen': f"{checkpoint['iter'] * sequences * config.block_size:,}",
                    'optimizer': s['optimizer'], 'data': Path(s['dataset']).name}
    if loss is not None:
        figures['lowest validation loss'] = f'{loss:.4f} nats per token'
    rows = '\n'.join(f'| {name} | {value} |' for name, value in figures.items())
    kind = 'LlamaForCausalLM' if llama else 'GPT2LMHeadModel'
    return f'''---
library_name: transformers
pipeline_tag: text-generation
---

# A small model that writes stories

A {kind}, with the tokenizer it was trained with. The token {tokenizer.delimiter} comes before each story and
ends it.

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained('.')
model = AutoModelForCausalLM.from_pretrained('.')
story = model.generate(**tokenizer('Once upon a time', return_tensors='pt'))
print(tokenizer.decode(story[0], skip_special_tokens=True))
```
'''


def load(folder):
    """(GPTConfig, weights, tokenizer or None) of a folder of the Llama or GPT-2 family.

    The weights are those of our GPT, in float32. The infilling rows are added where the tokenizer has none;
    the tokenizer is None where the folder has none. Raises UserError.
    """
    folder = Path(folder)
    theirs = read_json(folder / 'config.json')
    try:
        if theirs.get('model_type') not in ('llama', 'gpt2'):
            raise UserError(f"{folder} is a {theirs.get('model_type')!r} model, not a Llama or GPT-2")
        llama = theirs['model_type'] == 'llama'
        config = (from_llama_config if llama else from_gpt2_config)(theirs, folder)
        tensors = read_tensors(folder)
        names = {new: old for old, new in (LLAMA_NAMES if llama else GPT2_NAMES).items()}
        if not llama:  # published without the head, the names have no prefix
            tensors = {name if name.startswith(('transformer.', 'lm_head.')) else f'transformer.{name}': w
                       for name, w in tensors.items()}
        weights = {name: w.float() for name, w in renamed(tensors, names, config.n_layer).items()}
        if not llama:
            weights = from_gpt2_tensors(config, weights)
        if config.tie_embeddings:
            weights['lm_head.weight'] = weights['embedding.weight']
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f'{folder} is no whole model of its family: {error!r}') from None
    tokenizer, infilling = read_tokenizer(folder)
    if tokenizer and not infilling:
        add_infilling_rows(weights, tokenizer.vocab_size - 2)
        config.vocab_size = tokenizer.vocab_size
    return config, weights, tokenizer


def read_json(path):
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise UserError(f'{path} is damaged: {error}') from None
    if not isinstance(value, dict):
        raise UserError(f'{path} holds no JSON object')
    return value


def refuse(folder, values):
    """UserError where one of `values`, {name: (value, what we have)}, is not what we have."""
    for name, (value, ours) in values.items():
        if value != ours:
            raise UserError(f'{folder} has {name} {value!r}; a model of ours has {ours!r}')


def from_llama_config(c, folder):
    rope = c.get('rope_parameters') or {'rope_type': 'default', **(c.get('rope_scaling') or {})}
    heads = c['num_attention_heads']
    refuse(folder, {'hidden_act': (c.get('hidden_act', 'silu'), 'silu'),
                    'rope_type': (rope.get('rope_type', rope.get('type')), 'default'),
                    'head_dim': (c.get('head_dim') or c['hidden_size'] // heads, c['hidden_size'] // heads),
                    'mlp_bias': (c.get('mlp_bias', False), c.get('attention_bias', False))})
    return GPTConfig(
        block_size=c['max_position_embeddings'], vocab_size=c['vocab_size'], n_layer=c['num_hidden_layers'],
        n_head=heads, n_kv_head=c.get('num_key_value_heads') or heads, n_embd=c['hidden_size'],
        mlp_width=c['intermediate_size'], bias=c.get('attention_bias', False),
        tie_embeddings=c.get('tie_word_embeddings', False), norm_eps=c.get('rms_norm_eps', 1e-6),
        rope_theta=float(rope.get('rope_theta', c.get('rope_theta', 10000.0))))


def from_gpt2_config(c, folder):
    activation = c.get('activation_function', 'gelu_new')
    refuse(folder, {'activation_function': (ACTIVATIONS.get(activation, activation), 'gelu'),
                    **{name: (c.get(name, ours), ours) for name, ours in (
                        ('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False))}})
    return GPTConfig(
        block_size=c.get('n_positions', 1024), vocab_size=c.get('vocab_size', 50257), n_layer=c['n_layer'],
        n_head=c['n_head'], n_embd=c['n_embd'], mlp_width=c.get('n_inner') or 0,
        tie_embeddings=c.get('tie_word_embeddings', True), norm_eps=c.get('layer_norm_epsilon', 1e-5), **GPT2)


def from_gpt2_tensors(config, weights):
    """The way back from `gpt2_tensors`; the causal mask that old files hold beside them is dropped."""
    out = {name: w.T.contiguous() if w.dim() == 2 and name.startswith('blocks.') else w
           for name, w in weights.items() if '.attn.qkv.' not in name}
    for i in range(config.n_layer):
        for kind in 'weight', 'bias':
            for name, part in zip('qkv', weights[f'blocks.{i}.attn.qkv.{kind}'].t().chunk(3), strict=True):
                out[f'blocks.{i}.attn.{name}.{kind}'] = part.contiguous()
    return out


def read_tensors(folder):
    """All tensors of a folder by their names there. No path that a file names leaves the folder."""
    for name in 'model.safetensors', 'pytorch_model.bin':
        index = folder / f'{name}.index.json'
        if (folder / name).is_file():
            files = [name]
        elif index.is_file():
            files = sorted(set(read_json(index)['weight_map'].values()))
        else:
            continue
        if any(Path(file).name != file for file in files):
            raise UserError(f'{index} names a file outside of {folder}')
        return {key: w for file in files for key, w in read_file(folder / file).items()}
    raise UserError(f'{folder} has no model.safetensors and no pytorch_model.bin')


def read_file(path):
    if path.suffix != '.safetensors':
        try:
            return torch.load(path, map_location='cpu', weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # weights_only refuses anything but tensors and plain values, in many ways
            reason = str(error).strip().splitlines()[0]
            raise UserError(f'{path} is damaged or more than weights, and was not run: {reason}') from None
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f'reading {path} needs a package: {SAFETENSORS}') from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f'{path} is damaged: {error}') from None


def read_tokenizer(folder):
    """(tokenizer or None, whether the infilling tokens are its own)."""
    path = folder / 'tokenizer.json'
    rules = read_json(path) if path.is_file() else {}
    if (folder / 'tokenizer.model').is_file():
        state = {'encoding': 'bpe', 'files': {'tokenizer.model': (folder / 'tokenizer.model').read_bytes()}}
        tokenizer = tokenizer_from_state(state, folder)
    elif (folder / 'vocab.json').is_file() and (folder / 'merges.txt').is_file():
        tokenizer = GPT2Tokenizer.from_files(folder / 'vocab.json', folder / 'merges.txt')
    elif rules:
        tokenizer = from_tokenizer_json(rules, path)
    else:
        return None, False
    try:
        added = {token['content']: token['id'] for token in rules.get('added_tokens', [])}
    except (KeyError, TypeError):
        raise UserError(f'{path} is damaged: its added_tokens have no content and id') from None
    return tokenizer, (added.get('<blank>'), added.get('<middle>')) == (tokenizer.blank, tokenizer.middle)


def from_tokenizer_json(rules, path):
    """The char or bpe tokenizer of a tokenizer.json of sentencepiece's kind: BPE with byte fallback."""
    try:
        model = rules['model']
        vocab = sorted(model['vocab'], key=model['vocab'].get)
        if model['type'] != 'BPE' or not model['byte_fallback']:
            raise ValueError('it is not BPE with byte fallback')
        if [model['vocab'][text] for text in vocab] != list(range(len(vocab))):
            raise ValueError('its ids have gaps')
        if vocab[3:len(FIRST)] != [text for text, _, _ in FIRST[3:]]:
            raise ValueError('its ids 3 to 258 are not the bytes')
        ranks = {}
        for pair in model['merges']:
            a, b = pair.split(' ') if isinstance(pair, str) else pair
            ranks.setdefault(a + b, len(ranks))
        scores = [-float(ranks.get(text, len(ranks))) for text in vocab]
        return tokenizer_of([(text.replace(SPACE_MARK, ' '), score, NORMAL)
                             for text, score in zip(vocab, scores, strict=True)])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no tokenizer of ours, GPT-2's or sentencepiece's kind ({error}): put "
                        'tokenizer.model, or vocab.json and merges.txt, beside it') from None
