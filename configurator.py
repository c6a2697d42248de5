"""Settings of a script: its public module globals, overridden by config files and `--key value` flags.

A script declares each setting once, at its top level, with a comment that `--help` prints:

    max_iters = 2000  # steps of training

and ends in

    if __name__ == '__main__':
        configure(globals())
        run(main)

A Python config is code: it runs with the rights of whoever starts the script. A JSON config only sets values.
"""

import ast
import contextlib
import difflib
import functools
import glob
import io
import json
import math
import os
import reprlib
import signal
import sys
import time
import tokenize
import traceback

KINDS = {bool: 'True or False', int: 'an int', float: 'a finite number', str: 'a str'}
MISTAKABLE = (*KINDS, list, tuple, set, dict, type(None))  # public in a config, it was meant as a setting
ENDINGS = ('.py', '.json')


class UserError(Exception):
    """A person's mistake: `run` prints it as one line on stderr and exits with `status`."""

    status = 1


class SettingError(UserError):
    """A mistake in the settings, on the command line or in a config file."""

    status = 2


def run(main, *args):
    """Call `main(*args)`; what is no bug becomes one line on stderr and an exit status.

    A UserError exits with its status, an OSError with 1, Ctrl-C with 130, a closed pipe (`sample.py | head`)
    silently with 141. Everything else keeps its traceback.
    """
    try:
        main(*args)
        print(end='', flush=True)  # a full disk or a closed pipe shows here at the latest
        return
    except KeyboardInterrupt:
        status, message = 130, ''
    except BrokenPipeError:
        status, message = 141, ''
    except UserError as error:
        status, message = error.status, str(error)
    except OSError as error:
        named = f'{error.filename}: ' if error.filename is not None else ''
        status, message = 1, named + (error.strerror or str(error))
    try:
        print(end='', flush=True)
    except OSError:  # what stdout will not take is dropped, or Python would complain of it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message and int(os.environ.get('LOCAL_RANK', 0)):
        # A mistake is mostly one of all ranks: rank 0 tells of it, and torchrun ends those that wait here.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if message:
        print(f'{os.path.basename(sys.argv[0])}: {" ".join(message.splitlines())}', file=sys.stderr)
    raise SystemExit(status)


def configure(settings_globals, argv=None, base=None):
    """Override a script's settings, in place, by the config files and flags of `argv` (sys.argv[1:] if None).

    Precedence: defaults, `base`, config files in the order given, flags. `base` is for a script that resumes:
    base({name: value}) is called once, with the settings as they are without it, which say where the
    checkpoint is, and returns the checkpoint's {name: value}; what the script does not declare is ignored, as
    a checkpoint may be older than the script. The files then run again, to compute from those values.

    A mistake is one line on stderr and exit status 2, and leaves the globals as they were; `--help` exits
    with 0. An error that `base` raises ends the script as one in `run` does.
    """
    run(_configure, settings_globals, sys.argv[1:] if argv is None else argv, base)


def settings(settings_globals):
    """A script's current settings, {name: value}: its own public globals of type bool, int, float or str."""
    names = _comments(settings_globals['__file__'])
    return {name: settings_globals[name] for name in names if type(settings_globals.get(name)) in KINDS}


def _configure(settings_globals, argv, base):
    defaults = settings(settings_globals)
    files, flags = _parse(argv, defaults, settings_globals)

    def overridden(current):
        for path in files:
            current = current | _read_config(path, current)
        return current | flags

    current = overridden(defaults)
    if base and (saved := base(dict(current))):
        known = {key: value for key, value in saved.items() if key in defaults}
        current = overridden(defaults | _checked(known, defaults, 'in the checkpoint'))
    settings_globals.update(current)


@functools.cache  # a script edited while it runs must not change which settings its checkpoints hold
def _comments(path):
    """{name: comment on its line} of the public names that a script itself assigns at its top level."""
    with tokenize.open(path) as file:
        source = file.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.strip('# ') for token in tokens if token.type == tokenize.COMMENT}
    return {
        target.id: by_line.get(node.end_lineno, '')
        for node in ast.parse(source).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and not target.id.startswith('_')
    }


