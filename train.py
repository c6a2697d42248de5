"""Train a GPT on prepared token shards.

    python train.py                                             data/tiny_stories, the defaults below
    python train.py config/quickstart.py                        a recipe
    python train.py config/tiny_stories.py --max_iters 1000     a recipe, changed
    python train.py --init_from resume --out_dir out-quickstart     go on with a run
    torchrun --standalone --nproc_per_node=8 train.py config/tiny_stories.py
"""

import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configurator import (
    SettingError,
    UserError,
    configure,
    in_range,
    one_of,
    out_of_memory,
    run,
    script_path,
    settings,
    user_errors,
)
from core.checkpoint import RunFolder, load_checkpoint
from core.device import (
    IdleCores,
    autocast,
    choose_device,
    choose_dtype,
    configure_memory,
    freeze_garbage,
    peak_flops,
    to_device,
)
from core.distributed import join_ranks, leave_ranks, lost_ranks_told, ranks, resume_command, watch_signals
from core.evaluate import evaluate, infill_rows, score
from core.generate import opening, sample_story
from core.kernels import use_fast_cpu_kernels
from core.optim import make_optimizers
from core.progress import Progress, check_tracker, diverged, hardware
from data.shards import SPLITS, Batches, Split, fingerprint, prepared_folder
from data.tokenizer import load_tokenizer
from formats.pretrained import load_pretrained
from model import GPT, GPTConfig

# what to read and write
dataset = 'tiny_stories'  # a folder under data/, or any path to a prepared folder
out_dir = 'out-tiny-stories'  # where checkpoints, metrics.jsonl and loss.png go
init_from = 'scratch'  # scratch; resume: go on with the run in out_dir; or the path of a model to tune
overwrite = False  # start anew in an out_dir that holds another run, which is lost
verify_data = False  # compare the shards with the hashes in meta.json; their lengths always are
# the model; GPTConfig in model.py explains
block_size = 256  # context, in tokens
n_layer = 6  # blocks
n_head = 6  # attention heads
n_kv_head = 0  # key-value heads; 0: n_head
n_embd = 288  # width
norm = 'rms'  # rms or layer
position = 'rope'  # rope, learned or sinusoidal
mlp = 'swiglu'  # swiglu, gelu, relu or relu2
mlp_width = 0  # hidden width of the MLP; 0: derived from n_embd
qk_norm = False  # normalise queries and keys
bias = False  # biases in the linear layers and in LayerNorm
tie_embeddings = True  # one matrix for the embedding and the head
dropout = 0.0  # probability
rope_theta = 10000.0  # base of the rotary frequencies
norm_eps = 1e-5  # added to the variance in norms
# optimisation
max_iters = 5000  # steps
max_epochs = 0.0  # passes over the training data, in place of max_iters; 0: max_iters decides
batch_size = 32  # sequences a micro-batch
gradient_accumulation_steps = 1  # micro-batches a step, over all ranks together
optimizer = 'muon'  # muon (on the matrices of the blocks, AdamW on the rest) or adamw
learning_rate = 0.0  # peak rate of AdamW; 0: 0.01 beside Muon, whose own rate is twice that, 1e-3 alone
warmup_iters = 50  # steps of linear warm-up; the rate then falls linearly to 0 at the last step
weight_decay = 0.1  # on matrices
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # largest gradient norm; 0: not clipped
# what a run shows
eval_interval = 500  # steps between evaluations, each with a checkpoint and a sampled story; 0: an epoch
eval_iters = 0  # batches an evaluation; 0: the whole validation split
patience = 0  # evaluations without a lower loss that end the run; 0: none do
save_interval = 0  # steps between checkpoints that are kept, as ckpt_STEP.pt; 0: the last and the best alone
log_interval = 10  # steps between lines
track = ''  # wandb or trackio, a package that shows it in a browser; '': neither
# the machine
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps
dtype = 'auto'  # auto (bfloat16 where the hardware has it), float32, bfloat16 or float16
compile = 'auto'  # auto (on CUDA alone), True or False: torch.compile
seed = 1337  # of weights, data order and dropout


def checkpoint_settings(settings):
    """What `configure` lays under files and flags: the settings of the run to go on with."""
    if settings['init_from'] == 'resume':
        saved = load_checkpoint(Path(settings['out_dir']) / 'ckpt.pt')['settings']
        of_this_call = 'out_dir', 'init_from', 'overwrite'
        return {name: value for name, value in saved.items() if name not in of_this_call}
    if settings['init_from'] != 'scratch':
        return load_pretrained(settings['init_from'])['config']
    return {}


