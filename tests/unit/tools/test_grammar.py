"""Consistency by the grammar: stories of the grammar itself, and stories with one mistake."""

import math

import pytest

from data.tiny_stories.sample_stories import stories
from tools.grammar import KINDS, check_consistency, share_consistent, table_words

TOY = 'In a quiet town, there lived a girl named Sue who had a red toy car.\n\n'


def test_stories_of_the_grammar_are_consistent():
    corpus = list(stories(1000, 3))
    for kind in KINDS:
        assert share_consistent(corpus, kind) == 1
        assert sum(kind in check_consistency(story) for story in corpus) > 300, kind


def test_share_consistent_counts_only_stories_that_have_one():
    corpus = [*stories(3, 3), 'Nothing.']
    assert share_consistent(corpus, 'name') == 3 / 4
    assert math.isnan(share_consistent(['Nothing.'], 'object'))


@pytest.mark.parametrize('story, lost', [
    (TOY + 'Sue played in the park with Tim.\n\nSue loved the toy car.', ''),
    (TOY + 'Sue played in the park with Anna.\n\nSue loved the toy car.', 'name'),
    (TOY + 'Sue played.\n\nTim loved the toy car.', 'name'),
    (TOY + 'Sue gave Rocky a hand.\n\nSue loved the toy car.', 'animal'),
    (TOY + 'Sue played.\n\nSue loved the car.', 'object'),
    (TOY + 'Sue ran to the clearing.\n\nSue loved the toy car.', 'place'),
    (TOY + 'I lost it near the gate. It was by the old tree.\n\nSue loved the toy car.', 'place'),
    (TOY.strip(), 'name object'),
    ('A fox had a hat.\n\nSo the fox had a hat.', 'name animal'),
])
def test_check_consistency_finds_what_a_story_loses(story, lost):
    assert [kind for kind, kept in check_consistency(story).items() if not kept] == lost.split()


def test_table_words_takes_the_columns_of_the_slots():
    tables = [{'he his': ['cat / cats', 'dog / dogs']}, {'his': 'owl|fox', 'other': 'x'}]
    assert table_words(tables, 'his') == {'cats', 'dogs', 'owl', 'fox'}
    assert table_words(tables, 'he', 'other') == {'cat', 'dog', 'x'}
