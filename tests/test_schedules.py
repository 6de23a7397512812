"Learning rates against those that fast-reid used, parts in a row, fits by epochs and iterations, and a scheduled loss"
import json
from functools import partial

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos, SchedLin, SchedNo

from fastreid_nb.heads.core import BNNeckHead
from fastreid_nb.train.core import reid_learner, reid_loss
from fastreid_nb.train.groups import FreezeLayers
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.margins import ArcFace
from fastreid_nb.losses.memory import QueueLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.train.schedules import FreezeBackbone, SchedLoss, combine_lengths, fastreid_curve, warmup_flat_cos, warmup_steps
from golden_files import golden_files, missing
from tiny_models import TinyNet

@pytest.fixture
def learn(learn):
    "Without scores, which no schedule needs"
    learn.remove_cb(learn.score_reid)
    return learn

# Golden curves: kind of file → curve of ours from the parameters of the file

def by_iterations(p):
    "The curves of December 2020, with everything per iteration"
    n,lr = p['iterations'],p['base_lr']
    warm = dict(start=p['warmup_factor'], how=p.get('warmup_method', 'linear'))
    if p['scheduler']=='WarmupMultiStepLR':
        return n,warmup_steps(lr, p['warmup_iters']/n, [o/n for o in p['milestones']], p['gamma'], **warm)
    return n,warmup_flat_cos(lr, p['warmup_iters']/n, p['delay_iters']/n, end=p['eta_min_lr']/lr, **warm)

def by_epochs(p):
    "The curves of today, stepped once per epoch"
    lr,steps = p['base_lr'],p['steps'] if p['sched']=='MultiStepLR' else None
    f = fastreid_curve(lr, p['max_epoch'], p['iters_per_epoch'], p['warmup_iters'], p['delay_epochs'], steps, p['gamma'],
        end=p['eta_min_lr']/lr, start=p['warmup_factor'], how=p['warmup_method'])
    return p['max_epoch']*p['iters_per_epoch'],f

kinds = dict(lr_periteration=by_iterations, lr_current=by_epochs)

def golden_curves():
    "Name of every curve of every file, with the file and what builds our curve"
    found = []
    for kind,make in kinds.items():
        for path in golden_files(f'{kind}*_parameters.json') or [None]:
            names = json.loads(path.read_text()) if path else [None]
            found += [pytest.param(path, name, make, id=f'{kind} {name}') for name in names]
    return found

@pytest.mark.parametrize('path,name,make', golden_curves())
def test_golden_curve(path, name, make):
    if path is None: missing('lr_*_parameters.json')
    want = np.load(path.with_name(path.name.replace('_parameters.json', '.npz')))[name]
    n,f = make(json.loads(path.read_text())[name])
    got = np.array([f(i/n) for i in range(len(want))])
    assert np.abs(got/want-1).max()<1e-5

def test_positions_as_fastai_gives_them():
    "fastai adds up the position batch by batch within an epoch: every joint stays at its iteration"
    n_epoch,n = 120,202
    f,exact = warmup_steps(1., 2020/(n_epoch*n), [1/3,3/4]),[]
    for e in range(n_epoch):
        pos = e/n_epoch
        for i in range(n):
            it = e*n+i
            exact.append(f(pos)==pytest.approx(f(it/(n_epoch*n)), rel=1e-6))
            pos += 1/(n*n_epoch)
    assert all(exact)

# Parts in a row

def test_lengths_have_no_unit():
    parts = SchedLin(.1, 1),SchedNo(1, 1),SchedCos(1, 0)
    fs = [combine_lengths(o, parts) for o in ([1,4,5], [100,400,500], [.1,.4,.5])]
    for pos in np.linspace(0, 1, 101): assert len({round(f(pos), 9) for f in fs})==1

@pytest.mark.parametrize('lengths', [[0,0], [-1,2], [float('nan'),1], ['a',1]])
def test_lengths_that_are_none(lengths):
    with pytest.raises(ValueError, match='expected'): combine_lengths(lengths, [SchedNo(1,1)]*2)

@pytest.mark.parametrize('how,middle', [('linear',.55), ('exp',.1**.5), ('constant',.1)])
def test_forms_of_warmup(how, middle):
    f = warmup_flat_cos(np.array([1.,2.]), .2, .5, how=how)
    assert f(.1)==pytest.approx([middle,2*middle]) and f(.2)==pytest.approx([1,2])

@pytest.mark.parametrize('make,kw,match', [(warmup_flat_cos, dict(how='quick'), 'choose one of'), (warmup_flat_cos, dict(start=-1), 'start=-1'),
    (warmup_flat_cos, dict(how='exp', start=0), 'expected above 0'), (warmup_flat_cos, dict(start=float('nan')), 'start=nan')])
