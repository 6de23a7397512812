"Averages of weights, and BatchNorm statistics as plain means"
import numpy as np, pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.training import GradientAccumulation, GradientClip
from torch import nn
from golden_files import close, golden_params, missing
from tiny_models import TinyNet
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.train.averages import EMA, SWA, move_to, precise_bn, swap, tensors_of
from fastreid_nb.train.core import reid_learner
from fastreid_nb.train.schedules import FreezeBackbone

def values(model): return [o.clone() for o in tensors_of(model)]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b))

## Golden files

class RefNet(nn.Module):
    "The reference's tiny network"
    def __init__(self):
        super().__init__()
        self.conv,self.bn,self.bn1 = nn.Conv2d(3, 5, 3),nn.BatchNorm2d(5),nn.BatchNorm1d(5)
    def forward(self, x): return self.bn1(self.bn(self.conv(x)).relu().mean((2,3)))

@pytest.mark.parametrize('path', golden_params('precise_bn*.npz'))
def test_precise_bn_golden(path):
    if path is None: missing('precise_bn*.npz')
    d = np.load(path)
    net = RefNet()
    net.load_state_dict({k[6:]:torch.from_numpy(d[k]) for k in d if k.startswith('state.')}, strict=False)
    after = [k for k in d if k.startswith('after')]
    assert after
    for k in after:
        n,name = k.split('.', 1)
        precise_bn(net, torch.from_numpy(d['batches']), int(n[5:]))
        close(net.state_dict()[name], d[k])

@pytest.mark.parametrize('path', golden_params('distillation*.npz'))
def test_ema_golden(path):
    if path is None: missing('distillation*.npz')
    d = np.load(path)
    teacher,student = (torch.from_numpy(d[k]).clone() for k in ('ema_teacher0','ema_student'))
    for want in d['ema_m0_999_after']:
        move_to([teacher], [student], 1-.999)
        close(teacher, want)

## Averages

@pytest.mark.parametrize('warmup', [True,False])
def test_ema_against_a_loop(learn, warmup):
    class Naive(Callback):
        run_valid = False
        def before_fit(self): self.avg,self.n = values(self.model),0
        def after_step(self):
            d = min(.9, (1+self.n)/(10+self.n)) if warmup else .9
            self.n += 1
            self.avg = [d*a+(1-d)*o if o.is_floating_point() else o.clone() for a,o in zip(self.avg, tensors_of(self.model))]
    naive = Naive()
    learn.fit(2, 1e-2, cbs=[EMA(.9, warmup), naive])
    for a,b in zip(tensors_of(learn.model), naive.avg): assert torch.allclose(a.double(), b.double(), atol=1e-5)

def test_ema_changes_nothing_in_training(dls):
    def run(*cbs):
        l = reid_learner(dls, TinyNet, dtype=torch.float32)
        with l.no_bar(), l.no_logging(): l.fit(3, 1e-2, cbs=cbs)
        return values(l.model),[o[1] for o in l.recorder.values],[o[-2] for o in l.recorder.values]
    plain,trained = run(),run(EMA(.9, keep='trained'))
    assert same(plain[0], trained[0]) and plain[1]==pytest.approx(trained[2])

def test_columns(learn):
    "Scored epochs have both scores, the others none; the last row is the model that is left"
    learn.score_reid.every = 2
    learn.fit(3, 1e-2, cbs=EMA(.5))
    assert list(learn.recorder.metric_names)==['epoch','train_loss','mAP','rank-1','trained_mAP','trained_rank-1','time']
    rows = np.array(learn.recorder.values, dtype=float)
    assert rows.shape==(3,5) and np.isnan(rows[0,1:]).all() and np.isfinite(rows[1:]).all()
    assert learn.evaluate(progress=False).mAP==pytest.approx(rows[-1,1])
    learn.fit(1, 1e-2, cbs=EMA(.5, both=False))
    assert list(learn.recorder.metric_names)==['epoch','train_loss','mAP','rank-1','time']

