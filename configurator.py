"""The settings of a script, and how a script reports a mistake.

The settings are the script's public global variables, each declared at its top level on one line, with the
comment that `--help` prints:

    max_iters = 2000  # number of training steps

The script ends in

    configure(globals())  # config files and `--key value` flags override the globals
    run(main)             # a user's mistake is one line on stderr, a bug keeps its traceback
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

ROOT = Path(__file__).resolve().parent


# settings ------------------------------------------------------------------------

KINDS = {bool: 'True or False', int: 'an int', float: 'a finite number', str: 'a str'}
CONFIG_SUFFIXES = ('.py', '.json')
COMMAND_LINE = 'on the command line'

# What other projects call our settings
OTHER_NAMES = {
    'num_epochs': 'max_epochs', 'epochs': 'max_epochs', 'lr': 'learning_rate', 'embed_dim': 'n_embd',
    'dim': 'n_embd', 'num_layers': 'n_layer', 'n_layers': 'n_layer', 'num_heads': 'n_head',
    'n_heads': 'n_head', 'max_seq_len': 'block_size', 'max_tokens': 'max_new_tokens',
    'data_dir': 'dataset', 'model_dir': 'out_dir', 'offline_mode': 'offline', 'prompt': 'start'}


def configure(settings_globals, argv=None, base=None, alternatives=()):
    """Override a script's settings in place with the config files and flags of its command line.

    settings_globals: the script's `globals()`.
    argv: the words of the command line; None: those in sys.argv.
    base: a function that is given the settings {name: value} and returns those of the checkpoint to resume
        from, or {}. Checkpoint settings override the defaults, and config files and flags override both.
    alternatives: names of settings that say the same thing in different ways, such as max_iters and
        max_epochs: what is given last counts. The first name holds if all others are 0.

    A mistake ends the script as in `run` and leaves the globals unchanged.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if '-h' in words or '--help' in words:
        run(functools.partial(print_help, settings_globals))
        raise SystemExit(0)

    def override_globals():
        check_working_directory()
        defaults = settings(settings_globals)
        settings_globals.update(resolve_settings(defaults, words, base, alternatives))

    run(override_globals)


