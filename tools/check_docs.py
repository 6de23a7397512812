"Render the docs pages by nbdev and pandoc, without Quarto, follow every local link, and count what spoils reading"
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
here = Path(__file__).parent

def pandoc(
    text:str, # What to convert
    *args, # Command line of pandoc
)->str: # The converted text
    "Convert `text` by pandoc"
    res = subprocess.run([pypandoc.get_pandoc_path(), *args], input=text, capture_output=True, encoding='utf-8')
    if res.returncode: raise RuntimeError(f'pandoc {" ".join(args)}: {res.stderr}')
    return res.stdout

## Cells as markdown

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

def folded(opts, parts):
    "Source behind a line that opens it"
    summary = html.escape(opts.get('code-summary', 'Code'))
    return [f'```{{=html}}\n<details><summary>{summary}</summary>\n```', *parts, '```{=html}\n</details>\n```']

def cell_md(cell, name, pics):
    "Markdown for one cell of a notebook that nbdev has processed"
    opts,src = directives(joined(cell['source']))
    if cell['cell_type']=='markdown': return [src]
    if cell['cell_type']!='code' or opts.get('include')=='false': return []
    kind = opts.get('classes', 'example')
    res = [block(src, 'python', 'cell', kind)] if opts.get('echo')!='false' and src.strip() else []
    if res and opts.get('code-fold')=='true': res = folded(opts, res)
    if opts.get('output')=='false': return res
    return res + [output_md(o, opts, name, pics) for o in cell.get('outputs', [])]

def notebook_md(path):
    "A processed notebook as front matter, markdown and pictures"
    cells,pics = json.loads(path.read_text(encoding='utf-8'))['cells'],{}
    raw = next((joined(c['source']) for c in cells if c['cell_type']=='raw'), '')
    return yaml.safe_load(raw.strip().strip('-')) or {},'\n\n'.join(o for c in cells for o in cell_md(c, path.stem, pics)),pics

def page_md(
    path:Path, # Notebook or text that `proc_nbs` has written
)->tuple: # Front matter (dict), markdown (str), pictures (dict from file name to bytes)
    "A processed page as pandoc's markdown, and the pictures in its outputs"
    if path.suffix=='.ipynb': return notebook_md(path)
    _,meta,md = path.read_text(encoding='utf-8').split('---\n', 2)
    return yaml.safe_load(meta),md,{}

## Pages

def side(entries, names, here):
    "The sidebar, and the arrows at the foot of the page"
    from fastreid_nb._site import sidebar
    pages = [o for o in sidebar() if o.file in names]
    i = next((i for i,o in enumerate(pages) if o.file==here), None)
    link = lambda o: f'<a href="{names[o.file]}">{html.escape(entries[o.file])}</a>'
    items,chapter = [],''
    for o in pages:
        if o.chapter!=chapter: items.append(f'<li class="chapter">{o.chapter}</li>')
        chapter = o.chapter
        items.append(f'<li>{link(o)}</li>')
    arrows = [] if i is None else [('previous', pages[i-1] if i else None), ('next', pages[i+1] if i+1<len(pages) else None)]
    foot = ''.join(f'<span class="{k}">{link(o)}</span>' for k,o in arrows if o)
    return f'<nav id="side"><ul>{"".join(items)}</ul></nav>',f'<nav id="arrows">{foot}</nav>'

def render(path, cache, out, titles, names):
    "Write the page of one processed notebook or text to `out`; returns its address and `Page`"
    meta,md,pics = page_md(path)
    src = path.relative_to(cache)
    dst = out/src.parent/names[src.as_posix()]
    dst.parent.mkdir(parents=True, exist_ok=True)
    for name,data in pics.items(): (dst.parent/name).write_bytes(data)
    title = meta.get('title', path.stem)
    md = f'# {title} {{.unnumbered}}\n\n[{meta.get("description", "")}]{{.sub}}\n\n{md}'
    lua = f'--lua-filter={cache/"symbols.lua"}'
    text = pandoc(md, '-f', reader, '-t', 'html5', '-s', '--toc', '--mathml', '-c', 'style.css', '-M', f'pagetitle={title}', lua)
    bar,arrows = side(titles, names, src.as_posix())
    text = re.sub(r'<body>', lambda m: f'<body>\n{bar}\n<main>', text, count=1)
    text = text.replace('</body>', f'{arrows}\n</main>\n</body>')
    dst.write_text(text, encoding='utf-8')
    return dst.relative_to(out).as_posix(),Page(src.as_posix(), text)

def build(
    out:Path, # Folder for the pages
    n_workers:int=2, # Notebooks at a time
)->tuple: # Folder of the processed notebooks, and a dict from address to `Page`
    "Render all pages"
    out.mkdir(parents=True, exist_ok=True)
    (out/'style.css').write_text((here/'pages.css').read_text(encoding='utf-8'), encoding='utf-8')
    cache = proc_nbs(n_workers=n_workers, force=True)
    paths = sorted([*cache.rglob('*.ipynb'), *cache.rglob('*.qmd')])
    metas = {p.relative_to(cache).as_posix():page_md(p)[0] for p in paths}
    names = {k:m.get('output-file', Path(k).with_suffix('.html').name) for k,m in metas.items()}
    titles = {k:m.get('title', k) for k,m in metas.items()}
    return cache,dict(render(p, cache, out, titles, names) for p in paths)

## Links

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
    "Render the docs pages and fail if a local link, anchor or picture is broken, or if something spoils reading"
    from page_faults import page_faults
    out = Path(out)
    cache,pages = build(out, n_workers)
    bad = [f'{p.src}: broken link {u}' for a,p in pages.items() for u in links(p) if is_broken(u, a, pages, out, cache)]
    n_links = sum(len(list(links(p))) for p in pages.values())
    faults = page_faults(pages)
    print(f'{len(pages)} pages in {out}, {n_links} links, {len(bad)} broken')
    print('faults of pages:', ', '.join(f'{k} {len(v)}' for k,v in faults.items()))
    bad += [o for v in faults.values() for o in v]
    if bad: sys.exit('\n'.join(bad))
