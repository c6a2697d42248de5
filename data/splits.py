"""Decide what is for training and what for validation, by the names of files or the place in a document."""

import re

from configurator import UserError, one_line

# What files and folders of a split are called
SPLIT_OF_WORD = {
    'train': 'train', 'training': 'train',
    'val': 'val', 'valid': 'val', 'validation': 'val',
    'dev': 'dev', 'development': 'dev',
    'eval': 'eval', 'evaluation': 'eval',
    'holdout': 'holdout', 'heldout': 'holdout',
    'test': 'test', 'testing': 'test',
}
HELD_OUT = 'val', 'dev', 'eval', 'holdout', 'test'  # the first of these that a source has is for validation
ENDING = re.compile(r'\.(txt|jsonl?|csv|tsv|parquet)(\.gz)?$')
NUMBERING = re.compile(r'\d+-of-\d+(-[0-9a-f]{8,})?|\d+')  # of shards: train-00000-of-00004-abcdef0123456789
DOCUMENT_VAL_PERCENTAGE = 10.0  # as in nanoGPT


# names --------------------------------------------------------------------------

def group_by_split(names):
    """Return ({split: names}, one line that says which file is in which split).

    names: of files, relative to their folder, or of the splits of a dataset.
    Examples, of files that end in .txt:

        train val test              train for training, val for validation, test is left out
        train-1 train-2 dev         dev is for validation, as there is no val
        train/a train/b valid/c     the names of folders count, too
        x-train x-valid             x-valid is for validation: all but one word is that of another file
        invalid  Val-the-fox  a     all three for training, and a part of their stories for validation

    Raises UserError if two splits are held out and nothing is left for training.
    """
    readings = {name: read_path(name) for name in names}
    splits_of_rest = {}  # {the other words of a name: splits of the names with these words}
    for reading in readings.values():
        for split, rest in reading:
            splits_of_rest.setdefault(rest, set()).add(split)
    found = {}
    undecided = []
    for name, reading in readings.items():
        split = decide_split(reading, splits_of_rest)
        found.setdefault(split or 'train', []).append(name)
        if split is None:
            undecided.append(name)

    if len(found) == 1:
        return {'train': list(names)}, describe_one_split(list(names), readings)
    if 'train' not in found:
        raise UserError(f'nothing to train on, only {list_names(list(names))}: call a file train, or name '
                        'one file as the --source')
    held_out = [split for split in HELD_OUT if split in found]
    groups = {'train': found['train'], 'validation': found[held_out[0]]}
    left_out = []
    for split in held_out[1:]:
        left_out += found[split]
    return groups, describe_splits(groups, undecided, left_out)


def read_path(name):
    """Return a list of (split, other words) of the parts of a path, the last part first.

    Example: 'wiki/Wiki-valid_01.txt' gives [('val', 'wiki'), (None, 'wiki')].
    """
    parts = ENDING.sub('', name.lower()).split('/')
    return [read_name(part) for part in reversed(parts)]


def read_name(name):
    """Return (split, other words) of a name; the split is None if it has words of no split or of several."""
    name = re.sub('h[eo]ld[-_. ]out', 'holdout', NUMBERING.sub(' ', name))
    words = re.split(r'[-_.\s()\[\]]+', name)
    words = [word for word in words if word]
    splits = {SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD}
    if len(splits) != 1:
        return None, ' '.join(words)
    rest = [word for word in words if word not in SPLIT_OF_WORD]
    return splits.pop(), ' '.join(rest)


def decide_split(reading, splits_of_rest):
    """Return the split of a file, None if its path does not say.

    A name decides if it consists of the words for a split, or else if its other words are also those of a
    name without such a word or of another split. Of several names in the path, the last one decides.
    """
    for split, rest in reading:
        if split and not rest:
            return split
    for split, rest in reading:
        if split and (split == 'train' or len(splits_of_rest[rest]) > 1):
            return split
    return None


def describe_one_split(names, readings):
    """Return the line about a source in which no file is held out."""
    line = f'training and validation: {list_names(names)}'
    for name in names:
        for split, rest in readings[name]:
            if len(names) > 1 and split in HELD_OUT and rest:
                return f'{line} (if {one_line(name)} is for validation only, call it {split})'
    return line


def describe_splits(groups, undecided, left_out):
    """Return the line about a source with a validation split."""
    training = [name for name in groups['train'] if name not in undecided]
    also_training = undecided
    if not training:
        training, also_training = undecided, []
    parts = [f'training: {list_names(training)}']
    if also_training:
        parts.append(f'also training, as not called a split: {list_names(also_training)}')
    parts.append(f"validation: {list_names(groups['validation'])}")
    if left_out:
        parts.append(f'left out: {list_names(left_out)}')
    return '; '.join(parts)


def list_names(names):
    """Return the first names of a list, and how many there are if these are not all."""
    shown = ', '.join(one_line(name) for name in names[:4])
    if len(names) > 4:
        return f'{len(names):,} files ({shown}, ...)'
    return shown


# documents ----------------------------------------------------------------------

def split_document(text, percentage, val_percentage):
    """Return (DatasetDict, one line about it): the end of a text is for validation, the rest for training.

    percentage: of both parts, only so much is taken, from their starts.
    val_percentage: how much of the text is for validation; 0: as in nanoGPT, 10.
    """
    import datasets

    val_percentage = val_percentage or DOCUMENT_VAL_PERCENTAGE
    cut = int((1 - val_percentage / 100) * len(text))
    cut = min(max(cut, 1), len(text) - 1)  # at least one character for each
    splits = {}
    for split, part in ('train', text[:cut]), ('validation', text[cut:]):
        length = max(1, int(len(part) * (percentage / 100)))
        splits[split] = datasets.Dataset.from_dict({'text': [part[:length]]})
    line = f'one document: its last {val_percentage:g} percent are for validation'
    return datasets.DatasetDict(splits), line
