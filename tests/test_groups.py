"Freezing by name, and weight decay and learning rates by kind: against the reference's groups, and given back on every exit"
import json, re
from functools import partial

import pytest, torch
from fastai.callback.core import Callback
from fastai.optimizer import SGD, Lamb, RAdam
from torch import nn

from fastreid_nb.backbone.resnet import resnet18
from fastreid_nb.heads.core import BNNeckHead, ReductionHead
from fastreid_nb.heads.parts import mgn
from fastreid_nb.pooling.core import GeM
from fastreid_nb.train.core import reid_adam, reid_learner
from fastreid_nb.train.groups import FreezeLayers, ParamGroups, named_params, param_kinds, param_table, reid_adamw, reid_sgd
from golden_files import golden_files, missing

class StagedNet(nn.Module):
    n_feat = 8
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3,4,3,2,1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.1))
        self.stage = nn.Sequential(nn.Conv2d(4,8,3,2,1), nn.BatchNorm2d(8, affine=False), nn.ReLU())
    def forward(self, x): return self.stage(self.stem(x))

@pytest.fixture
def learn(dls):
    "A network whose layers have names, without scores"
    l = reid_learner(dls, StagedNet, dtype=torch.float32)
    l.remove_cb(l.score_reid)
    with l.no_bar(), l.no_logging(): yield l

# Golden groups

part = re.compile(r'(bias|head|norm)s?(?:wd([\d.e-]+)|([\d.]+)x)')   # of the name of a case: 'normwd1e-5', 'bias2x'

def settings_of(case):
    "Arguments of `ParamGroups` that the parts of a name spell out"
    found = [m for o in case.split('_') if (m := part.fullmatch(o))]
    return {f'{m[1]}_wd':float(m[2]) for m in found if m[2]} | {f'{m[1]}_lr':float(m[3]) for m in found if m[3]}

def test_a_name_spells_its_numbers_out():
    assert settings_of('bias2x_heads10x_normwd1e-5_biaswd0')==dict(bias_lr=2, head_lr=10, norm_wd=1e-5, bias_wd=0)
    assert settings_of('head0.5x')==dict(head_lr=.5) and settings_of('default_sbs')==settings_of('no_freeze_iters')=={}

def golden_groups():
    found = [(p,k) for p in golden_files('optimizer_param_groups*.json') for k in json.loads(p.read_text())]
    return [pytest.param(p, k, id=k) for p,k in found] or [pytest.param(None, None, id='no groups')]

def our_name(name, reduced):
    "The name that a parameter of the reference has here"
    first,last = ('reduce','neck') if reduced else ('neck','')
    pairs = {'heads.weight':'head.classifier.weight', 'heads.pool_layer.':'pool.', 'heads.bottleneck.0.':f'head.{first}.', 'heads.bottleneck.1.':f'head.{last}.'}
    for a,b in pairs.items(): name = name.replace(a, b)
    return name

@pytest.mark.parametrize('path,case', golden_groups())
def test_golden_groups(path, case, dls):
    "Every parameter has the learning rate, the decay and the sleep that the reference gave it"
    if path is None: missing('optimizer_param_groups.json')
    want = json.loads(path.read_text())[case]
    reduced = 'heads.bottleneck.1.weight' in want
    head = partial(ReductionHead, n_emb=16, cosine=True) if reduced else partial(BNNeckHead, cosine=True)
    learn = reid_learner(dls, partial(resnet18, ibn=True), GeM, head, cbs=ParamGroups(**settings_of(case)), dtype=torch.float32)
    table = param_table(learn).set_index('name')
    want = {our_name(k, reduced):v for k,v in want.items()}
    assert set(want)==set(table.index)
    cb = FreezeLayers('backbone')
    cb.net,cb.learn = learn.model,learn
    frozen = {id(p) for p in cb._choose()[0]} if any(o['freeze']=='freeze' for o in want.values()) else set()
    for k,p in learn.model.named_parameters():
        got = dict(lr=table.lr[k], weight_decay=table.wd[k], freeze='freeze' if id(p) in frozen else 'normal')
        assert [got[o] for o in ('lr','weight_decay')]==pytest.approx([want[k][o] for o in ('lr','weight_decay')]), k
        assert got['freeze']==want[k]['freeze'], k

