"The rules of the house: each finds a planted fault, says nothing about a good house, and ours is good"
import json, re, shutil, subprocess, sys
from pathlib import Path
import check_house, pytest
from check_house import House, all_names, intro_line, next_cell, rules, wanted_next, write_intro, write_next
from fastcore.nbio import mk_cell, new_nb, read_nb, write_nb

root,lib = Path(__file__).parents[1],'fastreid_nb'
by_name = {o.__name__:o for o in rules}

def notebook(module, name, intro, imports='import re'):
    "Cells of a small notebook that makes and shows one function; prose begins with #, * or >"
    return [f'#| default_exp {module}', f'# {name}\n\n> Numbers', f'{intro}\n\nWhy so.', f'#| export\n{imports}',
        f'> `{name}` gives back what it gets:', f'#| export\ndef {name}(x): return x', f'{name}(1)']

def good_notebooks():
    return {
        '00_data': notebook('data.core', 'read', '**Builds on** nothing. **Used by** `00a_data.toy`, `01_augment`.'),
        '00a_data.toy': notebook('data.toy', 'draw', '**Builds on** `00_data`. **Used by** your own code.',
            f'from {lib}.data import core as data'),
        '01_augment': notebook('augment.core', 'flip', '**Builds on** `00_data`. **Used by** your own code.',
            f'from {lib}.data.core import read'),
        'index': [f'from {lib}.all import *', '# House']}

def as_cell(text):
    is_prose = text[:2] in ('# ', '**', '> ')
    return mk_cell(text, 'markdown' if is_prose else 'code')

def module_text(cells):
    "What nbdev would write, roughly"
    exported = [o for o in cells if re.match(r'#\| exports?i?\n', o)]
    public = re.findall(r'^(?:def|class) (\w+)', '\n'.join(o for o in exported if not o.startswith('#| exporti')), re.M)
    return f'__all__ = {public}\n' + '\n'.join(exported) + '\n'

def build(path, edits=None, new=None, files=None):
    "A repository at `path`: `edits` replaces cells by (notebook, cell), `new` adds notebooks, `files` come last"
    nbs = {**good_notebooks(), **(new or {})}
    for (name,i),text in (edits or {}).items(): nbs[name][i:i+1] = [text] if isinstance(text, str) else text
    modules = {cells[0].split()[-1]:module_text(cells) for k,cells in nbs.items() if k!='index'}
    texts = {f'{o.replace(".", "/")}.py':text for o,text in modules.items()}
    inits = {f'{o.rpartition(".")[0]}/__init__.py':'' for o in modules}
    stars = ''.join(f'from .{o} import *\n' for o in modules)
    by_hand = {'all.py':stars, '_modidx.py':'', '__init__.py':"__version__ = '1'"}
    for k,v in {**by_hand, **inits, **texts, **(files or {})}.items():
        (path/lib/k).parent.mkdir(parents=True, exist_ok=True)
        (path/lib/k).write_text(v)
    (path/'nbs').mkdir(parents=True)
    places = '\n'.join(f'      - {o}.ipynb' for o in ['index', *sorted(nbs.keys()-{'index'})])
    (path/'_quarto.yml').write_text(f'website:\n  sidebar:\n    contents:\n{places}\n')
    for k,v in nbs.items(): write_nb(new_nb([as_cell(o) for o in v], {}), path/f'nbs/{k}.ipynb')
    house = House(path)
    for room in house.rooms: write_next(room, wanted_next(house))
    return House(path)

def fault(house, rule, said):
    "Does `rule` find one fault, and say so?"
    found = list(by_name[rule](house))
    assert len(found)==1 and said in found[0], found

def silent(house, rule):
    "Does `rule` find nothing?"
    found = list(by_name[rule](house))
    assert not found, '\n'.join(found)

@pytest.fixture(autouse=True)
def stars(monkeypatch, request):
    "What star imports bring, without importing a library, in all tests but that of our own house"
    if 'ours' in request.fixturenames: return
    same = object()
    ours,theirs = {'read':1, 'flip':same, 'resnet50':1},{'flip':same, 'resnet50':2, 'untar':3}
    names = {f'{lib}.all':ours, 'fastai.vision.all':theirs}
    monkeypatch.setattr(check_house, 'star', names.__getitem__)
    return names