def test_bad_warmup(make, kw, match):
    with pytest.raises(ValueError, match=match): make(1., .1, .5, **kw)

@pytest.mark.parametrize('warm,steps', [(.5,[.2]), (.1,[.8,.3]), (.1,[1.5]), (-.1,[.5]), (1.,[])])
def test_bad_steps(warm, steps):
    with pytest.raises(ValueError, match='rising'): warmup_steps(1., warm, steps)

# Fits

def rates(learn): return np.array(learn.recorder.hps['lr'])

def test_iterations_are_epochs(learn):
    n = len(learn.dls.train)
    learn.fit_warmup_cos(4, 1e-3, warmup_epochs=1, flat_epochs=2)
    by_epoch = rates(learn)
    learn.fit_warmup_cos(4, 1e-3, warmup_iters=n, flat_iters=2*n)
    assert np.allclose(by_epoch, rates(learn), rtol=1e-6) and len(by_epoch)==4*n

def test_a_fit_in_steps(learn):
    n = len(learn.dls.train)
    learn.fit_warmup_steps(6, 1e-3, [2,5], warmup_epochs=1, gamma=.5)
    assert np.allclose(rates(learn)[n:2*n], 1e-3) and np.allclose(rates(learn)[2*n:5*n], 5e-4) and np.allclose(rates(learn)[5*n:], 2.5e-4)

@pytest.mark.parametrize('f,match', [(lambda l: l.fit_warmup_cos(3, warmup_epochs=3), r'3 epochs \(\d+ iterations\) in a training of 3 epochs'),
    (lambda l: l.fit_warmup_cos(3, warmup_iters=10**6), 'expected a shorter warm-up or more epochs'),
    (lambda l: l.fit_warmup_cos(9, warmup_epochs=4, flat_epochs=2), 'begins before the warm-up of 4 epochs'),
    (lambda l: l.fit_warmup_cos(9, flat_epochs=9), 'expected it earlier'), (lambda l: l.fit_warmup_cos(9, warmup_epochs=-1), 'warmup_epochs=-1'),
    (lambda l: l.fit_warmup_cos(9, warmup_epochs=1, warmup_iters=7), 'expected one of them'),
    (lambda l: l.fit_warmup_cos(9, warmup_epochs=float('nan')), 'warmup_epochs=nan'), (lambda l: l.fit_warmup_steps(9, milestone_epochs=[40]), 'expected it earlier'),
    (lambda l: l.fit_warmup_steps(9, gamma=-1), 'gamma=-1'), (lambda l: l.fit_warmup_cos(9, freeze_iters=1.5), 'freeze_iters=1.5')])
def test_lengths_that_do_not_fit(learn, f, match):
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=match): f(learn)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())

def test_a_long_warmup_moves_the_flat_part(learn):
    learn.fit_warmup_cos(4, 1e-3, warmup_epochs=3)
    n = len(learn.dls.train)
    assert np.allclose(rates(learn)[3*n], 1e-3) and rates(learn)[2*n]<1e-3

# A scheduled loss

class Fails(Callback):
    def __init__(self, exc, epoch): self.exc,self.at = exc,epoch
    def after_backward(self):
        if self.epoch==self.at: raise self.exc

def test_margin_over_time(learn):
    cb = SchedLoss('triplet.margin', SchedLin(0., .8))
    learn.fit(4, 1e-3, cbs=[ParamScheduler({'lr':SchedNo(1e-3,1e-3)}), cb])
    n = 4*len(learn.dls.train)
    assert np.allclose(cb.values, .8*np.arange(n)/n) and learn.loss_func.terms[1].margin==.3
    assert set(learn.recorder.hps)=={'lr','triplet.margin'}

@pytest.mark.parametrize('exc,epoch', [(KeyboardInterrupt,0), (ZeroDivisionError,2)])
def test_margin_is_given_back(learn, exc, epoch):
    with pytest.raises(exc): learn.fit(3, 1e-3, cbs=[SchedLoss('triplet.margin', SchedLin(.1, .8)), Fails(exc('stop'), epoch)])
    assert learn.loss_func.terms[1].margin==.3

@pytest.mark.parametrize('what,match', [('margin','a term and an attribute'), ('circle.margin', r"choose one of \['ce', 'triplet'\]"), ('triplet.marge', 'has the numbers'),
    ('triplet.dist', 'has the numbers')])
