"""Figures of the stories that a model writes, none of which needs another model or a network.

A figure alone says little: real stories repeat themselves, too. So each is to stand beside the same one
of as many validation stories, which says what good is. Shares are from 0 to 1, nan of nothing. Words are
runs of letters and digits in lower case; `don't` is one.
"""

import lzma
import math
import re
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch

from data import infill
from data.tiny_stories import sample_stories
from device import to_device
from evaluate import padded
from model import log_probs_in_parts

WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
SHORTEST = 5  # words that stand together in the training text before we call them copied
BASE = np.uint64(0x9E3779B97F4A7C13)  # of the hashes: odd, and else arbitrary
N_ENDINGS = 10  # that a model chooses from


def words(text):
    return [word.lower() for word in WORD.findall(text)]


def share(part, whole):
    return float(part) / whole if whole else math.nan


def read_stories(split, tokenizer, piece=2**22):
    """Yields the text of every story of a Split, in order; `piece` tokens are read at a time."""
    rest = np.zeros(0, np.uint16)
    for start in range(0, split.n_tokens, piece):
        ids = np.concatenate((rest, split.read(start, piece)))
        *whole, rest = np.split(ids, np.flatnonzero(ids == tokenizer.delimiter))
        yield from (infill.decode(tokenizer, story.tolist()) for story in whole if len(story))
    yield infill.decode(tokenizer, rest.tolist())


# the text by itself -----------------------------------------------------------

def ended(rows, max_new_tokens):
    """Share of the stories, lists of ids, that end before max_new_tokens. Good is what real ones do."""
    return share(sum(len(row) < max_new_tokens for row in rows), len(rows))


def length(stories):
    """Mean number of words. Good is what real stories have."""
    return share(sum(len(words(story)) for story in stories), len(stories))


def repetition(stories, n=4):
    """Share of the n-grams of words that stood in the same story before (Welleck et al. 2019: seq-rep).
    A model that goes round in circles comes close to 1."""
    grams = [[*zip(*(words(story)[i:] for i in range(n)), strict=False)] for story in stories]
    total = sum(map(len, grams))
    return share(total - sum(len({*story}) for story in grams), total)


def told_before(stories):
    """Share of the stories that are one before them, character for character. Good is 0."""
    return share(len(stories) - len({*stories}), len(stories))


def compression(stories, n_bytes):
    """How many times smaller the first n_bytes of all stories become (Shaib et al. 2024): more than real
    ones, they are too much alike. n_bytes is to be the same for both, as longer text gains more. LZMA:
    gzip sees no further back than 32 KB, about fifty stories."""
    data = '\n\n'.join(stories).encode()[:n_bytes]
    return len(data) / len(lzma.compress(data, lzma.FORMAT_ALONE))  # the form with the smallest header


# copies -----------------------------------------------------------------------

@dataclass
class Match:
    """What of a story stands in the training text."""
    story: str
    spans: list  # (start, stop) of each word, in characters
    copied: np.ndarray  # of each word: how many from it on stand so in a training story; 0: < SHORTEST
    unknown: list  # of its words: those that the training text has nowhere
    whole: bool  # whether a training story is the same, character for character
    source: str  # a training story that has the longest copy; '' if there is none

    def longest(self):
        """The longest copy: (start, stop) in characters of the story, and its number of words."""
        n = int(self.copied.max(initial=0))
        i = int(self.copied.argmax()) if n else 0
        return (self.spans[i][0], self.spans[i + n - 1][1], n) if n else (0, 0, 0)


def numbered(texts, numbers):
    """Of all words of `texts` (lists of words) in one row: the number of each, 0 where it has none, and
    how many there are from it to the end of its text; and where each text begins. Int arrays."""
    lengths = np.array([*map(len, texts)], int)
    ids = np.array([numbers.get(word, 0) for text in texts for word in text], int)
    return ids, lengths.cumsum().repeat(lengths) - np.arange(len(ids)), lengths.cumsum() - lengths


