"The trial for a learning rate leaves no trace, the best epoch is kept, and a frozen body stays as it was"
import pytest, torch
from fastai.callback.core import Callback

from fastreid_nb.data.subsets import *
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.memory import CenterLoss
from fastreid_nb.train.averages import EMA
from fastreid_nb.train.core import reid_learner
from fastreid_nb.train.finetune import KeepBest
from tiny_models import TinyNet, tiny_dls

@pytest.fixture(scope='module')
def dls(data): return tiny_dls(data.holdout(.3))

@pytest.fixture
def learn(dls, tmp_path):
    l = reid_learner(dls, TinyNet, dtype=torch.float32, path=tmp_path)
    with l.no_bar(), l.no_logging(): yield l

def weights(learn, part=''): return {k:v.clone() for k,v in learn.model.state_dict().items() if k.startswith(part)}
def same(a, b): return all(torch.equal(a[k], b[k]) for k in a)

class Trip(Callback):
    def __init__(self, exc, at): self.exc,self.at = exc,at
    def after_step(self):
        if self.train_iter==self.at: raise self.exc

@pytest.mark.parametrize('exc', [None, KeyboardInterrupt, ZeroDivisionError])
def test_a_trial_leaves_no_trace(learn, exc):
    learn.fit(1, 1e-3)
    before = weights(learn)
    if exc is None: assert learn.lr_find(num_it=20, show_plot=False).valley>0
    else:
        learn.add_cb(Trip(exc('stop'), 12))
        with pytest.raises(exc): learn.lr_find(num_it=20, show_plot=False)
        learn.remove_cb(Trip)
    assert same(before, weights(learn)) and learn.model.n_epochs==1
    learn.fit(1, 1e-3)

def test_a_trial_may_diverge(learn):
    "NaN at a learning rate of 10 is what the trial is for"
    before = weights(learn)
    learn.loss_func = lambda out, pid, camid: out.feat.mean()*(float('nan') if learn.train_iter>=14 else 1.)
    learn.lr_find(num_it=20, show_plot=False, stop_div=False)
    assert same(before, weights(learn))

@pytest.mark.parametrize('epochs,patience', [(0,None), (0,2), (2,None)])
def test_a_frozen_body_stays(learn, epochs, patience):
    "After earlier training too, whose gradients and averages are still there, and with a large decay"
    learn.fit(1, 1e-2)
    before,head = weights(learn, 'backbone.'),weights(learn, 'head.')
    learn.wd = .5
    learn.fine_tune(epochs, 1e-2, freeze_epochs=2, patience=patience)
    before.pop('backbone.1.num_batches_tracked')
    assert same(before, weights(learn))==(not epochs) and not same(head, weights(learn))
    assert all(p.requires_grad for p in learn.model.parameters())

def test_the_body_learns_slowly(learn):
    seen = []
    class Watch(Callback):
        def after_batch(self):
            if self.training: seen.append([float(o['lr']) for o in self.opt.hypers])
    learn.fine_tune(2, 2e-3, freeze_epochs=0, lr_mult=10, cbs=Watch())
    assert all(a*10==pytest.approx(b) for a,b in seen) and max(b for _,b in seen)==pytest.approx(1e-3)

def test_the_best_epoch_is_kept(learn):
    maps = []
    class Note(Callback):
        order = 64
        def after_epoch(self): maps.append((self.learn.reid_result.mAP,weights(self.learn)))
    learn.fit(8, .5, cbs=[KeepBest(2), Note()])
    best = max(range(len(maps)), key=lambda i: maps[i][0])
    assert same(maps[best][1], weights(learn)) and len(maps)==min(8, best+3)

def test_what_is_kept_is_forgotten(learn):
    cb = KeepBest(3)
    with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-3, cbs=[cb, Trip(KeyboardInterrupt(), 5)])
    assert cb.state is None

@pytest.mark.parametrize('kw,match', [(dict(epochs=-1),'epochs=-1'), (dict(epochs=0, freeze_epochs=0),'nothing would be learned'), (dict(epochs=1, base_lr=0),'lr=0'),
    (dict(epochs=1, lr_mult=0),'lr_mult=0'), (dict(epochs=1, patience=0),'patience=0'), (dict(epochs=1.5),'epochs=1.5')])
def test_bad_settings(learn, kw, match):
    with pytest.raises(ValueError, match=match): learn.fine_tune(**kw)

@pytest.mark.parametrize('kwargs', [dict(start_lr=0), dict(start_lr=float('nan')), dict(num_it=0), dict(start_lr=1., end_lr=.1)])
def test_trials_of_nonsense(learn, kwargs):
    with pytest.raises(ValueError, match='expected'): learn.lr_find(**kwargs, show_plot=False)

@pytest.mark.parametrize('kwargs,match', [(dict(freeze_iters=3), 'freeze_epochs instead'), (dict(base_lr=slice(1e-4, 1e-3)), 'base_lr='), (dict(base_lr=0), 'base_lr=0')])
def test_fine_tuning_of_nonsense(learn, kwargs, match):
    with pytest.raises(ValueError, match=match): learn.fine_tune(1, **kwargs)

def test_what_keepbest_cannot_choose(learn):
    with pytest.raises(ValueError, match="expected keep='average'"): learn.fit(1, 1e-3, cbs=[KeepBest(), EMA(keep='trained')])
    learn.remove_cb(learn.score_reid)
    with pytest.raises(ValueError, match='no scores to choose by'): learn.fine_tune(1, patience=1)

def test_keepbest_keeps_the_loss(dls):
    "Centres of the best epoch, as the weights beside them"
    l = reid_learner(dls, TinyNet, loss=ReIDLoss(CrossEntropy(), CenterLoss(len(dls.pids), TinyNet.n_feat)), dtype=torch.float32)
    seen = []
    class Note(Callback):
        order = 70
        def after_epoch(self): seen.append((self.learn.reid_result.mAP, self.learn.loss_func['center'].centers.detach().clone()))
    with l.no_bar(), l.no_logging(): l.fit(4, 3e-2, cbs=[KeepBest(None), Note()])
    best = max(range(4), key=lambda i: seen[i][0])
    assert torch.equal(l.loss_func['center'].centers, seen[best][1])
