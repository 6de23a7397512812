"Figures of a seeded model, loader and ranking that must not change, and files of version 0.0.1 that must still load"
import json, zlib

import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelFitException

from fastreid_nb.all import *
from golden_files import golden_files, own

class Stop(Callback):
    "End the fit before its fourth step"
    def after_batch(self):
        if self.training and self.iter==3: raise CancelFitException()

@pytest.fixture(scope='module')
def want(): return json.loads(golden_files('seeded.json')[0].read_text())

@pytest.fixture(scope='module')
def data(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=24, seed=0, progress=False)

@pytest.fixture
def dls(data): return reid_dls(data, (128,64), 4, 4, num_workers=0, seed=0)

@pytest.fixture
def learn(dls): return reid_learner(dls, resnet18_ibn, seed=0, dtype=torch.float32)

def test_three_steps(learn, want):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=Stop())
    assert [float(o) for o in learn.recorder.losses]==pytest.approx(want['losses'], rel=5e-4)   # Adam makes much of rounding, which processors do differently

def test_first_map(learn, want): assert learn.evaluate(progress=False).mAP==pytest.approx(want['first_mAP'], rel=1e-4)

def test_batch(dls, want):
    xb,pid,camid = next(iter(dls.train))
    x = (xb.as_subclass(torch.Tensor)*255).round().long()
    weighted = int((x.flatten()*torch.arange(x.numel())%9973).sum())
    assert want['batch']==dict(sum=int(x.sum()), weighted=weighted, pid=pid.tolist(), camid=camid.tolist())

def test_ranking(want):
    rng = np.random.default_rng(0)
    q,g = (dict(pid=rng.integers(0, 20, n), camid=rng.integers(0, 3, n)) for n in (30,200))
    res = rank_dist(torch.from_numpy(rng.random((30,200))).round(decimals=2), q, g, 'market')   # many ties
    assert want['ranking']==dict(mAP=pytest.approx(res.mAP), mINP=pytest.approx(res.mINP), top=res.top[:,:5].tolist())

old_recipes = json.loads((own/'recipes_0.0.1.json').read_text())

def shapes_of(model):
    "What a golden file keeps of the names and shapes of a model"
    state = model.state_dict()
    return dict(shapes=zlib.crc32(json.dumps({k:list(v.shape) for k,v in state.items()}).encode()), n=len(state))

@pytest.mark.parametrize('name', old_recipes)
def test_old_recipe(name):
    "Same weights as in version 0.0.1, and a recipe of today that makes them too"
    if name=='timm': pytest.importorskip('timm')
    old = old_recipes[name]
    model = model_from_recipe(old['recipe'])
    assert shapes_of(model)==dict(shapes=old['shapes'], n=old['n'])
    again = model_from_recipe(json.loads(json.dumps(model.recipe)))
    assert shapes_of(again)==shapes_of(model) and 'fastreid_nb' not in json.dumps(model.recipe)

def test_old_checkpoint():
    path,told = own/'checkpoint_0.0.1.pt',own/'checkpoint_0.0.1.json'
    x = torch.linspace(0, 1, 3*64*32).view(1, 3, 64, 32).sin().abs()
    with torch.no_grad(): emb = load_reid(path)(x)
    torch.testing.assert_close(emb[0], torch.tensor(json.loads(told.read_text())), rtol=1e-4, atol=1e-4)