def check_settings():
    """Refuse what no run can mean. Raises SettingError."""
    in_range(at_least=1, at_most=2**20, block_size=block_size, batch_size=batch_size,
             gradient_accumulation_steps=gradient_accumulation_steps)
    in_range(at_least=1, below=2**63, max_iters=max_iters, log_interval=log_interval)
    in_range(at_least=0, below=1e37, learning_rate=learning_rate, weight_decay=weight_decay,
             grad_clip=grad_clip, max_epochs=max_epochs)
    in_range(at_least=0, below=2**63, seed=seed, warmup_iters=warmup_iters, eval_iters=eval_iters,
             patience=patience, eval_interval=eval_interval, save_interval=save_interval)
    in_range(at_least=0, below=1, beta1=beta1, beta2=beta2)
    one_of(('muon', 'adamw'), optimizer=optimizer)
    one_of(('auto', 'True', 'False'), compile=compile)
    check_tracker(track)
    if 'WORLD_SIZE' in os.environ and 'RANK' not in os.environ:
        raise UserError('WORLD_SIZE is set, and no RANK: unset it, or start several processes by torchrun')


def make_config(vocab_size):
    """The model's config out of the settings. Raises SettingError."""
    try:
        names = {field.name for field in fields(GPTConfig)} - {'vocab_size'}
        return GPTConfig(vocab_size=vocab_size, **{name: globals()[name] for name in names})
    except ValueError as error:
        raise SettingError(str(error)) from None


def lr_factor(it, n_iters):
    """Share of the peak learning rate at step `it` of n_iters: linear warm-up, then linear decay to 0."""
    warmup = min(1.0, (it + 1) / (warmup_iters + 1))
    return min(warmup, max(0, n_iters - it) / max(1, n_iters - warmup_iters))


def compiled(ddp_model, model, x, y, context):
    """What trains and what evaluates, ddp_model and the `score` of its GPT, compiled where that works.

    Compiled around DDP, the backward pass is cut where DDP exchanges gradients, which then travel meanwhile.
    """
    plain = ddp_model, partial(score, model)
    if compile == 'False' or (compile == 'auto' and x.device.type != 'cuda'):
        return plain
    compiled_model, compiled_score = map(torch.compile, plain)
    ddp_model.require_backward_grad_sync = False  # each rank for itself
    try:
        with context:  # on one batch
            compiled_model(x, y).backward()
            model.eval()
            compiled_score(x, y)
        return compiled_model, compiled_score
    except Exception as error:  # a missing compiler, an old GPU: many libraries, many exceptions
        if out_of_memory(error):  # plain, it would take more
            raise
        if ranks()[0] == 0:
            print(f'torch.compile failed ({type(error).__name__}); going on without it', file=sys.stderr)
        return plain
    finally:
        model.train()
        model.zero_grad(set_to_none=True)


def begin_from(pretrained, model, tokenizer):
    """Put the weights of the pretrained model into `model`. Raises UserError where they do not suit."""
    if pretrained['tokenizer'] and pretrained['tokenizer'] != tokenizer.state():
        raise UserError(f'{dataset} was prepared with another tokenizer than {init_from} has: prepare it '
                        f'with --tokenizer {shlex.quote(init_from)}')
    for name, theirs in pretrained['config'].items():
        ours = getattr(model.config, name)
        shorter = name == 'block_size' and ours < theirs and model.config.position != 'learned'
        if ours != theirs and name != 'dropout' and not shorter:
            way_out = 'put its tokenizer beside it' if name == 'vocab_size' else 'leave it out'
            raise SettingError(f'{name} is {ours}, but {init_from} has {theirs}: {way_out}')
    model.load_state_dict(pretrained['model'])


def go_on(checkpoint, model, optimizers, scaler, data, n_iters):
    """Put back the state of a run; returns the step it is at, its best loss so far and the step of that.
    Raises SettingError where the model or the data are not those that it had."""
    if checkpoint['fingerprint'] != data:
        raise SettingError(f"the data in {dataset} is not what this run was trained on (fingerprint "
                           f"{data[:12]}, the run's {checkpoint['fingerprint'][:12]}): prepare it as before, "
                           'or name another --out_dir')
    now = asdict(model.config) | {'optimizer': optimizer}
    before = checkpoint['config'] | {'optimizer': checkpoint['settings'].get('optimizer', optimizer)}
    for name in before:
        if now[name] != before[name]:
            raise SettingError(f'{name} is {now[name]}, but {out_dir}/ckpt.pt has {before[name]}: leave it '
                               'out to go on with the run, or name another --out_dir for a new one')
    if checkpoint['iter'] > n_iters:
        raise SettingError(f"{n_iters} steps are asked for, but {out_dir}/ckpt.pt has {checkpoint['iter']}")
    model.load_state_dict(checkpoint['model'])
    if checkpoint['scaler']:  # else the run was not in float16 so far
        scaler.load_state_dict(checkpoint['scaler'])
    for opt, saved in zip(optimizers, checkpoint['optimizers'], strict=True):
        groups = opt.state_dict()['param_groups']  # rates and the like given for the rest of the run count
        opt.load_state_dict(saved | {'param_groups': groups})
        for p, state in opt.state.items():
            if any(value.shape not in (p.shape, ()) for value in state.values()):
                raise ValueError(f'a state of an optimizer has another shape than its weight, {[*p.shape]}')
    return checkpoint['iter'], checkpoint['best_val_loss'], checkpoint.get('best_iter', checkpoint['iter'])


