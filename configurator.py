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
ROOT = Path(__file__).resolve().parent
OUR_PACKAGES = 'core', 'data', 'formats', 'tools', 'model', 'configurator'


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


# mistakes of users -------------------------------------------------------------

class UserError(Exception):
    """A user's mistake. `run` prints it as one line on stderr and exits with `status`."""
    status = 1


class SettingError(UserError):
    """A mistake in the settings, on the command line or in a config file."""
    status = 2


def run(main, less_memory=''):
    """Call `main()`. A user's mistake, an I/O error or Ctrl-C ends in one line and an exit status.

    A bug keeps its traceback. TRACEBACK=1 in the environment shows that of any error.
    less_memory: advice to add if memory runs out.
    """
    set_up_streams()
    message = ''
    try:
        main()
        sys.stdout.flush()  # a full disk or a closed pipe shows here at the latest
        return
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # as in `python sample.py | head`
        status = 141
    except UserError as error:
        status = error.status
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split('.')[0] in OUR_PACKAGES:
            raise  # not an optional package: a wrong import of ours
        status = 1
        message = f'this needs a package: pip install {error.name}'
    except OSError as error:
        status = 1
        message = error.strerror or str(error)
        if error.filename:
            message = f'{error.filename}: {message}'
    except Exception as error:
        if not out_of_memory(error):
            raise
        status = 1
        message = 'out of memory'
        if less_memory:
            message += f': {less_memory}'
    if os.environ.get('TRACEBACK'):
        traceback.print_exc()
    drop_unwritable_output()
    if message:
        print_message(message)
    raise SystemExit(status)


def set_up_streams():
    """Let stdout and stderr take any text: a terminal shows what it can, files and pipes are UTF-8."""
    for stream in sys.stdout, sys.stderr:
        if not hasattr(stream, 'reconfigure'):
            continue
        if stream.isatty():
            stream.reconfigure(errors='replace')
        else:  # surrogateescape: file names may have bytes that are not UTF-8
            stream.reconfigure(encoding='utf-8', errors='surrogateescape')


def drop_unwritable_output():
    """Drop buffered output that stdout does not take, or Python would complain about it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_message(message):
    """Print one line on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    if int(os.environ.get('LOCAL_RANK', 0)) > 0:
        # Usually every rank fails the same way: let rank 0 print, and wait for torchrun to end this one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    line = ' '.join(printable(message).splitlines())
    script = os.path.basename(sys.argv[0])
    tqdm.write(f'{script}: {line[:2000]}', file=sys.stderr)


def printable(text):
    """Replace control characters and lone surrogates by U+FFFD.

    Surrogates that stand for bytes of a file name (surrogateescape) are kept.
    """
    return re.sub('[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]', '\N{REPLACEMENT CHARACTER}', text)


def script_path(name):
    """Return the path of one of our scripts relative to the working directory, quoted for the shell."""
    return shlex.quote(os.path.relpath(ROOT / name))


# what torch, the system and other libraries say when memory runs out
OUT_OF_MEMORY = (
    "out of memory|can't allocate memory|annot allocate memory|not enough memory|bad_alloc|"
    'Resource temporarily unavailable')  # the last if a thread cannot be started


def out_of_memory(error):
    """Return whether memory has run out: only for CUDA torch has a class of its own."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError)) and re.search(OUT_OF_MEMORY, str(error)) is not None


@contextlib.contextmanager
def user_errors(what, problem='is damaged or not what it should be'):
    """Turn an error while a library reads a foreign file into a UserError, "WHAT PROBLEM: reason".

    Wrap only the library's call and the check of what it returned, which raises ValueError. UserErrors,
    missing packages, out-of-memory and full-disk errors pass through, and so does a bug in our own code.
    """
    try:
        with warnings.catch_warnings(action='ignore'):  # the error says what matters
            yield
    except (UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # libraries raise errors of many classes
        if disk_is_full(error) or out_of_memory(error) or is_our_bug(error):
            raise
        raise UserError(f'{what} {problem}: {reason_of(error)}') from error


def disk_is_full(error):
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def is_our_bug(error):
    """Return whether an error is a bug's, and was raised by a line of this repository, not of a library."""
    if not isinstance(error, (NameError, AttributeError, TypeError, AssertionError)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(ROOT) and 'site-packages' not in path.parts


def reason_of(error):
    """Return in one line why a library failed, without its colours and its advice to run foreign code."""
    while error.__cause__:
        error = error.__cause__
    if isinstance(error, KeyError):
        return f'no entry {error}'
    text = re.sub(r'\x1b\[[\d;]*m', '', str(error)) or type(error).__name__
    advice = 'trust|weights_only|allowlist|documentation|issue'
    sentences = [part for part in re.split(r'(?<=\.)\s+|\n+', text) if not re.search(advice, part)]
    return ' '.join(' '.join(sentences).split())[:300]
