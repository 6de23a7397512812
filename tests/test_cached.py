"Heads on cached features: the same training as with a frozen backbone, and a whole model at the end"
from functools import partial
import pytest, torch
from fastai.callback.core import Callback
from fastcore.basics import noop
from torch import nn
from tiny_models import TinyNet, tiny_dls
from fastreid_nb.augment.core import hflip, pad_crop
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.backbone.resnet import resnet18
from fastreid_nb.backbone.timmnets import timm_backbone
from fastreid_nb.heads.core import BNNeckHead, LinearHead, ReductionHead
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.parts import pcb
from fastreid_nb.pooling.core import GeM, GlobalAvgPool
from fastreid_nb.train.cached import FeatureModel, cached_learner, in_order, pooled_features, train_views
from fastreid_nb.train.checkpoint import load_reid
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.memory import CenterLoss
from fastreid_nb.train.core import reid_learner
from fastreid_nb.train.groups import ParamGroups

class CameraNet(TinyNet):
    n_cams = 6
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.arange(6)/10)
    def forward(self, x, camid): return super().forward(x + self.offset[camid].view(-1, 1, 1, 1))

def learner(dls, net=TinyNet, dtype=torch.float32, **kwargs):
    "A learner that writes nothing"
    learn = reid_learner(dls, net, dtype=dtype, **kwargs)
    learn.logger = noop
    learn.remove_cb(learn.progress)
    return learn

