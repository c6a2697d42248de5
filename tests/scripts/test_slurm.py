"""cloud/slurm.sh without a cluster: stand-ins for `srun`, `scontrol` and `scancel` come first in PATH.

torchrun and train.py are real in the first two tests. In the others torchrun is a stand-in, too.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.checkpoint import load_checkpoint
from tests.helpers.scripts import ROOT, SETTINGS, metrics

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason="uses bash 4 and Linux's pkill")

JOB = os.getpid()  # the job's number decides its port, so each test process needs another one
STAND_INS = {
    # all nodes are this machine; on SIGTERM it kills its tasks at once, as the real srun does
    'srun': r'''
        while [[ $1 == --* ]]; do shift; done
        trap 'pkill -KILL -P "$(paste -sd, tasks)"; kill -KILL $(<tasks)' TERM
        : > tasks
        for ((i = 0; i < SLURM_NNODES; i++)); do "$@" & echo $! >> tasks; done
        status=0
        for task in $(<tasks); do wait "$task" || status=$?; done
        exit $status''',
    # sends the signal to every process of a step, not only to torchrun, as the real scancel does
    'scancel': r'''
        [ "$*" = "--signal=TERM $SLURM_JOB_ID" ] || exit 1
        until [ -s tasks ]; do sleep 0.01; done
        pkill -TERM -P "$(paste -sd, tasks)"; kill -TERM $(<tasks)''',
    'scontrol': r'''
        if [ "$1" = show ]; then printf 'localhost\nnode2\n'; else echo "$@" >> calls; fi''',
}
# prints how it was started, and exits with STATUS: at once, or on SIGTERM if UNTIL says so
TORCHRUN = r'''
    trap 'exit $STATUS' TERM
    echo "$@"; env | grep OFFLINE
    while [ "$UNTIL" = SIGTERM ]; do sleep 0.02; done
    exit $STATUS'''


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(*words, **environment) starts a job in tmp_path and returns its Popen."""
    (tmp_path / 'train.py').symlink_to(ROOT / 'train.py')
    for name, text in STAND_INS.items():
        stand_in(tmp_path, name, text)
    jobs = []
    of_a_job = 'SLURM_', 'OUT_DIR', 'INIT_FROM'
    outside = {name: value for name, value in os.environ.items() if not name.startswith(of_a_job)}

    def submit(*words, **environment):
        path = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        slurm = {'SLURM_JOB_ID': JOB, 'SLURM_JOB_NODELIST': 'node[1-2]', 'SLURM_NNODES': 1,
                 'OMP_NUM_THREADS': 1, 'PATH': path}
        variables = {name: str(value) for name, value in (slurm | environment).items()}
        command = ['bash', ROOT / 'cloud' / 'slurm.sh', *[str(word) for word in words]]
        jobs.append(subprocess.Popen(
            command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, env=outside | variables))
        return jobs[-1]

    yield submit
    for job in jobs:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGTERM)


def stand_in(folder, name, text):
    (folder / 'bin').mkdir(exist_ok=True)
    (folder / 'bin' / name).write_text('#!/usr/bin/env bash\n' + text + '\n')
    (folder / 'bin' / name).chmod(0o755)


def requeued(folder):
    """Return the calls of scontrol other than `scontrol show`."""
    calls = folder / 'calls'
    return calls.read_text().splitlines() if calls.exists() else []


def test_job_saves_on_notice_and_resumes_in_its_next_turn(data, tmp_path, start, sbatch):
    """The two turns together equal a run without interruption."""
    words = ['--max_iters=100', '--eval_interval=50', '--eval_iters=2']
    start(*words)
    words += [*SETTINGS, f'--dataset={data}']
    out = tmp_path / f'out-{JOB}'
    first = sbatch(*words)
    assert any('step 5/' in line for line in first.stdout), first.stderr.read()
    first.send_signal(signal.SIGUSR1)
    _, err = first.communicate(timeout=60)
    step = load_checkpoint(out / 'ckpt.pt')['iter']
    assert f'stopped at step {step} and saved' in err and 5 < step < 100
    assert requeued(tmp_path) == [f'requeue {JOB}'] and first.returncode

    second = sbatch(*words, SLURM_RESTART_COUNT=1)
    out_text, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert f'step {step}/' in out_text and f'step {step - 1}/' not in out_text
    assert requeued(tmp_path) == [f'requeue {JOB}']
    assert metrics(out) == metrics(tmp_path / 'out')