def check_working_directory():
    """Raise UserError if the working directory has been deleted: libraries end the process much later."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError('the working directory has been deleted: cd to a folder that exists') from None


def resolve_settings(defaults, words, base, alternatives):
    """Return the settings {name: value} that checkpoint, config files and flags lead to; see `configure`."""
    files, flags = parse(words, defaults)
    current = apply_files_and_flags(defaults, files, flags, alternatives)
    if base is None:
        return current
    # Files and flags say where the checkpoint is. Then the files run again, on top of its settings.
    saved = base(dict(current))
    if not saved:
        return current
    saved = {name: value for name, value in saved.items() if name in defaults}
    saved = convert_settings(saved, defaults, 'in the checkpoint')
    return apply_files_and_flags(defaults | saved, files, flags, alternatives)


def apply_files_and_flags(current, files, flags, alternatives):
    """Return the settings `current`, overridden by config files in the order given, then by flags."""
    for path in files:
        current = override(current, read_config(path, current), alternatives, f'in {path}')
    return override(current, flags, alternatives, COMMAND_LINE)


def override(current, values, alternatives, where):
    """Return the settings `current`, overridden by `values`.

    A value for one of the `alternatives` sets the others to 0, except the first, which needs a value.
    Raises SettingError if `values` has more than one of them; where: where the values are from.
    """
    given = [name for name in alternatives if values.get(name)]
    if len(given) > 1:
        raise SettingError(f"{' and '.join(given)} are both given {where}: leave out one of them")
    result = current | values
    if given:
        for name in alternatives[1:]:
            if name != given[0]:
                result[name] = type(current[name])(0)
    return result


def settings(settings_globals):
    """Return a script's current settings, {name: value}: its public globals of type bool, int, float or str.

    Names that the script has only imported are not settings.
    """
    result = {}
    for name in declarations(settings_globals['__file__']):
        if type(settings_globals.get(name)) in KINDS:
            result[name] = settings_globals[name]
    return result


@functools.cache  # a script that is edited while it runs must not change what its checkpoints contain
def declarations(path):
    """Return {name: the comment on its line} of the public names that a script assigns at its top level."""
    source = Path(path).read_text(encoding='utf-8')
    # `name = value` or `name: type = value`, then the comment after two spaces and a #, if there is one
    return dict(re.findall(r'^([A-Za-z]\w*)(?:: \w+)? = .*?(?:  # (.*))?$', source, re.MULTILINE))


# the command line

def parse(words, defaults):
    """Parse a command line into (paths of config files, {name: value} of the flags).

    Example: ['config/x', '--seed', '5', '--compile'] -> (['config/x.py'], {'seed': 5, 'compile': True})

    defaults: the settings {name: value}, which say what names and types there are. Raises SettingError.
    """
    known = defaults | {'config_file': ''}
    words = list(words)
    files = []
    flags = {}
    while words:
        word = words.pop(0)
        if not word.startswith('-'):
            files.append(find_config(word))
            continue
        key, equals, text = word.removeprefix('--').partition('=')
        check_name(key, known, COMMAND_LINE)
        if not equals:
            text = take_value(key, type(known[key]), words)
        if key == 'config_file':
            files.append(find_config(text))
        elif key in flags:
            raise SettingError(f'--{key} is given twice {COMMAND_LINE}')
        else:
            value = text if type(known[key]) is str else parse_literal(text)
            flags[key] = convert_value(key, value, type(known[key]), COMMAND_LINE)
    return files, flags


def take_value(key, kind, words):
    """Remove the value of the flag `--key` from the front of `words`, and return it.

    A bool may have no value: then return 'True'. Raises SettingError if another flag has none.
    """
    following = words[0] if words else ''
    # 'true' and '0' are values too, wrong ones: they are better refused as such than as names of config files
    if kind is bool and not re.fullmatch('true|false|[01]', following, re.IGNORECASE):
        return 'True'
    if not words or re.match('--[A-Za-z]', following):
        raise SettingError(f'--{key} needs a value (if the value starts with --, type --{key}=--...)')
    return words.pop(0)


def parse_literal(text):
    """Return the Python value that `text` spells, such as 5 for '5', or `text` itself if it spells none."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action='ignore'):
        return ast.literal_eval(text)
    return text


# checks

def convert_settings(values, known, where):
    """Return the settings `values` {name: value}, converted to the types of the settings `known`.

    where: where the values are from, for the message, such as 'in config/x.py'.
    Raises SettingError if a name is unknown or a value has another type.
    """
    result = {}
    for key, value in values.items():
        check_name(key, known, where)
        result[key] = convert_value(key, value, type(known[key]), where)
    return result


def check_name(key, known, where):
    """Raise SettingError if `key` is not one of the names `known`."""
    if key not in known:
        raise SettingError(f'unknown setting {key!r} {where}{did_you_mean(key, known)} (--help lists all)')


def convert_value(key, value, kind, where):
    """Return `value` as a `kind`: a bool, int, float or str. Raises SettingError if it is of another type.

    An int is accepted for a float. A bool is not a number, and neither are nan and inf.
    """
    if kind is bool or isinstance(value, bool):  # in Python, a bool is an int
        fits = type(value) is kind
    elif kind is float:
        fits = isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise SettingError(f'{key!r} {where} must be {KINDS[kind]}, not {reprlib.repr(value)}')
    if kind is str:
        if re.search('[\0\ud800-\udfff]', value):
            raise SettingError(f'{key!r} {where} contains a NUL or an invalid character: {value!a}')
        value = expand_home(value)
    return kind(value)  # the plain type, if `value` is of a subclass such as numpy's float64


