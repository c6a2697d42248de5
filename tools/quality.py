"""Figures of stories that a model has written; they need no other model and no network.

A figure alone says little, since real stories also repeat themselves. So each is compared with that of as
many validation stories. Words are letters and digits in lower case; `don't` is one word. In Chinese and
Japanese each character is a word. Shares are from 0 to 1, and nan if there is nothing to count.
"""

import lzma
import math
import re
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from core.device import to_device
from core.evaluate import pad_infill_rows
from data import infill
from tools.grammar import KINDS, share_consistent

WORD = re.compile(r"[^\W\u3040-\u9fff]+(?:['\u2019]\w+)*|\w")
SHORTEST_COPY = 5  # a shorter run of words is not called a copy
BATCH_SIZE = 5000  # training stories in memory at a time


def split_words(text):
    """Return the words of a text in lower case, one for each match of WORD."""
    lower = text.replace('\u0130', 'i').lower()  # the only letter that would become two
    return WORD.findall(lower)


def mean(values):
    """Return the mean of numbers or bools, nan of nothing."""
    values = list(values)
    if not values:
        return math.nan
    return float(sum(values)) / len(values)


# reading stories ----------------------------------------------------------------

def read_stories(split, tokenizer, chunk_size=2**22):
    """Yield the text of each story of a Split that is not blank. Reads `chunk_size` tokens at a time.

    Tokens before the first delimiter are a story, too: not all token files begin with a delimiter.
    """
    rest = np.zeros(0, np.uint16)  # the start of a story that the next chunk continues
    for start in range(0, split.n_tokens, chunk_size):
        ids = np.concatenate((rest, split.read(start, chunk_size)))
        *stories, rest = np.split(ids, np.flatnonzero(ids == tokenizer.delimiter))
        if start + chunk_size >= split.n_tokens:
            stories.append(rest)
        for story in stories:
            text = infill.decode(tokenizer, story.tolist())
            if text.strip():
                yield text


def sample_evenly(stories, tokenizer, n, limit):
    """Return the token ids of n evenly spaced stories (all, if there are fewer), each cut to `limit` tokens.

    A single story, as in a text that is not divided, is cut into n parts instead.
    """
    rows = []
    for k, story in enumerate(stories):
        if k * n // len(stories) > (k - 1) * n // len(stories):
            rows.append(tokenizer.encode(story))
    if len(rows) == 1:
        ids = rows[0]
        parts = [ids[start:start + limit] for start in range(0, len(ids), limit)]
        return parts[:n]
    return [ids[:limit] for ids in rows[:n]]


# the text alone -----------------------------------------------------------------

def repetition(stories, n=4):
    """Return the share of the n-grams of words that occur earlier in their own story.

    It approaches 1 if a model repeats itself without end (seq-rep of Welleck et al. 2019).
    """
    n_grams = n_different = 0
    for story in stories:
        words = split_words(story)
        grams = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
        n_grams += len(grams)
        n_different += len(set(grams))
    if n_grams == 0:
        return math.nan
    return 1 - n_different / n_grams


def compression(stories, n_bytes):
    """Return how many times smaller LZMA makes the first n_bytes of all stories (Shaib et al. 2024).

    More than for real stories means that the stories are too much alike. n_bytes must be the same for both,
    because longer text is compressed better. FORMAT_ALONE has the smallest header; gzip would see no further
    back than 32 KB, about fifty stories.
    """
    data = '\n\n'.join(stories).encode()[:n_bytes]
    if not data:
        return math.nan
    return len(data) / len(lzma.compress(data, lzma.FORMAT_ALONE))


# copies of the training text ----------------------------------------------------

@dataclass
class Match:
    """The parts of a story that also occur in the training text.

    Example: the story 'Oh! A B C D E, and.' and a training story 'a b c d e' give
        copied   [0, 5, 0, 0, 0, 0, 0]
        longest  (4, 13, 5)
        known    [False, True, True, True, True, True, False]
    """
    story: str
    copied: np.ndarray  # per word: the longest run from it on that a training story has; 0: < SHORTEST_COPY
    longest: tuple  # the longest of these runs: start and stop in characters, number of words
    source: str  # a training story that has the longest run; '' if there is none
    known: np.ndarray  # per word: whether it occurs in the training text
    whole: bool  # whether a training story is the same, character for character


def copied_share(matches, n):
    """Return the share of the n-grams of words that a training story has; n is at least SHORTEST_COPY.

    Real stories share phrases with the training text, too (McCoy et al. 2023): a share far above theirs means
    that a model has memorized.
    """
    n_copied = n_grams = 0
    for match in matches:
        starts = match.copied[:max(len(match.copied) - n + 1, 0)]
        n_copied += int((starts >= n).sum())
        n_grams += len(starts)
    if n_grams == 0:
        return math.nan
    return n_copied / n_grams


