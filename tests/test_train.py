"Schedules, freezing, precision and checkpoints of 06_train"
import warnings
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.training import GradientAccumulation, GradientClip
from torch import nn
from tiny_models import TinyNet, thin_resnets
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.backbone.resnet import resnet18
from fastreid_nb.heads.core import ReductionHead
from fastreid_nb.heads.model import reid_model
from fastreid_nb.pooling.core import GlobalAvgPool
from fastreid_nb.train.schedules import FreezeBackbone, warmup_flat_cos
from fastreid_nb.heads.speed import best_dtype
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.memory import CenterLoss
from fastreid_nb.losses.mixes import sbs_loss
from fastreid_nb.train.core import SparseProgress, reid_learner
from fastreid_nb.train.checkpoint import load_reid, save_reid

@pytest.fixture(autouse=True)
def thin():
    "Small networks where the number of channels does not matter"
    with thin_resnets(): yield

@pytest.fixture
def learn(dls):
    l = reid_learner(dls, TinyNet)
    with l.no_bar(), l.no_logging(): yield l

@pytest.mark.parametrize('warm,flat', [(0,0), (.1,.1), (0,.5), (.1,.5), (.3,.9)])
def test_schedule(warm, flat):
    "Against the three formulas, everywhere, and without a jump"
    f = warmup_flat_cos(2., warm, flat)
    def naive(t):
        if t<warm: return 2*(.1+.9*t/warm)
        if t<flat: return 2.
        return 2*(.002+.998*(1+np.cos(np.pi*(t-flat)/(1-flat)))/2)
    ts = np.linspace(0, 1, 501)
    got = np.array([float(f(t)) for t in ts])
    assert np.abs(got-[naive(t) for t in ts]).max()<1e-5 and np.abs(np.diff(got)).max()<.1

@pytest.mark.parametrize('warm,flat', [(.5,.2), (-.1,.5), (.1,1.)])
def test_schedule_refuses(warm, flat):
    with pytest.raises(ValueError, match='expected 0'): warmup_flat_cos(1., warm, flat)

def test_lengths_in_epochs(learn):
    n = len(learn.dls.train)
    learn.fit_warmup_cos(5, 1e-3, warmup_epochs=1, flat_epochs=3)
    lr = np.array(learn.recorder.hps['lr'])
    assert len(lr)==5*n and np.allclose(lr[n:3*n], 1e-3) and lr[0]<2e-4 and (np.diff(lr[3*n:])<0).all()
    with pytest.raises(ValueError, match='expected 1 or more'): learn.fit_warmup_cos(0)

class Trip(Callback):
    def __init__(self, exc, event): self.exc,self.event = exc,event
    def __call__(self, name):
        if name==self.event and self.learn.iter>=1: raise self.exc

@pytest.mark.parametrize('event', ['after_pred','after_backward','before_validate','after_batch'])
@pytest.mark.parametrize('exc', [KeyboardInterrupt, ZeroDivisionError])
def test_everything_is_undone(learn, exc, event):
    off = learn.model.backbone[0].bias.requires_grad_(False)
    with pytest.raises(exc): learn.fit(1, cbs=[FreezeBackbone(100), Trip(exc(), event)])
    flags = [p.requires_grad for p in learn.model.parameters()]
    assert flags.count(False)==1 and not off.requires_grad
    assert not learn.model._forward_hooks and not learn.model._forward_pre_hooks and not torch.is_autocast_enabled('cpu')
    learn.fit(1)

@pytest.mark.parametrize('exc', [KeyboardInterrupt, ZeroDivisionError])
def test_autocast_ends_when_the_model_fails(learn, exc):
    "torch's hooks do not run on Ctrl-C, so `undo` must leave autocast itself"
    def fail(x): raise exc
    learn.model.pool.forward = fail
    with pytest.raises(exc): learn.fit(1)
    assert not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('n', [1,3])
def test_freeze_counts_iterations(learn, n):
    "For `n` iterations nothing in the backbone moves, statistics included; afterwards it does"
    seen = []
    class Watch(Callback):
        def after_batch(self):
            if self.training: seen.append({k:v.clone() for k,v in self.model.backbone.state_dict().items()})
    before = {k:v.clone() for k,v in learn.model.backbone.state_dict().items()}
    learn.fit(3, 1e-2, cbs=[FreezeBackbone(n), Watch()])
    moved = [any(not torch.equal(o[k], before[k]) for k in before) for o in seen]
    assert moved==[False]*n+[True]*(len(seen)-n)

