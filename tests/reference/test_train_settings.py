"""Every setting of train.py: what changing it changes, what it leaves alone, and which values are refused."""

import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from tests.reference.naive_train import Data, evaluate
from tests.reference.runs import (
    Script,
    checkpoint,
    flags,
    metrics,
    prepare,
    run_script,
    script,
    stories_for_infilling,
)

# Runs of six steps, evaluated at 0, 3 and 6
BASE = {'block_size': 12, 'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'max_iters': 6, 'batch_size': 2,
        'gradient_accumulation_steps': 2, 'warmup_iters': 2, 'eval_interval': 3, 'learning_rate': 0.01}

# What can be seen of a run: see `observe`
FORWARD = {'untrained', 'step 0', 'weights', 'trained'}  # what another model or other weights change
TRAINING = {'weights', 'trained'}  # what other updates change
LENGTH = {'lr', 'steps', 'evaluated', *TRAINING}

# (settings, what of a run they change; all else stays)
CHANGES = [
    ({'seed': 1}, FORWARD),
    # the model
    ({'block_size': 10}, FORWARD),
    ({'n_layer': 2}, FORWARD | {'shapes'}),
    ({'n_kv_head': 1}, FORWARD | {'shapes'}),
    ({'n_embd': 12}, FORWARD | {'shapes'}),
    ({'norm': 'layer'}, FORWARD),
    ({'position': 'learned'}, FORWARD | {'shapes'}),
    ({'position': 'sinusoidal'}, FORWARD),
    ({'mlp': 'gelu'}, FORWARD | {'shapes'}),
    ({'mlp_width': 12}, FORWARD | {'shapes'}),
    ({'qk_norm': True}, FORWARD | {'shapes'}),
    ({'bias': True}, FORWARD | {'shapes'}),
    ({'tie_embeddings': False}, FORWARD),
    ({'norm_eps': 1e-3}, FORWARD),
    ({'dropout': 0.2}, FORWARD - {'untrained'}),  # no evaluation has dropout
    # the updates
    ({'optimizer': 'adamw'}, TRAINING | {'lr'}),
    ({'learning_rate': 0.02}, TRAINING | {'lr'}),
    ({'learning_rate': 0.0}, set()),  # 0.01 for Muon
    ({'warmup_iters': 0}, TRAINING | {'lr'}),
    ({'weight_decay': 0.5}, TRAINING),
    ({'beta1': 0.5}, TRAINING),
    ({'beta2': 0.5}, TRAINING),
    ({'grad_clip': 0.01}, TRAINING),
    ({'grad_clip': 0.0}, TRAINING),
    ({'batch_size': 3}, {'step 0', *TRAINING}),
    ({'gradient_accumulation_steps': 3}, {'step 0', *TRAINING}),
    ({'max_iters': 8}, LENGTH),
    ({'max_epochs': 0.1}, LENGTH),
    # what a run shows and keeps
    ({'eval_interval': 2}, {'evaluated'}),
    ({'eval_interval': 0}, {'evaluated'}),
    ({'eval_iters': 2}, {'untrained', 'trained'}),
    ({'eval_iters': 10**6}, set()),
    ({'patience': 5}, set()),
    ({'save_interval': 2}, {'files'}),
    ({'log_interval': 4}, {'steps', 'lr'}),
    ({'verify_data': True}, set()),
    ({'overwrite': True}, set()),
    ({'compile': 'False'}, set())]

# In a model as small as this one these change the first figures by little more than rounding
CHANGES_LATER = [{'n_head': 4}, {'rope_theta': 10.0}, {'dtype': 'bfloat16'}, {'dtype': 'float16'}]

