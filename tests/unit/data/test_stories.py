"""Stories: worker processes that are killed."""

import os
import sys
import threading
import time

import datasets
import pytest

from configurator import UserError
from data import stories, workers
from data.stories import map_stories

linux_only = pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked on Linux only')


@pytest.fixture
def small_stories(monkeypatch):
    """Start worker processes for small datasets, too, and forget them after the test."""
    monkeypatch.setattr(stories, 'SMALL', 0)
    monkeypatch.setattr(workers, 'STUCK_SECONDS', 1)
    monkeypatch.setattr(workers.Workers, 'active', None)


def note_process(batch, folder):
    """Note this process's id, and work for a minute if the story says so."""
    text = batch['text'][0]
    (folder / text).write_text(str(os.getpid()))
    if text == 'slow':
        time.sleep(60)
    return {'n': [1]}


@linux_only
@pytest.mark.parametrize('victim', ['slow', 'fast'], ids=['busy', 'idle'])
def test_map_stories_reports_a_killed_worker(tmp_path, small_stories, victim):
    def kill():
        while not all((tmp_path / name).exists() for name in ('slow', 'fast')):
            time.sleep(0.01)
        time.sleep(0.5)  # until the fast one waits for another job
        os.kill(int((tmp_path / victim).read_text()), 9)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match=r'a worker process was killed.*try --num_proc 1'):
        map_stories(datasets.Dataset.from_dict({'text': ['fast', 'slow']}), note_process, 'test',
                    {'n': 'int64'}, tmp_path, num_proc=2, folder=tmp_path)
    killer.join()


def refuse(batch):
    raise UserError(f"not {batch['text'][0]}")


@pytest.mark.parametrize('num_proc', [1, 2])
def test_map_stories_passes_on_errors_of_workers(tmp_path, small_stories, num_proc):
    dataset = datasets.Dataset.from_dict({'text': ['this', 'this']})
    with pytest.raises(UserError, match=r'^not this$'):
        map_stories(dataset, refuse, 'test', {'n': 'int64'}, tmp_path, num_proc)
