"The rules of the house, checked: what notebooks import, what they are called, what they show, and how long modules are"
import ast, re, sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from warnings import catch_warnings
from fastcore.nbio import mk_cell, read_nb, write_nb
from fastcore.script import call_parse
from nbdev.config import get_config

lib = 'fastreid_nb'
resnets = {'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152'} # hide those of fastai on purpose
exporting = {'export', 'exports', 'exporti'} # directives that send a cell to the module
hiding = {'hide', 'hide_input', 'eval: false', 'echo: false', 'include: false'} # the reader sees no code, or none runs
form = re.compile(r'(?P<place>(?P<number>\d\d)(?P<letter>[a-z]?))_(?P<room>[a-z]\w*)(?:\.(?P<noun>[a-z]\w*))?')

## Cells

def parsed(cell): return cell.parsed_() or [] # nothing in markdown
def nodes(cell): return [o for stmt in parsed(cell) for o in ast.walk(stmt)]
def has_code(cell): return not all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in parsed(cell))
def n_code_lines(cell): return sum(bool(o.strip()) and not o.startswith('#|') for o in cell.source.splitlines())
def is_exported(cell): return bool(exporting & cell.directives.keys())

def is_example(cell):
    "Is this a cell that runs, that a reader sees, and that does more than import?"
    marks = {f'{k}: {v}' if v else k for k,v in cell.directives.items()}
    return has_code(cell) and not is_exported(cell) and not hiding & marks

def public_defs(cell):
    "Public functions, classes and patched methods that a cell defines"
    made = [o for o in parsed(cell) if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    return [o.name for o in made if not o.name.startswith('_')]

def used_names(cell):
    "Names that a cell reads, and attributes: what it only imports or assigns is not used"
    read = {o.id for o in nodes(cell) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Load)}
    return read | {o.attr for o in nodes(cell) if isinstance(o, ast.Attribute)}

def targets(node, known):
    "What a statement imports: `from a import b` imports `a.b` if that is one of the `known` modules, else `a`"
    if isinstance(node, ast.Import): return [o.name for o in node.names]
    if not isinstance(node, ast.ImportFrom) or node.level: return []
    full = [f'{node.module}.{o.name}' for o in node.names]
    return [o if o in known else node.module for o in full]

## Notebooks

@dataclass
class Room:
    "A notebook, and the module that nbdev writes from it"
    name: str # File name of the notebook, without .ipynb
    nb: dict # The notebook, as fastcore reads it
    module: str # What `default_exp` says
    lines: list # Of the module; empty if there is none
    @property
    def cells(self): return self.nb.cells
    @property
    def file(self): return f'{lib}/{self.module.replace(".", "/")}.py'
    @property
    def intro(self): return next((o for o in self.cells[2:3] if o.cell_type=='markdown'), None)
    @property
    def n_wide(self): return sum(len(o)>120 for o in self.lines)
    @cached_property
    def public(self):
        "The names in `__all__`"
        tree = ast.parse('\n'.join(self.lines))
        found = [o.value for o in tree.body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0])=='__all__']
        return ast.literal_eval(found[0]) if found else []
    def at(self, cell): return f'{self.name}.ipynb, cell {cell.idx_} #{cell.id}'
    def where(self, name):
        starts = [i for i,o in enumerate(self.lines, 1) if re.match(rf'(def |class )?{name}\b', o)]
        return f'{self.file}:{starts[0] if starts else 1}'

def read_room(path, root):
    nb = read_nb(path)
    module = next((o for c in nb.cells if (o := c.directive('default_exp'))), '')
    room = Room(path.stem, nb, module, [])
    if (root/room.file).exists(): room.lines = (root/room.file).read_text(encoding='utf-8').splitlines()
    return room

may_be_late = {'ScoreReID':'every learner scores, and scores need the rooms of evaluation',
    'expand_features':'a score may be one with query expansion', 'rerank_dist':'a score may be one after re-ranking',
    'WatchLoss':'every learner records the terms of its loss',
    'ParamGroups':'what a loss learns is not decayed',
    'load_pretrained':'a command or a learner may be given any file of weights'}

