"""Checkpoints and the folder of a run: read and checked in one place, written atomically.

A checkpoint is a dict with
    'model'          state_dict of the unwrapped GPT
    'config'         its GPTConfig, a dict
    'tokenizer'      the tokenizer's state, a dict
    'settings'       all settings of train.py
    'iter'           steps done
    'best_val_loss'  lowest validation loss so far, 'best_iter', the step of that, and 'measured_on', in words
                     what it was measured on
    'optimizers'     a list of state_dicts
    'scaler'         state_dict of the gradient scaler; empty if not in float16
    'run_name'       a name that no other run has; all checkpoints of a run have the same one
    'fingerprint'    of the data, and its 'infill_rate'
It holds tensors and plain values only, so reading a foreign one runs no code.
"""

import copy
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import shlex
import shutil
import time
import zipfile
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch

from configurator import SettingError, UserError, script_path, user_errors
from core.distributed import get_ranks
from data.files import (
    check_stored,
    lock_folder,
    refuse_stand_in,
    report_write_errors,
    write_atomically,
    write_bytes_atomically,
)
from data.shards import fingerprint
from data.tokenizer import FILE_NAMES as TOKENIZER_FILE_NAMES
from model import GPT, GPTConfig

FILES = {'last': 'ckpt.pt', 'best': 'best.pt'}
NUMBER = float | int
PLAIN = bool | int | float | str  # a setting
TYPES = {
    'model': dict, 'config': dict, 'tokenizer': dict | None, 'settings': dict, 'iter': int,
    'best_val_loss': NUMBER, 'best_iter': int, 'measured_on': str, 'optimizers': list, 'scaler': dict,
    'fingerprint': str, 'infill_rate': NUMBER, 'run_name': str,
}
REQUIRED = 'model', 'config', 'tokenizer', 'settings', 'iter'
TO_RESUME = *REQUIRED, 'best_val_loss', 'optimizers', 'scaler', 'fingerprint'
LONGEST_CONTEXT = 2**20
LARGEST = 1e305  # number in a record: val_ppl is at most e**700, and matplotlib cannot draw 1e308
END_BYTES = 2**16  # how much of the end of a .jsonl file is read first
KEPT = re.compile(r'ckpt_(\d+)\.pt')  # a copy for each save_interval
# What a run writes into its folder next to the tokenizer, and what a killed process may leave of it
RUN_FILES = re.compile(r'(ckpt(_\d+)?|best)\.pt|(metrics|samples)\.jsonl|run\.json|loss\.png')
LEFTOVERS = re.compile(r'\.(ckpt(_\d+)?|best)\.pt\.unfinished')


# reading ----------------------------------------------------------------------

def load_checkpoint(path, required=REQUIRED):
    """Read a checkpoint. Raises UserError if it is missing, damaged, or not one of this project.

    required: the names that it must have.
    """
    path = Path(path)
    if not path.is_file():
        advice = suggest_other_checkpoint(path) or ': train first, or name the folder of a run with --out_dir'
        raise UserError(f'no checkpoint {path}{advice}')
    refuse_stand_in(path)
    reason = damage(path)
    if reason:
        raise UserError(f'{path} is damaged or not a checkpoint ({reason}){suggest_other_checkpoint(path)}')
    with user_errors(path, 'is not a checkpoint of this project, and was not run'):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        check_types(checkpoint, required)
    return checkpoint