def expand_home(text):
    """Expand `~/` at the start of a path or of several separated by commas.

    A shell does that only at the start of a word, so not for `--key=~/a` or `~/a,~/b`.
    """
    parts = text.split(',')
    for i, part in enumerate(parts):
        if part.startswith('~/'):
            parts[i] = os.path.expanduser(part)
    return ','.join(parts)


def did_you_mean(name, names):
    """Return a suggestion for an unknown name, '; did you mean ...?', or '' if no name is similar."""
    meant = OTHER_NAMES.get(name)
    if meant in names:
        return f'; did you mean {meant!r}?'
    if meant:
        return f'; another script has {meant!r}'
    matches = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {matches[0]!r}?' if matches else ''


def in_range(above=-math.inf, at_least=-math.inf, below=math.inf, at_most=math.inf, **values):
    """Raise SettingError if one of the values, passed as name=value, is out of range."""
    limits = {'above': above, 'at least': at_least, 'below': below, 'at most': at_most}
    wanted = ' and '.join(f'{word} {limit}' for word, limit in limits.items() if math.isfinite(limit))
    for name, value in values.items():
        if not (above < value < below and at_least <= value <= at_most):
            raise SettingError(f'{name} is {value}; it must be {wanted}')


def one_of(choices, **values):
    """Raise SettingError if one of the values, passed as name=value, is not among the choices."""
    for name, value in values.items():
        if value not in choices:
            raise SettingError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


# config files

def find_config(path):
    """Return the path of the config file meant by `path`, which may leave out .py or .json.

    config/x.py is also found from another folder: a file of the working directory comes first, then one of
    this repository. Raises SettingError if there is none.
    """
    for place in path, str(ROOT / path):
        for candidate in place, f'{place}.py', f'{place}.json':
            if candidate.endswith(CONFIG_SUFFIXES) and os.path.isfile(candidate):
                return candidate
    folder = os.path.dirname(path)
    configs = [os.path.join(folder, file.name) for file in Path(path).parent.glob('*')
               if file.suffix in CONFIG_SUFFIXES]
    raise SettingError(f'no config file {path!r} (.py or .json){did_you_mean(path, configs)}')


def read_config(path, current):
    """Return the settings {name: value} that a config file sets.

    current: the settings so far. A Python config sees them as names, so it can compute.
    Raises SettingError, with the number of the line if possible, if the file is broken.
    """
    try:
        source = Path(path).read_bytes()
        values = run_python(path, source, current) if path.endswith('.py') else json.loads(source)
    except Exception as error:  # a Python config may raise anything
        line = line_number(path, error)
        place = f'{path}, line {line}' if line else path
        reason = traceback.format_exception_only(error)[-1].strip()
        raise SettingError(f'{place}: {reason}') from error
    if not isinstance(values, dict):
        shown = reprlib.repr(values)
        raise SettingError(f'{path} must contain an object, {{"name": value, ...}}, not {shown}')
    return convert_settings(values, current, f'in {path}')


def run_python(path, source, current):
    """Run a Python config and return the settings {name: value} that it sets.

    A config may import, define functions and assign `_names`. Any other name that it assigns must be that of
    a setting, which the caller checks. It is code and runs with the rights of whoever starts the script.
    """
    tree = ast.parse(source, path)
    namespace = {**current, '__name__': 'config', '__file__': path}
    exec(compile(tree, path, 'exec'), namespace)

    assigned = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and not node.id.startswith('_'):
            assigned.add(node.id)
    values = {}
    for name, value in namespace.items():
        if name in current:
            is_set = name in assigned or value is not current[name]  # as by `from other_config import *`
        else:
            is_set = name in assigned and not callable(value)
        if is_set:
            values[name] = value
    return values


