"""What tests share: a prepared folder, settings for runs of a second, scripts as a user starts them."""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

from data.shards import ShardWriter
from data.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parents[2]
STORIES = [f'Once there was a dog number {i}. It ran to the tree. The dog was happy.' for i in range(300)]
# An epoch of these is 37 steps of 8 sequences.
SETTINGS = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=64', '--batch_size=4',
            '--gradient_accumulation_steps=2', '--log_interval=1', '--device=cpu', '--dtype=float32']


def prepare(folder, train=None, val=None, shard_tokens=10**6, **changes):
    """What prepare.py writes of STORIES, or of these ids (uint16 arrays, 3 bytes each); returns `folder`."""
    folder.mkdir(exist_ok=True)
    enc, splits = CharTokenizer.train(STORIES), {}
    enc.save(folder)
    for split, ids, texts in ('train', train, STORIES[:270]), ('val', val, STORIES[270:]):
        size = 3 * len(ids) if ids is not None else sum(len(text.encode()) for text in texts)
        ids = ids if ids is not None else enc.encode_pieces([(text, True) for text in texts])[0]
        writer = ShardWriter(folder, split, shard_tokens)
        for start in range(0, len(ids), 150):
            writer.write(ids[start:start + 150])
        splits[split] = {'stories': len(texts), 'tokens': len(ids), 'bytes': size, 'shards': writer.close()}
    meta = {'encoding': 'char', 'vocab_size': enc.vocab_size, 'source': 'tests', 'splits': splits,
            'delimiter': enc.delimiter, 'blank': enc.blank, 'middle': enc.middle} | changes
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def metrics(folder):
    """The lines of a run's metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ('tokens_per_s', 'seconds')}
            for line in lines]


# Scripts in processes forked from one that has imported what is slow

forks = multiprocessing.get_context('forkserver')
forks.set_forkserver_preload([
    'pytest', 'matplotlib.figure', 'torch._dynamo', 'torch.distributed', 'pandas', 'requests'])


def once(words):
    """The words without each --key=value that a later one overrides, as a flag may be given only once."""
    keys = [word.split('=')[0] for word in words]
    return [word for i, word in enumerate(words) if '=' not in word or keys[i] not in keys[i + 1:]]


def run_script(words, folder, cwd, environment):
    os.chdir(cwd)
    multiprocessing.set_start_method('fork', force=True)  # as it would be, had a user started it
    for stream, name in (1, 'out'), (2, 'err'):
        os.dup2(os.open(f'{folder}/{name}', os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    if environment.get('MPLBACKEND') == '':  # no pictures, which take most of such a run's time
        sys.modules['matplotlib.figure'] = None
    import torch

    torch.set_num_threads(1)
    sys.argv = once(words)
    sys.path[0:0] = [str(ROOT)]
    runpy.run_path(str(ROOT / words[0]), run_name='__main__')


class Script:
    """A script of ours as a user starts it; what it prints is in `out` and `err`."""

    def __init__(self, *words, cwd=ROOT, **environment):
        self.folder = tempfile.mkdtemp()
        self.process = forks.Process(target=run_script,
                                     args=([*map(str, words)], self.folder, str(cwd), environment))
        self.process.start()

    out = property(lambda self: self.read('out'))
    err = property(lambda self: self.read('err'))

    def read(self, name):
        path = Path(self.folder, name)
        return path.read_text() if path.exists() else ''

    def wait_for(self, text):
        """Until it has printed `text`."""
        while text not in self.out:
            assert self.process.is_alive(), self.err
            time.sleep(0.01)

    def finish(self, status=0):
        """Until it has ended with `status`; returns itself."""
        self.process.join(120)
        assert self.process.exitcode == status, (self.process.exitcode, self.out, self.err)
        return self


def script(*words, status=0, cwd=ROOT, **environment):
    return Script(*words, cwd=cwd, **environment).finish(status)


def on_ranks(ranks, *words, program='train.py'):
    """train.py on some ranks until its end, without torchrun and its time; returns what rank 0 prints."""
    import torch.distributed as dist

    store = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    around = {'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': ranks, 'MASTER_ADDR': 'localhost',
              'MASTER_PORT': store.port, 'TORCHELASTIC_USE_AGENT_STORE': True}
    runs = [Script(program, *words, **{name: str(value) for name, value in (
        around | {'RANK': rank, 'LOCAL_RANK': rank}).items()}) for rank in range(ranks)]
    for run in runs:
        run.finish()
    return runs[0].out
