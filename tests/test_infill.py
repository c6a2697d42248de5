"""Infilling: sentences, stories turned around and back, the loss on middles, and the scripts."""

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluate import naive
from test_shards import prepare as write_shards
from test_tokenizer import make, needs_gpt2
from test_train import ROOT, TINY, script

import sample
from checkpoint import load_checkpoint, save_checkpoint
from configurator import SettingError, UserError
from data import infill
from data.shards import Split, read_meta
from data.tiny_stories import prepare
from data.tokenizer import load_tokenizer
from evaluate import evaluate, middle_rows
from model import GPT, GPTConfig

OPEN, CLOSE = '\u00e2\u20ac\u0153', '\u00e2\u20ac'  # as in the real stories
SPLITS = [  # a story with a | where a sentence ends
    'Tim ran.| He fell.| He cried.',
    'Tim ran!|  \n\n Did he fall?| He did.\n',
    '  Tim ran.\nhe was fast.| He fell.| The dog came.',
    'Mr. Fox met Mrs. Hen and Dr. Owl at St. Ives.| They sat.| Ms. Cat came.',
    '"Stop!" he said.| Tim ran.| "Why? I am late," he said.',
    '"Stop! I see you. Come here."| Tim stopped.| He came.| "Good."',
    '"Stop!" Tim said.| "Why?" asked the little girl.| "Wait!" The old man cried.',
    '"Stop!"| Tim said, "No!"| Then he ran.',
    '"I will," said Tim.| "Will you?"| "Yes. I will."',
    'Mom said "no".| Tim said "yes."| They (both) sat (and ate.)| Then they slept.',
    '\u201cStop! Now.\u201d he said.| Tim\u2019s dog ran.| \u201cCome back. Please!\u201d',
    f'{OPEN}Stop! Now.{CLOSE} he said.| It{CLOSE}\u2122s fun.| He said {OPEN}O! I{CLOSE}.',
    'Tim said, "Forgot the mark.|\n\n"Who?"| Mia asked him.| "I!"| The cat sat.',
    'He waited... and waited\u2026 and came.| It was late...| He slept.',
    'Tim ran.| He fell.| They lived happily. The end.',
    'Tim ran.| He was glad. THE END!\n',
    'Why?!| Because.".| So.',
]


@pytest.mark.parametrize('marked', SPLITS)
def test_where_sentences_end(marked):
    story = marked.replace('|', '')
    first, *between, last = marked.split('|')
    expected = None
    if between:
        space = last[:len(last) - len(last.lstrip())]
        expected = first, ''.join(between) + space, last.lstrip()
    assert infill.sentences(story) == expected


@pytest.mark.parametrize('story', ['', ' ', 'One.', 'One. Two.', 'one. two. three.', '"One. Two. Three."'])
def test_too_short(story):
    assert infill.sentences(story) is None


@pytest.mark.parametrize('junk', ['.', '!"', '" a.', '. a', OPEN, CLOSE, '\u201ca', '. ', '\n', 'a'])
def test_no_text_takes_forever(junk):
    infill.sentences('A. ' + junk * 100_000)


@pytest.fixture(scope='module', params=['char', 'bpe', pytest.param('gpt2', marks=needs_gpt2)])
def coder(request):
    return make(request.param)


parts = st.sampled_from([*'Ta .!"\n\u201c\u201d\u2026', '. T', OPEN, CLOSE])
texts = st.lists(parts | st.text(max_size=3), min_size=1, max_size=40).map(''.join)
texts = texts.filter(lambda text: text.encode('utf-8', 'ignore').decode() == text and text)


@settings(max_examples=60, deadline=None)
@given(st.lists(texts, max_size=4), st.sampled_from([0, 0.5, 1]))
def test_every_story_comes_back(coder, stories, rate):
    ids, lengths, kinds = infill.encode(coder, stories, rate)
    assert ids.dtype == np.uint16 and len(ids) == lengths.sum() and len(lengths) == len(kinds) == len(stories)
    for story, own, kind in zip(stories, np.split(ids, lengths.cumsum())[:-1], kinds, strict=True):
        own, cut = own.tolist(), infill.sentences(story)
        assert own[0] == coder.delimiter and infill.decode(coder, own) == story
        assert kind == (0 if not infill.chosen(story, rate) else 1 if cut else 2)
        if kind == infill.INFILLED:
            first, middle, last = cut
            assert first + middle + last == story and middle[0].isspace() and middle[-1].isspace()
            prompt = infill.prompt(coder, first, last)
            assert own[:len(prompt)] == prompt and own.count(coder.blank) == own.count(coder.middle) == 1
        else:
            assert own[1:] == coder.encode(story)


def test_a_larger_share_has_all_of_a_smaller():
    stories = [f'Story {i}.' for i in range(2000)]
    shares = [{story for story in stories if infill.chosen(story, rate)} for rate in (0, 0.2, 0.6, 1)]
    assert not shares[0] < shares[0] and shares[0] < shares[1] < shares[2] < shares[3] == set(stories)
    assert 340 < len(shares[1]) < 460


