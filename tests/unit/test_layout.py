"""The layout: what lies where, which module may import which, and what pyproject.toml promises."""

import ast
import importlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from configurator import declarations, settings
from tests.helpers.scripts import ROOT

SCRIPTS = ['train.py', 'sample.py', 'export.py', 'tools/report.py', 'tools/bench.py', 'tools/gpu_check.py',
           'data/tiny_stories/prepare.py', 'data/token_files/prepare.py']
FOLDERS = ['core', 'data', 'formats', 'tools', 'cloud']
# Each layer may import itself and the layers before it.
LAYERS = ['model and configurator', 'data', 'core', 'formats', 'scripts and tools']


def python_files():
    """Return the modules as {'core.device': Path}, without the recipes in config/ and the tests."""
    paths = list(ROOT.glob('*.py'))
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob('*.py')
    modules = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix('').parts
        if parts[-1] == '__init__':
            parts = parts[:-1]
        modules['.'.join(parts)] = path
    return modules


MODULES = python_files()


def imports_of(path):
    """Return the full names that a file imports anywhere, also inside functions.

    `from core import device` gives 'core' and 'core.device'; `from core.device import to_device` gives
    'core.device' and 'core.device.to_device', which is not a module.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} has a relative import'
            names.add(node.module)
            names |= {f'{node.module}.{alias.name}' for alias in node.names}
    return names


def our_imports(name):
    """Return the modules of this repository that module `name` imports, without empty packages."""
    packages = {module for module, path in MODULES.items() if path.name == '__init__.py'}
    return sorted((imports_of(MODULES[name]) & set(MODULES)) - packages)


def layer_of(name):
    """Return the index in LAYERS of a module."""
    if name in ('model', 'configurator'):
        return 0
    is_script = MODULES[name].relative_to(ROOT).as_posix() in SCRIPTS
    if is_script or name.split('.')[0] in ('tools', 'cloud'):
        return 4
    return LAYERS.index(name.split('.')[0])


# what lies where -----------------------------------------------------------------

def test_root_holds_the_five_modules_alone():
    python = {path.name for path in ROOT.glob('*.py')}
    assert python == {'model.py', 'train.py', 'sample.py', 'export.py', 'configurator.py'}
    assert not list(ROOT.glob('*.html'))
    assert not (ROOT / 'logs').exists()


def test_every_folder_of_modules_is_a_package():
    for path in [*MODULES.values(), *(ROOT / 'tests').rglob('*.py')]:
        if path.parent != ROOT:
            assert (path.parent / '__init__.py').is_file(), f'{path.parent} has no __init__.py'


def test_packages_are_empty():
    for name, path in MODULES.items():
        if path.name == '__init__.py':
            assert not ast.parse(path.read_text()).body, f'{name} has code in its __init__.py'


# imports -------------------------------------------------------------------------

@pytest.mark.parametrize('name', sorted(MODULES))
def test_imports_point_down(name):
    for imported in our_imports(name):
        upper, lower = LAYERS[layer_of(name)], LAYERS[layer_of(imported)]
        assert layer_of(imported) <= layer_of(name), f'{name} ({upper}) imports {imported} ({lower})'


def test_scripts_do_not_import_each_other():
    scripts = {name for name, path in MODULES.items() if path.relative_to(ROOT).as_posix() in SCRIPTS}
    assert len(scripts) == len(SCRIPTS)
    for name in MODULES:
        assert not scripts & set(our_imports(name)), f'{name} imports a script'


def test_imports_have_no_circles():
    finished = set()

    def visit(name, path):
        assert name not in path, ' -> '.join([*path, name])
        if name not in finished:
            for imported in our_imports(name):
                visit(imported, [*path, name])
            finished.add(name)

    for name in MODULES:
        visit(name, [])
    assert finished == set(MODULES)


def test_model_imports_torch_alone():
    packages = {name.split('.')[0] for name in imports_of(ROOT / 'model.py')}
    assert packages - set(sys.stdlib_module_names) == {'torch'}


def test_data_does_not_import_torch():
    """Importing each module of data/ leaves torch out, so that prepare.py starts quickly."""
    names = [name for name in MODULES if name.split('.')[0] == 'data']
    code = f"import sys\nimport {', '.join(names)}\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tests_do_not_import_each_other():
    for path in (ROOT / 'tests').rglob('*.py'):
        others = [name for name in imports_of(path) if name.split('.')[0] == 'tests' and '.test_' in name]
        assert not others, f'{path} imports {others[0]}'


# scripts -------------------------------------------------------------------------

DEFINITIONS = ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.ClassDef


def called(statement):
    """Return the name of the function that a statement calls, such as 'sys.path.insert', or ''."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return ast.unparse(statement.value.func)
    return ''


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_end_in_configure_and_run(script):
    last = ast.parse((ROOT / script).read_text(encoding='utf-8')).body[-1]
    assert isinstance(last, ast.If), f'{script} does not end in an if'
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    configure, run = last.body
    assert (called(configure), called(run)) == ('configure', 'run')
    assert ast.unparse(configure.value.args[0]) == 'globals()'


