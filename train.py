"""Train a GPT on prepared stories.

    python train.py config/quickstart.py                             a recipe, on whatever this machine has
    python train.py config/quickstart.py --max_iters 1000            a recipe, changed
    python train.py --init_from resume --out_dir out-quickstart      resume a run
    torchrun --standalone --nproc_per_node=8 train.py config/tiny_stories.py
"""

import gc
import math
import shlex
import sys
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this repository comes before PYTHONPATH

import numpy as np
import torch

from configurator import (
    SettingError,
    UserError,
    configure,
    in_range,
    one_line,
    one_of,
    run,
    script_path,
    settings,
)
from core.checkpoint import TO_RESUME, Run, RunFolder, describe_file, load_checkpoint, resume_command
from core.device import (
    autocast,
    choose_device,
    choose_dtype,
    choose_threads,
    to_device,
    try_compile,
)
from core.distributed import (
    MeansOverRanks,
    StopSignals,
    get_ranks,
    join_ranks,
    leave_ranks,
    report_lost_ranks,
)
from core.evaluate import Evaluator, count_loss, describe_measure, evaluate, find_infill_rows
from core.generate import first_story_words, sample_story
from core.kernels import use_fast_cpu_kernels, use_joined_products
from core.memory import configure_memory
from core.optim import clip_and_step, make_optimizers, set_learning_rate
from core.progress import check_tracker, make_progress
from data.shards import Batches, Split, fingerprint, prepared_folder
from data.tokenizer import load_tokenizer
from formats.pretrained import load_pretrained
from model import GPT, GPTConfig

# what to read and write
dataset = 'tiny_stories'  # a folder under data/, or any path to a prepared folder
out_dir = 'out-tiny-stories'  # folder for checkpoints, metrics.jsonl and loss.png
init_from = 'scratch'  # scratch, resume (continue the run in out_dir), or the path of a model to fine-tune
overwrite = False  # replace the run already in out_dir
verify_data = False  # check the shards against the sha256 in meta.json; their sizes are always checked
# the model: these become the GPTConfig of model.py
block_size = 256  # context length in tokens
n_layer = 6  # blocks
n_head = 6  # attention heads
n_kv_head = 0  # heads of keys and values (grouped-query attention); 0: n_head
n_embd = 288  # width
norm = 'rms'  # rms or layer
position = 'rope'  # rope, learned or sinusoidal
mlp = 'swiglu'  # swiglu, gelu, relu or relu2
mlp_width = 0  # hidden width of the MLP; 0: derived from n_embd
qk_norm = False  # normalize queries and keys
bias = False  # biases in the linear layers and in LayerNorm
tie_embeddings = True  # share one matrix between the embedding and the LM head
dropout = 0.0  # dropout probability
rope_theta = 10000.0  # base of the rotary frequencies
norm_eps = 1e-5  # added to the variance in norms
# optimization
max_iters = 5000  # number of steps
max_epochs = 0.0  # passes over the training data, instead of max_iters (what is given last counts)
batch_size = 32  # largest micro-batch, in sequences
gradient_accumulation_steps = 1  # a step has batch_size times as many sequences, shared by all ranks
optimizer = 'muon'  # muon (for the matrices of the blocks, with AdamW for the rest) or adamw
learning_rate = 0.0  # peak learning rate of AdamW (Muon's is twice that); 0: 0.01 with muon, 1e-3 with adamw
warmup_iters = 50  # steps of linear warmup, followed by linear decay to 0 at the end of training
weight_decay = 0.1  # weight decay of the matrices
beta1 = 0.9  # AdamW's beta1
beta2 = 0.95  # AdamW's beta2
grad_clip = 1.0  # clip gradients to this norm; 0: do not clip
# what a run shows and saves
eval_interval = 500  # steps between evaluations, each with a checkpoint and a story; 0: one epoch
eval_iters = 0  # batches per evaluation; 0: the whole validation split
patience = 0  # stop after this many evaluations without improvement; 0: never
save_interval = 0  # steps between checkpoints kept as ckpt_STEP.pt; 0: keep only the last and the best
log_interval = 10  # steps between log lines
track = ''  # also log to this package: wandb or trackio
# the machine
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps
dtype = 'auto'  # auto (bfloat16 if the hardware has it, else float16 on CUDA), float32, bfloat16 or float16
compile = 'auto'  # use torch.compile: auto (on CUDA only), True or False
seed = 1337  # random seed of weights, data order and dropout