def add_word(hashes, words):
    """Return the 64-bit hashes of runs of words that are each one word longer. Both are uint64 arrays."""
    return hashes * np.uint64(0x9E3779B97F4A7C15) + words


def join_words(texts, numbers, end):
    """Join the words of all texts (lists of str) into one uint64 array of their numbers, 0 if they have none.

    After each text comes the number `end`.
    """
    joined = []
    for words in texts:
        joined += [numbers.get(word, 0) for word in words]
        joined.append(end)
    return np.array(joined, np.uint64)


def find_runs(ours, theirs):
    """Find for each of our words the longest run of words from it on that `theirs` has, too.

    ours, theirs: words as numbers, uint64 arrays. In each, a number that the other one lacks ends every
    story, so that no run continues in the next story.
    Returns two int arrays (len(ours),): the number of words in each run, 0 if below SHORTEST_COPY, and the
    position of such a run in theirs.
    """
    lengths = np.zeros(len(ours), int)
    places = np.zeros(len(ours), int)
    n = SHORTEST_COPY
    our_starts = np.arange(len(ours) - n + 1)  # where runs of n words start
    their_starts = np.arange(len(theirs) - n + 1)
    our_hashes = np.zeros(len(our_starts), np.uint64)
    their_hashes = np.zeros(len(their_starts), np.uint64)
    for i in range(n):
        our_hashes = add_word(our_hashes, ours[our_starts + i])
        their_hashes = add_word(their_hashes, theirs[their_starts + i])

    while len(our_starts) > 0:
        # keep the runs that both have: `kinds` are our different runs, place[k] is where they have kind k
        kinds, our_kinds = np.unique(our_hashes, return_inverse=True)
        their_kinds = kinds.searchsorted(their_hashes).clip(max=len(kinds) - 1)
        is_shared = kinds[their_kinds] == their_hashes
        their_starts, their_hashes = their_starts[is_shared], their_hashes[is_shared]
        place = np.full(len(kinds), -1)
        place[their_kinds[is_shared]] = their_starts
        is_shared = place[our_kinds] >= 0
        our_starts, our_hashes = our_starts[is_shared], our_hashes[is_shared]
        lengths[our_starts] = n
        places[our_starts] = place[our_kinds[is_shared]]
        # add the next word; soon few runs are left
        our_hashes = add_word(our_hashes, ours[our_starts + n])
        their_hashes = add_word(their_hashes, theirs[their_starts + n])
        n += 1
    return lengths, places


class CopySearch:
    """The words of our stories, and what of them the training stories have that were searched so far."""

    def __init__(self, stories):
        self.stories = stories
        self.words = [split_words(story) for story in stories]
        self.numbers = {}  # {word: number from 1 on}; words that only the training text has are 0
        for words in self.words:
            for word in words:
                self.numbers.setdefault(word, len(self.numbers) + 1)
        end = len(self.numbers) + 1
        self.ids = join_words(self.words, self.numbers, end)
        # for each position of ids: number of words in the longest copied run, and a story that has it
        self.copied = np.zeros(len(self.ids), int)
        self.sources = np.full(len(self.ids), '', object)
        self.is_known = np.zeros(end + 1, bool)  # by number
        self.whole = set()  # stories that are a training story

    def search(self, batch):
        """Search a list of training stories."""
        words_of_batch = [split_words(story) for story in batch]
        theirs = join_words(words_of_batch, self.numbers, end=0)
        story_of_word = np.repeat(np.array(batch, object), [len(words) + 1 for words in words_of_batch])
        lengths, places = find_runs(self.ids, theirs)
        is_longer = lengths > self.copied
        self.copied[is_longer] = lengths[is_longer]
        self.sources[is_longer] = story_of_word[places[is_longer]]
        self.is_known[theirs] = True
        self.whole.update(set(self.stories).intersection(batch))

    def matches(self):
        """Return the Match of each of our stories."""
        matches = []
        start = 0
        for story, words in zip(self.stories, self.words, strict=True):
            part = slice(start, start + len(words))
            copied = self.copied[part]
            longest, source = longest_copy(story, copied, self.sources[part])
            known = self.is_known[self.ids[part]]
            matches.append(Match(story, copied, longest, source, known, story in self.whole))
            start += len(words) + 1  # one for the end of the story
        return matches


def longest_copy(story, copied, sources):
    """Return `longest` and `source` of a Match. sources: for each word, a training story that has its run."""
    if not copied.any():
        return (0, 0, 0), ''
    first = int(copied.argmax())
    n_words = int(copied[first])
    spans = [match.span() for match in WORD.finditer(story)]
    start, _ = spans[first]
    _, stop = spans[first + n_words - 1]
    return (start, stop, n_words), sources[first]


