"How the documentation pages are made from notebooks, beyond what nbdev does: source, API blocks, links and lists"
import ast, inspect, re
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
import yaml
from fastcore.docments import docments
from fastcore.nbio import read_nb
from nbdev.config import get_config
from nbdev.processors import Processor
from nbdev.showdoc import BasicMarkdownRenderer

## The course: chapters, and the path of those in a hurry

chapters = {
    'Data':'Which images there are, who is in them, what is wrong with them, and how a fair test is cut from them.',
    'Batches':'How images are disturbed, and who meets whom in a batch.',
    'Model':'From an image to an embedding: backbone, pooling, neck and head.',
    'Networks':'A side room: every backbone of the library, one family a page.',
    'Part models':'A side room: models that look at stripes, patches or shoulders, and models that vote.',
    'Training':'What a model is punished for, and how its learning rate, its weights and its precision behave on the way.',
    'Evaluation':'How good a ranked list is, on images of people whom the model has never seen.',
    'Partial bodies':'When a wall hides half the person: matching by parts, and models that know what they see.',
    'New cities':'What a new place costs a model, labels that nobody wrote, and training on them.',
    'Small and good':'What a large model knows, handed to a small one; a new model for an old gallery; and learning on without forgetting.',
    'Export':'A model as a file that other programs run, and that cannot be wrong without anybody noticing.',
    'Published weights':"Somebody else's file of weights as a model of yours.",
    'Recipes':'A run as a file, the recipes that come with the library, and the command `reid`.',
    'Look up':'Every name, every term, and what the pages leave unsaid.'}
short_path = ['00_data', '00c_data.own', '01_augment', '01e_augment.loaders', '02_backbone', '03_pooling', '04_heads', '04a_heads.model',
    '05_losses', '06_train', '07_eval', '15_recipes']

@dataclass
class Page:
    "An entry of the sidebar"
    file: str # Name in nbs/, with its ending
    chapter: str # Section of the sidebar; '' above all sections
    text: str # What the sidebar calls it; '' for the page's own title
    nbs: Path # Folder of the notebooks
    @property
    def name(self): return self.file.removesuffix('.ipynb').removesuffix('.qmd')
    @property
    def source(self): return next(o for o in (self.nbs/self.file, self.nbs/f'{self.file}.py') if o.exists())
    @property
    def head(self):
        "Title and sentence"
        if self.source.suffix!='.ipynb': return front_matter(self.source)
        title,*rest = next((o.source for o in read_nb(self.source).cells if o.source.startswith('# ')), self.name).split('\n')
        return title.removeprefix('# ').strip(),' '.join(o.removeprefix('>').strip() for o in rest if o.startswith('>'))
    @property
    def is_short(self): return self.name in short_path

def nbs(): return get_config().nbs_path

def front_matter(path):
    "Title and description that a text page begins with"
    meta = yaml.safe_load(path.read_text(encoding='utf-8').split('---')[1])
    return meta['title'],meta.get('description', '')

def entries(root):
    "Rows of (chapter, entry) of the sidebar in _quarto.yml"
    cfg = yaml.safe_load((root/'_quarto.yml').read_text(encoding='utf-8'))
    for o in cfg['website']['sidebar']['contents']:
        if isinstance(o, dict) and 'section' in o: yield from ((o['section'], inside) for inside in o['contents'])
        else: yield '',o

def sidebar(
    root:Path=None, # Folder of the repository; by default the one that nbdev finds
)->list: # Of `Page`
    "The pages in the order of the sidebar, which is the order of the arrows at the foot of each page"
    root = root or get_config().config_path
    named = [(chapter, o if isinstance(o, dict) else dict(href=o)) for chapter,o in entries(root)]
    return [Page(o['href'], chapter, o.get('text', ''), root/'nbs') for chapter,o in named]

def next_line(page, pages):
    "Where a reader goes from `page`: to the next one, and on along the short path"
    later = pages[pages.index(page)+1:]
    if not later: return ''
    title,sentence = later[0].head
    res = f'**Next:** [{title}]({later[0].file}). {sentence}'.rstrip('.')+'.'
    short = next((o for o in later if o.is_short), None)
    if short in (None,later[0]): return res
    return f'{res} On the short path: [{short.head[0]}]({short.file}).'

## Source

most_open = 25 # Lines of an exported cell that is shown open
nbdev_only = re.compile(r'^\s*#\|\s*(export|exporti|exports)(: true)?\s*$', flags=re.MULTILINE)