# {setting: a value that is refused}
REFUSED = {
    'dataset': 'missing', 'out_dir': '/dev/null/out', 'init_from': 'missing', 'overwrite': 'maybe',
    'verify_data': 2, 'block_size': 0, 'n_layer': 0, 'n_head': 3, 'n_kv_head': 3, 'n_embd': 9,
    'norm': 'batch', 'position': 'alibi', 'mlp': 'tanh', 'mlp_width': -1, 'qk_norm': 'rms', 'bias': 0.5,
    'tie_embeddings': 1, 'dropout': 1.0, 'rope_theta': 0.0, 'norm_eps': 0.0, 'max_iters': 0,
    'max_epochs': -1.0, 'batch_size': 0, 'gradient_accumulation_steps': 0, 'optimizer': 'sgd',
    'learning_rate': -0.1, 'warmup_iters': -1, 'weight_decay': -0.1, 'beta1': 1.0, 'beta2': 1.0,
    'grad_clip': -1.0, 'eval_interval': -1, 'eval_iters': -1, 'patience': -1, 'save_interval': -1,
    'log_interval': 0, 'track': 'tensorboard', 'device': 'cuda:99', 'dtype': 'float64', 'compile': 'maybe',
    'seed': -1}


def settings_of_train():
    """Return the name of each setting that train.py has, as its --help lists them."""
    return re.findall(r'^  --(\w+) ', script('train.py', '--help').out, re.MULTILINE)


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Return a prepared folder whose stories are partly for infilling."""
    folder = tmp_path_factory.mktemp('settings')
    train, val = (stories_for_infilling(folder / 'vocabulary', *kind) for kind in ((701, 1), (303, 2)))
    return prepare(folder / 'data', train, val, shard_tokens=97, infill_rate=0.5)


@pytest.fixture(scope='session')
def baseline(data, tmp_path_factory):
    """Return the folder of a run with the settings BASE."""
    return run_script(data, tmp_path_factory.mktemp('baseline') / 'out', *flags(BASE))


@pytest.fixture(scope='session')
def halfway(data, tmp_path_factory):
    """Return the folder of a run with the settings BASE, at its third step."""
    out = run_script(data, tmp_path_factory.mktemp('halfway') / 'out', *flags(BASE | {'save_interval': 3}))
    (out / 'ckpt_3.pt').replace(out / 'ckpt.pt')
    for path in out.glob('ckpt_*.pt'):
        path.unlink()
    return out


def observe(out):
    """Return what can be seen of a run: {name: a number, a text, or a list or dict of these}."""
    lines, weights = metrics(out), checkpoint(out / 'ckpt.pt')['model']
    evaluations = [line for line in lines if 'val_loss' in line]
    steps = [line for line in lines if 'loss' in line]
    return {
        'shapes': [f'{name} {[*p.shape]}' for name, p in weights.items()],
        'weights': torch.cat([p.flatten() for p in weights.values()]).tolist(),
        'untrained': evaluations[0],
        'trained': evaluations[-1] | {'iter': 0},  # 'evaluated' says which step that is
        'step 0': [steps[0]['loss'], steps[0]['grad_norm']],
        'lr': {str(line['iter']): line['lr'] for line in steps},
        'steps': [line['iter'] for line in steps],
        'evaluated': [line['iter'] for line in evaluations],
        'files': sorted(path.name for path in out.glob('[!.]*'))}


def is_same(one, other):
    """Return whether two values of `observe` differ by no more than rounding in a sum of the same numbers."""
    if one == other or len(one) != len(other):
        return one == other
    if isinstance(one, list) and isinstance(one[0], str):
        return False
    return one == pytest.approx(other, rel=1e-6, abs=1e-8)


def changed(out, baseline):
    """Return the names of what differs between two runs."""
    before, after = observe(baseline), observe(out)
    return {name for name in before if not is_same(before[name], after[name])}


# every setting ----------------------------------------------------------------

def test_every_setting_has_a_case():
    names = settings_of_train()
    in_table = {name for values, _ in CHANGES for name in values}
    in_table |= {name for values in CHANGES_LATER for name in values}
    for name in names:
        tests = [test for test in globals() if test.startswith(f'test_{name}_')]
        assert name in in_table or tests, f'there is no test of what {name} does'
        assert name in REFUSED, f'there is no test of a value that {name} refuses'
    assert len(names) > 40


@pytest.mark.parametrize('values, expected', CHANGES, ids=[str(values) for values, _ in CHANGES])
def test_a_setting_changes_what_it_should_and_nothing_else(data, baseline, tmp_path, values, expected):
    out = run_script(data, tmp_path / 'out', *flags(BASE | values))
    assert changed(out, baseline) == expected


@pytest.mark.parametrize('values', CHANGES_LATER, ids=str)
def test_a_setting_that_shows_once_the_model_is_trained(data, baseline, tmp_path, values):
    found = changed(run_script(data, tmp_path / 'out', *flags(BASE | values)), baseline)
    assert TRAINING <= found <= FORWARD


@pytest.mark.parametrize('name', REFUSED)
def test_a_value_that_means_no_run_is_refused(data, tmp_path, name):
    """In one line that names the setting, before anything is written."""
    words = flags({'dataset': data, 'out_dir': tmp_path / 'out', 'device': 'cpu', name: REFUSED[name]})
    run = Script('train.py', *flags(BASE), *words)
    run.process.join(120)
    assert run.process.exitcode in (1, 2)
    assert run.err.startswith('train.py: ') and run.err.count('\n') == 1
    assert name in run.err or str(REFUSED[name]) in run.err
    assert not (tmp_path / 'out').exists()


# settings that the table cannot show ------------------------------------------

def test_dataset_is_what_is_trained_on(data, baseline, tmp_path):
    """Another training split changes the steps, but not what is known before them of the validation split."""
    train = stories_for_infilling(tmp_path / 'vocabulary', 701, 3)
    val = stories_for_infilling(tmp_path / 'vocabulary', 303, 2)
    other = prepare(tmp_path / 'data', train, val, infill_rate=0.5)
    found = observe(run_script(other, tmp_path / 'out', *flags(BASE)))
    expected = observe(baseline)
    assert found['step 0'] != pytest.approx(expected['step 0'], rel=1e-5)
    for name in found['untrained']:
        same = found['untrained'][name] == pytest.approx(expected['untrained'][name])
        assert same == (name not in ('train_loss', 'train_acc')), name


def test_out_dir_holds_all_that_a_run_writes(data, baseline, tmp_path):
    assert changed(run_script(data, tmp_path / 'a' / 'b', *flags(BASE)), baseline) == set()
    assert sorted(path.name for path in tmp_path.rglob('[!.]*') if path.is_file()) == [
        'best.pt', 'ckpt.pt', 'metrics.jsonl', 'run.json', 'samples.jsonl', 'tokenizer.json']


def test_init_from_a_run_takes_its_weights(data, baseline, tmp_path):
    tuned = {'init_from': baseline, 'max_iters': 1, 'learning_rate': 1e-30}
    found = observe(run_script(data, tmp_path / 'out', *flags(tuned)))
    assert is_same(found['weights'], observe(baseline)['weights'])
    assert is_same(found['untrained'], observe(baseline)['trained'])


def test_seed_draws_the_sampled_stories_too(data, baseline, tmp_path):
    tuned = {'init_from': baseline, 'max_iters': 1, 'learning_rate': 1e-30}
    runs = [run_script(data, tmp_path / str(seed), *flags(tuned | {'seed': seed})) for seed in (1, 2)]
    stories = [(out / 'samples.jsonl').read_text() for out in runs]
    assert changed(*runs) == {'step 0'} and stories[0] != stories[1]


def test_overwrite_replaces_a_run_that_is_safe_without_it(data, baseline, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(baseline, out)
    (out / 'ckpt_2.pt').write_bytes(b'kept')
    files = {path: path.read_bytes() for path in out.iterdir()}
    words = [f'--dataset={data}', f'--out_dir={out}', *flags(BASE | {'seed': 1})]
    assert '--overwrite' in script('train.py', *words, status=2).err
    assert {path: path.read_bytes() for path in out.iterdir()} == files
    fresh = run_script(data, tmp_path / 'fresh', *flags(BASE | {'seed': 1}))
    assert changed(run_script(data, out, *words, '--overwrite'), fresh) == set()
    assert len(metrics(out)) == len(metrics(fresh))


def test_verify_data_finds_a_changed_byte(data, tmp_path):
    folder = tmp_path / 'data'
    shutil.copytree(data, folder)
    for name in 'train_00003.bin', 'val_00001.bin':
        shard = folder / name
        whole = shard.read_bytes()
        shard.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
        words = [f'--dataset={folder}', *flags(BASE), '--device=cpu', '--dtype=float32']
        told = script('train.py', *words, f'--out_dir={tmp_path}/a', '--verify_data', status=1).err
        assert name in told and 'sha256' in told
        script('train.py', *words, '--max_iters=1', f'--out_dir={tmp_path}/{name}')
        shard.write_bytes(whole)


@pytest.mark.parametrize('patience, evaluated', [(0, [0, 3, 6, 9, 11]), (1, [0, 3]), (3, [0, 3, 6, 9])])
def test_patience_counts_evaluations_without_a_lower_loss(data, tmp_path, patience, evaluated):
    """At this rate no weight changes, and the loss neither."""
    values = {'patience': patience, 'learning_rate': 1e-30, 'max_iters': 11, 'log_interval': 5}
    found = observe(run_script(data, tmp_path / 'out', *flags(BASE | values)))
    assert found['evaluated'] == evaluated


def test_save_interval_keeps_the_checkpoints_of_its_steps(data, tmp_path):
    out = run_script(data, tmp_path / 'out', *flags(BASE | {'save_interval': 2}))
    saved = {path.name: checkpoint(path) for path in out.glob('ckpt_*.pt')}
    assert {name: kept['iter'] for name, kept in saved.items()} == {f'ckpt_{i}.pt': i for i in (0, 2, 4, 6)}
    heads = [kept['model']['lm_head.weight'] for kept in saved.values()]
    assert len({head.sum().item() for head in heads}) == 4
    last = checkpoint(out / 'ckpt.pt')
    assert torch.equal(last['model']['lm_head.weight'], saved['ckpt_6.pt']['model']['lm_head.weight'])


def test_log_interval_says_which_steps_are_shown(data, tmp_path):
    out = tmp_path / 'out'
    done = script('train.py', f'--dataset={data}', f'--out_dir={out}', *flags(BASE | {'log_interval': 4}),
                  '--device=cpu', '--dtype=float32')
    lines = [line for line in metrics(out) if 'loss' in line]
    assert [line['iter'] for line in lines] == [0, 4]
    shown = re.findall(r'^step (\d+)/6: loss ([\d.]+)', done.out, re.MULTILINE)
    assert shown == [(str(line['iter']), f"{line['loss']:.4f}") for line in lines]


@pytest.mark.parametrize('batches', [1, 3, 0])
def test_eval_iters_is_the_number_of_batches(data, tmp_path, batches):
    s = BASE | {'eval_iters': batches, 'max_iters': 1}
    out = run_script(data, tmp_path / 'out', *flags(s))
    model = GPT(GPTConfig(**checkpoint(out / 'ckpt.pt')['config']))
    model.load_state_dict(checkpoint(out / 'ckpt.pt')['model'])
    expected = {'iter': 1} | evaluate(model, Data(data), s)
    assert metrics(out)[-1] == pytest.approx(expected, rel=1e-5)


def test_track_names_a_package_that_hears_what_metrics_jsonl_does(data, baseline, tmp_path, monkeypatch):
    heard = tmp_path / 'heard'
    (tmp_path / 'trackio.py').write_text(f"""
