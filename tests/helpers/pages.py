"""What the tests of the page share."""

import io
from functools import cache

import pytest
import sentencepiece

from data.tokenizer import BPETokenizer
from tests.helpers.tokenizers import CORPUS, small_tokenizer
from tools import browser

needs_browser = pytest.mark.skipif(not browser.PROGRAM, reason='there is no Chromium here')

# a text that would run a script if the page took it for markup
EVIL = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 1">'


@cache
def page_tokenizer(encoding):
    """Return a small tokenizer; 'lossy' is a sentencepiece model without bytes."""
    if encoding == 'lossy':
        return sentencepiece_without_bytes()
    return small_tokenizer(encoding)


def sentencepiece_without_bytes(**options):
    """Return a sentencepiece model as others train them, with control and user-defined symbols."""
    defaults = {
        'vocab_size': 110, 'model_type': 'bpe', 'control_symbols': ['q', '<mask>'],
        'user_defined_symbols': ['Lily', '  ', 'd M', '.*', 'Max\u2581']}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=3, **defaults | options)
    return BPETokenizer(model.getvalue())
