"""The scripts on somebody else's machine: which of them gets which setting, and one of them started.

Knows no cloud, and imports no torch: a launcher is typed where there may be none.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import configurator
from configurator import SettingError

ROOT = Path(configurator.__file__).resolve().parent
SCRIPTS = {'prepare': 'data/tiny_stories/prepare.py', 'train': 'train.py', 'export': 'export.py',
           'sample': 'sample.py'}
NOT_PASSED = {'prepare': {'out_dir'}, 'export': {'dtype', 'format', 'path'}}  # another sense, or decided here
CORES = 8  # for prepare.py, as the machine may have more than are paid for


def call(folder, name, flags, files=(), processes=''):
    """Runs a script in `folder`, where all that it writes then is, downloads too; returns its exit status.

    processes: a number, for torchrun.
    """
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    words = [*(torchrun if processes else ()), ROOT / SCRIPTS[name], *(ROOT / file for file in files),
             *(f'--{key}={value}' for key, value in flags.items())]
    caches = {'HF_HOME': f'{folder}/caches/huggingface', 'TIKTOKEN_CACHE_DIR': f'{folder}/caches/tiktoken'}
    with subprocess.Popen([sys.executable, *words], cwd=folder, env=os.environ | caches) as process:
        try:
            status = process.wait()
        except BaseException:  # the machine is wanted back: train.py saves when it is asked to end
            process.terminate()
            process.wait()
            raise
    return status if status >= 0 else 128 - status  # a signal, as shells tell of it


def defaults(script):
    """{name: default} of a script's settings, read and not run."""
    names, tree = configurator.declarations(script), ast.parse(script.read_text(encoding='utf-8'))
    return {node.targets[0].id: node.value.value for node in tree.body if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant) and node.targets[0].id in names}


def stays_here(path):
    """Whether a file, by its path from ROOT, does not travel: history, environments, runs, prepared data."""
    aside = any(part.startswith(('.', '__pycache__', 'venv', 'out-')) for part in path.parts)
    return aside or (path.parts[0] == 'data' and path.suffix != '.py')


def relative(name, path):
    """`path`, a folder that stays. Raises SettingError for one that would be lost with the machine."""
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == '/' or '..' in parts:
        raise SettingError(f'{name} {path!r} is not on the volume: type a path without .. and / before it')
    return str(PurePosixPath(path))


def plan(words, own):
    """What a command line means: (own settings, config files, folder to prepare or '', {script: its flags}).

    own: {name: default} of the launcher's settings, `command` among them. A setting goes to every script that
    declares it. Data is named by what it was prepared with, so that it is there for the same settings only.
    Raises SettingError for what no script declares, and for what would not be there or not stay.
    """
    words = [re.sub('^--prompt(?==|$)', '--start', word) for word in words]
    known = {name: {key: value for key, value in defaults(ROOT / path).items()
                    if key not in NOT_PASSED.get(name, ())} for name, path in SCRIPTS.items()}
    every = {key: value for settings in known.values() for key, value in settings.items()}
    files, flags = configurator.parse(words, every | own)
    own = own | {key: flags.pop(key) for key in own if key in flags}
    configurator.one_of(('all', 'train', 'inference', 'sample'), command=own['command'])

    recipe = 'quickstart' if flags.get('source') == 'sample' else 'tiny_stories'
    files = [Path(file).resolve() for file in files] or [ROOT / f'config/{recipe}.py']
    settings = known['train']
    for file in files:
        if not file.is_relative_to(ROOT) or stays_here(file.relative_to(ROOT)):
            raise SettingError(f'{file} does not travel: put it into {ROOT}/config')
        settings = settings | configurator.read_config(str(file), settings)
    flags['out_dir'] = relative('out_dir', flags.get('out_dir', settings['out_dir']))
    passed = {name: {key: value for key, value in flags.items() if key in known[name]} for name in known}
    if own['command'] in ('inference', 'sample'):
        return own, [], '', {'sample': passed['sample']}

    passed['export'] |= {'format': 'llama2c', 'path': f"{flags['out_dir']}/llama2c"}
    passed['sample'].pop('init_from', None)  # the run begins from it, and the stories are the run's
    folder, changed = '', {key for key, value in passed['prepare'].items() if value != known['prepare'][key]}
    if 'dataset' in flags:
        if extra := changed - known['train'].keys():
            raise SettingError(f'dataset names data that is there: leave out {min(extra)}')
    else:
        what = sorted(changed - {'num_proc', 'offline'})  # these change no token
        folder = ','.join(f'{key}={quote(str(flags[key]), safe="")}' for key in what) or 'tiny_stories'
        passed['train']['dataset'] = folder = f'data/{folder}'
        passed['prepare'] = {'num_proc': CORES, **passed['prepare'], 'out_dir': folder}
    return own, [str(file.relative_to(ROOT)) for file in files], folder, passed