@pytest.mark.parametrize('rule', by_name)
def test_good_house(tmp_path, rule): silent(build(tmp_path), rule)

def test_scratch_work(tmp_path):
    "Scratch notebooks and the index are no rooms"
    build(tmp_path)
    shutil.copy(tmp_path/'nbs/00_data.ipynb', tmp_path/'nbs/_data.ipynb')
    assert [o.name for o in House(tmp_path).rooms]==['00_data', '00a_data.toy', '01_augment']

@pytest.mark.parametrize('text', [
    f'#| export\nfrom {lib}.augment.core import flip',
    f'#| export\ndef f():\n    from {lib}.augment import core',
    f'import {lib}.augment.core as a',
    f'#| hide\nfrom {lib}.augment.core import *'])
def test_upward_import(tmp_path, text):
    house = build(tmp_path, {('00a_data.toy', 3):text})
    fault(house, 'upward_imports', f'imports {lib}.augment.core, but 01_augment does not stand before it')

@pytest.mark.parametrize('text,module', [
    ('from {}.all import *', 'all'), ('from {} import data', 'data'), ('import {}.gone', 'gone')])
def test_import_of_no_notebook(tmp_path, text, module):
    house = build(tmp_path, {('01_augment', 3):text.format(lib)})
    fault(house, 'upward_imports', f'imports {lib}.{module}, which no notebook writes')

@pytest.mark.parametrize('text', [
    f"import_module('{lib}.augment.core')", f'from {lib} import __version__', 'import fastreid_nbs.x'])
def test_no_import(tmp_path, text): silent(build(tmp_path, {('00_data', 3):text}), 'upward_imports')

def test_next_line(tmp_path):
    "Next follows the sidebar; what is missing or wrong is written"
    house = build(tmp_path)
    line = '**Next:** [flip](01_augment.ipynb). Numbers.'
    room = house.rooms[1]
    assert next_cell(room).source==line and next_cell(house.rooms[2]) is None
    next_cell(room).set_source('**Next:** [read](00_data.ipynb).')
    fault(house, 'next_lines', f'00a_data.toy.ipynb: expected a last line {line}')
    write_next(room, wanted_next(house))
    silent(House(tmp_path), 'next_lines')

def test_not_in_sidebar(tmp_path):
    house = build(tmp_path)
    path = tmp_path/'_quarto.yml'
    path.write_text(path.read_text().replace('      - 01_augment.ipynb\n', ''))
    assert '01_augment.ipynb: not in the sidebar' in list(by_name['next_lines'](house))[-1]

def test_late_name(tmp_path):
    "A name looked up in a later room needs a reason"
    house = build(tmp_path/'one', {('00_data', 3):"#| export\nx = later('flip')"})
    fault(house, 'late_names', 'looks up `flip` in a later room')
    silent(build(tmp_path/'other', {('00_data', 3):"x = later('flip')"}), 'late_names')

def test_import_of_itself(tmp_path):
    house = build(tmp_path, {('00_data', 6):f'from {lib}.data.core import read'})
    fault(house, 'upward_imports', '00_data.ipynb, cell 6 #')

@pytest.mark.parametrize('name,module,want', [
    ('02_backbone', 'backbone', 'backbone.core'), ('02a_backbone.osnet', 'backbone.vit', 'backbone.osnet'),
    ('02a_osnet', 'backbone.osnet', 'a name like'), ('02_backbone.osnet', 'backbone.osnet', 'a name like')])
def test_name_of_notebook(tmp_path, name, module, want):
    house = build(tmp_path, new={name:notebook(module, 'net', '')})
    fault(house, 'names_and_modules', f'{name}.ipynb: writes {module}, expected {want}')

def test_missing_module(tmp_path):
    build(tmp_path)
    (tmp_path/lib/'data/toy.py').unlink()
    fault(House(tmp_path), 'names_and_modules', f'00a_data.toy.ipynb: no {lib}/data/toy.py')

@pytest.mark.parametrize('name,module,said', [
    ('00a_data.files', 'data.files', '00a_data.files and 00a_data.toy, expected one notebook with 00a'),
    ('01a_images.own', 'images.own', '01 is augment and images')])
