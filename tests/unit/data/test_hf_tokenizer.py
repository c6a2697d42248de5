"""Hugging Face's and GPT-2's files: those that are read encode as the tokenizers library does."""

import importlib.util
import json
import re
from functools import cache

import pytest

from configurator import UserError
from data.hf_tokenizer import describe_vocabulary, is_merges
from data.tiny_stories import sample_stories
from data.tokenizer_files import open_tokenizer, read_tokenizer
from formats.pieces import merges_of, pieces_of
from tests.helpers.tokenizers import BUILT_IN_STORIES, NASTY, gpt2_file, needs_gpt2, trained_tokenizer

needs_tokenizers = pytest.mark.skipif(importlib.util.find_spec('tokenizers') is None,
                                      reason='the package tokenizers is not installed')

# What the tokenizers library writes for its components
MARK = '\u2581'
TO_MARK = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': MARK}
TO_SPACE = {'type': 'Replace', 'pattern': {'String': MARK}, 'content': ' '}
STRIP = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
LLAMA_2 = {
    'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'Prepend', 'prepend': MARK}, TO_MARK]},
    'pre_tokenizer': None,
    'decoder': {'type': 'Sequence',
                'decoders': [TO_SPACE, {'type': 'ByteFallback'}, {'type': 'Fuse'}, STRIP]},
}
METASPACE = {'type': 'Metaspace', 'replacement': MARK, 'prepend_scheme': 'first', 'split': False}
TRANSFORMERS_5 = LLAMA_2 | {'normalizer': None, 'pre_tokenizer': METASPACE}
SPECIAL = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}


def llama_file(steps=LLAMA_2, encoding='bpe'):
    """Return the content of a tokenizer.json of Llama's kind, with the pieces of a small tokenizer."""
    pieces = pieces_of(trained_tokenizer(encoding))[:-2]
    vocab = {text.replace(' ', MARK): i for i, (text, _, _) in enumerate(pieces)}
    merges = [[left.replace(' ', MARK), right.replace(' ', MARK)] for left, right in merges_of(pieces)]
    model = {'type': 'BPE', 'dropout': None, 'unk_token': '<unk>', 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': True, 'byte_fallback': encoding == 'bpe',
             'ignore_merges': False, 'vocab': vocab, 'merges': merges}
    added = [SPECIAL | {'id': i, 'content': text} for i, text in enumerate(['<unk>', '<s>', '</s>'])]
    return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added,
            'post_processor': None, **steps, 'model': model}


def write(folder, content):
    path = folder / 'tokenizer.json'
    path.write_text(json.dumps(content), encoding='utf-8')
    return path


@needs_tokenizers
@pytest.mark.parametrize('encoding', ['bpe', 'lossy'])
@pytest.mark.parametrize('steps', [LLAMA_2, TRANSFORMERS_5], ids=['transformers 4', 'transformers 5'])
def test_files_of_llamas_kind_have_the_ids_of_their_library(tmp_path, steps, encoding):
    from tokenizers import Tokenizer

    content = llama_file(steps, encoding)
    if steps is LLAMA_2:  # in older files, merges are text
        content['model']['merges'] = [' '.join(pair) for pair in content['model']['merges']]
    path = write(tmp_path, content)
    (tmp_path / 'vocab.json').write_text('{}')  # comes after tokenizer.json
    library = Tokenizer.from_file(str(path))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.lossless) == (library.get_vocab_size() + 2, encoding == 'bpe')
    for text in [*BUILT_IN_STORIES, 'aaaaaa', '      a', *NASTY]:
        text = re.sub(f'{MARK}|<s>|</s>|<unk>', '', text)  # to the library, these are spaces and special
        if steps is TRANSFORMERS_5:
            text = text.lstrip(' ')  # the library puts no space before a text with a space
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_a_special_token_of_the_vocabulary_is_no_text(tmp_path):
    content = llama_file()
    vocab = content['model']['vocab']
    vocab['<pad>'] = len(vocab)
    content['added_tokens'] += [SPECIAL | {'id': vocab['<pad>'], 'content': '<pad>'},
                                SPECIAL | {'id': len(vocab), 'content': '<sep>'}]  # after the vocabulary
    tokenizer = read_tokenizer(write(tmp_path, content))
    assert tokenizer.vocab_size == len(vocab) + 2
    assert tokenizer.decode([vocab['<pad>']]) == ''
    assert tokenizer.decode(tokenizer.encode('<pad><sep>')) == '<pad><sep>'


