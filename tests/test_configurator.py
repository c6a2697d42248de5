"""Every rule of the settings, as tables of cases over one small script."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import SettingError, UserError, configure, run, settings

SCRIPT = '''"""Count to a number.

Second paragraph.
"""
import os
from math import pi
from string import digits

from configurator import configure, run

max_iters = 100  # steps of training
learning_rate = 1e-3  # peak rate  # after warmup
compile = False
flash: bool = True  # an annotated one
dtype = 'float#32'  # has a # in its value
start = ('a '
         'b')  # comment after a value of two lines
_private = 3  # no setting
table = [1, 2]  # no setting
version = len(digits) - 8  # computed
if version:
    nested = 1  # no setting: not at the top level


def main():
    local = 1
    print(max_iters, learning_rate, compile, dtype, start)


if __name__ == '__main__':
    configure(globals())
    run(main)
'''
DEFAULTS = {'max_iters': 100, 'learning_rate': 1e-3, 'compile': False, 'flash': True, 'dtype': 'float#32',
            'start': 'a b', 'version': 2}
FILES = {
    'plain.py': 'max_iters = 7\n',
    'double.py': 'max_iters = 2 * max_iters\n',
    'ten.json': '{"max_iters": 10, "dtype": "ten"}',
    'both.py': "dtype = 'py'\n",
    'both.json': '{"dtype": "json"}',
    'bom.json': '\ufeff{"max_iters": 11}',
    'own_affairs.py': '''"""Docstring."""
import math
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
    'main_guard.py': "if __name__ == '__main__':\n    max_iters = 1\n",
    'same.py': 'max_iters = 100\n',
    'deleted.py': 'del max_iters\n',
    # mistakes
    'unknown.py': 'max_iter = 5\n',
    'unknown.json': '{"max_iter": 5}',
    'private.json': '{"_private": 5}',
    'imported.json': '{"pi": 3.0}',
    'a_list.py': 'betas = [0.9, 0.95]\n',
    'a_dict.py': 'optimizer = dict(rate=1)\n',
    'a_none.py': 'max_iters = None\n',
    'loop.py': 'for i in range(3):\n    max_iters = i\n',
    'bool_for_int.py': 'max_iters = True\n',
    'int_for_bool.py': 'compile = 1\n',
    'float_for_int.json': '{"max_iters": 5.0}',
    'str_for_int.json': '{"max_iters": "5"}',
    'int_for_str.json': '{"dtype": 5}',
    'bool_for_float.json': '{"learning_rate": true}',
    'null.json': '{"dtype": null}',
    'nested.json': '{"dtype": {"a": 1}}',
    'nan.json': '{"learning_rate": NaN}',
    'overflow.json': '{"learning_rate": 1e999}',
    'big.json': '{"learning_rate": 1' + '0' * 400 + '}',
    'nan.py': "learning_rate = float('nan')\n",
    'function.py': 'def start(): pass\n',
    'duplicate.json': '{"max_iters": 1, "dtype": "a", "max_iters": 2}',
    'array.json': '[1, 2]',
    'broken.json': '{"max_iters": 1,\n "dtype": }',
    'empty.json': '',
    'deep.json': '[' * 200_000,
    'syntax.py': 'max_iters = 1\nmax_iters = = 2\n',
    'outside.py': 'max_iters = 1\nreturn 2\n',
    'raises.py': 'def f(x):\n    return [][x]\n\nmax_iters = f(0)\n',
    'raises_lines.py': "raise ValueError('one\\ntwo')\n",
    'no_module.py': '\nimport no_such_module\n',
    'no_name.py': 'max_iters = 2 * max_iter\n',
    'opens.py': "\n\nopen('no_such_file')\n",
    'notes.txt': 'max_iters = 1\n',
}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The imported script, in a current folder with config/ and a file of each name above."""
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'config').mkdir()
    for name, text in FILES.items():
        (tmp_path / 'config' / name).write_text(text, encoding='utf-8')
    (tmp_path / 'config' / 'latin.py').write_bytes(b"dtype = '\xe9'\n")
    (tmp_path / 'config' / 'latin.json').write_bytes(b'{"dtype": "\xe9"}')
    (tmp_path / 'config' / 'null_byte.py').write_bytes(b'max_iters = 1\0\n')
    (tmp_path / 'config' / 'folder.py').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['some/script.py'])
    spec = importlib.util.spec_from_file_location('script', tmp_path / 'script.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(script, capsys, *argv, **options):
    """The one line that `configure` prints before it exits with status 2."""
    before = dict(vars(script))
    with pytest.raises(SystemExit) as exit:
        configure(vars(script), list(argv), **options)
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, '')
    assert err.startswith('script.py: ') and err.endswith('\n') and err.count('\n') == 1
    assert vars(script) == before
    return err


