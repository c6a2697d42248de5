"""Settings of a script: its public module globals, overridden by config files and `--key value` flags.

A script declares each at its top level, on one line with the comment that `--help` prints, as in
`max_iters = 2000  # steps of training`, and ends in `configure(globals())` and `run(main)`.
"""

import ast
import contextlib
import difflib
import errno
import functools
import json
import math
import os
import re
import reprlib
import shlex
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

KINDS = {bool: 'True or False', int: 'an int', float: 'a finite number', str: 'a str'}
ENDINGS = ('.py', '.json')


def in_range(above=-math.inf, at_least=-math.inf, below=math.inf, at_most=math.inf, **values):
    """Raises SettingError where one of the values, each given by its setting's name, is out of range."""
    limits = {'above': above, 'at least': at_least, 'below': below, 'at most': at_most}
    wanted = ' and '.join(f'{word} {limit}' for word, limit in limits.items() if math.isfinite(limit))
    for name, value in values.items():
        if not (above < value < below and at_least <= value <= at_most):
            raise SettingError(f'{name} is {value}; it must be {wanted}')


def one_of(choices, **values):
    """Raises SettingError where one of the values, each given by its setting's name, is no choice."""
    for name, value in values.items():
        if value not in choices:
            raise SettingError(f"{name} is {value!r}; type --{name} and one of {', '.join(choices)}")


def configure(settings_globals, argv=None, base=None):
    """Override a script's settings, in place, by the config files and flags of `argv` or the command line.

    Precedence: defaults, `base`, config files in their order, flags. base({name: value}) gets the settings
    without it, which say where a checkpoint to resume is, and returns the checkpoint's; the files then run
    again. A mistake ends the script as in `run` and leaves the globals as they were.
    """
    def override():
        words, defaults = sys.argv[1:] if argv is None else list(argv), settings(settings_globals)
        if {'-h', '--help'} & {*words}:
            print_help(settings_globals)
            raise SystemExit(0)
        files, flags = parse(words, defaults)

        def overridden(current):
            for path in files:
                current = current | read_config(path, current)
            return current | flags

        current = overridden(defaults)
        if base and (saved := base(dict(current))):
            known = {key: value for key, value in saved.items() if key in defaults}
            current = overridden(defaults | checked(known, defaults, 'in the checkpoint'))
        settings_globals.update(current)

    run(override)


def settings(settings_globals):
    """A script's current settings, {name: value}: its own public globals of type bool, int, float or str."""
    names = declarations(settings_globals['__file__'])
    return {name: settings_globals[name] for name in names if type(settings_globals.get(name)) in KINDS}


@functools.cache  # a script edited while it runs must not change which settings its checkpoints hold
def declarations(path):
    """{name: comment on its line} of the public names that a script assigns at its top level."""
    source = Path(path).read_text(encoding='utf-8')
    return dict(re.findall(r'^([A-Za-z]\w*)(?:: \w+)? = .*?(?:  # (.*))?$', source, re.M))


def parse(words, defaults):
    """The command line as ([path of a config file], {key: value of its flag})."""
    where, files, flags, known = 'on the command line', [], {}, defaults | {'config_file': ''}
    while words:
        word = words.pop(0)
        word = word if word.startswith('-') else f'--config_file={word}'
        key, equals, value = word.removeprefix('--').partition('=')
        checked({key: known.get(key)}, known, where)  # refuses an unknown one
        # true, 0 and the like are taken only to be refused as values, not as names of config files
        bare = type(known[key]) is bool and not re.match('(?i)(true|false|[01])$', ' '.join(words[:1]))
        if not equals and not bare and (not words or re.match('--[A-Za-z]', words[0])):
            raise SettingError(f'--{key} needs a value (for one that starts with --, type --{key}=--...)')
        if not equals:
            value = 'True' if bare else words.pop(0)
        if key == 'config_file':
            files.append(find_config(value))
            continue
        if type(known[key]) is not str:
            with contextlib.suppress(Exception):  # what is no literal stays text, and so of the wrong type
                value = ast.literal_eval(value)
        if key in flags:
            raise SettingError(f'--{key} is given twice {where}: which one is meant?')
        flags |= checked({key: value}, known, where)
    return files, flags