def test_merges_of_the_first_piece_are_put_back(tmp_path):
    """transformers 4 leaves them out, because the score of the piece is 0."""
    content = llama_file()
    model = content['model']
    whole = read_tokenizer(write(tmp_path, content))
    first = next(text for text, i in model['vocab'].items() if i == 259)
    model['merges'] = [pair for pair in model['merges'] if ''.join(pair) != first]
    mended = read_tokenizer(write(tmp_path, content))
    for text in BUILT_IN_STORIES:
        assert mended.encode(text) == whole.encode(text)


def change(content, path, value):
    """Set the value at a path of keys in nested dicts."""
    *parents, key = path.split('.')
    for parent in parents:
        content = content[parent]
    content[key] = value


@pytest.mark.parametrize('path, value, message', [
    ('model.type', 'Unigram', "the type of its model is 'Unigram'; only BPE"),
    ('model.type', 'WordPiece', "'WordPiece'"),
    ('model.dropout', 0.1, 'dropout 0.1'),
    ('model.continuing_subword_prefix', '##', "continuing_subword_prefix '##'"),
    ('model.end_of_word_suffix', '</w>', "end_of_word_suffix '</w>'"),
    ('model.ignore_merges', True, 'ignore_merges True'),
    ('model.byte_fallback', False, 'byte_fallback False, but its vocabulary has bytes'),
    ('model.vocab.on', 70_000, 'ids are not the numbers from 0 on: .* ids up to 70000'),
    ('model.vocab', {str(i): i for i in range(70_000)}, 'it has 70,000 ids, and at most 65,534 fit'),
    ('normalizer', {'type': 'NFKC'}, "its normalizer is {'type': 'NFKC'}"),
    ('normalizer', {'type': 'Sequence', 'normalizers': [{'type': 'Lowercase'}]}, 'its normalizer .*Lower'),
    ('normalizer', TO_MARK, 'its normalizer'),
    ('normalizer', None, 'do not belong together'),
    ('pre_tokenizer', {'type': 'Whitespace'}, "its pre_tokenizer is {'type': 'Whitespace'}"),
    ('pre_tokenizer', METASPACE | {'split': True}, 'its pre_tokenizer is .*Metaspace'),
    ('pre_tokenizer', METASPACE | {'prepend_scheme': 'never'}, 'its pre_tokenizer is .*never'),
    ('pre_tokenizer', METASPACE, 'do not belong together'),
    ('decoder', {'type': 'WordPiece'}, 'its decoder'),
    ('pre_tokenizer', BYTE_LEVEL, 'not the bytes|a byte-level BPE tokenizer|not GPT-2'),
    ('added_tokens', [{'id': 9000, 'content': '<sep>', 'special': False}], "'<sep>', which is not special"),
])
def test_files_of_another_kind_are_refused_by_field(tmp_path, path, value, message):
    content = llama_file()
    change(content, path, value)
    with pytest.raises(UserError, match=message) as error:
        read_tokenizer(write(tmp_path, content))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('keep, message', [
    (lambda pair, i: ''.join(pair) != 'ing' or pair == ['in', 'g'], r"merges leave out \('i', 'ng'\)"),
    (lambda pair, i: pair != ['h', 'e'], r"merges leave out \('h', 'e'\)"),
])
def test_merges_that_sentencepiece_cannot_follow_are_refused(tmp_path, keep, message):
    """sentencepiece would merge any two pieces whose union is one."""
    content = llama_file()
    merges = content['model']['merges']
    content['model']['merges'] = [pair for i, pair in enumerate(merges) if keep(pair, i)]
    assert len(content['model']['merges']) < len(merges)
    with pytest.raises(UserError, match=message):
        read_tokenizer(write(tmp_path, content))


def test_merges_in_another_order_than_their_pieces_are_refused(tmp_path):
    content = llama_file()
    merges = content['model']['merges']
    i = next(i for i in range(len(merges)) if ''.join(merges[i]) == ''.join(merges[i + 1]))
    merges.append(merges.pop(i))
    with pytest.raises(UserError, match='at two places of its list'):
        read_tokenizer(write(tmp_path, content))


