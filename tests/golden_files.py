"Finding golden files: inputs and outputs of the reference implementation, in `tests/golden/` or the folder named by GOLDEN"
import os
from pathlib import Path

import pytest, torch

own = Path(__file__).parent/'golden'

def golden_dir()->Path:
    "The folder in the environment variable GOLDEN, or else our own copies"
    d = Path(os.environ.get('GOLDEN') or own)
    if not d.is_dir(): raise FileNotFoundError(f'GOLDEN names {d}, which is not a folder')
    return d

def is_own()->bool:
    "Do the files come from `tests/golden/`, where nothing may be missing?"
    return golden_dir().resolve()==own.resolve()

def golden_files(pattern)->list[Path]:
    "Files of `golden_dir()` that match `pattern`, such as 'rank/*.npz', sorted; none gives an empty list"
    return sorted(p for p in golden_dir().glob(pattern) if p.is_file())

def missing(what):
    "End a test whose file, layer or model is not there: a failure in `tests/golden/`, a skip in another folder"
    if is_own(): pytest.fail(f'{what}: missing or not built, though tests/golden promises it')
    pytest.skip(f'{what}: not in {golden_dir()}, or not built yet')

def golden_params(pattern, slow=())->list:
    "What to parametrise a test over: the files, those that begin with `slow` as slow tests, or one `None` that the test hands to `missing`"
    def param(p): return pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if slow and p.name.startswith(slow) else [])
    return [param(p) for p in golden_files(pattern)] or [pytest.param(None, id=f'no {pattern}')]

def close(a, b, rel=1e-5, tiny=1e-12):
    "Assert that `a` equals `b` within `rel` of the largest value of `b`, or `tiny` where all of `b` is 0"
    a,b = (torch.as_tensor(o).detach().double() for o in (a,b))
    assert a.shape==b.shape, f'{tuple(a.shape)} is not {tuple(b.shape)}'
    err = (a-b).abs().max()
    assert err<=max(rel*b.abs().max(), tiny), f'off by {err:.2g} where the largest value is {b.abs().max():.2g}'
