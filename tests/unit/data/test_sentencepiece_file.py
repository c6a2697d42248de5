"""sentencepiece's files against the library itself: which models are read, and that their ids are its own."""

import io
import re

import pytest
import sentencepiece

from configurator import UserError
from data.sentencepiece_file import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    count_pieces,
    read_fields,
    sentencepiece_model,
    write_varint,
)
from data.tokenizer_files import FIRST, read_tokenizer
from tests.helpers.tokenizers import CORPUS, NASTY

# Texts that a normalizer, a case folding or another place of the space would change
ODD_TEXTS = [*CORPUS, '\uff21\uff22', '\ufb01sh', 'e\u0301', 'The END', '\u2460', 'Max\u3000ran', '\u00bd',
             'a\tb', 'a\u00a0b', '<s>', '\u200b', '\u4f60\u597d', 'ran']
EXTRA_SPACES = ['  Max', 'ran ', 'Max  ran', '   ', *NASTY]


def train_model(folder, **options):
    """Write a sentencepiece model, trained as llama2.c does, but with other options; return its path."""
    file = io.BytesIO()
    defaults = {'model_type': 'bpe', 'vocab_size': 330, 'byte_fallback': True, 'hard_vocab_limit': False,
                'normalization_rule_name': 'identity', 'minloglevel': 3}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=file, **defaults | options)
    path = folder / 'tok.model'
    path.write_bytes(file.getvalue())
    return path


@pytest.mark.parametrize('options', [
    {}, {'allow_whitespace_only_pieces': True, 'split_digits': True}, {'remove_extra_whitespaces': False},
    {'byte_fallback': False, 'control_symbols': 'Max,<sep>'}, {'split_by_whitespace': False},
    {'unk_piece': '[UNK]', 'bos_piece': '[B]', 'eos_piece': '[E]', 'unk_surface': '?'}],
    ids=lambda options: ' '.join(options))
def test_models_that_are_read_have_the_ids_of_their_library(tmp_path, options):
    path = train_model(tmp_path, **options)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = read_tokenizer(path)
    texts = [re.sub(' +', ' ', text).strip(' ') for text in ODD_TEXTS]
    if options == {'remove_extra_whitespaces': False}:
        texts += EXTRA_SPACES
    for text in texts:
        text = text.replace('\u2581', '')  # sentencepiece takes it for a space
        assert tokenizer.encode(text) == library.encode(text)
    for text in ODD_TEXTS + EXTRA_SPACES:
        assert tokenizer.decode(tokenizer.encode(text)) == text or not tokenizer.lossless


@pytest.mark.parametrize('options, message', [
    ({'model_type': 'unigram'}, 'model_type is unigram: train it with --model_type=bpe'),
    ({'model_type': 'char'}, 'model_type is char'),
    ({'model_type': 'word', 'byte_fallback': False}, 'model_type is word'),
    ({'normalization_rule_name': 'nmt_nfkc'}, "normalization_rule_name 'nmt_nfkc'.*=identity"),
    ({'normalization_rule_name': 'nmt_nfkc_cf'}, "'nmt_nfkc_cf'"),
    ({'normalization_rule_name': 'nfkc'}, "'nfkc'"),
    ({'add_dummy_prefix': False}, 'add_dummy_prefix is false'),
    ({'treat_whitespace_as_suffix': True}, 'treat_whitespace_as_suffix is true'),
    ({'user_defined_symbols': '<sep>'}, "user_defined_symbols, such as '<sep>'"),
    ({'unk_id': 2, 'bos_id': 0, 'eos_id': 1}, 'its ids are not unk 0, bos 1, eos 2'),
    ({'pad_id': 3}, 'its ids are not unk 0, bos 1, eos 2'),
])
def test_models_that_encode_otherwise_are_refused_by_field(tmp_path, options, message):
    path = train_model(tmp_path, **options)
    with pytest.raises(UserError, match=message):
        read_tokenizer(path)


def test_escape_whitespaces_off_and_permuted_bytes_are_refused(tmp_path):
    """The trainer writes no such models."""
    path = tmp_path / 'tok.model'
    good = sentencepiece_model([*FIRST, ('a', -1.0, NORMAL)])
    path.write_bytes(good + b'\x1a\x02\x28\x00')  # a normalizer_spec with escape_whitespaces, field 5
    with pytest.raises(UserError, match='escape_whitespaces is false'):
        read_tokenizer(path)
    path.write_bytes(sentencepiece_model([*FIRST[:3], *reversed(FIRST[3:]), ('a', -1.0, NORMAL)]))
    with pytest.raises(UserError, match='its ids are not unk 0, bos 1, eos 2, and the bytes'):
        read_tokenizer(path)


@pytest.mark.parametrize('number, data', [
    (0, b'\x00'), (1, b'\x01'), (127, b'\x7f'), (128, b'\x80\x01'), (300, b'\xac\x02'),
    (2**21, b'\x80\x80\x80\x01')])
def test_varints_equal_the_examples_of_protocol_buffers(number, data):
    assert write_varint(number) == data
    assert list(read_fields(b'\x20' + data)) == [(4, number)]


@pytest.mark.parametrize('data', [b'\x80', b'\x0a\x05abc', b'\x0a', b'\x15\x00\x00', b'\x0b', b'\xff' * 20])
def test_read_fields_refuses_what_is_not_a_protocol_buffer(data):
    with pytest.raises(ValueError, match=r'breaks off|not a model'):
        list(read_fields(data))


def test_read_fields_stops_at_many():
    assert len(list(read_fields(b'\x20\x00' * 9, at_most=9))) == 9
    with pytest.raises(ValueError, match='more than 9 ids or entries'):
        list(read_fields(b'\x20\x00' * 10, at_most=9))


def test_sentencepiece_model_is_read_by_sentencepiece():
    pieces = [('<unk>', 0.0, UNKNOWN), ('<s>', 0.0, CONTROL), ('</s>', 0.0, CONTROL), ('a', -1.5, NORMAL),
              ('b' * 200, -2.5, NORMAL)]
    data = sentencepiece_model(pieces)
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    read = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    assert read == [(text, score) for text, score, _ in pieces]
    assert count_pieces(data) == 5
