"""Whole stories: side by side, in batches, each as by itself."""

import pytest
import torch

from core.generate import generate_stories, generate_until, opening, stories_at_once
from data import infill
from data.shards import Split
from data.tokenizer import CharTokenizer
from tests.helpers.models import small_model
from tests.helpers.scripts import STORIES, prepare


def greedy(model, ids, limit, stop, least=0):
    """The new ids after `ids`, without a cache; the context slides as in `generate`."""
    size, context, new = model.config.block_size, torch.tensor([ids]), []
    while len(new) < limit:
        if context.size(1) > size:
            context = context[:, -max(size // 2, 1):]
        token = model(context)[0, -1].argmax().item()
        if token == stop and len(new) >= least:
            break
        new.append(token)
        context = torch.cat((context, torch.tensor([[token]])), 1)
    return new


@pytest.mark.parametrize('least', [0, 4])
def test_prompts_of_any_lengths_are_continued_side_by_side(least):
    """Each as by itself, a row that is whole while the others grow; the context is never full."""
    model, prompts = small_model(block_size=64), [[3], [5, 6, 7, 8, 9], [5, 6], [9, 9, 1, 2]]
    alone = [greedy(model, ids, 12, -1) for ids in prompts]
    stop = alone[1][2]  # so that at least one ends early
    expected = [greedy(model, ids, 12, stop, least) for ids in prompts]
    steps = [([[*row] for row in rows], {*growing})
             for rows, growing in generate_until(model, prompts, stop, 12, least, temperature=0)]
    assert steps[-1] == (expected, set())
    for step, (rows, growing) in enumerate(steps):
        for i, new in enumerate(expected):
            asked = max(step + 2 - len(prompts[i]), 0)  # the shortest prompt has one token
            assert rows[i] == new[:asked] and (i in growing) == (asked < len(new) + (len(new) < 12))


def test_a_stop_at_the_limit_ends_a_row_and_does_not_stay():
    model = small_model(block_size=64)
    new = greedy(model, [3], 12, -1)
    stop = new[-1]
    limit = new.index(stop) + 1
    *_, (rows, _) = generate_until(model, [[3]], stop, limit, min_new_tokens=limit, temperature=0)
    assert rows == [new[:limit - 1]]


def test_many_are_written_in_batches_each_as_by_itself(monkeypatch):
    model, prompts = small_model(block_size=64), [[3], [5, 6, 7, 8, 9], [5, 6], [9, 9, 1, 2], [4]]
    stop = greedy(model, prompts[1], 12, -1)[2]
    expected = [greedy(model, ids, 12, stop) for ids in prompts]
    monkeypatch.setattr('core.generate.stories_at_once', lambda _: 2)
    assert [*generate_stories(model, prompts, stop, 12, seed=1, temperature=0)] == expected


def test_no_two_batches_draw_the_same_numbers(monkeypatch):
    model = small_model(block_size=64)
    monkeypatch.setattr('core.generate.stories_at_once', lambda _: 1)
    rows = {tuple(row) for row in generate_stories(model, [[3]] * 9, -1, 12, seed=1, temperature=3.0)}
    first, = next(iter(generate_until(model, [[3]], -1, 12, seed=1, temperature=3.0)))[0]
    assert len(rows) == 9 and first[0] in {row[0] for row in rows}


def test_as_many_at_once_as_memory_has_room_for():
    """Keys and values of a layer are (n_kv_head, block_size, head_dim), 4 bytes each."""
    model = small_model(block_size=64)
    assert stories_at_once(model) == 128
    model.config.block_size = 2**20
    c = model.config
    size = 2 * c.n_layer * c.n_kv_head * 2**20 * c.head_dim * 4
    assert stories_at_once(model) == 2**30 // size > 0
    model.config.block_size = 2**30
    assert stories_at_once(model) == 1


def test_a_story_begins_with_four_words_of_the_first_one(tmp_path):
    enc = CharTokenizer.train(STORIES)
    split = Split(prepare(tmp_path / 'plain'), 'val')
    assert enc.decode(opening(split, enc, 99)) == 'Once there was a'
    assert len(opening(split, enc, 5)) == 5
    turned, _ = infill.encode(enc, ['Hi you. It ran. All was well.'], 1.0)
    assert enc.decode(opening(Split(prepare(tmp_path / 'turned', val=turned), 'val'), enc, 99)) == 'Hi you.'
    bare = enc.encode_pieces([('Oh no', False)])[0]  # tokens that begin with no delimiter
    assert enc.decode(opening(Split(prepare(tmp_path / 'bare', val=bare), 'val'), enc, 99)).strip() == 'Oh no'
