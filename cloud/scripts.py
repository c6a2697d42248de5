"""Decide which script gets which setting of a launcher's command line, and start one in a subprocess.

Nothing here depends on a particular cloud, or imports torch: a launcher is typed where there may be none.
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

ROOT = configurator.ROOT
SCRIPTS = {'prepare': 'data/tiny_stories/prepare.py', 'train': 'train.py', 'export': 'export.py',
           'sample': 'sample.py'}
# Settings that mean something else in this script, or that the launcher decides
NOT_PASSED = {'prepare': {'out_dir'}, 'export': {'dtype', 'format', 'path'}}
# Settings of prepare.py that do not change any token
NOT_IN_NAME = {'num_proc', 'offline'}
CORES = 8  # for prepare.py: the machine may have more cores than are paid for


def call(folder, name, flags, files=(), processes=''):
    """Run a script in `folder`, where its output and its downloads go; return its exit status.

    name: a key of SCRIPTS. flags: its settings {name: value}. files: config files, relative to ROOT.
    processes: a number of processes for torchrun, as a string; '' runs the script without torchrun.
    """
    command = [sys.executable]
    if processes:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command.append(ROOT / SCRIPTS[name])
    command += [ROOT / file for file in files]
    command += [f'--{key}={value}' for key, value in flags.items()]
    caches = {'HF_HOME': f'{folder}/caches/huggingface', 'TIKTOKEN_CACHE_DIR': f'{folder}/caches/tiktoken'}
    with subprocess.Popen(command, cwd=folder, env=os.environ | caches) as process:
        try:
            status = process.wait()
        except BaseException:  # the cloud takes the machine back: on SIGTERM train.py saves
            process.terminate()
            process.wait()
            raise
    return status if status >= 0 else 128 - status  # a negative status is a signal: 128 + its number


def defaults(script):
    """Return {name: default} of a script's settings. The script is read, not run."""
    names = configurator.declarations(script)
    tree = ast.parse(script.read_text(encoding='utf-8'))
    result = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            name = node.targets[0].id
            if name in names:
                result[name] = node.value.value
    return result


def stays_here(path):
    """Return whether a file, given by its path from ROOT, is not copied to the cloud.

    That is so for the git history, environments, runs and prepared data.
    """
    if any(part.startswith(('.', '__pycache__', 'venv', 'out-')) for part in path.parts):
        return True
    return path.parts[0] == 'data' and path.suffix != '.py'


def relative(name, path):
    """Return the path of a folder on the volume, without a trailing slash.

    Raises SettingError, with the setting's name, if the path leads out of the volume: what is written there
    is lost when the machine is given back.
    """
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == '/' or '..' in parts:
        raise SettingError(f'{name} {path!r} is not on the volume: type a relative path without ..')
    return str(PurePosixPath(path))


def plan(words, own):
    """Return what a command line means: (own settings, config files, dataset folder, {script: its flags}).

    own: {name: default} of the launcher's own settings, `command` among them.

    A setting goes to every script that declares it. The dataset folder is named after the settings it is
    prepared with, so that other settings lead to another folder; it is '' if nothing is to be prepared.
    Raises SettingError for a setting that no script declares and for a path that is not on the volume.
    """
    words = [re.sub('^--prompt(?==|$)', '--start', word) for word in words]
    known = {}
    for name, path in SCRIPTS.items():
        not_passed = NOT_PASSED.get(name, ())
        known[name] = {key: value for key, value in defaults(ROOT / path).items() if key not in not_passed}
    everything = {key: value for settings in known.values() for key, value in settings.items()}
    files, flags = configurator.parse(words, everything | own)
    own = own | {key: flags.pop(key) for key in own if key in flags}
    configurator.one_of(('all', 'train', 'inference', 'sample'), command=own['command'])

    if not files:
        recipe = 'quickstart' if flags.get('source') == 'sample' else 'tiny_stories'
        files = [ROOT / f'config/{recipe}.py']
    files = [Path(file).resolve() for file in files]
    settings = known['train']
    for file in files:
        if not file.is_relative_to(ROOT) or stays_here(file.relative_to(ROOT)):
            raise SettingError(f'{file} is not copied to the cloud: put it into {ROOT}/config')
        settings = settings | configurator.read_config(str(file), settings)
    flags['out_dir'] = relative('out_dir', flags.get('out_dir', settings['out_dir']))

    passed = {}
    for name, settings in known.items():
        passed[name] = {key: value for key, value in flags.items() if key in settings}
    if own['command'] in ('inference', 'sample'):
        return own, [], '', {'sample': passed['sample']}

    passed['export'] |= {'format': 'llama2c', 'path': f"{flags['out_dir']}/llama2c"}
    passed['sample'].pop('init_from', None)  # the stories are the new run's, not those of the model it tunes
    folder = dataset_folder(flags, passed['prepare'], known)
    if folder:
        passed['train']['dataset'] = folder
        passed['prepare'] = {'num_proc': CORES} | passed['prepare'] | {'out_dir': folder}
    return own, [str(file.relative_to(ROOT)) for file in files], folder, passed


def dataset_folder(flags, prepare_flags, known):
    """Return the folder to prepare a dataset in, named after its settings; '' if --dataset names one.

    Example: data/encoding_type=bpe,vocab_size=512
    """
    changed = {key for key, value in prepare_flags.items() if value != known['prepare'][key]}
    if 'dataset' in flags:
        unused = changed - known['train'].keys()
        if unused:
            raise SettingError(f'dataset gives data that is prepared already: leave out {min(unused)}')
        return ''
    names = sorted(changed - NOT_IN_NAME)
    parts = [f"{name}={quote(str(flags[name]), safe='')}" for name in names]
    return f"data/{','.join(parts) or 'tiny_stories'}"