def test_what_cannot_be_scheduled(learn, what, match):
    with pytest.raises(ValueError, match=match): learn.fit(1, cbs=SchedLoss(what, SchedNo(1,1)))

@pytest.mark.parametrize('term,name,ends', [(ArcFace(), 'arcface', (.1,28)), (TripletLoss(), 'triplet', (.3,-1)), (CrossEntropy(), 'ce', (0,1)), (QueueLoss(8, 16), 'queue', (.2,1.5))])
def test_values_that_the_term_would_refuse(dls, term, name, ends):
    "Refused before the first step, and whether or not the term has a memory; random numbers stay where they were"
    head = partial(BNNeckHead, cosine=name=='arcface')
    l = reid_learner(dls, TinyNet, head=head, loss=ReIDLoss(term), dtype=torch.float32)
    attr = 'eps' if name=='ce' else 'margin'
    was,rng = getattr(term, attr),torch.get_rng_state()
    with pytest.raises(ValueError, match=f'{name}.{attr} becomes '), l.no_bar(), l.no_logging(): l.fit(1, 1e-3, cbs=SchedLoss(f'{name}.{attr}', SchedLin(*ends)))
    assert getattr(term, attr)==was and torch.equal(torch.get_rng_state(), rng) and l.opt is None or l.train_iter==0

def test_a_straight_line_in_two_numbers(learn):
    cb = SchedLoss('triplet.margin', start=.1, end=.5)
    learn.fit(2, 1e-3, cbs=cb)
    n = 2*len(learn.dls.train)
    assert np.allclose(cb.values, .1+.4*np.arange(n)/n)
    for kw in ({}, dict(start=1), dict(sched=SchedNo(1, 1), start=0, end=1)):
        with pytest.raises(ValueError, match='either a schedule'): SchedLoss('triplet.margin', **kw)

def test_a_schedule_that_gives_no_number(learn):
    with pytest.raises(ValueError, match='triplet.margin=nan'): learn.fit(1, cbs=SchedLoss('triplet.margin', lambda pos: float('nan')))
    assert learn.loss_func.terms[1].margin==.3

def test_only_the_terms_of_a_sum_have_names(dls):
    l = reid_learner(dls, TinyNet, loss=reid_loss().terms[1], dtype=torch.float32)
    with pytest.raises(ValueError, match='expected a ReIDLoss'), l.no_bar(), l.no_logging(): l.fit(1, cbs=SchedLoss('triplet.margin', SchedNo(1,1)))

@pytest.mark.parametrize('cbs', [lambda: [FreezeLayers('backbone.0'), FreezeBackbone()], lambda: [FreezeBackbone(), FreezeLayers('backbone.0')],
    lambda: [FreezeLayers('backbone.0'), FreezeLayers('backbone.0', 'head.neck')]])
def test_two_that_freeze_wake_everything(learn, cbs):
    flags = [p.requires_grad for p in learn.model.parameters()]
    learn.fit(1, 1e-3, cbs=cbs())
    assert [p.requires_grad for p in learn.model.parameters()]==flags

@pytest.mark.parametrize('early', [lambda: FreezeBackbone(2), lambda: FreezeLayers('backbone.1', 'backbone.0', n_iters=2)])
def test_what_another_freezes_sleeps_on(learn, early):
    "One wakes in the third step, and what both freeze, weights and statistics, is what it was"
    before = {k:v.clone() for k,v in learn.model.backbone.state_dict().items()}
    learn.fit_warmup_cos(2, 1e-2, cbs=[early(), FreezeLayers('backbone.0', 'backbone.1')])
    after = learn.model.backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k[:2] in ('0.','1.'))

def test_two_schedules_of_one_number(learn):
    line = dict(start=.1, end=.2)
    with pytest.raises(ValueError, match="two schedules of 'triplet.margin'"):
        learn.fit(1, cbs=[SchedLoss('triplet.margin', **line), SchedLoss('triplet.margin', **line)])
    with pytest.raises(ValueError, match='a term and an attribute'): SchedLoss(3, **line)

@pytest.mark.parametrize('make', [lambda: warmup_flat_cos(-1., 0., .5), lambda: warmup_flat_cos(float('nan'), 0., .5), lambda: warmup_flat_cos(1., 0., .5, end=float('nan')),
    lambda: fastreid_curve(-1., 9, 10, 20), lambda: fastreid_curve(1., 9, 0), lambda: fastreid_curve(1., 9, 10, -5),
    lambda: fastreid_curve(1., 9, 10, 20, milestones=[6,3])])
def test_curves_of_nonsense(make):
    with pytest.raises(ValueError, match='expected'): make()
