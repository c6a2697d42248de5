"""Naive figures of stories, after the notes of the report's table and docs/training.md.

It shares no code with the project. Shares are from 0 to 1; nan where there is nothing to count.
"""

import lzma
import math

from tests.reference import naive_prepare, naive_sample


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


# words and copies -------------------------------------------------------------

def is_single(char):
    """Return whether a character is a word by itself, as in Chinese and Japanese."""
    return '\u3040' <= char <= '\u9fff' and char.isalnum()


def is_letter(char):
    return (char.isalnum() or char == '_') and not is_single(char)


def words_at(text):
    """Return (word in lower case, start, stop) of each word; "don't" is one."""
    found, i = [], 0
    while i < len(text):
        start = i
        if is_single(text[i]):
            i += 1
        elif is_letter(text[i]):
            while i < len(text) and (is_letter(text[i]) or (
                    text[i] in '\'\u2019' and i + 1 < len(text) and text[i + 1].isalnum())):
                i += 1
        else:
            i += 1
            continue
        found.append((text[start:i].lower(), start, i))
    return found


def words(text):
    return [word for word, _, _ in words_at(text)]


def runs(text, n):
    """Return all runs of n words of a text, as tuples."""
    text = words(text)
    return [tuple(text[i:i + n]) for i in range(len(text) - n + 1)]


def repeated(stories):
    """Return the share of the runs of 4 words that their own story has before."""
    again = []
    for story in stories:
        seen = set()
        for run in runs(story, 4):
            again.append(run in seen)
            seen.add(run)
    return mean(again)


def compression(stories, n_bytes):
    """Return how many times smaller LZMA makes the first n_bytes of all stories."""
    data = '\n\n'.join(stories).encode()[:n_bytes]
    return len(data) / len(lzma.compress(data, lzma.FORMAT_ALONE)) if data else math.nan


def copied(stories, training, n):
    """Return the share of the runs of n words that stand in a training story."""
    there = {run for story in training for run in runs(story, n)}
    return mean(run in there for story in stories for run in runs(story, n))


def longest_copy(story, training, shortest=5):
    """Return (start, stop, number of words) of the first longest run that stands in a training story."""
    at = words_at(story)
    for n in range(len(at), shortest - 1, -1):
        there = {run for other in training for run in runs(other, n)}
        for i, run in enumerate(runs(story, n)):
            if run in there:
                return at[i][1], at[i + n - 1][2], n
    return 0, 0, 0


def unknown(stories, training):
    known = {word for story in training for word in words(story)}
    return mean(word not in known for story in stories for word in words(story))


def text_figures(stories, n_ended, training, n_bytes):
    """Return {label: value} of the figures that need no model, shares as percentages."""
    return {
        'ended, %': 100 * n_ended / len(stories),
        'words': mean(len(words(story)) for story in stories),
        'repeated, %': 100 * repeated(stories),
        'compression': compression(stories, n_bytes),
        'unknown, %': 100 * unknown(stories, training),
        '5 words, %': 100 * copied(stories, training, 5),
        '8 words, %': 100 * copied(stories, training, 8),
        '12 words, %': 100 * copied(stories, training, 12),
        'longest': max(longest_copy(story, training)[2] for story in stories),
        'whole, %': 100 * mean(story in training for story in stories)}


# real stories -----------------------------------------------------------------

def evenly_spread(stories, n):
    """Return n of the stories, or all if there are fewer."""
    chosen = []
    for k, story in enumerate(stories):
        if k * n // len(stories) > (k - 1) * n // len(stories):
            chosen.append(story)
    return chosen


# what the model predicts ------------------------------------------------------

def log_probs(checkpoint, ids):
    """Return the log-probabilities (T, V) of the token after each of `ids`."""
    return naive_sample.all_logits(checkpoint, [ids])[0].log_softmax(-1)


def prediction(checkpoint, stream, n_bytes, n_windows=None):
    """Return {label: value} of the loss over a split, in windows of the context that follow one another."""
    size, losses, hits = checkpoint['config']['block_size'], [], []
    starts = list(range(0, len(stream) - 1, size))[:n_windows]
    for start in starts:
        window = stream[start:start + size + 1]
        log_p = log_probs(checkpoint, window[:-1])
        for row, target in zip(log_p, window[1:], strict=True):
            losses.append(-row[target].item())
            hits.append(row.argmax().item() == target)
    loss = mean(losses)
    return {'bits per byte': loss / math.log(2) * len(stream) / n_bytes, 'loss': loss,
            'perplexity': math.exp(loss), 'accuracy, %': 100 * mean(hits)}


