"""GGUF, llama.cpp's one file: the Llama block or GPT-2's in 32, 16 or 8 bits, the tokenizer inside."""

import json
import urllib.request

import numpy as np
import torch

from configurator import UserError
from data.tokenizer import MAX_VOCAB_SIZE, SPACE_MARK
from formats.families import LLAMA, family, interleave, round_groups, unlike_family
from formats.hf import gpt2_merges, gpt2_tensors, gpt2_tokens, renamed
from formats.pieces import CONTROL, NORMAL, pieces_of
from model import GPTConfig

BLOCK = 32  # neighbours with one scale in q8_0
NAMES = {'embedding': 'token_embd', 'position': 'position_embd', 'norm': 'output_norm',
         'lm_head': 'output'} | {
    f'blocks.{{}}.{ours}': f'blk.{{}}.{theirs}' for ours, theirs in {
        'attn_norm': 'attn_norm', 'mlp_norm': 'ffn_norm', 'attn.q': 'attn_q', 'attn.k': 'attn_k',
        'attn.v': 'attn_v', 'attn.qkv': 'attn_qkv', 'attn.proj': 'attn_output', 'mlp.gate': 'ffn_gate',
        'mlp.up': 'ffn_up', 'mlp.proj': 'ffn_down'}.items()}


class GGUF:
    """dtype: f32, f16 or q8_0, of the matrices; the rest is float32."""

    reader = 'llama.cpp (xllamacpp)'
    needs = ('gguf',)
    check_needs = ('xllamacpp',)
    files = ()
    log_probs = True

    def __init__(self, dtype='f32'):
        self.dtype = dtype
        if dtype == 'f32':
            self.round_weight = self.round_input = None

    def obstacles(self, config, tokenizer):
        found = unlike_family(config)
        if config.mlp == 'gelu' and self.dtype == 'f32':
            found.append(("llama.cpp looks GELU up in a float16 table, 1e-3 off", 'type --dtype f16'))
        if self.dtype == 'q8_0' and (config.n_embd % BLOCK or config.mlp_width % BLOCK):
            found.append((f'{BLOCK} does not divide n_embd {config.n_embd} and mlp_width {config.mlp_width}',
                          'type --dtype f16'))
        return found

    def round_weight(self, w):
        return w.half().float() if self.dtype == 'f16' else round_groups(w, BLOCK, half_scale=True)

    round_input = round_weight  # llama.cpp multiplies in the matrix's kind
    half_gelu = True  # it looks GELU up in a table of float16

    def write(self, path, checkpoint, tokenizer):
        import gguf

        config = GPTConfig(**checkpoint['config'])
        llama = family(config) is LLAMA
        kind = {'f32': gguf.GGMLQuantizationType.F32, 'f16': gguf.GGMLQuantizationType.F16,
                'q8_0': gguf.GGMLQuantizationType.Q8_0}[self.dtype]
        file = gguf.GGUFWriter(path, 'llama' if llama else 'gpt2')
        file.add_name('stories')
        file.add_file_type({'f32': gguf.LlamaFileType.ALL_F32, 'f16': gguf.LlamaFileType.MOSTLY_F16,
                            'q8_0': gguf.LlamaFileType.MOSTLY_Q8_0}[self.dtype])
        file.add_context_length(config.block_size)
        file.add_embedding_length(config.n_embd)
        file.add_feed_forward_length(config.mlp_width)
        file.add_block_count(config.n_layer)
        file.add_head_count(config.n_head)
        file.add_vocab_size(config.vocab_size)
        if llama:
            file.add_head_count_kv(config.n_kv_head)
            file.add_layer_norm_rms_eps(config.norm_eps)
            file.add_rope_dimension_count(config.head_dim)
            file.add_rope_freq_base(config.rope_theta)
        else:
            file.add_layer_norm_eps(config.norm_eps)
        add_tokenizer(file, tokenizer)

        weights = {name: w.float().cpu() for name, w in checkpoint['model'].items()
                   if not (config.tie_embeddings and name == 'lm_head.weight')}
        if llama:
            for name in weights:
                heads = {'q': config.n_head, 'k': config.n_kv_head}.get(name.split('.')[-2])
                weights[name] = interleave(weights[name], heads) if heads else weights[name]
        else:  # q, k and v as one; its matrices are not transposed here
            weights = {name: w.T if w.dim() == 2 and name.startswith('blocks.') else w
                       for name, w in gpt2_tensors(config, weights).items()}
        for name, w in renamed(weights, NAMES, config.n_layer).items():
            w = np.ascontiguousarray(w.numpy())
            if w.ndim == 2 and not name.startswith('position'):
                file.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)
            else:
                file.add_tensor(name, w)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()

    def read(self, path):
        return Reader(path)


def add_tokenizer(file, tokenizer):
    if tokenizer.encoding == 'gpt2':
        tokens = gpt2_tokens(tokenizer)
        merges = gpt2_merges(tokens)
        file.add_tokenizer_model('gpt2')
        file.add_tokenizer_pre('gpt-2')
        file.add_token_list([*tokens, '<|endoftext|>', '<blank>', '<middle>'])
        file.add_token_types([NORMAL] * len(tokens) + [CONTROL] * 3)
        file.add_token_merges(list(map(' '.join, merges)))
    else:
        texts, scores, kinds = zip(*pieces_of(tokenizer), strict=True)
        file.add_tokenizer_model('llama')
        file.add_tokenizer_pre('default')
        file.add_token_list([text.replace(' ', SPACE_MARK) for text in texts])
        file.add_token_scores(scores)
        file.add_token_types(kinds)
        file.add_unk_token_id(0)
        file.add_add_space_prefix(True)
        file.add_remove_extra_whitespaces(False)
    file.add_bos_token_id(tokenizer.delimiter)
    file.add_eos_token_id(tokenizer.delimiter)  # a story ends where the next would begin
    file.add_add_bos_token(True)
    file.add_add_eos_token(False)


class Reader:
    """What llama.cpp makes of the file, in float32 and without approximations."""

    def __init__(self, path):
        import gguf
        import xllamacpp

        self.prefix = ' ' if 'tokenizer.ggml.add_space_prefix' in gguf.GGUFReader(path).fields else ''
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_gpu_layers = params.n_ctx = 0  # the context is the model's
        params.n_parallel, params.verbosity, params.warmup, params.ui = 1, -1, False, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self.server = xllamacpp.Server(params)
        except (RuntimeError, ValueError) as error:
            raise UserError(f'llama.cpp cannot load what was written: {error}') from None
        self.plain = self.encode('a')[-1]

    def logits(self, ids, positions):
        return np.stack([self.log_probs(ids[:position + 1]) for position in positions])

    def log_probs(self, prompt):
        # It forgets the probabilities of a token that is half a character or an end, so it is made to take
        # another one; they are those before any such bias.
        answer = self.server.handle_completions({
            'prompt': prompt, 'n_predict': 1, 'temperature': 0, 'n_probs': MAX_VOCAB_SIZE,
            'logit_bias': [[self.plain, 1e6]]})
        top = answer['choices'][0]['logprobs']['content'][0]['top_logprobs']
        out = np.full(len(top), np.nan, np.float32)
        out[[token['id'] for token in top]] = [token['logprob'] for token in top]
        return out

    def encode(self, text):
        body = {'content': text, 'add_special': True, 'parse_special': False}
        return self._post('/tokenize', body)['tokens']

    def decode(self, ids):
        return self._post('/detokenize', {'tokens': ids[1:]})['content'].removeprefix(self.prefix)

    def _post(self, path, body):
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(),
                                         {'Content-Type': 'application/json'})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