import json

def tell(**values):
    with open({str(heard)!r}, 'a') as file:
        file.write(json.dumps(values) + '\\n')

def init(config, **_):
    tell(config=config)

def log(figures, step):
    tell(step=step, **figures)

def finish():
    tell(finished=True)
""")
    monkeypatch.syspath_prepend(tmp_path)
    out = run_script(data, tmp_path / 'out', *flags(BASE), '--track=trackio')
    assert changed(out, baseline) == set()
    begun, *told, ended = map(json.loads, heard.read_text().splitlines())
    assert begun['config']['n_embd'] == 8 and ended == {'finished': True}
    for line in metrics(out):
        step = line.pop('iter')
        assert any(line.items() <= other.items() and other['step'] == step for other in told), line


@pytest.mark.parametrize('dtype, near', [('bfloat16', 0.02), ('float16', 0.003)])
def test_dtype_is_that_of_the_matrix_products_alone(data, baseline, tmp_path, dtype, near):
    """The weights stay in float32, and the figures are nearly those of float32."""
    out = run_script(data, tmp_path / 'out', *flags(BASE | {'dtype': dtype}))
    found, expected = observe(out), observe(baseline)
    saved = checkpoint(out / 'ckpt.pt')
    assert {p.dtype for p in saved['model'].values()} == {torch.float32}
    assert bool(saved['scaler']) == (dtype == 'float16')
    assert found['step 0'] == pytest.approx(expected['step 0'], rel=near)
    assert found['trained']['val_loss'] == pytest.approx(expected['trained']['val_loss'], rel=near)


def test_device_is_a_cpu_where_there_is_nothing_else(data, baseline, tmp_path):
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip('this machine has a GPU')
    assert changed(run_script(data, tmp_path / 'out', *flags(BASE), '--device=auto'), baseline) == set()
    for device in 'cuda', 'mps':
        words = [f'--dataset={data}', f'--out_dir={tmp_path}/{device}', f'--device={device}']
        assert f'device {device}' in script('train.py', *words, status=2).err


@pytest.mark.parametrize('value, fails, compiled', [
    ('True', False, 2), ('True', True, 2), ('False', False, 0), ('auto', False, 0)])
def test_compile_decides_whether_torch_compiles(data, baseline, tmp_path, value, fails, compiled):
    """Both the model and its evaluation; a compiler that fails leaves the run as it is without one."""
    program = tmp_path / 'program.py'
    program.write_text(f"""
