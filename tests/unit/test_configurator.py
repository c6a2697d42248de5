"""The settings of a script: tables of cases for one small script."""

import importlib.util
import math
import os
import sys
from pathlib import Path

import pytest

import configurator
from configurator import SettingError, configure, in_range, one_of, settings

SCRIPT = '''"""Count to a number.

Second paragraph.
"""
import os
from math import pi
from string import digits

max_iters = 100  # steps of training
learning_rate = 1e-3  # peak rate  # after warmup
compile = False
flash: bool = True  # an annotated one
dtype = 'float#32'  # has a # in its value
start = 'a b'  # a string
_private = 3  # not a setting
table = [1, 2]  # not a setting
version = len(digits) - 8  # computed
if version:
    nested = 1  # not a setting: not at the top level
'''
DEFAULTS = {'max_iters': 100, 'learning_rate': 1e-3, 'compile': False, 'flash': True, 'dtype': 'float#32',
            'start': 'a b', 'version': 2}
FILES = {
    'plain.py': 'max_iters = 7\n',
    'same.py': 'max_iters = 100\n',
    'double.py': 'max_iters = 2 * max_iters\n',
    'ten.json': '{"max_iters": 10, "dtype": "ten"}',
    'both.py': "dtype = 'py'\n",
    'both.json': '{"dtype": "json"}',
    'bom.json': '\ufeff{"max_iters": 11}',
    'helpers.py': '''"""Docstring."""
import math
import os
from math import *
from math import e as euler
_steps = 3
class Schedule: pass
def twice(x):
    result = 2 * x
    return result
half = lambda x: x // 2
learning_rate = 1  # an int for a float
max_iters = twice(_steps) + sum(i for i in range(3)) + half(int(pi))
''',
    'subclass.py': 'class Rate(float): pass\nlearning_rate = Rate(2)\n',  # as numpy's float64 is
    'imports_it.py': 'from math import e as learning_rate\n',
    'deleted.py': 'del max_iters\n',
    'notes.txt': 'max_iters = 1\n',
}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Import the script in a working directory whose folder config/ contains FILES; return the module."""
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'config').mkdir()
    for name, text in FILES.items():
        (tmp_path / 'config' / name).write_text(text, encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['some/script.py'])
    spec = importlib.util.spec_from_file_location('script', tmp_path / 'script.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rejected(script, capsys, *argv, **options):
    """Run `configure` with a mistake; return the one line that it prints before it exits with status 2."""
    before = dict(vars(script))
    with pytest.raises(SystemExit) as exit:
        configure(vars(script), list(argv), **options)
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, '')
    assert err.startswith('script.py: ') and err.endswith('\n') and err.count('\n') == 1
    assert vars(script) == before
    return err.removeprefix('script.py: ')


def test_settings_are_the_public_plain_globals_of_the_script(script):
    assert settings(vars(script)) == DEFAULTS
    configure(vars(script), ['--max_iters=5'])
    Path('script.py').write_text('half-saved (')  # an edit while the script runs changes nothing
    assert settings(vars(script)) == DEFAULTS | {'max_iters': 5}


@pytest.mark.parametrize(('argv', 'changed'), [
    # flags
    ('--max_iters 5', {'max_iters': 5}),
    ('--max_iters=5', {'max_iters': 5}),
    ('--max_iters -1', {'max_iters': -1}),
    ('--learning_rate 1', {'learning_rate': 1.0}),
    ('--compile True', {'compile': True}),
    ('--flash False', {'flash': False}),
    ('--compile --max_iters 5', {'compile': True, 'max_iters': 5}),
    ('--compile config/plain.py', {'compile': True, 'max_iters': 7}),
    ('--dtype=--a=b', {'dtype': '--a=b'}),
    ('--dtype 16', {'dtype': '16'}),
    ('--dtype -- --compile', {'dtype': '--', 'compile': True}),
    ('--dtype=', {'dtype': ''}),
    ('--dtype=~/a', {'dtype': os.path.expanduser('~/a')}),
    ('--dtype=~/a,b~/c,~/d', {'dtype': os.path.expanduser('~/a') + ',b~/c,' + os.path.expanduser('~/d')}),
    ('--dtype=~', {'dtype': '~'}),
    (['--start', ' Once upon\n"a" time '], {'start': ' Once upon\n"a" time '}),
    # files
    ('config/plain', {'max_iters': 7}),
    ('--config_file config/plain.py', {'max_iters': 7}),
    ('config/both', {'dtype': 'py'}),
    ('config/bom.json', {'max_iters': 11}),
    ('config/helpers.py', {'learning_rate': 1.0, 'max_iters': 10}),
    ('config/subclass.py', {'learning_rate': 2.0}),
    ('config/imports_it.py', {'learning_rate': math.e}),
    ('config/deleted.py', {}),
    # precedence: defaults, files in their order, flags wherever they are
    ('config/ten config/double', {'max_iters': 20, 'dtype': 'ten'}),
    ('--max_iters 3 config/double', {'max_iters': 3}),
])
def test_configure_overrides_settings(script, monkeypatch, argv, changed):
    words = argv.split() if isinstance(argv, str) else argv
    monkeypatch.setattr(sys, 'argv', ['some/script.py', *words])
    configure(vars(script))
    result = settings(vars(script))
    assert result == DEFAULTS | changed
    assert [*map(type, result.values())] == [*map(type, DEFAULTS.values())]
    assert script.pi > 3 and script._private == 3 and script.table == [1, 2]


@pytest.mark.parametrize(('argv', 'message'), [
    ('--max_iter 5',
     "unknown setting 'max_iter' on the command line; did you mean 'max_iters'? (--help lists all)\n"),
    ('--lr 5', "unknown setting 'lr' on the command line; did you mean 'learning_rate'?"),
    ('--n_heads 5', "unknown setting 'n_heads' on the command line; another script has 'n_head'"),
    ('--max_iters 1 --max_iters=2', '--max_iters is given twice on the command line'),
    ('--zzz 5', "unknown setting 'zzz' on the command line (--help lists all)"),
    ('--max_iters abc', "'max_iters' on the command line must be an int, not 'abc'"),
    ('--max_iters 1e3', "'max_iters' on the command line must be an int, not 1000.0"),
    ('--max_iters True', "'max_iters' on the command line must be an int, not True"),
    ('--learning_rate 1e999', "'learning_rate' on the command line must be a finite number, not inf"),
    ('--compile true', "'compile' on the command line must be True or False, not 'true'"),
    ('--compile 1', "'compile' on the command line must be True or False, not 1"),
    ('--dtype', '--dtype needs a value (if the value starts with --, type --dtype=--...)'),
    ('--dtype --compile', '--dtype needs a value'),
    ('-x', "unknown setting '-x' on the command line"),
    ('--max_iter 5 --zzz 5 config/plane', "unknown setting 'max_iter' on the command line"),
    ('--max_iters 1if', "'max_iters' on the command line must be an int, not '1if'"),
    ('config/plane', "no config file 'config/plane' (.py or .json); did you mean 'config/plain.py'?"),
    ('nowhere/x.json', "no config file 'nowhere/x.json' (.py or .json)\n"),
    ('config/notes.txt', "no config file 'config/notes.txt' (.py or .json)"),
])
def test_configure_reports_a_mistake_on_the_command_line_in_one_line(script, capsys, argv, message):
    assert rejected(script, capsys, *argv.split()).startswith(message)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('x.py', b'max_iter = 5', "unknown setting 'max_iter' in config/x.py; did you mean 'max_iters'? (--help"),
    ('x.py', b'for i in range(3):\n    max_iters = i', "unknown setting 'i' in config/x.py"),
    ('x.py', b'max_iters = 1\nmax_iters = = 2', 'config/x.py, line 2: SyntaxError: invalid syntax'),
    ('x.py', b'def f(x):\n    return [][x]\n\nf(0)', 'config/x.py, line 2: IndexError: list index out of'),
    ('x.py', b"import pathlib\npathlib.Path('no_such_file').read_text()",
     'config/x.py, line 2: FileNotFoundError: '),
    ('x.json', b'{"_private": 5}', "unknown setting '_private' in config/x.json"),
    ('x.json', b'{"dtype": 5}', "'dtype' in config/x.json must be a str, not 5"),
    ('x.json', b'{"dtype": "a\\u0000b"}',
     r"'dtype' in config/x.json contains a NUL or an invalid character: 'a\x00b'"),
    ('x.json', b'{"dtype": "\\ud800"}',
     r"'dtype' in config/x.json contains a NUL or an invalid character: '\ud800'"),
    ('x.json', b'{"learning_rate": NaN}', "'learning_rate' in config/x.json must be a finite number, not"),
    ('x.json', b'{"learning_rate": 1' + b'0' * 400 + b'}',
     "'learning_rate' in config/x.json must be a finite number, not 1000"),
    ('x.json', b'[1]', 'config/x.json must contain an object, {"name": value, ...}, not [1]'),
    ('x.json', b'{"max_iters": 1,\n "dtype": }', 'config/x.json, line 2: json.decoder.JSONDecodeError: '),
    ('x.json', b'{"dtype": "\xe9"}', "config/x.json: UnicodeDecodeError: 'utf-8' codec can't decode"),
])
def test_configure_reports_a_mistake_in_a_config_file_in_one_line(script, capsys, name, content, message):
    Path('config', name).write_bytes(content)
    assert rejected(script, capsys, 'config/plain.py', f'config/{name}').startswith(message)


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_lists_each_setting_with_type_default_and_comment(script, capsys, flag):
    with pytest.raises(SystemExit) as exit:
        configure(vars(script), ['config/plain.py', flag])
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, '')
    assert out == """Count to a number.