def find_copies(stories, training):
    """Return the Match of each of `stories`, a list of str, in `training`, an iterable of str (read once)."""
    search = CopySearch(stories)
    training = iter(training)
    while batch := list(islice(training, BATCH_SIZE)):
        search.search(batch)
    return search.matches()


# preferences of the model -------------------------------------------------------

def split_last_sentence(stories):
    """Return (text before, white space and last sentence) of each story of at least three sentences."""
    found = []
    for story in stories:
        parts = infill.sentences(story)
        if parts is not None:
            _, _, last = parts
            before = story[:-len(last)].rstrip()
            found.append((before, story[len(before):]))
    return found


def log_probs(model, tokenizer, before, texts):
    """Return the log-probabilities (nats) of `texts` after the text `before`, an array.

    The start of `before` is cut off until it fits into the context together with the longest text. If less
    than half a context is left for it, all are nan.
    """
    block_size = model.config.block_size
    pieces = [(before, True)] + [(text, False) for text in texts]  # True: begins with a delimiter
    ids, sizes = tokenizer.encode_pieces(pieces)
    head, *tails = np.split(ids, sizes.cumsum()[:-1])
    room = block_size + 1 - max(len(tail) for tail in tails)  # the last token is not read
    if room <= block_size / 2:
        return np.full(len(texts), math.nan)
    return log_probs_of_tails(model, head[-room:], tails)


@torch.no_grad()
def log_probs_of_tails(model, head, tails):
    """Return the log-probability of each of `tails` after `head`; all are arrays of token ids."""
    rows = [(np.append(head, tail), len(head)) for tail in tails]
    longest = max(len(ids) for ids, _ in rows)
    x, y = to_device(pad_infill_rows(rows, longest - 1), model.device)
    is_target = y >= 0
    logits = model.lm_head(model.hidden(x)[is_target])
    of_targets = logits.log_softmax(-1, dtype=torch.float32).gather(1, y[is_target][:, None])
    per_tail = of_targets.split([len(tail) for tail in tails])
    return np.array([log_p.sum().item() for log_p in per_tail])


def own_endings(model, tokenizer, stories):
    """Return the share of stories whose last sentence the model prefers to those of the next nine stories.

    The model prefers the sentence that gains most by the story: log p(sentence | story) - log p(sentence).
    Short and common sentences would win otherwise (Brown et al. 2020; Holtzman et al. 2021). Chance is 0.1.
    Also returns how many stories count: they need three sentences and enough context.
    """
    parts = split_last_sentence(stories)
    is_right = []
    for k, (before, own) in enumerate(parts):
        others = parts[k + 1:] + parts[:k]
        endings = list(dict.fromkeys(last.strip() for _, last in [(before, own), *others]))[:10]
        if len(endings) < 10:
            continue
        gap = own[:-len(own.lstrip())]  # it belongs to the sentence, whose first token may include it
        gains = log_probs(model, tokenizer, before, [gap + ending for ending in endings])
        gains -= log_probs(model, tokenizer, '', [tokenizer.prefix + ending for ending in endings])
        if not np.isnan(gains).any():
            is_right.append(gains[0] > gains[1:].max())
    return mean(is_right), len(is_right)


def find_name(before, last):
    """Return the first word of the sentence `last` that is a name in the text `before`, or None.

    A name is capitalized within a sentence of the text, and never occurs in small letters there.
    """
    text_words = re.findall(r'\w+', before)
    inner_words = re.findall(r'(?<=[\w,] )\w\w+', before)
    names = {word for word in inner_words if word[0].isupper() and word.lower() not in text_words}
    for word in re.findall(r'\w+', last):
        if word in names:
            return word
    return None


def own_names(model, tokenizer, stories):
    """Return the share of stories whose last sentence the model prefers to the same one with another name.

    The other name is that of the next story whose name this one does not have. Chance is 0.5, because right
    and wrong names are the same ones in another order. Also returns how many stories count.
    """
    named = []
    for before, last in split_last_sentence(stories):
        name = find_name(before, last)
        if name is not None:
            named.append((before, last, name))
    is_right = []
    for k, (before, last, name) in enumerate(named):
        names = [other for _, _, other in named[k + 1:] + named[:k] if other not in before + last]
        if not names:
            continue
        changed = re.sub(rf'\b{name}\b', names[0], last)
        own, other = log_probs(model, tokenizer, before, [last, changed])
        if not math.isnan(own) and not math.isnan(other):
            is_right.append(own > other)
    return mean(is_right), len(is_right)


BROKEN = '\N{REPLACEMENT CHARACTER}'  # stands for the first bytes of a character that more tokens complete


