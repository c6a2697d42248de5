"""Splits: which file is for training and which for validation, and how a document is cut."""

import pytest

from configurator import UserError
from data.splits import group_by_split, split_document


@pytest.mark.parametrize('train, val, left_out', [
    (['train.jsonl'], ['val.jsonl'], ['dev.jsonl', 'test.jsonl']),
    (['train.jsonl'], ['dev.jsonl'], ['eval.jsonl', 'holdout.jsonl', 'test.jsonl']),
    (['training.jsonl'], ['evaluation.jsonl'], ['testing.jsonl']),
    (['train.jsonl'], ['held-out.jsonl'], ['test.jsonl']),
    (['stories.jsonl'], ['test.jsonl'], []),
    (['train_00.txt', 'Train01.TXT'], ['Validation (1).txt', 'val2.txt.gz'], ['test-3.csv']),
    (['train-00000-of-00002-2d5a1467fff1081b.parquet', 'train-00001-of-00002.parquet'],
     ['validation-00000-of-00001-869c898b519ad725.parquet'], ['test-00000-of-00001.parquet']),
    (['train/a test.txt', 'train/b.txt'], ['valid/the train.txt'], ['test/val the fox.txt']),
    (['train', 'train.100'], ['validation'], ['test']),  # of a dataset
], ids=str)
def test_group_by_split_goes_by_names_that_consist_of_words_for_splits(train, val, left_out):
    found, line = group_by_split([*left_out, *train, *val])
    assert found == {'train': train, 'validation': val}
    expected = f"training: {', '.join(train)}; validation: {', '.join(val)}"
    assert line == expected + (f"; left out: {', '.join(left_out)}" if left_out else '')


@pytest.mark.parametrize('train, val, left_out', [
    (['TinyStories-train.txt'], ['TinyStories-valid.txt'], []),
    (['TinyStories-train.txt', 'V2-GPT4-train.txt'], ['TinyStories-valid.txt', 'V2-GPT4-valid.txt'], []),
    (['stories.jsonl'], ['sub/stories_val.jsonl'], []),
    (['train_data.csv'], ['val_data.csv'], ['test_data.csv']),
    (['train-v2.0.json'], ['dev-v2.0.json'], []),
    (['wiki.train.txt'], ['wiki.valid.txt'], ['wiki.test.txt']),
    (['stories-train/a.txt'], ['stories-val/b.txt'], []),
    (['train_sft', 'train_gen'], ['test_sft', 'test_gen'], []),
], ids=str)
def test_group_by_split_takes_names_that_differ_in_one_word(train, val, left_out):
    assert group_by_split([*train, *val, *left_out])[0] == {'train': train, 'validation': val}


@pytest.mark.parametrize('names', [
    ['a.txt', 'b.txt'],
    ['val.jsonl'],
    ['test.txt', 'test-2.txt'],
    ['TinyStories-valid.txt'],
    ['invalid.txt', 'values.txt', 'contest.txt', 'latest.txt', 'The eval.txt'],
    ['Val the fox.txt', 'the-big-test.txt', 'the-little-train.txt', 'Uncle_Dev.txt', "val's.txt"],
    ['train-val.txt', 'a.txt'],
    ['The Driving Test.txt', 'The Driving.txt', 'Moon.txt'],
    ['The Test.txt', 'The Val.txt'],
    ['a-valid.txt', 'b-train.txt'],
], ids=str)
def test_group_by_split_takes_other_names_for_training(names):
    found, line = group_by_split(names)
    assert found == {'train': names}
    assert line.startswith('training and validation: ')


def test_group_by_split_says_what_became_of_files_that_are_not_called_a_split():
    groups, line = group_by_split(['extra.txt', 'train.txt', 'Val the fox.txt', 'dev.txt'])
    assert groups['train'] == ['extra.txt', 'train.txt', 'Val the fox.txt']
    assert line == ('training: train.txt; also training, as not called a split: extra.txt, Val the fox.txt; '
                    'validation: dev.txt')
    assert group_by_split(['a.txt', 'Tiny-valid.txt'])[1].endswith(
        'a.txt, Tiny-valid.txt (if Tiny-valid.txt is for validation only, call it val)')


def test_group_by_split_prints_one_line_of_a_thousand_files_and_odd_names():
    names = [f'{i}.txt' for i in range(2000)]
    line = group_by_split(names)[1]
    assert line == 'training and validation: 2,000 files (0.txt, 1.txt, 2.txt, 3.txt, ...)'
    assert '\x1b' not in group_by_split(['\x1b[2J\n.txt'])[1]
    assert '\n' not in group_by_split(['\x1b[2J\n.txt'])[1]


def test_group_by_split_refuses_a_source_without_training():
    with pytest.raises(UserError, match=r'nothing to train on, only val\.txt, test\.txt: call a file train'):
        group_by_split(['val.txt', 'test.txt'])


@pytest.mark.parametrize('val_percentage, cut', [(0.0, 900), (50.0, 500), (1e-9, 999), (99.9999, 1)])
def test_split_document_holds_out_its_end(val_percentage, cut):
    text = ''.join(map(chr, range(0x4e00, 0x4e00 + 1000)))
    splits, line = split_document(text, 100.0, val_percentage)
    assert (splits['train']['text'], splits['validation']['text']) == ([text[:cut]], [text[cut:]])
    assert line == f'one document: its last {val_percentage or 10:g} percent are for validation'


def test_split_document_takes_the_starts_of_both_parts():
    splits, _ = split_document('a' * 800 + 'b' * 100 + 'c' * 100, 50.0, 20.0)
    assert (splits['train']['text'], splits['validation']['text']) == (['a' * 400], ['b' * 100])