def checked(values, known, where):
    """`values` in the types of the `known` ones. Raises SettingError for a name or a type that is not theirs.
    An int does for a float; a bool is no number; nan and inf are mistakes."""
    plain = {}
    for key, value in values.items():
        if key not in known:
            raise SettingError(f'unknown setting {key!r} {where}{nearest(key, known)} (--help lists all)')
        kind = type(known[key])
        fits = isinstance(value, (int, float) if kind is float else kind)
        fits = fits and isinstance(value, bool) == (kind is bool)
        if not fits or (kind is float and not abs(value) <= sys.float_info.max):
            raise SettingError(f'{key!r} {where} must be {KINDS[kind]}, not {reprlib.repr(value)}')
        if kind is str and re.search('[\0\ud800-\udfff]', value):
            raise SettingError(f'{key!r} {where} is {value!a}, which no text and no path can be')
        if kind is str:  # of several paths, or of --key=value, a shell has not seen all
            parts = value.split(',')
            value = ','.join(os.path.expanduser(part) if part[:2] == '~/' else part for part in parts)
        plain[key] = kind(value)  # where it was, say, numpy's float64
    return plain


# What other projects call what we have
OTHER_WORDS = {
    'num_epochs': 'max_epochs', 'epochs': 'max_epochs', 'lr': 'learning_rate', 'embed_dim': 'n_embd',
    'dim': 'n_embd', 'num_layers': 'n_layer', 'n_layers': 'n_layer', 'num_heads': 'n_head',
    'n_heads': 'n_head', 'max_seq_len': 'block_size', 'max_tokens': 'max_new_tokens',
    'data_dir': 'dataset', 'model_dir': 'out_dir', 'offline_mode': 'offline', 'prompt': 'start'}


def nearest(name, names):
    if meant := OTHER_WORDS.get(name):
        return f'; did you mean {meant!r}?' if meant in names else f'; another script has {meant!r}'
    return ''.join(f'; did you mean {match!r}?' for match in difflib.get_close_matches(name, names, 1))


def find_config(path):
    """The file meant by `path`, which may leave out its ending."""
    for candidate in path, f'{path}.py', f'{path}.json':
        if candidate.endswith(ENDINGS) and os.path.exists(candidate):
            return candidate
    there = [os.path.join(os.path.dirname(path), other.name) for other in Path(path).parent.glob('*')]
    close = nearest(path, [other for other in there if other.endswith(ENDINGS)])
    raise SettingError(f'no config file {path!r} (.py or .json){close}')


def read_config(path, current):
    """The settings that a config file gives, {name: value}, when those so far are `current`."""
    try:
        source = Path(path).read_bytes()
        values = run_python(path, source, current) if path.endswith('.py') else json.loads(source)
    except Exception as error:  # a Python config may raise anything
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = getattr((frames or [error])[-1], 'lineno', None)  # a SyntaxError of its own has no frame
        reason = traceback.format_exception_only(error)[-1].strip()
        raise SettingError(f'{path}{f", line {line}" if line else ""}: {reason}') from None
    if not isinstance(values, dict):
        raise SettingError(f'{path} must hold an object, {{"name": value, ...}}, not {reprlib.repr(values)}')
    return checked(values, current, f'in {path}')


def run_python(path, source, current):
    """A Python config is code: it runs with the rights of whoever starts the script."""
    tree, namespace = ast.parse(source, path), {**current, '__name__': 'config', '__file__': path}
    exec(compile(tree, path, 'exec'), namespace)
    # what a config imports or defines is its own affair: only what it assigns in public must be a setting
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store) and node.id[0] != '_'}
    return {name: value for name, value in namespace.items()
            if name in current or (name in stored and not callable(value))}


def print_help(settings_globals):
    print((settings_globals.get('__doc__') or '').strip() + '\n')
    script = shlex.quote(sys.argv[0])
    print(f'usage: python {script} [config file, .py or .json ...] [--key value ...]\n\nsettings:')
    defaults, comments = settings(settings_globals), declarations(settings_globals['__file__'])
    for key, value in defaults.items():
        default = f'{type(value).__name__} = {value!r}'
        print(f'  --{key:{max(map(len, defaults))}}  {default:24}  {comments[key]}'.rstrip())