def test_validate_outside_a_fit(learn):
    "A callback that stays with the learner does nothing outside fits, and leaves `lr_find` alone"
    learn.add_cb(EMA(.9))
    before = values(learn.model)
    assert len(learn.validate())==2
    learn.lr_find(num_it=4, show_plot=False)
    assert same(values(learn.model)[:4], before[:4])

class Trip(Callback):
    order = 80
    def __init__(self, event, exc, cb): self.event,self.exc,self.cb = event,exc,cb
    def __call__(self, name):
        if name!=self.event or self.learn.epoch!=1: return
        self.want = [o.clone() for o in (self.cb.avg if self.cb.swapped else self.cb.now)]
        raise self.exc

@pytest.mark.parametrize('make', [EMA, lambda: SWA(0, n_bn=2)])
@pytest.mark.parametrize('event,exc', [('after_step',KeyboardInterrupt), ('before_validate',ZeroDivisionError), ('after_pred',KeyboardInterrupt),
    ('after_validate',ZeroDivisionError), ('after_epoch',KeyboardInterrupt)])
def test_trained_weights_come_back(learn, event, exc, make):
    cb = make()
    trip = Trip(event, exc(), cb)
    with pytest.raises(exc): learn.fit(3, 1e-2, cbs=[cb, trip])
    assert same(trip.want, tensors_of(learn.model)) and cb.avg is None
    learn.fit(1)

def test_early_end_keeps_the_average(learn):
    class Stop(Callback):
        def after_epoch(self):
            self.want = values(self.model)
            raise CancelFitException
    stop = Stop()
    learn.fit(3, 1e-2, cbs=[EMA(.9), stop])
    assert len(learn.recorder.values)<=1
    assert same(stop.want, tensors_of(learn.model))

def test_swa_is_the_mean_of_epochs(learn):
    class EpochEnds(Callback):
        def before_fit(self): self.rows = []
        def after_train(self): self.rows.append([o.detach().clone() for o in self.model.parameters()])
    ends = EpochEnds()
    learn.fit(4, 1e-2, cbs=[SWA(.5, n_bn=3), ends])
    for o,a,b in zip(learn.model.parameters(), *ends.rows[2:]): assert torch.allclose(o, (a+b)/2, atol=1e-6)

@pytest.mark.parametrize('bad', [0, 1, -.1, 1.5, float('nan'), 'x', None])
def test_decay_refused(bad):
    with pytest.raises(ValueError, match='decay='): EMA(bad)

@pytest.mark.parametrize('make', [lambda: SWA(-.1), lambda: SWA(1), lambda: SWA(n_bn=0), lambda: SWA(keep='all'), lambda: EMA(keep=None)])
def test_refused(make):
    with pytest.raises(ValueError): make()

def test_swap_twice():
    a,b = [torch.arange(3), torch.rand(2)],[torch.zeros(3, dtype=int), torch.ones(2)]
    before = [o.clone() for o in a+b]
    swap(a, b)
    assert same(b, before[:2])
    swap(a, b)
    assert same(a+b, before)

## BatchNorm

