"""sample.py from outside, against a naive one: token by token if it is greedy, else by its statistics."""

import math
import random

import pytest
import torch

from tests.helpers.scripts import script
from tests.reference import naive_sample as naive

SAMPLE = 'sample.py'
BLOCK_SIZE = naive.SHAPE['block_size']
STARTS = 'a', 'no', 'b caf, i', '! .cab and more.'  # of different lengths


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Return a folder with two checkpoints that write different stories, and a file of beginnings."""
    path = tmp_path_factory.mktemp('sample')
    torch.save(naive.make_checkpoint(3, 4.0), path / 'best.pt')
    torch.save(naive.make_checkpoint(5, 4.0), path / 'ckpt.pt')
    (path / 'starts.txt').write_text('\n'.join([STARTS[0], '', *STARTS[1:], ' ']) + '\n')
    return path


@pytest.fixture(scope='module')
def best(folder):
    return torch.load(folder / 'best.pt')


def write(folder, *words, out_dir=True):
    """Return the stories that sample.py writes, texts, and what it says on stderr."""
    place = [f'--out_dir={folder}'] if out_dir else []
    done = script(SAMPLE, *place, '--device=cpu', *words)
    assert done.out.endswith('\n')
    return done.out[:-1].split('\n---\n'), done.err


def cut_message(n_cut, n, where):
    return f'{n_cut} of {n} stories were cut at {where}\n' if n_cut else ''


# greedy -----------------------------------------------------------------------

def test_greedy_stories_from_several_beginnings(folder, best):
    """Side by side, over several full contexts; each beginning has its own num_samples stories."""
    expected, n_cut = [], 0
    for start in STARTS:
        prompt = [naive.DELIMITER, *naive.encode(start)]
        new, ended = naive.greedy(best, prompt, 70)
        expected += 2 * [naive.text_of(prompt + new)]
        n_cut += 2 * (not ended)
    words = [f'--start=FILE:{folder}/starts.txt', '--one_per_line', '--num_samples=2', '--temperature=0']
    assert write(folder, *words, '--max_new_tokens=70') == (
        expected, cut_message(n_cut, 8, '--max_new_tokens 70'))
    assert len(set(expected)) == 4 and max(map(len, expected)) > 2 * BLOCK_SIZE and 0 < n_cut < 8


def test_greedy_story_from_nothing_and_its_defaults(folder, best):
    """Three stories; here all are the same."""
    new, ended = naive.greedy(best, [naive.DELIMITER], 1000)
    stories, said = write(folder, '--temperature=0')
    assert stories == 3 * [naive.text_of([naive.DELIMITER, *new])]
    assert said == cut_message(3 * (not ended), 3, '--max_new_tokens 1000')


def test_whole_file_is_the_start(folder, best):
    path = folder / 'start.txt'
    path.write_bytes('\ufeffa\r\ncaf\u00e9 '.encode())
    prompt = [naive.DELIMITER, *naive.encode('a\ncaf\u00e9 ')]
    new, _ = naive.greedy(best, prompt, 9)
    words = ['--num_samples=1', '--temperature=0', '--max_new_tokens=9']
    stories, _ = write(folder, f'--start=FILE:{path}', *words)
    assert stories == [naive.text_of(prompt + new)]


def test_min_new_tokens_writes_story_after_story(folder, best):
    prompt = [naive.DELIMITER, *naive.encode('no')]
    length = len(naive.greedy(best, prompt, 90)[0])  # of the first story
    for least, most in (length, 90), (length + 1, 90), (90, 90):
        new, ended = naive.greedy(best, prompt, most, least)
        text = naive.text_of(prompt + new)
        assert ('\n---\n' in text) == (least > length)
        words = ['--start=no', '--num_samples=1', '--temperature=0']
        stories, said = write(folder, *words, f'--min_new_tokens={least}', f'--max_new_tokens={most}')
        assert stories == text.split('\n---\n')
        assert said == cut_message(int(not ended), 1, f'--max_new_tokens {most}')


def test_other_checkpoints(folder, best):
    """--ckpt last, and a path with --init_from in place of --out_dir."""
    last, prompt = torch.load(folder / 'ckpt.pt'), [naive.DELIMITER, *naive.encode('a')]
    words = ['--start=a', '--num_samples=1', '--temperature=0', '--max_new_tokens=30']
    for checkpoint, more, out_dir in (
            (last, ['--ckpt=last'], True), (best, [f'--init_from={folder}/best.pt'], False)):
        new, _ = naive.greedy(checkpoint, prompt, 30)
        assert write(folder, *words, *more, out_dir=out_dir)[0] == [naive.text_of(prompt + new)]


# drawing ----------------------------------------------------------------------

def tokens_of(story, start):
    """Return the ids after the start, which is not empty, so that no space is lost."""
    assert story.startswith(start)
    return naive.encode(start + story[len(start):])[len(naive.encode(start)):]


def places_in_distribution(checkpoint, rows, n_given, **drawing):
    """Return where each drawn token lies in its distribution, from 0 to 1: uniform if it is the right one.

    rows: ids of stories, the delimiter at their ends included. n_given: how many of each are its prompt.
    """
    rng, places = random.Random(0), []
    for n in range(1, max(map(len, rows))):
        now = [row for row, given in zip(rows, n_given, strict=True) if given <= n < len(row)]
        if not now:
            continue
        logits = naive.next_logits(checkpoint, [row[:n] for row in now])
        for row, one in zip(now, logits, strict=True):
            probs = naive.drawing_probabilities(one, **drawing)
            p = probs[row[n]].item()
            assert p > 0, 'a token that could not be drawn'
            likelier = probs[probs > p].sum().item()
            places.append(likelier + rng.random() * p)
    return places


def chi_square(places, n_bins=20):
    """Return the chi-square statistic of numbers from 0 to 1 against the uniform distribution."""
    expected, counts = len(places) / n_bins, [0] * n_bins
    for place in places:
        counts[min(int(place * n_bins), n_bins - 1)] += 1
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize('temperature, top_k, top_p', [
    (0.8, 0, 0.95), (1.3, 5, 1.0), (0.6, 0, 0.7), (1.0, 7, 0.8)])
def test_drawn_tokens_follow_the_distribution(folder, best, temperature, top_k, top_p):
    """136 stories, more than are written side by side, beyond full contexts; first with the defaults."""
    words = [f'--start=FILE:{folder}/starts.txt', '--one_per_line', '--num_samples=34', '--max_new_tokens=32']
    if (temperature, top_k, top_p) != (0.8, 0, 0.95):
        words += [f'--temperature={temperature}', f'--top_k={top_k}', f'--top_p={top_p}']
    stories, said = write(folder, *words)
    rows, n_given, n_cut = [], [], 0
    for i, story in enumerate(stories):
        start = STARTS[i // 34]
        new = tokens_of(story, start)
        assert len(new) <= 32
        n_cut += len(new) == 32
        end = [naive.DELIMITER] if len(new) < 32 else []
        rows.append([naive.DELIMITER, *naive.encode(start), *new, *end])
        n_given.append(1 + len(naive.encode(start)))
    assert len(stories) == 136 and said == cut_message(n_cut, 136, '--max_new_tokens 32')
    places = places_in_distribution(best, rows, n_given, temperature=temperature, top_k=top_k, top_p=top_p)
    assert len(places) > 1000 and chi_square(places) < 60  # 19 degrees of freedom: one of a million is above
    for i in range(4):
        assert len(set(stories[34 * i:34 * i + 34])) > 17  # each row has random numbers of its own


def test_batches_differ_and_seeds_repeat(folder):
    """256 stories are two batches, whose random numbers differ."""
    words = ['--start=a', '--max_new_tokens=12', '--temperature=1.5']
    first, _ = write(folder, *words, '--num_samples=256')
    assert sum(a == b for a, b in zip(first[128:], first[:128], strict=True)) < 40
    again, _ = write(folder, *words, '--num_samples=256', '--seed=1337')
    other, _ = write(folder, *words, '--num_samples=256', '--seed=7')
    assert again == first and sum(a == b for a, b in zip(first, other, strict=True)) < 80


# middles ----------------------------------------------------------------------

ENDS = ('a b.', 'no.'), ('c.', 'a.'), ('a.', 'b.')


@pytest.mark.parametrize('first, last', ENDS)
def test_middles(folder, best, first, last):
    """Greedy, within what the context has room for, and cut before by --max_new_tokens."""
    ends = [f'--first_sentence= {first} ', f'--last_sentence= {last} ', '--num_samples=2', '--temperature=0']
    prompt = [naive.DELIMITER, *naive.encode(first), naive.BLANK, *naive.encode(last), naive.MIDDLE]
    room = BLOCK_SIZE - len(prompt) + 1
    for limit, words, where in (
            (room, [], f'the end of the context of {BLOCK_SIZE} tokens'),
            (2, ['--max_new_tokens=2'], '--max_new_tokens 2')):
        new, ended = naive.greedy(best, prompt, limit)
        text = naive.decode(naive.encode(first) + new)
        text += ('' if text.endswith(' ') else ' ') + last
        stories, said = write(folder, *ends, *words)
        assert stories == [text, text]
        assert said == cut_message(2 * (not ended), 2, where)


def test_some_middles_end_and_some_are_cut(best):
    """Or else test_middles would see only one kind."""
    ended = set()
    for first, last in ENDS:
        prompt = [naive.DELIMITER, *naive.encode(first), naive.BLANK, *naive.encode(last), naive.MIDDLE]
        ended.add(naive.greedy(best, prompt, BLOCK_SIZE - len(prompt) + 1)[1])
    assert ended == {True, False}


def test_drawn_middles_follow_the_distribution(folder, best):
    ends = ['--first_sentence=a b.', '--last_sentence=no.', '--num_samples=400', '--temperature=1']
    stories, _ = write(folder, *ends, '--max_new_tokens=1', '--top_p=1')
    prompt = [naive.DELIMITER, *naive.encode('a b.'), naive.BLANK, *naive.encode('no.'), naive.MIDDLE]
    probs = naive.drawing_probabilities(naive.next_logits(best, [prompt])[0], 1.0, 0, 1.0)
    drawn = torch.zeros(len(probs))
    for story in stories:
        assert story.startswith('a b.') and story.endswith(' no.')
        middle = story.removeprefix('a b.').removesuffix('no.').removesuffix(' ')
        drawn[naive.encode(middle)[1] if middle else naive.DELIMITER] += 1
    space = naive.encode(' ')[0]  # a space and nothing at all look the same
    probs[naive.DELIMITER] += probs[space]
    probs[space] = 0
    for token, p in enumerate(probs.tolist()):
        assert abs(drawn[token] - 400 * p) < 5 * math.sqrt(400 * p) + 1e-9 + (3 if p else 0)