def line_number(path, error):
    """Return the number of the line of the config file at `path` that raised `error`, or None."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if lines:
        return lines[-1]  # the innermost call
    return getattr(error, 'lineno', None)  # a SyntaxError or a JSONDecodeError: no line has run


def print_help(settings_globals):
    """Print a script's docstring and each of its settings with type, default and comment."""
    docstring = settings_globals.get('__doc__') or ''
    script = shlex.quote(sys.argv[0])
    print(docstring.strip())
    print()
    print(f'usage: python {script} [config file, .py or .json ...] [--key value ...]')
    print()
    print('settings:')
    defaults = settings(settings_globals)
    comments = declarations(settings_globals['__file__'])
    width = max(len(name) for name in defaults)
    for name, value in defaults.items():
        default = f'{type(value).__name__} = {value!r}'
        print(f'  --{name:{width}}  {default:24}  {comments[name]}'.rstrip())


# mistakes of users -----------------------------------------------------------------

class UserError(Exception):
    """A user's mistake. `run` prints it as one line on stderr and exits with `status`."""
    status = 1


class SettingError(UserError):
    """A mistake in the settings, on the command line or in a config file."""
    status = 2


def run(main, less_memory=None):
    """Call `main()`. A user's mistake, an I/O error or Ctrl-C ends in one line and an exit status.

    A bug keeps its traceback. TRACEBACK=1 in the environment shows the traceback of any error.
    less_memory: a function that returns advice to add if memory runs out.
    """
    set_up_streams()
    try:
        main()
        print(end='', flush=True)  # a full disk or a closed pipe shows here at the latest
    except (Exception, KeyboardInterrupt) as error:
        ending = status_and_message(error, less_memory)
        if ending is None:
            raise
        if os.environ.get('TRACEBACK'):
            traceback.print_exc()
    else:
        return
    status, message = ending
    drop_unwritable_output(sys.stdout)
    if message:
        print_message(message)
    raise SystemExit(status)


def status_and_message(error, less_memory):
    """Return the exit status and the line to print for an error, or None if it is a bug."""
    if isinstance(error, UserError):
        return error.status, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, ''
    if isinstance(error, BrokenPipeError):  # as in `python sample.py | head`
        return 141, ''
    if isinstance(error, ModuleNotFoundError) and error.name and not is_our_module(error.name):
        return 1, f'this needs a package: pip install {error.name}'
    if out_of_memory(error):
        return 1, f'out of memory: {less_memory()}' if less_memory else 'out of memory'
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return 1, f'{error.filename}: {reason}' if error.filename else reason
    return None


def is_our_module(name):
    """Return whether a module with this dotted name is, or would be, part of this repository."""
    top = name.split('.')[0]
    return (ROOT / top).is_dir() or (ROOT / f'{top}.py').is_file()


def set_up_streams():
    """Let stdout and stderr take any text: files and pipes get UTF-8, a terminal shows what it can.

    A closed stream (python train.py >&-) becomes one that drops what is written.
    """
    for name in 'stdout', 'stderr':
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 (open until the process ends)
    for stream in sys.stdout, sys.stderr:
        if not hasattr(stream, 'reconfigure'):  # replaced by a test
            continue
        if stream.isatty():
            stream.reconfigure(errors='replace')
        else:  # surrogateescape: file names may contain bytes that are not UTF-8
            stream.reconfigure(encoding='utf-8', errors='surrogateescape')


def print_message(message):
    """Print one line on stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    if os.environ.get('LOCAL_RANK', '0') not in ('', '0'):
        # Usually every rank fails the same way: let rank 0 print, and wait for torchrun to end this one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    script = os.path.basename(sys.argv[0])
    line = one_line(message)
    try:
        tqdm.write(f'{script}: {line[:2000]}', file=sys.stderr)
    except OSError:
        drop_unwritable_output(sys.stderr)


def drop_unwritable_output(stream):
    """Drop buffered output that cannot be written: Python would try again at exit, and complain."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(text):
    """Return `text` with control characters and lone surrogates replaced by U+FFFD.

    Surrogates that stand for bytes of a file name (surrogateescape) stay.
    """
    return re.sub('[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udc7f\udd00-\udfff]', '\N{REPLACEMENT CHARACTER}', text)