def check_types(checkpoint, required):
    """Raise ValueError if a value of a checkpoint is missing, of the wrong type, or out of range."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f'it holds a {type(checkpoint).__name__}')
    for name in required:
        if name not in checkpoint:
            raise ValueError(f'it has no {name}')
    for name, value in checkpoint.items():
        if name not in TYPES:
            continue
        if not isinstance(value, TYPES[name]) or not is_in_range(value):
            raise ValueError(f'its {name} is {reprlib.repr(value)}')
    for name, value in checkpoint['settings'].items():
        is_text = name in ('out_dir', 'dataset')
        if not isinstance(name, str) or not isinstance(value, str if is_text else PLAIN):
            raise ValueError(f'its setting {reprlib.repr(name)} is {reprlib.repr(value)}')
    config_of(checkpoint['config'])


def is_in_range(value):
    """Return whether a value of a checkpoint, if a number, is neither negative nor nan and fits 64 bits."""
    if isinstance(value, int):
        return 0 <= value < 2**63
    return not isinstance(value, float) or value >= 0


def damage(path):
    """Return what is wrong with the file itself, or ''. torch.load does not compare the checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_stored(archive)
            damaged_file = archive.testzip()
    except Exception as error:  # a file that is not an archive, or half of one, fails in many ways
        return str(error) or type(error).__name__
    if damaged_file:
        return f'{damaged_file} fails its checksum'
    return ''


def suggest_other_checkpoint(path):
    """Return the end of a message: what to use instead of a damaged checkpoint, if anything."""
    if path.name not in FILES.values():
        return ''
    other = path.with_name('best.pt' if path.name == 'ckpt.pt' else 'ckpt.pt')
    if not other.is_file() or damage(other):
        return ''
    if path.name == 'best.pt':
        return f'; {other} is whole: use it with --ckpt last, or name it with --init_from'
    copy = shlex.join(['cp', str(other), str(path)])
    return f'; {other} is whole: type {copy}'


def parameter_shapes(config):
    """Return {name: shape} of the parameters of GPT(config), without making the model.

    A tied head is not listed. Making a model on the meta device instead would import torch._dynamo.
    """
    C = config.n_embd
    kv_width = config.n_kv_head * config.head_dim
    shapes = {}

    def add_linear(name, n_in, n_out):
        shapes[f'{name}.weight'] = (n_out, n_in)
        if config.bias:
            shapes[f'{name}.bias'] = (n_out,)

    def add_norm(name, width):
        shapes[f'{name}.weight'] = (width,)
        if config.norm == 'layer' and config.bias:
            shapes[f'{name}.bias'] = (width,)

    shapes['embedding.weight'] = (config.vocab_size, C)
    for layer in range(config.n_layer):
        block = f'blocks.{layer}'
        add_norm(f'{block}.attn_norm', C)
        add_linear(f'{block}.attn.q', C, C)
        add_linear(f'{block}.attn.k', C, kv_width)
        add_linear(f'{block}.attn.v', C, kv_width)
        add_linear(f'{block}.attn.proj', C, C)
        if config.qk_norm:
            add_norm(f'{block}.attn.q_norm', config.head_dim)
            add_norm(f'{block}.attn.k_norm', config.head_dim)
        add_norm(f'{block}.mlp_norm', C)
        add_linear(f'{block}.mlp.up', C, config.mlp_width)
        if config.mlp == 'swiglu':
            add_linear(f'{block}.mlp.gate', C, config.mlp_width)
        add_linear(f'{block}.mlp.proj', config.mlp_width, C)
    add_norm('norm', C)
    if not config.tie_embeddings:
        shapes['lm_head.weight'] = (config.vocab_size, C)
    if config.position == 'learned':
        shapes['position.weight'] = (config.block_size, C)
    return shapes


def check_size(config, weights):
    """Raise ValueError if the weights are not those of `config`, before a model of that size is made."""
    if config.block_size > LONGEST_CONTEXT:
        raise ValueError(f'block_size is {config.block_size:,}')
    if config.n_layer > len(weights):  # or the shapes of all layers would take long
        raise ValueError(f'n_layer is {config.n_layer:,}, but there are only {len(weights)} tensors')
    for name, shape in parameter_shapes(config).items():
        if name not in weights:
            raise ValueError(f'{name} is missing')
        weight = weights[name]
        if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            raise ValueError(f'{name} is not a tensor of real numbers')
        if weight.shape != shape:
            raise ValueError(f'{name} has the shape {[*weight.shape]}, but the config makes it {[*shape]}')


