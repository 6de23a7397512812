"Render the docs pages by nbdev and pandoc, without Quarto, and follow every local link, anchor and picture"
import base64, html, json, re, subprocess, sys
from collections import namedtuple
from pathlib import Path
from urllib.parse import unquote, urlparse
import pypandoc, yaml
from fastcore.script import call_parse
from nbdev.config import get_config
from nbdev.serve import proc_nbs

Page = namedtuple('Page', 'src html') # path of the notebook in nbs/, and the text of the page
reader = 'markdown+autolink_bare_uris-implicit_figures'
css = '''body{max-width:52rem;margin:2rem auto;padding:0 1rem;font:16px/1.55 system-ui,sans-serif;color:#222}
pre{background:#f3f4f5;padding:.6rem .8rem;overflow:auto;font-size:87%}
pre.output{background:none;border-left:2px solid lightsalmon;margin-left:.8rem}
p.sub{font-size:135%;opacity:.7;font-style:italic}td,th{padding:.2rem .6rem;border-bottom:1px solid #ddd}
nav#TOC{float:right;border-left:1px solid #ddd;margin:0 0 1rem 1.5rem;font-size:85%}img{max-width:100%}'''

def pandoc(
    text:str, # What to convert
    *args, # Command line of pandoc
)->str: # The converted text
    "Convert `text` by pandoc"
    res = subprocess.run([pypandoc.get_pandoc_path(), *args], input=text, capture_output=True, encoding='utf-8')
    if res.returncode: raise RuntimeError(f'pandoc {" ".join(args)}: {res.stderr}')
    return res.stdout

def joined(x): return x if isinstance(x, str) else ''.join(x)

def directives(src):
    "The `#|` lines at the top of a cell as a dict, and what follows them"
    opts,lines = {},src.splitlines()
    while lines and lines[0].lstrip().startswith('#|'):
        k,_,v = lines.pop(0).lstrip()[2:].partition(':')
        opts[k.strip()] = v.strip().strip('"\'')
    return opts,'\n'.join(lines)

def block(text, *classes): return f'````{{{" ".join("."+o for o in classes)}}}\n{text.rstrip()}\n````'

def picture(out, mime, name, pics, alt):
    "Markdown for the picture in `out`, whose bytes go into `pics`"
    name = f'{name}_{len(pics)+1}.{mime.split("/")[1]}'
    pics[name] = base64.b64decode(joined(out['data'][mime]))
    width = out.get('metadata', {}).get(mime, {}).get('width')
    return f'![{alt}]({name})' + (f'{{width={width}}}' if width else '')

def output_md(out, opts, name, pics):
    "Markdown for one output of a cell"
    asis,typ = opts.get('output')=='asis',out['output_type']
    if typ=='error': return block(f'{out["ename"]}: {out["evalue"]}', 'error')
    if typ=='stream': return joined(out['text']) if asis else block(joined(out['text']), 'output')
    data = out['data']
    if 'text/markdown' in data and (asis or 'text/html' not in data): return joined(data['text/markdown'])
    if 'text/html' in data: return f'```{{=html}}\n{joined(data["text/html"])}\n```'
    mime = next((o for o in ('image/png', 'image/jpeg') if o in data), None)
    return picture(out, mime, name, pics, opts.get('fig-alt', '')) if mime else block(joined(data.get('text/plain', '')), 'output')

def cell_md(cell, name, pics):
    "Markdown for one cell of a notebook that nbdev has processed"
    opts,src = directives(joined(cell['source']))
    if cell['cell_type']=='markdown': return [src]
    if cell['cell_type']!='code' or opts.get('include')=='false': return []
    res = [block(src, 'python', 'cell')] if opts.get('echo')!='false' and src.strip() else []
    if opts.get('output')=='false': return res
    return res + [output_md(o, opts, name, pics) for o in cell.get('outputs', [])]

def page_md(
    path:Path, # Notebook that `proc_nbs` has written
)->tuple: # Front matter (dict), markdown (str), pictures (dict from file name to bytes)
    "A processed notebook as pandoc's markdown, and the pictures in its outputs"
    cells,pics = json.loads(path.read_text(encoding='utf-8'))['cells'],{}
    raw = next((joined(c['source']) for c in cells if c['cell_type']=='raw'), '')
    return yaml.safe_load(raw.strip().strip('-')) or {},'\n\n'.join(o for c in cells for o in cell_md(c, path.stem, pics)),pics

def render(path, cache, out):
    "Write the page of one processed notebook to `out`; returns its address and `Page`"
    meta,md,pics = page_md(path)
    src = path.relative_to(cache)
    dst = out/src.parent/meta.get('output-file', src.with_suffix('.html').name)
    dst.parent.mkdir(parents=True, exist_ok=True)
    for name,data in pics.items(): (dst.parent/name).write_bytes(data)
    title = meta.get('title', path.stem)
    md = f'# {title} {{.unnumbered}}\n\n[{meta.get("description", "")}]{{.sub}}\n\n{md}'
    lua = f'--lua-filter={cache/"symbols.lua"}'
    text = pandoc(md, '-f', reader, '-t', 'html5', '-s', '--toc', '--mathjax', '-c', 'style.css', '-M', f'pagetitle={title}', lua)
    dst.write_text(text, encoding='utf-8')
    return dst.relative_to(out).as_posix(),Page(src.as_posix(), text)

def ids(page): return {o.lower() for o in re.findall(r'\bid="([^"]+)"', page.html)}

def links(page):
    "Local addresses a page points to, whole ones of this site included, without those that pandoc adds itself"
    cfg = get_config()
    for u in map(html.unescape, re.findall(r'(?:href|src)="([^"]+)"', page.html)):
        if u.startswith(cfg.doc_url): u = '/' + u.removeprefix(cfg.doc_url)
        if not u.startswith(('#cb', 'data:', 'style.css')): yield u

def is_broken(url, addr, pages, out, cache):
    "Does `url` on the page at `addr` point to a local page, anchor or file that is not there?"
    cfg,u = get_config(),urlparse(url)
    blob = f'{cfg.git_url}/blob/{cfg.branch}/'
    if url.startswith(blob): return not (cfg.config_path/url.removeprefix(blob).partition('#')[0]).exists()
    if u.scheme or u.netloc: return False
    path = unquote(u.path)
    path = path.lstrip('/') if path.startswith('/') else (Path(addr).parent/path).as_posix() if path else addr
    path = {p.src:a for a,p in pages.items()}.get(path, path) or 'index.html'
    if path in pages: return bool(u.fragment) and u.fragment.lower() not in ids(pages[path])
    return not (out/path).is_file() and not (cache/path).is_file()

@call_parse(pos=['out'])
def main(
    out:str='_check', # Folder for the pages
    n_workers:int=2, # Notebooks at a time
):
    "Render the docs pages and fail if a local link, anchor or picture is broken"
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out/'style.css').write_text(css)
    cache = proc_nbs(n_workers=n_workers, force=True)
    pages = dict(render(p, cache, out) for p in sorted(cache.rglob('*.ipynb')))
    bad = [f'{p.src}: broken link {u}' for a,p in pages.items() for u in links(p) if is_broken(u, a, pages, out, cache)]
    print(f'{len(pages)} pages in {out}, {sum(len(list(links(p))) for p in pages.values())} links, {len(bad)} broken')
    if bad: sys.exit('\n'.join(bad))