@dataclass
class House:
    "The notebooks of a repository in their order, but for those that write no module"
    root: Path
    most_names: int = 380 # That `fastreid_nb.all` may bring
    def __post_init__(self):
        paths = sorted((self.root/'nbs').glob('[!_.]*.ipynb'))
        self.rooms = [read_room(o, self.root) for o in paths if o.stem[0].isdigit()]
        self.by_module = {o.module:o for o in self.rooms}
        packages = {o.rpartition('.')[0] for o in self.by_module}
        self.known = {f'{lib}.{o}' for o in {*self.by_module, *packages, 'all'}}
        self.uses = {o.module:self.builds_on(o) for o in self.rooms}
        self.late = {o.module:self.looked_up(o) for o in self.rooms}
    def imports(self, cell):
        "Modules of the library that a cell imports, in functions too, without `fastreid_nb.`"
        found = [o for node in nodes(cell) for o in targets(node, self.known)]
        return list(dict.fromkeys(o.removeprefix(f'{lib}.') for o in found if o.startswith(f'{lib}.')))
    def looked_up(self, room):
        "Names that a room finds in `fastreid_nb.all` when it needs them, by `later('NAME')`"
        code = '\n'.join(c.source for c in room.cells if is_exported(c))
        return set(re.findall(r"\blater\('(\w+)'\)", code))
    def builds_on(self, room): return {o for c in room.cells if is_exported(c) for o in self.imports(c)}
    @property
    def wide_share(self): return sum(o.n_wide for o in self.rooms)/max(1, sum(len(o.lines) for o in self.rooms))

## The line that says where a notebook stands

def listed(rooms):
    "Up to six notebooks by name; of more, the first five and how many follow"
    names = [f'`{o.name}`' for o in rooms]
    return ', '.join(names) if len(names)<=6 else f'{", ".join(names[:5])} and {len(names)-5} more'

def intro_line(room, house):
    "What the imports say about `room`"
    below = [o for o in house.rooms if o.module in house.uses[room.module]]
    above = [o for o in house.rooms if room.module in house.uses[o.module] or house.late[o.module] & {*room.public}]
    return f'**Builds on** {listed(below) or "nothing"}. **Used by** {listed(above) or "your own code"}.'

def write_intro(room, house):
    "Rewrite the first line of the third cell, or put it there; the rest of the cell stays"
    if not room.intro: return
    lines = room.intro.source.split('\n')
    if not lines[0].startswith(('**Builds on**', '**Used by**')): lines = ['', '', *lines]
    lines[0] = intro_line(room, house)
    room.intro.set_source('\n'.join(lines))
    write_nb(room.nb, room.nb.path_)

## The line that leads on

def wanted_next(house):
    "Notebook to the line it should end with, after the sidebar"
    from fastreid_nb._site import next_line, sidebar
    pages = sidebar(house.root)
    return {o.name:next_line(o, pages) for o in pages}

def next_cell(room): return next((o for o in room.cells if o.cell_type=='markdown' and o.source.startswith('**Next:**')), None)

def write_next(room, wanted):
    "Rewrite the line Next, or put it behind the last cell that a reader sees"
    line,cell = wanted.get(room.name, ''),next_cell(room)
    if not line: return
    if cell is None:
        cells = [i for i,o in enumerate(room.cells) if o.source.strip() and 'hide' not in o.directives]
        room.nb.cells.insert(cells[-1]+1, mk_cell(line, 'markdown', id=f'next{room.name[:3].strip("_")}'))
    else: cell.set_source(line)
    write_nb(room.nb, room.nb.path_)

## Rules: each yields its faults

def upward_imports(house):
    "No import goes up, in exported cells and in examples"
    for i,room in enumerate(house.rooms):
        below = {o.module for o in house.rooms[:i]}
        found = [(c, o) for c in room.cells for o in house.imports(c) if o not in below]
        for cell,target in found:
            owner = house.by_module.get(target)
            why = f'but {owner.name} does not stand before it' if owner else 'which no notebook writes'
            yield f'{room.at(cell)}: imports {lib}.{target}, {why}'