makers = dict(loop=reid_adam, fused=partial(reid_adam, fused=True), sgd=reid_sgd, fastai_sgd=SGD, adamw=reid_adamw, lamb=partial(Lamb, decouple_wd=False),
    radam=partial(RAdam, decouple_wd=False))

@pytest.mark.parametrize('name', makers)
def test_a_step_with_groups_is_a_step_of_fine_groups(name, dls):
    "The same weights as with an optimiser that is given the fine groups from the start"
    kw = dict(norm_wd=.1, bias_wd=.2, bias_lr=2., head_lr=5.)
    a,b = (reid_learner(dls, StagedNet, dtype=torch.float32, opt_func=makers[name], wd=.05, cbs=[ParamGroups(**kw)]*i) for i in (1,0))
    for l in (a,b):
        l.model.backbone.stem[3].p = 0.
        l.dls.train.epoch = 0
    with a.no_bar(), a.no_logging(): a.fit(1, 1e-2)
    nums = param_table(a, 1e-2).set_index('name')
    lists = [[p] for p in b.model.parameters()]
    opt = makers[name](lists, lr=1e-2)
    opt.set_hyper('lr', nums.lr.tolist())
    opt.set_hyper('wd', nums.wd.tolist())
    b.model.train()
    dls.train.epoch = 0
    for x,*y in dls.train:
        b.loss_func(b.model(x), *y).backward()
        opt.step()
        opt.zero_grad()
    for (k,p),q in zip(a.model.named_parameters(), b.model.named_parameters()):
        if k!='backbone.stem.0.bias': assert torch.allclose(p, q[1], atol=2e-5), k

class Fails(Callback):
    def __init__(self, exc, event): self.exc,self.at = exc,event
    def __call__(self, name):
        if name==self.at and self.learn.train_iter>=2: raise self.exc

@pytest.mark.parametrize('event,exc', [('after_pred',KeyboardInterrupt), ('after_backward',ZeroDivisionError), ('after_step',KeyboardInterrupt),
    ('before_validate',ZeroDivisionError), ('after_batch',KeyboardInterrupt)])
@pytest.mark.parametrize('opt', ['loop','sgd'])
def test_all_is_given_back(dls, event, exc, opt):
    learn = reid_learner(dls, StagedNet, dtype=torch.float32, opt_func=makers[opt])
    off = learn.model.backbone.stem[0].bias.requires_grad_(False)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(exc): learn.fit(3, 1e-3, cbs=[FreezeLayers('backbone.stem', 'pool'), ParamGroups(head_lr=3), Fails(exc('stop'), event)])
        assert [p.requires_grad for p in learn.model.parameters()].count(False)==1 and not off.requires_grad
        assert len(learn.opt.param_lists)==len(learn.opt.hypers)==2
        learn.fit(1, 1e-3)

def test_an_optimiser_that_fails_in_its_step(learn):
    "Between the two events of a step too"
    learn.create_opt()
    def step(): raise ZeroDivisionError('stop')
    learn.opt.step = step
    with pytest.raises(ZeroDivisionError): learn.fit(1, 1e-3, cbs=ParamGroups(head_lr=3))
    assert len(learn.opt.param_lists)==2

# Freezing

def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items() if 'num_batches' not in k}
def moved(a, b): return {k for k in a if not torch.equal(a[k], b[k])}

@pytest.mark.parametrize('what,still', [(('backbone.stem',), 'backbone.stem'), (('backbone.st*',), 'backbone'), ((0,), 'backbone'), (('backbone.stem.0','backbone.stem.1'),'backbone.stem'),
    (('backbone.stage.0.*',), 'backbone.stage'), ((-1,), ('head','pool'))])
def test_what_sleeps_does_not_move(learn, what, still):
    "Weights and statistics, of a BatchNorm without weights too, however large the decay"
    before = weights(learn)
    learn.fit(2, 1e-2, wd=.5, cbs=FreezeLayers(*what))
    change = moved(before, weights(learn))
    assert change and not [k for k in change if k.startswith(still)]
    assert not any(p in learn.opt.opt.state for o in what for p in (learn.opt.param_lists[o] if isinstance(o, int) else named_params(learn.model, o)))