def one_line(text):
    """Return `text` in one line that is safe to print, whatever the names of files in it contain."""
    return ' '.join(printable(text).splitlines())


def script_path(name):
    """Return the path of one of our scripts, quoted for the shell and relative to the working directory.

    If that has been deleted meanwhile, the path is absolute.
    """
    try:
        path = os.path.relpath(ROOT / name)
    except FileNotFoundError:
        path = str(ROOT / name)
    return shlex.quote(path)


# errors of libraries ---------------------------------------------------------------

# What torch, the system and other libraries say when memory runs out
OUT_OF_MEMORY = (
    "out of memory|can't allocate memory|annot allocate memory|not enough memory|bad_alloc|"
    '_ALLOC_FAILED|_ALLOCATION_FAILED|'  # cuBLAS and cuDNN
    'Invalid buffer size: |'  # MPS
    'Resource temporarily unavailable')  # if a thread cannot be started

# Why the system does not read or write a file, whatever it contains: the disk is full or broken, there is no
# permission, a network drive is gone, too many files are open
REFUSALS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE,
            errno.EMFILE)

# The exceptions that a mistake in the code raises, whatever the file it reads contains
BUGS = (NameError, UnboundLocalError, AttributeError, TypeError, AssertionError)


def out_of_memory(error):
    """Return whether memory ran out. torch has an exception class for that only on CUDA."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, (RuntimeError, OSError)) and re.search(OUT_OF_MEMORY, str(error)) is not None


@contextlib.contextmanager
def user_errors(what, problem='is damaged or not what it should be'):
    """Turn an error while a library reads a foreign file into a UserError, "WHAT PROBLEM: reason".

    Wrap only the library's call and the check of what it returned, which raises ValueError:

        with user_errors(path):
            facts = json.loads(path.read_bytes())
            if not isinstance(facts, dict):
                raise ValueError('not an object')

    UserErrors, missing packages, and errors of memory, disks and permissions pass through. So does a bug in
    our own code, as it would otherwise look like a damaged file.
    """
    try:
        with warnings.catch_warnings(action='ignore'):  # the error says what matters
            yield
    except Exception as error:  # libraries raise errors of many classes
        cause = first_cause(error)
        if not is_about_the_file(cause):
            raise cause  # noqa: B904 (`error` comes from it, not the other way round)
        raise UserError(f'{what} {problem}: {reason_of(cause)}') from error


def first_cause(error):
    """Return the error that a library has wrapped in errors of its own, or `error` itself.

    A UserError has said what is wrong, whatever caused it.
    """
    while error.__cause__ and not isinstance(error, UserError):
        error = error.__cause__
    return error


def is_about_the_file(error):
    """Return whether an error says that a file is wrong, and not the machine or our own code."""
    if isinstance(error, (UserError, ModuleNotFoundError)) or out_of_memory(error):
        return False
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return False
    return not is_our_bug(error)


def is_our_bug(error):
    """Return whether an error is a bug's and was raised by a line of this repository, not of a library."""
    if isinstance(error, ImportError):
        return error.name is not None and is_our_module(error.name)
    frames = list(traceback.walk_tb(error.__traceback__))
    if type(error) not in BUGS or not frames:
        return False
    frame, _ = frames[-1]
    path = Path(frame.f_code.co_filename).resolve()
    return path.is_file() and path.is_relative_to(ROOT) and 'site-packages' not in path.parts


def reason_of(error):
    """Return in one line why a library failed, without its colours and its advice to run foreign code."""
    if isinstance(error, KeyError):
        return f'no entry {error}'
    text = re.sub(r'\x1b\[[\d;]*m', '', str(error)) or type(error).__name__
    advice = 'trust|weights_only|allowlist|documentation|issue'
    sentences = [part for part in re.split(r'(?<=\.)\s+|\n+', text) if not re.search(advice, part)]
    return ' '.join(' '.join(sentences).split())[:300]