# mistakes ----------------------------------------------------------------------

class UserError(Exception):
    """A person's mistake: `run` prints it as one line on stderr and exits with `status`."""
    status = 1


class SettingError(UserError):
    """A mistake in the settings, on the command line or in a config file."""
    status = 2


def script_path(name):
    """How to type a script of ours, from wherever we are."""
    return shlex.quote(os.path.relpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), name)))


def run(main, less_memory=''):
    """Call `main()`: a mistake, an OSError or Ctrl-C ends in one line and a status, a bug in a traceback.

    less_memory: what to do where memory runs out.
    """
    message = ''
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, 'reconfigure'):
            if stream.isatty():  # what it cannot show is no reason to end
                stream.reconfigure(errors='replace')
            else:  # names of files may have bytes that are no UTF-8
                stream.reconfigure(encoding='utf-8', errors='surrogateescape')
    try:
        main()
        print(end='', flush=True)  # a full disk or a closed pipe shows here at the latest
        return
    except (KeyboardInterrupt, BrokenPipeError) as error:  # the latter as in `sample.py | head`
        status = 130 if isinstance(error, KeyboardInterrupt) else 141
    except UserError as error:
        status, message = error.status, str(error)
    except ModuleNotFoundError as error:  # an optional package, imported where it is used
        status, message = 1, f'this needs a package: pip install {error.name}'
    except OSError as error:
        status, message = 1, ': '.join(map(str, filter(None, (error.filename, error.strerror or error))))
    except Exception as error:
        if not out_of_memory(error):
            raise
        status, message = 1, ': '.join(filter(None, ('out of memory', less_memory)))
    try:
        print(end='', flush=True)
    except OSError:  # what stdout will not take is dropped, or Python would complain of it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        if int(os.environ.get('LOCAL_RANK', 0)):
            # mostly it is one of all ranks: rank 0 tells of it, and torchrun ends those that wait here
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        from tqdm import tqdm

        message = f'{os.path.basename(sys.argv[0])}: {" ".join(printable(message).splitlines())[:2000]}'
        tqdm.write(message, file=sys.stderr)  # above a bar that stands there
    raise SystemExit(status)


def printable(text):
    """`text` with U+FFFD for each character that a terminal would obey, or that no file can have."""
    # lone surrogates but those that stand for bytes of file names
    return re.sub('[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]', '\N{REPLACEMENT CHARACTER}', text)


def out_of_memory(error):
    """Whether memory has run out: torch has one exception for CUDA and mere words for MPS and CPUs."""
    words = ("out of memory|can't allocate memory|annot allocate memory|not enough memory|bad_alloc|"
             'Resource temporarily unavailable')  # the last of a thread that cannot be started
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and bool(re.search(words, str(error))))


@contextlib.contextmanager
def user_errors(what, problem='is damaged or not what it should be'):
    """The door for what comes from outside: any error in here is one line, "WHAT PROBLEM: reason".

    UserErrors pass as they are, and so does the want of a package, of memory or of room on the disk.
    """
    try:
        with warnings.catch_warnings(action='ignore'):  # what a library says of the file is said below
            yield
    except Exception as error:  # of one broken file, many libraries have many
        while error.__cause__:
            error = error.__cause__
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        if full or out_of_memory(error) or isinstance(error, (UserError, ModuleNotFoundError)):
            raise error from None
        reason = f'no entry {error}' if isinstance(error, KeyError) else str(error) or type(error).__name__
        reason = re.sub(r'\x1b\[[\d;]*m', '', reason)  # colours
        advice = 'trust|weights_only|allowlist|documentation|issue'  # of libraries: to run what is there
        reason = [part for part in re.split(r'(?<=\.)\s+|\n+', reason) if not re.search(advice, part)]
        reason = ' '.join(' '.join(reason).split())
        raise UserError(f'{what} {problem}: {reason[:300]}') from None