def extend(copied, where, ours, theirs, codes):
    """Raise `copied` to what these training stories have, and note in `where` at which of their words.

    ours, theirs: as of `numbered`. Hashes of all runs of n words (Karp and Rabin 1987) are compared, for
    one n after another, and only runs that both have go on to n + 1: soon they are few.
    """
    (our_ids, our_left, _), (their_ids, their_left, _) = ours, theirs
    i, j, n = np.arange(len(our_ids)), np.arange(len(their_ids)), 0  # the words where runs begin
    a, b = np.zeros(len(i), np.uint64), np.zeros(len(j), np.uint64)  # the hashes of the runs
    while len(i):
        i, a = i[room := our_left[i] > n], a[room]
        j, b = j[room := their_left[j] > n], b[room]
        a, b, n = a * BASE + codes[our_ids[i + n]], b * BASE + codes[their_ids[j + n]], n + 1
        if n >= SHORTEST:
            j, b = j[shared := np.isin(b, a)], b[shared]
            i, a = i[shared := np.isin(a, b)], a[shared]
            longer, order = copied[i] < n, b.argsort(kind='stable')
            copied[i[longer]] = n
            where[i[longer]] = j[order[b.searchsorted(a[longer], sorter=order)]]


def look_up(stories, training, batch_size=5000):
    """The Match of each of `stories` (list of str) in `training` (iterable of str, read once): of that,
    batch_size stories are in memory at a time."""
    texts = [*map(words, stories)]
    numbers = {word: n for n, word in enumerate(sorted({*chain.from_iterable(texts)}), 1)}
    codes = np.random.default_rng(0).integers(2**64, size=len(numbers) + 1, dtype=np.uint64)
    ours, seen, whole = numbered(texts, numbers), np.zeros(len(codes), bool), set()
    copied, where = np.zeros((2, len(ours[0])), int)
    of_story = np.split(copied, ours[2][1:])  # views
    source, training = [''] * len(stories), iter(training)
    while batch := [*islice(training, batch_size)]:
        whole |= {*stories}.intersection(batch)
        theirs = numbered([*map(words, batch)], numbers)
        seen[theirs[0]], before = True, copied.copy()
        extend(copied, where, ours, theirs, codes)
        for k, (first, part) in enumerate(zip(ours[2], of_story, strict=True)):
            if len(part) and copied[word := first + part.argmax()] > before[word]:
                source[k] = batch[theirs[2].searchsorted(where[word], 'right') - 1]
    spans = [[word.span() for word in WORD.finditer(story)] for story in stories]
    unknown = [[word for word in text if not seen[numbers[word]]] for text in texts]
    return [*map(Match, stories, spans, of_story, unknown, map(whole.__contains__, stories), source)]


def unknown_words(matches):
    """Share of the words that the training text has nowhere: a model's are mostly misspelt."""
    return share(sum(len(m.unknown) for m in matches), sum(len(m.spans) for m in matches))


def copies(matches, n):
    """Share of the n-grams of words, n at least SHORTEST, that stand in the training text (McCoy et al.
    2023). Real stories share phrases with it, too: what is far above theirs was learned by heart."""
    return share(sum((match.copied >= n).sum() for match in matches),
                 sum(max(len(match.spans) - n + 1, 0) for match in matches))


def whole_copies(matches):
    """Share of the stories that are a training story. Good is 0, or what real ones have: some corpora
    tell a story twice."""
    return share(sum(match.whole for match in matches), len(matches))


# what the model holds likely --------------------------------------------------