_ASYNCHRONOUS = ('cuda',)  # devices that compute while this process goes on


# settings ---------------------------------------------------------------------

def checkpoint_settings(current):
    """Return the settings of the run to resume or of the model to tune; config files and flags override them.

    current: the settings before those of the checkpoint are merged in.
    """
    if current['init_from'] == 'scratch':
        return {}
    if current['init_from'] != 'resume':
        return load_pretrained(current['init_from'])['config']
    saved = load_checkpoint(Path(current['out_dir']) / 'ckpt.pt')['settings']
    given_each_time = 'out_dir', 'init_from', 'overwrite'
    return {name: value for name, value in saved.items() if name not in given_each_time}


def check_settings():
    """Check the settings. Raises SettingError."""
    in_range(at_least=1, at_most=2**20, block_size=block_size, batch_size=batch_size,
             gradient_accumulation_steps=gradient_accumulation_steps)
    in_range(at_least=1, below=2**63, max_iters=max_iters, log_interval=log_interval)
    in_range(at_least=0, below=1e37, learning_rate=learning_rate, weight_decay=weight_decay,
             grad_clip=grad_clip, max_epochs=max_epochs)  # float32 ends at 3e38, and Muon's rate is larger
    in_range(at_least=0, below=2**63, seed=seed, warmup_iters=warmup_iters, eval_iters=eval_iters,
             patience=patience, eval_interval=eval_interval, save_interval=save_interval)
    in_range(at_least=0, below=1, beta1=beta1, beta2=beta2)
    one_of(('muon', 'adamw'), optimizer=optimizer)
    one_of(('auto', 'True', 'False'), compile=compile)
    check_tracker(track)


def make_config(vocab_size):
    """Return the model's config from the settings. Raises SettingError."""
    names = [field.name for field in fields(GPTConfig) if field.name != 'vocab_size']
    choices = {name: globals()[name] for name in names}
    try:
        return GPTConfig(vocab_size=vocab_size, **choices)
    except ValueError as error:
        raise SettingError(str(error)) from None