def test_letters_and_numbers(tmp_path, name, module, said):
    fault(build(tmp_path, new={name:notebook(module, 'net', '')}), 'letters_and_numbers', said)

@pytest.mark.parametrize('file,text,said', [
    ('data/old.py', '', 'data/old.py:1: no notebook'), ('data/all.py', '', 'data/all.py:1: no notebook'),
    ('data/__init__.py', 'from .core import *', 'data/__init__.py:1: expected an empty file')])
def test_module_without_notebook(tmp_path, file, text, said):
    fault(build(tmp_path, files={file:text}), 'modules_and_packages', f'{lib}/{said}')

def test_missing_init(tmp_path):
    house = build(tmp_path)
    (tmp_path/lib/'augment/__init__.py').unlink()
    fault(house, 'modules_and_packages', 'augment/__init__.py:1: expected an empty file')

@pytest.mark.parametrize('text,said', [
    ('**Builds on** all. **Used by** some.\n\nWhy so.', '01_augment.ipynb, cell 2 #'),
    ('> Why so.', '01_augment.ipynb, cell 2 #'),
    ('no_prose()', '01_augment.ipynb: expected a third cell of markdown')])
def test_intro(tmp_path, text, said):
    house = build(tmp_path, {('01_augment', 2):text})
    fault(house, 'intros', said)
    fault(house, 'intros', '**Builds on** `00_data`. **Used by** your own code.')

def test_intro_is_of_exported_imports(tmp_path):
    "An import in an example is not listed"
    silent(build(tmp_path, {('01_augment', 6):[f'from {lib}.data.toy import draw', 'flip(draw(1))']}), 'intros')

def test_many_notebooks(tmp_path):
    "Of more than six notebooks five are named"
    imports = f'from {lib}.data.core import read'
    new = {f'01{o}_augment.{o*2}':notebook(f'augment.{o*2}', 'f', '', imports) for o in 'abcd'}
    house = build(tmp_path/'6', new=new)
    assert intro_line(house.rooms[0], house).endswith('`01c_augment.cc`, `01d_augment.dd`.')
    new['01e_augment.ee'] = notebook('augment.ee', 'f', '', imports)
    house = build(tmp_path/'7', new=new)
    assert intro_line(house.rooms[0], house).endswith('`01c_augment.cc` and 2 more.')

@pytest.mark.parametrize('text,rest', [
    ('**Builds on** all. **Used by** some.\n\nWhy “so”.\n', '\n\nWhy “so”.\n'),
    ('**Used by** some.', ''), ('> Why so.', '\n\n> Why so.')])
def test_write(tmp_path, text, rest):
    "The line is rewritten, the rest of the notebook stays byte for byte"
    house = build(tmp_path, {('01_augment', 2):text})
    path = tmp_path/'nbs/01_augment.ipynb'
    before = read_nb(path)
    for room in house.rooms: write_intro(room, house)
    silent(House(tmp_path), 'intros')
    written = path.read_text(encoding='utf-8')
    nb = read_nb(path)
    assert nb.cells[2].source=='**Builds on** `00_data`. **Used by** your own code.' + rest
    assert [o for i,o in enumerate(nb.cells) if i!=2]==[o for i,o in enumerate(before.cells) if i!=2]
    assert written==json.dumps(json.loads(written), indent=1, sort_keys=True, ensure_ascii=False) + '\n'

@pytest.mark.parametrize('text', [
    '#| hide\nread(1)', '#| eval: false\nread(1)', '#| echo: false\nread(1)', "'read(1)'", 'read = 1',
    f'from {lib}.data.core import read', '#| exporti\n_x = read(1)', '> read(1)'])
def test_unused_name(tmp_path, text):
    house = build(tmp_path, {('00_data', 6):text})
    fault(house, 'unused_names', f'{lib}/data/core.py:5: no example of 00_data.ipynb uses `read`')

@pytest.mark.parametrize('text', ['#| slow\nread(1)', '#| notest\ncore.read(1)', 'for f in (read,): f(1)'])
def test_used_name(tmp_path, text): silent(build(tmp_path, {('00_data', 6):text}), 'unused_names')

def test_private_name(tmp_path):
    "What is not in `__all__` needs no example"
    house = build(tmp_path, {('00_data', 6):['#| exporti\ndef inner(): pass', 'read(1)']})
    assert house.by_module['data.core'].public==['read']
    silent(house, 'unused_names')

