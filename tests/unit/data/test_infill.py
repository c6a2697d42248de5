"""Infilling: where sentences end, and stories rearranged and put back together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import infill
from tests.helpers.tokenizers import ENCODINGS, small_tokenizer

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
    'Tim ran -"I will. Yes," he said.| He ran.| He fell.',
    'Mom said "no".| Tim said "yes."| They (both) sat (and ate.)| Then they slept.',
    '\u201cStop! Now.\u201d he said.| Tim\u2019s dog ran.| \u201cCome back. Please!\u201d',
    f'{OPEN}Stop!\nNow.{CLOSE} he said.| It{CLOSE}\u2122s fun.| He said {OPEN}O! I{CLOSE}.',
    'Tim said, "Forgot the mark.|\n\n"Who?"| Mia asked him.| "I!"| The cat sat.',
    'He waited... and waited\u2026 and came.| It was late...| He slept.',
    'Tim ran.| He fell.| They lived happily. The end.',
    'Tim ran.| He was glad. THE END!\n',
    'Why?!| Because.".| So.',
    '', ' ', 'One.', 'One.| Two.', 'one. two. three.', '"One. Two. Three."',
]


@pytest.mark.parametrize('marked', SPLITS)
def test_sentences_end_where_a_reader_says(marked):
    prefix, *between = marked.split('|')
    expected = None
    if len(between) > 1:
        *between, last = between
        suffix = last.lstrip()
        expected = prefix, ''.join(between) + last[:len(last) - len(suffix)], suffix
    assert infill.sentences(marked.replace('|', '')) == expected


@pytest.mark.parametrize('junk', ['.', '!"', '" a.', '. a', OPEN, CLOSE, '\u201ca', '. ', '\n', 'a'])
def test_sentences_takes_linear_time(junk):
    infill.sentences('A. ' + junk * 100_000)


parts = st.sampled_from([*'Ta .!"\n\u201c\u201d\u2026', '. T', OPEN, CLOSE])
texts = st.lists(parts | st.text(max_size=3), min_size=1, max_size=40).map(''.join).filter(len)


@pytest.mark.parametrize('encoding', ENCODINGS)
@settings(max_examples=60, deadline=None)
@given(stories=st.lists(texts, max_size=4), rate=st.sampled_from([0, 0.5, 1]))
def test_decode_inverts_encode(encoding, stories, rate):
    enc = small_tokenizer(encoding)
    ids, kinds = infill.encode(enc, stories, rate)
    assert ids.dtype == np.uint16 and len(kinds) == len(stories)
    found = np.split(ids, np.flatnonzero(ids == enc.delimiter))[1:]
    for story, own, kind in zip(stories, found, kinds, strict=True):
        own, cut = own.tolist(), infill.sentences(story)
        assert infill.decode(enc, own) == story
        assert kind == (infill.PLAIN if not infill.chosen(story, rate) else
                        infill.INFILLED if cut else infill.TOO_SHORT)
        if kind == infill.INFILLED:
            prefix, middle, suffix = cut
            assert prefix + middle + suffix == story and middle[0].isspace() and middle[-1].isspace()
            prompt = infill.prompt(enc, prefix, suffix)
            assert own[:len(prompt)] == prompt and own.count(enc.blank) == own.count(enc.middle) == 1
            assert infill.decode(enc, own[:len(prompt) - 1]) == enc.decode(own[:len(prompt) - 1])
        else:
            assert own[1:] == enc.encode(story)


def test_larger_rate_chooses_all_stories_of_a_smaller_one():
    stories = [f'Story {i}.' for i in range(2000)]
    shares = [{story for story in stories if infill.chosen(story, rate)} for rate in (0, 0.2, 0.6, 1)]
    assert set() == shares[0] < shares[1] < shares[2] < shares[3] == set(stories)
    assert 340 < len(shares[1]) < 460
