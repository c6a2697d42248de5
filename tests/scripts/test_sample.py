"""sample.py: what it asks of the model and makes of the answer, and as a user starts it."""

import io
import math
import sys
from unittest.mock import Mock

import pytest
import torch

import sample
from configurator import SettingError, UserError
from core import generate as writing
from core.checkpoint import load_checkpoint, load_model
from data import infill
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig
from tests.helpers.scripts import STORIES, script

CHAR = CharTokenizer.train(STORIES)  # that of the trained run
MODEL = GPT(GPTConfig(block_size=64, n_layer=1, n_head=1, n_embd=8))
FIRST, LAST = 'Once there was a cat.', 'It slept.'
ENDS = {'first_sentence': f' {FIRST} ', 'last_sentence': f' {LAST} '}


@pytest.fixture
def asked(monkeypatch):
    """Stands for `generate`, and gives the tokens in asked.rows."""
    asked = Mock(side_effect=lambda *_, **__: torch.tensor(asked.rows).T)
    monkeypatch.setattr(writing, 'generate', asked)
    return asked


def test_a_story_ends_and_is_shown_where_it_ends_though_others_go_on(monkeypatch):
    a, b, c = CHAR.encode('abc')[1:]
    drawn, steps = [], zip((b, b, b, 1, a), (a, 1, c, c, c), (b, b, b, 1, c), (c, c, c, c, c), strict=True)
    monkeypatch.setattr(writing, 'generate', lambda *_, **__: (
        drawn.append(step) or torch.tensor(step) for step in steps))
    monkeypatch.setattr(sample, 'num_samples', 4)
    monkeypatch.setattr(sample, 'max_new_tokens', 5)
    shown = [(text, len(drawn)) for text in sample.write_stories(MODEL, CHAR, ['c'], '', stream=False)]
    assert shown == [('cbbb', 4), ('ca', 4), ('cbbb', 4), ('cccccc', 5)]


def test_each_prompt_of_a_file_begins_its_own_stories(asked, monkeypatch, tmp_path):
    """Prompts of three lengths, two stories of each; a token in the place of a prompt's is not written."""
    a, b, c = CHAR.encode('abc')[1:]
    (tmp_path / 'prompts.txt').write_text('b\n\nbaa\r\nba\n')
    for name, value in {'start': f'FILE:{tmp_path}/prompts.txt', 'one_per_line': True, 'num_samples': 2,
                        'max_new_tokens': 2}.items():
        monkeypatch.setattr(sample, name, value)
    begins = sample.read_starts()
    assert begins == ['b', 'baa', 'ba']
    asked.rows = [[c, c, a, a], [c, 1, a, a], [b, b, c, c], [b, b, 1, c], [b, c, c, 1], [b, 1, c, c]]
    assert list(sample.write_stories(MODEL, CHAR, begins, '', stream=False)) == [
        'bcc', 'bc', 'baacc', 'baa', 'bacc', 'ba']
    idx, given = asked.call_args.args[1], asked.call_args.kwargs['given']
    assert idx.tolist() == [[1, *CHAR.encode('b')]] * 6
    assert given.tolist() == [[-1, -1]] * 2 + [[a, a]] * 2 + [[a, -1]] * 2
    (tmp_path / 'prompts.txt').write_text(' \n\n')
    with pytest.raises(UserError, match='has no line to begin a story with'):
        sample.read_starts()


def test_stories_follow_one_another_until_there_is_enough(asked, monkeypatch, capsys):
    a, b, c = CHAR.encode('abc')[1:]
    for name, value in {'num_samples': 1, 'min_new_tokens': 4, 'max_new_tokens': 6}.items():
        monkeypatch.setattr(sample, name, value)
    space = CHAR.encode(' ')[1]  # which begins each story
    for row, story in ([a, 1, space, b, 1, c], 'ca\n---\nb'), ([a, 1, space, b, c, c], 'ca\n---\nbcc'):
        asked.rows = [row]
        for stream in False, True:
            *_, text = sample.write_stories(MODEL, CHAR, ['c'], '', stream)
            assert text == story + '\n' * stream
        cut = row[4] != 1
        assert capsys.readouterr().err == cut * 2 * '1 of 1 stories were cut at --max_new_tokens 6\n'


@pytest.mark.parametrize('settings, message', [
    ({'min_new_tokens': 2000}, 'min_new_tokens is 2000, more than max_new_tokens, 1000'),
    ({'min_new_tokens': 1, 'first_sentence': 'a', 'last_sentence': 'b'}, 'not for a middle'),
    ({'one_per_line': True, 'start': 'a'}, 'type --start FILE:path')])
def test_what_no_sample_can_mean(monkeypatch, settings, message):
    for name, value in settings.items():
        monkeypatch.setattr(sample, name, value)
    with pytest.raises(SettingError, match=message):
        sample.check_settings()


def test_all_settings_reach_the_model(asked, monkeypatch):
    settings = {'num_samples': 1, 'max_new_tokens': 7, 'temperature': 0.7, 'top_k': 5, 'top_p': 0.6,
                'seed': 3, 'compile': True}
    for name, value in settings.items():
        monkeypatch.setattr(sample, name, value)
    asked.rows = [[*CHAR.encode('a')[1:], CHAR.delimiter]]
    assert list(sample.write_stories(MODEL, CHAR, ['b'], '', stream=False)) == ['ba']
    model, idx, limit = asked.call_args.args
    assert model is MODEL and idx.tolist() == [[1, *CHAR.encode('b')]] and limit == 7
    assert asked.call_args.kwargs.pop('given').shape == (1, 0)
    assert asked.call_args.kwargs == {'temperature': 0.7, 'top_k': 5, 'top_p': 0.6, 'seed': 3,
                                      'suppress': (CHAR.blank, CHAR.middle), 'compile': True}


