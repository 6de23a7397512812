"What is generated, mirrored or said twice agrees"
import ast, builtins, json, re, shutil, subprocess, sys
from configparser import ConfigParser
from distutils.core import run_setup
from functools import cache
from io import StringIO
from importlib import import_module
from itertools import chain
from pathlib import Path
from tokenize import COMMENT, generate_tokens
import pytest
from fastreid_nb._site import sidebar

root,lib = Path(__file__).parents[1],'fastreid_nb'

def read(name): return (root/name).read_text(encoding='utf-8')

def settings():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read_string(read('settings.ini'))
    return ini['DEFAULT']

def notebooks(): return sorted(p.name for p in (root/'nbs').glob('*.ipynb') if not p.name.startswith('_'))

@cache
def rooms():
    "Module such as `data.core` to the name of its notebook, in the order of the notebooks"
    found = {}
    for p in (root/lib).rglob('*.py'):
        m = re.search(r'File to edit: [./]+/nbs/(\S+)\.$', p.read_text(encoding='utf-8'), re.M)
        if m: found['.'.join(p.relative_to(root/lib).with_suffix('').parts)] = m[1]
    return dict(sorted(found.items(), key=lambda o: o[1]))

def module_file(room): return f'{lib}/{room.replace(".", "/")}.py'

@cache
def exported(room):
    "The names in `__all__` of a room, without importing it"
    return ast.literal_eval(re.search(r'^__all__ = (\[.*?\])$', read(module_file(room)), re.M|re.S)[1])

def test_there_are_rooms(): assert len(rooms())>=8

## Packaging

@pytest.mark.filterwarnings('error')
def test_setup_reads_settings(monkeypatch):
    "What pip sees comes from settings.ini; pyproject.toml repeats four values and names the rest as dynamic, or setuptools warns"
    monkeypatch.chdir(root)
    dist,ini = run_setup('setup.py', stop_after='config'),settings()
    meta = dist.metadata
    assert (meta.name, meta.description, meta.author, meta.license_expression)==tuple(map(ini.get, ('lib_name', 'description', 'author', 'license')))
    assert meta.project_urls=={'Repository':ini['git_url'], 'Documentation':ini['doc_url']}
    assert str(dist.python_requires)==f'>={ini["min_python"]}'
    assert list(map(str, dist.install_requires))==ini['requirements'].split()
    assert dist.entry_points['console_scripts']==ini['console_scripts'].split()

## What is generated

