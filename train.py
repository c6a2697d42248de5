"""Train a GPT on prepared token shards.

    python train.py                                             data/tiny_stories, the defaults below
    python train.py config/quickstart.py                        a recipe
    python train.py config/tiny_stories.py --max_iters 1000     a recipe, changed
    python train.py --init_from resume --out_dir out-quickstart     go on with a run
    torchrun --standalone --nproc_per_node=8 train.py config/tiny_stories.py
"""

import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpoint import load_checkpoint, save_checkpoint
from configurator import SettingError, UserError, configure, run, settings
from data import infill
from data.shards import PREPARE, Batches, Split, fingerprint
from data.tokenizer import load_tokenizer
from device import autocast, choose_device, choose_dtype, keep_memory, peak_flops, total_memory
from evaluate import evaluate
from formats import open_model
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
batch_size = 32  # sequences a micro-batch
gradient_accumulation_steps = 1  # micro-batches a step, over all ranks together
optimizer = 'muon'  # muon (on the matrices of the blocks, AdamW on the rest) or adamw
learning_rate = 0.0  # peak rate of AdamW; 0: 0.01 beside Muon, whose own rate is twice that, 1e-3 alone
warmup_iters = 50  # steps of linear warm-up; the rate then falls linearly to 0 at max_iters
weight_decay = 0.1  # on matrices
beta1 = 0.9  # of AdamW
beta2 = 0.95  # of AdamW
grad_clip = 1.0  # largest gradient norm; 0: not clipped
# what a run shows
eval_interval = 500  # steps between evaluations, each with a checkpoint and a sampled story
eval_iters = 0  # batches an evaluation; 0: the whole validation split
log_interval = 10  # steps between lines
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
        return open_model(settings['init_from'])['config']
    return {}


def check_settings(world_size):
    """Refuse what no run can mean. Raises SettingError."""
    for name in ('block_size', 'batch_size', 'gradient_accumulation_steps', 'eval_interval', 'log_interval',
                 'max_iters'):
        if globals()[name] < 1:
            raise SettingError(f'{name} is {globals()[name]}; it must be at least 1')
    for name in 'learning_rate', 'warmup_iters', 'weight_decay', 'grad_clip', 'eval_iters', 'seed':
        if globals()[name] < 0:
            raise SettingError(f'{name} is {globals()[name]}; it must be 0 or more')
    for name in 'beta1', 'beta2':
        if not 0 <= globals()[name] < 1:
            raise SettingError(f'{name} is {globals()[name]}; it must be at least 0 and below 1')
    if optimizer not in ('muon', 'adamw'):
        raise SettingError(f'optimizer is {optimizer!r}, not muon or adamw')
    if compile not in ('auto', 'True', 'False'):
        raise SettingError(f"compile is {compile!r}, not 'auto', 'True' or 'False'")
    sequences = batch_size * gradient_accumulation_steps
    if sequences % (world_size * micro_steps(world_size)):
        unit = world_size * micro_steps(world_size)
        below, above = sequences // unit * unit, (sequences // unit + 1) * unit
        raise SettingError(f'{sequences} sequences a step (batch_size {batch_size} * gradient_accumulation_'
                           f'steps {gradient_accumulation_steps}) do not divide among {world_size} ranks '
                           f'with {micro_steps(world_size)} micro-batches each; the nearest: '
                           + ' or '.join(str(n) for n in (below, above) if n))


def micro_steps(world_size):
    """Micro-batches a rank computes in a step: none is larger than batch_size."""
    return math.ceil(gradient_accumulation_steps / world_size)


def make_config(vocab_size):
    """The model's config out of the settings. Raises SettingError."""
    try:
        names = {field.name for field in fields(GPTConfig)} - {'vocab_size'}
        return GPTConfig(vocab_size=vocab_size, **{name: globals()[name] for name in names})
    except ValueError as error:
        raise SettingError(str(error)) from None


