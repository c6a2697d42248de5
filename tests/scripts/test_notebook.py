"""The notebook of docs/ runs from top to bottom, and what it shows is of such a run."""

import json
import re

from tests.helpers import scripts as tiny


def test_the_notebook(tmp_path, monkeypatch):
    notebook = json.loads((tiny.ROOT / 'docs/story_infilling.ipynb').read_text(encoding='utf-8'))
    cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum('image/png' in output.get('data', {}) for cell in cells for output in cell['outputs']) == 3
    monkeypatch.setenv('MPLBACKEND', 'Agg')
    monkeypatch.chdir(tiny.ROOT)
    space = {'__name__': '__main__'}
    for cell in cells:
        source = ''.join(cell['source'])
        for setting, value in (('WORK', f'Path({str(tmp_path)!r})'), ('PERCENTAGE', 10), ('MAX_ITERS', 4),
                               ('NUM_SAMPLES', 2)):
            source = re.sub(f'(?m)^{setting} = .*$', f'{setting} = {value}', source)
        exec(source, space)
        space['script'] = tiny.script  # as its own does, in a process forked from one with all imports
    assert (tmp_path / 'run/best.pt').is_file()
