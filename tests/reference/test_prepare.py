"""prepare.py from outside, against a naive one: each shard, meta.json and the tokenizer, byte by byte."""

import hashlib
import json
import random
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import naive_prepare as naive
from tests.reference.prepare_cases import (
    DELIMITER,
    GPT2_VOCABULARY,
    STORIES,
    TOKEN_FILES,
    check,
    corpus,
    needs_gpt2,
    run,
    write,
)

# every kind of source ---------------------------------------------------------

ODD = ['', '  \n', ' a space before and after ', 'line\r\nbreaks\rof\nall kinds', '\u2581 and \u2585',
       'caf\u00e9 \U0001f600 \u4f60\u597d', '<s> </s> <unk> <blank> <middle> <pad> <0x41>',
       'tab\tand\u2028odd\x85', '"quoted, with a comma"', 'NA', 'a' * 3000 + ' b']
LONG = 'One word and the next, ' * 12_000  # more than a library is given at a time


@pytest.mark.parametrize('name', ['s.json', 's.csv', 's.parquet', 's.txt.gz', 's.csv.gz', 's.tsv'])
def test_each_kind_of_file(tmp_path, name):
    column = 'story' if 'csv' in name else 'text'
    source = write(tmp_path / name, [*STORIES, *ODD, LONG], column)
    found = check(tmp_path, source, val_percentage=20.0)
    assert found['blank'] == 2
    assert len(found['stories']['train']) + len(found['stories']['val']) == 120 + len(ODD) - 2 + 1


def test_delimiters_across_chunks_and_odd_text_around_them(tmp_path):
    """A delimiter lies across each multiple of 64 KiB, so across the end of the first chunk of 1 MiB too."""
    text = ''
    for i in range(1, 35):
        where = i * 2**16 - 1 - i % 12  # of the first character of this delimiter, which has 13
        filling = f'{i} ' + 'the cat sat. ' * 5041
        text += filling[:where - len(text)] + DELIMITER
    text += f'\r\n\n the last one {DELIMITER}\n{DELIMITER}\r\n \n{DELIMITER}{DELIMITER}\n'
    path = tmp_path / 's.txt'
    path.write_bytes(b'\xef\xbb\xbf' + text.encode())
    assert all(text[k * 2**16 - 12:k * 2**16 + 12].count(DELIMITER) == 1 for k in range(1, 35))
    found = check(tmp_path, path, val_percentage=10.0)
    assert found['meta']['splits']['train']['stories'] + found['meta']['splits']['val']['stories'] == 35


def test_folder_is_read_in_sorted_order(tmp_path):
    """Ten files of three kinds in two folders: all .txt first, each kind by name."""
    folder = tmp_path / 's'
    for i in range(10):
        ending = ['.txt', '.jsonl', '.json'][i % 3]
        name = f'{"b" if i % 2 else "a"}/{9 - i}{ending}'
        write(folder / name, STORIES[12 * i:12 * i + 12])
    write(folder / '.hidden' / 'x.txt', ['hidden'])
    (folder / 'notes.md').write_text('no stories')
    found = check(tmp_path, folder, val_percentage=10.0)
    assert sum(split['stories'] for split in found['meta']['splits'].values()) == 120


def test_folder_with_csv_and_other_files(tmp_path):
    write(tmp_path / 's' / 'a.csv', STORIES[:20])
    write(tmp_path / 's' / 'b.txt', STORIES[20:40])
    check(tmp_path, tmp_path / 's', val_percentage=10.0)


@pytest.mark.parametrize('names, line', [
    (['train-1.txt', 'train-0.txt', 'valid.txt'],
     'training: train-0.txt, train-1.txt; validation: valid.txt'),
    (['train.jsonl', 'sub/val.jsonl', 'test.jsonl'],
     'training: train.jsonl; validation: sub/val.jsonl; left out: test.jsonl'),
    (['train.csv', 'test.csv'], 'training: train.csv; validation: test.csv'),
    (['train/invalid.txt', 'dev/a.txt', 'b.txt'],
     'training: train/invalid.txt; also training, as not called a split: b.txt; validation: dev/a.txt'),
    (['a.parquet', 'validation-0.parquet', 'ignored.txt'],
     'training: a.parquet; validation: validation-0.parquet')], ids=str)
def test_folder_with_a_validation_split(tmp_path, names, line):
    for i, name in enumerate(names):
        write(tmp_path / 's' / name, STORIES[30 * i:30 * i + 30])
    found = check(tmp_path, tmp_path / 's', data_percentage=60.0)
    assert found['meta']['splits']['val']['stories'] < 30
    assert found['printed'][0] == line


def test_single_document(tmp_path):
    path = tmp_path / 'book.txt'
    path.write_text('\n' + 'One \u00e9. Two.\n' * 500 + '\n')
    check(tmp_path, path)
    check(tmp_path, path, data_percentage=10.0, val_percentage=30.0)