@torch.no_grad()
def log_probs(model, rows, batch_size=32):
    """Of rows (ids, number of ids before those that count), the summed log-probability of these in nats:
    a float array (len(rows),). ids: a 1-D array, at most block_size + 1."""
    sums, device = [], next(model.parameters()).device
    for first in range(0, len(rows), batch_size):
        batch = rows[first:first + batch_size]
        x, y = to_device(padded(batch, max(len(ids) for ids, _ in batch) - 1), device)
        parts = log_probs_in_parts(model.lm_head, model.hidden(x)[y >= 0], y[y >= 0], rows=1024)
        found = torch.cat([log_p.gather(1, target[:, None])[:, 0] for _, log_p, target in parts])
        sums += [row.sum().item() for row in found.split((y >= 0).sum(1).tolist())]
    return np.array(sums)


def parted(stories):
    """(text before the last sentence, white space and that sentence) of each story of three or more."""
    parts = [(story, infill.sentences(story)) for story in stories]
    befores = [(story, story[:-len(part[2])].rstrip()) for story, part in parts if part]
    return [(before, story[len(before):]) for story, before in befores]


def scores(model, tokenizer, before, texts):
    """Log-probabilities in nats of `texts` after `before`, of which all see as much as the longest has
    room for; None where that is less than half the context."""
    tails = [tokenizer.encode_pieces([(text, False)])[0] for text in texts]
    room = model.config.block_size + 1 - max(map(len, tails))
    if room <= model.config.block_size / 2:
        return None
    head = tokenizer.encode_pieces([(before, True)])[0][-room:]
    return log_probs(model, [(np.append(head, tail), len(head)) for tail in tails])


def endings(model, tokenizer, stories):
    """Share of the stories whose own last sentence the model prefers to those of the nine stories that
    follow, and how many stories could be asked about. Chance is 0.1.

    It prefers what gains most by the story, log p(sentence | story) - log p(sentence | nothing), or else
    short and common ones would win anywhere (Brown et al. 2020; Holtzman et al. 2021).
    """
    parts, right = parted(stories), []
    alone = {last.strip(): tokenizer.encode_pieces([(last.strip(), True)])[0] for _, last in parts}
    rows = [(ids[:model.config.block_size + 1], 1) for ids in alone.values()]
    worth = dict(zip(alone, log_probs(model, rows), strict=True))
    for k, (before, own) in enumerate(parts):
        gap = own[:-len(own.lstrip())]  # goes with the sentence, whose first token may hold it
        texts = [*dict.fromkeys(last.strip() for _, last in parts[k:] + parts[:k])][:N_ENDINGS]
        found = scores(model, tokenizer, before, [gap + text for text in texts])
        if len(texts) == N_ENDINGS and found is not None:
            gains = found - [worth[text] for text in texts]
            right.append(gains[0] > gains[1:].max())
    return share(sum(right), len(right)), len(right)


def names(model, tokenizer, stories):
    """Share of the stories whose last sentence the model holds likelier than with another name in it,
    and how many could be asked about. Chance is 0.5: right and wrong names are the same ones, shifted.

    A name is a capitalised word that stands within a sentence of the story before, and nowhere in small
    letters. The other one is of the next story that does not have it.
    """
    found, right = [], []
    for before, last in parted(stories):
        small = {*map(str.title, re.findall(r'\b[a-z]\w+', before))}
        known = {*re.findall(r'(?<=[\w,] )[A-Z]\w+', before)} - small
        found += [(before, last, name) for name in re.findall(r'\b[A-Z]\w+', last) if name in known][:1]
    for k, (before, last, name) in enumerate(found):
        text = words(before + last)
        others = [other for *_, other in found[k + 1:] + found[:k] if other.lower() not in text]
        changed = [re.sub(rf'\b{name}\b', other, last) for other in others[:1]]
        if changed and (pair := scores(model, tokenizer, before, [last, *changed])) is not None:
            right.append(pair[0] > pair[1])
    return share(sum(right), len(right)), len(right)


def kept(stories, kind):
    """Share of the stories that keep the name, animal, object or place (`kind`) to the end, as `keeps`
    of the built-in corpus says, and how many have one. The corpus itself has 1."""
    flags = [found[kind] for found in map(sample_stories.keeps, stories) if kind in found]
    return share(sum(flags), len(flags)), len(flags)