def make_optimizers(model):
    """A list of optimizers that share out all parameters; each group's `peak_lr` is what the schedule scales.

    Muon (Jordan 2024) takes the matrices of the blocks; AdamW takes embeddings, head, norms and biases.
    """
    matrices = {name: p for name, p in model.named_parameters()
                if p.dim() == 2 and name.startswith('blocks.')}
    rest = {name: p for name, p in model.named_parameters() if name not in matrices}
    adamw_lr = learning_rate or (0.01 if optimizer == 'muon' else 1e-3)
    optimizers = []
    if optimizer == 'muon':
        optimizers.append(torch.optim.Muon(matrices.values(), lr=2 * adamw_lr, weight_decay=weight_decay))
    else:
        rest.update(matrices)
    groups = [{'params': [p for p in rest.values() if p.dim() == 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest.values() if p.dim() != 2], 'weight_decay': 0.0}]
    optimizers.append(torch.optim.AdamW(groups, lr=adamw_lr, betas=(beta1, beta2), fused=True))
    for group in (group for opt in optimizers for group in opt.param_groups):
        group['peak_lr'] = group['lr']
    return optimizers


def lr_factor(it):
    """Share of the peak learning rate at step `it`: linear warm-up, then linear decay to 0 at max_iters."""
    warmup = min(1.0, (it + 1) / (warmup_iters + 1))
    return min(warmup, max(0, max_iters - it) / max(1, max_iters - warmup_iters))


def compiled(model, x, y, context):
    """torch.compile(model) where it works (tried on one batch), else one line and the model itself."""
    if compile == 'False' or (compile == 'auto' and x.device.type != 'cuda'):
        return model
    fast = torch.compile(model)
    try:
        with context:
            fast(x, y).backward()
        model.zero_grad(set_to_none=True)
        return fast
    except Exception as error:  # a missing compiler, an old GPU: many libraries, many exceptions
        print(f'torch.compile failed ({type(error).__name__}); going on without it', file=sys.stderr)
        return model


def sample_story(model, tokenizer, context, stopped):
    """One story from the model as it stands, for a person to see; cut short once stopped() is true."""
    prompt = torch.tensor([[tokenizer.delimiter]], device=next(model.parameters()).device)
    with context:
        tokens = model.generate(prompt, block_size, 0.8, stop=tokenizer.delimiter,
                                never=(tokenizer.blank, tokenizer.middle), seed=seed)
        tokens = itertools.takewhile(lambda _: not stopped(), tokens)
        return infill.decode(tokenizer, [int(token) for token in tokens])


def keep_metrics(path, it):
    """Leave in metrics.jsonl what came before step `it`: the run goes on from there."""
    lines = path.read_text(errors='replace').splitlines() if path.exists() else []
    before = []
    for line in lines:
        try:
            if json.loads(line)['iter'] < it:
                before.append(line + '\n')
        except (ValueError, KeyError, TypeError):  # half a line, from a run that was killed
            break
    temporary = path.with_name(path.name + '.tmp')
    temporary.write_text(''.join(before))
    temporary.replace(path)


