"""cloud/modal_app.py without an account: functions are called with .local(), and a folder is the volume.

If Modal's package is installed, its App is used, otherwise the stand-in below. Images, GPUs, secrets and a
real volume are not tested, as that needs an account.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from core.checkpoint import load_checkpoint
from tests.helpers.scripts import ROOT, SETTINGS, Script

pytestmark = pytest.mark.filterwarnings('ignore:The .* function is executing locally')
TINY = ['--source=sample', '--encoding_type=char', '--data_percentage=1', '--num_proc=1', '--eval_iters=1',
        '--eval_interval=4', '--num_samples=1', '--max_new_tokens=20', '--seed=2', *SETTINGS]


class StandInApp:
    """The part of modal.App that these tests use, if Modal is not installed."""

    def __init__(self, name):
        self.entrypoints = []

    def function(self, **options):
        return lambda raw: SimpleNamespace(local=raw)

    def local_entrypoint(self, name=None):
        return lambda raw: self.entrypoints.append(raw) or raw


if importlib.util.find_spec('modal'):
    from cloud import modal_app, scripts
else:
    sys.modules['modal'] = MagicMock(App=StandInApp)
    from cloud import modal_app, scripts
    del sys.modules['modal']  # libraries in other tests must not find it


class Remote:
    """A function of the app that runs here; the machines it was asked for are added to `machines`."""

    def __init__(self, function, machines):
        self.remote, self.machines = function.local, machines

    def with_options(self, **machine):
        self.machines.append(machine)
        return self


class FolderVolume:
    """A stand-in for modal.Volume that is a folder."""

    def __init__(self, path):
        self.path = path

    def iterdir(self, folder):
        for path in sorted((self.path / folder.strip('/')).rglob('*')):
            kind = modal_app.modal.volume.FileEntryType
            yield SimpleNamespace(path=str(path.relative_to(self.path)), size=path.stat().st_size,
                                  type=kind.FILE if path.is_file() else kind.DIRECTORY)

    def read_file(self, name):
        data = (self.path / name).read_bytes()
        return iter((data[:2], data[2:]))

    @contextlib.contextmanager
    def batch_upload(self, force):
        def target(path):
            path = self.path / path.lstrip('/')
            if path.exists() and not force:
                raise FileExistsError(f'{path.name}: already exists')
            return path

        def put_file(local, remote):
            shutil.copy(local, target(remote))

        def put_directory(local, remote):
            shutil.copytree(local, target(remote), dirs_exist_ok=True)

        yield SimpleNamespace(put_file=put_file, put_directory=put_directory)

    def remove_file(self, name, recursive):
        assert recursive
        shutil.rmtree(self.path / name)


@pytest.fixture
def volume(tmp_path, monkeypatch):
    """The folder that is the volume. The working directory is another folder, `here`."""
    folder, here = tmp_path / 'volume', tmp_path / 'here'
    folder.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(modal_app, 'VOLUME', folder)
    monkeypatch.setattr(modal_app, 'volume', FolderVolume(folder))
    return folder


@pytest.fixture
def machines(monkeypatch):
    """The list of the machines that `main` asks for, in order."""
    machines = []
    for name in 'prepare', 'train', 'sample':
        monkeypatch.setattr(modal_app, name, Remote(getattr(modal_app, name), machines))
    return machines


class Forked:
    """A stand-in for subprocess.Popen that forks our scripts from a process with torch, seconds faster."""

    started = ()  # all scripts of one test

    def __init__(self, words, cwd, env):
        assert words[0] == sys.executable
        self.script = Script(*words[1:], cwd=cwd, **env)
        self.started.append(self)

    def wait(self):
        self.script.process.join(120)
        return self.script.process.exitcode

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(Forked, 'started', [])
    monkeypatch.setattr(subprocess, 'Popen', Forked)
    return Forked.started


def saved_at(folder):
    """Return the step of a run's last checkpoint, or -1 if there is none yet."""
    with contextlib.suppress(Exception):
        return load_checkpoint(folder / 'ckpt.pt')['iter']
    return -1


def kill_train(started, folder, ended):
    """Kill the second script, train.py, once it has saved step 4, unless everything has ended before."""
    while saved_at(folder) < 4:
        if ended.wait(0.02):
            return
    os.kill(started[1].script.process.pid, signal.SIGKILL)


