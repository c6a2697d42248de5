"""What the page is told of a tokenizer."""

import json
import struct

import pytest

from configurator import UserError
from data.sentencepiece_file import CONTROL, NORMAL, UNUSED, sentencepiece_model
from data.tokenizer import BPETokenizer
from data.tokenizer_files import FIRST
from formats.page.vocabulary import (
    USER_DEFINED,
    page_vocabulary,
    read_message,
    sentencepiece_vocabulary,
)
from tests.helpers.pages import page_tokenizer, sentencepiece_without_bytes
from tests.helpers.tokenizers import ENCODINGS


def test_read_message_gives_each_field_by_its_number():
    message = bytes.fromhex('0a026869') + b'\x18\x01' + b'\x15' + struct.pack('<f', 0.5)
    message += b'\x21' + struct.pack('<d', 0.25) + b'\x98\x02\xac\x02' + b'\x0a\x00'
    assert read_message(message) == [
        (1, b'hi'), (3, 1), (2, struct.pack('<f', 0.5)), (4, struct.pack('<d', 0.25)), (35, 300), (1, b'')]
    assert read_message(b'') == []


def test_read_message_rejects_groups():
    with pytest.raises(ValueError, match='field 1 of a protocol buffer is stored in an unknown way'):
        read_message(b'\x0b')


def test_sentencepiece_vocabulary_says_what_is_unusual():
    pieces = [('a', 0.0, NORMAL), ('b', 0.0, UNUSED), ('c', -2.0, USER_DEFINED), ('d', -1.0, CONTROL)]
    vocabulary = sentencepiece_vocabulary(sentencepiece_model(FIRST + pieces), len(FIRST))
    assert vocabulary == {'pieces': ['a', 'b', 'c', ''], 'unused': ['b'], 'userDefined': ['c'],
                          'ranks': [0, 0, 2, 1]}


def test_sentencepiece_vocabulary_leaves_out_ranks_in_the_order_of_ids():
    pieces = [('a', 0.0, NORMAL), ('b', -1.0, NORMAL)]
    assert 'ranks' not in sentencepiece_vocabulary(sentencepiece_model(FIRST[:3] + pieces), 3)


def test_page_vocabulary_rejects_other_kinds_of_sentencepiece_models():
    unigram = sentencepiece_without_bytes(model_type='unigram', vocab_size=70)
    bpe = sentencepiece_without_bytes()
    escape_whitespaces_off = BPETokenizer(bpe.files['tokenizer.model'] + b'\x1a\x02\x28\0')
    for tokenizer in unigram, escape_whitespaces_off:
        with pytest.raises(UserError, match='only the usual kind of sentencepiece model'):
            page_vocabulary(tokenizer)


@pytest.mark.parametrize('encoding', [*ENCODINGS, 'lossy'])
def test_page_vocabulary_is_little_longer_than_its_pieces(encoding):
    """Five bytes per piece; of gpt2, whose pieces are long, a third of their text."""
    tokenizer = page_tokenizer(encoding)
    size = len(json.dumps(page_vocabulary(tokenizer), ensure_ascii=False, separators=(',', ':')).encode())
    spelled = sum(len(tokenizer.decode([1, i]).encode()) for i in range(tokenizer.vocab_size))
    if tokenizer.encoding == 'gpt2':
        assert size < 1.4 * spelled
    else:
        assert size < 600 + spelled + 5 * tokenizer.vocab_size
