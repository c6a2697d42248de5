"""Runs train.py in processes forked from this one, which has imported torch and all that is slow.

    python tests/forked.py FILE     FILE: a JSON list of runs, one after the other, each [ranks, [its flags]]
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from any working directory

# ruff: noqa: E402
import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # (the first step of an optimizer imports it)
import torch.distributed


def fork(words, log, **environment):
    """train.py with the flags `words` in a process of its own, what it prints in `log`; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        with open(log, 'w') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        sys.argv = ['train.py', *words]
        runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
        status = 0
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def finish(words, log, ranks=1):
    """Let a run on `ranks` ranks reach its end."""
    pids = {}
    # torchrun's own process has the store too
    store = torch.distributed.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)
    for rank in range(ranks):
        around = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': ranks,
                  'MASTER_ADDR': 'localhost', 'MASTER_PORT': store.port, 'TORCHELASTIC_USE_AGENT_STORE': True}
        pids[fork(words, f'{log}-{rank}', **{key: str(value) for key, value in around.items()})] = rank
    for pid, rank in pids.items():
        assert os.waitpid(pid, 0)[1] == 0, Path(f'{log}-{rank}').read_text()


if __name__ == '__main__':
    torch.set_num_threads(1)
    for ranks, words in json.loads(Path(sys.argv[1]).read_text()):
        finish(words, sys.argv[1] + '.log', ranks)
