"""Run the scripts on a GPU of Modal: prepare, train, export and sample.

    modal run cloud/modal_app.py                                       # TinyStories, on a T4
    modal run cloud/modal_app.py --source sample                       # the built-in corpus
    modal run cloud/modal_app.py config/char_1m.py --command train --max_iters 2000 --gpu A10
    modal run cloud/modal_app.py --command inference --prompt "One day, a cat" --num_samples 1
    modal run cloud/modal_app.py::transfer get out-tiny-stories        # download a folder; or put FOLDER
    modal run cloud/modal_app.py::cleanup out-tiny-stories             # delete; without names it only lists

The scripts write to the volume `tiny-stories`, which is their working directory. To resume a run that was
interrupted, type the same command again. All settings of the scripts can be given. --secret NAME passes a
secret of Modal to the scripts, such as a tracker's key.
"""

import os
import sys
import time
from collections import Counter
from pathlib import Path, PurePosixPath

try:
    import modal
except ModuleNotFoundError:
    sys.exit('modal_app.py: this needs a package: pip install modal')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]) if modal.is_local() else '/repository')

from cloud.scripts import CORES, ROOT, call, plan, relative, stays_here
from configurator import SettingError, UserError, did_you_mean, run, user_errors

OWN = {'command': 'all', 'gpu': 'T4', 'secret': ''}  # settings of the launcher itself
VOLUME = Path('/volume')  # where the volume is mounted

# `modal run FILE` runs the one entrypoint that is a global name here; `modal run FILE::APP` that of an app.
app = modal.App('tiny-stories')
transfer = modal.App('tiny-stories-transfer')
cleanup = modal.App('tiny-stories-cleanup')
volume = modal.Volume.from_name('tiny-stories', create_if_missing=True)
image = (modal.Image.debian_slim('3.11').pip_install_from_requirements(str(ROOT / 'requirements.txt'))
         .add_local_dir(ROOT, '/repository', ignore=stays_here))
# Modal itself restarts a function whose machine it takes back; the retries are for runs of more than a day.
machine = {'image': image, 'volumes': {str(VOLUME): volume}, 'timeout': 24 * 3600, 'retries': 3,
           'single_use_containers': True}


# in the cloud -----------------------------------------------------------------

def run_on_volume(*arguments):
    """Run a script as `call` does; return its exit status once its output is safe."""
    status = call(VOLUME, *arguments)
    if not modal.is_local():  # Modal commits every few seconds; the next function must find everything
        volume.commit()
    return status


@app.function(**machine, cpu=CORES)
def prepare(flags):
    """Turn stories into shards, unless they are there already. Return the exit status."""
    if (VOLUME / flags['out_dir'] / 'meta.json').exists():
        print(f"{flags['out_dir']} is prepared already")
        return 0
    return run_on_volume('prepare', flags)


@app.function(**machine)
def train(flags, files, gpus, start_time, export_flags):
    """Start a run, or resume the one in its folder; then export it for llama2.c. Return the exit status.

    start_time: when the user typed the command. --overwrite replaces a run from before it, but not what this
    same call saved before its machine was taken back.
    """
    last = VOLUME / flags['out_dir'] / 'ckpt.pt'
    if last.exists():
        replace = flags.get('overwrite') and last.stat().st_mtime < start_time
        if not replace:
            flags = flags | {'init_from': 'resume', 'overwrite': False}
    status = run_on_volume('train', flags, files, gpus)
    if status:
        return status
    if run_on_volume('export', export_flags):
        print('the run is complete, but was not exported for llama2.c', file=sys.stderr)
    return 0


@app.function(**machine)
def sample(flags):
    """Write stories with a trained model. Return the exit status."""
    return run_on_volume('sample', flags)


# on the user's machine ------------------------------------------------------------