def test_optimizer_is_the_recipes(dls):
    "fastai's Adam, set as here, makes the steps of torch.optim.Adam with coupled weight decay on every parameter"
    a,b = (reid_learner(dls, TinyNet, dtype=torch.float32) for _ in range(2))
    opt = torch.optim.Adam([p for p in b.model.parameters()], lr=1e-2, weight_decay=5e-4)
    batches = list(dls.train)
    with a.no_bar(), a.no_logging():
        a.dls.train.epoch = 0
        a.fit(1, 1e-2)
    b.model.train()
    dls.train.epoch = 0
    for x,*y in dls.train:
        b.loss_func(b.model(x), *y).backward()
        opt.step()
        opt.zero_grad()
    for (k,p),q in zip(a.model.named_parameters(), b.model.parameters()):
        if k!='backbone.0.bias': assert torch.allclose(p, q, atol=1e-5), k # a bias before BatchNorm has no gradient but rounding noise

def test_precision():
    assert best_dtype('cpu') in (torch.bfloat16, torch.float32)
    assert best_dtype('meta')==torch.float32

def test_float16_on_cpu_is_refused(dls):
    l = reid_learner(dls, TinyNet, dtype=torch.float16)
    with pytest.raises(Exception, match='float16 on cpu'), l.no_bar(), l.no_logging(): l.fit(1)

def test_round_trip(tmp_path, dls):
    "Every part of a library model comes back from the file alone"
    from functools import partial
    pre = Preproc((64,32), 'bilinear', (.5,.5,.5), (.2,.2,.2))
    model = reid_model(partial(resnet18, ibn=True, last_stride=2), 5, GlobalAvgPool, partial(ReductionHead, n_emb=16), pre).eval()
    save_reid(tmp_path/'sub'/'m.pt', model, np.array([3,5,8,13,21]), np.float32(.25))
    back = load_reid(tmp_path/'sub'/'m.pt')
    x = torch.rand(2,3,64,32)
    assert torch.equal(model.to(memory_format=torch.channels_last)(x), back(x)) and not back.training
    assert back.preproc==pre and back.pids==[3,5,8,13,21] and back.threshold==.25
    assert [o.name for o in (tmp_path/'sub').iterdir()]==['m.pt']