def values(model): return {k:v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.mark.parametrize('head', [BNNeckHead, LinearHead, partial(ReductionHead, n_emb=6)])
def test_the_same_training(dls, head):
    "Without augmentation, losses, head and scores are those of a fit with a frozen backbone"
    slow,fast = (learner(dls, pool=GlobalAvgPool, head=head) for _ in range(2))
    slow.fit_warmup_cos(2, 1e-2, freeze_iters=10**6)
    small = fast.fit_head(2, 1e-2, flip=False)
    assert torch.allclose(torch.stack(slow.recorder.losses), torch.stack(small.recorder.losses), atol=1e-4)
    a,b = values(slow.model),values(fast.model)
    for k in a: assert torch.allclose(a[k].float(), b[k].float(), atol=1e-4), k
    assert [o[1] for o in slow.recorder.values]==pytest.approx([o[1] for o in small.recorder.values], abs=1e-4)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_only_the_head_changes(data, dtype):
    learn = learner(tiny_dls(data, [hflip,pad_crop]), pool=GeM, dtype=dtype)
    before = values(learn.model)
    small = learn.fit_head(2, 1e-2, n_augs=1)
    moved = {k for k,v in values(learn.model).items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith('head.') for k in moved)
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.model.n_epochs==2
    assert learn.evaluate(progress=False).mAP==pytest.approx(small.reid_result.mAP, abs=.02 if dtype==torch.bfloat16 else 1e-4)
    learn.fit(1, 1e-3)
    assert learn.model.n_epochs==3

def test_result_is_a_whole_model(dls, tmp_path):
    learn = learner(dls, resnet18)
    learn.fit_head(1, 1e-3)
    learn.save_reid(tmp_path/'m.pt')
    back = load_reid(tmp_path/'m.pt')
    x = torch.rand(2,3,32,16)
    assert torch.allclose(back(x), learn.model.eval()(x), atol=1e-5) and back.pids==list(dls.pids) and back.n_epochs==1

def test_views(data):
    "Plain, mirrored, then augmented ones that differ; the same for a seed"
    dls = tiny_dls(data, [pad_crop])
    model = learner(dls).model.eval()
    a,b = (train_views(model, dls.train, torch.float32, True, 2) for _ in range(2))
    assert torch.equal(a, b) and a.shape==(4, len(data.train), 8)
    x = torch.stack([dls.preproc.load(p) for p in data.train.path]).float().div(255).as_subclass(torch.Tensor)
    with torch.no_grad():
        for view,imgs in ((a[0],x), (a[1],x.flip(3))): assert torch.allclose(view, model.pool(model.fmap(imgs)), atol=1e-4)
    assert not torch.equal(a[2], a[3]) and not torch.equal(a[0], a[2])

def test_every_view_is_drawn(dls):
    learn = learner(dls)
    small = cached_learner(learn, n_augs=1)
    feats,seen = small.dls.train.feats,set()
    for _ in range(5):
        for x,*_ in small.dls.train:
            i = (x[:,None,None]==feats[None]).all(-1).any(2).float().argmax(1)
            seen |= set(i.tolist())
    assert len(feats)==3 and {0,1}<=seen

@pytest.mark.parametrize('n,bs', [(1,4), (4,4), (9,4)])
def test_in_order(n, bs):
    plan = in_order(range(n), bs, 1, None)
    assert plan.shape==(-(-n//bs), bs) and plan.ravel()[:n].tolist()==list(range(n)) and plan.max()<n

def test_cameras(dls):
    "A backbone that knows cameras is given them"
    learn = learner(dls, CameraNet)
    feats = pooled_features(learn.model, dls.valid)
    x,_,camid = next(iter(dls.valid))
    with torch.no_grad(): want = learn.model.eval().pool(learn.model.fmap(x, camid))
    assert torch.allclose(feats[:len(x)], want, atol=1e-5)
    learn.fit_head(1, 1e-3)

def test_settings_of_the_learner(dls):
    "Loss, its parameters, learning rate and decay are those of the learner"
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.ones(1))
        def forward(self, out, pid, camid): return nn.functional.cross_entropy(self.s*out.logits.float(), pid)
    loss = Scaled()
    learn = learner(dls, loss=loss, lr=5e-3, wd=1e-2)
    small = learn.fit_head(2)
    assert small.loss_func is loss and loss.s.item()!=1 and (small.lr,small.wd)==(5e-3,1e-2)
    assert max(small.recorder.lrs)==pytest.approx(5e-3)

@pytest.mark.parametrize('exc', [KeyboardInterrupt, ZeroDivisionError])
def test_stopped(dls, exc):
    "Nothing is frozen, in whatever epoch or batch it ends"
    class Trip(Callback):
        def after_backward(self):
            if self.epoch==1: raise exc('stop')
    learn = learner(dls)
    modes = [o.training for o in learn.model.modules()]
    with pytest.raises(exc): learn.fit_head(3, cbs=Trip())
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.model.n_epochs==1
    assert not learn.model._forward_hooks and [o.training for o in learn.model.backbone.modules()]==modes[1:1+len(list(learn.model.backbone.modules()))]
    learn.fit_head(1)

def test_error_while_embedding_leaves_modes(dls):
    learn = learner(dls)
    learn.model.train()
    def fail(x): raise KeyboardInterrupt
    learn.model.pool.forward = fail
    with pytest.raises(KeyboardInterrupt): learn.fit_head(1)
    assert all(o.training for o in learn.model.modules())

def test_refused(dls):
    parts = pcb(TinyNet, len(dls.pids), n_parts=2, preproc=dls.preproc)
    with pytest.raises(ValueError, match='a part model keeps layers in its head'): learner(dls, model=parts).fit_head(1)
    with pytest.raises(ValueError, match='has no backbone, pool and head'):
        learner(dls, model=torch.compile(reid_model(TinyNet, len(dls.pids), preproc=dls.preproc), backend='eager')).fit_head(1)
    for kwargs,match in ((dict(n_epoch=0), 'n_epoch=0'), (dict(n_epoch=1, n_augs=-1), 'n_augs=-1'), (dict(n_epoch=1, lr=-1), 'lr=-1')):
        with pytest.raises(ValueError, match=match): learner(dls).fit_head(**kwargs)

def test_feature_model_shares_the_head(dls):
    model = learner(dls).model.eval()
    x = torch.rand(3,3,32,16)
    with torch.no_grad(): assert torch.allclose(FeatureModel(model).eval()(model.pool(model.fmap(x))), model(x), atol=1e-6)
    assert FeatureModel(model).head is model.head

def test_a_network_of_timm(data):
    "Heads on its cached features learn what they learn behind the frozen network"
    pytest.importorskip('timm')
    dls = reid_dls(data, (64,32), p=3, k=4, augs=[], num_workers=0)
    slow,fast = (learner(dls, partial(timm_backbone, 'mobilenetv3_small_050', pretrained=False), pool=GlobalAvgPool) for _ in range(2))
    slow.fit_warmup_cos(1, 1e-2, freeze_iters=10**6)
    fast.fit_head(1, 1e-2, flip=False)
    a,b = (o.model.head.classifier.weight.cpu() for o in (slow,fast))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_groups_and_centres_come_along(dls):
    "Centres learn at their own rate, as in a fit with a frozen backbone"
    def made():
        loss = ReIDLoss(CrossEntropy(), CenterLoss(len(dls.pids), TinyNet.n_feat))
        return learner(dls, pool=GlobalAvgPool, loss=loss, cbs=ParamGroups(loss_lr=1000))
    slow,fast = made(),made()
    slow.fit_warmup_cos(2, 1e-3, freeze_iters=10**6)
    fast.fit_head(2, 1e-3, flip=False)
    a,b = (o.loss_func['center'].centers for o in (slow,fast))
    assert torch.allclose(a, b, atol=1e-3) and a.abs().max()>.5