@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the repository, without what does not take part in generating"
    dst = tmp_path_factory.mktemp('repo')
    for p in root.iterdir():
        if p.is_file(): shutil.copy2(p, dst)
        elif p.name in ('nbs', lib, 'tools'): shutil.copytree(p, dst/p.name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
    return dst

def contents(path):
    fns = chain(*((path/o).rglob('*') for o in ('nbs', lib)))
    return {p.relative_to(path).as_posix():p.read_bytes().replace(b'\r\n', b'\n') for p in fns if p.is_file() and p.name!='.last_checked'}

# The next two are steps of .ci/run as well

@pytest.mark.slow
@pytest.mark.parametrize('cmd', ['nbdev-export', 'nbdev-clean'])
def test_in_sync(copy, cmd):
    "Exporting and cleaning change nothing"
    before = contents(copy)
    exe = shutil.which(cmd, path=Path(sys.executable).parent) or shutil.which(cmd)
    subprocess.run([exe], cwd=copy, check=True, capture_output=True)
    after = contents(copy)
    assert [k for k in before|after if before.get(k)!=after.get(k)]==[]

@pytest.mark.slow
def test_readme_is_index(copy):
    "README.md and its pictures are what tools/make_readme.py makes of index.ipynb"
    res = subprocess.run([sys.executable, 'tools/make_readme.py', '--check'], cwd=copy, capture_output=True, text=True)
    assert res.returncode==0, res.stderr

def test_sidebar_has_every_notebook():
    "Each notebook has its place in the docs"
    listed = [o.file for o in sidebar() if o.file.endswith('.ipynb')]
    assert listed[0]=='index.ipynb' and sorted(listed)==notebooks()

def outputs(name):
    cells = json.loads(read(f'nbs/{name}'))['cells']
    return [o for c in cells for o in c.get('outputs', [])]

@pytest.mark.parametrize('name', notebooks())
def test_stored_outputs(name):
    "Stored outputs are small and show nothing of the machine they were made on"
    outs = outputs(name)
    assert len(json.dumps(outs))<=300_000
    pictures = [o['data'].pop(k) for o in outs for k in ('image/png', 'image/jpeg') if k in o.get('data', {})]
    assert len(pictures)<=6
    assert re.findall(r'/home/\w+|/root/|/Users/\w+|[A-Z]:\\\\Users|site-packages|/tmp/\w+', json.dumps(outs))==[]

## README

def test_readme_python():
    "The first Python in the README is short and near the top"
    m = re.search(r'^```python\n(.*?)^```', read('README.md'), re.M|re.S)
    assert len(m[1].splitlines())<=12
    assert read('README.md')[:m.start()].count('\n')+1<30

def test_readme_commands():
    "The two lines that matter are in the README, and the workflow runs the second one as it stands there"
    lines = read('README.md').splitlines()
    test = 'pip install -e ".[dev]" && nbdev-test && pytest'
    assert lines.count('pip install . && reid demo')==1
    assert lines.count(test)==1
    assert f'run: {test}\n' in read('.github/workflows/test.yml')

@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links(name):
    "Local links and pictures exist"
    urls = re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', read(name))
    paths = [o.partition('#')[0] for o in chain(*urls) if o and not re.match(r'[a-z]+:|#', o)]
    assert [o for o in paths if not (root/o).exists()]==[]

## Rooms

def test_all_exports_everything():
    "`from fastreid_nb.all import *` brings every public name of every room, each from its own room"
    names = {}
    exec(f'from {lib}.all import *', names)
    missing = [f'{room}.{o}' for room in rooms() for o in exported(room) if o not in names]
    made = {k for k,o in names.items() if callable(o) and hasattr(o, 'row')} # readers that a function of another room made
    other = [f'{room}.{o}' for room in rooms() for o in exported(room) if o not in made
        and getattr(names.get(o), '__module__', '').startswith(lib) and names[o].__module__!=f'{lib}.{room}']
    assert (missing, other)==([], [])

## Docments

def is_property(node): return any('prop' in ast.unparse(o) or 'setter' in ast.unparse(o) for o in node.decorator_list)

def is_public(name, in_class): return not name.startswith('_') or in_class and name in ('__init__', '__new__')

def public_defs(tree, parent=''):
    "Name and node of every public function, method and constructor"
    for o in tree.body:
        if not isinstance(o, (ast.FunctionDef, ast.ClassDef)) or not is_public(o.name, parent): continue
        if isinstance(o, ast.ClassDef): yield from public_defs(o, f'{o.name}.')
        elif not is_property(o): yield f'{parent}{o.name}',o

def is_override(room, name):
    "Is `name` a method that a base class has or, in a callback, calls? It is documented there"
    cls,_,method = name.partition('.')
    if not method or method in ('__init__', '__new__', 'forward'): return False
    bases = getattr(import_module(f'{lib}.{room}'), cls).__mro__[1:]
    return method.startswith(('before_', 'after_')) or any(hasattr(o, method) for o in bases)

def patched_class(node):
    "The class that a function is patched into, or `None`"
    if not any('patch' in ast.unparse(o) for o in node.decorator_list): return None
    return ast.unparse(node.args.args[0].annotation)

def private_classes(tree, public): return {o.name for o in tree.body if isinstance(o, ast.ClassDef)} - {*public}

def own_defs(room):
    "The public functions and methods of a room, which must explain themselves; helpers of `#| exporti` cells need not"
    tree,public = source(room)[0],exported(room)
    helpers = {o.name for o in tree.body if hasattr(o, 'name') and o.name not in public and patched_class(o) in (None, *private_classes(tree, public))}
    found = [(name,node) for name,node in public_defs(tree) if name.split('.')[0] not in helpers]
    return [(name,node) for name,node in found if not is_override(room, name)]

def arguments(node):
    "The arguments that need a comment: not `self`, nor keywords that `@delegates` documents elsewhere"
    a = node.args
    delegated = any('delegates' in ast.unparse(o) for o in node.decorator_list)
    args = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *([a.kwarg] if a.kwarg and not delegated else [])]
    return [o for o in args if o.arg not in ('self', 'cls')]