def defined(cell):
    "Functions and classes that a cell defines"
    return [o for o in cell.parsed_() or [] if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]

def is_patch(o): return isinstance(o, ast.FunctionDef) and any('patch' in ast.unparse(k) for k in o.decorator_list)

def n_lines(cell): return sum(bool(o.strip()) and not o.startswith('#|') for o in cell.source.splitlines())

def is_open(cell):
    "Is a cell shown at once? Short definitions are, imports and long ones wait behind a line; `code-fold` decides otherwise"
    if 'code-fold' in cell.directives_: return cell.directives_['code-fold']=='false'
    return bool(defined(cell)) and n_lines(cell)<=most_open

def summary(cell):
    "The line behind which a cell waits"
    names = [o.name for o in defined(cell)]
    if names: return 'Source of ' + ', '.join(names)
    is_import = all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in cell.parsed_() or [])
    return 'Imports of the module' if is_import else 'Source'

def heading(text):
    "What remains of an API block whose source is open: its name, and the link to its module"
    return re.search(r'\A.*?^#+ .*?$', text, flags=re.DOTALL|re.MULTILINE)[0]

def markdown_of(cell):
    "The outputs of a cell that are Markdown"
    return [o.data for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})]

class ShowSource(Processor):
    "Show exported cells, below the headings of what they define, and drop hidden cells"
    def begin(self):
        cells,res = list(self.nb.cells),[]
        while cells:
            cell = cells.pop(0)
            blocks = []
            while cells and getattr(cells[0], 'has_sd', False): blocks.insert(0, cells.pop(0))
            res += [*blocks, cell]
            for o in blocks: self.name(o)
            if not self.is_library(cell): continue
            if is_open(cell): self.shorten(blocks)
            self.dress(cell)
        self.nb.cells = [o for o in res if not self.is_hidden(o)]

    def is_hidden(self, cell): return cell.cell_type=='code' and bool({'hide','default_exp'} & cell.directives_.keys())
    def is_library(self, cell):
        return cell.cell_type=='code' and bool({'export','exporti','exports'} & cell.directives_.keys())

    def name(self, block):
        "Call a method by its class in the heading: one that was added to several classes does not know whose it is"
        said = re.search(r'show_doc\((.*)\)', block.source)[1]
        for data in markdown_of(block): data['text/markdown'] = re.sub(r'^(#+ ).*', rf'\1{said}', ''.join(data['text/markdown']), count=1, flags=re.MULTILINE)

    def shorten(self, blocks):
        for data in (o for b in blocks for o in markdown_of(b)): data['text/markdown'] = heading(''.join(data['text/markdown']))

    def dress(self, cell):
        body = '\n'.join(o for o in nbdev_only.sub('', cell.source).splitlines() if not o.startswith('#| code-'))
        fold = '' if is_open(cell) else f'#| code-fold: true\n#| code-summary: "{summary(cell)}"\n'
        cell.source,cell.outputs = f'#| classes: library\n{fold}{body.strip()}',[]

## Links

class LinkNotebooks(Processor):
    "Link the names of notebooks in prose"
    def begin(self):
        names = '|'.join(re.escape(o.stem) for o in sorted(nbs().glob('*.ipynb')))
        self.name = re.compile(rf'(?<![\[`])`({names})(?:\.ipynb)?`(?![\]`])')
    def cell(self, cell):
        if cell.cell_type=='markdown': cell.source = self.name.sub(r'[`\1`](\1.ipynb)', cell.source)

## API blocks

def type_name(x):
    "A type as one would say it"
    if x is inspect.Parameter.empty: return ''
    if isinstance(x, str): return x
    is_plain = hasattr(x, '__name__') and not hasattr(x, '__origin__') # not list[int]
    return x.__name__ if is_plain else str(x).replace('typing.', '')

def default_name(x):
    "A default as one would write it"
    if x is inspect.Parameter.empty: return ''
    if hasattr(x, 'func'): return f'partial({default_name(x.func)})'
    return getattr(x, '__name__', None) or repr(x)

def parameters(obj):
    "Rows of (name, type, default, meaning) of what has a meaning; what is returned comes last"
    made = {o.name:o.default_factory() for o in fields(obj) if o.default_factory is not MISSING} if is_dataclass(obj) else {}
    for name,o in docments(obj, full=True).items():
        if name=='self' or not o.get('docment'): continue
        if name=='return': yield '**Returns**',type_name(o['anno']),'',o['docment']
        else: yield f'`{name}`',type_name(o['anno']),default_name(made.get(name, o['default'])),o['docment']

