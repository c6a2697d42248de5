"""Write stories with a trained model; stdout has the stories alone, a line `---` between two.

    python sample.py --out_dir out-quickstart
    python sample.py --start "One day, a dog" --num_samples 10 --temperature 0.8 > stories.txt
    python sample.py --start FILE:prompts.txt --one_per_line --num_samples 1 --temperature 0
    python sample.py --out_dir out-infill --first_sentence "Tim lost his hat." --last_sentence "Tim was glad."
"""

import sys
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import SettingError, UserError, configure, in_range, one_of, printable, run, user_errors
from core.checkpoint import FILES, load_model
from core.device import DTYPES, choose_device, choose_dtype, configure_memory
from core.generate import generate_stories, generate_until
from core.quantize import to_int8
from data import infill
from formats.pretrained import load_with_tokenizer

out_dir = 'out-tiny-stories'  # folder of the checkpoint
ckpt = 'best'  # best (lowest validation loss) or last
init_from = ''  # a pretrained model instead: a Hugging Face folder, or llama2.c's .bin beside its tokenizer
start = ''  # how every story begins: text, or FILE:path
one_per_line = False  # each line of the start's file begins stories of its own, num_samples of them
first_sentence = ''  # of a story whose middle the model writes, if it has learned infilling
last_sentence = ''  # of that story
num_samples = 3  # stories, written side by side, as many as memory has room for
max_new_tokens = 1000  # longest continuation; most stories end before
min_new_tokens = 0  # a story that ends before is followed by another
temperature = 0.8  # below 1: likelier words; 0: always the likeliest
top_k = 0  # draw from the k likeliest tokens; 0: all
top_p = 0.95  # draw from the likeliest tokens that make up this probability; 1: all
seed = 1337  # same seed, same stories
device = 'auto'  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N or mps
dtype = 'float32'  # float32, bfloat16, float16, auto, or int8: on a CPU the fastest
compile = False  # compile the step from token to token, half a minute: on a GPU, for many stories


def check_settings():
    """Refuse what no sample can mean. Raises SettingError."""
    one_of(FILES, ckpt=ckpt)
    one_of(('auto', *DTYPES, 'int8'), dtype=dtype)
    in_range(at_least=1, at_most=10**8, num_samples=num_samples, max_new_tokens=max_new_tokens)
    in_range(at_least=1e-30 if temperature > 0 else 0, at_most=1e30, temperature=temperature)
    in_range(at_least=0, below=2**63, seed=seed)
    in_range(above=0, at_most=1, top_p=top_p)
    in_range(at_least=0, top_k=top_k, min_new_tokens=min_new_tokens)
    if min_new_tokens > max_new_tokens:
        raise SettingError(f'min_new_tokens is {min_new_tokens}, more than max_new_tokens, {max_new_tokens}')
    if last_sentence and min_new_tokens:
        raise SettingError('min_new_tokens is for whole stories, not for a middle: leave it out')
    if one_per_line and not start.startswith('FILE:'):
        raise SettingError('one_per_line is for the lines of a file: type --start FILE:path')
    if bool(first_sentence.strip()) != bool(last_sentence.strip()):
        raise SettingError('a middle needs both ends: type --first_sentence "..." and --last_sentence "..."')
    if first_sentence and start:
        raise SettingError('start and first_sentence are both given: leave out one')


def read_starts():
    """The texts that stories begin with."""
    if not start.startswith('FILE:'):
        return [start]
    with user_errors(start[5:], 'cannot be read as UTF-8 text'), open(start[5:], 'rb') as file:
        if len(data := file.read(10_000_001)) > 10_000_000:  # as of /dev/zero
            raise ValueError('more than 10,000,000 bytes')
        text = data.decode('utf-8-sig').replace('\r\n', '\n')
    lines = [line for line in text.split('\n') if line.strip()]
    if one_per_line and not lines:
        raise UserError(f'{start[5:]} has no line to begin a story with')
    return lines if one_per_line else [text]