def test_job_with_a_mistake_is_not_requeued(data, tmp_path, sbatch):
    job = sbatch(f'--dataset={data}', '--n_layr=3')
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1  # the status of torchrun, whatever that of train.py is
    assert 'train.py: ' in err and 'n_layr' in err and 'exitcode  : 2' in err
    assert requeued(tmp_path) == []


@pytest.mark.parametrize('status', [0, 1, 2, 143])
@pytest.mark.parametrize('noticed', [True, False])
def test_job_is_requeued_if_it_fails_after_a_notice(tmp_path, sbatch, noticed, status):
    """A run that succeeds after a notice is complete."""
    stand_in(tmp_path, 'torchrun', TORCHRUN)
    job = sbatch(STATUS=status, UNTIL='SIGTERM' if noticed else '')
    assert 'train.py' in job.stdout.readline()
    if noticed:
        job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=10)
    assert job.returncode == status
    assert requeued(tmp_path) == ([f'requeue {JOB}'] if noticed and status else [])


def test_cancelled_job_is_not_requeued(tmp_path, sbatch):
    """scancel also signals the script itself, but with SIGTERM."""
    stand_in(tmp_path, 'torchrun', TORCHRUN)
    job = sbatch(STATUS=1, UNTIL='SIGTERM')
    job.stdout.readline()
    job.send_signal(signal.SIGTERM)
    assert job.wait(10) == -signal.SIGTERM
    subprocess.run([tmp_path / 'bin' / 'scancel', '--signal=TERM', str(JOB)], cwd=tmp_path,
                   env=os.environ | {'SLURM_JOB_ID': str(JOB)})
    assert requeued(tmp_path) == []


@pytest.mark.parametrize('restarts, exists, given, init_from', [
    ('', False, '', 'scratch'), ('', True, '', 'scratch'),  # train.py refuses the second: another job's run
    ('', False, 'out-pretrained', 'out-pretrained'), ('2', False, 'out-pretrained', 'out-pretrained'),
    ('0', True, '', 'scratch'), ('1', False, '', 'scratch'), ('2', True, 'out-pretrained', 'resume')])
def test_job_starts_torchrun_on_two_nodes(tmp_path, sbatch, restarts, exists, given, init_from):
    stand_in(tmp_path, 'torchrun', TORCHRUN)
    (tmp_path / 'my run').mkdir()
    if exists:
        (tmp_path / 'my run' / 'ckpt.pt').touch()
    environment = {'SLURM_RESTART_COUNT': restarts, 'INIT_FROM': given, 'OUT_DIR': 'my run', 'STATUS': 0}
    job = sbatch('config/x.py', '--max_iters', 7, SLURM_GPUS_ON_NODE=4, SLURM_NNODES=2, **environment)
    lines = sorted(job.communicate(timeout=10)[0].splitlines())
    command = (f'--nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_id={JOB} '
               f'--rdzv_endpoint=localhost:{20000 + JOB % 10000} train.py config/x.py --max_iters 7 '
               f'--out_dir my run --init_from {init_from}')
    offline = ['HF_DATASETS_OFFLINE=1', 'HF_HUB_OFFLINE=1', 'TRANSFORMERS_OFFLINE=1']
    assert lines == [command] * 2 + sorted(offline * 2)


def test_slurm_script_passes_shellcheck():
    check = ['shellcheck'] if shutil.which('shellcheck') else ['bash', '-n']
    subprocess.run([*check, ROOT / 'cloud' / 'slurm.sh'], check=True)