def test_precise_bn_restores():
    "Modes and momentum come back; after an error the statistics too"
    net = nn.Sequential(TinyNet(), nn.Flatten(), nn.BatchNorm1d(32, momentum=.3), nn.Dropout(.5)).eval()
    net[0].train()
    modes = [o.training for o in net.modules()]
    precise_bn(net, torch.rand(3,4,3,8,8))
    assert [o.training for o in net.modules()]==modes and net[2].momentum==.3
    before = values(net)
    def cut(exc):
        yield torch.rand(4,3,8,8)
        raise exc
    for exc in (KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(exc): precise_bn(net, cut(exc))
        assert same(before, tensors_of(net)) and net[2].momentum==.3 and [o.training for o in net.modules()]==modes
    for bad,msg in (([torch.rand(1,3,8,8)],'batch of one image'), ([],'no batches')):
        with pytest.raises(ValueError, match=msg): precise_bn(net, bad)
    with pytest.raises(ValueError, match='n=0'): precise_bn(net, [], 0)

def test_learner_precise_bn_leaves_training_alone(dls):
    "Statistics are recomputed, and the next epochs see the batches they would have seen"
    def run(extra):
        l = reid_learner(dls, TinyNet, dtype=torch.float32)
        with l.no_bar(), l.no_logging():
            l.fit(1, 1e-2)
            weights = [o.detach().clone() for o in l.model.parameters()]
            if extra: l.precise_bn(5)
            assert same(weights, list(l.model.parameters()))
            l.fit(1, 1e-2)
        return list(l.model.parameters())
    assert same(run(False), run(True))

## What fastai brings

def test_accumulation_adds_up_micro_batches(dls):
    "The step of two micro-batches is the mean of their gradients: each triplet sees one of them"
    a,b = (reid_learner(dls, TinyNet, loss=ReIDLoss(CrossEntropy(), TripletLoss()), dtype=torch.float32) for _ in range(2))
    n,got = 12,[]
    class Grads(Callback):
        order = GradientClip.order+1
        def before_step(self): got.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
    with a.no_bar(), a.no_logging(): a.fit(1, 1e-30, cbs=[GradientAccumulation(2*n), Grads()])
    assert len(got)==len(dls.train)//2
    dls.train.epoch = 0
    b.model.train()
    for i,(x,*y) in enumerate(dls.train):
        if i<2: (b.loss_func(b.model(x), *y)/2).backward()
    want = torch.cat([p.grad.flatten() for p in b.model.parameters()])
    assert torch.allclose(got[0], want, atol=1e-5)

def test_ema_moves_with_steps(learn):
    "With accumulated gradients an average moves once for each step of the optimiser"
    cb = EMA(.9)
    learn.fit(2, 1e-3, cbs=[cb, GradientAccumulation(24)])
    assert cb.n==2*len(learn.dls.train)//2

def test_clip(learn):
    seen = []
    class Norms(Callback):
        order = GradientClip.order+1
        def before_step(self): seen.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm())
    learn.fit(1, 1e-2, cbs=[GradientClip(.1), Norms()])
    assert max(seen)<=.1001

@pytest.mark.parametrize('cbs', [lambda: [SWA(0), EMA(.9)], lambda: [EMA(.9), EMA(.5)]])
def test_one_average_at_a_time(learn, cbs):
    before = values(learn.model)
    with pytest.raises(ValueError, match='two averages'): learn.fit(1, 1e-2, cbs=cbs())
    assert same(before, values(learn.model))

def test_frozen_statistics_stay_in_the_mean(learn):
    before = {k:v.clone() for k,v in learn.model.backbone.state_dict().items()}
    learn.fit(2, 1e-2, cbs=[FreezeBackbone(), SWA(0, n_bn=5)])
    assert all(torch.equal(v, before[k]) for k,v in learn.model.backbone.state_dict().items())
    assert all(o.training or not learn.model.training for o in learn.model.modules())

def test_swa_changes_nothing_in_training(dls):
    "Dropout draws the same numbers, although statistics are recomputed between the epochs"
    class Drops(TinyNet):
        def __init__(self):
            super().__init__()
            self.append(nn.Dropout(.5))
    def run(*cbs):
        torch.manual_seed(0)
        l = reid_learner(dls, Drops, dtype=torch.float32)
        with l.no_bar(), l.no_logging(): l.fit(3, 1e-2, cbs=cbs)
        return [o.detach().clone() for o in l.model.parameters()]
    assert same(run(), run(SWA(0, keep='trained', n_bn=3))) and same(run(), run(EMA(.9, keep='trained')))