def _parse(argv, defaults, settings_globals):
    """The command line as ([path of a config file], {key: value of its last flag})."""
    kinds = {key: type(value) for key, value in defaults.items()} | {'config_file': str}
    files, flags = [], {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ('-h', '--help'):
            _print_help(defaults, settings_globals)
            raise SystemExit(0)
        if not word.startswith('-'):
            word = f'--config_file={word}'
        key, equals, text = word.removeprefix('--').partition('=')
        if key not in kinds:
            raise _unknown(key, kinds, 'on the command line')
        if not equals and kinds[key] is bool:
            # true, 0 and the like are taken only to be refused as values, not as names of config files
            has_value = words and words[0].lower() in ('true', 'false', '0', '1')
            text = words.pop(0) if has_value else 'True'
        elif not equals:
            if not words or (words[0].startswith('--') and words[0][2:3].isalpha()):
                raise SettingError(f'--{key} needs a value (for one that starts with --, type --{key}=--...)')
            text = words.pop(0)
        if key == 'config_file':
            files.append(_find_config(text))
        else:
            flags[key] = _typed(key, _from_text(text, kinds[key]), kinds[key], 'on the command line')
    return files, flags


def _from_text(text, kind):
    if kind is bool:
        return {'True': True, 'False': False}.get(text, text)
    try:
        return kind(text)
    except ValueError:
        return text  # of the wrong type, as `_typed` will say


def _typed(key, value, kind, where):
    """`value` as a plain `kind`. An int does for a float; a bool is no number; nan and inf are mistakes."""
    accepted = (int, float) if kind is float else kind
    if isinstance(value, accepted) and isinstance(value, bool) == (kind is bool):
        with contextlib.suppress(OverflowError):  # an int beyond all floats
            plain = kind(value)  # of a subclass too, such as numpy's float64
            if kind is not float or math.isfinite(plain):
                return plain
    raise SettingError(f'{key!r} {where} must be {KINDS[kind]}, not {reprlib.repr(value)}')


def _unknown(key, known, where):
    return SettingError(f'unknown setting {key!r} {where}{_nearest(key, known)} (--help lists all)')


def _nearest(name, names):
    matches = difflib.get_close_matches(name, names, 1)
    return f'; did you mean {matches[0]!r}?' if matches else ''


def _find_config(path):
    """The file meant by `path`, which may leave out its ending."""
    candidates = [path] if path.endswith(ENDINGS) else [path + ending for ending in ENDINGS]
    for candidate in candidates:
        if os.path.exists(candidate):
            return candidate
    neighbours = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), '*'))
    nearest = _nearest(candidates[0], [name for name in neighbours if name.endswith(ENDINGS)])
    raise SettingError(f'no config file {" or ".join(map(repr, candidates))}{nearest}')


def _read_config(path, current):
    """The settings that a config file gives, {name: value}, when those so far are `current`."""
    try:
        with open(path, 'rb') as file:
            source = file.read()
    except OSError as error:
        raise SettingError(f'cannot read {path}: {error.strerror}') from None
    values = _read_json(path, source) if path.endswith('.json') else _run_python(path, source, current)
    return _checked(values, current, f'in {path}')


def _read_json(path, source):
    def without_duplicates(pairs):
        values = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f'{key!r} stands there twice')
            values[key] = value
        return values

    try:
        values = json.loads(source.decode('utf-8-sig'), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:  # broken UTF-8 is a ValueError, and so is broken JSON
        raise SettingError(f'{path}: {error}') from None
    if not isinstance(values, dict):
        raise SettingError(f'{path} must hold an object, {{"name": value, ...}}, not {reprlib.repr(values)}')
    return values


def _run_python(path, source, current):
    namespace = {**current, '__name__': 'config', '__file__': path}
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, 'exec'), namespace)
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == path]
        line = lines[-1] if lines else getattr(error, 'lineno', None)  # a SyntaxError of its own has no frame
        reason = traceback.format_exception_only(error)[-1].strip()
        raise SettingError(f'{path}{f", line {line}" if line else ""}: {reason}') from None
    # What a config imports or defines is its own affair: only what it assigns in public must be a setting.
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {
        name: value
        for name, value in namespace.items()
        if name in current or (name in stored and not name.startswith('_') and isinstance(value, MISTAKABLE))
    }


def _checked(values, current, where):
    for key in values:
        if key not in current:
            raise _unknown(key, current, where)
    return {key: _typed(key, value, type(current[key]), where) for key, value in values.items()}


def _print_help(defaults, settings_globals):
    if settings_globals.get('__doc__'):
        print(settings_globals['__doc__'].strip() + '\n')
    print(f'usage: python {sys.argv[0]} [config file, .py or .json ...] [--key value ...]\n\nsettings:')
    comments = _comments(settings_globals['__file__'])
    width = max(map(len, defaults), default=0)
    for key, value in defaults.items():
        default = f'{type(value).__name__} = {value!r}'
        print(f'  --{key:{width}}  {default:24}  {comments[key]}'.rstrip())