STORIES = [f'Once a cat had {i} hats.\n\nIt had "fun! A lot." And {i % 7} naps. It sat.' for i in range(300)]


def write_stories(path, stories=STORIES):
    path.write_text(''.join(json.dumps({'text': story}) + '\n' for story in stories))
    return path


@pytest.fixture
def turned(tmp_path, monkeypatch):
    """turned(source, rate) runs prepare.main(): meta.json, the tokenizer, and {split: [ids of a story]}."""
    def run(source, rate):
        for name, value in {'source': str(source), 'infill_rate': rate, 'out_dir': str(tmp_path / 'out'),
                            'encoding_type': 'char', 'offline': True}.items():
            monkeypatch.setattr(prepare, name, value)
        prepare.main()
        meta, coder, splits = read_meta(tmp_path / 'out'), load_tokenizer(tmp_path / 'out'), {}
        for name in 'train', 'val':
            tokens = np.fromfile(tmp_path / f'out/{name}_00000.bin', '<u2')
            starts = np.flatnonzero(tokens == coder.delimiter)
            splits[name] = [part.tolist() for part in np.split(tokens, starts)[1:]]
        return meta, coder, splits
    return run


def test_prepared_stories(tmp_path, turned, capsys):
    stories = [*STORIES, 'Short.', 'Only. Two.']
    source = write_stories(tmp_path / 's.jsonl', stories)
    counts = []
    for rate in 0.0, 0.5, 1.0:
        meta, coder, splits = turned(source, rate)
        assert meta['infill_rate'] == rate
        found = [infill.decode(coder, ids) for split in splits.values() for ids in split]
        assert sorted(found) == sorted(stories)
        for name, split in splits.items():
            assert sum(coder.middle in ids for ids in split) == meta['splits'][name]['infilled']
        both = meta['splits'].values()
        counts.append([sum(split[key] for split in both) for key in ('infilled', 'too_short')])
        assert ('for infilling: {}; {} chosen'.format(*counts[-1]) in capsys.readouterr().out) == (rate > 0)
    assert counts[0] == [0, 0] and 120 < counts[1][0] < 180 and counts[2] == [300, 2]


def test_a_document_stays_plain(tmp_path, turned):
    (tmp_path / 'book.txt').write_text(' '.join(STORIES))
    _, coder, splits = turned(tmp_path / 'book.txt', 1.0)
    assert ''.join(coder.decode(ids) for ids in (splits['train'][0], splits['val'][0])) == ' '.join(STORIES)
    assert not any(coder.middle in ids for split in splits.values() for ids in split)


def test_no_such_share(tmp_path, turned):
    with pytest.raises(SettingError, match='from 0 to 1'):
        turned(tmp_path, 50.0)


# The loss on middles, of a stream of ids below 20 with delimiter 1, <blank> 18 and <middle> 19


def stream(*stories):
    return np.concatenate([np.array(story, np.uint16) for story in stories])


@pytest.fixture
def split(tmp_path):
    tokens = stream([1, 5, 6, 18, 7, 19, 8, 9], [1, 4, 4, 4], [1, 3, 18, 2, 2, 19, 10, 11, 12],
                    [1, 4, 18, 5, 19, *[6] * 9], [1, 9, 9, 18, 6, 19, 3])
    write_shards(tmp_path, val=tokens, vocab_size=20, shard_tokens=13, infill_rate=0.5,
                 delimiter=1, blank=18, middle=19)  # a story reaches over two shards
    return Split(tmp_path, 'val')


def test_rows_of_middles(split):
    own, other = middle_rows(split, 10)
    assert [(ids.tolist(), before) for ids, before in own] == [
        ([1, 5, 6, 18, 7, 19, 8, 9, 1], 6), ([1, 3, 18, 2, 2, 19, 10, 11, 12, 1], 6),
        ([1, 9, 9, 18, 6, 19, 3, 1], 6)]
    assert [(ids.tolist(), before) for ids, before in other] == [
        ([1, 5, 6, 18, 2, 2, 19, 8, 9, 1], 7), ([1, 3, 18, 5, 19, 10, 11, 12, 1], 5),
        ([1, 9, 9, 18, 7, 19, 3, 1], 6)]
    assert len(middle_rows(split, 8)[0]) == 1  # [..., 9] fits with 2, 2 in the place of 7 no more
    split.meta['infill_rate'] = 0
    assert middle_rows(split, 10) == ([], [])


def test_a_single_middle_has_no_other_end(tmp_path):
    tokens = stream([1, 5, 18, 7, 19, 8], [1, 4, 4])
    write_shards(tmp_path, val=tokens, infill_rate=0.5, delimiter=1, blank=18, middle=19)
    assert middle_rows(Split(tmp_path, 'val'), 10) == ([], [])