def test_main_resumes_a_run_whose_machine_was_lost(volume, machines, forked, tmp_path):
    """From prepare to sample: training is killed, and the same command is typed again."""
    out = volume / 'out-quickstart'
    words = [*TINY, '--max_iters=2000', '--overwrite', '--prompt=One day']
    ended = threading.Event()
    killer = threading.Thread(target=kill_train, args=(forked, out, ended))
    killer.start()
    with pytest.raises(SystemExit) as exit:
        modal_app.main(*words)
    ended.set()
    killer.join()
    assert exit.value.code == 128 + signal.SIGKILL and len(forked) == 2
    at = saved_at(out)
    assert 4 <= at < 2000
    modal_app.main(*[word.replace('2000', str(at + 2)) for word in words if word != '--overwrite'])
    train, export, sample = (start.script for start in forked[2:])  # prepare.py did not run again
    assert f'step {at}/{at + 2}' in train.out and f'step {at - 1}/' not in train.out
    assert saved_at(out) == at + 2
    assert {path.name for path in out.iterdir()} >= {'best.pt', 'metrics.jsonl', 'llama2c'}
    exported = {path.name for path in (out / 'llama2c').iterdir()}
    assert exported == {'export.json', 'model.bin', 'tokenizer.bin'}, export.err
    assert sample.out.startswith('One day')
    assert [machine['gpu'] for machine in machines] == [None, 'T4', None, 'T4', 'T4']
    assert sorted(path.name for path in volume.iterdir()) == ['data', 'out-quickstart']
    assert not os.listdir(tmp_path / 'here')  # everything is on the volume


def test_overwrite_replaces_only_a_run_from_before_the_call(volume, monkeypatch):
    """When Modal has taken a machine back, it repeats the same call, which must not lose its own run."""
    calls = []
    monkeypatch.setattr(modal_app, 'call', lambda folder, *script: calls.append(script) or 0)
    (volume / 'out').mkdir()
    (volume / 'out/ckpt.pt').touch()
    flags, saved = {'out_dir': 'out', 'overwrite': True}, (volume / 'out/ckpt.pt').stat().st_mtime
    for start_time in saved + 9, saved - 9:
        assert modal_app.train.local(flags, [], '', start_time, {}) == 0
    given = [(flags.get('init_from'), flags['overwrite']) for name, flags, *_ in calls if name == 'train']
    assert given == [(None, True), ('resume', False)]


def test_call_asks_its_script_to_stop_and_waits(volume, monkeypatch):
    """Modal interrupts a function to take its machine back: the script gets SIGTERM and time to save."""
    (volume / 'script.py').write_text('''
import pathlib, signal, time

def save(*_):
    time.sleep(0.5)
    pathlib.Path('saved').touch()

signal.signal(signal.SIGTERM, save)
pathlib.Path('started').touch()
while not pathlib.Path('saved').exists():
    time.sleep(0.01)
''')
    monkeypatch.setitem(scripts.SCRIPTS, 'sample', volume / 'script.py')

    def interrupt():
        while not (volume / 'started').exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        modal_app.sample.local({})
    signal.signal(signal.SIGINT, handler)
    assert (volume / 'saved').exists()


@pytest.mark.parametrize('ending, status', [('sys.exit(2)', 2), ('os.kill(os.getpid(), 15)', 143)])
def test_call_passes_flags_and_returns_the_status(volume, monkeypatch, ending, status):
    (volume / 'script.py').write_text(f'''
import os, sys

print(os.getcwd(), os.environ['HF_HOME'], *sys.argv[1:], file=open('printed', 'w'))
{ending}
''')
    monkeypatch.setitem(scripts.SCRIPTS, 'sample', volume / 'script.py')
    assert modal_app.sample.local({'start': 'a=b c', 'top_k': 3}) == status
    printed = (volume / 'printed').read_text()
    assert printed == f'{volume} {volume}/caches/huggingface --start=a=b c --top_k=3\n'


def test_start_stops_after_a_script_that_failed(machines, volume, monkeypatch):
    monkeypatch.setattr(modal_app, 'call', lambda folder, name, *_: 3 * (name == 'train'))
    with pytest.raises(SystemExit) as exit:
        modal_app.main()
    assert exit.value.code == 3 and len(machines) == 2


def test_train_uses_torchrun_for_several_gpus(volume, monkeypatch):
    started, process = [], MagicMock()
    process.__enter__.return_value.wait.return_value = 0
    monkeypatch.setattr(subprocess, 'Popen', lambda words, **_: started.append(words) or process)
    modal_app.train.local({'out_dir': 'out'}, ['config/quickstart.py'], '8', 0, {})
    assert started[0][2:5] == ['torch.distributed.run', '--standalone', '--nproc_per_node=8']
    assert started[0][5:] == [ROOT / 'train.py', ROOT / 'config/quickstart.py', '--out_dir=out']
    assert started[1][1:] == [ROOT / 'export.py']


def test_train_succeeds_if_only_the_export_fails(volume, monkeypatch, capsys):
    monkeypatch.setattr(modal_app, 'call', lambda folder, name, *_: 2 * (name == 'export'))
    assert modal_app.train.local({'out_dir': 'out'}, [], '', 0, {}) == 0
    assert 'not exported for llama2.c' in capsys.readouterr().err


