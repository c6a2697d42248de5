"""Figures of the stories that a model writes, none of which needs another model or a network.

A figure alone says little: real stories repeat themselves, too. So each stands beside the same one of
as many validation stories, which says what good is. Shares are from 0 to 1, nan of nothing. Words are
letters and digits in lower case, `don't` is one; in Chinese and Japanese each character is.
"""

import lzma
import math
import re
from dataclasses import dataclass
from itertools import chain, islice, repeat

import numpy as np
import torch

from core.device import to_device
from core.evaluate import padded
from data import infill
from data.tiny_stories.sample_stories import kept

WORD = re.compile(r"[^\W\u3040-\u9fff]+(?:['\u2019]\w+)*|\w")
SHORTEST = 5  # words that stand together in the training text before we call them copied


def words(text):
    return WORD.findall(text.replace('\u0130', 'i').lower())  # the one letter that would become two


def mean(values):
    values = [*values]
    return float(sum(values)) / len(values) if values else math.nan


def read_stories(split, tokenizer, piece=2**22):
    """Yields the text of every story of a Split, but for blank ones, and reads `piece` tokens at a time.
    What stands before the first delimiter is a story, too: not all token files begin with one."""
    rest = np.zeros(0, np.uint16)
    for start in range(0, split.n_tokens, piece):
        ids = np.concatenate((rest, split.read(start, piece)))
        *whole, rest = np.split(ids, np.flatnonzero(ids == tokenizer.delimiter))
        whole += [rest] if start + piece >= split.n_tokens else []
        yield from filter(str.strip, (infill.decode(tokenizer, story.tolist()) for story in whole))


