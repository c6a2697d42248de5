"""Whether a story is consistent, by the grammar of the built-in corpus (data/tiny_stories/sample_stories.py).

Every story of that grammar keeps its name, animal, object and place to the end. A small model often does not.
"""

import math
import re

from data.tiny_stories.sample_stories import ANIMALS, NAMES, PLOTS, PRONOUNS, WORLDS

KINDS = 'name', 'animal', 'object', 'place'


def table_words(tables, *slots):
    """Return the set of words that tables of the grammar have for the given slots.

    Example: table_words([{'he his': ['cat / cats', 'dog / dogs']}], 'his') -> {'cats', 'dogs'}
    """
    found = set()
    for table in tables:
        for keys, rows in table.items():
            if isinstance(rows, str):
                rows = rows.split('|')
            for column, key in enumerate(keys.split()):
                if key in slots:
                    found.update(row.split(' / ')[column] for row in rows)
    return found


def any_of(words):
    """Return a pattern for one of the words; the longest comes first, so that a toy car is not a car."""
    ordered = sorted(words, key=lambda word: (-len(word), word))
    return rf"\b(?:{'|'.join(ordered)})\b"


def find(words, text):
    """Return the set of those words that the text has."""
    return set(re.findall(any_of(words), text))


def words_of_world(world):
    """Return the words that only stories of this world have: names, and what heroes have as hands."""
    names = ' '.join(NAMES[world].values()).split()
    return set(names) | table_words([WORLDS[world]], 'hand', 'judge')


OBJECTS = table_words([tables for _, tables, _ in PLOTS.values()], 'item')
HIDING_PLACES = table_words([PLOTS['lost toy'][1]], 'spot')
NAMES_BY_SEX = [set((NAMES['child'][sex] + ' ' + NAMES['animal'][sex]).split()) for sex in PRONOUNS]
# the world of a story is 'child' or 'animal'
WORLD_WORDS = {world: words_of_world(world) for world in WORLDS}
WORLD_PLACES = {world: table_words([WORLDS[world]], 'land', 'place') for world in WORLDS}


def check_consistency(story):
    """Return {kind: whether the story keeps it to the end}, without the kinds that the story does not have.

    name: the last paragraph names the hero, and nobody else in the story is of the hero's sex.
    animal: an animal's story has no name, hand or judge of a child's story, and the other way round.
    object: the first object of the first paragraph is in the last one, too.
    place: it suits the hero, a child or an animal; what was lost in one spot is found in that spot.
    A story that does not begin with a hero keeps neither its name nor its animal.
    """
    first, _, rest = story.partition('\n\n')
    last = rest.split('\n\n')[-1]  # '' if there is one paragraph only
    kept = {'name': False, 'animal': False}

    hero = re.search(rf"\b(boy|girl|{ANIMALS.replace(' ', '|')}) named (\w+)", first)
    if hero:
        kind, name = hero.groups()
        if kind in ANIMALS.split():
            own_world, other_world = 'animal', 'child'
        else:
            own_world, other_world = 'child', 'animal'
        names_of_sex = next((names for names in NAMES_BY_SEX if name in names), {name})
        kept['name'] = bool(find({name}, last)) and find(names_of_sex, story) == {name}
        kept['animal'] = not find(WORLD_WORDS[other_world], story)
        own_places, other_places = WORLD_PLACES[own_world], WORLD_PLACES[other_world]
        spots = find(HIDING_PLACES, story)
        if spots or find(own_places | other_places, story):
            kept['place'] = not find(other_places - own_places, story) and len(spots) < 2

    item = re.search(any_of(OBJECTS), first)
    if item:
        kept['object'] = bool(find({item[0]}, last))
    return kept


def share_consistent(stories, kind):
    """Return the share of the stories that keep their name, animal, object or place (`kind`) to the end.

    Stories that have none do not count; nan if no story has one.
    """
    n_kept = n_checked = 0
    for story in stories:
        kept = check_consistency(story)
        if kind in kept:
            n_checked += 1
            n_kept += kept[kind]
    if n_checked == 0:
        return math.nan
    return n_kept / n_checked
