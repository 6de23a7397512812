"Write README.md from nbs/index.ipynb, pictures in its outputs as files beside the notebooks, and nbs/llms.txt from all pages"
import json, re, sys
from pathlib import Path
from urllib.parse import urlparse
from check_docs import page_md, pandoc, reader
from fastcore.script import call_parse
from fastreid_nb._site import llms
from nbdev.config import get_config
from nbdev.serve import proc_nbs

note = '<!-- Written by tools/make_readme.py from nbs/index.ipynb: edit the notebook -->'
folder = 'nbs/images' # of the pictures

def rewrite(x, f):
    "A pandoc tree in which each element is replaced by the elements that `f` makes of it, inside first"
    if isinstance(x, dict): return {k:rewrite(v, f) for k,v in x.items()}
    if not isinstance(x, list): return x
    rewritten = [rewrite(o, f) for o in x]
    return [new for o in rewritten for new in (f(o) if isinstance(o, dict) and 't' in o else [o])]

def local(url):
    "`url`, which is relative to nbs/ or points into the repository on GitHub, as a path that works in every clone"
    cfg = get_config()
    blob = f'{cfg.git_url}/blob/{cfg.branch}/'
    if url.startswith(blob): return url.removeprefix(blob)
    if url.endswith('.qmd'): return f'{cfg.doc_url.rstrip("/")}/{url.removesuffix(".qmd")}.html'   # made with the site
    return url if urlparse(url).scheme or url.startswith('#') else f'nbs/{url}'

def is_autolink(text, url):
    "Did nbdev make this link from a word in backticks? Which words it knows depends on what is installed"
    return [o['t'] for o in text]==['Code'] and bool(urlparse(url).scheme)

def tables(text):
    "HTML as pandoc elements, so that its tables become markdown tables: GitHub would show style sheets as text"
    text = re.sub(r'<style.*?</style>', '', text, flags=re.DOTALL)
    return json.loads(pandoc(text, '-f', 'html', '-t', 'json'))['blocks']

def div(cls, *blocks): return {'t':'Div', 'c':[['', [cls], []], list(blocks)]}

def github(pics):
    "The function that turns one pandoc element into what GitHub shows"
    def f(o):
        typ,c = o['t'],o.get('c')
        if typ=='Link' and is_autolink(c[1], c[2][0]): return c[1]
        if typ=='Link': c[2][0] = local(c[2][0])
        if typ=='Image': c[2][0] = f'{folder}/{c[2][0]}' if c[2][0] in pics else local(c[2][0])
        if typ=='RawBlock' and c[0]=='html' and '<!--' not in c[1]: return rewrite(tables(c[1]), f)
        if typ!='Div': return [o]
        kind = next((k.removeprefix('callout-') for k in c[0][1] if k.startswith('callout-')), None)
        return [div(kind, div('title', {'t':'Para', 'c':[{'t':'Str', 'c':kind.title()}]}), *c[1])] if kind else c[1]
    return f

def is_cell(o): return o['t']=='CodeBlock' and 'cell' in o['c'][0][1]

def joined(blocks):
    "Code cells with nothing between them as one block that can be copied at once"
    res = []
    for o in blocks:
        if res and is_cell(o) and is_cell(res[-1]): res[-1]['c'][1] += f'\n{o["c"][1]}'
        else: res.append(o)
    return res

def readme()->tuple: # Text of README.md, and pictures (dict from file name to bytes)
    "What README.md should say"
    cache = proc_nbs(file_glob='index.ipynb', n_workers=0, force=True)
    meta,md,pics = page_md(cache/'index.ipynb')
    md = re.sub(r'<!-- WARNING.*?-->', '', md)
    doc = json.loads(pandoc(f'# {meta["title"]}\n\n{meta.get("description", "")}\n\n{md}', '-f', reader, '-t', 'json'))
    doc['blocks'] = joined(rewrite(doc['blocks'], github(pics)))
    res = pandoc(json.dumps(doc), '-f', 'json', '-t', 'gfm', '--wrap=preserve')
    return f'{note}\n\n' + re.sub(r'^(`{3,}) (\w+)', r'\1\2', res, flags=re.MULTILINE),pics

def wanted(root)->dict: # Path to bytes; None for a picture that is no longer needed
    "README.md, its pictures and nbs/llms.txt as they should be"
    text,pics = readme()
    old = dict.fromkeys((root/folder).glob('index_*.*'))
    return {**old, root/'README.md':text.encode(), root/'nbs/llms.txt':llms().encode(), **{root/folder/k:v for k,v in pics.items()}}

def write(path, data):
    "Write `data` to `path`, or remove it"
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None: path.unlink()
    else: path.write_bytes(data)

@call_parse
def main(
    check:bool=False, # Write nothing, and fail if README.md, one of its pictures or nbs/llms.txt differs from the notebooks
):
    "Write README.md, its pictures and nbs/llms.txt from the notebooks"
    root = get_config().config_path
    changed = {p:d for p,d in wanted(root).items() if (p.read_bytes() if p.exists() else None)!=d}
    names = ', '.join(str(Path(p).relative_to(root)) for p in changed)
    if check and changed: sys.exit(f'not what the notebooks say: {names}. Run: python tools/make_readme.py')
    for p,d in changed.items(): write(p, d)
    print(f'written: {names}' if names else 'README.md and llms.txt are up to date')