def test_the_settings_are_the_plain_public_globals_of_the_script_itself(script):
    assert settings(vars(script)) == DEFAULTS


@pytest.mark.parametrize(('argv', 'changed'), [
    ('', {}),
    # flags
    ('--max_iters 5', {'max_iters': 5}),
    ('--max_iters=5', {'max_iters': 5}),
    ('--max_iters -1', {'max_iters': -1}),
    ('--max_iters=-1', {'max_iters': -1}),
    ('--max_iters 1_000', {'max_iters': 1000}),
    ('--max_iters 1 --max_iters=2', {'max_iters': 2}),
    ('--learning_rate 1', {'learning_rate': 1.0}),
    ('--learning_rate -1e-3', {'learning_rate': -1e-3}),
    ('--learning_rate=-1e-3', {'learning_rate': -1e-3}),
    ('--compile', {'compile': True}),
    ('--compile True', {'compile': True}),
    ('--compile=True', {'compile': True}),
    ('--flash False', {'flash': False}),
    ('--flash=False', {'flash': False}),
    ('--compile --max_iters 5', {'compile': True, 'max_iters': 5}),
    ('--compile config/plain.py', {'compile': True, 'max_iters': 7}),
    ('--dtype bfloat16', {'dtype': 'bfloat16'}),
    ('--dtype=a=b=c', {'dtype': 'a=b=c'}),
    ('--dtype a=b', {'dtype': 'a=b'}),
    ('--dtype 16', {'dtype': '16'}),
    ('--dtype True', {'dtype': 'True'}),
    ('--dtype -x', {'dtype': '-x'}),
    ('--dtype=--x', {'dtype': '--x'}),
    ('--dtype -- --compile', {'dtype': '--', 'compile': True}),
    ('--dtype --1', {'dtype': '--1'}),
    ('--dtype=', {'dtype': ''}),
    (['--dtype', ''], {'dtype': ''}),
    (['--start', ' Once upon\n"a" time '], {'start': ' Once upon\n"a" time '}),
    (['--start=été 🙂'], {'start': 'été 🙂'}),
    # files
    ('config/plain.py', {'max_iters': 7}),
    ('config/plain', {'max_iters': 7}),
    ('./config/plain', {'max_iters': 7}),
    ('--config_file config/plain.py', {'max_iters': 7}),
    ('--config_file config/plain', {'max_iters': 7}),
    ('--config_file=config/plain', {'max_iters': 7}),
    ('config/ten.json', {'max_iters': 10, 'dtype': 'ten'}),
    ('config/ten', {'max_iters': 10, 'dtype': 'ten'}),
    ('--config_file config/ten', {'max_iters': 10, 'dtype': 'ten'}),
    ('config/both', {'dtype': 'py'}),
    ('config/both.json', {'dtype': 'json'}),
    ('config/bom.json', {'max_iters': 11}),
    ('config/own_affairs.py', {'learning_rate': 1.0, 'max_iters': 10}),
    ('config/subclass.py', {'learning_rate': 2.0}),
    ('config/imports_it.py', {'learning_rate': math.e}),
    ('config/main_guard.py', {}),
    ('config/deleted.py', {}),
    # precedence: defaults, files in their order, flags wherever they stand
    ('config/double config/double', {'max_iters': 400}),
    ('config/ten config/double', {'max_iters': 20, 'dtype': 'ten'}),
    ('config/ten --config_file config/double', {'max_iters': 20, 'dtype': 'ten'}),
    ('config/double config/ten', {'max_iters': 10, 'dtype': 'ten'}),
    ('--max_iters 3 config/ten', {'max_iters': 3, 'dtype': 'ten'}),
    ('--max_iters 3 config/double', {'max_iters': 3}),
])
def test_override(script, argv, changed):
    configure(vars(script), argv.split() if isinstance(argv, str) else argv)
    result = settings(vars(script))
    assert result == DEFAULTS | changed
    assert {key: type(value) for key, value in result.items()} == \
        {key: type(value) for key, value in DEFAULTS.items()}
    assert script.pi > 3 and script._private == 3 and script.table == [1, 2]



