"""The notebook in docs/ runs from top to bottom, and the outputs it shows come from such a run."""

import json
import re
from functools import partial

from tests.helpers.scripts import ROOT, script

NOTEBOOK = ROOT / 'docs/story_infilling.ipynb'


def code_cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def test_notebook_shows_one_run():
    """Its cells were executed once, in their order, and show three pictures."""
    cells = code_cells()
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell['outputs']]
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 3


def test_notebook_runs(tmp_path, monkeypatch):
    """Run its cells with little data and few steps."""
    shorter = {'WORK': f'Path({str(tmp_path)!r})', 'PERCENTAGE': 5, 'MAX_ITERS': 4, 'NUM_SAMPLES': 2}
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    monkeypatch.chdir(ROOT)
    namespace = {'__name__': '__main__'}
    for cell in code_cells():
        source = ''.join(cell['source'])
        for setting, value in shorter.items():
            source = re.sub(f'(?m)^{setting} = .*$', f'{setting} = {value}', source)
        exec(source, namespace)
        # start scripts as the notebook's own function does, but from a process that has imported torch
        namespace['script'] = partial(script, DRAW='1')
    assert (tmp_path / 'run/best.pt').is_file()