def passed(*words):
    """Return {script: its flags} for a command line."""
    return scripts.plan(words, modal_app.OWN)[3]


def test_plan_passes_a_setting_to_the_scripts_that_declare_it():
    own, files, folder, flags = scripts.plan(
        ['--source', 'sample', '--seed=3', '--prompt', 'One=day', '--n_layer', '2', '--ckpt', 'last',
         '--compile', '--dtype=float32', '--gpu=H100:8', '--init_from=m.bin', '--offline', '--num_proc', '2'],
        modal_app.OWN)
    assert (own['gpu'], own['command'], files) == ('H100:8', 'all', ['config/quickstart.py'])
    assert folder == 'data/seed=3,source=sample'
    assert flags == {
        'prepare': {'source': 'sample', 'seed': 3, 'offline': True, 'num_proc': 2, 'out_dir': folder},
        'train': {'seed': 3, 'n_layer': 2, 'compile': True, 'dtype': 'float32', 'init_from': 'm.bin',
                  'out_dir': 'out-quickstart', 'dataset': folder},
        'export': {'ckpt': 'last', 'out_dir': 'out-quickstart', 'format': 'llama2c',
                   'path': 'out-quickstart/llama2c'},
        'sample': {'seed': 3, 'start': 'One=day', 'ckpt': 'last', 'compile': True, 'dtype': 'float32',
                   'out_dir': 'out-quickstart'}}


def test_defaults_reads_the_settings_of_a_script():
    import train

    names = scripts.defaults(ROOT / 'train.py')
    assert names == {name: getattr(train, name) for name in scripts.configurator.declarations(train.__file__)
                     if type(getattr(train, name)) in scripts.configurator.KINDS}


def test_plan_uses_tiny_stories_by_default():
    own, files, folder, flags = scripts.plan([], modal_app.OWN)
    assert (own['gpu'], files, folder) == ('T4', ['config/tiny_stories.py'], 'data/tiny_stories')
    assert 'source' not in flags['prepare'] and flags['sample'] == {'out_dir': 'out-tiny-stories'}


def test_inference_samples_from_the_run_of_the_same_command_line(machines, volume, monkeypatch):
    calls = []
    monkeypatch.setattr(modal_app, 'call', lambda folder, *script: calls.append(script) or 0)
    config = str(ROOT / 'config/char_1m.py')
    for command in 'train', 'inference', 'sample':
        modal_app.main(config, '--command', command, '--prompt=A', '--out_dir=o', '--gpu=A10:2')
    assert [name for name, *_ in calls] == ['prepare', 'train', 'export', 'sample', 'sample']
    assert calls[-1] == calls[-2] == ('sample', {'start': 'A', 'out_dir': 'o'})
    assert calls[1][2:] == (['config/char_1m.py'], '2')
    assert [machine['gpu'] for machine in machines] == [None, 'A10:2', 'A10', 'A10']


def test_plan_names_data_after_the_settings_it_is_prepared_with():
    folder = passed('--source=sample')['train']['dataset']
    same = passed('--source=sample', '--num_proc=3', '--offline', '--max_iters=9')
    assert same['train']['dataset'] == folder
    others = [passed('--source=sample', word)['train']['dataset']
              for word in ('--vocab_size=300', '--seed=9', '--tokenizer=a/b', '--tokenizer=a,b')]
    assert len({folder, *others}) == 5 and all(name.count('/') == 1 for name in others)
    assert scripts.plan(['--dataset=data/mine', '--seed=3'], modal_app.OWN)[2] == ''


@pytest.mark.parametrize('words, named', [
    (['--max_iter=5'], 'max_iter max_iters'), (['--max_iters=many'], 'max_iters int many'),
    (['--command=trian'], 'command trian train'), (['config/quikstart'], 'quikstart'),
    (['--prompt=A', '--start=B'], 'start twice'), (['--path=x'], 'path'),
    (['--dataset=data/mine', '--encoding_type=bpe'], 'dataset leave encoding_type'),
    (['--out_dir=/tmp/x'], 'out_dir /tmp/x volume'), (['--out_dir=../x'], 'out_dir ../x volume'),
    (['elsewhere.json'], 'elsewhere.json config')])
def test_main_reports_a_mistake_in_one_line_before_anything_runs(volume, machines, capsys, words, named):
    Path('elsewhere.json').write_text('{}')
    with pytest.raises(SystemExit) as exit:
        modal_app.main(*words)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out and err.count('\n') == 1 and not machines
    assert not [name for name in named.split() if name not in err], err


