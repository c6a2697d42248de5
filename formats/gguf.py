"""GGUF, the single file of llama.cpp: Llama's block or GPT-2's in 32, 16 or 8 bits, with the tokenizer."""

import numpy as np
import torch

from data.tokenizer import MAX_VOCAB_SIZE, SPACE_MARK
from formats import base
from formats.families import family_of, required_block
from formats.llamacpp import Server
from formats.pieces import gpt2_merges, pieces_of
from model import GPTConfig

DESCRIPTION = 'a model of stories, written by export.py'  # tells our files from others
Q8_0_GROUP = 32  # neighbours that share a scale


class GGUF(base.Format):
    reader = 'llama.cpp (xllamacpp)'
    dtypes = 'f32', 'f16', 'q8_0'

    def __init__(self, dtype='f32'):
        """dtype: f32, f16 or q8_0, for the matrices; everything else is float32."""
        self.dtype = dtype

    @property
    def max_kl(self):
        # f32 is not exact either: llama.cpp looks GELU up in a table of float16
        return 0.05 if self.dtype == 'q8_0' else 1e-4

    def recognizes(self, path):
        with open(path, 'rb') as file:
            start = file.read(1024)
        return start.startswith(b'GGUF') and DESCRIPTION.encode() in start

    def incompatibilities(self, config, tokenizer):
        found = base.block_incompatibilities(config, required_block(config))
        if self.dtype == 'q8_0' and (config.n_embd % Q8_0_GROUP or config.mlp_width % Q8_0_GROUP):
            found.append((
                f'{Q8_0_GROUP} does not divide n_embd {config.n_embd} and mlp_width {config.mlp_width}',
                'type --dtype f16'))
        return found

    def write(self, path, checkpoint, tokenizer):
        import gguf

        config = GPTConfig(**checkpoint['config'])
        weights = base.own_weights(checkpoint)
        if config.norm == 'rms':
            architecture = gguf.MODEL_ARCH.LLAMA
            weights = base.to_interleaved(config, weights)
        else:
            architecture = gguf.MODEL_ARCH.GPT2
        dtype = gguf.GGMLQuantizationType[self.dtype.upper()]

        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
        file_type = gguf.LlamaFileType['ALL_F32' if self.dtype == 'f32' else f'MOSTLY_{dtype.name}']
        metadata = {'description': DESCRIPTION}  # first, where `recognizes` looks for it
        metadata |= describe_tokenizer(tokenizer) | describe_model(config, file_type)
        for name, value in metadata.items():
            add = getattr(writer, f'add_{name}')  # as in writer.add_context_length(256)
            add(value)
        gguf_names = gguf.get_tensor_name_map(architecture, config.n_layer)  # from Hugging Face's names
        for their_name, w in family_of(config).rename_to_theirs(weights).items():
            name = gguf_names.get_name(their_name, ('.weight', '.bias'))
            w = w.numpy()
            if w.ndim == 2 and not name.startswith('position'):
                writer.add_tensor(name, gguf.quants.quantize(w, dtype), raw_dtype=dtype)
            else:
                writer.add_tensor(name, w)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read(self, path, exact=True):
        """Start llama.cpp's server. exact: it computes in float32 and without approximations."""
        self.server = Server(path, torch.get_num_threads(), exact)
        ids = self.encode('a')
        self.letter = ids[-1]  # the token of an ordinary letter
        self.prefix = ''
        self.prefix = self.decode(ids)[:-1]  # the space that our tokenizers put before a text

    def logits(self, ids, positions):
        """Return log-probabilities, which are logits up to a constant."""
        rows = []
        for position in positions:
            # The server drops the probabilities if the token it draws ends the text or is half a character.
            # So a bias makes it draw a letter; it reports the probabilities before any such bias.
            answer = self.ask('/completion', prompt=ids[:position + 1], n_predict=1, temperature=0,
                              n_probs=MAX_VOCAB_SIZE, logit_bias=[[self.letter, 1e6]])
            tokens = answer['completion_probabilities'][0]['top_logprobs']
            tokens.sort(key=lambda token: token['id'])
            rows.append([token['logprob'] for token in tokens])
        return torch.from_numpy(np.array(rows, float))  # null, for a number that is not finite, becomes nan

    def encode(self, text):
        return self.ask('/tokenize', content=text, add_special=True, parse_special=False)['tokens']

    def decode(self, ids):
        return self.ask('/detokenize', tokens=ids[1:])['content'].removeprefix(self.prefix)

    def ask(self, endpoint, **question):
        """Post a question to llama.cpp's server and return its answer, both JSON objects."""
        return self.server.ask(endpoint, question)

    def close(self):
        self.server.stop()


def describe_model(config, file_type):
    """Return the metadata of a model: {name of a method of GGUFWriter without its add_: value}."""
    metadata = {
        'name': 'stories', 'context_length': config.block_size, 'embedding_length': config.n_embd,
        'feed_forward_length': config.mlp_width, 'block_count': config.n_layer,
        'head_count': config.n_head, 'head_count_kv': config.n_kv_head, 'file_type': file_type}
    if config.norm == 'rms':
        metadata['layer_norm_rms_eps'] = config.norm_eps
        metadata['rope_dimension_count'] = config.head_dim
        metadata['rope_freq_base'] = config.rope_theta
    else:
        metadata['layer_norm_eps'] = config.norm_eps
    return metadata


def describe_tokenizer(tokenizer):
    """Return the metadata of a tokenizer, in the form of `describe_model`."""
    pieces = pieces_of(tokenizer)
    metadata = {
        # a story begins with the delimiter and ends where the next one would begin
        'bos_token_id': tokenizer.delimiter, 'eos_token_id': tokenizer.delimiter,
        'add_bos_token': True, 'add_eos_token': False,
        'token_types': [kind for _, _, kind in pieces]}
    if tokenizer.encoding == 'gpt2':
        return metadata | {
            'tokenizer_model': 'gpt2', 'tokenizer_pre': 'gpt-2',
            'token_list': [text for text, _, _ in pieces],
            'token_merges': [f'{left} {right}' for left, right in gpt2_merges(pieces)]}
    return metadata | {
        'tokenizer_model': 'llama', 'tokenizer_pre': 'default', 'unk_token_id': 0,
        'add_space_prefix': True, 'remove_extra_whitespaces': False,
        'token_scores': [score for _, score, _ in pieces],
        'token_list': [text.replace(' ', SPACE_MARK) for text, _, _ in pieces]}