@pytest.mark.parametrize('batch_size', [1, 2, 7])
def test_loss_of_middles(split, batch_size):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=10, vocab_size=20, n_layer=1, n_head=2, n_embd=16)).eval()
    result = evaluate(model, split, 10, batch_size)
    names = 'val_middle_loss', 'val_middle_loss_other_end'
    for name, rows in zip(names, middle_rows(split, 10), strict=True):
        losses = [loss for ids, before in rows for loss in naive(model, ids, 99)[0][before - 1:]]
        assert len(losses) == 3 + 4 + 2
        assert result[name] == pytest.approx(np.mean(losses), rel=1e-5)
    split.meta['infill_rate'] = 0
    without = evaluate(model, split, 10, batch_size)
    assert without == pytest.approx({key: result[key] for key in result.keys() - {*names}})


# The scripts


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a tiny run on stories for infilling, in out."""
    folder = tmp_path_factory.mktemp('infill')
    source = write_stories(folder / 's.jsonl')
    script('data/tiny_stories/prepare.py', '--source', source, '--out_dir', folder / 'data', '--offline',
           '--infill_rate=0.5', '--val_percentage=10', '--encoding_type=bpe', '--vocab_size=320')
    done = script('train.py', *TINY, '--dataset', folder / 'data', '--out_dir', folder / 'out')
    assert "with another story's end" in done.stdout
    return folder


ENDS = {'first_sentence': 'Once there was a cat.', 'last_sentence': ' It slept.'}


@pytest.fixture
def write(folder, monkeypatch, capsys):
    """write(**settings) runs sample.main(); gives its stories and what it says on stderr."""
    def run(**settings):
        for name, value in {'out_dir': str(folder / 'out'), 'device': 'cpu', **settings}.items():
            monkeypatch.setattr(sample, name, value)
        sample.main()
        out, err = capsys.readouterr()
        return out.removesuffix('\n').split('\n---\n'), err
    return run


def test_metrics_have_the_loss_of_middles(folder):
    for line in map(json.loads, (folder / 'out/metrics.jsonl').read_text().splitlines()):
        for name in 'val_middle_loss', 'val_middle_loss_other_end':
            assert (name in line) == ('val_loss' in line)


def test_a_story_is_printed_whole(folder):
    flags = [word for name, text in ENDS.items() for word in (f'--{name}', text)]
    done = script('sample.py', '--out_dir', folder / 'out', *flags, '--max_new_tokens=9', '--temperature=1.0')
    stories = done.stdout.removesuffix('\n').split('\n---\n')
    assert len(stories) == 3
    for story in stories:
        assert story.startswith('Once there was a cat.') and story.endswith('It slept.')
        assert story.removesuffix('It slept.')[-1].isspace()
    assert 'cut at --max_new_tokens 9' in done.stderr


def test_a_middle_stops_with_the_context(write, monkeypatch):
    logits = GPT.forward
    monkeypatch.setattr(GPT, 'forward', lambda *args, **kwargs: logits(*args, **kwargs).index_fill(
        -1, torch.tensor(1), -math.inf))  # it cannot end before
    (story,), said = write(**ENDS, num_samples=1, temperature=0)
    assert story.startswith('Once there was a cat.') and story.endswith('It slept.')
    assert said == '1 of 1 stories were cut at the end of the context of 64 tokens\n'


@pytest.mark.parametrize('settings, says', [
    ({'first_sentence': 'One.'}, '--last_sentence'),
    ({'last_sentence': 'One.', 'first_sentence': ' '}, '--first_sentence'),
    ({**ENDS, 'start': 'Once'}, 'leave out one'),
    ({**ENDS, 'last_sentence': 'It slept. ' * 40}, 'the context of 64'),
])
def test_what_cannot_be_filled_in(write, settings, says):
    with pytest.raises(UserError, match=says):
        write(**settings)


def test_a_model_that_never_saw_infilling(folder, write, tmp_path):
    checkpoint = load_checkpoint(folder / 'out/best.pt')
    save_checkpoint(tmp_path / 'best.pt', {**checkpoint, 'infill_rate': 0.0})
    with pytest.raises(UserError, match='has not learned to write middles'):
        write(**ENDS, out_dir=str(tmp_path))
    assert len(write(out_dir=str(tmp_path), **dict.fromkeys(ENDS, ''), max_new_tokens=3)[0]) == 3


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / 'docs/story_infilling.ipynb').read_text(encoding='utf-8'))
    cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum('image/png' in output.get('data', {}) for cell in cells for output in cell['outputs']) == 2
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    space = {'__name__': '__main__'}
    for cell in cells:
        source = ''.join(cell['source'])
        for setting, value in ('WORK', f'Path({str(tmp_path)!r})'), ('PERCENTAGE', 10), ('MAX_ITERS', 5):
            source = re.sub(f'(?m)^{setting} = .*$', f'{setting} = {value}', source)
        exec(source, space)
    assert (tmp_path / 'run/best.pt').is_file()
