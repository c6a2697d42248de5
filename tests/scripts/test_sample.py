"""sample.py: what it asks the model, what it prints, and the script as a user starts it."""

import io
import math
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

import core.generate
import sample
from configurator import SettingError, UserError, settings
from core.checkpoint import load_checkpoint, load_model
from core.native import NativeModel
from data import infill
from data.tokenizer import CharTokenizer
from tests.helpers.scripts import ROOT, STORIES, script

CHAR = CharTokenizer.train(STORIES)  # the tokenizer of the fixture `run`
A, B, C, SPACE = (CHAR.encode(letter)[-1] for letter in 'abc ')
END = CHAR.delimiter
FIRST, LAST = 'Once there was a cat.', 'It slept.'
BOTH_ENDS = {'first_sentence': f' {FIRST} ', 'last_sentence': f' {LAST} '}


class Terminal(io.TextIOWrapper):
    """A terminal that keeps what it shows."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding='utf-8', write_through=True)

    def isatty(self):
        return True

    def shown(self):
        return self.buffer.getvalue().decode()


@pytest.fixture
def generated(monkeypatch):
    """A stand-in for `generate`, which generates the tokens in `generated.rows`, a list for each row."""
    generated = Mock(side_effect=lambda *_, **__: torch.tensor(generated.rows).T)
    monkeypatch.setattr(core.generate, 'generate', generated)
    return generated


@pytest.fixture
def write(run, tmp_path, monkeypatch, capsys):
    """write(**settings) runs sample.main() with a model that can infill; returns (stories, stderr)."""
    torch.save(load_checkpoint(run[0] / 'best.pt') | {'infill_rate': 0.5}, tmp_path / 'best.pt')
    defaults = settings(vars(sample)) | {'out_dir': str(tmp_path), 'device': 'cpu', 'num_samples': 2}

    def main(**changes):
        for name, value in (defaults | changes).items():
            monkeypatch.setattr(sample, name, value)
        sample.main()
        out, err = capsys.readouterr()
        return out.removesuffix('\n').split('\n---\n'), err
    return main


# what is asked of the model -----------------------------------------------------

def test_sampling_settings_reach_the_model(generated, write):
    generated.rows = [[A, END]]
    changes = {'temperature': 0.7, 'top_k': 5, 'top_p': 0.6, 'seed': 3, 'compile': True}
    assert write(start='b', num_samples=1, max_new_tokens=7, **changes) == (['ba'], '')
    model, idx, limit = generated.call_args.args
    assert idx.tolist() == [[END, *CHAR.encode('b')]] and limit == 7
    assert isinstance(model, torch.nn.Module) and not model.training
    arguments = dict(generated.call_args.kwargs)
    assert arguments.pop('forced_tokens').shape == (1, 0)
    assert arguments == changes | {'suppress': (CHAR.blank, CHAR.middle)}


def test_each_line_of_a_file_starts_its_own_stories(generated, write, tmp_path):
    """Starts of three lengths; a token at a place where a longer start is being read is not written."""
    (tmp_path / 'prompts.txt').write_text('b\n\nbaa\r\nba\n')
    generated.rows = [[C, C, A, A], [C, END, A, A], [B, B, C, C], [B, B, END, C], [B, C, C, END],
                      [B, END, C, C]]
    changes = {'start': f'FILE:{tmp_path}/prompts.txt', 'one_per_line': True, 'max_new_tokens': 2}
    assert write(**changes)[0] == ['bcc', 'bc', 'baacc', 'baa', 'bacc', 'ba']
    idx, forced = generated.call_args.args[1], generated.call_args.kwargs['forced_tokens']
    assert idx.tolist() == [[END, *CHAR.encode('b')]] * 6
    assert forced.tolist() == [[-1, -1]] * 2 + [[A, A]] * 2 + [[A, -1]] * 2


def test_whole_file_starts_every_story(generated, write, tmp_path):
    (tmp_path / 'start.txt').write_bytes(b'\xef\xbb\xbfba\r\nb')
    generated.rows = [[C, END], [A, END]]
    assert write(start=f'FILE:{tmp_path}/start.txt')[0] == ['ba\nbc', 'ba\nba']


@pytest.mark.parametrize('content, error', [
    (b' \n\n', 'has no line to start a story with'), (b'\xff', 'cannot be read as UTF-8 text'),
    (b'a' * 10_000_001, 'more than 10,000,000 bytes'), (None, 'No such file')])
def test_unusable_start_files_are_rejected(write, tmp_path, content, error):
    if content is not None:
        (tmp_path / 'prompts.txt').write_bytes(content)
    with pytest.raises(UserError, match=error):
        write(start=f'FILE:{tmp_path}/prompts.txt', one_per_line=True)


def test_start_can_fill_the_context(generated, write):
    generated.rows = [[A, END]]
    start = 'b' * 62  # with the delimiter and the space that the tokenizer puts before it: 64 tokens
    assert write(start=start, num_samples=1)[0] == [start + 'a']
    with pytest.raises(UserError, match='a start has 65 tokens, more than the context of 64'):
        write(start=start + 'b', num_samples=1)


def test_model_and_tokens_are_on_the_device(write, generated, monkeypatch):
    monkeypatch.setattr(sample, 'choose_device', torch.device)
    monkeypatch.setattr('core.generate.free_gpu_memory', lambda device: 2**30)
    generated.rows = [[END], [END]]
    assert write(device='meta', start=' A dog ') == ([' A dog ', ' A dog '], '')
    model, idx, *_ = generated.call_args.args
    assert model.lm_head.weight.device.type == idx.device.type == 'meta'


@pytest.mark.parametrize('dtype, expected', [('float32', torch.float32), ('bfloat16', torch.bfloat16)])
def test_dtype_is_that_of_the_model(write, generated, dtype, expected):
    generated.rows = [[END], [END]]
    write(dtype=dtype)
    assert generated.call_args.args[0].embedding.weight.dtype == expected


def test_int8_is_the_engine_in_c(write, generated):
    generated.rows = [[END], [END]]
    write(dtype='int8')
    assert isinstance(generated.call_args.args[0], NativeModel)


def test_int8_is_for_cpus(write, monkeypatch):
    monkeypatch.setattr(sample, 'choose_device', torch.device)
    with pytest.raises(SettingError, match='dtype int8 is for a CPU, not for meta'):
        write(device='meta', dtype='int8')


@pytest.mark.parametrize('changes, message', [
    ({'ckpt': 'first'}, 'ckpt'), ({'dtype': 'int4'}, 'dtype'),
    ({'num_samples': 0}, 'num_samples'), ({'max_new_tokens': 0}, 'max_new_tokens'),
    ({'top_p': 0.0}, 'top_p'), ({'top_p': 1.1}, 'top_p'), ({'top_k': -1}, 'top_k'), ({'seed': -1}, 'seed'),
    ({'temperature': -1.0}, 'must be at least 0 and'),
    ({'temperature': 1e-50}, 'must be 0, or at least 1e-30'),
    ({'min_new_tokens': 2000}, 'min_new_tokens is 2000, more than max_new_tokens, 1000'),
    ({'one_per_line': True, 'start': 'a'}, 'type --start FILE:path'),
    ({'first_sentence': 'a'}, 'infilling needs both ends'),
    ({'first_sentence': 'a', 'last_sentence': 'b', 'start': 'c'}, 'leave out one'),
    ({'first_sentence': 'a', 'last_sentence': 'b', 'min_new_tokens': 1}, 'not for infilling')])
def test_contradicting_settings_are_rejected(write, changes, message):
    with pytest.raises(SettingError, match=message):
        write(**changes)


# what is printed ----------------------------------------------------------------

def test_finished_stories_are_printed_while_others_grow(write, monkeypatch):
    steps = [(B, B, B, END, A), (A, END, C, C, C), (B, B, B, END, C), (C, C, C, C, C)]
    n_steps, printed = 0, []

    def generate(*_, **__):
        nonlocal n_steps
        for step in zip(*steps, strict=True):
            n_steps += 1
            yield torch.tensor(step)

    monkeypatch.setattr(core.generate, 'generate', generate)
    monkeypatch.setattr(sample.tqdm, 'write', lambda text: printed.append((text, n_steps)))
    write(start='c', num_samples=4, max_new_tokens=5)
    assert printed == [('cbbb', 4), ('---\nca', 4), ('---\ncbbb', 4), ('---\ncccccc', 5)]


def test_stories_follow_one_another_until_min_new_tokens(generated, write, monkeypatch):
    for row, story, was_cut in (([A, END, SPACE, B, END, C], 'ca\n---\nb', False),
                                ([A, END, SPACE, B, C, C], 'ca\n---\nbcc', True)):
        generated.rows = [row]
        changes = {'start': 'c', 'num_samples': 1, 'min_new_tokens': 4, 'max_new_tokens': 6}
        stories, err = write(**changes)
        assert '\n---\n'.join(stories) == story
        assert err == ('1 of 1 stories were cut at --max_new_tokens 6\n' if was_cut else '')
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'stdout', terminal)
            write(**changes)
        assert terminal.shown() == story + '\n'


def test_infilled_middle_is_printed_between_both_sentences(write, generated):
    prompt = infill.prompt(CHAR, FIRST, LAST)
    room = 64 - len(prompt) + 1  # the last token is not read
    middles = ' It ran'.ljust(room, '!'), ' It did so'.ljust(room)  # neither ends
    generated.rows = [CHAR.encode(middle)[1:] for middle in middles]
    stories, err = write(**BOTH_ENDS)
    assert stories == [f'{FIRST}{middles[0]} {LAST}', f'{FIRST}{middles[1]}{LAST}']
    assert err == '2 of 2 stories were cut at the end of the context of 64 tokens\n'
    _, idx, limit = generated.call_args.args
    assert idx.tolist() == [prompt] * 2 and limit == room
    assert write(**BOTH_ENDS, max_new_tokens=9)[1] == '2 of 2 stories were cut at --max_new_tokens 9\n'


def test_model_without_infilling_is_rejected(write, run):
    with pytest.raises(UserError, match='has not learned infilling'):
        write(**BOTH_ENDS, out_dir=str(run[0]))


def test_lone_story_streams_on_a_terminal(write, monkeypatch):
    """Each token is shown before the next one is asked for; no part of a character is shown."""
    terminal, shown = Terminal(), []

    def generate(*_, **__):
        for token in [*CHAR.encode('\u00e9'), END]:  # a space, two bytes, the end
            shown.append(terminal.shown())
            yield torch.tensor([token])

    monkeypatch.setattr(core.generate, 'generate', generate)
    monkeypatch.setattr(sys, 'stdout', terminal)
    write(**BOTH_ENDS, num_samples=1)
    assert shown == ['', f'{FIRST} ', f'{FIRST} ', f'{FIRST} \u00e9']
    assert terminal.shown() == f'{FIRST} \u00e9 {LAST}\n'


def test_that_a_story_was_cut_is_printed_after_it(write, generated, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setattr(sys, 'stderr', terminal)
    generated.rows = [[A, B]]
    write(start='c', num_samples=1, max_new_tokens=2)
    assert terminal.shown() == 'cab\n1 of 1 stories were cut at --max_new_tokens 2\n'


def test_terminal_gets_no_control_characters(write, generated, monkeypatch):
    escape = CHAR.encode('\x1b')[1:]
    generated.rows = [[A, *escape, END]] * 2
    assert write()[0] == ['a\x1b'] * 2
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    write()
    generated.rows = [[A, *escape, END]]
    write(num_samples=1)
    assert terminal.shown() == 'a\ufffd\n---\na\ufffd\na\ufffd\n'


# as a user starts it ------------------------------------------------------------

def test_greedy_stories_are_what_the_weights_say(run, data, tmp_path):
    """Against the argmax of the model's own logits; sampling needs no data folder."""
    model = load_model(load_checkpoint(run[0] / 'best.pt'))
    ids = [END, *CHAR.encode('A dog')]
    for _ in range(30):
        logits = model(torch.tensor([ids]))[0, -1]
        logits[[CHAR.blank, CHAR.middle]] = -math.inf
        ids.append(logits.argmax().item())
        if ids[-1] == END:
            break
    story = CHAR.decode(ids)
    (tmp_path / 'start.txt').write_text('A dog')
    flags = '--num_samples=2', '--temperature=0', '--max_new_tokens=30', '--start=FILE:start.txt'
    data.rename(tmp_path / 'away')
    try:
        done = script('sample.py', '--out_dir', run[0], *flags, cwd=tmp_path)
    finally:
        (tmp_path / 'away').rename(data)
    assert done.out == f'{story}\n---\n{story}\n'