def test_main_reports_an_error_of_modal_in_one_line(volume, machines, monkeypatch, capsys):
    def timeout(*arguments):
        raise TimeoutError('Task timed out')

    monkeypatch.setattr(modal_app.prepare, 'remote', timeout)
    with pytest.raises(SystemExit) as exit:
        modal_app.main()
    err = capsys.readouterr().err
    assert exit.value.code == 1 and err.count('\n') == 1 and 'Task timed out' in err and 'again' in err


def test_stays_here_lets_code_and_recipes_through():
    copied = ['train.py', 'config/char_1m.py', 'data/tiny_stories/prepare.py', 'requirements.txt']
    left_out = ['.git/HEAD', '.venv/lib/a.py', 'out-x/ckpt.pt', 'data/tiny_stories/meta.json',
                'data/mine/train_00000.bin', 'formats/__pycache__/base.pyc']
    assert [name for name in copied + left_out if scripts.stays_here(Path(name))] == left_out


def entrypoint(app):
    """Return the function that `modal run cloud/modal_app.py::APP` calls: the app's one entrypoint."""
    if isinstance(app, StandInApp):
        entrypoints = app.entrypoints
    else:
        entrypoints = [found.info.raw_f for found in app.registered_entrypoints.values()]
    assert len(entrypoints) == 1
    return entrypoints[0]


def test_only_one_entrypoint_is_a_global_name():
    """`modal run FILE` without ::APP refuses if it finds several."""
    values = [getattr(value, 'info', SimpleNamespace(raw_f=value)).raw_f if callable(value) else None
              for value in vars(modal_app).values()]
    apps = modal_app.app, modal_app.transfer, modal_app.cleanup
    assert [entrypoint(app) in values for app in apps] == [True, False, False]


@pytest.fixture
def transfer():
    return entrypoint(modal_app.transfer)


def test_transfer_copies_a_run_to_the_volume_and_back(volume, transfer, capsys):
    Path('out-x/llama2c').mkdir(parents=True)
    Path('out-x/ckpt.pt').write_bytes(b'12345')
    Path('out-x/llama2c/model.bin').write_bytes(b'')
    transfer('put', 'out-x')
    assert (volume / 'out-x/llama2c/model.bin').exists()
    (volume / 'out-x/ckpt.pt').write_bytes(b'123456')
    for words in ('put', 'out-x'), ('get', 'out-x'):
        with pytest.raises(SystemExit):
            transfer(*words)
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and 'out-x' in err and '--overwrite' in err
    assert Path('out-x/ckpt.pt').read_bytes() == b'12345'
    transfer('get', 'out-x', '--overwrite')
    assert Path('out-x/ckpt.pt').read_bytes() == b'123456'
    shutil.rmtree('out-x')
    transfer('get', 'out-x/')
    assert sorted(map(str, Path().rglob('*'))) == ['out-x', 'out-x/ckpt.pt', 'out-x/llama2c',
                                                   'out-x/llama2c/model.bin']


@pytest.mark.parametrize('words', [(), ('get',), ('send', 'out-x'), ('get', '../x'), ('put', '/x'),
                                   ('get', 'out-x', 'out-y')])
def test_transfer_reports_a_mistake_in_one_line(volume, transfer, words, capsys):
    with pytest.raises(SystemExit) as exit:
        transfer(*words)
    assert exit.value.code == 2 and capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('answers, kept', [
    (['yes', 'out-x'], False), (['no'], True), (['yes', 'yes'], True), (['y'], True), ([], True)])
def test_cleanup_deletes_after_two_confirmations(volume, monkeypatch, capsys, answers, kept):
    for name, size in ('out-x/ckpt.pt', 2_000_000), ('data/mine/meta.json', 10), ('data/b/meta.json', 10):
        (volume / name).parent.mkdir(parents=True)
        (volume / name).write_bytes(b'x' * size)
    answers = iter(answers)
    remove = entrypoint(modal_app.cleanup)

    def answer(question):
        with contextlib.suppress(StopIteration):
            return next(answers)
        raise EOFError('EOF when reading a line')

    monkeypatch.setattr('builtins.input', answer)
    remove()
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert listed == [['0.0', 'MB', 'data/b'], ['0.0', 'MB', 'data/mine'], ['2.0', 'MB', 'out-x']]
    with pytest.raises(SystemExit) if kept else contextlib.nullcontext():
        remove('out-x')
    assert (volume / 'out-x').exists() == kept and not list(answers)
    assert (volume / 'data/mine').exists()
    with pytest.raises(SystemExit):
        remove('data/mime')
    assert 'data/mine' in capsys.readouterr().err.splitlines()[-1]


def test_missing_package_is_one_line(tmp_path):
    """`python -S` does not find what pip has installed."""
    done = subprocess.run([sys.executable, '-S', str(ROOT / 'cloud/modal_app.py')], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ''})
    assert done.returncode == 1 and done.stderr == 'modal_app.py: this needs a package: pip install modal\n'