def test_crowd(tmp_path):
    text = 'from .data.core import *\nfrom functools import partial, wraps as _wraps\n'
    house = build(tmp_path, files={'all.py':text})
    assert all_names(house)=={'read', 'partial'}
    house.most_names = 1
    fault(house, 'crowd', 'brings 2 names, expected at most 1')

def test_hidden_name(tmp_path, stars):
    "The same object and `resnets` may stand in both"
    stars['fastai.vision.all']['read'] = 2
    text = 'from .data.core import *\nfrom .augment.core import *\nfrom torchvision.models import resnet50\n'
    fault(build(tmp_path, files={'all.py':text}), 'hidden_names', '`read` hides')

def test_long_module(tmp_path):
    fault(build(tmp_path/'a', files={'data/core.py':'x = 1\n'*441}), 'long_modules', 'data/core.py:441: 441 lines')
    silent(build(tmp_path/'b', files={'data/core.py':'x = 1\n'*440}), 'long_modules')

def test_wide_lines(tmp_path):
    "Two of more than 60 lines are too many, one is not"
    wide,narrow = '#'*121 + '\n','#'*120 + '\n'
    fault(build(tmp_path/'a', files={'data/core.py':narrow*60 + wide*2}), 'wide_lines', 'data/core.py (2)')
    silent(build(tmp_path/'b', files={'data/core.py':narrow*60 + wide}), 'wide_lines')

long_cell = '#| export\ndef f():\n' + '    x = 1\n\n'*59
@pytest.mark.parametrize('cells,said', [
    (['#| export\na = 1', '#| exporti\nb = 1', '#| hide\nread(1)', '> So:', '#| exports\nc = 1'],
        '4 exported cells of 4 lines'),
    ([long_cell], '2 exported cells of 61 lines')])
def test_long_stretch(tmp_path, cells, said):
    house = build(tmp_path, {('00_data', 6):[*cells, 'read(1)']})
    fault(house, 'long_stretches', f'00_data.ipynb, cell 5 #{house.rooms[0].cells[5].id}: {said}')

def test_short_stretch(tmp_path):
    "Imports do not count, and an example starts a new stretch"
    cells = ['#| export\nimport os', '#| export\na = 1', '#| export\nb = 1', 'read(1)', long_cell]
    silent(build(tmp_path, {('00_data', 6):cells}), 'long_stretches')

@pytest.mark.parametrize('text', ['def far(): pass', 'class Far: pass', '@patch\ndef far(self:int): pass'])
def test_silent_def(tmp_path, text):
    house = build(tmp_path, {('00_data', 6):['read(1)', f'#| export\n{text}', 'read(2)']})
    fault(house, 'silent_defs', '00_data.ipynb, cell 7 #')

def test_prose_after(tmp_path):
    "Prose may follow; what is private needs none"
    private = ['#| exporti\ndef inner(): pass', '#| export\ndef _own(): pass']
    cells = ['read(1)', '#| export\ndef far(): pass', '> Far.', 'far()', *private]
    silent(build(tmp_path, {('00_data', 6):cells}), 'silent_defs')

def test_command(tmp_path):
    "The command prints one line per fault, and writes what it can"
    build(tmp_path, {('01_augment', 2):'> Why so.', ('00_data', 6):'1'})
    shutil.copy(root/'pyproject.toml', tmp_path)
    def run(*args):
        cmd = [sys.executable, root/'tools/check_house.py', '--no-fastai', *args]
        return subprocess.run(cmd, cwd=tmp_path, capture_output=True, text=True)
    res = run()
    assert res.returncode==1 and len(res.stderr.splitlines())==2
    assert '3 notebooks, 3 names' in res.stdout and 'intros 1, next_lines 0, unused_names 1' in res.stdout
    assert run('--write', '--only', 'intros').returncode==0
    assert 'no rule names: choose from upward' in run('--only', 'names').stderr

@pytest.fixture(scope='module')
def ours(): return House(root)

@pytest.mark.slow   # `python tools/check_house.py`, which .ci/run starts, says the same
@pytest.mark.parametrize('rule', by_name)
def test_our_house(ours, rule): silent(ours, rule)
