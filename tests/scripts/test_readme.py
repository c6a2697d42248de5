"""What the README and docs/ say: commands, links, recipes and messages; and the quickstart as typed."""

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from configurator import configure, settings
from model import GPT, GPTConfig
from tests.helpers.scripts import ROOT

DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / 'docs').rglob('*.md'))]
PAGES = ['README.md', 'CONTRIBUTING.md', *DOCS]
NOTEBOOK = 'docs/story_infilling.ipynb'


def read(page):
    """Return a page's text; of a notebook, that of its markdown cells."""
    text = (ROOT / page).read_text(encoding='utf-8')
    if not page.endswith('.ipynb'):
        return text
    cells = json.loads(text)['cells']
    return '\n\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')


# commands ------------------------------------------------------------------------

def code_blocks(text, language):
    """Return the contents of the fenced blocks in a language; '' is a block that names none."""
    fenced = re.findall(r'^```(\w*)\n(.*?)^```', text, re.M | re.S)
    return [block for name, block in fenced if name == language]


def shell_lines(text):
    """Return the lines that a reader may type: ```sh blocks, indented lines, and `python ...` in a sentence.

    A line that ends in && or a backslash continues in the next one.
    """
    blocks = code_blocks(text, 'sh')
    blocks += re.findall(r'^ {4}(python .*)$', text, re.M)
    blocks += [code.replace('\n', ' ') for code in re.findall(r'`(python [^`]+)`', text)]
    lines = []
    for block in blocks:
        joined = block.replace('\\\n', ' ').replace('&&\n', '&& ')
        lines += joined.splitlines()
    return lines


def script_calls(line):
    """Return [(script, its words)] for the scripts of this repository that a shell line calls.

    `torchrun ... train.py x` calls train.py with x, and so does `sbatch ... cloud/slurm.sh x`.
    """
    commands = [[]]
    for word in shlex.split(line, comments=True):
        if word == '&&':
            commands.append([])
        else:
            commands[-1].append(word)
    calls = []
    for words in commands:
        if '>' in words:
            words = words[:words.index('>')]
        while words and re.match(r'[A-Z_]+=', words[0]):  # a variable of the environment
            words = words[1:]
        if words[:1] == ['python'] and words[1] != '-m':
            calls.append((words[1], words[2:]))
        elif words[:1] == ['torchrun'] and 'train.py' in words:
            calls.append(('train.py', words[words.index('train.py') + 1:]))
        elif words[:1] == ['sbatch']:
            assert 'cloud/slurm.sh' in words
            calls.append(('train.py', words[words.index('cloud/slurm.sh') + 1:]))
    return calls


def all_calls():
    """Return [(page, 'script --flag value ...')] of all pages."""
    found = []
    for page in PAGES:
        for line in shell_lines(read(page)):
            if '$' not in line:  # a loop of docs/lab
                found += [(page, shlex.join([script, *words])) for script, words in script_calls(line)]
    return found


CALLS = all_calls()


def test_pages_have_commands():
    """A wrong pattern above must not leave the next test without cases."""
    scripts = {'data/tiny_stories/prepare.py', 'train.py', 'sample.py', 'export.py', 'tools/report.py',
               'tools/bench.py', 'tests/hostile/kill_1000.py'}
    assert scripts <= {call.split()[0] for page, call in CALLS if page == 'README.md'}
    assert len(CALLS) > 50