def test_bad_checkpoints(tmp_path, dls):
    good = tmp_path/'good.pt'
    save_reid(good, reid_model(resnet18, 4))
    raw = good.read_bytes()
    for i,n in enumerate((0, 10, len(raw)//2, len(raw)-100)):
        (tmp_path/f'{i}.pt').write_bytes(raw[:n])
        with pytest.raises(ValueError, match='truncated'): load_reid(tmp_path/f'{i}.pt')
    (tmp_path/'text.pt').write_text('hello')
    with pytest.raises(ValueError, match="is a text, which begins with 'hello'"): load_reid(tmp_path/'text.pt')
    torch.save([1,2], tmp_path/'list.pt')
    with pytest.raises(ValueError, match='holds list'): load_reid(tmp_path/'list.pt')
    with pytest.raises(FileNotFoundError, match='no file'): load_reid(tmp_path/'none.pt')
    model = reid_model(resnet18, 5)
    before = model.head.classifier.weight.clone()
    with pytest.raises(ValueError, match='other shapes'): load_reid(good, model)
    assert torch.equal(model.head.classifier.weight, before)
    with pytest.raises(ValueError, match='not in the network'): load_reid(good, reid_model(TinyNet, 4))

def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch, dls):
    f = tmp_path/'m.pt'
    save_reid(f, reid_model(TinyNet, 4))
    old = f.read_bytes()
    def half(obj, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(OSError, match='No space left.*choose a folder'): save_reid(f, reid_model(TinyNet, 4))
    assert f.read_bytes()==old and len(list(tmp_path.iterdir()))==1

def test_read_only_folder(tmp_path, monkeypatch, dls):
    "Root may write nearly everywhere, so where there is no /proc the refusal is played"
    folder = Path('/proc/self')
    if not folder.is_dir():
        folder = tmp_path
        def refuse(self, *args, **kwargs): raise PermissionError(13, 'Permission denied', str(self))
        monkeypatch.setattr(Path, 'touch', refuse)
    with pytest.raises(OSError, match='cannot write .*m.pt.*choose a folder'): save_reid(folder/'m.pt', reid_model(TinyNet, 4))
    assert list(tmp_path.iterdir())==[]

def test_learning_rates_per_group(learn):
    "`slice` gives the backbone its own learning rate, along the same curve"
    seen = []
    class Watch(Callback):
        def after_batch(self):
            if self.training: seen.append([o['lr'] for o in self.opt.hypers])
    learn.fit_warmup_cos(2, slice(1e-4,1e-3), cbs=Watch())
    lrs = np.array(seen, dtype=float)
    assert np.allclose(lrs[:,0]*10, lrs[:,1]) and abs(lrs.max()-1e-3)<1e-6

def test_one_precision_callback(learn):
    "fastai's `to_bf16` replaces ours instead of standing beside it"
    learn.to_bf16()
    assert len([o for o in learn.cbs if isinstance(o, MixedPrecision)])==1

def test_lr_find_does_not_count_as_an_epoch(learn):
    learn.lr_find(num_it=20, show_plot=False)
    assert learn.model.n_epochs==0
    learn.fit(2)
    assert learn.model.n_epochs==2

def test_parameters_of_a_loss_are_trained(dls):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.ones(1))
        def forward(self, out, pid, camid): return nn.functional.cross_entropy(self.s*out.logits.float(), pid)
    l = reid_learner(dls, TinyNet, loss=Scaled())
    with l.no_bar(), l.no_logging(): l.fit(1, 1e-2)
    assert l.loss_func.s.item()!=1

def test_normalisation_comes_with_the_data(tmp_path, dls):
    "A model with another mean is refused for training, and follows its checkpoint when loaded"
    save_reid(tmp_path/'m.pt', reid_model(TinyNet, 6, preproc=Preproc((32,16), mean=(.5,.5,.5))))
    assert load_reid(tmp_path/'m.pt', reid_model(TinyNet, 6)).mean.flatten().tolist()==[.5,.5,.5]

class Told(TinyNet):
    "A backbone that was made for images of another mean"
    mean,std = (.5,)*3,(.25,)*3

def test_learner_takes_the_norm_of_the_backbone(dls):
    own = dls.preproc
    l = reid_learner(dls, Told)
    assert l.model.preproc==l.dls.preproc==replace(own, mean=(.5,)*3, std=(.25,)*3)
    assert dls.preproc is own and reid_learner(dls, TinyNet).model.preproc==own # no trace for the next learner

def test_learner_takes_the_norm_of_the_loaders(data):
    pre = Preproc((32,16), 'bilinear', (.4,)*3, (.2,)*3)
    dls = reid_dls(data, preproc=pre, p=4, k=2, num_workers=0)
    l = reid_learner(dls, TinyNet)
    assert l.model.preproc==pre and l.dls is dls and l.model.mean.flatten().tolist()==pytest.approx([.4]*3)
    with pytest.raises(ValueError, match='expected the same mean and std'): reid_learner(dls, model=reid_model(TinyNet, 4))

def test_ready_model_keeps_its_norm_and_takes_the_size(dls):
    model = reid_model(TinyNet, len(dls.pids), preproc=Preproc((64,32), 'bilinear', (.5,)*3))
    with pytest.warns(UserWarning, match=r'\(64, 32\), bilinear') as said: l = reid_learner(dls, model=model)
    assert len(said)==1 and l.model.preproc==l.dls.preproc==replace(dls.preproc, mean=(.5,)*3)
    with warnings.catch_warnings(action='error'): reid_learner(dls, model=model)

def test_pids_come_with_training(dls, tmp_path):
    model = reid_model(TinyNet, len(dls.pids), preproc=dls.preproc)
    l = reid_learner(dls, model=model)
    assert model.pids==[]
    with l.no_bar(), l.no_logging(): l.fit(1)
    assert model.pids==list(dls.pids)
    model.threshold = .25
    save_reid(tmp_path/'m.pt', model)
    back = load_reid(tmp_path/'m.pt', reid_model(TinyNet, len(dls.pids)))
    assert (back.preproc,back.pids,back.threshold)==(dls.preproc,list(dls.pids),.25)

def test_epochs_are_counted_across_checkpoints(dls, tmp_path):
    "A new learner does not repeat the batches of the first epochs"
    l = reid_learner(dls, TinyNet)
    assert l.model.n_epochs==0
    with l.no_bar(), l.no_logging(): l.fit(2)
    l.save_reid(tmp_path/'m.pt')
    again = reid_learner(dls, model=load_reid(tmp_path/'m.pt', reid_model(TinyNet, len(dls.pids))))
    seen = []
    class Watch(Callback):
        def before_train(self): seen.append(self.dls.train.epoch)
    with again.no_bar(), again.no_logging(): again.fit(1, cbs=Watch())
    assert seen==[2] and again.model.n_epochs==3

@pytest.mark.parametrize('how', ['wrapped','part','in place'])
def test_compiled_model_is_saved_under_plain_names(tmp_path, how):
    model = reid_model(resnet18, 3)
    names = list(model.state_dict())
    save_reid(tmp_path/'plain.pt', model)
    if how=='wrapped': model = torch.compile(model, backend='eager')
    elif how=='part': model.backbone = torch.compile(model.backbone, backend='eager')
    else: model.compile(backend='eager')
    save_reid(tmp_path/'m.pt', model)
    assert list(torch.load(tmp_path/'m.pt')['state'])==names and load_reid(tmp_path/'m.pt').recipe['n_pids']==3
    if how=='wrapped': assert load_reid(tmp_path/'plain.pt', model) is model

def test_file_without_recipe_or_of_another_version(tmp_path, dls):
    model = reid_model(resnet18, 4)
    for recipe,msg in ((None,'no recipe'), ({'n_pids':4},'cannot be rebuilt by'), (model.recipe|dict(pool=dict(fn='fastreid_nb.pooling.GeM', kw=dict(q=1))),'cannot be rebuilt')):
        model.recipe = recipe
        save_reid(tmp_path/'m.pt', model)
        with pytest.raises(ValueError, match=msg): load_reid(tmp_path/'m.pt')

def test_model_without_preproc_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match='set model.preproc'): save_reid(tmp_path/'m.pt', nn.Linear(2, 2))
    assert not (tmp_path/'m.pt').exists()