def load_model(checkpoint, device='cpu'):
    """Return the GPT of a checkpoint, in evaluation mode, on `device`. Raises UserError if it makes none."""
    with user_errors("the checkpoint's config and weights", 'do not make a model of this project'):
        config = config_of(checkpoint['config'])
        check_size(config, checkpoint['model'])
    model = GPT(config)
    with user_errors("the checkpoint's weights", 'do not fit its config'):
        model.load_state_dict(checkpoint['model'])
    return model.to(device).eval()


def config_of(values):
    """Return the GPTConfig with these values, a dict from a file. Raises ValueError if they make none."""
    defaults = {field.name: field.default for field in fields(GPTConfig)}
    for name, value in values.items():
        if name not in defaults:
            raise ValueError(f'its config has {reprlib.repr(name)}, which this project does not know')
        if isinstance(value, bool) != isinstance(defaults[name], bool) or not isinstance(
                value, (type(defaults[name]), int)):
            raise ValueError(f'{name} is {reprlib.repr(value)}')
    return GPTConfig(**values)


# the folder of a run ----------------------------------------------------------

def resume_command(out_dir):
    """Return what to type to resume the run in `out_dir`, with as many ranks as now."""
    world_size = get_ranks().world_size
    on_this_machine = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if world_size == 1:
        start = 'python'
    elif world_size == on_this_machine:
        start = f'torchrun --standalone --nproc_per_node={on_this_machine}'
    else:  # on several machines: the options with which each was started
        start = f'torchrun ... --nproc_per_node={on_this_machine}'
    return f"{start} {script_path('train.py')} --init_from resume --out_dir {shlex.quote(out_dir)}"


class DivergedError(UserError):
    """The loss, the gradients or the weights of a run are not finite."""

    def __init__(self, step, reason, out_dir, learning_rate):
        best = os.path.join(out_dir, FILES['best'])
        last = os.path.join(out_dir, FILES['last'])
        if not os.path.exists(best):
            super().__init__(f'step {step}: {reason}, before the first good evaluation: lower '
                             '--learning_rate, or check the weights of --init_from')
            return
        lower_rate = min(learning_rate / 10, 0.005)
        super().__init__(
            f'step {step}: {reason}. {shlex.quote(best)} is good: resume from it with a lower learning rate '
            f'(or, in float16, with --dtype float32): cp {shlex.quote(best)} {shlex.quote(last)} && '
            f'{resume_command(out_dir)} --learning_rate {lower_rate:g}')


def make_run_name(folder):
    """Return a name for a run in `folder` that no other run has: a tracker would merge runs of one name.

    Example: 'out-quickstart-20260131-235959-1f2e3d4c'
    """
    name = re.sub(r'[^\w.-]', '-', Path(folder).resolve().name)
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


def describe_file(path):
    """Return in words what a checkpoint is, to compare it with that of another rank."""
    if not path.is_file():
        return 'something else' if path.exists() else 'missing'
    with open(path, 'rb') as file:
        return f"a file with sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