def plot_losses(folder):
    """Draw folder/metrics.jsonl as folder/loss.png."""
    import matplotlib  # takes half a second to import

    matplotlib.use('Agg')
    from matplotlib import pyplot

    records = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    figure, axes = pyplot.subplots()
    for key, label in ('loss', 'training'), ('val_loss', 'validation'):
        points = [(record['iter'], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel='step', ylabel='loss (nats per token)')
    axes.legend()
    figure.savefig(folder / 'loss.png')
    pyplot.close(figure)


def step_seed(it, rank):
    """The seed of the dropout of step `it` on this rank."""
    return int(np.random.SeedSequence((seed, it, rank)).generate_state(1)[0])


def seconds(t):
    """A duration for a person."""
    return f'{t / 3600:.1f} h' if t >= 5400 else f'{t / 60:.0f} min' if t >= 90 else f'{t:.0f} s'


def load_published(model, tokenizer):
    """Put the weights of the model at `init_from` into `model`. Raises UserError where they do not suit."""
    published = open_model(init_from)
    if published['tokenizer'] and published['tokenizer'] != tokenizer.state():
        raise UserError(f'{dataset} was prepared with another tokenizer than {init_from} has: prepare it '
                        f'with --tokenizer {init_from}')
    for name, theirs in published['config'].items():
        ours = getattr(model.config, name)
        shorter = name == 'block_size' and ours < theirs and model.config.position != 'learned'
        if ours != theirs and name != 'dropout' and not shorter:
            raise SettingError(f'{name} is {ours}, but {init_from} has {theirs}: leave it out')
    model.load_state_dict(published['model'])


def check_same_run(checkpoint, config, data):
    """Refuse to go on with another model or other data than the run had. Raises SettingError."""
    for name, before in checkpoint['config'].items():
        now = getattr(config, name)
        if now != before:
            raise SettingError(f'{name} is {now}, but {out_dir}/ckpt.pt has {before}: leave it out to go on '
                               'with the run, or name another --out_dir for a new one')
    if checkpoint['fingerprint'] != data:
        raise SettingError(f"the data in {dataset} is not what this run was trained on (fingerprint "
                           f"{data[:12]}, the run's {checkpoint['fingerprint'][:12]}): prepare it as before, "
                           'or name another --out_dir')


def watch_signals():
    """Ctrl-C and SIGTERM put their number into the list returned; a second Ctrl-C stops at once.

    torchrun hands a Ctrl-C on to processes that the terminal has told already: under it, one that follows
    within a second is the same one.
    """
    caught, first = [], 0.0
    echo = 1.0 if 'TORCHELASTIC_RUN_ID' in os.environ else 0.0  # seconds

    def note(number, frame):
        nonlocal first
        if caught and number == signal.SIGINT and time.monotonic() - first > echo:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        caught.append(number)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, note)
    return caught


def resume_command():
    """What to type to go on with this run."""
    ranks, here = (int(os.environ.get(name, 1)) for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'))
    nodes = '--standalone' if ranks == here else '...'  # on several nodes, the options they were started with
    start = 'python' if ranks == 1 else f'torchrun {nodes} --nproc_per_node={here}'
    return f'{start} train.py --init_from resume --out_dir {shlex.quote(out_dir)}'


@contextlib.contextmanager
def lost_ranks_told():
    """One line, no traceback, where an exchange with another rank fails because that one has ended."""
    try:
        yield
    except RuntimeError as error:  # for gloo torch has no class of its own
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or 'gloo' in str(error)):
            raise
        if dist.get_rank() < 2:  # rank 0, and one more as rank 0 may be the one
            print(f'train.py: another process of this run has ended, so rank {dist.get_rank()} stops; what '
                  f'was saved is whole, go on with: {resume_command()}', file=sys.stderr)
        raise SystemExit(1) from None