def undocumented(name, node, comments):
    "Arguments of `node`, and what it makes of them, without a comment of their own"
    owner = {o.lineno:o.arg for o in arguments(node)}
    if owner and node.returns and ast.unparse(node.returns)!='None': owner[node.returns.end_lineno] = 'return'
    commented = {v for k,v in owner.items() if k in comments}
    return [f'{name}: {o}' for o in {o.arg:None for o in arguments(node)} | dict.fromkeys(owner.values()) if o not in commented]

@cache
def source(room):
    "Tree and comments (line to text) of a module"
    text = read(module_file(room))
    return ast.parse(text),{t.start[0]:t.string for t in generate_tokens(StringIO(text).readline) if t.type==COMMENT}

@pytest.mark.parametrize('room', rooms())
def test_docments_are_complete(room):
    "Every public function has a docstring, and a comment for each argument and for what it returns"
    comments = source(room)[1]
    bad = [o for name,node in own_defs(room) for o in undocumented(name, node, comments)]
    bad += [f'{name}: docstring' for name,node in own_defs(room) if not name.endswith(('__', '.forward')) and not ast.get_docstring(node)]
    assert not bad, '\n'.join(bad)

def docs(node):
    "All docstrings in a piece of code"
    return [o for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) if (o := ast.get_docstring(n, clean=False))]

def names_in(node):
    "Names, arguments, attributes and words in strings that occur in a piece of code, docstrings aside"
    nodes = list(ast.walk(node))
    texts = {o.value for o in nodes if isinstance(o, ast.Constant) and isinstance(o.value, str)} - set(docs(node))
    found = {getattr(o, k, None) for o in nodes for k in ('id', 'arg', 'attr', 'name', 'asname')}
    return found | set(re.findall(r'\w+', ' '.join(texts)))

def said(node, comments):
    "Words in backticks in the docstring of a definition and in the comments on its arguments"
    text = [*docs(node)[:1], *(comments.get(o.lineno, '') for o in arguments(node))]
    return re.findall(r'`([A-Za-z]\w*)`', ' '.join(text))

def shared_names(tree):
    "What every function of a module may speak of: its attributes and what it defines or imports at the top"
    top = [o for o in tree.body if not isinstance(o, ast.FunctionDef)]
    attrs = {o.attr for o in ast.walk(tree) if isinstance(o, ast.Attribute)}
    return attrs | {o.name for o in tree.body if isinstance(o, ast.FunctionDef)} | set().union(*map(names_in, top))

@cache
def known():
    "What every docstring may speak of"
    words = {'path', 'pid', 'camid', 'dsetid', *chain(*(o.split('.') for o in rooms())), *dir(builtins)}
    return words.union(*map(exported, rooms()), *(shared_names(source(o)[0]) for o in rooms()))

@pytest.mark.parametrize('room', rooms())
def test_docments_match_code(room):
    "A word in backticks is an argument or name in the code it describes, a public name of a room, a column, or Python's own"
    tree,comments = source(room)
    bad = [f'{name}: `{o}`' for name,node in public_defs(tree) for o in said(node, comments) if o not in known() and o not in names_in(node)]
    assert not bad, '\n'.join(bad)