def test_what_evaluation_gives_is_saved(tmp_path):
    model = reid_model(resnet18, 3)
    model.test_on = 'logits'
    save_reid(tmp_path/'m.pt', model)
    assert load_reid(tmp_path/'m.pt')(torch.rand(1, 3, 32, 32)).shape==(1,3)

def test_an_ensemble_is_trained(dls):
    from fastreid_nb.heads.ensemble import Ensemble
    learn = reid_learner(dls, model=Ensemble([reid_model(resnet18, len(dls.pids)), reid_model(resnet18, len(dls.pids))]))
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(1, freeze_iters=1)
    body,rest = learn.splitter(learn.model)
    assert len(body)+len(rest)==len(list(learn.model.parameters())) and all(p.requires_grad for p in body)

def test_model_moves_before_the_optimiser_is_made(dls, monkeypatch):
    "Only then can the optimiser see that its parameters are on a GPU"
    seen = []
    monkeypatch.setattr(dls, 'device', torch.device('meta'))
    learn = reid_learner(dls, resnet18, opt_func=lambda params, **kwargs: seen.append({p.device.type for o in params for p in o}), dtype=torch.float32)
    learn.create_opt()
    assert seen==[{'meta'}]

@pytest.mark.parametrize('at,names', [(0,['a']), (6,['b']), (6,['a','c']), (3,['a','b','c'])])
def test_the_term_that_is_no_number(dls, at, names):
    "Which term, and at which step, although one step later every term is NaN"
    n = []
    def term(name):
        def loss(out, pid, camid): return out.feat.pow(2).mean()*(torch.nan if len(n)==at and name in names else 1)
        loss.name = name
        return loss
    def count(out, pid, camid):
        n.append(0)
        return out.feat.mean()*0
    count.name = 'd'
    l = reid_learner(dls, TinyNet, loss=ReIDLoss(*map(term, 'abc'), count), dtype=torch.float32)
    match = rf'since step {at+1} of this fit \(epoch .*which began in {", ".join(names)}: training diverged'
    with l.no_bar(), l.no_logging(), pytest.raises(ValueError, match=match): l.fit(4, 1e-3)
    assert len(n)<=at+1+len(dls.train)

def test_a_model_that_gives_no_numbers(dls):
    l = reid_learner(dls, TinyNet, dtype=torch.float32)
    l.model.backbone[0].weight.data[:] = torch.nan
    with l.no_bar(), l.no_logging(), pytest.raises(ValueError, match='in every term .ce, triplet.*the model itself'): l.fit(2, 1e-3)

@pytest.mark.parametrize('lr', [0, 0., slice(0), slice(0,0), [0,0]])
def test_a_learning_rate_of_nothing(learn, lr):
    with pytest.raises(ValueError, match='nothing would be learned'): learn.fit(1, lr)
    learn.fit(1, [0,1e-3])

@pytest.mark.parametrize('lr,match', [(0,'nothing would be learned'), (-1e-3,'expected 0 or more'), (float('nan'),'lr=nan')])
def test_a_schedule_of_fastai_without_learning_rate(learn, lr, match):
    for fit in (learn.fit_one_cycle, learn.fit_flat_cos):
        with pytest.raises(ValueError, match=match): fit(1, lr)
    with pytest.raises(ValueError, match=match): learn.fit_sgdr(1, 1, lr)

