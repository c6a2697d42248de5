"""The interface of a format, and what several formats share."""

import gc
import json
from dataclasses import asdict

import torch

from configurator import UserError, user_errors
from core.checkpoint import check_size, load_model, parameter_shapes
from data.files import refuse_stand_in
from data.tokenizer import tokenizer_from_state

DTYPES = {'f32': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}
MAX_KL = {'f32': 1e-6, 'f16': 1e-4, 'bf16': 5e-3}


class Format:
    """A way to write a model and its tokenizer for another program, and to read them back with that program.

    A subclass has
        write(path, checkpoint, tokenizer)   write a new file, or into an empty folder
        read(path)                           let the other program load what was written
    Both raise ModuleNotFoundError if they need a package that is not installed. After `read`, until `close`,
    it has
        logits(ids, positions)   logits of the token after ids[:position + 1], up to a constant that may
                                 differ between rows: a tensor (len(positions), vocab_size)
        encode(text)             token ids, which begin with the delimiter
        decode(ids)              the text of such ids
    """

    reader = 'our own importer'  # the program that reads it back, as messages name it
    files = ()  # names of the files that are written into a folder; empty if the format is a single file
    dtypes = ('f32',)  # of the weights in the file, those to choose from
    max_kl = 1e-6  # largest acceptable KL divergence, in nats: see `compare_predictions` in export.py

    def incompatibilities(self, config, tokenizer):
        """Return why the format cannot hold such a model: a list of (reason, way out), empty if it can."""
        return []

    def close(self):
        """Let go of what was read: on Windows, a file that is open or mapped cannot be moved."""
        self.model = None
        gc.collect()  # a model may refer to itself

    def recognizes(self, path):
        """Return whether a file was written by `write`. (Of a folder, its export.json says that.)"""
        raise NotImplementedError


class Importer(Format):
    """A format that we read ourselves, so that training and sampling can start from it.

    A subclass also has
        load_weights(path)     return (GPTConfig, weights): a new dict of tensors under the names of model.py
        load_tokenizer(path)   return the Tokenizer stored next to the weights, or None
        has_infilling_rows(path, tokenizer)   return whether the file of the tokenizer has <blank> and
                                              <middle>, so that the weights have rows for them
    They raise UserError if a file is damaged.
    """

    def load(self, path):
        """Return the model at `path` as a checkpoint, with embedding rows for <blank> and <middle>.

        'settings' is empty, 'iter' is 0 and 'tokenizer' may be None. Raises UserError if a file is damaged or
        the model is not one that model.py can build.
        """
        config, weights = self.load_weights(path)
        claims_tied = config.tie_embeddings
        if 'lm_head.weight' in weights:  # some files hold a tied head, too
            config.tie_embeddings = False
        with user_errors(path):
            check_weights(config, weights)
        weights = {name: w.float() for name, w in weights.items()}
        if claims_tied and not config.tie_embeddings:
            # if the two differ, the file counts, not its config: transformers does the same
            config.tie_embeddings = torch.equal(weights['lm_head.weight'], weights['embedding.weight'])
        tokenizer = self.load_tokenizer(path)
        if tokenizer is not None and not self.has_all_rows(path, config, tokenizer):
            add_infilling_rows(weights, tokenizer.vocab_size - 2)
            config.vocab_size = tokenizer.vocab_size
        if config.tie_embeddings:
            weights['lm_head.weight'] = weights['embedding.weight']
        return {
            'model': weights,
            'config': asdict(config),
            'tokenizer': None if tokenizer is None else tokenizer.state(),
            'settings': {},
            'iter': 0,
        }

    def has_all_rows(self, path, config, tokenizer):
        """Return whether the embedding has exactly the rows of our tokenizer.

        The number does not tell: a model with two tokens for chats has as many rows.
        """
        return config.vocab_size == tokenizer.vocab_size and self.has_infilling_rows(path, tokenizer)

    def read(self, path):
        checkpoint = self.load(path)
        self.model = load_model(checkpoint)
        self.tokenizer = tokenizer_from_state(checkpoint['tokenizer'])

    def logits(self, ids, positions):
        return self.model(torch.tensor([ids]))[0, positions]

    def encode(self, text):
        return [self.tokenizer.delimiter, *self.tokenizer.encode(text)]

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def check_weights(config, weights):
    """Raise ValueError unless `weights` are exactly those of GPT(config), a tied head left out."""
    check_size(config, weights)
    unknown = weights.keys() - parameter_shapes(config).keys()
    if unknown:
        raise ValueError(f'the config has no place for {min(unknown)}')


