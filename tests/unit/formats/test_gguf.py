"""GGUF, against llama.cpp. tests/scripts/test_export.py compares what it predicts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import UserError
from formats.gguf import GGUF
from model import GPTConfig
from tests.helpers.models import GPT2_BLOCK, needs_export_packages, write_random_model
from tests.helpers.tokenizers import BUILT_IN_STORIES, NASTY, trained_tokenizer

SPACE_MARK = '\u2581'  # a space to llama.cpp, even in a text
TEXTS = [text for text in BUILT_IN_STORIES[:10] + NASTY if SPACE_MARK not in text]


@needs_export_packages
@pytest.mark.parametrize('encoding', ['char', 'bpe', 'gpt2'])
def test_llamacpp_tokenizes_texts_as_we_do(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')  # not for a server on this machine
    tokenizer = trained_tokenizer(encoding)
    fmt = GGUF()
    write_random_model(fmt, tokenizer, tmp_path / 'model.gguf')
    fmt.read(tmp_path / 'model.gguf')

    @settings(max_examples=30, deadline=None)
    @given(text=st.sampled_from(TEXTS))
    def check(text):
        ids = [tokenizer.delimiter, *tokenizer.encode(text)]
        assert fmt.encode(text) == ids
        assert fmt.decode(ids) == text

    check()
    fmt.close()


@needs_export_packages
@pytest.mark.parametrize('dtype, block, expected', [
    ('f32', {}, {'general.architecture': 'llama', 'general.file_type': 0, 'llama.context_length': 64,
                 'llama.rope.freq_base': 500.0, 'llama.attention.head_count_kv': 2,
                 'tokenizer.ggml.add_space_prefix': True, 'tokenizer.ggml.add_eos_token': False}),
    ('f16', {}, {'general.file_type': 1}),
    ('q8_0', {'mlp_width': 64}, {'general.file_type': 7}),
    ('f32', GPT2_BLOCK, {'general.architecture': 'gpt2', 'gpt2.attention.layer_norm_epsilon': 0.5})])
def test_metadata_say_what_the_file_holds(tmp_path, dtype, block, expected):
    import gguf

    sizes = {'rope_theta': 500.0, 'norm_eps': 0.5}
    write_random_model(GGUF(dtype), trained_tokenizer('char'), tmp_path / 'x.gguf', **sizes | block)
    fields = gguf.GGUFReader(tmp_path / 'x.gguf').fields
    for name, value in expected.items():
        assert fields[name].contents() == value
    assert fields['tokenizer.ggml.bos_token_id'].contents() == 1
    assert fields['tokenizer.ggml.eos_token_id'].contents() == 1


@needs_export_packages
def test_read_says_that_llamacpp_cannot_run_the_model(tmp_path):
    """llama.cpp ends its process on a context of one token, and on half a file."""
    fmt = GGUF()
    write_random_model(fmt, trained_tokenizer('char'), tmp_path / 'a.gguf', block_size=1)
    with pytest.raises(UserError, match=r'llama\.cpp failed to run the model \(.*\): nothing was kept'):
        fmt.read(tmp_path / 'a.gguf')
    write_random_model(fmt, trained_tokenizer('char'), tmp_path / 'b.gguf')
    fmt.read(tmp_path / 'b.gguf')
    fmt.close()
    with pytest.raises(UserError, match=r'llama\.cpp failed to run'):
        fmt.encode('Once')


def test_q8_0_needs_widths_that_32_divides():
    tokenizer = trained_tokenizer('char')
    for width in {'mlp_width': 40}, {'n_embd': 48}:
        config = GPTConfig(**{'n_head': 2, 'n_embd': 64, 'mlp_width': 64} | width)
        [(reason, way_out)] = GGUF('q8_0').incompatibilities(config, tokenizer)
        assert reason.startswith('32 does not divide') and way_out == 'type --dtype f16'
        assert GGUF('f16').incompatibilities(config, tokenizer) == []


