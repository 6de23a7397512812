"The demo in its short form: few identities and one epoch, through the command, the README and a Jupyter kernel"
import ast, os, re, shutil, subprocess, sys
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient
from nbdev.config import get_config
from nbdev.test import nb_test_cells
from PIL import Image
from save_nbs import kernel_env

root = Path(__file__).parents[1]
n_ids = 24 # three quarters of them must fill a batch of 16 identities
shorter = {r'toy_reid\(\)': f'toy_reid(n_ids={n_ids})', r'(fit_warmup_cos\(\s*(?:\w+\s*=\s*)?)\d+': r'\g<1>1'}

def shorten(code):
    "`code` with few identities and one epoch; fails if it does not say the full numbers any more"
    for pat,to in shorter.items():
        code,n = re.subn(pat, to, code)
        assert n, f'nothing matches {pat!r}, so this test would run the long form. Change the pattern, or the code:\n{code}'
    return code

@pytest.fixture(scope='module')
def cache(tmp_path_factory): return tmp_path_factory.mktemp('cache')

def run(cmd, cache, cwd):
    "What `cmd` prints, with fastai's data folder in `cache`; fails with all of it if `cmd` does"
    env = dict(os.environ, FASTAI_HOME=str(cache), MPLBACKEND='agg', PYTHONIOENCODING='utf-8')
    res = subprocess.run(list(map(str, cmd)), cwd=cwd, env=env, capture_output=True, encoding='utf-8', timeout=300)
    assert res.returncode==0, f'{res.stdout}\n{res.stderr}'
    return res.stdout

def demo(workers, cache, out):
    "What the command prints"
    reid = shutil.which('reid', path=Path(sys.executable).parent) or shutil.which('reid')
    assert reid, 'the command `reid` is missing: run pip install -e ".[dev]"'
    opts = dict(n_ids=n_ids, epochs=1, workers=workers, seed=3, precision='float32', cache=cache, out=out)
    return run([reid, 'demo', *(o for k,v in opts.items() for o in (f'--{k}', v))], cache, out.parent)

def table(text): return re.findall(r'^\W*(mAP|mINP|rank-\d+|queries \w+)\W+(.*?)\s*$', text, re.M)

@pytest.fixture(scope='module')
def alone(cache, tmp_path_factory):
    "Output folder and text of a run without workers"
    out = tmp_path_factory.mktemp('runs')/'workers0'
    return out,demo(0, cache, out)

def test_demo_command(alone):
    "It ends with the table, a checkpoint and a picture, and says where they are"
    out,text = alone
    assert {'mAP', 'mINP', 'rank-1', 'rank-5', 'rank-10'}<={k for k,_ in table(text)}
    with Image.open(out/'ranked_list.png') as im: assert min(im.size)>=200
    assert 'ranked_list.png' in text
    assert any(p.suffix in ('.pt', '.pth') and p.stat().st_size>1e6 and p.name in text for p in out.iterdir())

@pytest.mark.slow
def test_demo_workers(alone, cache, tmp_path):
    "The same seed gives the same table with 0 and with 2 workers"
    assert table(alone[1])==table(demo(2, cache, tmp_path/'workers2'))!=[]

def readme_python(): return re.search(r'^```python\n(.*?)^```', (root/'README.md').read_text(encoding='utf-8'), re.M|re.S)[1]

def test_demo_readme(cache, tmp_path):
    "The README's Python runs as it stands there, and its last line is the score"
    *_,last = ast.parse(code := shorten(readme_python())).body
    assert isinstance(last, ast.Expr)
    lines = code.splitlines()
    code = '\n'.join([*lines[:last.lineno-1], f'print({ast.unparse(last)})'])
    assert 'mAP' in run([sys.executable, '-c', code], cache, tmp_path)

@pytest.mark.slow   # README.md, whose Python runs above, is made of this notebook
def test_demo_notebook(cache, tmp_path):
    "index.ipynb runs in a Jupyter kernel, its slow cells included, and shows a score"
    fn,cfg = root/'nbs'/'index.ipynb',get_config(root)
    keep = {c.id for c in nb_test_cells(fn, cfg.tst_flags.split(), ['slow'])}
    nb = nbformat.read(fn, 4)
    nb.cells = [c for c in nb.cells if c.id in keep]
    sep = '\n#---\n'
    for c,src in zip(nb.cells, shorten(sep.join(c.source for c in nb.cells)).split(sep)): c.source,c.outputs = src,[]
    client = NotebookClient(nb, timeout=cfg.cell_timeout, resources={'metadata':{'path':str(tmp_path)}})
    client.execute(env=dict(kernel_env(root), FASTAI_HOME=str(cache)))
    outs = [o for c in nb.cells for o in c.outputs]
    assert any('mAP' in str(o) for o in outs)