def test_ckpt_and_init_from_choose_the_weights(run, write, monkeypatch):
    """best.pt and ckpt.pt are of different steps; each of them can be named as a file."""
    greedy = {'temperature': 0.0, 'num_samples': 1, 'max_new_tokens': 40}
    torch.save(load_checkpoint(run[0] / 'best.pt'), run[0].parent / 'lone.pt')
    best = write(**greedy, out_dir=str(run[0]))
    monkeypatch.setattr(sample, '_DEFAULT_OUT_DIR', 'nowhere')
    assert write(**greedy, out_dir='nowhere', init_from=str(run[0].parent / 'lone.pt')) == best
    with pytest.raises(UserError, match='no checkpoint'):
        write(**greedy, ckpt='last')  # the folder of the fixture has best.pt only


def test_no_slow_module_is_imported_for_a_story(run):
    """torch takes two seconds to import; nothing else that is slow may come with it."""
    flags = f'--out_dir={run[0]}', '--num_samples=1', '--max_new_tokens=3', '--device=cpu'
    done = subprocess.run([sys.executable, '-X', 'importtime', 'sample.py', *flags], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = set(re.findall(r'\| +([\w.]+)$', done.stderr, re.M))
    assert {'torch', 'core.generate'} <= imported
    slow = {'torch._dynamo', 'sympy', 'matplotlib', 'datasets', 'pandas', 'pyarrow', 'transformers',
            'sentencepiece', 'tiktoken', 'wandb'}
    assert not imported & slow