# settings ---------------------------------------------------------------------

def test_shares_are_part_of_larger_shares(tmp_path):
    source, before = write(tmp_path / 's.txt', STORIES), {'train': set(), 'val': set()}
    for percentage in 0.001, 75.5:
        found = check(tmp_path, source, data_percentage=percentage, val_percentage=25.0)
        for split, stories in found['stories'].items():
            assert before[split] <= set(stories)
            before[split] = set(stories)
    assert 60 < len(before['train'] | before['val']) < 115


def test_validation_percentage(tmp_path):
    source = write(tmp_path / 's.txt', [*STORIES, *STORIES[:40]])
    for percentage, least, most in (0.001, 1, 1), (99.99, 119, 119):
        found = check(tmp_path, source, val_percentage=percentage)
        assert least <= len(set(found['stories']['val'])) <= most
        assert not set(found['stories']['val']) & set(found['stories']['train'])


def test_text_column(tmp_path):
    rows = [{'text': f'not {i}', 'tale': story} for i, story in enumerate(STORIES)]
    path = tmp_path / 's.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    found = check(tmp_path, path, text_column='tale')
    assert set(found['stories']['train']) < set(STORIES)
    found = check(tmp_path, path)
    assert all(story.startswith('not ') for story in found['stories']['train'])


# Stories with quotation marks, and their first and last sentences by hand
QUOTED = {
    '"Stop!" Tim said. He ran. Then he fell.': ('"Stop!" Tim said.', 'Then he fell.'),
    'Tim ran. "Stop! Now!" said Ann. He fell. "Oh!"': ('Tim ran.', '"Oh!"'),
    'Mr. Fox sat. He saw Dr. Owl. They ate. The end.': ('Mr. Fox sat.', 'They ate. The end.'),
    'Ann said, "It is late. Go home." He went. It was dark...': ('Ann said, "It is late. Go home."',
                                                              'It was dark...'),
    '\u201cWhy? Oh!\u201d she asked. Bob hid.\n\nAll was well.': ('\u201cWhy? Oh!\u201d she asked.',
                                                               'All was well.'),
    'Dr. Owl sat. Mr. Fox ate. Ann saw Mrs. Hen.': ('Dr. Owl sat.', 'Ann saw Mrs. Hen.'),
    'St. Ives is old. It rained. We saw Ms. Hen.': ('St. Ives is old.', 'We saw Ms. Hen.'),
    'A b. c d. E f! (G h.) I j?': ('A b. c d.', 'I j?')}


def parts_by_hand(story):
    """Return the three parts of a story, of the quoted ones as written above."""
    if story not in QUOTED:
        return naive.sentences(story)
    first, last = QUOTED[story]
    assert story.startswith(first) and story.endswith(last)
    return first, story[len(first):-len(last)], last


@pytest.mark.parametrize('encoding', ['char', 'bpe', pytest.param('gpt2', marks=needs_gpt2)])
def test_infilling(tmp_path, encoding):
    for story in QUOTED:
        if '"' not in story and '\u201c' not in story:
            assert naive.sentences(story) == parts_by_hand(story)
    source = write(tmp_path / 's.jsonl', [*STORIES, *QUOTED, 'One. Two.', 'x'])
    words, learn = tokenizer_of(encoding)
    rate = 1.0 if encoding == 'char' else 0.5
    found = check(tmp_path, source, words, learn, parts_by_hand, infill_rate=rate)
    train = found['meta']['splits']['train']
    assert 0.6 * rate < (train['infilled'] + train['too_short']) / train['stories'] <= 1.3 * rate
    assert train['infilled'] and train['too_short']


def test_more_workers_write_the_same(tmp_path):
    """More than 16 MB, so that there are several pieces, in their order."""
    stories = [f'{i} ' + 'The cat sat. ' * 4000 for i in range(330)]
    source = write(tmp_path / 's.txt', stories)
    _, files, meta = run(tmp_path / 'out', source, '--num_proc=2')
    train, val = naive.by_hash(stories, 1.0)
    tokenizer = naive.Char(train)
    unit = tokenizer.tokens('The cat sat. ' * 4000)
    for split, side in ('train', train), ('val', val):
        stream = []
        for story in side:
            stream.append(np.array([1, *tokenizer.tokens(' ' + story.split()[0] + ' ')], '<u2'))
            stream.append(np.array(unit, '<u2'))
        assert np.array_equal(np.concatenate(stream), np.frombuffer(files[f'{split}_00000.bin'], '<u2'))
        assert meta['splits'][split]['stories'] == len(side)


# tokenizers -------------------------------------------------------------------

def learn_pieces(texts):
    return naive.SentencePiece.train(texts, 400)