@pytest.mark.parametrize(('argv', 'message'), [
    # the command line
    ('--max_iter 5',
     "unknown setting 'max_iter' on the command line; did you mean 'max_iters'? (--help lists all)\n"),
    ('--max-iters=5', "unknown setting 'max-iters' on the command line; did you mean 'max_iters'? "),
    ('-max_iters 5', "unknown setting '-max_iters' on the command line; did you mean 'max_iters'? "),
    ('--config x', "unknown setting 'config' on the command line; did you mean 'config_file'? "),
    ('--zzz 5', "unknown setting 'zzz' on the command line (--help lists all)"),
    ('--pi 3', "unknown setting 'pi' on the command line"),
    ('--_private 5', "unknown setting '_private' on the command line"),
    ('--table 5', "unknown setting 'table' on the command line"),
    ('--nested 5', "unknown setting 'nested' on the command line"),
    ('--local 5', "unknown setting 'local' on the command line"),
    ('--__name__ x', "unknown setting '__name__' on the command line"),
    ('--=5', "unknown setting '' on the command line"),
    ('--max_iters abc', "'max_iters' on the command line must be an int, not 'abc'"),
    ('--max_iters 1e3', "'max_iters' on the command line must be an int, not '1e3'"),
    ('--max_iters True', "'max_iters' on the command line must be an int, not 'True'"),
    ('--max_iters=', "'max_iters' on the command line must be an int, not ''"),
    ('--learning_rate fast', "'learning_rate' on the command line must be a finite number, not 'fast'"),
    ('--learning_rate nan', "'learning_rate' on the command line must be a finite number, not nan"),
    ('--learning_rate=-inf', "'learning_rate' on the command line must be a finite number, not -inf"),
    ('--learning_rate 1e999', "'learning_rate' on the command line must be a finite number, not inf"),
    ('--compile true', "'compile' on the command line must be True or False, not 'true'"),
    ('--compile 1', "'compile' on the command line must be True or False, not '1'"),
    ('--compile=yes', "'compile' on the command line must be True or False, not 'yes'"),
    ('--compile=', "'compile' on the command line must be True or False, not ''"),
    ('--dtype', '--dtype needs a value (for one that starts with --, type --dtype=--...)'),
    ('--max_iters', '--max_iters needs a value'),
    ('--dtype --compile', '--dtype needs a value'),
    ('--config_file', '--config_file needs a value'),
    # which file
    ('config/plane.py', "no config file 'config/plane.py'; did you mean 'config/plain.py'?"),
    ('config/plane',
     "no config file 'config/plane.py' or 'config/plane.json'; did you mean 'config/plain.py'?"),
    ('zzz', "no config file 'zzz.py' or 'zzz.json'\n"),
    ('nowhere/x.json', "no config file 'nowhere/x.json'\n"),
    ('config', "no config file 'config.py' or 'config.json'"),
    ('config/notes.txt', "no config file 'config/notes.txt.py' or 'config/notes.txt.json'"),
    ('--config_file=', "no config file '.py' or '.json'"),
    ('config/folder.py', 'cannot read config/folder.py: Is a directory'),
    # what it holds
    ('config/unknown.py',
     "unknown setting 'max_iter' in config/unknown.py; did you mean 'max_iters'? (--help lists all)"),
    ('config/unknown', "unknown setting 'max_iter' in config/unknown.py; did you mean 'max_iters'?"),
    ('config/unknown.json', "unknown setting 'max_iter' in config/unknown.json; did you mean 'max_iters'?"),
    ('config/private.json', "unknown setting '_private' in config/private.json"),
    ('config/imported.json', "unknown setting 'pi' in config/imported.json"),
    ('config/a_list.py', "unknown setting 'betas' in config/a_list.py"),
    ('config/a_dict.py', "unknown setting 'optimizer' in config/a_dict.py"),
    ('config/a_none.py', "'max_iters' in config/a_none.py must be an int, not None"),
    ('config/loop.py', "unknown setting 'i' in config/loop.py"),
    ('config/bool_for_int.py', "'max_iters' in config/bool_for_int.py must be an int, not True"),
    ('config/int_for_bool.py', "'compile' in config/int_for_bool.py must be True or False, not 1"),
    ('config/float_for_int.json', "'max_iters' in config/float_for_int.json must be an int, not 5.0"),
    ('config/str_for_int.json', "'max_iters' in config/str_for_int.json must be an int, not '5'"),
    ('config/int_for_str.json', "'dtype' in config/int_for_str.json must be a str, not 5"),
    ('config/bool_for_float.json',
     "'learning_rate' in config/bool_for_float.json must be a finite number, not True"),
    ('config/null.json', "'dtype' in config/null.json must be a str, not None"),
    ('config/nested.json', "'dtype' in config/nested.json must be a str, not {'a': 1}"),
    ('config/nan.json', "'learning_rate' in config/nan.json must be a finite number, not nan"),
    ('config/nan.py', "'learning_rate' in config/nan.py must be a finite number, not nan"),
    ('config/overflow.json', "'learning_rate' in config/overflow.json must be a finite number, not inf"),
    ('config/big.json', "'learning_rate' in config/big.json must be a finite number, not 1000"),
    ('config/function.py', "'start' in config/function.py must be a str, not <function"),
    ('config/duplicate.json', "config/duplicate.json: 'max_iters' stands there twice"),
    ('config/array.json', 'config/array.json must hold an object, {"name": value, ...}, not [1, 2]'),
    ('config/broken.json', 'config/broken.json: Expecting value: line 2 column 11'),
    ('config/empty.json', 'config/empty.json: Expecting value: line 1'),
    ('config/deep.json', 'config/deep.json: '),
    ('config/latin.json', "config/latin.json: 'utf-8' codec can't decode byte 0xe9"),
    ('config/latin.py', 'config/latin.py'),
    ('config/null_byte.py', 'config/null_byte.py'),
    ('config/syntax.py', 'config/syntax.py, line 2: SyntaxError: invalid syntax'),
    ('config/outside.py', "config/outside.py, line 2: SyntaxError: 'return' outside function"),
    ('config/raises.py', 'config/raises.py, line 2: IndexError: list index out of range\n'),
    ('config/raises_lines.py', 'config/raises_lines.py, line 1: ValueError: one two\n'),
    ('config/no_module.py',
     "config/no_module.py, line 2: ModuleNotFoundError: No module named 'no_such_module'"),
    ('config/no_name.py', "config/no_name.py, line 1: NameError: name 'max_iter' is not defined"),
    ('config/opens.py', 'config/opens.py, line 3: FileNotFoundError: '),
    # nothing is taken from a good file or flag beside a mistake
    ('config/plain.py --max_iter 5', "unknown setting 'max_iter' on the command line"),
    ('config/plain.py config/unknown.py', "unknown setting 'max_iter' in config/unknown.py"),
])
def test_a_mistake_is_one_line_and_changes_nothing(script, capsys, argv, message):
    assert refused(script, capsys, *argv.split()).startswith('script.py: ' + message)


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root reads every file')
def test_an_unreadable_file(script, capsys):
    Path('config/plain.py').chmod(0)
    assert 'cannot read config/plain.py: Permission denied' in refused(script, capsys, 'config/plain')


