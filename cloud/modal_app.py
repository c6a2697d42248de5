"""The scripts on a GPU of Modal: prepare, train, export and sample, each as a person would type it.

    modal run cloud/modal_app.py                                       # TinyStories, on a T4
    modal run cloud/modal_app.py --source sample                       # the built-in corpus
    modal run cloud/modal_app.py config/char_1m.json --command train --max_iters 2000 --gpu A10
    modal run cloud/modal_app.py --command inference --prompt "One day, a cat" --num_samples 1
    modal run cloud/modal_app.py::transfer get out-tiny-stories        # or put; --overwrite
    modal run cloud/modal_app.py::cleanup out-tiny-stories             # without names it only lists

What the scripts write is on the volume `tiny-stories`, their working directory. A run that was cut off goes
on when the same is typed again. Any setting of theirs can be given; --secret NAME lends a tracker's key.
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

OWN = {'command': 'all', 'gpu': 'T4', 'secret': ''}
VOLUME = Path('/volume')  # where the functions have it

# `modal run FILE` takes the one entrypoint that is a name in here, `modal run FILE::APP` that of another app
app, transfer, cleanup = map(modal.App, ('tiny-stories', 'tiny-stories-transfer', 'tiny-stories-cleanup'))
volume = modal.Volume.from_name('tiny-stories', create_if_missing=True)
image = (modal.Image.debian_slim('3.11').pip_install_from_requirements(str(ROOT / 'requirements.txt'))
         .add_local_dir(ROOT, '/repository', ignore=stays_here))
# Modal itself starts anew what it had to interrupt; the retries are for runs of more than a day
machine = {'image': image, 'volumes': {str(VOLUME): volume}, 'timeout': 24 * 3600, 'retries': 3,
           'single_use_containers': True}


# in the cloud -----------------------------------------------------------------

def on_volume(*script):
    """The exit status of a script, once what it wrote is safe."""
    status = call(VOLUME, *script)
    if not modal.is_local():  # Modal does so every few seconds; the next function must find all
        volume.commit()
    return status


@app.function(**machine, cpu=CORES)
def prepare(flags):
    """Stories -> shards, unless they are there."""
    if (VOLUME / flags['out_dir'] / 'meta.json').exists():
        print(f"{flags['out_dir']} is prepared already")
        return 0
    return on_volume('prepare', flags)


@app.function(**machine)
def train(flags, files, gpus, began, exported):
    """Begins a run, or goes on with the one that is there; then exports it, where llama2.c can hold it."""
    last = VOLUME / flags['out_dir'] / 'ckpt.pt'
    # --overwrite is for a run from before `began`, not for what this very call did until it was cut off
    if last.exists() and not (flags.get('overwrite') and last.stat().st_mtime < began):
        flags = flags | {'init_from': 'resume'}
    if status := on_volume('train', flags, files, gpus):
        return status
    if on_volume('export', exported):
        print('so there are no files for llama2.c; the run itself is whole', file=sys.stderr)
    return 0


@app.function(**machine)
def sample(flags):
    """Checkpoint -> stories."""
    return on_volume('sample', flags)


# where `modal run` is typed -----------------------------------------------------

def start(words):
    """Calls the functions that the words ask for, until one fails: SystemExit with the script's status."""
    own, files, folder, flags = plan(words, OWN)
    one_gpu, _, gpus = own['gpu'].partition(':')
    steps = [(prepare, '', [flags['prepare']])] if folder else []
    if 'train' in flags:
        steps += [(train, own['gpu'], [flags['train'], files, gpus, time.time(), flags['export']])]
    if own['command'] != 'train':
        steps += [(sample, one_gpu, [flags['sample']])]
    lent = [modal.Secret.from_name(own['secret'])] if own['secret'] else None
    for function, gpu, arguments in steps:
        with user_errors('the work on Modal', 'did not end; type the same again to go on with it'):
            if status := function.with_options(gpu=gpu or None, secrets=lent).remote(*arguments):
                raise SystemExit(status)


def listed(folder):
    """[(path, bytes)] of the files in a folder of the volume."""
    with user_errors(f'{folder} on the volume', 'could not be read'):
        return [(PurePosixPath(entry.path.lstrip('/')), entry.size) for entry in volume.iterdir(folder)
                if entry.type == modal.volume.FileEntryType.FILE]


def copy(words):
    """`get` or `put` a folder, a run's or any, under the same name there and here."""
    if words[:1] not in (('get',), ('put',)) or len(words) < 2 or words[2:] not in ((), ('--overwrite',)):
        raise SettingError('type get FOLDER or put FOLDER, and --overwrite after it to replace files')
    name, overwrite = relative('folder', words[1]), len(words) == 3
    if words[0] == 'put':
        with user_errors(name, 'was not copied (--overwrite?)'), volume.batch_upload(force=overwrite) as batch:
            return (batch.put_directory if Path(name).is_dir() else batch.put_file)(name, f'/{name}')
    files = [Path(path) for path, _ in listed(name)]
    if there := [file for file in files if file.exists() and not overwrite]:
        raise UserError(f'{there[0]} is here already: --overwrite replaces what is here')
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        with user_errors(file, 'was not copied'), open(f'{file}.part', 'wb') as part:
            part.writelines(volume.read_file(file.as_posix()))
        os.replace(f'{file}.part', file)


def remove(names):
    """Lists what the volume holds; removes what is named, if two questions are answered so."""
    sizes = Counter()
    for path, size in listed('/'):  # runs, and data and caches one by one
        sizes['/'.join(path.parts[:2 if path.parts[0] in ('data', 'caches') else 1])] += size
    print(*(f'{sizes[name] / 1e6:12,.1f} MB  {name}' for name in sorted(sizes)), sep='\n')
    if unknown := [name for name in names if name not in sizes]:
        raise UserError(f'the volume holds no {unknown[0]}{did_you_mean(unknown[0], sizes)}')
    for name in names:
        with user_errors(name, 'was not removed'):
            if input(f'remove {name}? (yes or no) ') != 'yes' or input(f'for good? Type {name}: ') != name:
                raise UserError(f'{name} was kept')
            volume.remove_file(name, recursive=True)
            print(f'removed {name}')


@app.local_entrypoint()
def main(*words):
    run(lambda: start(words))


transfer.local_entrypoint(name='files')(lambda *words: run(lambda: copy(words)))
cleanup.local_entrypoint(name='files')(lambda *names: run(lambda: remove(names)))

if __name__ == '__main__':
    sys.exit('modal_app.py is started by Modal: modal run cloud/modal_app.py')