def take_gpt2(_):
    return naive.GPT2()


def tokenizer_of(encoding):
    """Return the flags for an encoding, and what makes the naive one of the training texts."""
    if encoding == 'bpe':
        return ['--encoding_type=bpe', '--vocab_size=400'], learn_pieces
    if encoding == 'gpt2':
        return ['--encoding_type=gpt2', f'--tokenizer={GPT2_VOCABULARY}'], take_gpt2
    return ['--encoding_type=char'], naive.Char


@pytest.mark.parametrize('encoding', ['char', 'bpe', pytest.param('gpt2', marks=needs_gpt2)])
def test_tokenizers_learned_and_given(tmp_path, encoding):
    """A vocabulary is learned from training stories alone; what it lacks goes as bytes."""
    rare = [f'{chr(0x4e00 + i)} saw {chr(0x1f600 + i)}. ' * 2 for i in range(30)]
    # sentencepiece would leave out lines with U+2585
    rare += [f'{i} zigzag\u2585 zigzag \u2581 zigzag' for i in range(20)]
    source = write(tmp_path / 's.txt', STORIES + rare + ODD)
    words, learn = tokenizer_of(encoding)
    learned = check(tmp_path, source, words, learn, val_percentage=30.0)
    (tmp_path / 'out').rename(tmp_path / 'first')
    other = write(tmp_path / 'other.txt', corpus(40, seed=5) + rare)
    tokenizer = learn(learned['stories']['train'])
    given_words = ['--tokenizer', tmp_path / 'first']
    check(tmp_path, other, given_words, lambda _: tokenizer)


def test_default_vocabulary_of_bpe_is_4096(tmp_path):
    rng = random.Random(0)
    texts = [' '.join(''.join(rng.choices('abcdefghij', k=rng.randint(2, 7))) for _ in range(60))
             for _ in range(400)]
    source = write(tmp_path / 's.txt', texts)

    def learn(train):
        return naive.SentencePiece.train(train, 4096)

    check(tmp_path, source, ['--encoding_type=bpe'], learn)


def test_built_in_corpus(tmp_path):
    """As pieces, for infilling, of the stories of another seed."""
    words = ['--data_percentage=1', '--infill_rate=0.5', '--seed=1']
    printed, files, meta = run(tmp_path / 'bpe', 'sample', *words)
    assert printed[-1] == f'next: python train.py config/quickstart_infill.py --dataset {tmp_path}/bpe'
    assert (meta['encoding'], meta['vocab_size'], meta['infill_rate']) == ('bpe', 1536, 0.5)
    for split in 'train', 'val':
        (shard,) = meta['splits'][split]['shards']
        assert hashlib.sha256(files[shard['name']]).hexdigest() == shard['sha256']
    assert digest(files) == PROMISED['sample, seed 1, infilling']


# token files of others --------------------------------------------------------

def tokens_check(tmp_path, folder, words, streams, tokenizer):
    _, files, meta = run(tmp_path / 'out', folder, *words, prepare=TOKEN_FILES)
    for split, ids in streams.items():
        assert files[f'{split}_00000.bin'] == np.array(ids, '<u2').tobytes()
        about = meta['splits'][split]
        assert (about['tokens'], about['stories']) == (len(ids), ids.count(tokenizer.delimiter))
        assert about['bytes'] == len(tokenizer.decode_all(ids).encode())
    return meta


class Decoding(naive.Char):
    def decode_all(self, ids):
        """Return the text of a stream, without the space before each story."""
        texts, story = [], []
        for i in [*ids, self.delimiter]:
            if i == self.delimiter:
                text = ''.join(self.characters[j - 259] for j in story)
                texts.append(text.removeprefix(' ') if len(texts) else text)
                story = []
            else:
                story.append(i)
        return ''.join(texts)


