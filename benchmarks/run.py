"List the benchmarks, or run one and end with a line of JSON"
import ast, json, sys
from importlib import import_module
from pathlib import Path
from fastcore.script import call_parse

here = Path(__file__).parent

def benchmarks()->dict: # Name to path, in alphabetical order
    "Every file `bench_NAME.py` beside this one"
    return {p.stem.removeprefix('bench_'):p for p in sorted(here.glob('bench_*.py'))}

def summary(
    path:Path, # A benchmark
)->str: # The first line of its docstring
    "What a benchmark measures, without importing it"
    doc = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))
    if not doc: raise ValueError(f'{path.name} has no docstring: its first line is what the list shows')
    return doc.splitlines()[0]

def result(
    name:str, # Name of the benchmark
    res:dict, # What its `main` returned, with the keys value, bar and ok
)->str: # One line of JSON
    "The line that a run ends with"
    missing = {'value', 'bar', 'ok'} - res.keys()
    if missing: raise ValueError(f'bench_{name}.main must return value, bar and ok; it returned {sorted(res)}')
    return json.dumps(dict(name=name, value=float(res['value']), bar=float(res['bar']), ok=bool(res['ok'])))

@call_parse(pos=['name'])
def main(
    name:str='', # Benchmark to run; lists them all when empty
    seeds:int=1, # Number of seeds to run it with
):
    "List the benchmarks, or run `name` and end with one line of JSON; the exit code is 1 if the bar is missed"
    found = benchmarks()
    if not name: return print('\n'.join(f'{n:12s} {summary(p)}' for n,p in found.items()))
    if name not in found: sys.exit(f'no benchmark {name!r}; there are: {", ".join(found) or "none"}')
    res = import_module(f'bench_{name}').main(seeds=seeds)
    print(result(name, res), flush=True)
    if not res['ok']: sys.exit(1)
