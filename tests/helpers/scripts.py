"""Prepared folders, and our scripts in processes of their own, as a user starts them.

The processes are forked from one that has already imported what is slow. Two things differ from a user's
process: there is one thread, and loss.png, which would take most of the time, is drawn only with DRAW=1.
With LIKE_WINDOWS=1 a file that is open or mapped cannot be removed or replaced.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

from data.shards import ShardWriter
from data.tokenizer import CharTokenizer
from tests.helpers.windows import windows_files

ROOT = Path(__file__).resolve().parents[2]

# 270 stories for training and 30 for validation; an epoch is 37 steps of 8 sequences
STORIES = [f'Once there was a dog number {i}. It ran to the tree. The dog was happy.' for i in range(300)]
SETTINGS = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64', '--batch_size=4',
            '--gradient_accumulation_steps=2', '--log_interval=1', '--device=cpu', '--dtype=float32']


def prepare(folder, train=None, val=None, shard_tokens=10**6, **changes):
    """Write what prepare.py makes of STORIES and return `folder`.

    train, val: the ids of a split instead (uint16 arrays), of which meta.json claims 3 bytes each.
    changes: other values in meta.json.
    """
    folder.mkdir(exist_ok=True)
    enc = CharTokenizer.train(STORIES)
    enc.save(folder)
    splits = {}
    for split, ids, texts in ('train', train, STORIES[:270]), ('val', val, STORIES[270:]):
        if ids is None:
            ids, _ = enc.encode_pieces([(text, True) for text in texts])
            n_bytes = sum(len(text.encode()) for text in texts)
        else:
            n_bytes = 3 * len(ids)
        writer = ShardWriter(folder, split, shard_tokens)
        for start in range(0, len(ids), 150):
            writer.write(ids[start:start + 150])
        splits[split] = {'stories': len(texts), 'tokens': len(ids), 'bytes': n_bytes,
                         'shards': writer.close()}
    meta = {'encoding': 'char', 'vocab_size': enc.vocab_size, 'source': 'tests', 'splits': splits,
            'delimiter': enc.delimiter, 'blank': enc.blank, 'middle': enc.middle} | changes
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def metrics(folder):
    """Return the lines of a run's metrics.jsonl, without what depends on the clock."""
    records = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    for record in records:
        record.pop('tokens_per_s', None)
        record.pop('seconds', None)
    return records


# scripts ----------------------------------------------------------------------

forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload([
    'pytest', 'matplotlib.figure', 'torch._dynamo', 'torch.distributed', 'pandas', 'requests'])


def once(words):
    """Return the words of a command line without each --key=value that a later one overrides.

    A flag may be given only once; tests have defaults that a test overrides.
    """
    last = {word.split('=')[0]: i for i, word in enumerate(words)}
    return [word for i, word in enumerate(words) if '=' not in word or last[word.split('=')[0]] == i]


def run_script(words, folder, cwd, environment):
    """Become a script of ours: called in a new process."""
    gc.freeze()  # what was imported before is not searched for garbage again and again
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in signal.SIGTERM, signal.SIGHUP:  # a pytest under nohup ignores SIGHUP
        signal.signal(number, signal.SIG_DFL)
    multiprocessing.set_start_method('fork', force=True)  # the default if a user starts the script
    for stream, name in (1, 'out'), (2, 'err'):
        os.dup2(os.open(f'{folder}/{name}', os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    if not environment.get('DRAW'):
        sys.modules['matplotlib.figure'] = None
    import torch

    torch.set_num_threads(1)
    sys.argv = once(words)
    sys.path.insert(0, str(ROOT))
    file_system = windows_files() if environment.get('LIKE_WINDOWS') else contextlib.nullcontext()
    with file_system:
        runpy.run_path(str(ROOT / words[0]), run_name='__main__')


class Script:
    """A script in a process of its own; what it has printed so far is in `out` and `err`."""

    def __init__(self, *words, cwd=ROOT, **environment):
        self.folder = tempfile.mkdtemp()
        words = [str(word) for word in words]
        self.process = forks.Process(target=run_script, args=(words, self.folder, str(cwd), environment))
        self.process.start()

    @property
    def out(self):
        return self.read('out')

    @property
    def err(self):
        return self.read('err')

    def read(self, name):
        path = Path(self.folder, name)
        return path.read_text() if path.exists() else ''

    def wait_for(self, text):
        """Wait until it has printed `text`."""
        while text not in self.out:
            assert self.process.is_alive(), self.err
            time.sleep(0.01)

    def finish(self, status=0):
        """Wait until it has ended with `status`, and return itself."""
        self.process.join(120)
        assert self.process.exitcode == status, (self.process.exitcode, self.out, self.err)
        return self


def script(*words, status=0, cwd=ROOT, **environment):
    """Run a script until it ends with `status`, and return the Script."""
    return Script(*words, cwd=cwd, **environment).finish(status)


def rank_variables(rank, ranks, port=1):
    """Return the environment variables {name: text} by which torchrun tells a process its rank."""
    numbers = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': ranks,
               'MASTER_PORT': port}
    return {'MASTER_ADDR': 'localhost'} | {name: str(number) for name, number in numbers.items()}


def on_ranks(ranks, *words, program='train.py'):
    """Run a script on several ranks until all have ended, without torchrun; return what rank 0 prints."""
    runs = start_ranks([(program, *words)] * ranks)
    for run in runs:
        run.finish()
    return runs[0].out


def start_ranks(commands):
    """Start ranks without torchrun, each with a command line of its own; return their Scripts."""
    import torch.distributed as dist

    ranks = len(commands)
    store = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    runs = []
    for rank, words in enumerate(commands):
        environment = rank_variables(rank, ranks, store.port) | {'TORCHELASTIC_USE_AGENT_STORE': 'True'}
        runs.append(Script(*words, **environment))
    runs[0].store = store  # rank 0 keeps it open for the others
    return runs