@pytest.mark.parametrize('page, call', CALLS)
def test_commands_name_files_and_settings_that_exist(page, call, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *words = shlex.split(call)
    assert os.path.isfile(script), f'{page}: {script}'
    module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
    if words != ['--help']:
        configure(dict(vars(module)), words)  # prints what is wrong and raises SystemExit


def test_quickstart_writes_stories(tmp_path):
    """The first block of the README, without pip and with few steps, in a copy of the scripts."""
    block = code_blocks(read('README.md'), 'sh')[0]
    shorter = {r'pip install .*&&\n': '', '--source sample': '--source sample --data_percentage 5',
               'config/quickstart.py': 'config/quickstart.py --max_iters 3',
               '--out_dir out-quickstart': '--out_dir out-quickstart --max_new_tokens 40'}
    for old, new in shorter.items():
        block, count = re.subn(old, new, block)
        assert count == 1, old
    for path in ROOT.glob('*.py'):
        shutil.copy(path, tmp_path)
    for folder in 'config', 'core', 'data', 'formats':
        prepared = shutil.ignore_patterns('__pycache__', '*.bin', 'meta.json', 'tokenizer.model')
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=prepared)
    python = tmp_path / 'bin' / 'python'
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {'PATH': f'{python.parent}:{os.environ["PATH"]}', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(['bash', '-c', block], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out-quickstart' / 'best.pt').is_file()
    stories = done.stdout.split('epochs\n', 1)[1].split('\n---\n')  # after train.py's first line
    assert len(stories) == 3
    assert all(len(story.split()) > 5 for story in stories)


# links ---------------------------------------------------------------------------

def anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them: '## A run' gives 'a-run'."""
    headings = re.findall(r'^#+ (.*)$', read(page), re.M)
    return [re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings]


@pytest.mark.parametrize('page', [*PAGES, NOTEBOOK])
def test_links_and_images_exist(page):
    text = read(page)
    for link in re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if link.startswith('https://'):
            continue
        path, _, anchor = link.partition('#')
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f'{page} links to {link}'
        if anchor:
            assert anchor in anchors(os.path.relpath(target, ROOT)), f'{page} links to {link}'


def our_code():
    """Return the paths of the scripts and of the modules that they use."""
    paths = list(ROOT.glob('*.py'))
    for folder in 'core', 'data', 'formats', 'tools':
        paths += (ROOT / folder).rglob('*.py')
    return paths


def test_contributing_lists_the_modules():
    tree = code_blocks(read('CONTRIBUTING.md'), '')[0]
    listed = set(re.findall(r'\w+\.py', tree))
    assert listed <= {path.name for path in our_code()}
    for folder in 'core', 'data':
        modules = {path.name for path in (ROOT / folder).glob('*.py')} - {'__init__.py'}
        assert modules <= listed, f'CONTRIBUTING.md does not list {modules - listed}'


# recipes -------------------------------------------------------------------------

def recipes():
    """Return {config: [(parameters, vocabulary size)]} of the first table in docs/recipes.md."""
    table = read('docs/recipes.md').split('\n## ')[0]
    rows = re.findall(r'^\| `(\w+\.(?:py|json))` \|.*\| (.*?) \|$', table, re.M)
    found = {}
    for config, sizes in rows:
        pairs = re.findall(r'([\d.]+[KM]) at ([\d,]+) tokens', sizes)
        assert pairs, config
        found[config] = [(size, int(tokens.replace(',', ''))) for size, tokens in pairs]
    return found


def test_recipes_lists_all_configs():
    configs = {path.name for path in (ROOT / 'config').iterdir() if path.suffix in ('.py', '.json')}
    assert set(recipes()) == configs


@pytest.mark.parametrize('config', recipes())
def test_recipes_have_as_many_parameters_as_they_say(config):
    import train

    chosen = dict(vars(train))
    configure(chosen, [str(ROOT / 'config' / config)])
    names = {field.name for field in fields(GPTConfig)}
    shape = {name: value for name, value in settings(chosen).items() if name in names}
    for size, vocab_size in recipes()[config]:
        with torch.device('meta'):
            n = GPT(GPTConfig(vocab_size=vocab_size, **shape)).n_params()
        unit = {'K': 1e3, 'M': 1e6}[size[-1]]
        assert n / unit == pytest.approx(float(size[:-1]), rel=0.01)


# messages ------------------------------------------------------------------------

def messages_of(path):
    """Return the strings in a file, with '...' for what an f-string inserts."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else '...' for part in node.values]
            texts.append(''.join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_trouble_quotes_real_messages():
    """Each part of a quoted message, between two '...', stands in a string of the code."""
    texts = '\n'.join(text for path in our_code() for text in messages_of(path))
    problems = re.findall(r'^\| (.*?) \| ', read('docs/trouble.md'), re.M)[2:]
    assert len(problems) > 10
    parts = [part.strip() for quoted in re.findall(r'`([^`]+)`', '\n'.join(problems))
             for part in quoted.split('...')]
    assert [part for part in parts if part not in texts] == []
