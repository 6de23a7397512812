"Monitors of a training: what they measure, when they stop, and that they leave no trace"
import math, warnings
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from tiny_models import TinyNet, tiny_dls
from fastreid_nb.augment.samplers import pk_batches
from fastreid_nb.heads.parts import pcb
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.train.core import reid_learner
from fastreid_nb.train.watch import (Watch, WatchBatches, WatchDistances, WatchGrads, WatchLoss, WatchLR, WatchRank, WatchTriplet,
    effective_rank)

class Blind(TinyNet):
    def forward(self, x): return 0*super().forward(x)+1

def train(dls, *cbs, net=TinyNet, n_epoch=2, lr=1e-3, **kwargs):
    learn = reid_learner(dls, net, dtype=torch.float32, **kwargs)
    learn.remove_cb(learn.score_reid)
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, lr, cbs=cbs)
    return learn

def stops(match, *args, **kwargs):
    with pytest.raises(ValueError, match=match): train(*args, **kwargs)

## Effective rank

@pytest.mark.parametrize('n,d', [(1,4), (5,5), (12,7)])
def test_effective_rank(n, d):
    "Between 1 and the smaller side; against the definition in numpy; no scale and no rotation changes it"
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    s = np.linalg.svd(x.numpy(), compute_uv=False)
    p = s/s.sum()
    want = math.exp(-(p*np.log(p)).sum())
    q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1)))[0]
    for o in (x, 7*x, x@q, x.half()): assert effective_rank(o).item()==pytest.approx(want, rel=5e-3)
    assert 1<=want<=min(n, d)+1e-6

def test_effective_rank_of_equal_rows_is_one():
    assert effective_rank(torch.ones(6, 4)).item()==pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(6, 4)).item()==1
    for bad in (torch.ones(4), torch.ones(0, 4), torch.ones(2, 2, 2)):
        with pytest.raises(ValueError, match='expected'): effective_rank(bad)

## When they look

def test_looks_every_n_steps(dls):
    seen = []
    class Look(Watch):
        def collect(self): self.rows.append(self.loss.detach())
        def diagnose(self, rows): seen.append((self.n_steps, len(rows)))
    train(dls, Look(every=2), n_epoch=3)
    n = 3*len(dls.train)
    assert seen==[(i, 2) for i in range(2, n+1, 2)]

def test_patience(dls):
    class Bad(Watch):
        def diagnose(self, rows): return 'bad' if self.n_steps!=2 else ''
    stops('step 4 of this fit, epoch .: bad', dls, Bad(every=1, patience=2), n_epoch=9)

@pytest.mark.parametrize('bad', [dict(every=0), dict(every=1.5), dict(patience=0)])
def test_refused(bad):
    with pytest.raises(ValueError, match='expected 1 or more'): Watch(**bad)

@pytest.mark.parametrize('make', [lambda: WatchRank(1), lambda: WatchRank(on='logits'), lambda: WatchTriplet(tol=-1), lambda: WatchBatches(k=0),
    lambda: WatchLR(least=-1), lambda: WatchDistances(bins=1), lambda: WatchDistances(on='map')])
def test_monitors_refuse(make):
    with pytest.raises(ValueError): make()

def test_nothing_waits_for_the_device(dls, monkeypatch):
    "Between two looks no tensor is asked for its value"
    def refuse(*args): raise AssertionError('waits for the device')
    class Off(Callback):
        order = 45.5
        def after_batch(self):
            for o in ('item','tolist','cpu','__bool__','__float__'): monkeypatch.setattr(torch.Tensor, o, refuse)
    class On(Callback):
        order = 46.5
        def after_batch(self): monkeypatch.undo()
    cbs = [WatchLoss(), WatchRank(), WatchTriplet(), WatchBatches(), WatchLR(), WatchDistances()]
    train(dls, *cbs, Off(), On(), n_epoch=1)

def test_training_is_the_same(dls):
    cbs = [o(every=1) for o in (WatchLoss, WatchRank, WatchTriplet, WatchBatches, WatchLR, WatchGrads, WatchDistances)]
    a,b = train(dls, *cbs),train(dls)
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))

def test_lr_find_is_left_alone(dls):
    learn = reid_learner(dls, TinyNet, dtype=torch.float32, cbs=WatchLR(every=1))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=4, start_lr=1e-12, show_plot=False)

## What they say

