"""Write stories with a trained model. Only stories go to stdout, with a line `---` between two of them.

    python sample.py --out_dir out-quickstart
    python sample.py --start "One day, a dog" --num_samples 10 --temperature 0.8 > stories.txt
    python sample.py --start FILE:prompts.txt --one_per_line --num_samples 1 --temperature 0
    python sample.py --out_dir out-infill --first_sentence "Tim lost his hat." --last_sentence "Tim was glad."
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # this repository comes before PYTHONPATH

import torch
from tqdm import tqdm

from configurator import SettingError, UserError, configure, in_range, one_of, printable, run, user_errors
from core.checkpoint import FILES, load_model
from core.device import DTYPES, choose_device, choose_dtype
from core.generate import generate_stories, generate_until
from core.kernels import use_fast_cpu_kernels
from core.memory import configure_memory
from core.native import NativeModel
from data import infill
from formats.pretrained import load_with_tokenizer

out_dir = 'out-tiny-stories'  # folder of the run
ckpt = 'best'  # best (lowest validation loss) or last
init_from = ''  # a model to use instead: a checkpoint, a Hugging Face folder, or llama2.c's .bin
start = ''  # how every story starts: a text, or FILE:path
one_per_line = False  # each line of the file starts num_samples stories
first_sentence = ''  # infilling: the first sentence of a story whose middle the model writes
last_sentence = ''  # infilling: the last sentence of that story
num_samples = 3  # number of stories; as many as fit into memory are written side by side
max_new_tokens = 1000  # longest continuation; most stories end earlier
min_new_tokens = 0  # a story that ends earlier is followed by another one
temperature = 0.8  # below 1 prefers likely tokens; 0: always take the likeliest
top_k = 0  # sample from the k likeliest tokens; 0: from all
top_p = 0.95  # sample from the likeliest tokens that together have this probability; 1: from all
seed = 1337  # same seed, same stories
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps
dtype = 'float32'  # float32, bfloat16, float16, auto, or int8 (the fastest on a CPU)
compile = False  # compile the step from token to token: takes half a minute, pays for many stories on a GPU

_MAX_START_BYTES = 10_000_000
_DEFAULT_OUT_DIR = out_dir


def check_settings():
    """Check the settings. Raises SettingError."""
    one_of(FILES, ckpt=ckpt)
    one_of(('auto', *DTYPES, 'int8'), dtype=dtype)
    in_range(at_least=1, at_most=10**8, num_samples=num_samples, max_new_tokens=max_new_tokens)
    in_range(at_least=0, top_k=top_k, min_new_tokens=min_new_tokens)
    in_range(at_least=0, at_most=1e30, temperature=temperature)
    in_range(above=0, at_most=1, top_p=top_p)
    in_range(at_least=0, below=2**63, seed=seed)
    if 0 < temperature < 1e-30:  # float32 cannot divide by it
        raise SettingError(f'temperature is {temperature}; it must be 0, or at least 1e-30')
    if min_new_tokens > max_new_tokens:
        raise SettingError(f'min_new_tokens is {min_new_tokens}, more than max_new_tokens, {max_new_tokens}')
    if dtype == 'int8' and compile:
        raise SettingError('dtype int8 is compiled already, by a C compiler: leave out compile')
    if init_from and out_dir != _DEFAULT_OUT_DIR:
        raise SettingError('init_from and out_dir both name a model: leave out one of them')
    if init_from and ckpt != 'best':
        raise SettingError('ckpt is for --out_dir: name the checkpoint itself, as --init_from out-x/ckpt.pt')
    if one_per_line and not start.startswith('FILE:'):
        raise SettingError('one_per_line is for the lines of a file: type --start FILE:path')
    if bool(first_sentence.strip()) != bool(last_sentence.strip()):
        raise SettingError('infilling needs both ends: type --first_sentence "..." --last_sentence "..."')
    if first_sentence and start:
        raise SettingError('start and first_sentence are both given: leave out one of them')
    if last_sentence and min_new_tokens:
        raise SettingError('min_new_tokens is for whole stories, not for infilling: leave it out')


def make_model(checkpoint, torch_device):
    """Return the model of a checkpoint, ready to generate on the device. Raises UserError."""
    model = load_model(checkpoint, torch_device)
    if dtype == 'int8':
        return NativeModel(model)
    if torch_device.type == 'cpu':
        use_fast_cpu_kernels(model)
    return model.to(choose_dtype(dtype, torch_device))


# requests -----------------------------------------------------------------------

@dataclass
class Request:
    """One story to write."""
    start: list  # the token ids of the text it starts with, the delimiter first
    prompt: list  # the token ids that the model continues: `start`, or both ends of a story to infill
    ending: str = ''  # infilling: the last sentence


def make_requests(tokenizer):
    """Return the stories to write, a list of Request."""
    first, last = first_sentence.strip(), last_sentence.strip()
    starts = [first] if first else read_starts()
    for text in [*starts, last]:
        if tokenizer.decode(tokenizer.encode(text)) != text:
            print('the tokenizer does not know some of these characters: they are left out', file=sys.stderr)
            break
    requests = []
    for text in starts:
        ids = [tokenizer.delimiter, *tokenizer.encode(text)]
        if last:
            request = Request(ids, infill.prompt(tokenizer, first, last), last)
        else:
            request = Request(ids, ids)
        requests += [request] * num_samples
    return requests


def read_starts():
    """Return the texts that stories start with: `start` itself, or its file, whole or by lines."""
    if not start.startswith('FILE:'):
        return [start]
    path = start.removeprefix('FILE:')
    with user_errors(path, 'cannot be read as UTF-8 text'), open(path, 'rb') as file:
        data = file.read(_MAX_START_BYTES + 1)  # not all of it: /dev/zero has no end
        if len(data) > _MAX_START_BYTES:
            raise ValueError(f'more than {_MAX_START_BYTES:,} bytes')
        text = data.decode('utf-8-sig').replace('\r\n', '\n')
    if not one_per_line:
        return [text]
    lines = [line for line in text.split('\n') if line.strip()]
    if not lines:
        raise UserError(f'{path} has no line to start a story with')
    return lines


def token_limit(requests, block_size):
    """Return (how many tokens the model may write, what limits it). Raises UserError if a prompt is too long.

    A plain story slides past the context; infilling must see both ends, so it stops at the context's end.
    """
    infilling = requests[0].ending != ''
    longest = max(len(request.prompt) for request in requests)
    if longest > block_size:
        what = 'the two sentences have' if infilling else 'a start has'
        raise UserError(f'{what} {longest} tokens, more than the context of {block_size}: shorten it')
    room = block_size - longest + 1  # the last token is written, but never read
    if infilling and room < max_new_tokens:
        return room, f'the end of the context of {block_size} tokens'
    return max_new_tokens, f'--max_new_tokens {max_new_tokens}'


# writing ------------------------------------------------------------------------

def sampling_settings(tokenizer):
    """Return the arguments of `generate_until` that the settings give."""
    return {'min_new_tokens': min_new_tokens, 'temperature': temperature, 'top_k': top_k, 'top_p': top_p,
            'suppress': (tokenizer.blank, tokenizer.middle), 'seed': seed, 'compile': compile}


def story_text(tokenizer, ids, ending=''):
    """Return the text of token ids that begin with a delimiter, then `ending`.

    Each further delimiter begins another story, after a line `---`.
    """
    stories = []
    for token in ids:
        if token == tokenizer.delimiter:
            stories.append([])
        stories[-1].append(token)
    text = '\n---\n'.join(tokenizer.decode(story) for story in stories)
    if ending and not text[-1:].isspace():
        text += ' '
    return text + ending


def write_stories(model, tokenizer, requests, limit):
    """Yield (text, whether it was cut at `limit` tokens) of each story, in order, as they are finished."""
    prompts = [request.prompt for request in requests]
    sampling = sampling_settings(tokenizer)
    rows = generate_stories(model, prompts, tokenizer.delimiter, limit, **sampling)
    for request, row in zip(requests, rows, strict=True):
        yield story_text(tokenizer, request.start + row, request.ending), len(row) == limit


def print_stories(model, tokenizer, requests, limit):
    """Print stories as they are finished; return how many were cut at `limit` tokens."""
    n_cut = 0
    for i, (text, was_cut) in enumerate(write_stories(model, tokenizer, requests, limit)):
        if i > 0:
            text = '---\n' + text
        if sys.stdout.isatty():
            text = printable(text)
        tqdm.write(text)  # above the progress bar
        n_cut += was_cut
    return n_cut


def stream_story(model, tokenizer, request, limit):
    """Print one story token by token on a terminal; return whether it was cut at `limit` tokens."""
    sampling = sampling_settings(tokenizer)
    shown = ''
    steps = generate_until(model, [request.prompt], tokenizer.delimiter, limit, **sampling)
    for rows, _ in steps:
        text = printable(story_text(tokenizer, request.start + rows[0]))
        text = text.rstrip('\N{REPLACEMENT CHARACTER}')  # the first bytes of a character that will follow
        print(text[len(shown):], end='', flush=True)
        shown = text
    text = printable(story_text(tokenizer, request.start + rows[0], request.ending))
    print(text[len(shown):])
    return len(rows[0]) == limit


def main():
    check_settings()
    torch_device = choose_device(device)
    if dtype == 'int8' and torch_device.type != 'cpu':
        raise SettingError(f'dtype int8 is for a CPU, not for {torch_device}: use bfloat16, or --device cpu')
    configure_memory(torch_device)

    checkpoint, tokenizer = load_with_tokenizer(init_from or Path(out_dir, FILES[ckpt]))
    model = make_model(checkpoint, torch_device)
    requests = make_requests(tokenizer)
    infilling = requests[0].ending != ''
    if infilling and not checkpoint.get('infill_rate'):
        raise UserError(f'{init_from or out_dir} has not learned infilling: train it on data prepared with '
                        'data/tiny_stories/prepare.py --infill_rate 0.5, or continue a --start')
    limit, limited_by = token_limit(requests, model.config.block_size)

    try:
        if len(requests) == 1 and sys.stdout.isatty():
            n_cut = int(stream_story(model, tokenizer, requests[0], limit))
        else:
            n_cut = print_stories(model, tokenizer, requests, limit)
    except RuntimeError as error:
        if not compile or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        raise UserError(f'torch.compile failed ({type(error).__name__}): leave out --compile') from error
    if n_cut > 0:
        print(f'{n_cut} of {len(requests)} stories were cut at {limited_by}', file=sys.stderr)


def suggest_less_memory():
    return 'write fewer stories at once (--num_samples), or with --dtype bfloat16'


if __name__ == '__main__':
    configure(globals())
    run(main, suggest_less_memory)
