"""The page's engine under Node against torch: logits of every block, sampling, long stories, the kernel."""

import base64
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from core.generate import generate
from core.native import round_weights
from formats import base
from formats.page.page import FOLDER, weight_bytes
from tests.helpers.models import CASES, small_model
from tests.helpers.node import needs_node, run_js

# makes the model of `data`
MODEL = """(() => {
    const bytes = text => new Uint8Array(Buffer.from(text, 'base64'));
    return makeModel(data.config, data.tensors, bytes(data.weights), bytes(data.kernel));
})()"""
UNEVEN = {'n_embd': 36, 'n_head': 6, 'mlp_width': 21, 'vocab_size': 30}  # no multiples of what a kernel takes


def ask(expression, model, simd=True, **more):
    """Return the value of a JavaScript expression in which `model` is the engine's copy of a GPT.

    simd=False: as in a browser without SIMD. more: entries of `data`.
    """
    weights = base.own_weights({'config': asdict(model.config), 'model': model.state_dict()})
    packed = b''.join(weight_bytes(w) for w in weights.values())
    kernel = (FOLDER / 'kernel.wasm').read_bytes() if simd else b''
    data = {
        'config': asdict(model.config),
        'tensors': [(name, list(w.shape)) for name, w in weights.items()],
        'weights': base64.b64encode(packed).decode(),
        'kernel': base64.b64encode(kernel).decode(),
    }
    return run_js(f'(model => {expression})({MODEL})', data | more, ['engine.js'])


def write(model, **settings):
    """Return what the engine writes after the ids 3 and 5."""
    defaults = {'suppress': [], 'temperature': 1, 'topP': 1, 'seed': 0, 'length': 1}
    return ask('Array.from(model.write([3, 5], data.settings)).filter(Boolean)', model,
               settings=defaults | settings)


@needs_node
@pytest.mark.parametrize('simd', [True, False])
@pytest.mark.parametrize('choices', [*CASES, UNEVEN], ids=str)
def test_logits_are_those_of_torch_with_rounded_weights(choices, simd):
    model = round_weights(small_model(**choices))
    ids = torch.randint(0, 23, (16,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids[None])[0]
    uses_simd, logits = ask('[model.simd, data.ids.map((id, t) => Array.from(model.forward(id, t)))]', model,
                            simd, ids=ids.tolist())
    assert uses_simd == simd
    error = (torch.tensor(logits) - expected).norm() / expected.norm()
    assert error < 2e-4  # activations have 15 bits


@needs_node
def test_write_continues_in_a_full_context_as_generate_does():
    model = round_weights(small_model())
    expected = torch.cat(list(generate(model, torch.tensor([[3, 5]]), 60, temperature=0))).tolist()
    assert [drawn['id'] for drawn in write(model, temperature=0, length=60)] == expected


def nucleus(logits, temperature, top_p):
    """Return the probabilities with which top-p samples, by definition."""
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return torch.zeros_like(p).scatter(0, order, p / p.sum())


@needs_node
@pytest.mark.parametrize('temperature, top_p', [(1.0, 1.0), (0.7, 0.8), (2.0, 0.3)])
def test_write_samples_tokens_by_their_probabilities(temperature, top_p):
    """4,000 first tokens with 4,000 seeds."""
    model = round_weights(small_model())
    with torch.no_grad():
        logits = model(torch.tensor([[3, 5]]))[0, -1]
    logits[[1, 4]] = -torch.inf
    expected = nucleus(logits, temperature, top_p)
    settings = {'suppress': [1, 4], 'temperature': temperature, 'topP': top_p, 'length': 1}
    drawn = ask("""Array.from({length: 4000}, (_, seed) =>
        Array.from(model.write([3, 5], {...data.settings, seed})).at(-1))""", model, settings=settings)
    counts = Counter(one['id'] for one in drawn)
    assert all(expected[i] > 0 for i in counts)
    found = torch.tensor([counts[i] for i in range(23)]) / 4000
    assert (found - expected).abs().sum() < 0.1  # chance alone makes 0.05


@needs_node
def test_write_reports_probabilities_at_temperature_1_and_the_likeliest_others():
    model = round_weights(small_model())
    with torch.no_grad():
        p = model(torch.tensor([[3, 5]]))[0, -1].softmax(-1)
    for seed in range(9):
        [drawn] = write(model, temperature=2, seed=seed)
        assert drawn['p'] == pytest.approx(p[drawn['id']].item(), rel=0.01)
        others = [i for i in p.argsort(descending=True).tolist() if i != drawn['id']][:4]
        assert [i for i, _ in drawn['others']] == others
        assert [share for _, share in drawn['others']] == pytest.approx(p[others].tolist(), rel=0.01)


@needs_node
def test_write_repeats_itself_with_the_same_seed_only():
    first, again, other, far = (write(small_model(), seed=seed, length=30) for seed in (7, 7, 8, 7 + 2**32))
    assert first == again
    assert first not in (other, far)


@needs_node
def test_write_rejects_weights_that_are_not_finite():
    model = small_model()
    model.norm.weight.data[0] = torch.nan
    message = ask("""(() => {
        try {
            Array.from(model.write([3], {suppress: [], length: 1}));
        } catch (error) {
            return error.message;
        }
    })()""", model)
    assert message == 'The predictions are not numbers: the weights are broken.'


@needs_node
def test_make_model_rejects_weights_of_another_size():
    message = ask("""(() => {
        try {
            makeModel(data.config, data.tensors.slice(1), new Uint8Array(999999), new Uint8Array());
        } catch (error) {
            return error.message;
        }
    })()""", small_model())
    assert message.startswith('The model has 999999 bytes instead of ')


def test_kernel_wasm_is_what_kernel_wat_compiles_to():
    wasmtime = pytest.importorskip('wasmtime')
    compiled = bytes(wasmtime.wat2wasm((FOLDER / 'kernel.wat').read_text()))
    assert compiled == (FOLDER / 'kernel.wasm').read_bytes()