@needs_tokenizers
def test_byte_level_bpe_that_begins_like_llamas_is_refused(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE(unk_token='<unk>'))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(BUILT_IN_STORIES, trainers.BpeTrainer(
        vocab_size=500, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    library.save(str(tmp_path / 'tokenizer.json'))
    library.model.save(str(tmp_path), 'other')
    for name in 'tokenizer.json', 'other-vocab.json', 'other-merges.txt':
        with pytest.raises(UserError, match=r"a byte-level BPE tokenizer, .* except GPT-2's own"):
            read_tokenizer(tmp_path / name)


# GPT-2's vocabulary -------------------------------------------------------------

@cache
def gpt2_files():
    """Return {name: content} of all files that hold GPT-2's vocabulary."""
    merges = gpt2_file('vocab.bpe').read_text(encoding='utf-8')
    vocab = json.dumps(json.loads(gpt2_file('encoder.json').read_bytes()), indent=1)
    pairs = [line.split(' ') for line in merges.splitlines()[1:]]
    tokenizer = json.dumps({
        'version': '1.0', 'added_tokens': [SPECIAL | {'id': 50256, 'content': '<|endoftext|>'}],
        'normalizer': None, 'pre_tokenizer': BYTE_LEVEL, 'decoder': BYTE_LEVEL,
        'model': {'type': 'BPE', 'vocab': json.loads(vocab), 'merges': pairs}})
    tokens = trained_tokenizer('gpt2').files['tokenizer.tiktoken'].decode()
    return {'gpt2-vocab.json': vocab, 'tokenizer.json': tokenizer, 'vocab.bpe': merges,
            'gpt2_merges.txt': merges.replace('\n', '\r\n'), 'no-header.txt': merges.split('\n', 1)[1],
            'mark.txt': '\ufeff' + merges,
            'tokenizer.model': tokens}


@needs_gpt2
@pytest.mark.parametrize('name', ['gpt2-vocab.json', 'tokenizer.json', 'vocab.bpe', 'gpt2_merges.txt',
                                  'no-header.txt', 'mark.txt', 'tokenizer.model'])
def test_gpt2_is_known_by_its_content(tmp_path, name):
    (tmp_path / name).write_bytes(gpt2_files()[name].encode())
    assert read_tokenizer(tmp_path / name).state() == trained_tokenizer('gpt2').state()


@needs_gpt2
@pytest.mark.parametrize('name, old, new', [
    ('gpt2_merges.txt', 'h e\r\n', ''),
    ('no-header.txt', 'h e\n', ''),
    ('gpt2-vocab.json', '"!"', '"!!!!!"'),
    ('vocab.bpe', '#version: 0.2\n', '\u03a9 a\n'),
    ('tokenizer.json', '}}', '}'),
    ('tokenizer.json', '["h", "e"], ', ''),
    ('tokenizer.json', '"normalizer": null', '"normalizer": {"type": "NFC"}'),
    ('tokenizer.json', '"add_prefix_space": false', '"add_prefix_space": true'),
    ('tokenizer.json', '"use_regex": true', '"use_regex": false'),
    ('tokenizer.json', '"special": true', '"special": true}, {"content": "Max", "special": false'),
    ('tokenizer.model', 'IQ== 0\n', '')])
def test_changed_files_of_gpt2_are_refused(tmp_path, name, old, new):
    content = gpt2_files()[name]
    assert old in content
    (tmp_path / name).write_bytes(content.replace(old, new, 1).encode())
    with pytest.raises(UserError, match=f'{name} is damaged or not a tokenizer that this project reads'):
        open_tokenizer(tmp_path / name)


@pytest.mark.parametrize('text, answer', [
    ('#version: 0.2\na b\n', True), ('', False), ('Once upon\na time\n' * 100, False), ('a b\n' * 200, False),
    ('a b\nab c\nc c\nabc cc\nd d\n', True), ('a b\nab c\nc c\nabc cc\nd d\nd', True),
    ('a b\nab c\nc c\nab d\nde d\n', False), ('a b\nab c\n', False),
    ('a b\nab c\nc c\nabc cc\nd d e\n', False)])
def test_is_merges_needs_a_header_or_pairs_of_what_was_made(text, answer):
    assert is_merges(text) == answer


@pytest.mark.parametrize('text', [
    'Roses\nred\n\nviolets\nblue\n' * 9, 'The\nfox\n' * 60, 'Chapter 1\nOnce there was\nChapter 2\nHe ran.\n',
    'ROMEO:\nBut soft!\n\nJULIET:\nO Romeo\n', 'An <unk> day\n<unk>\nwas the end of all\n', '1 2\n',
    'Anna 1\nBert 2\nCleo 3\n',
    'a\t1\nb\t2\nc\t3\n', 'x = {"merges": []}\n', '\n'.join(sample_stories.stories(100, 1)),
    'if a:\n    b = 1\n', '{"text": "a"}\n', 'Once\nupon\na time', 'a\t1\n', ''])
def test_describe_vocabulary_says_nothing_of_a_text(text):
    assert describe_vocabulary(text) == ''
    assert not is_merges(text)