import runpy, torch

def compile(function):
    def call(*args, **kwargs):
        if {fails}:
            raise ValueError('no compiler')
        return function(*args, **kwargs)
    print('torch.compile', type(function))
    return call

torch.compile = compile
runpy.run_path('train.py', run_name='__main__')
""")
    out = tmp_path / 'out'
    done = script(program, *flags(BASE), f'--dataset={data}', f'--out_dir={out}', f'--compile={value}',
                  '--device=cpu', '--dtype=float32', '--log_interval=1')
    assert done.out.count('torch.compile') == compiled
    assert ('ValueError' in done.err) == fails
    assert changed(out, baseline) == set()


# settings and resumed runs ----------------------------------------------------

def test_a_run_keeps_its_settings(data, tmp_path):
    given = BASE | {'dropout': 0.1, 'grad_clip': 0.5, 'beta2': 0.9, 'mlp': 'relu2', 'save_interval': 6}
    out = run_script(data, tmp_path / 'out', *flags(given))
    saved, facts = checkpoint(out / 'ckpt.pt')['settings'], json.loads((out / 'run.json').read_text())
    assert saved.keys() == {*settings_of_train()}
    for name, value in given.items():
        assert saved[name] == facts[name] == value


@pytest.mark.parametrize('values, expected', [
    ({}, set()), ({'learning_rate': 0.02}, TRAINING | {'lr'}), ({'warmup_iters': 5}, TRAINING | {'lr'}),
    ({'weight_decay': 0.5}, TRAINING), ({'beta1': 0.5}, TRAINING), ({'beta2': 0.5}, TRAINING),
    ({'grad_clip': 0.01}, TRAINING), ({'max_iters': 8}, LENGTH), ({'eval_interval': 2}, {'evaluated'})])
def test_a_resumed_run_keeps_its_settings_unless_given(baseline, halfway, tmp_path, values, expected):
    out = tmp_path / 'out'
    shutil.copytree(halfway, out)
    script('train.py', '--init_from=resume', f'--out_dir={out}', *flags({'save_interval': 0} | values))
    assert changed(out, baseline) == expected
    lines = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    seconds = [line['seconds'] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] > 0


def test_a_resumed_run_in_float16_keeps_its_scaler(data, tmp_path):
    out = run_script(data, tmp_path / 'out', *flags(BASE | {'dtype': 'float16', 'save_interval': 3}))
    unbroken = tmp_path / 'unbroken'
    shutil.copytree(out, unbroken)
    (out / 'ckpt_3.pt').replace(out / 'ckpt.pt')
    script('train.py', '--init_from=resume', f'--out_dir={out}')
    scaler = checkpoint(out / 'ckpt.pt')['scaler']
    assert scaler == checkpoint(unbroken / 'ckpt.pt')['scaler'] and scaler['_growth_tracker'] == 6
    assert changed(out, unbroken) == set()


def test_a_run_that_is_stopped_resumes_as_if_it_had_not_been(data, tmp_path):
    s = BASE | {'max_iters': 120, 'eval_interval': 119, 'dropout': 0.1}
    unbroken = run_script(data, tmp_path / 'unbroken', *flags(s))
    out = tmp_path / 'out'
    run = Script('train.py', f'--dataset={data}', f'--out_dir={out}', '--device=cpu', '--dtype=float32',
                 '--log_interval=1', *flags(s))
    run.wait_for('step 5/120')
    os.kill(run.process.pid, signal.SIGTERM)
    run.finish(128 + signal.SIGTERM)
    stopped_at = checkpoint(out / 'ckpt.pt')['iter']
    assert 5 < stopped_at < 120
    assert f'step {stopped_at}' in run.err and '--init_from resume' in run.err
    script('train.py', '--init_from=resume', f'--out_dir={out}')
    assert changed(out, unbroken) == set()


@pytest.mark.parametrize('values', [
    {'n_embd': 12}, {'dropout': 0.1}, {'optimizer': 'adamw'}, {'max_iters': 2}, {'tie_embeddings': False}])
def test_settings_that_would_make_it_another_run_are_refused(halfway, values):
    words = ['--init_from=resume', f'--out_dir={halfway}', *flags(values)]
    assert str(*values.values()) in script('train.py', *words, status=2).err


def test_a_resumed_run_refuses_other_data(data, halfway, tmp_path):
    splits = Data(data)
    train, val = np.array(splits.train, np.uint16), np.array(splits.val[::-1], np.uint16)
    other = prepare(tmp_path / 'data', train, val)
    words = ['--init_from=resume', f'--out_dir={halfway}', f'--dataset={other}']
    assert 'fingerprint' in script('train.py', *words, status=2).err


def test_a_story_is_kept_of_each_evaluation(baseline, data, tmp_path):
    again = run_script(data, tmp_path / 'out', *flags(BASE | {'eval_interval': 6}))
    kept, other = ([json.loads(line) for line in (out / 'samples.jsonl').read_text().splitlines()]
                   for out in (baseline, again))
    assert [line['iter'] for line in kept] == [0, 3, 6]
    assert all(line['story'].startswith(line['prompt']) and line['prompt'] for line in kept)
    assert len({line['story'] for line in kept}) == 3 and other == kept[::2]
