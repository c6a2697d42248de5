"""Rearrange stories for infilling, so that a model learns to write the middle between two given ends.

A story of three sentences or more becomes the ids

    delimiter, prefix, <blank>, suffix, <middle>, middle

The prefix is its first sentence, the suffix its last: the method of Bavarian et al. 2022, "Efficient Training
of Language Models to Fill in the Middle". prefix + middle + suffix is exactly the story, as the middle keeps
the white space on both of its sides. Prefix and suffix are each encoded like a text of a user's (char and bpe
put a space before it). The middle has the tokens that continue a story.

Example: 'Tim ran. He fell. He cried.' has the prefix 'Tim ran.', the middle ' He fell. ' and the suffix
'He cried.'
"""

import re
from hashlib import blake2b

import numpy as np

PLAIN, INFILLED, TOO_SHORT = range(3)  # what `encode` made of a story

# Many quotation marks of TinyStories were decoded wrongly: an opening one is three characters, a closing one
# is two (the third was lost), and an ellipsis is three, the last of them U+00A6.
_OPEN = '\u00e2\u20ac\u0153'
_CLOSE = '\u00e2\u20ac(?![\u0153\u2122\u02dc\u201c\u201d\u00a6])'
_STOPS = '.!?\u2026\u00a6'
_NO_TITLE = ''.join(rf'(?<!\b{title}\.)' for title in ('Mr', 'Ms', 'Dr', 'St', 'Mrs'))
_SAID = 'said|asked|replied|answered|called|cried|shouted|yelled|exclaimed|whispered|screamed|added'


def _quotation(last=''):
    """Return a pattern for a whole quotation; `last` is a condition that holds before its closing mark.

    A straight mark opens a quotation before a word and closes it after one. (Counting the marks would go
    wrong from the first forgotten one on.)
    """
    return rf"""(?:
        "(?<![^\s(\-]")(?=\S) [^"]* (?<=\S){last}"
      | \u201c [^\u201c\u201d]* {last}\u201d
      | {_OPEN} (?:(?!{_OPEN}|{_CLOSE})(?s:.))* {last}{_CLOSE}
    )"""


# Matches the ends of sentences (with the group `end`), and other quotations, to skip the stops within them
_END = re.compile(
    rf"""(?:
        {_quotation(f'(?<=[{_STOPS}])')}
        (?!  # the sentence may continue with a capital: "Stop!" Tim said.
            [ ]+ [A-Z][\w'.]* (?:[ ][\w'.]+){{0,2}}? [ ](?:{_SAID})\b
            (?!,?[ ]?["\u201c\u00e2:])  # but it ends in: "Stop!" Tim said, "No!"
        )
      | [{_STOPS}] {_NO_TITLE}
    )
    (?:['")\]\u2019\u201d{_STOPS}] | {_CLOSE}){{0,20}}  # bounded, or a million dots would take forever
    (?=
        \s+ (?![a-z])
        (?!(?:[Tt]he[ ][Ee]nd|THE[ ]END)\W*\Z)  # "The end." is part of the sentence before it
        \S
    )
    (?P<end>)
  | {_quotation()}""",
    re.VERBOSE,
)


def sentences(story):
    """Return (prefix, middle, suffix) of a story, or None if it has fewer than three sentences."""
    ends = [match.end() for match in _END.finditer(story) if match.lastgroup]
    if len(ends) < 2:
        return None
    prefix = story[:ends[0]]
    suffix = story[ends[-1]:].lstrip()
    middle = story[len(prefix):len(story) - len(suffix)]
    return prefix, middle, suffix


def chosen(story, rate):
    """Return whether a story is in the fraction `rate` (0 to 1) of all stories.

    Its hash decides, so a larger fraction contains a smaller one.
    """
    digest = blake2b(story.encode(), digest_size=8, person=b'infill').digest()
    return int.from_bytes(digest, 'little') < rate * 2**64


def encode(enc, stories, rate):
    """Encode whole stories for shards, the fraction `rate` of them for infilling.

    enc: a Tokenizer. stories: list of non-empty str.
    Returns the ids (uint16, 1-D), and for each story PLAIN, INFILLED or TOO_SHORT: chosen, but plain because
    it has fewer than three sentences.
    """
    pieces = []  # as encode_pieces takes them: (text, whether the delimiter comes before it)
    middles = []  # the index of each middle in `pieces`
    kinds = []
    for story in stories:
        is_chosen = rate > 0 and chosen(story, rate)
        parts = sentences(story) if is_chosen else None
        if parts:
            prefix, middle, suffix = parts
            pieces += [(prefix, True), (suffix, True), (middle, False)]
            middles.append(len(pieces) - 1)
            kinds.append(INFILLED)
        else:
            pieces.append((story, True))
            kinds.append(TOO_SHORT if is_chosen else PLAIN)
    ids, lengths = enc.encode_pieces(pieces)

    # a suffix starts with a delimiter, which becomes <blank>; <middle> goes before each middle
    ends = lengths.cumsum()
    middles = np.array(middles, dtype=int)
    suffix_starts = ends[middles - 2]
    middle_starts = ends[middles - 1]
    ids[suffix_starts] = enc.blank
    return np.insert(ids, middle_starts, enc.middle), kinds


def decode(enc, ids):
    """Return the story that `encode` turned into `ids` (list of int), rearranged or not."""
    if enc.blank not in ids or enc.middle not in ids:
        return enc.decode(ids)
    blank = ids.index(enc.blank)
    middle = ids.index(enc.middle)
    prefix_and_middle = ids[:blank] + ids[middle + 1:]
    suffix = ids[blank + 1:middle]
    return enc.decode(prefix_and_middle) + enc.decode(suffix)


def prompt(enc, prefix, suffix):
    """Return the ids (list of int) after which a model writes the middle between two sentences."""
    return [enc.delimiter, *enc.encode(prefix), enc.blank, *enc.encode(suffix), enc.middle]