def late_names(house):
    "Only the names in `may_be_late` are looked up in a later room"
    for room in house.rooms:
        for name in sorted(house.late[room.module]-may_be_late.keys()):
            yield f'{room.name}.ipynb: looks up `{name}` in a later room; give the reason in `may_be_late`, or import it from below'

def names_and_modules(house):
    "A notebook is named like its module, which is there"
    for room in house.rooms:
        m = form.fullmatch(room.name)
        if m and bool(m['letter'])==bool(m['noun']): want = f'{m["room"]}.{m["noun"] or "core"}'
        else: want = 'a name like 02_backbone or 02d_backbone.osnet'
        if room.module!=want: yield f'{room.name}.ipynb: writes {room.module or "no module"}, expected {want}'
        if not room.lines: yield f'{room.name}.ipynb: no {room.file}, was it exported?'

def several(pairs):
    "Keys that come with more than one value"
    found = defaultdict(set)
    for k,v in pairs: found[k].add(v)
    return {k:' and '.join(sorted(v)) for k,v in found.items() if len(v)>1}

def letters_and_numbers(house):
    "One letter, one notebook; one number, one room"
    found = [m for o in house.rooms if (m := form.fullmatch(o.name))]
    letters = several((m['place'], m[0]) for m in found)
    numbers = several((m['number'], m['room']) for m in found)
    for k,v in letters.items(): yield f'nbs: {v}, expected one notebook with {k}'
    for k,v in numbers.items(): yield f'nbs: {k} is {v}, expected one room with this number'

def modules_and_packages(house):
    "Every module has a notebook, every package an empty `__init__.py`"
    top = house.root/lib
    paths = {o.relative_to(house.root).as_posix():o for o in sorted(top.rglob('*.py'))}
    written = {o.file for o in house.rooms} | {f'{lib}/{o}.py' for o in ('__init__', '__main__', '_docidx', '_site', 'all', '_modidx')}
    for name,path in paths.items():
        if path.name!='__init__.py' and name not in written: yield f'{name}:1: no notebook writes this module'
    for name in sorted({f'{o.rpartition("/")[0]}/__init__.py' for o in paths} - {f'{lib}/__init__.py'}):
        empty = name in paths and not paths[name].read_text(encoding='utf-8').strip()
        if not empty: yield f'{name}:1: expected an empty file'

def intros(house):
    "The third cell begins with what the imports say"
    for room in house.rooms:
        want = intro_line(room, house)
        if not room.intro: yield f'{room.name}.ipynb: expected a third cell of markdown, with {want}'
        elif room.intro.source.split('\n')[0]!=want: yield f'{room.at(room.intro)}: expected {want}'

def next_lines(house):
    "The last line leads where the sidebar leads"
    wanted = wanted_next(house)
    for room in house.rooms:
        if room.name not in wanted: yield f'{room.name}.ipynb: not in the sidebar of _quarto.yml'
        found,want = next_cell(room),wanted.get(room.name, '')
        if want and (found is None or found.source!=want): yield f'{room.name}.ipynb: expected a last line {want}'

def unused_names(house):
    "Every public name is used in an example of its own notebook"
    for room in house.rooms:
        used = {o for c in room.cells if is_example(c) for o in used_names(c)}
        unused = [o for o in room.public if o not in used]
        yield from (f'{room.where(o)}: no example of {room.name}.ipynb uses `{o}`' for o in unused)

def star(module):
    "What `from module import *` brings"
    names = {}
    with catch_warnings(action='ignore'): exec(f'from {module} import *', names)
    return names

def all_names(house):
    "Public names that `fastreid_nb.all` brings: those of rooms are read, not imported"
    names = set()
    tree = ast.parse((house.root/lib/'all.py').read_text(encoding='utf-8'))
    for node in (o for o in tree.body if isinstance(o, ast.ImportFrom)):
        room = house.by_module.get((node.module or '').removeprefix(f'{lib}.'))
        if node.names[0].name!='*': names.update(o.asname or o.name for o in node.names)
        else: names.update(room.public if room else star(node.module))
    return {o for o in names if not o.startswith('_')}

