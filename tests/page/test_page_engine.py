"""The page's engine under Node against torch: every block, what it draws, how it goes on; and its kernel."""

import base64
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from core.generate import generate
from formats import base
from formats.page.page import PARTS, packed, round_weights
from tests.helpers.models import CASES, small_model
from tests.helpers.node import evaluate, needs_node

# A model as makeModel takes it, with the kernel or, as in a browser without SIMD, without one.
MODEL = """(() => {
    const bytes = text => new Uint8Array(Buffer.from(text, 'base64'));
    return makeModel(data.config, data.tensors, bytes(data.weights), bytes(data.kernel));
})()"""


def ask(expression, model, simd=True, **more):
    """The value of a JavaScript expression in which `model` is the page's own of a GPT."""
    weights = base.own_weights({'config': asdict(model.config), 'model': model.state_dict()})
    text = base64.b64encode(b''.join(map(packed, weights.values()))).decode()
    kernel = base64.b64encode((PARTS / 'kernel.wasm').read_bytes()).decode() if simd else ''
    data = {'config': asdict(model.config), 'tensors': [(name, [*w.shape]) for name, w in weights.items()],
            'weights': text, 'kernel': kernel} | more
    return evaluate(f'(model => {expression})({MODEL})', data, ['engine.js'])


@needs_node
@pytest.mark.parametrize('simd', [True, False])
@pytest.mark.parametrize('choices', [*CASES, {'n_embd': 36, 'n_head': 6, 'mlp_width': 21, 'vocab_size': 30}],
                         ids=str)
def test_logits_are_those_of_torch_with_rounded_weights(choices, simd):
    model = round_weights(small_model(**choices))
    ids = torch.randint(0, 23, (16,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None])[0]
    logits = ask('[model.simd, data.ids.map((id, t) => Array.from(model.forward(id, t)))]', model, simd,
                 ids=ids.tolist())
    assert logits[0] == simd
    assert (torch.tensor(logits[1]) - expected).norm() < 2e-4 * expected.norm()  # 15 bits in place of 32


def written(model, **settings):
    asked = {'suppress': [], 'temperature': 1, 'topP': 1, 'seed': 0, 'length': 1} | settings
    return ask('Array.from(model.write([3, 5], data.asked)).filter(Boolean)', model, asked=asked)


@needs_node
def test_a_full_context_goes_on_as_generate_does():
    model = round_weights(small_model())
    expected = torch.cat([*generate(model, torch.tensor([[3, 5]]), 60, temperature=0)]).tolist()
    assert [drawn['id'] for drawn in written(model, temperature=0, length=60)] == expected


@needs_node
@pytest.mark.parametrize('temperature, top_p', [(1.0, 1.0), (0.7, 0.8), (2.0, 0.3)])
def test_tokens_are_drawn_by_their_probabilities(temperature, top_p):
    """4,000 first tokens, each of another seed, beside the shares of those in the smallest set."""
    model = round_weights(small_model())
    with torch.no_grad():
        logits = model(torch.tensor([[3, 5]]))[0, -1]
    logits[[1, 4]] = -torch.inf
    shares, order = (logits / temperature).softmax(-1).sort(descending=True)
    shares[shares.cumsum(-1) - shares >= top_p] = 0
    expected = torch.zeros(23).scatter(0, order, shares / shares.sum())
    drawn = ask("""Array.from({length: 4000}, (_, seed) =>
        Array.from(model.write([3, 5], {...data.asked, seed})).at(-1))""", model, asked={
        'suppress': [1, 4], 'temperature': temperature, 'topP': top_p, 'length': 1})
    counts = Counter(one['id'] for one in drawn)
    assert {*counts} <= {*expected.nonzero()[:, 0].tolist()}
    seen = torch.tensor([counts[id] for id in range(23)]) / 4000
    assert (seen - expected).abs().sum() < 0.1  # chance alone makes 0.05
    # and what is shown of them: shares of all at temperature 1, the likeliest others first
    plain = logits.softmax(-1)
    for one in drawn[:50]:
        assert one['p'] == pytest.approx(plain[one['id']].item(), rel=0.01)
        ids, found = zip(*one['others'], strict=True)
        likeliest = [i for i in plain.argsort(descending=True).tolist() if i != one['id']][:4]
        assert [*ids] == likeliest and found == pytest.approx(plain[likeliest].tolist(), rel=0.01)


@needs_node
def test_the_same_seed_writes_the_same_and_no_other_does():
    first, again, other, far = (written(small_model(), seed=seed, length=30) for seed in (7, 7, 8, 7 + 2**32))
    assert first == again and first not in (other, far)


@needs_node
def test_a_ruined_model_says_so():
    model = small_model()
    model.norm.weight.data[0] = torch.nan
    caught = ask("""(() => {
        try {
            Array.from(model.write([3], {suppress: [], length: 1}));
        } catch (error) {
            return error.message;
        }
    })()""", model)
    assert caught == 'The model predicts no numbers: its weights are ruined.'


def test_the_kernel_is_what_its_text_says():
    wasmtime = pytest.importorskip('wasmtime')
    assembled = bytes(wasmtime.wat2wasm((PARTS / 'kernel.wat').read_text()))
    assert assembled == (PARTS / 'kernel.wasm').read_bytes()
