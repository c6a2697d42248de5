"""What a foreign format is, and what several of them share."""

import re
from dataclasses import asdict

import torch

from configurator import UserError, user_errors
from core.checkpoint import check_size, load_model
from data.tokenizer import tokenizer_from_state
from model import GPT

# The families of blocks that foreign programs know, and Hugging Face's names for what ours are made of
LLAMA = {'norm': 'rms', 'position': 'rope', 'mlp': 'swiglu', 'qk_norm': False}
GPT2 = {'norm': 'layer', 'position': 'learned', 'mlp': 'gelu', 'qk_norm': False, 'bias': True}
LLAMA_NAMES = {
    'embedding': 'model.embed_tokens', 'norm': 'model.norm', 'lm_head': 'lm_head', 'blocks': 'model.layers',
    'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm', 'attn.q': 'self_attn.q_proj',
    'attn.k': 'self_attn.k_proj', 'attn.v': 'self_attn.v_proj', 'attn.proj': 'self_attn.o_proj',
    'mlp.gate': 'mlp.gate_proj', 'mlp.up': 'mlp.up_proj', 'mlp.proj': 'mlp.down_proj'}
GPT2_NAMES = {
    'embedding': 'transformer.wte', 'position': 'transformer.wpe', 'norm': 'transformer.ln_f',
    'lm_head': 'lm_head', 'blocks': 'transformer.h', 'attn_norm': 'ln_1', 'mlp_norm': 'ln_2',
    'attn.qkv': 'attn.c_attn', 'attn.proj': 'attn.c_proj', 'mlp.up': 'mlp.c_fc', 'mlp.proj': 'mlp.c_proj'}


class Format:
    """How a model and its tokenizer go to another program.

    A subclass has write(path, checkpoint, tokenizer), for a new file or into an empty folder, and read(path),
    by which the program reads what was written; both raise ModuleNotFoundError for want of a package. After
    `read`, it has logits(ids, positions) of the token after ids[:position + 1], but for a constant,
    (len(positions), vocab_size), and encode(text) and decode(ids), the delimiter the first of the ids.
    """

    reader = 'our importer'  # the program, in words
    files = ()  # what is written into a folder; none: it is a file itself
    begins = b''  # the first bytes of such a file
    bound = 1e-6  # nats that rounding may change the prediction of a token by; export.py says more

    def mismatches(self, config, tokenizer):
        """Why it cannot hold such a model: a list of (reason, way out)."""
        return []

    def is_one(self, path):
        """Whether that file is of this format, by its first bytes."""
        with open(path, 'rb') as file:
            return file.read(len(self.begins)) == self.begins


class Importer(Format):
    """A format that we read ourselves. A subclass has load_weights(path), which gives (GPTConfig, weights by
    our names in float32, without a tied head), and load_tokenizer(path), which gives a tokenizer or None."""

    def load(self, path):
        """A checkpoint of ours, its model with rows for <blank> and <middle>. Raises UserError where `path`
        is damaged, or holds what a model of ours cannot be."""
        with user_errors(path):
            config, weights = self.load_weights(path)
            if config.tie_embeddings:
                weights['lm_head.weight'] = weights['embedding.weight']
            tokenizer = self.load_tokenizer(path)
            if tokenizer and config.vocab_size != tokenizer.vocab_size:
                add_infilling_rows(weights, tokenizer.vocab_size - 2)
                config.vocab_size = tokenizer.vocab_size
            check_size(config, weights)
            with torch.device('meta'):
                GPT(config).load_state_dict(weights, assign=True)
        return {'model': weights, 'config': asdict(config), 'tokenizer': tokenizer and tokenizer.state(),
                'settings': {}, 'iter': 0}

    def read(self, path):
        checkpoint = self.load(path)
        self.model, self.tokenizer = load_model(checkpoint), tokenizer_from_state(checkpoint['tokenizer'])

    def logits(self, ids, positions):
        return self.model(torch.tensor([ids]))[0, positions]

    def encode(self, text):
        return [self.tokenizer.delimiter, *self.tokenizer.encode(text)]

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def unlike(config, wanted=None):
    """Where `config` is not as `wanted`, or else as the family of its norm: [(reason, way out)], or []."""
    if not wanted:  # GPT-2 has no grouped queries
        wanted = LLAMA if config.norm == 'rms' else GPT2 | {'n_kv_head': config.n_head}
    names = [name for name in wanted if getattr(config, name) != wanted[name]]
    reason = ', '.join(f'{name} {getattr(config, name)}' for name in names)
    recipe = 'tiny_stories.py' if wanted['norm'] == 'rms' else 'gpt2_89m.py'
    way_out = f'train config/{recipe} with ' + ' '.join(f'--{name} {wanted[name]}' for name in names)
    return [(reason, way_out)] if names else []


def own_weights(checkpoint):
    """The weights of a checkpoint in float32, none twice: without the head where it is the embedding."""
    tied = checkpoint['config']['tie_embeddings']
    return {name: w.float().contiguous() for name, w in checkpoint['model'].items()
            if not (tied and name == 'lm_head.weight')}


def named(weights, names):
    """Those of `weights` whose names consist of what `names` maps, by their new names."""
    out = {}
    for name, w in weights.items():
        if not (parts := re.fullmatch(r'(?:(.*?)\.(\d+)\.)?(.*)\.(.*)', name)):
            raise ValueError(f'it has a weight {name!r}, as no model of ours')
        blocks, layer, stem, kind = parts.groups()
        if stem in names and (layer is None or blocks in names):
            out[(f'{names[blocks]}.{layer}.' if layer else '') + f'{names[stem]}.{kind}'] = w
    return out


def by_hugging_face(config, weights):
    """Our weights by Hugging Face's names, GPT-2's queries, keys and values as one tensor."""
    if config.norm == 'rms':
        return named(weights, LLAMA_NAMES)
    qkv = {name.replace('.q.', '.qkv.'): torch.cat([weights[name.replace('.q.', f'.{x}.')] for x in 'qkv'])
           for name in weights if '.q.' in name}
    return named(weights | qkv, GPT2_NAMES)


def interleave(config, weights, back=False):
    """`weights`, the rows of q and k as for programs that rotate rows 2 i and 2 i + 1 of a head (llama2.c,
    GGUF's Llama), or `back` as for ours, which rotates i and i + head_dim / 2."""
    out = dict(weights)
    for name, w in weights.items():
        if heads := {'q': config.n_head, 'k': config.n_kv_head}.get(name.split('.')[-2]):
            pairs = (len(w) // heads // 2, 2) if back else (2, len(w) // heads // 2)
            out[name] = w.reshape(heads, *pairs, -1).transpose(1, 2).reshape(w.shape)
    return out


def add_infilling_rows(weights, n_tokens):
    """Cut the embedding and the head to the `n_tokens` rows that tokens have, and add <blank> and <middle>:
    the mean of the others, read as an average word and, by Jensen's inequality, written with a probability
    of at most 1 / n_tokens each."""
    for name in 'embedding.weight', 'lm_head.weight':
        own = weights[name][:n_tokens]
        if len(own) < n_tokens:
            raise UserError(f'{name} has {len(own)} rows for {n_tokens} tokens: put its tokenizer beside it')
        weights[name] = torch.cat((own, own.mean(0, keepdim=True).expand(2, -1)))