def suggest_less_memory():
    """Return flags that give the same batches with less memory, for the message when memory runs out."""
    global_batch_size = batch_size * gradient_accumulation_steps
    per_rank = min(batch_size, global_batch_size // get_ranks().world_size)
    for divisor in range(2, per_rank + 1):
        if per_rank % divisor == 0:
            fewer = per_rank // divisor
            return (f'type --batch_size {fewer} --gradient_accumulation_steps {global_batch_size // fewer}: '
                    'the same batches in less memory')
    return 'take a smaller model or --block_size'


# starting from a checkpoint ---------------------------------------------------

def check_resumable(checkpoint, config, meta, max_steps):
    """Raise SettingError if the data, the model or the number of steps is not that of the run to resume."""
    ours, theirs = fingerprint(meta), checkpoint['fingerprint']
    if ours != theirs:
        raise SettingError(f'the data in {dataset} is not what this run was trained on (fingerprint '
                           f"{ours[:12]}, the run's {theirs[:12]}): prepare it as before, or name another "
                           '--out_dir')
    given = asdict(config) | {'optimizer': optimizer}
    saved = checkpoint['config'] | {'optimizer': checkpoint['settings'].get('optimizer', optimizer)}
    for name, value in saved.items():
        if given.get(name) != value:
            raise SettingError(f'{name} is {given.get(name)}, but {out_dir}/ckpt.pt has {value}: leave it '
                               'out to resume the run, or name another --out_dir for a new one')
    if checkpoint['iter'] > max_steps:
        raise SettingError(f"max_iters asks for {max_steps} steps, but {out_dir}/ckpt.pt has already done "
                           f"{checkpoint['iter']}")


def resume(this_run, max_steps):
    """Continue the run in out_dir from its last checkpoint. Raises SettingError if it does not fit."""
    checkpoint = load_checkpoint(this_run.folder.path / 'ckpt.pt', TO_RESUME)
    check_resumable(checkpoint, this_run.model.config, this_run.meta, max_steps)
    this_run.restore(checkpoint)
    if get_ranks().rank == 0:
        print_resumption(this_run, checkpoint)


def print_resumption(this_run, checkpoint):
    """Print what a user must know of the run that is resumed from `checkpoint`."""
    step = this_run.step
    if overwrite:
        print('overwrite has no effect, as the run is resumed')
    later = this_run.folder.later_checkpoints(step)
    if this_run.best_step > step:
        later.insert(0, f'best.pt (step {this_run.best_step}, validation loss {this_run.best_val_loss:.4f})')
    if later:
        print(f"later than ckpt.pt, which is of step {step}: {', '.join(later)}; best.pt stays until there "
              'is a lower loss, the others until the run comes to their steps')
    print_changed_best(this_run, checkpoint)
    if this_run.folder.last_recorded_step() > step:
        print(f'metrics.jsonl and samples.jsonl go on at step {step}: their later lines are removed')
    before = describe_data_order(settings(globals()) | checkpoint['settings'])  # an old checkpoint has fewer
    now = describe_data_order(settings(globals()))
    if before != now:
        print(f'the run had {before}, and now has {now}: from here on the data comes in another order, so '
              'some of this epoch is skipped and some is seen twice')


def print_changed_best(this_run, checkpoint):
    """Print how best.pt differs from what `checkpoint` has recorded of it, unless it is later or damaged."""
    if this_run.best_step > this_run.step or this_run.best_is_damaged:
        return
    recorded = checkpoint.get('best_iter', this_run.best_step)  # an old checkpoint does not say
    if not (this_run.folder.path / 'best.pt').exists():
        if math.isfinite(checkpoint['best_val_loss']):
            print('best.pt is missing: the next evaluation makes a new one')
    elif this_run.best_step != recorded:
        print(f'best.pt is of step {this_run.best_step}, and no longer of step {recorded} as ckpt.pt has it: '
              'the first loss that is lower than its own replaces it')


def describe_data_order(values):
    """Return in words what the order of the data depends on. values: settings of this script."""
    global_batch_size = values['batch_size'] * values['gradient_accumulation_steps']
    return f"{global_batch_size} sequences per step and seed {values['seed']}"


def measure_best_again(this_run, evaluator, val_split):
    """Measure the validation loss of best.pt on what losses are measured on now."""
    weights = {name: weight.clone() for name, weight in this_run.model.state_dict().items()}
    best = load_checkpoint(this_run.folder.path / 'best.pt')
    this_run.model.load_state_dict(best['model'])
    this_run.model.eval()
    metrics = evaluate(evaluator, val_split, max_rows=eval_iters * batch_size)
    this_run.model.train()
    this_run.model.load_state_dict(weights)
    if metrics is None:  # asked to stop: the next resumed run will measure
        return
    if get_ranks().rank == 0:
        before = ''
        if this_run.best_measured_on:
            before = f'; the {this_run.best_val_loss:.4f} so far was on {one_line(this_run.best_measured_on)}'
        print(f"best.pt (step {this_run.best_step}) has a validation loss of {metrics['val_loss']:.4f} on "
              f'{this_run.measured_on}{before}')
    this_run.best_val_loss = metrics['val_loss']
    this_run.best_measured_on = this_run.measured_on


def load_weights(model, tokenizer):
    """Load the weights of the pretrained model `init_from`. Raises UserError if they do not suit."""
    pretrained = load_pretrained(init_from)
    if pretrained['tokenizer'] and pretrained['tokenizer'] != tokenizer.state():
        raise UserError(f'{dataset} was prepared with a different tokenizer than that of {init_from}: '
                        f'prepare it with --tokenizer {shlex.quote(init_from)}')
    for name, theirs in pretrained['config'].items():
        ours = getattr(model.config, name)
        may_be_shorter = name == 'block_size' and model.config.position != 'learned'
        if ours == theirs or name == 'dropout' or (may_be_shorter and ours < theirs):
            continue
        advice = 'put its tokenizer next to it' if name == 'vocab_size' else 'leave it out'
        raise SettingError(f'{name} is {ours}, but {init_from} has {theirs}: {advice}')
    model.load_state_dict(pretrained['model'])


# training ---------------------------------------------------------------------

def facts_to_compare(this_run, ptdtype):
    """Return {name: value} of what must be the same on all ranks; paths may differ between machines."""
    may_differ = 'dataset', 'out_dir', 'init_from', 'device', 'overwrite', 'verify_data', 'track'
    facts = {name: value for name, value in this_run.settings.items() if name not in may_differ}
    facts |= {
        'the fingerprint of the data': fingerprint(this_run.meta)[:12],
        'step': this_run.step,
        'dtype': str(ptdtype),
    }
    if this_run.folder.resume and get_ranks().world_size > 1:
        for name in 'ckpt.pt', 'best.pt':
            facts[name] = describe_file(this_run.folder.path / name)
    return facts


def lr_factor(step, max_steps):
    """Return the fraction of the peak learning rate at `step`: linear warmup, then linear decay to 0."""
    warmup = min(1.0, (step + 1) / (warmup_iters + 1))
    decay = max(0, max_steps - step) / max(1, max_steps - warmup_iters)
    return min(warmup, decay)


def wants_compile(torch_device):
    """Return whether the setting `compile` means torch.compile on this device."""
    return compile == 'True' or (compile == 'auto' and torch_device.type == 'cuda')


def speed_up(ddp_model, this_run, batches, torch_device, context):
    """Return (train_model, score): the model that gives the loss, and `count_loss` of it for evaluation.

    They are compiled, or have faster kernels on a CPU. Compilation is tried on the first micro-batch; if it
    fails, training continues without it.
    """
    score = partial(count_loss, this_run.model)
    if torch_device.type == 'cuda':
        use_joined_products(this_run.model)
    if wants_compile(torch_device):
        x, y = to_device(batches(this_run.step)[0], torch_device)
        compiled = try_compile(ddp_model, score, x, y, context)
        if compiled:
            return compiled
    if torch_device.type == 'cpu':
        use_fast_cpu_kernels(this_run.model)
    return ddp_model, score


def seed_dropout(step, rank):
    """Make dropout a function of the seed, the step and the rank, so that a resumed run draws the same."""
    sequence = np.random.SeedSequence((seed, step, rank))
    torch.manual_seed(int(sequence.generate_state(1)[0]))


class LastStep:
    """The step whose weights are the newest, until its figures are read and it is counted as done.

    A GPU may still be computing the step. It gets the next gradients to compute before we wait for the
    figures, so that it has work while we read, log and prepare. A step is always checked before its weights
    are evaluated, saved or changed.
    """

    def __init__(self, this_run, progress):
        self.this_run = this_run
        self.progress = progress
        self.figures = None  # loss, gradient norm, share of the ranks that were asked to stop; None: checked
        self.start_time = 0.0

    def start_clock(self):
        """Start to measure a step, unless the last one is not checked: then that is when this one starts."""
        if self.figures is None:
            self.start_time = time.perf_counter()

    def set_figures(self, loss, grad_norm, stop_requested):
        """Average the figures of a new step over the ranks. This does not wait for a GPU."""
        self.figures = MeansOverRanks(loss, grad_norm, stop_requested)

    def check(self):
        """Check, show and count the step if that was not done yet. This waits for a GPU.

        Returns whether some rank was asked to stop. Raises DivergedError.
        """
        if self.figures is None:
            return False
        loss, grad_norm, stop_share = self.figures.read()
        self.figures = None
        # In float16 an overflow skips the update and halves the loss scale; at a scale of 1 the run has
        # diverged. Without float16 the scale is always 1.
        overflowed = not math.isfinite(grad_norm) and self.this_run.scaler.get_scale() > 1
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or overflowed):
            raise self.this_run.diverged(f'the loss is {loss:.4g}, the gradient norm {grad_norm:.4g}')
        lr = self.this_run.optimizers[0].param_groups[0]['lr']
        end_time = time.perf_counter()
        seconds = end_time - self.start_time
        self.progress.log_step(self.this_run.step, seconds, loss=loss, lr=lr, grad_norm=grad_norm)
        self.start_time = end_time
        self.this_run.step += 1
        return stop_share > 0