@torch.no_grad()
def token_probabilities(model, tokenizer, ids, n_others=5):
    """Return [text, probability, [[text, probability], ...] of the likeliest other tokens] of each token.

    ids: a story's token ids, a list with the delimiter first; it is cut to the context. The text of a token
    is what it adds to the text before, '' if it completes no character. All texts joined are the story.
    """
    ids = ids[:model.config.block_size + 1]
    if len(ids) < 2:
        return []
    x = torch.tensor([ids[:-1]], device=model.device)
    result = []
    for k, probs in enumerate(model(x)[0].softmax(-1, dtype=torch.float32), start=1):
        shown = tokenizer.decode(ids[:k]).rstrip(BROKEN)
        likeliest = probs.topk(min(n_others + 1, len(probs))).indices.tolist()
        others = [token for token in likeliest if token != ids[k]][:n_others]
        pairs = []
        for token in [ids[k], *others]:
            text = tokenizer.decode([*ids[:k], token])[len(shown):]
            pairs.append([text.rstrip(BROKEN), probs[token].item()])
        text, probability = pairs[0]
        result.append([text, probability, pairs[1:]])
    result[-1][0] = tokenizer.decode(ids)[len(shown):]  # a character that is still broken at the end stays so
    return result


# the table ----------------------------------------------------------------------

@dataclass
class Figure:
    """A row of the report's table. Labels with a % have values from 0 to 100."""
    group: str
    label: str
    note: str
    value: float  # the model's; nan if there is nothing to count
    real: float = math.nan  # the same of as many real stories


@dataclass
class Stories:
    """Stories as token ids, each at most `limit` tokens, and their Matches in the training text."""
    rows: list
    matches: list

    def texts(self):
        return [match.story for match in self.matches]

    def n_bytes(self):
        return sum(len(text.encode()) for text in self.texts())


def compare_stories(written, real, limit, built_in):
    """Return the figures of the Stories `written` by a model, each with that of the real Stories.

    limit: the most tokens of a story. built_in: whether they are about the built-in corpus, whose grammar can
    be checked.
    """
    n_bytes = min(written.n_bytes(), real.n_bytes())
    figures = story_figures(written, limit, n_bytes)
    real_figures = story_figures(real, limit, n_bytes)
    if built_in:
        figures += grammar_figures(written)
        real_figures += grammar_figures(real)
    for figure, real_figure in zip(figures, real_figures, strict=True):
        figure.real = real_figure.value
    return figures


def story_figures(stories, limit, n_bytes):
    """Return the figures of stories that need no model. n_bytes: how many bytes to compress."""
    texts, matches = stories.texts(), stories.matches
    n_words = sum(len(match.known) for match in matches)
    n_known = sum(int(match.known.sum()) for match in matches)
    figures = [
        Figure('text', 'ended, %', f'stories that end within {limit} tokens',
               100 * mean(len(row) < limit for row in stories.rows)),
        Figure('text', 'words', 'per story, on average', mean(len(match.known) for match in matches)),
        Figure('text', 'repeated, %', 'runs of 4 words that occur earlier in the same story',
               100 * repetition(texts)),
        Figure('text', 'compression', f'times that LZMA makes {n_bytes:,} bytes smaller; more: too alike',
               compression(texts, n_bytes)),
        Figure('text', 'unknown, %', 'words that the training text does not have',
               100 * (1 - n_known / n_words) if n_words else math.nan),
    ]
    for n in 5, 8, 12:
        note = f'runs of {n} words that the training text has'
        figures.append(Figure('copies', f'{n} words, %', note, 100 * copied_share(matches, n)))
    longest = max((match.longest[2] for match in matches), default=math.nan)
    figures.append(Figure('copies', 'longest', 'words in the longest run that a training story has', longest))
    figures.append(Figure('copies', 'whole, %', 'stories that are a training story, letter for letter',
                          100 * mean(match.whole for match in matches)))
    return figures


def grammar_figures(stories):
    """Return how many stories are consistent by the grammar of the built-in corpus."""
    figures = []
    for kind in KINDS:
        note = f'stories that keep their {kind} to the end, of those that have one'
        figures.append(Figure('grammar', f'{kind}, %', note, 100 * share_consistent(stories.texts(), kind)))
    return figures


def ending_figures(model, tokenizer, stories):
    """Return the figures of what the model prefers as the end of real stories."""
    share, n = own_endings(model, tokenizer, stories)
    note = f'of {n} real stories: it prefers their last sentence to those of nine others (chance: 10)'
    figures = [Figure('endings', 'own ending, %', note, 100 * share)]
    share, n = own_names(model, tokenizer, stories)
    note = f'of {n} real stories: it prefers their last sentence to one with another name (chance: 50)'
    figures.append(Figure('endings', 'own name, %', note, 100 * share))
    return figures