class RunFolder:
    """The `out_dir` of a run: ckpt.pt (last), best.pt, ckpt_STEP.pt, the tokenizer's own file, metrics.jsonl,
    samples.jsonl, and what core/progress.py writes there."""

    def __init__(self, path, resume=False, overwrite=False):
        """Raises SettingError if it holds a run that the user neither resumes nor replaces."""
        self.path = Path(path)
        restarted = os.environ.get('TORCHELASTIC_MAX_RESTARTS', '0') != '0'  # torchrun --max-restarts
        self.resume = resume or (restarted and (self.path / FILES['last']).exists())
        self.overwrite = overwrite
        self.check()

    def matching(self, pattern):
        """Return the paths in the folder whose names match a compiled pattern, sorted."""
        if not self.path.is_dir():
            return []
        return sorted(path for path in self.path.iterdir() if pattern.fullmatch(path.name))

    def check(self):
        found = self.matching(RUN_FILES)
        if found and not self.resume and not self.overwrite:
            raise SettingError(f'{self.path} holds another run ({found[0].name}): resume it (--init_from '
                               'resume), replace it (--overwrite), or name another folder (--out_dir)')

    def begin(self, checkpoint, tokenizer):
        """Lock the folder and start the run in it with a first checkpoint, or resume it at `checkpoint`.

        Until then the previous run is untouched. Raises UserError if another process trains here.
        """
        with report_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = lock_folder(self.path, 'wait for it, or name another --out_dir')
            self.check()  # once more: a run may have started and ended since
            replaces_run = len(self.matching(RUN_FILES)) > 0 and not self.resume
            if not replaces_run:
                self.check_tokenizer(tokenizer)
            for left in self.matching(LEFTOVERS):  # by a process that was killed while it saved
                left.unlink()
            # from here on the folder holds this run
            if replaces_run:
                self.replace_run(checkpoint)
            elif not self.resume:
                self.save(checkpoint)
            self.save_tokenizer(tokenizer)
            self.cut_records(checkpoint['iter'])

    def replace_run(self, checkpoint):
        """Save the first checkpoint in place of the previous run, and remove the other files of that.

        They are removed once the checkpoint is on disk and before it gets its name: a process that is killed
        in between leaves a part of the previous run, and never files of two runs.
        """

        def write(file):
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
            for name in FILES['best'], 'loss.png', 'run.json', *TOKENIZER_FILE_NAMES:
                (self.path / name).unlink(missing_ok=True)
            for old in self.matching(KEPT):
                old.unlink()

        write_atomically(self.path / FILES['last'], write)

    def check_tokenizer(self, tokenizer):
        """Raise UserError if there is a file of the tokenizer's name with other content: it is not ours."""
        for name, data in tokenizer.files.items():
            path = self.path / name
            if path.exists() and path.read_bytes() != data:
                raise UserError(f'{path} is not the tokenizer of this run: name another --out_dir')

    def save_tokenizer(self, tokenizer):
        """Write the tokenizer's own file, so that `prepare.py --tokenizer out_dir` needs no torch."""
        for name, data in tokenizer.files.items():
            write_bytes_atomically(self.path / name, data)

    def cut_records(self, step):
        """Remove the lines of metrics.jsonl and samples.jsonl from `step` on: they will be written again."""
        for name in 'metrics.jsonl', 'samples.jsonl':
            path = self.path / name
            if path.exists():
                os.truncate(path, end_of_records_before(step, path))

    def set_best_aside(self):
        """Rename best.pt, so that it is not replaced, and return its new name."""
        name = f"{FILES['best']}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
        (self.path / FILES['best']).rename(self.path / name)
        return name

    def last_recorded_step(self):
        """Return the step of the last line of metrics.jsonl, -1 if there is none."""
        path = self.path / 'metrics.jsonl'
        if not path.exists():
            return -1
        records = [record for _, record in last_records(path, END_BYTES)]
        return max((record['iter'] for record in records), default=-1)

    def later_checkpoints(self, step):
        """Return the names of the kept checkpoints ckpt_STEP.pt with STEP > `step`, in their order."""
        steps = [int(KEPT.fullmatch(path.name)[1]) for path in self.matching(KEPT)]
        return [f'ckpt_{later}.pt' for later in sorted(steps) if later > step]

    def records(self, name='metrics.jsonl'):
        """Yield the lines of a file as dicts, skipping malformed lines (a killed run's last)."""
        path = self.path / name
        if path.exists():
            with open(path, 'rb') as file:
                for line in file:
                    record = parse_record(line)
                    if record is not None:
                        yield record

    def record(self, name='metrics.jsonl', **values):
        """Append a line to a file."""
        with report_write_errors(self.path), open(self.path / name, 'a') as file:
            file.write(json.dumps(values) + '\n')

    def save(self, checkpoint, is_best=False, keep=False):
        """Write ckpt.pt; if `is_best` also best.pt, if `keep` also ckpt_STEP.pt.

        ckpt.pt comes last: it records how good the best one is.
        """
        names = []
        if is_best:
            names.append(FILES['best'])
        if keep:
            names.append(f"ckpt_{checkpoint['iter']}.pt")
        names.append(FILES['last'])
        first = self.path / names[0]
        write_atomically(first, partial(torch.save, checkpoint))
        for name in names[1:]:
            with open(first, 'rb') as source:
                write_atomically(self.path / name, partial(shutil.copyfileobj, source))