def cell_text(x): return ' '.join(str(x).split()).replace('|', '\\|')

def code(x): return f'`{cell_text(x)}`' if x else ''

class Block(BasicMarkdownRenderer):
    "Name, sentence and parameters of a public name; its signature is in the source below"
    def _repr_markdown_(self):
        res = heading(super()._repr_markdown_())
        if self.docs: res += f'\n\n*{self.docs.strip()}*' if '\n' not in self.docs.strip() else f'\n\n{self.docs.strip()}'
        rows = list(parameters(self.sym))
        if not rows: return res
        body = '\n'.join(f'| {name} | {code(typ)} | {code(default)} | {cell_text(doc)} |' for name,typ,default,doc in rows)
        return f'{res}\n\n| | type | default | |\n|---|---|---|---|\n{body}'

## Pages that list things

def public_names():
    "Rows of (name, sentence, page, module) of every name in a module's `__all__`"
    from fastreid_nb._modidx import d
    for module,syms in d['syms'].items():
        path = get_config().config_path.joinpath(*module.split('.')).with_suffix('.py')
        tree = ast.parse(path.read_text(encoding='utf-8'))
        lists = [o.value for o in tree.body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0])=='__all__']
        made = {o.name:ast.get_docstring(o) or '' for o in tree.body if hasattr(o, 'name')}
        for name in ast.literal_eval(lists[0]) if lists else []:
            url = syms.get(f'{module}.{name}', (f'{next(iter(syms.values()))[0].partition("#")[0]}',))[0]
            yield name,made.get(name, '').split('\n')[0],url,module

def methods():
    "Rows of (name, sentence, page, module) of methods that a notebook adds to a class"
    from fastreid_nb._modidx import d
    for path in sorted(nbs().glob('[!_]*.ipynb')):
        nb = read_nb(path)
        module = next((f'fastreid_nb.{o}' for c in nb.cells if (o := c.directive('default_exp'))), None)
        made = [o for c in nb.cells if {'export','exports'} & c.directives.keys() for o in c.parsed_() or [] if is_patch(o)]
        for o in (o for o in made if not o.name.startswith('_')):
            names = [f'{k.strip()}.{o.name}' for k in ast.unparse(o.args.args[0].annotation).split('|')]
            sentence = (ast.get_docstring(o) or '').split('\n')[0]
            yield from ((k, sentence, d['syms'][module][f'{module}.{k}'][0], module) for k in names)

def reference():
    "The Reference page: every public name, room by room"
    rooms = {}
    for row in [*public_names(), *methods()]: rooms.setdefault(row[3].split('.')[1], []).append(row)
    for room,rows in rooms.items():
        print(f'## {room}\n\n| name | what it is |\n|---|---|')
        for name,doc,url,_ in sorted(rows, key=lambda o: o[0].lower()): print(f'| [`{name}`]({url}) | {cell_text(doc)} |')
        print()

def course():
    "The Course page: chapters, a sentence each, and their pages; the short path is marked"
    for chapter,sentence in chapters.items():
        inside = [o for o in sidebar() if o.chapter==chapter]
        if not inside: continue
        print(f'## {chapter}\n\n{sentence}\n')
        for page in inside:
            title,text = page.head
            print(f'- {"★ " if page.is_short else ""}[{title}]({page.file}): {text}')
        print()

def page_url(page):
    "Address of the Markdown twin of a page, which programs read more easily"
    from nbdev.config import nbpath2html
    html = nbpath2html(page.source).name if page.source.suffix=='.ipynb' else f'{page.name}.html'
    return f'{get_config().doc_url.rstrip("/")}/{html}.md'

def llms():
    "The text of llms.txt: what a program that reads the site should know first"
    cfg = get_config()
    res = [f'# {cfg.title}', f'> {cfg.description}', 'Every page is a notebook that was executed from top to bottom; `from fastreid_nb.all import *` '
        'brings every public name.']
    for chapter in ['', *chapters]:
        inside = [o for o in sidebar() if o.chapter==chapter]
        heads = [(o, *o.head) for o in inside]
        lines = '\n'.join(f'- [{title}]({page_url(page)}): {text}' for page,title,text in heads)
        if inside: res.append(f'## {chapter or "Start here"}\n\n{chapters.get(chapter, "")}\n\n{lines}'.replace('\n\n\n\n', '\n\n'))
    return '\n\n'.join(res)+'\n'