def alike(stories, tokenizer, n, limit):
    """The ids of n of the stories, evenly spread, each cut to `limit` tokens; parts of a lone one."""
    rows = [tokenizer.encode(story) for k, story in enumerate(stories)
            if k * n // len(stories) > (k - 1) * n // len(stories)]
    starts = range(0, len(rows[0]), limit) if len(rows) == 1 else [0]
    return [row[start:start + limit] for row in rows for start in starts][:n]


# the text by itself -----------------------------------------------------------

def repetition(stories, n=4):
    """Share of the n-grams of words that stood in the same story before (Welleck et al. 2019: seq-rep).
    A model that goes round in circles comes close to 1."""
    grams = [[*zip(*(text[i:] for i in range(n)), strict=False)] for text in map(words, stories)]
    new = [len({*story}) for story in grams]
    return 1 - sum(new) / sum(map(len, grams)) if sum(new) else math.nan


def compression(stories, n_bytes):
    """How many times smaller the first n_bytes of all stories become (Shaib et al. 2024): more than real
    ones, they are too much alike. n_bytes is to be the same for both, as longer text gains more. LZMA,
    in its form with the smallest header: gzip sees no further back than 32 KB, about fifty stories."""
    data = '\n\n'.join(stories).encode()[:n_bytes]
    return len(data) / len(lzma.compress(data, lzma.FORMAT_ALONE)) if data else math.nan


# copies -----------------------------------------------------------------------

@dataclass
class Match:
    """What of a story stands in the training text."""
    story: str
    copied: np.ndarray  # of each word: how many from it on stand so in a training story; 0: < SHORTEST
    longest: tuple  # of these runs: (start, stop) in characters of the story, and its number of words
    source: str  # a training story that has this run; '' if there is none
    known: np.ndarray  # of each word: whether it stands in the training text
    whole: bool  # whether a training story is the same, character for character


def copies(matches, n):
    """Share of the n-grams of words, n at least SHORTEST, that stand in the training text (McCoy et al.
    2023). Real stories share phrases with it, too: what is far above theirs was learned by heart."""
    return mean(chain(*((match.copied >= n)[:max(len(match.copied) - n + 1, 0)] for match in matches)))


def extend(copied, sources, ours, theirs, stories):
    """Raise `copied`, of each of our words how many from it on stand so in `theirs`, and note in
    `sources` where: `stories` has the story of each of their words. ours, theirs: numbers of words,
    after each story one that the other side does not have. A run of n + 1 words is a run of n, which has
    a number of its own, and one more word. Only runs that both have go on to be longer: soon they are
    few, and none goes beyond the end of its story."""
    i, j, n = np.arange(len(ours)), np.flatnonzero(theirs), 1  # where runs begin, and their length
    a, b, base = ours, theirs[j], len(ours) + 1  # the numbers of these runs, all below base
    while len(i):
        place = np.full(base, -1)  # of each run: where they have it
        place[b] = j
        i, a = i[place[a] >= 0], a[place[a] >= 0]
        if n >= SHORTEST:
            longer = copied[i] < n
            copied[i[longer]], sources[i[longer]] = n, stories[place[a[longer]]]
        runs, a = np.unique(a * base + ours[i + n], return_inverse=True)
        b = b * base + theirs[j + n]
        found = runs.searchsorted(b).clip(max=len(runs) - 1)
        j, b, n = j[runs[found] == b], found[runs[found] == b], n + 1


def look_up(stories, training, batch_size=5000):
    """The Match of each of `stories` (list of str) in `training` (iterable of str, read once): of that,
    batch_size stories are in memory at a time."""
    texts = [[*words(story), 'END'] for story in stories]  # END is no word: these are in lower case
    numbers = {word: n for n, word in enumerate(sorted({*chain(*texts)}), 1)}  # 0: a word we do not have
    ours = np.array([numbers[word] for word in chain(*texts)], int)
    seen, whole = np.zeros(len(numbers) + 1, bool), set()
    copied, sources, training = np.zeros(len(ours), int), np.full(len(ours), '', object), iter(training)
    while batch := [*islice(training, batch_size)]:
        theirs = [[*words(story), None] for story in batch]
        of_word = np.array(batch, object).repeat([*map(len, theirs)])
        theirs = np.fromiter(map(numbers.get, chain(*theirs), repeat(0)), int)
        extend(copied, sources, ours, theirs, of_word)
        seen[theirs] = True
        whole |= {*stories}.intersection(batch)
    matches, stop = [], 0
    for story, text in zip(stories, texts, strict=True):
        start, stop = stop, stop + len(text)
        i, n = start + int(copied[start:stop].argmax()), int(copied[start:stop].max())
        run = [word.span() for word in WORD.finditer(story)][i - start:i - start + n] or [(0, 0)]
        matches.append(Match(story, copied[start:stop - 1], (run[0][0], run[-1][1], n), sources[i],
                             seen[ours[start:stop - 1]], story in whole))
    return matches


# what the model holds likely --------------------------------------------------

def parted(stories):
    """(text before the last sentence, white space and that sentence) of each story of three or more."""
    found = [(story, infill.sentences(story)) for story in stories]
    befores = [(story[:-len(parts[2])].rstrip(), story) for story, parts in found if parts]
    return [(before, story[len(before):]) for before, story in befores]


@torch.no_grad()
def scores(model, tokenizer, before, texts):
    """Log-probabilities in nats of `texts` after `before`, of which all see as much as the longest has
    room for; nan where that is less than half the context."""
    ids, sizes = tokenizer.encode_pieces([(before, True), *((text, False) for text in texts)])
    head, *tails = np.split(ids, sizes.cumsum()[:-1])
    room = model.config.block_size + 1 - max(map(len, tails))
    if room <= model.config.block_size / 2:
        return np.full(len(texts), math.nan)
    rows = [(np.append(head[-room:], tail), min(len(head), room)) for tail in tails]
    x, y = to_device(padded(rows, max(len(ids) for ids, _ in rows) - 1), next(model.parameters()).device)
    log_p = model.lm_head(model.hidden(x)[y >= 0]).log_softmax(-1, dtype=torch.float32)
    parts = log_p.gather(1, y[y >= 0][:, None]).split([*map(len, tails)])
    return np.array([part.sum().item() for part in parts])


def endings(model, tokenizer, stories):
    """Share of the stories whose own last sentence the model prefers to those of the nine stories that
    follow, and how many could be asked about. Chance is 0.1. It prefers what gains most by the story,
    log p(sentence | story) - log p(sentence | nothing), or else short and common ones would win anywhere
    (Brown et al. 2020; Holtzman et al. 2021)."""
    parts, right = parted(stories), []
    for k, (before, own) in enumerate(parts):
        gap = own[:-len(own.lstrip())]  # goes with the sentence, whose first token may hold it
        texts = [*dict.fromkeys(last.strip() for _, last in parts[k:] + parts[:k])][:10]
        gains = scores(model, tokenizer, before, [gap + text for text in texts])
        gains -= scores(model, tokenizer, '', [tokenizer.prefix + text for text in texts])
        if len(texts) == 10 and not np.isnan(gains).any():
            right.append(gains[0] > gains[1:].max())
    return mean(right), len(right)


def names(model, tokenizer, stories):
    """Share of the stories whose last sentence the model holds likelier than with another name in it,
    the next story's that it lacks, and how many could be asked about. Chance is 0.5: right and wrong
    names are the same ones, shifted. A name is a word with a capital that stands within a sentence of
    the story before, and nowhere in small letters."""
    found, right = [], []
    for before, last in parted(stories):
        text, inner = re.findall(r'\w+', before), re.findall(r'(?<=[\w,] )\w\w+', before)
        known = {word for word in inner if word[0].isupper() and word.lower() not in text}
        found += [(before, last, word) for word in re.findall(r'\w+', last) if word in known][:1]
    for k, (before, last, name) in enumerate(found):
        others = (other for *_, other in found[k + 1:] + found[:k] if other not in before + last)
        changed = re.sub(rf'\b{name}\b', next(others, name), last)
        pair = scores(model, tokenizer, before, [last, changed])
        if changed != last and not np.isnan(pair).any():
            right.append(pair[0] > pair[1])
    return mean(right), len(right)


@torch.no_grad()
def token_probabilities(model, tokenizer, ids, n_others=5):
    """Of each token of a story [its text, its probability, [text, probability] of the likeliest others].

    ids: list of int, the delimiter first, cut to the context. A token's text is what it adds to the text
    before, '' where no character is whole yet. All texts joined are the story.
    """
    ids, result, broken = ids[:model.config.block_size + 1], [], '\N{REPLACEMENT CHARACTER}'
    x = torch.tensor([ids[:-1]], device=next(model.parameters()).device)
    for k, probs in enumerate(model(x)[0].softmax(-1, dtype=torch.float32) if len(ids) > 1 else (), 1):
        likely = probs.topk(min(n_others + 1, len(probs))).indices.tolist()
        tokens = [ids[k], *[token for token in likely if token != ids[k]][:n_others]]
        shown = len(tokenizer.decode(ids[:k]).rstrip(broken))
        pairs = [[tokenizer.decode([*ids[:k], token])[shown:].rstrip(broken), probs[token].item()]
                 for token in tokens]
        result.append([*pairs[0], pairs[1:]])
    if result:  # what is broken at the end stays so
        result[-1][0] = tokenizer.decode(ids)[shown:]
    return result


def figures(model, tokenizer, written, real, validation, limit, built_in=False):
    """All of these in order: a list of (group, label, note, the model's value, that of real stories),
    both floats, of 0 to 100 where the label has a %, and nan where there is nothing to count.

    written, real: (rows of ids, their Matches) of the model's stories and of as many real ones, `alike`
    to `limit`. validation: whole stories, whose endings it is asked about. built_in: of that corpus?
    """
    sides = [(rows, matches, [match.story for match in matches]) for rows, matches in (written, real)]
    n_bytes = min(sum(len(story.encode()) for story in stories) for *_, stories in sides)
    sides = [[
        ('text', 'ended, %', f'that end within {limit} tokens', mean(len(ids) < limit for ids in rows)),
        ('text', 'words', 'in a story, on average', mean(len(match.known) for match in matches)),
        ('text', 'repeated, %', 'runs of 4 words that the story has before', repetition(stories)),
        ('text', 'compression', f'how many times smaller LZMA makes {n_bytes:,} bytes: more, more alike',
         compression(stories, n_bytes)),
        ('text', 'unknown, %', 'words that the training text does not have',
         1 - mean(chain(*(match.known for match in matches)))),
        *[('copies', f'{n} words, %', f'runs of {n} words that stand in the training text',
           copies(matches, n)) for n in (5, 8, 12)],
        ('copies', 'longest', 'words of the longest run that stands in a training story',
         float(max((match.longest[2] for match in matches), default=math.nan))),
        ('copies', 'whole, %', 'to the letter a training story', mean(match.whole for match in matches)),
        *[('grammar', f'{kind}, %', f'stories that keep their {kind} to the end, if they have one',
           kept(stories, kind)) for kind in ('name', 'animal', 'object', 'place') if built_in],
    ] for rows, matches, stories in sides]
    table = [(*row, real_row[-1]) for row, real_row in zip(*sides, strict=True)]
    for label, measure, note in (('own ending, %', endings, 'nine others: chance is 10'),
                                 ('own name, %', names, 'one with another name: chance is 50')):
        value, n = measure(model, tokenizer, validation)
        note = f'of {n} real stories those whose last sentence it prefers to {note}'
        table.append(('endings', label, note, value, math.nan))
    return [(group, label, note, *(100 * value if '%' in label else value for value in values))
            for group, label, note, *values in table]