Second paragraph.

usage: python some/script.py [config file, .py or .json ...] [--key value ...]

settings:
  --max_iters      int = 100                 steps of training
  --learning_rate  float = 0.001             peak rate  # after warmup
  --compile        bool = False
  --flash          bool = True               an annotated one
  --dtype          str = 'float#32'          has a # in its value
  --start          str = 'a b'               a string
  --version        int = 2                   computed
"""


@pytest.mark.parametrize(('argv', 'saved', 'changed'), [
    ('', {'learning_rate': 1}, {'learning_rate': 1.0}),
    ('', {'removed_since': 50, 'dtype': 'old'}, {'dtype': 'old'}),
    ('config/plain.py', {'max_iters': 50, 'dtype': 'old'}, {'max_iters': 7, 'dtype': 'old'}),
    ('config/same.py', {'max_iters': 50}, {'max_iters': 100}),  # even though it is the default
    ('config/double.py', {'max_iters': 50}, {'max_iters': 100}),
    ('config/double.py', {'dtype': 'old'}, {'max_iters': 200, 'dtype': 'old'}),
    ('--max_iters 3', {'max_iters': 50, 'dtype': 'old'}, {'max_iters': 3, 'dtype': 'old'}),
])
def test_checkpoint_settings_override_defaults_only(script, argv, saved, changed):
    configure(vars(script), argv.split(), base=lambda _: saved)
    assert settings(vars(script)) == DEFAULTS | changed


def test_base_is_called_once_with_the_settings_of_this_call(script):
    calls = []
    configure(vars(script), ['--dtype=x', 'config/plain'], base=calls.append)  # returns None
    assert calls == [DEFAULTS | {'max_iters': 7, 'dtype': 'x'}]
    assert settings(vars(script)) == calls[0]


def test_configure_reports_a_mistake_in_the_checkpoint(script, capsys):
    def missing(_):
        raise SettingError('no checkpoint in out/')

    assert rejected(script, capsys, base=missing) == 'no checkpoint in out/\n'
    assert rejected(script, capsys, base=lambda _: {'dtype': 16}) == \
        "'dtype' in the checkpoint must be a str, not 16\n"


def test_a_deleted_working_directory_is_one_line(script, capsys, tmp_path, monkeypatch):
    (tmp_path / 'gone').mkdir()
    monkeypatch.chdir('gone')
    (tmp_path / 'gone').rmdir()
    with pytest.raises(SystemExit) as exit:
        configure(vars(script), [])
    line = 'script.py: the working directory has been deleted: cd to a folder that exists\n'
    assert (exit.value.code, capsys.readouterr().err) == (1, line)
    assert configurator.script_path('train.py') == str(configurator.ROOT / 'train.py')  # deleted during a run
    monkeypatch.chdir(tmp_path)


ALTERNATIVES = 'max_iters', 'learning_rate', 'version'  # as max_iters and max_epochs of train.py


@pytest.mark.parametrize(('argv', 'saved', 'changed'), [
    ('', {}, {}),
    ('', {'learning_rate': 3.0, 'max_iters': 50}, {'learning_rate': 3.0, 'max_iters': 50}),
    ('--learning_rate 3', {}, {'learning_rate': 3.0, 'version': 0}),
    ('--max_iters 40', {'learning_rate': 3.0, 'max_iters': 50},
     {'max_iters': 40, 'learning_rate': 0.0, 'version': 0}),
    ('config/plain.py', {'learning_rate': 3.0}, {'max_iters': 7, 'learning_rate': 0.0, 'version': 0}),
    ('config/same.py', {'learning_rate': 3.0}, {'max_iters': 100, 'learning_rate': 0.0, 'version': 0}),
    ('config/imports_it.py --max_iters 5', {}, {'max_iters': 5, 'learning_rate': 0.0, 'version': 0}),
    ('config/plain.py config/imports_it.py', {}, {'max_iters': 7, 'learning_rate': math.e, 'version': 0}),
    ('config/both.py', {'learning_rate': 3.0}, {'dtype': 'py', 'learning_rate': 3.0}),
    ('config/ten.json --learning_rate 0', {'version': 9},
     {'max_iters': 10, 'dtype': 'ten', 'learning_rate': 0.0, 'version': 0}),
])
def test_of_alternatives_the_one_given_last_counts(script, argv, saved, changed):
    configure(vars(script), argv.split(), base=lambda _: saved, alternatives=ALTERNATIVES)
    assert settings(vars(script)) == DEFAULTS | changed


def test_two_alternatives_in_one_place_are_refused(script, capsys):
    line = rejected(script, capsys, '--max_iters=5', '--learning_rate=2', alternatives=ALTERNATIVES)
    assert line == 'max_iters and learning_rate are both given on the command line: leave out one of them\n'
    line = rejected(script, capsys, 'config/helpers.py', alternatives=ALTERNATIVES)
    assert line.startswith('max_iters and learning_rate are both given in config/helpers.py: ')


def test_config_of_the_repository_is_found_from_another_folder(script, monkeypatch, tmp_path):
    monkeypatch.setattr(configurator, 'ROOT', tmp_path)
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir('elsewhere')
    configure(vars(script), ['config/plain'])
    assert script.max_iters == 7
    Path('config').mkdir()
    Path('config/plain.json').write_text('{"max_iters": 8}')  # the working directory comes first
    configure(vars(script), ['config/plain'])
    assert script.max_iters == 8


@pytest.mark.parametrize(('limits', 'values', 'message'), [
    ({'above': 0, 'at_most': 1}, {'a': 0}, 'a is 0; it must be above 0 and at most 1'),
    ({'above': 0, 'at_most': 1}, {'a': 1, 'b': 2}, 'b is 2; it must be above 0 and at most 1'),
    ({'at_least': 1, 'below': 5}, {'c': 5}, 'c is 5; it must be at least 1 and below 5'),
    ({'at_least': 1, 'below': 5}, {'c': 0}, 'c is 0; it must be at least 1 and below 5'),
])
def test_in_range_names_the_setting_and_its_limits(limits, values, message):
    with pytest.raises(SettingError) as raised:
        in_range(**limits, **values)
    assert str(raised.value) == message


def test_in_range_accepts_the_limits():
    in_range(above=0, at_most=1, a=1, b=0.5)
    in_range(at_least=1, below=5, c=1, d=4.9)
    in_range(e=1e300)


def test_one_of_names_the_setting_and_its_choices():
    one_of(('x', 'y'), d='y')
    with pytest.raises(SettingError) as raised:
        one_of(('x', 'y'), d='z')
    assert str(raised.value) == "d is 'z'; it must be one of x, y"
