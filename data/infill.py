"""Stories turned around for infilling, so that a model learns to write the middle between two ends.

A story of three sentences or more becomes the ids

    delimiter, prefix, <blank>, suffix, <middle>, middle

the prefix being its first sentence and the suffix its last: the method of Bavarian et al. 2022, "Efficient
Training of Language Models to Fill in the Middle". prefix + middle + suffix is the story exactly: the middle
has the white space on both of its sides. Prefix and suffix are each encoded as a text of its own, as a
person's will be (char and bpe put a space before it); the middle goes on with the tokens of a plain story.
"""

import re
from hashlib import blake2b

import numpy as np

PLAIN, INFILLED, TOO_SHORT = range(3)  # what `encode` made of a story

# Many quotation marks of the real stories were read in a wrong encoding: an opening one is three characters,
# a closing one two (its third was lost), an ellipsis three, the last of them U+00A6.
_OPEN, _CLOSE = '\u00e2\u20ac\u0153', '\u00e2\u20ac(?![\u0153\u2122\u02dc\u201c\u201d\u00a6])'
_STOPS = '.!?\u2026\u00a6'
_NO_TITLE = ''.join(rf'(?<!\b{title}\.)' for title in ('Mr', 'Ms', 'Dr', 'St', 'Mrs'))
_SAID = 'said|asked|replied|answered|called|cried|shouted|yelled|exclaimed|whispered|screamed|added'


def _quotation(last=''):
    """A pattern for a whole quotation, before whose closing mark `last` holds.

    A straight mark opens where a word begins and closes behind one. To take them in turns would go wrong from
    the first one that was forgotten.
    """
    return rf"""(?:
        "(?<![^\s(\-]")(?=\S) [^"]* (?<=\S){last}"
      | \u201c [^\u201c\u201d]* {last}\u201d
      | {_OPEN} (?:(?!{_OPEN}|{_CLOSE})(?s:.))* {last}{_CLOSE}
    )"""


# Finds the ends of sentences, with the group `end`, and the other quotations, which hide what ends in them.
_END = re.compile(
    rf"""(?:
        {_quotation(f'(?<=[{_STOPS}])')}
        (?!  # a capital may follow and yet the sentence go on: "Stop!" Tim said.
            [ ]+ [A-Z][\w'.]* (?:[ ][\w'.]+){{0,2}}? [ ](?:{_SAID})\b
            (?!,?[ ]?["\u201c\u00e2:])  # but not: "Stop!" Tim said, "No!"
        )
      | [{_STOPS}] {_NO_TITLE}
    )
    (?:['")\]\u2019\u201d{_STOPS}] | {_CLOSE}){{0,20}}  # without a bound, a million dots would take forever
    (?=
        \s+ (?![a-z])
        (?!(?:[Tt]he[ ][Ee]nd|THE[ ]END)\W*\Z)  # says nothing, so it stays with the sentence before
        \S
    )
    (?P<end>)
  | {_quotation()}""",
    re.VERBOSE,
)


def sentences(story):
    """Its prefix, middle and suffix, or None if it has fewer than three sentences."""
    ends = [match.end() for match in _END.finditer(story) if match.lastgroup]
    if len(ends) < 2:
        return None
    suffix = story[ends[-1]:].lstrip()
    return story[:ends[0]], story[ends[0]:len(story) - len(suffix)], suffix


def chosen(story, rate):
    """Whether a story is in the share `rate` (0 to 1), by its hash: a larger share has all of a smaller."""
    number = blake2b(story.encode(), digest_size=8, person=b'infill').digest()
    return int.from_bytes(number, 'little') < rate * 2**64


def encode(enc, stories, rate):
    """Encodes whole stories for shards, the share `rate` of them for infilling.

    enc: a Tokenizer. stories: list of non-empty str.
    Returns the ids (uint16, 1-D), and what became of each story: PLAIN, INFILLED, or TOO_SHORT, which
    is chosen, but plain for want of three sentences.
    """
    pieces, kinds = [], []
    for story in stories:
        turned = rate > 0 and chosen(story, rate)
        parts = sentences(story) if turned else None
        prefix, middle, suffix = parts or (story, '', '')
        pieces += [(prefix, True), (suffix, True), (middle, False)] if parts else [(story, True)]
        kinds.append(INFILLED if parts else TOO_SHORT if turned else PLAIN)
    ids, lengths = enc.encode_pieces(pieces)
    infilled = np.array(kinds) == INFILLED
    ends = lengths.cumsum()
    middles = (np.where(infilled, 3, 1).cumsum() - 1)[infilled]  # which of the pieces
    ids[ends[middles - 2]] = enc.blank  # where encode_pieces has put the delimiter of the suffix
    return np.insert(ids, ends[middles - 1], enc.middle), kinds


def decode(enc, ids):
    """The story of `ids` (list of int), which `encode` turned around, or left plain."""
    if enc.blank not in ids or enc.middle not in ids:
        return enc.decode(ids)
    blank, middle = ids.index(enc.blank), ids.index(enc.middle)
    return enc.decode(ids[:blank] + ids[middle + 1:]) + enc.decode(ids[blank + 1:middle])


def prompt(enc, prefix, suffix):
    """The ids (list of int) after which a model writes the middle between two sentences."""
    return [enc.delimiter, *enc.encode(prefix), enc.blank, *enc.encode(suffix), enc.middle]
