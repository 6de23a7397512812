"Summaries and ensembles"
from functools import partial

import pytest, torch
from torch import nn

from fastreid_nb.backbone.resnet import resnet18
from fastreid_nb.heads.ensemble import Ensemble
from fastreid_nb.heads.haa import haa
from fastreid_nb.heads.core import ReductionHead
from fastreid_nb.heads.rebuild import model_from_recipe
from fastreid_nb.heads.model import reid_model
from fastreid_nb.backbone.mobile import mobilenetv2
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.pooling.parts import FlattenPool
from fastreid_nb.heads.parts import mgn, pcb
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.heads import summary # the method; chkstyle: ignore
from fastreid_nb.eval.inference import embed_batches
from fastreid_nb.train.checkpoint import load_reid, save_reid
from fastreid_nb.heads.transreid import transreid
from fastreid_nb.backbone.vit import vit
from tiny_models import thin_resnets

makers = dict(r18=partial(reid_model, resnet18, 5), small=partial(reid_model, resnet18, 5, head=partial(ReductionHead, n_emb=32)),
    osnet=partial(reid_model, osnet, 5), mobile=partial(reid_model, mobilenetv2, 5), mgn=partial(mgn, resnet18, 5), pcb=partial(pcb, resnet18, 5, n_parts=2),
    transreid=partial(transreid, 'deit_tiny', 5, (64,32)), haa=partial(haa, resnet18, 5, n_global=32, n_strip=16),
    vit=partial(reid_model, partial(vit, 'deit_tiny', (64,32)), 5, pool=FlattenPool))

@pytest.fixture(autouse=True)
def thin():
    "Small networks where the number of channels does not matter"
    with thin_resnets(): yield

@pytest.mark.parametrize('name', makers)
def test_summary(name):
    model = makers[name]().train()
    hw = (64,32) if name in ('vit','transreid') else (96,32)
    s = model.summary(hw, bs=2, n_runs=1)
    assert s.params==sum(p.numel() for p in model.parameters()) and s.emb_size==model.eval()(torch.zeros(1, 3, *hw)).shape[1]
    assert s.ms>0 and 3<=len(s.stages)<=24 and str(s.emb_size) in repr(s) and '×'.join(map(str, hw)) in repr(s)
    assert sum(p for _,_,p in s.stages)>=(.9 if name=='transreid' else .99)*s.params   # its trunk keeps an unused block

def test_multiply_adds_against_a_hand_count():
    net = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    net.n_feat = 8
    model = reid_model(net, 5, head=partial(ReductionHead, n_emb=4))
    assert model.summary((10,6), bs=1, n_runs=1).macs==9*3*8*60 + 8*4 + 4*5

def test_summary_leaves_the_model_alone():
    model = reid_model(resnet18, 5)
    before = {k:v.clone() for k,v in model.state_dict().items()}
    model.summary((64,32), bs=2, n_runs=1)
    assert model.training and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match='at least 16'): model.summary((8,8))
    assert not any(m._forward_hooks for m in model.modules())

def test_summary_gives_every_layer_its_mode_back():
    model = reid_model(resnet18, 5).train()
    model.backbone.eval()
    model.summary((64,32), bs=1, n_runs=1)
    assert model.training and not model.backbone.training

def test_summary_takes_the_size_of_the_preproc():
    model = reid_model(resnet18, 5)
    model.preproc = Preproc((64,48))
    assert model.summary(bs=1, n_runs=1).size==(64,48)

def pair(**kw): return Ensemble([reid_model(resnet18, 5, head=partial(ReductionHead, n_emb=32)), mgn(resnet18, 5, n_emb=8)], **kw).eval()

@pytest.mark.parametrize('weights', [None, [1,1], [3,1]])
def test_ensemble_cosines_are_the_weighted_mean(weights):
    e,x = pair(weights=weights),torch.rand(4, 3, 96, 32)
    with torch.no_grad(): emb,own = e(x),[nn.functional.normalize(m(x), dim=1) for m in e.models]
    w = [o/sum(weights or [1,1]) for o in (weights or [1,1])]
    torch.testing.assert_close(emb@emb.T, sum(a*o@o.T for a,o in zip(w, own)))
    assert emb.shape==(4, 32+64)

def test_ensemble_trains_all_members():
    e,x = pair().train(),torch.rand(4, 3, 96, 32)
    out = e(x)
    assert len(out.logits)==8+8 and len(out.feat)==5+5 and out.logits[0] is out.logits[7] is not out.logits[8]
    sum(o.pow(2).sum() for o in (*out.logits, *out.feat)).backward()
    assert all(any(p.grad is not None and p.grad.any() for p in m.parameters()) for m in e.models)

def test_ensemble_hands_cameras_to_its_members():
    e,x = Ensemble([transreid('deit_tiny', 5, (64,32), n_cams=3)]).eval(),torch.rand(2, 3, 64, 32)
    dl = [(x, torch.tensor([0,1]), torch.tensor([2,1]))]
    with torch.no_grad(): torch.testing.assert_close(embed_batches(e, dl, progress=False), e(x, torch.tensor([2,1])))
    assert e.n_cams==3 and (e(x, torch.tensor([0,1]))-e(x, torch.tensor([2,1]))).abs().amax(1)[1]==0

def test_ensemble_is_saved(tmp_path):
    other = reid_model(resnet18, 5, preproc=Preproc(mean=(.5,)*3, std=(.5,)*3))
    e,x = Ensemble([reid_model(resnet18, 5), other], [1,2], [None,(48,32)]).eval(),torch.rand(2, 3, 64, 32)
    save_reid(tmp_path/'e.pt', e)
    with torch.no_grad(): torch.testing.assert_close(load_reid(tmp_path/'e.pt')(x), e(x))
    assert model_from_recipe(e.recipe).sizes==[None,(48,32)]

def test_ensemble_of_models_without_recipe_has_none():
    assert Ensemble([reid_model(resnet18, 5), reid_model(resnet18, 5)]).recipe is not None
    assert Ensemble([reid_model(resnet18, 5), nn.Identity()]).recipe is None

@pytest.mark.parametrize('kw', [dict(weights=[1]), dict(weights=[1,0]), dict(weights=[1,float('nan')]), dict(sizes=[None])])
def test_ensemble_bad_arguments(kw):
    with pytest.raises(ValueError, match='a positive weight and a size'): pair(**kw)

def test_ensemble_has_a_summary_and_is_saved_with_its_fields(tmp_path):
    e = pair()
    s,own = e.summary((96,32), bs=1, n_runs=1),[m.summary((96,32), bs=1, n_runs=1) for m in e.models]
    assert (s.params,s.macs,s.emb_size)==tuple(sum(getattr(o, k) for o in own) for k in ('params','macs','emb_size'))
    e.preproc,e.pids,e.threshold = Preproc((96,32)),[2,3,5],.5
    save_reid(tmp_path/'e.pt', e)
    back = load_reid(tmp_path/'e.pt')
    assert (back.preproc,back.pids,back.threshold,back.origin)==(Preproc((96,32)),[2,3,5],.5,None)

def test_members_keep_their_own_preproc(tmp_path):
    e = Ensemble([reid_model(resnet18, preproc=Preproc((32,16), mean=(m,)*3)) for m in (.4,.5)])
    save_reid(tmp_path/'e.pt', e)
    assert [o.preproc for o in load_reid(tmp_path/'e.pt').models]==[o.preproc for o in e.models] and e.sizes==[None,None]