def test_it_wakes_up_at_its_iteration(learn):
    n,seen = len(learn.dls.train)+1,[]
    class Watch(Callback):
        def after_batch(self):
            if self.training: seen.append(weights(self.learn))
    before = weights(learn)
    learn.fit(3, 1e-2, cbs=[FreezeLayers('backbone.stem', n_iters=n), Watch()])
    assert [any(k.startswith('backbone.stem') for k in moved(before, o)) for o in seen]==[False]*n+[True]*(len(seen)-n)

def test_statistics_may_move(learn):
    before = weights(learn)
    learn.fit(1, 1e-2, cbs=FreezeLayers('backbone', keep_stats=False))
    assert {k.split('.')[-1] for k in moved(before, weights(learn)) if k.startswith('backbone')}=={'running_mean','running_var'}

@pytest.mark.parametrize('what,match', [(('backbone.stam',),'did you mean backbone.stem'), (('hed',),'did you mean head'), (('backbone.layer*',),r"no layer or parameter 'backbone.layer\*'"),
    ((5,),'group=5'), (('backbone','head','pool'),'nothing is left to train'), ((0,1),'nothing is left to train'), (('backbone.stem.2',),'has no parameters')])
def test_names_that_are_not_there(learn, what, match):
    before = weights(learn)
    with pytest.raises(ValueError, match=match): learn.fit(1, cbs=FreezeLayers(*what))
    assert not moved(before, weights(learn)) and all(p.requires_grad for p in learn.model.parameters())

def test_a_branch_is_not_its_head():
    "A name is no prefix: `b1` of MGN is not `b1_head`"
    model = mgn(resnet18, 3)
    names = [k for k,_ in model.named_modules() if k.startswith('head.')]
    for k in {o.split('.')[1] for o in names}:
        try: ps = set(named_params(model, f'head.{k}'))
        except ValueError: continue
        assert ps==set(model.head.get_submodule(k).parameters())

def test_kinds_of_a_part_model():
    "The branches of MGN belong to the body"
    model = mgn(resnet18, 3)
    kinds = param_kinds(model)
    assert all('head' not in kinds[p] for p in model.head.branches.parameters()) and 'head' in kinds[list(model.head.parameters())[-1]]

def test_parameters_of_a_loss_have_a_kind(dls):
    class Centres(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.zeros(8))
        def forward(self, out, pid, camid): return (out.feat-self.centres).mean()
    loss = Centres()
    l = reid_learner(dls, StagedNet, loss=loss, opt_func=SGD, wd=0., dtype=torch.float32, cbs=ParamGroups(loss_lr=100))
    with l.no_bar(), l.no_logging(): l.fit(1, 1e-3)
    assert loss.centres.mean().item()==pytest.approx(100*1e-3*len(dls.train)/8, rel=1e-4)

class Still(nn.Module):
    "A loss with a parameter that nothing moves but decay"
    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.ones(1))
    def forward(self, out, pid, camid): return (out.feat.sum()+self.centre.sum())*0

@pytest.mark.parametrize('own,more,stays', [([], [], True), ([ParamGroups(loss_wd=None)], [], False), ([ParamGroups(head_lr=3)], [], True),
    ([], [ParamGroups(loss_wd=.1)], False), ([ParamGroups(loss_wd=.1)], [ParamGroups()], True)])
def test_what_a_loss_learns_is_not_decayed(dls, own, more, stays):
    "The group of the loss has no decay unless somebody says so; of several callbacks the last one works, and all is given back"
    l = reid_learner(dls, StagedNet, loss=Still(), opt_func=reid_sgd, wd=.5, dtype=torch.float32, cbs=own)
    with l.no_bar(), l.no_logging(): l.fit(1, .1, cbs=more)
    assert (l.loss_func.centre.item()==1)==stays
    assert len(l.opt.param_lists)==2 and len(l.opt.hypers)==2
    assert not hasattr(reid_learner(dls, StagedNet, dtype=torch.float32), 'param_groups')

@pytest.mark.parametrize('kw', [dict(norm_wd=-1), dict(bias_lr=float('nan')), dict(head_lr='a'), dict(loss_wd=float('inf'))])
def test_bad_groups(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): ParamGroups(**kw)
