"""GGUF, llama.cpp's one file: the Llama block or GPT-2's in 32, 16 or 8 bits, the tokenizer inside."""

import json
import urllib.request

import numpy as np
import torch

from data.tokenizer import MAX_VOCAB_SIZE, SPACE_MARK
from formats import base
from formats.pieces import gpt2_merges, pieces_of
from model import GPTConfig


class GGUF(base.Format):
    """dtype: f32, f16 or q8_0, of the matrices; the rest is float32."""

    reader, begins = 'llama.cpp (xllamacpp)', b'GGUF'

    def __init__(self, dtype='f32'):
        # f32 is not exact either: llama.cpp looks GELU up in a table of float16
        self.dtype, self.bound = dtype, 0.05 if dtype == 'q8_0' else 1e-4

    def mismatches(self, config, tokenizer):
        found = base.unlike(config)
        if self.dtype == 'q8_0' and (config.n_embd % 32 or config.mlp_width % 32):  # which share a scale
            found.append((f'32 does not divide n_embd {config.n_embd} and mlp_width {config.mlp_width}',
                          'type --dtype f16'))
        return found

    def write(self, path, checkpoint, tokenizer):
        import gguf
        config, weights = GPTConfig(**checkpoint['config']), base.own_weights(checkpoint)
        kind = gguf.GGMLQuantizationType[self.dtype.upper()]
        about = describe(tokenizer) | {
            'name': 'stories', 'context_length': config.block_size, 'embedding_length': config.n_embd,
            'feed_forward_length': config.mlp_width, 'block_count': config.n_layer,
            'head_count': config.n_head, 'head_count_kv': config.n_kv_head,
            'file_type': gguf.LlamaFileType[f"{'ALL' if self.dtype == 'f32' else 'MOSTLY'}_{kind.name}"]}
        if config.norm == 'rms':
            family, weights = gguf.MODEL_ARCH.LLAMA, base.interleave(config, weights)
            about |= {'layer_norm_rms_eps': config.norm_eps, 'rope_dimension_count': config.head_dim,
                      'rope_freq_base': config.rope_theta}
        else:
            family, about['layer_norm_eps'] = gguf.MODEL_ARCH.GPT2, config.norm_eps
        file = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family])
        for name, value in about.items():
            getattr(file, f'add_{name}')(value)
        names = gguf.get_tensor_name_map(family, config.n_layer)  # of Hugging Face's
        for name, w in base.by_hugging_face(config, weights).items():
            name, w = names.get_name(name, ('.weight', '.bias')), w.numpy()
            if w.ndim == 2 and not name.startswith('position'):
                file.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
            else:
                file.add_tensor(name, w)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()

    def read(self, path, exact=True):
        """exact: llama.cpp computes in float32 and without approximations."""
        import xllamacpp
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_gpu_layers = params.n_ctx = 0  # the context is the model's
        params.n_parallel, params.verbosity, params.warmup, params.ui = 1, -1, False, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        flash = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if exact:
            params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)
        ids = self.encode('a')
        self.plain, self.prefix = ids[-1], ''
        self.prefix = self.decode(ids)[:-1]  # the space that our tokenizers put before a text

    def logits(self, ids, positions):
        """Log-probabilities, which are logits but for a constant."""
        rows = []
        for position in positions:
            # It forgets the probabilities of a token that is half a character or an end, so it is made to
            # take another one; they are those before any such bias.
            answer = self.ask('/completion', prompt=ids[:position + 1], n_predict=1, temperature=0,
                              n_probs=MAX_VOCAB_SIZE, logit_bias=[[self.plain, 1e6]])
            top = answer['completion_probabilities'][0]['top_logprobs']
            rows.append([token['logprob'] for token in sorted(top, key=lambda token: token['id'])])
        return torch.from_numpy(np.array(rows, float))  # null, which stands for no number, becomes nan

    def encode(self, text):
        return self.ask('/tokenize', content=text, add_special=True, parse_special=False)['tokens']

    def decode(self, ids):
        return self.ask('/detokenize', tokens=ids[1:])['content'].removeprefix(self.prefix)

    def ask(self, endpoint, **body):
        request = urllib.request.Request(self.server.listening_address + endpoint, json.dumps(body).encode(),
                                         {'Content-Type': 'application/json'})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def describe(tokenizer):
    """What the file says of a tokenizer: {the end of the name of a GGUFWriter's method: value}."""
    pieces = pieces_of(tokenizer)
    texts, scores, kinds = zip(*pieces, strict=True)
    # A story begins with the delimiter, and ends where the next would begin
    about = {'bos_token_id': tokenizer.delimiter, 'eos_token_id': tokenizer.delimiter,
             'add_bos_token': True, 'add_eos_token': False, 'token_types': kinds}
    if tokenizer.encoding == 'gpt2':
        return about | {'tokenizer_model': 'gpt2', 'tokenizer_pre': 'gpt-2', 'token_list': texts,
                        'token_merges': list(map(' '.join, gpt2_merges(pieces)))}
    return about | {
        'tokenizer_model': 'llama', 'tokenizer_pre': 'default', 'unk_token_id': 0, 'add_space_prefix': True,
        'remove_extra_whitespaces': False, 'token_scores': scores,
        'token_list': [text.replace(' ', SPACE_MARK) for text in texts]}