def make_checkpoint(ruined, model, optimizers, scaler, tokenizer, meta, it, best_val_loss, best_iter):
    """The state of the run at step `it`, as checkpoint.py says. Raises ruined(it, why) if that is no good."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ruined(it, 'there are weights that are not finite')
    return {
        'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': tokenizer.state(),
        'settings': settings(globals()), 'iter': it, 'best_val_loss': best_val_loss, 'best_iter': best_iter,
        'optimizers': [opt.state_dict() for opt in optimizers], 'scaler': scaler.state_dict(),
        'fingerprint': fingerprint(meta), 'infill_rate': meta.get('infill_rate', 0)}


def less_memory():
    """What to type for the same batches in less memory."""
    total = batch_size * gradient_accumulation_steps
    at_once = min(batch_size, total // ranks()[2])  # sequences on a rank
    fewer = next((at_once // n for n in range(2, at_once + 1) if at_once % n == 0), 0)
    return (f'type --batch_size {fewer} --gradient_accumulation_steps {total // fewer}: the same batches'
            if fewer else 'take a smaller model or --block_size')


def main():
    # where to compute ---------------------------------------------------------
    rank, local_rank, world_size = ranks()
    master_process = rank == 0  # it saves and prints
    check_settings()
    torch_device = choose_device(device, local_rank, world_size)
    ptdtype = choose_dtype(dtype, torch_device)
    context = autocast(torch_device, ptdtype)
    configure_memory(torch_device)
    give_way = IdleCores()

    # the data -----------------------------------------------------------------
    folder = prepared_folder(dataset)
    train_split, val_split = (Split(folder, split, verify_data and local_rank == 0) for split in SPLITS)
    tokenizer = load_tokenizer(folder)
    batches = Batches(train_split, block_size, batch_size, gradient_accumulation_steps, seed, rank,
                      world_size)
    epoch = batches.n_windows / batches.sequences  # steps
    n_iters, eval_every = math.ceil(max_epochs * epoch) or max_iters, eval_interval or math.ceil(epoch)
    part_every = max(n_iters // 50, 25)  # steps, between evaluations of two batches: 2% of the work
    infill_val = infill_rows(val_split, block_size)

    # the model, and where it begins or goes on --------------------------------
    run_folder = RunFolder(out_dir, init_from == 'resume', overwrite)
    torch.manual_seed(seed)
    model = GPT(make_config(tokenizer.vocab_size)).to(torch_device)
    if torch_device.type == 'cpu':
        use_fast_cpu_kernels(model)
    optimizers = make_optimizers(model, optimizer, learning_rate, weight_decay, (beta1, beta2))
    scaler = torch.amp.GradScaler(torch_device.type, enabled=ptdtype == torch.float16)
    it, best_val_loss, best_iter = 0, math.inf, 0
    if run_folder.resume:
        saved, data = load_checkpoint(run_folder.path / 'ckpt.pt'), fingerprint(train_split.meta)
        with user_errors(run_folder.path / 'ckpt.pt'):
            it, best_val_loss, best_iter = go_on(saved, model, optimizers, scaler, data, n_iters)
    elif init_from != 'scratch':
        begin_from(load_pretrained(init_from), model, tokenizer)
    ddp_model = join_ranks(model, torch_device)
    compiled_model, compiled_score = compiled(ddp_model, model, *to_device(batches(it)[0], torch_device),
                                              context)
    ruined = partial(diverged, out_dir=out_dir, rate=optimizers[-1].param_groups[0]['peak_lr'])
    checkpoint = partial(make_checkpoint, ruined, model, optimizers, scaler, tokenizer, train_split.meta)
    caught = watch_signals()
    step_tokens = batches.sequences * block_size
    if master_process:
        run_folder.begin(checkpoint(it, best_val_loss, best_iter))
        print(f'{model.n_params():,} parameters on {world_size} {torch_device.type} in {str(ptdtype)[6:]}; '
              f'{train_split.n_tokens:,} training tokens ({tokenizer.encoding}), {step_tokens:,} a step; '
              f"{n_iters:,} steps{' by max_epochs' if max_epochs else ''} are "
              f'{n_iters * step_tokens / train_split.n_tokens:.2f} epochs', flush=True)
        peak = peak_flops(torch_device) * world_size / model.flops_per_token()  # tokens/s; 0: not known
        progress = Progress(run_folder, it, n_iters, step_tokens, peak,
                            hardware(torch_device, ptdtype, world_size), settings(globals()))
        prompt = opening(val_split, tokenizer, block_size // 2)

    # the loop -----------------------------------------------------------------
    skipped, stopping, spent = 0, False, 0.0  # spent: seconds of training since the start
    stopped = lambda: bool(give_way() or caught)  # noqa: E731
    evaluate_val = partial(evaluate, compiled_score, val_split, block_size, batch_size, device=torch_device,
                           rank=rank, world_size=world_size, stopped=stopped)
    freeze_garbage()
    for micro_batches in batches.ahead(it):  # endless: those of step `it`, as numpy arrays
        # once in a while: evaluate, save, show a story; and often, for the curve, evaluate two batches
        ended, keep = it == n_iters, save_interval > 0 and it % save_interval == 0
        whole = it % eval_every == 0 or ended
        if not stopping and (whole or it % part_every == 0):
            model.eval()
            with context:
                result = evaluate_val(*(infill_val, train_split, eval_iters) if whole else ((), None, 2))
                if master_process and whole and result:
                    story = sample_story(model, tokenizer, seed, prompt, stopped)
            model.train()
            stopping = result is None
            if result and not math.isfinite(result['val_loss']):
                raise ruined(it, f"the validation loss is {result['val_loss']}")
            if master_process and not whole and not stopping:
                progress.keep(it, spent, val_part_loss=result['val_loss'])
        if whole and not stopping:
            if is_best := result['val_loss'] < best_val_loss:
                best_val_loss, best_iter = result['val_loss'], it
            ended = ended or 0 < patience * eval_every <= it - best_iter
            if master_process:
                run_folder.save(checkpoint(it, best_val_loss, best_iter), is_best, keep)
                progress.evaluated(it, spent, result, tokenizer.decode(prompt), story)
        elif master_process and keep:
            run_folder.save(checkpoint(it, best_val_loss, best_iter), keep=True)
        if ended or stopping:
            break

        # one step: forward and backward over the micro-batches, then the update
        began = time.perf_counter()
        give_way()
        torch.manual_seed(int(np.random.SeedSequence((seed, it, rank)).generate_state(1)[0]))  # of dropout
        for group in (group for opt in optimizers for group in opt.param_groups):
            group['lr'] = group['peak_lr'] * lr_factor(it, n_iters)
        loss = torch.zeros((), device=torch_device)
        for i, xy in enumerate(micro_batches):
            ddp_model.require_backward_grad_sync = i == len(micro_batches) - 1  # DDP: one exchange a step
            with context:
                part = compiled_model(*to_device(xy, torch_device)) / len(micro_batches)
            scaler.scale(part).backward()
            loss += part.detach()
        for opt in optimizers:
            scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        if scaler.is_enabled() and not grad_norm.isfinite():  # clipping has spread it to all gradients
            skipped += 1
            scaler.update(scaler.get_scale() * scaler.get_backoff_factor())
            scaler.load_state_dict(scaler.state_dict() | {'_growth_tracker': 0})  # no growth soon
        else:
            for opt in optimizers:
                opt.step()  # not by the scaler, which would look at each optimizer's gradients again
            scaler.update()
        model.zero_grad(set_to_none=True)
        figures = torch.stack((loss, grad_norm, torch.full_like(loss, bool(caught))))
        if world_size > 1:  # all ranks stop at the same step
            dist.all_reduce(figures)
        # here, and in float16 above, the processor waits for a GPU
        loss, grad_norm, stopping = (figures / world_size).tolist()
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.get_scale() > 1):
            raise ruined(it, f'the loss is {loss:.4g}, the gradient norm {grad_norm:.4g}')
        spent += time.perf_counter() - began
        it += 1

        # what a person sees
        if master_process:
            lr = optimizers[0].param_groups[0]['lr']
            progress.step(it - 1, spent, skipped, loss=loss, lr=lr, grad_norm=grad_norm)

    # the end ------------------------------------------------------------------
    if master_process and stopping:
        run_folder.save(checkpoint(it, best_val_loss, best_iter))
    if master_process:
        progress.close()
    if master_process and stopping:
        print(f'stopped at step {it} and saved; go on with: {resume_command(out_dir)}', file=sys.stderr)
    elif master_process:
        print(f'done at step {it}/{n_iters}: best validation loss {best_val_loss:.4f} at step {best_iter}; '
              f"write with: python {script_path('sample.py')} --out_dir {shlex.quote(out_dir)}")
    leave_ranks()
    if stopping:
        raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))


if __name__ == '__main__':
    configure(globals(), base=checkpoint_settings)
    run(lost_ranks_told(out_dir)(main), less_memory())