@lost_ranks_told()
def main():
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    master = rank == 0
    check_settings(world_size)
    place = choose_device(device, int(os.environ.get('LOCAL_RANK', 0)))
    precision = choose_dtype(dtype, place)
    if precision == torch.float16 and place.type == 'mps':
        raise SettingError('float16 does not train on mps: use --dtype float32 or bfloat16')
    context = autocast(place, precision)
    keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    # the data
    folder = Path(dataset) if Path(dataset).is_dir() else Path(__file__).parent / 'data' / dataset
    train_split, val_split = Split(folder, 'train'), Split(folder, 'val')
    if verify_data and int(os.environ.get('LOCAL_RANK', 0)) == 0:
        train_split.verify()
        val_split.verify()
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != train_split.meta['vocab_size']:
        raise UserError(f"the tokenizer in {folder} has a vocabulary of {tokenizer.vocab_size}, meta.json "
                        f"says {train_split.meta['vocab_size']}: {PREPARE}")
    sequences = batch_size * gradient_accumulation_steps
    batches = Batches(train_split, block_size, sequences, seed, rank, world_size)

    # the model, its optimizers, and where a run to go on with stands
    out = Path(out_dir)
    held = any((out / name).exists() for name in ('ckpt.pt', 'best.pt'))
    if held and init_from != 'resume' and not overwrite:
        raise SettingError(f'{out} holds another run: go on with it (--init_from resume), replace it '
                           '(--overwrite), or name another folder (--out_dir)')
    torch.manual_seed(seed)
    model = GPT(make_config(tokenizer.vocab_size)).to(place)
    model.max_logits = total_memory(place) // 48  # three float32 copies in a quarter of the memory
    optimizers = make_optimizers(model)
    scaler = torch.amp.GradScaler(place.type, enabled=precision == torch.float16)
    it, best_val_loss = 0, math.inf
    if init_from not in ('scratch', 'resume'):
        load_published(model, tokenizer)
    if init_from == 'resume':
        checkpoint = load_checkpoint(out / 'ckpt.pt')
        check_same_run(checkpoint, model.config, fingerprint(train_split.meta))
        model.load_state_dict(checkpoint['model'])
        for opt, state in zip(optimizers, checkpoint['optimizers'], strict=True):
            peaks = [group['peak_lr'] for group in opt.param_groups]
            opt.load_state_dict(state)
            for group, peak in zip(opt.param_groups, peaks, strict=True):
                group['peak_lr'] = peak  # a rate given for the rest of the run counts
        scaler.load_state_dict(checkpoint['scaler'])
        it, best_val_loss = checkpoint['iter'], checkpoint['best_val_loss']
        del checkpoint

    if world_size > 1:
        dist.init_process_group('nccl' if place.type == 'cuda' else 'gloo')
    micro = micro_steps(world_size)

    def load(step):
        """This rank's micro-batches of `step` on the device: a list of pairs (x, y), (B, block_size) each."""
        xy = [torch.from_numpy(a) for a in batches(step)]
        if place.type == 'cuda':
            xy = [a.pin_memory() for a in xy]
        return list(zip(*(a.to(place, non_blocking=True).chunk(micro) for a in xy), strict=True))

    fast = compiled(model, *load(it)[0], context)
    network = DistributedDataParallel(fast) if world_size > 1 else fast
    caught = watch_signals()
    if master:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'cannot write to {out} ({error.strerror}): name another --out_dir') from None
        for name in 'ckpt.pt.tmp', 'best.pt.tmp', 'metrics.jsonl.tmp':  # of a run killed while it saved
            (out / name).unlink(missing_ok=True)
        step_tokens = batches.sequences * block_size
        print(f'{model.n_params():,} parameters on {world_size} {place.type} in '
              f'{str(precision).split(".")[1]}; {train_split.n_tokens:,} training tokens '
              f'({tokenizer.encoding}), {step_tokens:,} a step, '
              f'{max_iters * step_tokens / train_split.n_tokens:.2f} epochs', flush=True)

    def record(**values):
        try:
            with open(out / 'metrics.jsonl', 'a') as file:
                file.write(json.dumps(values) + '\n')
        except OSError as error:
            raise UserError(f'cannot write {out}/metrics.jsonl ({error.strerror}): the last checkpoint is '
                            f'whole; make room, then go on with: {resume_command()}') from None

    def save(name):
        save_checkpoint(out / name, {
            'model': model.state_dict(), 'config': asdict(model.config), 'tokenizer': tokenizer.state(),
            'settings': settings(globals()), 'iter': it, 'best_val_loss': best_val_loss,
            'optimizers': [opt.state_dict() for opt in optimizers], 'scaler': scaler.state_dict(),
            'fingerprint': fingerprint(train_split.meta),
            'infill_rate': train_split.meta.get('infill_rate', 0)})

    def stop():
        """Save, say how to go on, and exit as one stopped by a signal does."""
        if master:
            save('ckpt.pt')
            print(f'stopped at step {it} and saved; go on with: {resume_command()}', file=sys.stderr)
        if world_size > 1:
            dist.barrier()  # once a rank has ended, torchrun ends the others, however far the save is
        raise SystemExit(128 + (caught[0] if caught else signal.SIGTERM))

    if master:
        if init_from != 'resume':
            save('ckpt.pt')  # until here there is the old run to go on with, from here on the new one
            for name in 'best.pt', 'loss.png':
                (out / name).unlink(missing_ok=True)
        keep_metrics(out / 'metrics.jsonl', it)

    peak = peak_flops(place)
    skipped = 0  # steps without an update, normal under float16 scaling
    started, start_it = time.perf_counter(), it
    clock, clock_it = started, it  # of the last line
    with ThreadPoolExecutor(1) as loader:
        upcoming = loader.submit(load, it)
        while True:
            if it % eval_interval == 0 or it == max_iters:
                eval_start = time.perf_counter()
                model.eval()
                with context:
                    result = evaluate(fast, val_split, block_size, batch_size, eval_iters, place, rank,
                                      world_size, lambda: bool(caught))
                if result is None:
                    stop()
                if master:
                    print(f"step {it}: validation loss {result['val_loss']:.4f}, "
                          f"perplexity {result['val_ppl']:.2f}, {result['val_bpb']:.4f} bits per byte, "
                          f"accuracy {result['val_acc']:.1%}"
                          + (f", middles {result['val_middle_loss']:.4f}, with another story's end "
                             f"{result['val_middle_loss_other_end']:.4f}"
                             if 'val_middle_loss' in result else ''))
                    record(iter=it, **result)
                    if result['val_loss'] < best_val_loss:
                        best_val_loss = result['val_loss']
                        save('best.pt')
                    save('ckpt.pt')
                    story = sample_story(model, tokenizer, context, lambda: bool(caught))
                    print('   ', story.replace('\n', '\n    '), flush=True)
                    plot_losses(out)
                model.train()
                pause = time.perf_counter() - eval_start
                started, clock = started + pause, clock + pause
            if it >= max_iters:
                break

            # one step: forward and backward over the micro-batches, then the update
            torch.manual_seed(step_seed(it, rank))  # dropout
            for opt in optimizers:
                for group in opt.param_groups:
                    group['lr'] = group['peak_lr'] * lr_factor(it)
            pairs, upcoming = upcoming.result(), loader.submit(load, it + 1)
            loss = torch.zeros((), device=place)
            for i, (x, y) in enumerate(pairs):
                network.require_backward_grad_sync = i == len(pairs) - 1  # DDP: one exchange a step
                with context:
                    part = network(x, y) / len(pairs)
                scaler.scale(part).backward()
                loss += part.detach()
            for opt in optimizers:
                scaler.unscale_(opt)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
            shared = torch.stack((loss, loss.new_tensor(bool(caught))))
            if world_size > 1:
                dist.all_reduce(shared)
            loss, stopping = shared[0].item() / world_size, shared[1].item()
            grad_norm = grad_norm.item()
            if not math.isfinite(loss) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
                raise UserError(f'step {it}: the loss is {loss}, the gradient norm {grad_norm}; the last '
                                f'good weights are in {out}/ckpt.pt. Go on with a lower --learning_rate or '
                                f'--dtype float32: {resume_command()}')
            skipped += not math.isfinite(grad_norm)
            for opt in optimizers:
                scaler.step(opt)
                opt.zero_grad(set_to_none=True)
            scaler.update()

            if master and it % log_interval == 0:
                now = time.perf_counter()
                speed = (it + 1 - clock_it) * batches.sequences * block_size / (now - clock)
                left = (max_iters - it - 1) * (now - started) / (it + 1 - start_it)
                clock, clock_it = now, it + 1
                lr = optimizers[0].param_groups[0]['lr']
                record(iter=it, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=speed)
                print(f'step {it}/{max_iters}: loss {loss:.4f}, lr {lr:.2e}, grad norm {grad_norm:.2f}, '
                      f'{speed:,.0f} tokens/s, {seconds(left)} left'
                      + (f', MFU {speed * model.flops_per_token() / peak / world_size:.1%}' if peak else '')
                      + (f', {skipped} steps skipped' if skipped else ''), flush=True)
            it += 1
            if stopping:
                stop()

    if master:
        print(f'done: best validation loss {best_val_loss:.4f}; write stories with: '
              f'python sample.py --out_dir {out}')
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    configure(globals(), base=checkpoint_settings)
    run(main)