def test_terms_of_the_loss(dls):
    "Every step of every term, also those of a fit that an error ends"
    seen = []
    class Keep(Callback):
        run_valid = False
        def after_batch(self): seen.append({k:v.item() for k,v in self.loss_func.parts.items()})
        def after_backward(self):
            if self.epoch==1: raise KeyboardInterrupt
    learn = reid_learner(dls, TinyNet, dtype=torch.float32)
    learn.remove_cb(learn.score_reid)
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-3, cbs=[WatchLoss(), Keep()])
    got = learn.recorder.parts
    assert list(got)==['ce','triplet'] and len(got['ce'])==len(dls.train)
    for k,v in got.items(): assert v.tolist()==pytest.approx([o[k] for o in seen])

def test_loss_without_terms(dls):
    learn = train(dls, WatchLoss(), loss=lambda out, pid, camid: out.feat.pow(2).mean())
    assert list(learn.recorder.parts)==['loss'] and len(learn.recorder.plot_losses())==1

@pytest.mark.parametrize('margin,level', [(.3,'0.3'), (None,'0.693')])
def test_triplet_at_its_margin(dls, margin, level):
    loss = ReIDLoss(CrossEntropy(), TripletLoss(margin))
    stops(f'triplet has stayed at {level}', dls, WatchTriplet(every=1), net=Blind, loss=loss)
    train(dls, WatchTriplet(every=1), loss=loss)
    stops('no triplet term', dls, WatchTriplet(), loss=ReIDLoss(CrossEntropy()))

def test_two_triplets(dls):
    loss = ReIDLoss(TripletLoss(.3), TripletLoss(.5, on='emb'))
    stops('triplet1 has stayed at 0.3', dls, WatchTriplet(every=1), net=Blind, loss=loss)

def test_rank_of_parts(dls):
    "One part that collapsed is found among others, and named"
    class Half(Callback):
        order,run_valid = 40,False
        def after_pred(self): self.learn.pred = type(self.pred)(self.pred.logits, [self.pred.feat, 0*self.pred.feat+1], self.pred.emb)
    one = lambda out, pid, camid: out.logits.float().square().mean()
    stops(r'\(`feat\[1\]`\) have an effective rank of 1.00', dls, WatchRank(every=1), Half(), loss=one)

def test_rank(dls):
    stops('collapsed to a point', dls, WatchRank(every=1), net=Blind, loss=ReIDLoss(CrossEntropy()))
    cb = WatchRank(every=1)
    train(dls, cb)
    assert len(cb.ranks)==2*len(dls.train) and min(cb.ranks)>1.5

def test_part_models(dls):
    "Features of parts are joined"
    model = pcb(TinyNet, len(dls.pids), n_parts=2)
    model.preproc = dls.preproc
    cbs = WatchRank(every=1),WatchDistances(every=1)
    train(dls, *cbs, net=None, model=model, n_epoch=1)
    assert len(cbs[0].ranks)==len(cbs[1].pos)==len(dls.train)

@pytest.mark.parametrize('put,found', [(lambda plan, k: plan[0,:k], '4 to 8'), (lambda plan, k: plan[0,[0,0,0,4]], '3 to 5')])
def test_broken_batches(data, put, found):
    def odd(pids, p, k, rng):
        plan = pk_batches(pids, p, k, rng)
        plan[-1] = plan[0]
        plan[-1,k:2*k] = put(plan, k)
        return plan
    dls = tiny_dls(data, batches=odd)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        stops(f'in step {len(dls.train)} identities have', dls, WatchBatches(every=1))

def test_repeats_are_told_once(data):
    dls = tiny_dls(data, p=2, k=30)
    with pytest.warns(UserWarning, match='stand in their batch already') as said: train(dls, WatchBatches(every=1))
    assert sum('stand in' in str(o.message) for o in said)==1

@pytest.mark.parametrize('lr', [1e-30, 1e-12])
def test_dead_learning_rate(dls, lr):
    stops('the learning rate is dead', dls, WatchLR(every=1), lr=lr)
    train(dls, WatchLR(every=1), lr=1e-4)

def test_gradients(dls):
    "One length for each step, against a loop"
    want = []
    class Naive(Callback):
        order = 10.4
        def before_step(self): want.append(sum(p.grad.pow(2).sum() for p in self.model.parameters()).sqrt().item())
    cb = WatchGrads(every=2)
    train(dls, cb, Naive())
    assert cb.norms.tolist()==pytest.approx(want, rel=1e-4)
    cb = WatchGrads(every=2)
    train(dls, cb, GradientAccumulation(24))
    assert 0<len(cb.norms)<len(want)

def test_distances(dls):
    "All pairs of a batch are counted once"
    cb = WatchDistances(every=1)
    train(dls, cb, n_epoch=1)
    assert [(int(a.sum()), int(b.sum())) for a,b in zip(cb.pos, cb.neg)]==[(3*6, 3*16)]*len(dls.train)
    assert len(cb.plot())==2