@pytest.mark.parametrize('script', SCRIPTS)
def test_settings_have_lower_case_names_and_a_comment(script):
    """A constant in capitals would become a flag: its name must begin with an underscore."""
    module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
    comments = declarations(str(ROOT / script))
    for name in settings(vars(module)):
        assert name.islower(), f'{script}: {name} is taken for a setting'
        assert comments[name], f'{script}: {name} has no comment'


@pytest.mark.parametrize('name', sorted(set(MODULES) - {'cloud.modal_app'}))  # Modal's own way of starting
def test_nothing_happens_on_import(name):
    """A module only imports, assigns and defines. A script may extend sys.path, to find the root."""
    path = MODULES[name]
    for i, statement in enumerate(ast.parse(path.read_text(encoding='utf-8')).body):
        where = f'{path}, line {statement.lineno}'
        if isinstance(statement, ast.If):
            assert ast.unparse(statement.test) == "__name__ == '__main__'", where
        elif isinstance(statement, ast.Expr):
            is_docstring = i == 0 and isinstance(statement.value, ast.Constant)
            assert is_docstring or called(statement) == 'sys.path.insert', where
        else:
            assert isinstance(statement, DEFINITIONS), where


# packages to install --------------------------------------------------------------

def requirements(name):
    """Return the `specifiers` of a requirements file, without those of the files that it includes."""
    lines = [line.split(' #')[0].strip() for line in (ROOT / name).read_text(encoding='utf-8').splitlines()]
    return specifiers(line for line in lines if line and not line.startswith(('#', '-r')))


def specifiers(lines):
    """Return {package, with its marker if it has one: specifier} of lines such as 'torch==2.13.0'."""
    found = {}
    for requirement in map(Requirement, lines):
        name = f'{requirement.name}; {requirement.marker}' if requirement.marker else requirement.name
        found[name] = requirement.specifier
    return found


@pytest.mark.parametrize('file, extra', [
    ('requirements.txt', ''), ('requirements-export.txt', 'export'), ('requirements-dev.txt', 'dev')])
def test_pyproject_agrees_with_requirements(file, extra):
    """The same packages; what the file pins lies in the range of pyproject.toml."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    listed = project['optional-dependencies'][extra] if extra else project['dependencies']
    ranges = specifiers(listed)
    pinned = requirements(file)
    assert set(ranges) == set(pinned)
    for package, pins in pinned.items():
        for specifier in pins:
            assert specifier.operator == '=='
            assert ranges[package].contains(specifier.version), package


def test_pyproject_takes_the_torch_versions_that_we_promise():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    ranges = specifiers(project['dependencies'])
    elsewhere = ranges['torch; sys_platform != "darwin"']
    for version in '2.9.0', '2.9.1', '2.11.0+cu130', '2.13.0+cpu', '2.15.0':
        assert elsewhere.contains(Version(version)), version
    assert not elsewhere.contains(Version('2.8.0'))
    on_macs = ranges['torch; sys_platform == "darwin"']
    assert on_macs.contains(Version('2.14.0')) and not on_macs.contains(Version('2.13.0'))


def test_workflow_runs_the_pythons_that_pyproject_allows():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    workflow = (ROOT / '.github/workflows/test.yml').read_text(encoding='utf-8')
    assert project['requires-python'] == '>=3.11'
    assert "python: ['3.11', '3.12', '3.13', '3.14']" in workflow
    assert '.ci/run' in workflow