@pytest.mark.parametrize('flag', ['--help', '-h'])
def test_help_lists_every_setting_with_its_type_default_and_comment(script, capsys, flag):
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
  --start          str = 'a b'               comment after a value of two lines
  --version        int = 2                   computed
"""


@pytest.mark.parametrize(('argv', 'saved', 'changed'), [
    ('', {'max_iters': 50}, {'max_iters': 50}),
    ('', {}, {}),
    ('', {'learning_rate': 1}, {'learning_rate': 1.0}),
    ('', {'removed_since': 50, 'dtype': 'old'}, {'dtype': 'old'}),
    ('config/plain.py', {'max_iters': 50, 'dtype': 'old'}, {'max_iters': 7, 'dtype': 'old'}),
    ('config/same.py', {'max_iters': 50}, {'max_iters': 100}),  # though it is the default
    ('config/double.py', {'max_iters': 50}, {'max_iters': 100}),
    ('config/double.py', {}, {'max_iters': 200}),
    ('--max_iters 3', {'max_iters': 50, 'dtype': 'old'}, {'max_iters': 3, 'dtype': 'old'}),
    ('--max_iters=100', {'max_iters': 50}, {'max_iters': 100}),
])
def test_base_lies_between_the_defaults_and_what_is_given(script, argv, saved, changed):
    configure(vars(script), argv.split(), base=lambda _: saved)
    assert settings(vars(script)) == DEFAULTS | changed


def test_base_is_called_once_with_the_settings_as_given(script):
    calls = []
    argv = ['--dtype', 'x', 'config/plain']
    configure(vars(script), argv, base=lambda given: calls.append(given) or {'dtype': 'y'})
    assert calls == [DEFAULTS | {'max_iters': 7, 'dtype': 'x'}]
    assert script.dtype == 'x'


def test_mistakes_in_and_under_base(script, capsys):
    def missing(_):
        raise SettingError('no checkpoint in out/')

    assert refused(script, capsys, base=missing) == 'script.py: no checkpoint in out/\n'
    assert refused(script, capsys, base=lambda _: {'dtype': 16}) == \
        "script.py: 'dtype' in the checkpoint must be a str, not 16\n"


def test_the_declarations_are_those_the_script_began_with(script):
    configure(vars(script), ['--max_iters=5'])
    Path('script.py').write_text('half-saved (')
    assert settings(vars(script)) == DEFAULTS | {'max_iters': 5}


@pytest.mark.parametrize(('body', 'status', 'line'), [
    ('pass', None, ''),
    ("raise UserError('no data\\nhere')", 1, 'script.py: no data here\n'),
    ("raise SettingError('wrong')", 2, 'script.py: wrong\n'),
    ("open('no_such/file')", 1, 'script.py: no_such/file: No such file or directory\n'),
    ("raise OSError('bad disk')", 1, 'script.py: bad disk\n'),
    ('raise KeyboardInterrupt', 130, ''),
    ('raise BrokenPipeError', 141, ''),
    ('raise SystemExit(7)', 7, ''),
])
def test_run(script, capsys, body, status, line):
    def main():
        exec(body, {'UserError': UserError, 'SettingError': SettingError})

    if status is None:
        run(main)
    else:
        with pytest.raises(SystemExit) as exit:
            run(main)
        assert exit.value.code == status
    assert capsys.readouterr() == ('', line)


def test_run_leaves_a_bug_its_traceback(script):
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


ENV = os.environ | {'py': sys.executable, 'PYTHONPATH': str(Path(__file__).parent.parent)}


def shell(command):
    """(exit status, stdout, stderr) of a shell command in the script's folder; $py is this Python."""
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=ENV)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(('command', 'expected'), [
    ('"$py" script.py config/double --dtype=x', (0, '200 0.001 False x a b\n', '')),
    ('"$py" script.py --zzz 5',
     (2, '', "script.py: unknown setting 'zzz' on the command line (--help lists all)\n")),
    ('"$py" script.py config/raises.py',
     (2, '', 'script.py: config/raises.py, line 2: IndexError: list index out of range\n')),
])
def test_as_a_user_runs_it(script, command, expected):
    assert shell(command) == expected


@pytest.mark.parametrize('command', [
    'script.py', 'script.py --help', '-u script.py', '-u script.py --help',
])
def test_a_reader_that_has_gone_is_no_error(script, command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *command.split()], env=ENV, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b'')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_a_full_disk_is_one_line(script):
    assert shell('"$py" script.py > /dev/full') == (1, '', 'script.py: No space left on device\n')