def loss_of_middles(checkpoint, stream):
    """Return the loss of the tokens after <middle>, of the delimiter that closes the story too.

    Only stories count that fit the context with their own last sentence and with the next story's.
    """
    delimiter, vocab_size = 1, checkpoint['config']['vocab_size']
    blank, middle = vocab_size - 2, vocab_size - 1
    stories, story = [], []
    for token in [*stream, delimiter]:
        if token == delimiter and middle in story:
            stories.append(story)
        if token == delimiter:
            story = []
        story.append(token)
    losses = []
    for story, following in zip(stories, stories[1:] + stories[:1], strict=True):
        suffixes = [one[one.index(blank):one.index(middle)] for one in (story, following)]
        extra = max(0, len(suffixes[1]) - len(suffixes[0]))
        if len(story) + extra > checkpoint['config']['block_size']:
            continue
        ids = [*story, delimiter]
        log_p = log_probs(checkpoint, ids[:-1])
        losses += [-log_p[k - 1, ids[k]].item() for k in range(ids.index(middle) + 1, len(ids))]
    return mean(losses)


def log_prob(checkpoint, tokenizer, before, text, longest):
    """Return log p(text | before) in nats; before is cut as if the text had `longest` tokens."""
    head = [tokenizer.delimiter, *naive_prepare.encode(tokenizer, before)]
    head = head[-(checkpoint['config']['block_size'] + 1 - longest):]
    tail = tokenizer.tokens(text)
    log_p = log_probs(checkpoint, (head + tail)[:-1])
    return sum(log_p[len(head) + i - 1, token].item() for i, token in enumerate(tail))


def log_probs_of(checkpoint, tokenizer, before, texts):
    """Return the log-probability of each of the texts after `before`, or None if there is too little room."""
    longest, size = max(len(tokenizer.tokens(text)) for text in texts), checkpoint['config']['block_size']
    if size + 1 - longest <= size / 2:
        return None
    return [log_prob(checkpoint, tokenizer, before, text, longest) for text in texts]


def without_last_sentence(stories):
    """Return (text before, white space between, last sentence) of the stories of three or more sentences."""
    found = []
    for story in stories:
        if parts := naive_prepare.sentences(story):
            before = story[:-len(parts[2])].rstrip()
            gap = story[len(before):-len(parts[2])]
            found.append((before, gap, parts[2]))
    return found


def own_endings(checkpoint, tokenizer, stories):
    """Return (percentage of stories whose own last sentence gains most by the story, number asked)."""
    parts, right = without_last_sentence(stories), []
    for k, (before, gap, _) in enumerate(parts):
        texts = []
        for _, _, last in parts[k:] + parts[:k]:
            if last not in texts:
                texts.append(last)
        texts = texts[:10]
        after = log_probs_of(checkpoint, tokenizer, before, [gap + text for text in texts])
        alone = log_probs_of(checkpoint, tokenizer, '', [' ' + text for text in texts])
        if len(texts) == 10 and after and alone:
            gains = [a - b for a, b in zip(after, alone, strict=True)]
            right.append(gains[0] > max(gains[1:]))
    return 100 * mean(right), len(right)


def is_name(word, text):
    """Return whether a word has a capital within a sentence of the text, and nowhere small letters."""
    plain = text.replace('.', ' . ').split()
    within = any(a == word and b not in ('.', '') for a, b in zip(plain[1:], plain, strict=False))
    return word[0].isupper() and within and word.lower() not in plain


def own_names(checkpoint, tokenizer, stories):
    """Return (percentage of stories whose last sentence is likelier with its own name, number asked).

    The other name is the next story's that this one lacks.
    """
    found, right = [], []
    for before, gap, last in without_last_sentence(stories):
        for word in last.replace('.', ' ').split():
            if is_name(word, before):
                found.append((before, gap + last, word))
                break
    for k, (before, last, name) in enumerate(found):
        others = [other for _, _, other in found[k + 1:] + found[:k] if other not in before + last]
        if not others:
            continue
        pair = log_probs_of(checkpoint, tokenizer, before, [last, last.replace(name, others[0])])
        if pair:
            right.append(pair[0] > pair[1])
    return 100 * mean(right), len(right)


# how a table looks ------------------------------------------------------------

def shown(value):
    """Return a figure as text of four digits, '' for nan."""
    if math.isnan(value):
        return ''
    return f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'


def table_lines(names, rows):
    """Return the lines of a table of (label, cells, real)."""
    table = [['', *names, 'real stories']] + [[label, *cells, real] for label, cells, real in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = []
    for line in table:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        lines.append('   '.join([line[0].ljust(widths[0]), *cells]))
    return lines