def test_a_learner_without_learning_rate(dls):
    for lr in (0,-1.,float('nan'),float('inf')):
        with pytest.raises(ValueError, match='lr='): reid_learner(dls, TinyNet, lr=lr)

@pytest.mark.parametrize('stop', ['after_backward','before_step'])
def test_no_gradient_is_left_for_the_next_fit(dls, stop):
    "A fit that was stopped with gradients in place, then the same fit as by a fresh learner"
    class Stop(Callback):
        now = True
        def __call__(self, name):
            if self.now and name==stop and self.train_iter==1: raise KeyboardInterrupt
            super().__call__(name)
    def run(stopped):
        l = reid_learner(dls, TinyNet, dtype=torch.float32)
        start = {k:v.clone() for k,v in l.model.state_dict().items()}
        with l.no_bar(), l.no_logging():
            if stopped:
                with pytest.raises(KeyboardInterrupt): l.fit(1, 1e-2, cbs=Stop())
                l.model.load_state_dict(start)
                l.opt,l.model.n_epochs = None,0
            l.fit(1, 1e-2)
        return list(l.model.parameters())
    assert all(torch.equal(a, b) for a,b in zip(run(True), run(False)))

@pytest.mark.parametrize('cb,match', [(GradientAccumulation(30), 'multiple'), (GradientAccumulation(0), 'n_acc=0'), (GradientAccumulation(-24), 'n_acc=-24'), (GradientAccumulation(24_000), 'no step'),
    (GradientClip(0), 'max_norm=0'), (GradientClip(-1.), 'max_norm=-1'), (GradientClip(float('nan')), 'max_norm=nan')])
def test_gradients_that_would_be_wrong(learn, cb, match):
    before = [o.detach().clone() for o in learn.model.parameters()]
    with pytest.raises(ValueError, match=match): learn.fit(1, 1e-3, cbs=cb)
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

def test_a_margin_needs_cosines(dls):
    with pytest.raises(ValueError, match='build it with cosine=True'): reid_learner(dls, TinyNet, loss=sbs_loss(), dtype=torch.float32).fit(1, 1e-3)

def test_centres_for_fewer_people(dls):
    loss = ReIDLoss(CrossEntropy(), CenterLoss(3, TinyNet.n_feat))
    with pytest.raises(ValueError, match=f'made for 3 identities, and there are {len(dls.pids)}'): reid_learner(dls, TinyNet, loss=loss, dtype=torch.float32).fit(1, 1e-3)

@pytest.mark.parametrize('fit', [lambda l: l.fit_one_cycle(1, -1e-3), lambda l: l.fit_flat_cos(1, -1e-3), lambda l: l.fit_one_cycle(1, float('nan'))])
def test_rates_of_other_schedules(learn, fit):
    with pytest.raises(ValueError, match='expected 0 or more'): fit(learn)
    assert all(o.isfinite().all() for o in learn.model.parameters())

@pytest.mark.parametrize('times', [1,2,3])
def test_the_term_that_is_no_number_while_gradients_are_collected(dls, times):
    "Step 7 is named wherever it stands among the batches of a step"
    n = [0]
    def breaks(out, pid, camid):
        n[0] += 1
        return out.feat.pow(2).mean()*(float('nan') if n[0]==7 else 1.)
    l = reid_learner(dls, TinyNet, loss=ReIDLoss(CrossEntropy(), breaks), dtype=torch.float32)
    acc = GradientAccumulation(times*dls.train.p*dls.train.k)
    with l.no_bar(), l.no_logging(), pytest.raises(ValueError, match='since step 7 .* which began in breaks'): l.fit(6, 1e-3, cbs=acc)

def test_the_bar_asks_seldom(dls):
    "Two epochs in less than half a second: the loss is fetched once for each of them, not in every step"
    l = reid_learner(dls, TinyNet, dtype=torch.float32)
    assert isinstance(l.progress, SparseProgress)
    shown = []
    class Bar:
        def update(self, n): pass
        comment = property(fset=lambda self, text: shown.append(text))
    bar = SparseProgress()
    bar.learn,bar.pbar = l,Bar()
    l.iter,l.smooth_loss = 0,torch.tensor(1.)
    for _ in range(5): bar.after_batch()
    assert shown==['1.0000']

def test_other_loggers_stand_before_the_bar(dls, tmp_path, monkeypatch):
    "fastai's CSVLogger gets its lines, on a screen too"
    monkeypatch.setattr('fastreid_nb.train.core.has_screen', lambda: True)
    l = reid_learner(dls, TinyNet, dtype=torch.float32, cbs=CSVLogger(tmp_path/'log.csv'))
    l.fit(2, 1e-3)
    assert len((tmp_path/'log.csv').read_text().splitlines())==3