def write_stories(model, tokenizer, begins, end, stream):
    """Yield the text of `num_samples` stories for each text of `begins`, each once it and those before it are
    whole; a lone one in growing parts, a line feed at its end, if `stream`. What was cut is told of on stderr
    after them. Stories end with the text `end`, if there is one: a middle is written in sight of both ends,
    so it stops where the context does; a plain story goes on without the sight of its beginning.
    """
    heads = [[tokenizer.delimiter, *tokenizer.encode(text)] for text in begins]
    heads = [head for head in heads for _ in range(num_samples)]
    prompts = [infill.prompt(tokenizer, begins[0], end)] * num_samples if end else heads
    longest, context = max(map(len, prompts)), model.config.block_size
    if longest > context:
        what = 'the two sentences have' if end else f'{"a" if len(begins) > 1 else "the"} start has'
        raise UserError(f'{what} {longest} tokens, more than the context of {context}; shorten them')
    cut, limit, limited_by = 0, max_new_tokens, f'--max_new_tokens {max_new_tokens}'
    if end and (room := context - longest + 1) < limit:  # the last token written need not be read
        limit, limited_by = room, f'the end of the context of {context} tokens'
    drawing = {'min_new_tokens': min_new_tokens, 'temperature': temperature, 'top_k': top_k, 'top_p': top_p,
               'suppress': (tokenizer.blank, tokenizer.middle), 'seed': seed, 'compile': compile}
    if stream:
        for (row,), _ in generate_until(model, prompts, tokenizer.delimiter, limit, **drawing):
            yield text_of(tokenizer, heads[0] + row)
        yield text_of(tokenizer, heads[0] + row, end) + '\n'
        cut += len(row) == limit
    else:
        rows = generate_stories(model, prompts, tokenizer.delimiter, limit, **drawing)
        for head, row in zip(heads, rows, strict=True):
            yield text_of(tokenizer, head + row, end)
            cut += len(row) == limit
    if cut:
        print(f'{cut} of {len(heads)} stories were cut at {limited_by}', file=sys.stderr)


def text_of(tokenizer, ids, end=''):
    """The text of ids that begin with a delimiter, a line `---` for each other one, and then `end`."""
    starts = [i for i, token in enumerate(ids) if token == tokenizer.delimiter]
    text = '\n---\n'.join(tokenizer.decode(ids[i:j]) for i, j in pairwise([*starts, len(ids)]))
    return text + (' ' if end and not text[-1:].isspace() else '') + end


def print_growing(texts):
    """Print a text as it grows."""
    shown = ''
    for text in texts:
        text = text.rstrip('\N{REPLACEMENT CHARACTER}')  # a character whose last bytes are still to come
        print(text[len(shown):], end='', flush=True)
        shown = text


def main():
    check_settings()
    torch_device = choose_device(device)
    if dtype == 'int8' and torch_device.type != 'cpu':
        raise SettingError(f'dtype int8 is for a CPU, not for {torch_device}: use bfloat16, or --device cpu')
    configure_memory(torch_device)
    checkpoint, tokenizer = load_with_tokenizer(init_from or Path(out_dir, FILES[ckpt]))
    model = load_model(checkpoint, torch_device)
    try:
        model = to_int8(model) if dtype == 'int8' else model.to(choose_dtype(dtype, torch_device))
    except ValueError as error:
        raise SettingError(str(error)) from None
    end = last_sentence.strip()
    begins = [first_sentence.strip()] if end else read_starts()
    if any(tokenizer.decode(tokenizer.encode(text)) != text for text in (*begins, end)):
        print('the tokenizer has nothing for some of these characters: they are left out', file=sys.stderr)
    if end and not checkpoint.get('infill_rate'):
        raise UserError(f'{init_from or out_dir} has not learned to write middles: train on data of '
                        'data/tiny_stories/prepare.py --infill_rate 0.5, or continue a --start')
    stream = num_samples * len(begins) == 1 and sys.stdout.isatty()
    stories = map(printable if sys.stdout.isatty() else str,
                  write_stories(model, tokenizer, begins, end, stream))
    try:
        if stream:
            print_growing(stories)
        else:
            for i, text in enumerate(stories):
                tqdm.write(('---\n' if i else '') + text)  # above the bar
    except RuntimeError as error:
        if not (compile and isinstance(error, torch._dynamo.exc.TorchDynamoException)):
            raise
        raise UserError(f'torch.compile failed ({type(error).__name__}): leave out --compile') from None


if __name__ == '__main__':
    configure(globals())
    run(main, 'write fewer stories at once (--num_samples), or with --dtype bfloat16')
