"""Vocabularies and merges for foreign files."""

from data.sentencepiece_file import CONTROL, NORMAL
from data.tokenizer_files import FIRST
from formats.pieces import gpt2_merges, merges_of, pieces_of
from tests.helpers.tokenizers import gpt2_file, needs_gpt2, trained_tokenizer

MADE_UP = [('t', -3.0, NORMAL), ('h', -3.0, NORMAL), ('e', -3.0, NORMAL), ('the', -2.0, NORMAL),
           ('th', -1.0, NORMAL), ('he', -1.0, NORMAL), ('<s>', 0.0, CONTROL)]


def test_merges_of_has_every_split_of_every_piece_best_score_first():
    assert merges_of(MADE_UP) == [('t', 'h'), ('h', 'e'), ('t', 'he'), ('th', 'e')]


def test_pieces_of_has_one_for_each_id_with_the_infilling_ones_last():
    for encoding in 'char', 'bpe', 'lossy':
        tokenizer = trained_tokenizer(encoding)
        pieces = pieces_of(tokenizer)
        assert len(pieces) == tokenizer.vocab_size
        assert pieces[:3] == FIRST[:3]
        assert (FIRST[3] in pieces) == tokenizer.lossless
        assert pieces[-2:] == [('<blank>', 0.0, CONTROL), ('<middle>', 0.0, CONTROL)]
        text, _, kind = pieces[tokenizer.encode('a')[-1]]
        assert text.endswith('a') and kind == NORMAL


@needs_gpt2
def test_gpt2_merges_are_those_of_its_own_file():
    """vocab.bpe has a version on its first line, then a merge per line."""
    expected = gpt2_file('vocab.bpe').read_text(encoding='utf-8').splitlines()[1:]
    pieces = pieces_of(trained_tokenizer('gpt2'))
    assert [' '.join(pair) for pair in gpt2_merges(pieces)] == expected
    assert pieces[50256] == ('<|endoftext|>', 0.0, CONTROL)