def read_json_object(path):
    """Return the JSON object in a file, a dict. Raises UserError if it is missing or damaged."""
    if path.is_file():
        refuse_stand_in(path)
    with user_errors(path):
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError('it does not hold a JSON object')
    return content


def own_weights(checkpoint, dtype='f32'):
    """Return the weights of a checkpoint, without the head if it is tied. dtype: one of DTYPES."""
    is_tied = checkpoint['config']['tie_embeddings']
    weights = {}
    for name, w in checkpoint['model'].items():
        if is_tied and name == 'lm_head.weight':
            continue
        weights[name] = w.to(DTYPES[dtype]).contiguous()
    return weights


def write_safetensors(path, tensors, metadata=None):
    """Write a .safetensors file. The library's `save_file` would leave it readable by its owner alone."""
    from safetensors.torch import save

    path.write_bytes(save(tensors, metadata))


def block_incompatibilities(config, block):
    """Return [(reason, way out)] if `config` differs from the values in `block`, else an empty list.

    Example: [('mlp relu2', 'train config/tiny_stories.py with --mlp swiglu')]
    """
    different = [name for name, value in block.items() if getattr(config, name) != value]
    if not different:
        return []
    reason = ', '.join(f'{name} {getattr(config, name)}' for name in different)
    flags = ' '.join(f'--{name} {block[name]}' for name in different)
    recipe = 'tiny_stories.py' if block['norm'] == 'rms' else 'gpt2_89m.py'
    return [(reason, f'train config/{recipe} with {flags}')]


def to_interleaved(config, weights):
    """Return `weights` for programs that rotate rows 2i and 2i + 1 of a head: llama2.c and GGUF's Llama.

    model.py rotates rows i and i + head_dim / 2. So row i of a head of q or k becomes row 2i, and row
    i + head_dim / 2 becomes row 2i + 1.
    """
    return swap_rotation_axes(config, weights, first_axis=2)


def from_interleaved(config, weights):
    """Undo `to_interleaved`."""
    return swap_rotation_axes(config, weights, first_axis=config.head_dim // 2)


def swap_rotation_axes(config, weights, first_axis):
    """Return `weights` with the rows of each head of q and k, (first_axis, other axis), transposed."""
    swapped = dict(weights)
    for name, w in weights.items():
        module = name.split('.')[-2]
        if module not in ('q', 'k'):
            continue
        n_heads = config.n_head if module == 'q' else config.n_kv_head
        rows = w.reshape(n_heads, first_axis, config.head_dim // first_axis, -1)
        swapped[name] = rows.transpose(1, 2).reshape(w.shape)
    return swapped


def add_infilling_rows(weights, n_tokens):
    """Cut the embedding and the head to the rows of `n_tokens` tokens and add rows for <blank> and <middle>.

    Both new rows are the mean of the others: as input, an average word; as output, by Jensen's inequality,
    a probability of at most 1 / n_tokens. Raises UserError if there are fewer rows than tokens.
    """
    for name in 'embedding.weight', 'lm_head.weight':
        if name not in weights:  # a tied head
            continue
        rows = weights[name][:n_tokens]
        if len(rows) < n_tokens:
            raise UserError(f'{name} has {len(rows)} rows for {n_tokens} tokens: '
                            'put the tokenizer of this model next to it')
        mean = rows.mean(0, keepdim=True)
        weights[name] = torch.cat((rows, mean, mean))
