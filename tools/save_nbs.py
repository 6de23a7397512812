"Run notebooks in a Jupyter kernel and store their outputs, so that training tables and plots look as a reader would see them"
import os
from base64 import b64decode, b64encode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
import nbformat
from PIL import Image
from fastcore.script import call_parse
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import nb_test_cells

retina = '--InlineBackend.figure_formats=retina'

def kernel_env(
    root:Path, # Folder of the repository, so that its package is found without being installed
)->dict: # Environment variables
    "What kernels start with: plots go into the notebook, warnings with paths do not, sums add up in the same order everywhere"
    return dict(os.environ, MPLBACKEND='module://matplotlib_inline.backend_inline', PYTHONWARNINGS='ignore', PYTHONPATH=str(root),
        OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'))

def shrink(
    out:dict, # Output of a cell, changed in place
    most:int=60_000, # Characters a PNG may have
):
    "Store a figure full of photographs as JPEG: as PNG it would be much larger"
    png = out.get('data', {}).get('image/png')
    if not png or len(png)<=most: return
    Image.open(BytesIO(b64decode(png))).convert('RGB').save(buf := BytesIO(), 'jpeg', quality=72, optimize=True)
    jpg = b64encode(buf.getvalue()).decode()
    if len(jpg)>.95*len(png): return
    for d,v in ((out['data'],jpg), (out.metadata,out.metadata.get('image/png'))):
        d.pop('image/png', None)
        if v is not None: d['image/jpeg'] = v

def save_nb(
    fn:Path, # Notebook, rewritten in place
    flags:list, # Flags of cells to run although `tst_flags` has them
):
    "Run `fn` and store its outputs; cells that `nbdev-test` would skip keep the outputs they have"
    cfg,nb = get_config(fn.parent),nbformat.read(fn, 4)
    run = {c.id for c in nb_test_cells(fn, cfg.tst_flags.split(), flags)}
    for c in nb.cells:
        if c.cell_type=='code' and c.id not in run: c.metadata['tags'] = ['skip-execution']
    client = NotebookClient(nb, timeout=cfg.cell_timeout, extra_arguments=[retina], resources={'metadata':{'path':str(fn.parent)}})
    client.execute(env=kernel_env(cfg.config_path))
    for c in nb.cells:
        for o in c.get('outputs', []): shrink(o)
    nbformat.write(nb, fn)
    nbdev_clean.__wrapped__(str(fn))

@call_parse(pos=['path'])
def main(
    path:str='', # Notebook or folder; all notebooks when empty
    flags:str='', # Flags to run that are normally skipped, separated by spaces
    n_workers:int=2, # Kernels at a time
):
    "Run notebooks in a Jupyter kernel and store their outputs"
    fns = [Path(path)] if Path(path).is_file() else sorted(nbglob(path or None, as_path=True))
    with ThreadPoolExecutor(n_workers) as ex: list(ex.map(lambda fn: save_nb(fn.resolve(), flags.split()), fns))