def test_token_files_of_nanogpt_and_llama2c(tmp_path):
    text = 'a quick brown fox\n' * 40 + 'jumped over it\n'
    (tmp_path / 'input.txt').write_text(text)
    tokenizer = Decoding([text])
    places = {char: i for i, char in enumerate(sorted(set(text)))}
    nano = tmp_path / 'nano'
    nano.mkdir()
    for name, part in ('train.bin', text[:500]), ('val.bin', text[500:]):
        np.array([places[char] for char in part], '<u2').tofile(nano / name)
    streams = {'train': tokenizer.tokens(text[:500]), 'val': tokenizer.tokens(text[500:])}
    tokens_check(tmp_path, nano, ['--tokenizer', tmp_path / 'input.txt'], streams, tokenizer)
    (nano / 'val.bin').unlink()
    streams = {'train': tokenizer.tokens(text[:450]), 'val': tokenizer.tokens(text[450:500])}
    words = ['--tokenizer', tmp_path / 'input.txt', '--val_percentage=10']
    tokens_check(tmp_path, nano, words, streams, tokenizer)
    streams = {'train': streams['train'][:225], 'val': streams['val'][:25]}
    tokens_check(tmp_path, nano, [*words, '--data_percentage=50'], streams, tokenizer)

    run(tmp_path / 'given', write(tmp_path / 's.txt', [text, text + 'x', 'fox', 'it']))
    given_by = Decoding([text + 'x'])
    llama, streams = tmp_path / 'llama', []
    llama.mkdir()
    for i in range(3):
        stream = []
        for word in ('a fox', 'it', 'over')[:i + 1]:
            stream += [1, *naive.encode(given_by, word)]
        np.array(stream, '<u2').tofile(llama / f'data0{i}.bin')
        streams.append(stream)
    splits = {'train': streams[1] + streams[2], 'val': streams[0]}
    tokens_check(tmp_path, llama, ['--tokenizer', tmp_path / 'given'], splits, given_by)


# anything ---------------------------------------------------------------------

SPELLED = ['<s>', '</s>', '<unk>', '<blank>', '<middle>', DELIMITER, '<|endof', '\u2581', '\r\n', ' ', '\n']
characters = st.characters(exclude_categories=['Cs', 'Cn'], exclude_characters='\0')
odd_text = st.lists(st.one_of(st.text(characters, max_size=12), st.sampled_from(SPELLED + STORIES)),
                    max_size=5).map(''.join)
odd_story = odd_text | st.sampled_from(['', ' ', '\n\n', 'x' * 5000, LONG, *STORIES])


@cache
def given_tokenizers(folder):
    """Return {encoding: (flags, the naive tokenizer)}, learned from one corpus."""
    found = {}
    for encoding in 'char', 'bpe':
        words, learn = tokenizer_of(encoding)
        source = write(folder / f'{encoding}.txt', corpus(60, seed=9))
        _, files, _ = run(folder / encoding, source, *words)
        if encoding == 'char':
            tokenizer = learn(json.loads(files['tokenizer.json']))
        else:
            tokenizer = naive.SentencePiece(files['tokenizer.model'])
        found[encoding] = ['--tokenizer', folder / encoding], tokenizer
    if GPT2_VOCABULARY:
        found['gpt2'] = ['--tokenizer', GPT2_VOCABULARY], naive.GPT2()
    return found


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory):
    return given_tokenizers(tmp_path_factory.mktemp('tokenizers'))


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(stories=st.lists(odd_story, min_size=20, max_size=40), data=st.data())
def test_any_stories_and_settings(tmp_path_factory, tokenizers, stories, data):
    tmp_path = tmp_path_factory.mktemp('any')
    encoding = data.draw(st.sampled_from([*tokenizers, 'learned']))
    words, learn = [], naive.Char
    if encoding != 'learned':
        words, tokenizer = tokenizers[encoding]

        def learn(_):
            return tokenizer
    name = data.draw(st.sampled_from(['s.txt', 's.jsonl', 's.csv', 's.json', 's.parquet', 's.txt.gz']))
    source = write(tmp_path / name, [*stories, 'the first', 'the second'])
    check(tmp_path, source, words, learn, val_percentage=data.draw(st.sampled_from([0.5, 10.0, 60.0])),
          data_percentage=data.draw(st.sampled_from([100.0, 50.0, 5.0])))


# the promise ------------------------------------------------------------------

def digest(files):
    """Return one sha256 of both shards."""
    return hashlib.sha256(files['train_00000.bin'] + files['val_00000.bin']).hexdigest()


# The same source, seed and tokenizer always give the same shards, as earlier versions gave them. With another
# number here, data that users prepare again does not fit their runs. bpe depends on sentencepiece, too.
PROMISED = {
    'char': '4c0734766177f4a67808b4e7d1ce47a2370506588b8bd93db152c14f3b46e0b4',
    'bpe': 'd11b8b848290b5eca9844bfce1486d30a0df499ebf00623b5591f8ef7b10247c',
    'gpt2': '42c5f80a1082d3aad70be1745bd0f1f497e607665acf70e184d343ca45aee315',
    'sample, seed 1, infilling': 'c2d0f56ba3d612e5c7f5c766a4497681a98a33683dbdc3ddd9c51eb175e78b43',
}


@pytest.mark.parametrize('encoding', ['char', 'bpe', pytest.param('gpt2', marks=needs_gpt2)])
def test_shards_never_change(tmp_path, encoding):
    source = write(tmp_path / 's.txt', STORIES + ODD)
    words, _ = tokenizer_of(encoding)
    _, files, _ = run(tmp_path / 'out', source, *words, '--infill_rate=0.5', '--val_percentage=10')
    assert digest(files) == PROMISED[encoding]