def start(words):
    """Call the functions that a command line asks for; exit with the status of the first that fails."""
    own, files, folder, flags = plan(words, OWN)
    one_gpu, _, n_gpus = own['gpu'].partition(':')
    steps = []  # (function, GPU, arguments)
    if folder:
        steps.append((prepare, '', [flags['prepare']]))
    if 'train' in flags:
        steps.append((train, own['gpu'], [flags['train'], files, n_gpus, time.time(), flags['export']]))
    if own['command'] != 'train':
        steps.append((sample, one_gpu, [flags['sample']]))
    secrets = [modal.Secret.from_name(own['secret'])] if own['secret'] else None
    for function, gpu, arguments in steps:
        with user_errors('the work on Modal', 'did not finish; type the same command again to resume it'):
            status = function.with_options(gpu=gpu or None, secrets=secrets).remote(*arguments)
        if status:
            raise SystemExit(status)


def list_files(folder):
    """Return [(path, size in bytes)] of the files in a folder of the volume."""
    with user_errors(f'{folder} on the volume', 'could not be read'):
        entries = list(volume.iterdir(folder))
    files = [entry for entry in entries if entry.type == modal.volume.FileEntryType.FILE]
    return [(PurePosixPath(file.path.lstrip('/')), file.size) for file in files]


def copy(words):
    """Copy a folder, of a run or any other, between the volume and this machine, under the same name."""
    if len(words) < 2 or words[0] not in ('get', 'put') or words[2:] not in ((), ('--overwrite',)):
        raise SettingError('type get FOLDER or put FOLDER, and then --overwrite to replace files')
    folder = relative('folder', words[1])
    overwrite = len(words) == 3
    if words[0] == 'get':
        download(folder, overwrite)
    else:
        upload(folder, overwrite)


def upload(folder, overwrite):
    """Copy a local folder or file to the volume."""
    problem = 'was not copied (type --overwrite to replace files)'
    with user_errors(folder, problem), volume.batch_upload(force=overwrite) as batch:
        if Path(folder).is_dir():
            batch.put_directory(folder, f'/{folder}')
        else:
            batch.put_file(folder, f'/{folder}')


def download(folder, overwrite):
    """Copy a folder of the volume to this machine."""
    files = [Path(path) for path, _ in list_files(folder)]
    for file in files:
        if file.exists() and not overwrite:
            raise UserError(f'{file} exists on this machine: type --overwrite to replace files')
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        with user_errors(file, 'was not copied'), open(f'{file}.part', 'wb') as part:
            part.writelines(volume.read_file(file.as_posix()))
        os.replace(f'{file}.part', file)


def remove(names):
    """List what is on the volume, and delete the named folders, each after two questions."""
    sizes = Counter()
    for path, size in list_files('/'):
        # one entry per run, and one per folder below data/ and caches/
        depth = 2 if path.parts[0] in ('data', 'caches') else 1
        sizes['/'.join(path.parts[:depth])] += size
    for name in sorted(sizes):
        print(f'{sizes[name] / 1e6:12,.1f} MB  {name}')
    for name in names:
        if name not in sizes:
            raise UserError(f'{name} is not on the volume{did_you_mean(name, sizes)}')
    for name in names:
        with user_errors(name, 'was not deleted'):
            confirmed = (input(f'delete {name}? (yes or no) ') == 'yes'
                         and input(f'this cannot be undone. Type {name}: ') == name)
            if not confirmed:
                raise UserError(f'{name} was kept')
            volume.remove_file(name, recursive=True)
        print(f'deleted {name}')


@app.local_entrypoint()
def main(*words):
    run(lambda: start(words))


@transfer.local_entrypoint(name='files')
def _transfer(*words):
    run(lambda: copy(words))


@cleanup.local_entrypoint(name='files')
def _cleanup(*names):
    run(lambda: remove(names))


# `modal run FILE` would find these two as well if they were global names
del _transfer, _cleanup

if __name__ == '__main__':
    sys.exit('modal_app.py is started by Modal: modal run cloud/modal_app.py')
