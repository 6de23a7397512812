"What words in backticks on the documentation pages link to: public names and methods, but no helpers, which have no entry there"
import ast
from pathlib import Path
from ._modidx import d as everything

def _helpers(module):
    "Functions and classes of a module that are not in its `__all__`"
    path = Path(__file__).parent.joinpath(*module.split('.')[1:]).with_suffix('.py')
    tree = ast.parse(path.read_text(encoding='utf-8'))
    lists = [o.value for o in tree.body if isinstance(o, ast.Assign) and ast.unparse(o.targets[0])=='__all__']
    public = ast.literal_eval(lists[0]) if lists else []
    return {o.name for o in tree.body if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and o.name not in public}

def _linked(module, symbols):
    "The entries of a module that a page may link to"
    hidden = {f'{module}.{o}' for o in _helpers(module)}
    return {k:v for k,v in symbols.items() if '.'.join(k.split('.')[:len(module.split('.'))+1]) not in hidden}

d = {**everything, 'syms':{k:_linked(k, v) for k,v in everything['syms'].items()}}