def end_of_records_before(step, path):
    """Return where the last line of an earlier step than `step` ends in a .jsonl file whose steps ascend.

    The file may be long, so it is read from its end.
    """
    n_bytes = END_BYTES
    while True:
        ends = [end for end, record in last_records(path, n_bytes) if record['iter'] < step]
        if ends:
            return ends[-1]
        if n_bytes >= path.stat().st_size:
            return 0
        n_bytes *= 16


def last_records(path, n_bytes):
    """Return [(where its line ends, record)] of the whole, well-formed lines in the last bytes of a file."""
    found = []
    with open(path, 'rb') as file:
        file.seek(max(0, path.stat().st_size - n_bytes))
        for line in file:  # the first may be half a line, which is malformed
            record = parse_record(line)
            if record is not None and line.endswith(b'\n'):
                found.append((file.tell(), record))
    return found


def parse_record(line):
    """Return the dict of a line of metrics.jsonl or samples.jsonl, or None if it is malformed."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get('iter')
    if type(step) is not int or not 0 <= step < 2**63:
        return None
    for key, value in record.items():
        if key in ('prompt', 'story'):
            if not isinstance(value, str):
                return None
        elif not is_number(value) or not -LARGEST < value < LARGEST:
            return None
    return record


def is_number(value):
    return isinstance(value, NUMBER) and not isinstance(value, bool)  # in Python, a bool is an int


# the state of a run -----------------------------------------------------------

class Run:
    """The state of a training run: what is saved, and what is restored when it is resumed."""

    def __init__(self, folder, model, optimizers, scaler, tokenizer, meta, settings, measured_on):
        """folder: a RunFolder. meta: meta.json of the data. settings: all settings of train.py.

        measured_on: what this process measures validation losses on, see `describe_measure`.
        """
        self.folder = folder
        self.model = model
        self.optimizers = optimizers
        self.scaler = scaler
        self.tokenizer = tokenizer
        self.meta = meta
        self.settings = settings
        self.measured_on = measured_on
        self.name = make_run_name(folder.path)
        self.step = 0
        self.best_is_damaged = False  # best.pt of the run to resume
        self.best_val_loss = math.inf
        self.best_step = 0
        self.best_measured_on = measured_on

    def restore(self, checkpoint):
        """Continue from a checkpoint of the same model. Raises UserError if the states do not fit."""
        with user_errors(self.folder.path / FILES['last']):
            check_size(self.model.config, checkpoint['model'])
            self.model.load_state_dict(checkpoint['model'])
            if checkpoint['scaler']:  # empty if the run was not in float16 so far
                self.scaler.load_state_dict(checkpoint['scaler'])
            for optimizer, state in zip(self.optimizers, checkpoint['optimizers'], strict=True):
                load_optimizer_state(optimizer, state)
        self.name = checkpoint.get('run_name', '')  # an old checkpoint has none
        self.step = checkpoint['iter']
        self.restore_best(checkpoint)

    def restore_best(self, checkpoint):
        """Take note of how good best.pt is. checkpoint: the one to resume from.

        Without best.pt, or if it is damaged, the next evaluation makes a new one.
        Raises UserError if it is of another run.
        """
        path = self.folder.path / FILES['best']
        if not path.exists():
            return
        try:
            best = load_checkpoint(path, TO_RESUME)
        except UserError:
            self.best_is_damaged = True
            return
        for name in 'config', 'fingerprint', 'run_name':
            if best.get(name, '') != checkpoint.get(name, ''):  # an old checkpoint has no name
                raise UserError(f'{path} is of another run than {FILES["last"]}: move it to another folder')
        self.best_step = best['iter']
        # ckpt.pt says how good best.pt is, unless that is later (the run was killed between the two files,
        # or the user has gone back to an earlier checkpoint) or a copy of another checkpoint of this run
        record = checkpoint
        if best['iter'] > checkpoint['iter'] or best['iter'] != checkpoint.get('best_iter'):
            record = best
        self.best_val_loss = record['best_val_loss']
        self.best_measured_on = record.get('measured_on', '')
        if record.get('best_iter', best['iter']) != best['iter']:
            # a copy of a checkpoint that was not the best one when it was saved: its own loss is not known
            self.best_measured_on = ''

    def checkpoint(self):
        """Return the checkpoint of this moment. Raises DivergedError if a weight is not finite."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise self.diverged('some weights are not finite')
        return {
            'model': self.model.state_dict(),
            'config': asdict(self.model.config),
            'tokenizer': self.tokenizer.state(),
            'settings': self.settings,
            'iter': self.step,
            'best_val_loss': self.best_val_loss,
            'best_iter': self.best_step,
            'measured_on': self.best_measured_on,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'scaler': self.scaler.state_dict(),
            'fingerprint': fingerprint(self.meta),
            'infill_rate': self.meta.get('infill_rate', 0),
            'run_name': self.name,
        }

    def begin(self):
        """Take the folder: from now on it holds this run. Rank 0 calls it."""
        self.folder.begin(self.checkpoint(), self.tokenizer)
        if self.best_is_damaged:
            name = self.folder.set_best_aside()
            print(f'best.pt is damaged: it is now {name}, and the next evaluation makes a new best.pt, even '
                  'if the damaged one was better')

    def save(self, is_best=False, keep=False):
        """Save a checkpoint on rank 0; do nothing on the other ranks."""
        if get_ranks().rank == 0:
            self.folder.save(self.checkpoint(), is_best, keep)

    def update_best(self, val_loss):
        """Take note of a validation loss; return whether it is the best so far.

        Raises DivergedError if it is not finite.
        """
        if not math.isfinite(val_loss):
            raise self.diverged(f'the validation loss is {val_loss}')
        if val_loss >= self.best_val_loss:
            return False
        self.best_val_loss = val_loss
        self.best_step = self.step
        self.best_measured_on = self.measured_on
        return True

    def out_of_patience(self, patience, eval_every):
        """Return whether `patience` evaluations have passed since the best one; 0 is endless patience."""
        return patience > 0 and self.step - self.best_step >= patience * eval_every

    def diverged(self, reason):
        """Return the error for a run whose numbers are no longer finite."""
        learning_rate = self.optimizers[-1].param_groups[0]['peak_lr']
        return DivergedError(self.step, reason, str(self.folder.path), learning_rate)


def load_optimizer_state(optimizer, saved):
    """Restore an optimizer, but keep the hyperparameters given now, not the saved ones.

    Raises ValueError if the state does not fit.
    """
    if not isinstance(saved, dict):
        raise ValueError(f'the state of an optimizer is {reprlib.repr(saved)}')
    groups = optimizer.state_dict()['param_groups']
    # The saved tensors are a map of ckpt.pt, and Windows does not replace a file that is mapped: copy them.
    saved = copy.deepcopy(saved)
    optimizer.load_state_dict(saved | {'param_groups': groups})
    for p, state in optimizer.state.items():
        if not isinstance(state, dict):
            raise ValueError(f'the state of a weight is {reprlib.repr(state)}')
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or value.shape not in (p.shape, ()):
                raise ValueError(f'{name} of an optimizer has another shape than its weight, {[*p.shape]}')