def print_summary(this_run, batches, max_steps, torch_device, ptdtype):
    """Print in one line what is trained, on what, and for how long."""
    dtype_name = str(ptdtype).removeprefix('torch.')
    where = f'{get_ranks().world_size} {torch_device.type} in {dtype_name}'
    if torch_device.type == 'cpu':
        where += f' with {torch.get_num_threads()} threads'
    n_tokens = batches.split.n_tokens
    tokens_per_step = batches.global_batch_size * block_size
    by_epochs = ' by max_epochs' if max_epochs > 0 else ''
    epochs = max_steps * tokens_per_step / n_tokens
    print(f'{this_run.model.n_params():,} parameters on {where}; {n_tokens:,} training tokens '
          f'({this_run.tokenizer.encoding}), {tokens_per_step:,} per step; {max_steps:,} steps{by_epochs} '
          f'are {epochs:.2f} epochs', flush=True)


def main():
    # choose the device and the dtype
    check_settings()
    ranks = get_ranks()
    is_master = ranks.rank == 0  # prints and saves
    torch_device = choose_device(device, ranks.local_rank, ranks.world_size)
    ptdtype = choose_dtype(dtype, torch_device)
    context = autocast(torch_device, ptdtype)
    configure_memory(torch_device)
    if torch_device.type == 'cpu' and not wants_compile(torch_device):  # compiled code depends on the number
        choose_threads()

    # the data
    folder = prepared_folder(dataset)
    train_split = Split(folder, 'train', verify_data and ranks.local_rank == 0)
    val_split = Split(folder, 'val', verify_data and ranks.local_rank == 0)
    tokenizer = load_tokenizer(folder)
    batches = Batches(train_split, block_size, batch_size, gradient_accumulation_steps, seed, ranks.rank,
                      ranks.world_size)
    steps_per_epoch = batches.n_windows / batches.global_batch_size
    max_steps = math.ceil(max_epochs * steps_per_epoch) if max_epochs > 0 else max_iters
    eval_every = eval_interval if eval_interval > 0 else math.ceil(steps_per_epoch)

    # the model: from scratch, from the run to resume, or from a pretrained model
    run_folder = RunFolder(out_dir, resume=init_from == 'resume', overwrite=overwrite)
    torch.manual_seed(seed)
    model = GPT(make_config(tokenizer.vocab_size)).to(torch_device)
    optimizers = make_optimizers(model, optimizer, learning_rate, weight_decay, (beta1, beta2))
    scaler = torch.amp.GradScaler(torch_device.type, enabled=ptdtype == torch.float16)
    this_run = Run(run_folder, model, optimizers, scaler, tokenizer, train_split.meta, settings(globals()),
                   describe_measure(val_split, block_size, eval_iters * batch_size, ptdtype))
    if run_folder.resume:
        resume(this_run, max_steps)
    elif init_from != 'scratch':
        load_weights(model, tokenizer)

    # wrap the model in DDP, then compile it or, on a CPU, use faster kernels
    ddp_model = join_ranks(model, torch_device, facts_to_compare(this_run, ptdtype))
    train_model, score = speed_up(ddp_model, this_run, batches, torch_device, context)

    # evaluation
    stop = StopSignals()
    evaluator = Evaluator(score, block_size, batches.micro_batch_size, torch_device, ranks, stop.requested)
    if this_run.best_measured_on != this_run.measured_on:  # the run to resume had other settings
        with context:
            measure_best_again(this_run, evaluator, val_split)
    infill_rows = find_infill_rows(val_split, block_size)
    prompt = first_story_words(val_split, tokenizer, block_size // 2)  # of the sampled stories

    # from here on the folder holds this run
    if is_master:
        this_run.begin()
        print_summary(this_run, batches, max_steps, torch_device, ptdtype)
    tokens_per_step = batches.global_batch_size * block_size
    progress = make_progress(this_run, max_steps, tokens_per_step, torch_device, ptdtype, ranks)
    last_step = LastStep(this_run, progress)
    gc.collect()
    gc.freeze()  # what exists by now is never garbage: do not search it during training
    stopping = False  # a rank was asked to stop; all ranks know

    # the training loop: from_step yields the micro-batches of this step and of all that follow, without end
    for step, micro_batches in enumerate(batches.from_step(this_run.step), this_run.step):
        done = step == max_steps
        evaluates = done or step % eval_every == 0
        keep_copy = save_interval > 0 and step % save_interval == 0

        # check the last step before its weights are used; a GPU gets the next gradients to compute first
        check_later = torch_device.type in _ASYNCHRONOUS and not evaluates and not keep_copy
        if not check_later:
            stopping = last_step.check()
            if stopping:
                break

        # once in a while: evaluate (all ranks take part), write a story, save
        if evaluates:
            model.eval()
            with context:
                metrics = evaluate(evaluator, val_split, train_split, infill_rows, eval_iters * batch_size)
                if metrics is None:
                    stopping = True
                    break
                if is_master:
                    story = sample_story(model, tokenizer, seed, prompt, stop.requested)
            model.train()
            is_best = this_run.update_best(metrics['val_loss'])
            done = done or this_run.out_of_patience(patience, eval_every)
            this_run.save(is_best, keep_copy)
            if is_master:
                progress.log_evaluation(step, metrics, tokenizer.decode(prompt), story)
        elif keep_copy:
            this_run.save(keep=True)
        if done:
            break

        # forward and backward over the micro-batches; DDP exchanges gradients in the last one only
        last_step.start_clock()
        seed_dropout(step, ranks.rank)
        loss = torch.zeros((), device=torch_device)
        for i, micro_batch in enumerate(micro_batches):
            ddp_model.require_backward_grad_sync = i == len(micro_batches) - 1  # no effect without DDP
            x, y = to_device(micro_batch, torch_device)
            with context:
                micro_loss = train_model(x, y) / len(micro_batches)
            scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()

        if check_later:  # the weights are as before, so that the run can still stop here
            stopping = last_step.check()
            if stopping:
                break

        # update the weights
        set_learning_rate(optimizers, lr_factor(step, max_steps))
        grad_norm = clip_and_step(model, optimizers, scaler, grad_clip)
        last_step.set_figures(loss, grad_norm, stop.requested())

    # the end
    if stopping:
        this_run.save()
    progress.close()
    if is_master and stopping:
        print(f'stopped at step {this_run.step} and saved; resume with: {resume_command(out_dir)}',
              file=sys.stderr)
    elif is_master:
        print(f'done at step {this_run.step}/{max_steps}: best validation loss {this_run.best_val_loss:.4f} '
              f'at step {this_run.best_step}; write stories with: '
              f"python {script_path('sample.py')} --out_dir {shlex.quote(out_dir)}")
    leave_ranks()
    if stopping:
        raise SystemExit(stop.exit_status())


def main_of_a_rank():
    """Run main(); if another rank is lost, one line says so."""
    with report_lost_ranks(partial(resume_command, out_dir)):
        main()


if __name__ == '__main__':
    configure(globals(), base=checkpoint_settings, alternatives=('max_iters', 'max_epochs'))
    run(main_of_a_rank, suggest_less_memory)