def test_a_start_may_fill_the_context(asked):
    asked.rows = [[*CHAR.encode('a')[1:], CHAR.delimiter]] * 3
    start = 'b' * 62  # beside the delimiter and the space that the tokenizer puts before it
    assert list(sample.write_stories(MODEL, CHAR, [start], '', stream=False)) == [start + 'a'] * 3
    with pytest.raises(UserError, match='the start has 65 tokens, more than the context of 64'):
        list(sample.write_stories(MODEL, CHAR, [start + 'b'], '', stream=False))


def test_what_a_run_writes_is_what_its_weights_say(run, data, tmp_path):
    """Greedy, against the argmax of the model's own logits; the data need not be there."""
    model, ids = load_model(load_checkpoint(run[0] / 'best.pt')), [CHAR.delimiter, *CHAR.encode('A dog')]
    for _ in range(30):
        logits = model(torch.tensor([ids]))[0, -1]
        logits[[CHAR.blank, CHAR.middle]] = -math.inf
        ids.append(logits.argmax().item())
        if ids[-1] == CHAR.delimiter:
            break
    (tmp_path / 'start.txt').write_text('A dog')
    flags = '--num_samples=2', '--temperature=0', '--max_new_tokens=30', '--start=FILE:start.txt'
    data.rename(tmp_path / 'away')
    try:
        done = script('sample.py', '--out_dir', run[0], *flags, cwd=tmp_path)
    finally:
        (tmp_path / 'away').rename(data)
    assert done.out == '{0}\n---\n{0}\n'.format(CHAR.decode(ids))


@pytest.fixture
def write(run, tmp_path, monkeypatch, capsys):
    """write(**settings) is sample.main() on a terminal, of a model that can infill: (stories, stderr)."""
    torch.save(load_checkpoint(run[0] / 'best.pt') | {'infill_rate': 0.5}, tmp_path / 'best.pt')

    def main(**settings):
        for name, value in {'out_dir': str(tmp_path), 'device': 'cpu', 'num_samples': 2, **settings}.items():
            monkeypatch.setattr(sample, name, value)
        monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
        sample.main()
        out, err = capsys.readouterr()
        return out.removesuffix('\n').split('\n---\n'), err
    return main


def test_model_and_tokens_are_on_the_device(write, asked, monkeypatch):
    monkeypatch.setattr(sample, 'choose_device', torch.device)
    asked.rows = [[CHAR.delimiter]] * 2
    assert write(device='meta', start=' A dog ') == ([' A dog ', ' A dog '], '')
    model, idx, *_ = asked.call_args.args
    assert model.lm_head.weight.device.type == idx.device.type == 'meta'


def test_a_middle_stands_between_its_ends_in_sight_of_both(write, asked):
    prompt = infill.prompt(CHAR, FIRST, LAST)
    room = 64 - len(prompt) + 1  # the last one is not read
    middles = ' It ran'.ljust(room, '!'), ' It did so'.ljust(room)  # neither ends
    asked.rows = [CHAR.encode(middle)[1:] for middle in middles]
    stories, said = write(**ENDS)
    assert stories == [f'{FIRST}{middles[0]} {LAST}', f'{FIRST}{middles[1]}{LAST}']
    assert said == '2 of 2 stories were cut at the end of the context of 64 tokens\n'
    _, idx, limit, *_ = asked.call_args.args
    assert idx.tolist() == [prompt] * 2 and limit == room
    assert write(**ENDS, max_new_tokens=9)[1] == '2 of 2 stories were cut at --max_new_tokens 9\n'


def test_a_lone_story_grows_on_a_terminal(write, monkeypatch):
    """Each token is there before the next is asked for, and of a character nothing before it is whole."""
    terminal, shown = io.TextIOWrapper(io.BytesIO(), encoding='utf-8'), []

    def tokens(*_, **__):
        for token in [*CHAR.encode('\u00e9'), CHAR.delimiter]:  # a space, two bytes, the end
            shown.append(terminal.buffer.getvalue().decode())
            yield torch.tensor([token])

    monkeypatch.setattr(writing, 'generate', tokens)
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setattr(sys, 'stderr', terminal)
    write(**ENDS, num_samples=1)
    terminal.flush()
    assert shown == ['', f'{FIRST} ', f'{FIRST} ', f'{FIRST} \u00e9']
    assert terminal.buffer.getvalue().decode() == f'{FIRST} \u00e9 {LAST}\n'


def test_that_a_story_was_cut_is_told_after_it(write, asked, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding='utf-8', write_through=True)
    for name in 'stdout', 'stderr':
        monkeypatch.setattr(sys, name, terminal)
    asked.rows = [CHAR.encode('ab')[1:]]
    write(start='c', num_samples=1, max_new_tokens=2)
    assert terminal.buffer.getvalue() == b'cab\n1 of 1 stories were cut at --max_new_tokens 2\n'


@pytest.mark.parametrize('value, least', [(1e-50, '1e-30'), (-1.0, '0')])
def test_a_temperature_is_one_that_float32_can_divide_by(monkeypatch, value, least):
    monkeypatch.setattr(sample, 'temperature', value)
    with pytest.raises(SettingError, match=f'it must be at least {least} and'):
        sample.check_settings()