def crowd(house):
    "`fastreid_nb.all` brings few names"
    n = len(all_names(house))
    if n>house.most_names: yield f'{lib}/all.py:1: brings {n} names, expected at most {house.most_names}'

def hidden_names(house):
    "`fastreid_nb.all` hides no name of fastai, but for `resnets`"
    ours,theirs = star(f'{lib}.all'),star('fastai.vision.all')
    for name in sorted(all_names(house) & theirs.keys() - resnets):
        if ours[name] is not theirs[name]: yield f'{lib}/all.py:1: `{name}` hides that of fastai.vision.all'

def long_modules(house, most=440):
    "No module is long"
    for room in house.rooms:
        if len(room.lines)>most: yield f'{room.file}:{most+1}: {len(room.lines)} lines, expected at most {most}'

def wide_lines(house, most=.02):
    "Few lines have more than 120 columns"
    worst = sorted(house.rooms, key=lambda o: o.n_wide, reverse=True)[:5]
    counts = ', '.join(f'{o.file} ({o.n_wide})' for o in worst)
    said = f'{house.wide_share:.1%} of lines over 120 columns, expected at most {most:.0%}'
    if house.wide_share>most: yield f'{lib}: {said}; most in {counts}'

def stretches(room):
    "Lists of exported cells with no example between them; cells of imports are left out"
    res = [[]]
    for cell in room.cells:
        if is_example(cell): res.append([])
        elif is_exported(cell) and has_code(cell): res[-1].append(cell)
    return filter(None, res)

def long_stretches(house, most_cells=3, most_lines=60):
    "An example comes soon after what is exported"
    for room in house.rooms:
        for cells in stretches(room):
            n_lines = sum(map(n_code_lines, cells))
            found = f'{len(cells)} exported cells of {n_lines} lines without an example'
            if len(cells)<=most_cells and n_lines<=most_lines: continue
            yield f'{room.at(cells[0])}: {found}, expected at most {most_cells} cells and {most_lines} lines'

def silent_defs(house):
    "Markdown stands directly before or after each exported public definition"
    for room in house.rooms:
        prose = {o.idx_ for o in room.cells if o.cell_type=='markdown'}
        exported = [o for o in room.cells if {'export', 'exports'} & o.directives.keys()]
        silent = [o for o in exported if not prose & {o.idx_-1, o.idx_+1}]
        yield from (f'{room.at(c)}: no markdown beside `{o}`' for c in silent for o in public_defs(c))

rules = [upward_imports, late_names, names_and_modules, letters_and_numbers, modules_and_packages, intros, next_lines, unused_names,
    crowd, hidden_names, long_modules, wide_lines, long_stretches, silent_defs]

def write_lines(house):
    "Bring up to date what follows from imports and from the sidebar"
    wanted = wanted_next(house)
    for room in house.rooms:
        write_intro(room, house)
        write_next(room, wanted)

@call_parse
def main(
    write:bool=False, # First rewrite the lines "Builds on … Used by …" and "Next"
    no_fastai:bool=False, # Leave out the comparison with fastai's names, for which both libraries are imported
    most_names:int=380, # Public names that `fastreid_nb.all` may bring
    only:str='', # Rules to check, separated by spaces; all when empty
):
    "Check the rules of the house and fail if one is broken"
    unknown = set(only.split()) - {o.__name__ for o in rules}
    if unknown: sys.exit(f'no rule {", ".join(sorted(unknown))}: choose from {", ".join(o.__name__ for o in rules)}')
    house = House(get_config().config_path, most_names)
    sys.path.insert(0, str(house.root))
    if write: write_lines(house)
    chosen = [o for o in rules if not only or o.__name__ in only.split()]
    faults = {o.__name__:list(o(house)) for o in chosen if not (no_fastai and o is hidden_names)}
    print(f'{len(house.rooms)} notebooks, {len(all_names(house))} names in {lib}.all', end=', ')
    print(f'{house.wide_share:.1%} of lines over 120 columns')
    print('faults:', ', '.join(f'{k} {len(v)}' for k,v in faults.items()))
    if any(faults.values()): sys.exit('\n'.join(o for v in faults.values() for o in v))
