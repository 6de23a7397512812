"Distillation: losses against the reference and against loops, the callback, feature maps, unlabelled images"
import itertools, json, re, shutil, warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import fresh, numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.torch_core import TensorImage
from fasttransform import Transform
from torch import nn

from fastreid_nb.augment.core import hflip, random_erase
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.backbone.resnet import resnet18, resnet34, resnet50, resnet50_ibn
from fastreid_nb.backbone.resnest import resnest
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.heads.core import LinearHead, ReIDOut
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.parts import pcb
from fastreid_nb.kd.core import LogitL1, PKT, RelationalKD, SimilarityKD, SoftKL
from fastreid_nb.kd.distill import Distill, Taught
from fastreid_nb.kd.features import Overhaul, _margins, _partial_l2
from fastreid_nb.kd.semi import SSKD
from fastreid_nb.losses.core import ReIDLoss
from fastreid_nb.train.averages import tensors_of
from fastreid_nb.recipes.build import _callbacks
from fastreid_nb.recipes.core import Experiment
from fastreid_nb.train.checkpoint import load_reid, save_reid
from fastreid_nb.train.core import reid_adam, reid_learner
from fastreid_nb.train.groups import ParamGroups
from fastreid_nb.train.names import names_of
from fastreid_nb.train.resume import Resumable
from golden_files import close, golden_files, golden_params, missing
from slow import slow_but
from tiny_models import TinyNet, thin_resnets, tiny_dls

all_terms = [LogitL1(), SoftKL(), SoftKL(2, symmetric=False), PKT(), PKT('feat', as_printed=True), RelationalKD(), SimilarityKD()]
def out(x, logits=None): return ReIDOut(x if logits is None else logits, x, x)
def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
def values(net): return [o.clone() for o in tensors_of(net)]
def same(a, b): return all(torch.equal(x, y) for x,y in zip(a, b, strict=True))

## Golden files

pattern = 'distillation*.npz'
def read(path):
    if path is None: missing(pattern)
    return np.load(path)

def keys(rx):
    found = [pytest.param(p, k, id=f'{p.stem}-{k}') for p in golden_files(pattern) for k in np.load(p).files if re.fullmatch(rx, k)]
    return found or [pytest.param(None, None, id=f'no {pattern}')]

@pytest.mark.parametrize('path,key', keys(r'(kl|js)div_T[\d.]+'))
def test_soft_kl_golden(path, key):
    z = read(path)
    s,t = torch.tensor(z['student_logits'], requires_grad=True),torch.tensor(z['teacher_logits'])
    loss = SoftKL(float(key.partition('_T')[2]), symmetric=key.startswith('js'))(out(s), out(t))
    loss.backward()
    close(loss, z[key])
    close(s.grad, z[f'{key}_grad_student'])

@pytest.mark.parametrize('path,key', keys(r'loss_jsdiv_two_teachers_T[\d.]+'))
def test_two_teachers_golden(path, key):
    z = read(path)
    said = [(None,out(torch.tensor(z[k]))) for k in ('teacher_logits','teacher2_logits')]
    close(Taught(SoftKL(float(key.partition('_T')[2])), said)(out(torch.tensor(z['student_logits'])), None), z[key])

@pytest.mark.parametrize('path', golden_params(pattern))
def test_overhaul_golden(path):
    z = {k:torch.from_numpy(np.asarray(v)) for k,v in read(path).items()}
    m = _margins(z['overhaul_bn_weight'], z['overhaul_bn_bias'])
    close(m, z['overhaul_margin'])
    s = z['overhaul_source'].clone().requires_grad_()
    loss = _partial_l2(s, torch.maximum(z['overhaul_target'], m[:,None,None]))
    loss.backward()
    close(loss, z['overhaul_loss_sum'])
    close(s.grad, z['overhaul_grad_source'])

def test_numbers_of_the_reference():
    "Made with the reference, with inputs anyone can compute"
    i,j = np.ogrid[:8,:6]
    f = torch.tensor(np.sin(.7*i+.3*j+.1*i*j))
    W = torch.tensor(np.cos(.5*np.arange(5)[:,None]+.9*np.arange(6)))
    close(SoftKL(16)(out(8*f@W.T), out(8*f.flip(0)@W.T)), 112.103210, 1e-6)
    close(_margins(torch.tensor([1.,.5,.1]), torch.tensor([0,.2,.5])), [-.797885,-.334378,-.3], 2e-6)
    s,t = (torch.tensor(o(np.arange(12))).view(1, 3, 2, 2) for o in (np.sin,np.cos))
    m = _margins(torch.tensor([1.,.5,.1]), torch.tensor([0,.2,.5]))
    close(_partial_l2(s, torch.maximum(t, m[:,None,None])), 9.623089, 1e-6)

## Loops

def naive_pkt(s, t, printed):
    def p(x, i, j):
        k = lambda a,b: (1+F.cosine_similarity(x[a], x[b], dim=0))/2
        return k(i, j)/sum(k(i, o) for o in range(len(x)) if o!=i)
    pairs = list(itertools.permutations(range(len(s)), 2))
    return sum(p(t, i, j)*(p(t, i, j)/(p(s, j, i) if printed else p(s, i, j))).log() for i,j in pairs)/len(s)

def naive_relational(s, t, distance, angle):
    def dists(x):
        d = torch.stack([(x[i]-x[j]).norm() for i,j in itertools.permutations(range(len(x)), 2)])
        return d/d.mean()
    def angles(x): return torch.stack([F.cosine_similarity(x[i]-x[j], x[k]-x[j], dim=0) for i,j,k in itertools.permutations(range(len(x)), 3)])
    return distance*F.smooth_l1_loss(dists(s), dists(t))+angle*F.smooth_l1_loss(angles(s), angles(t))

@pytest.mark.parametrize('n,seed', [(3,0),(4,1),(7,2)])
def test_against_loops(n, seed):
    s,t = draw(n, 5, seed=seed).double(),draw(n, 8, seed=seed+9).double()
    for printed in (False,True): close(PKT(as_printed=printed)(out(s), out(t)), naive_pkt(s, t, printed))
    for weights in ((1,2),(0,1),(3,0)): close(RelationalKD(*weights)(out(s), out(t)), naive_relational(s, t, *weights))
    rows = lambda x: torch.stack([o/o.norm() for o in x@x.T])
    close(SimilarityKD()(out(s), out(t)), (rows(s)-rows(t)).norm().square()/n**2)

@pytest.mark.parametrize('term', [SoftKL(4), PKT(), RelationalKD(), SimilarityKD(), LogitL1()])
def test_nothing_to_learn_from_oneself(term):
    x = draw(6, 5).requires_grad_()
    loss = term(out(x), out(x))
    loss.backward()
    assert loss.abs()<1e-5 and x.grad.abs().max()<1e-5

def test_printed_pkt_moves_from_oneself():
    x = draw(6, 5).requires_grad_()
    PKT(as_printed=True)(out(x), out(x)).backward()
    assert x.grad.abs().max()>1e-3

@pytest.mark.parametrize('term', all_terms)
def test_gradients_are_numbers_where_images_are_equal(term):
    s,t = draw(6, 5),draw(6, 5, seed=1)
    s[1] = s[0]
    t[3] = t[2]
    s.requires_grad_()
    term(out(s), out(t)).backward()
    assert s.grad.isfinite().all() and s.grad.abs().sum()>0

@pytest.mark.parametrize('term', all_terms)
def test_no_gradient_to_the_teacher_and_full_digits(term):
    s,t = (draw(8, 6, seed=i).requires_grad_() for i in (0,1))
    with torch.autocast('cpu', torch.bfloat16): loss = term(out(s), out(t))
    loss.backward()
    assert loss.dtype==torch.float32 and t.grad is None
    assert torch.equal(loss, term(out(s), out(t)))
    assert term(out(s.bfloat16()), out(t.half())).dtype==torch.float32

def test_parts():
    "Logits are compared part by part, embeddings joined; one part meets each of many"
    a,b,c,d = (draw(6, 4, seed=i) for i in range(4))
    kl,pkt = SoftKL(4),PKT()
    close(kl(out([a,b]), out([c,d])), (kl(out(a), out(c))+kl(out(b), out(d)))/2)
    close(kl(out(a), out([c,d])), (kl(out(a), out(c))+kl(out(a), out(d)))/2)
    close(pkt(out([a,b]), out(c)), pkt(out(torch.cat([a,b], 1)), out(c)))

def test_scale_for_cosines():
    s,t = draw(6, 4),draw(6, 4, seed=1)
    close(SoftKL(16, scale=64)(out(s/64), out(t/64)), SoftKL(16)(out(s), out(t)))

x8,y8 = draw(8, 6),draw(8, 6, seed=1)

@pytest.mark.parametrize('term,s,t,text', [
    (SoftKL(), out(x8), out(y8[:,:5]), '6 classes, the teacher 5'), (LogitL1(), out(x8), out(y8[:,:0]), 'no logits'),
    (SoftKL(), out(x8), ReIDOut(None, y8, y8), 'without `logits`'), (SoftKL(), out(x8), y8, 'a Tensor without'),
    (PKT(), out(x8), out(y8[:7]), '8 images of the student and 7'), (PKT(), out(x8), out(y8.to('meta')), 'teacher on meta'),
    (PKT(), out(x8[:1]), out(y8[:1]), '2 or more'), (RelationalKD(), out(x8[:2]), out(y8[:2]), '3 or more'),
    (SoftKL(), out([x8,x8]), out([y8]*3), '2 parts, the teacher 3')])
def test_bad_outputs(term, s, t, text):
    with pytest.raises(ValueError, match=re.escape(text)): term(s, t)

@pytest.mark.parametrize('make,text', [(lambda: SoftKL(0), 'temperature=0'), (lambda: SoftKL(-1), 'temperature=-1'), (lambda: SoftKL(scale=0), 'scale=0'),
    (lambda: SoftKL(float('nan')), 'temperature=nan'), (lambda: PKT('logits'), "on='logits'"), (lambda: RelationalKD(0, 0), 'one of them above 0'),
    (lambda: LogitL1(-1), 'weight=-1'), (lambda: Distill(None, SoftKL()), 'no teacher'), (lambda: Distill([], SoftKL()), 'no teacher'),
    (lambda: Distill(nn.Identity()), 'no term'), (lambda: Distill(None, SoftKL(), ema=0), 'ema=0')])
def test_bad_settings(make, text):
    with pytest.raises(ValueError, match=text): make()

## Distill

@pytest.fixture(scope='module')
def teacher(data):
    "For images of 64×32, twice as large as the student's"
    dls = reid_dls(data, (64,32), p=3, k=4, augs=[hflip], num_workers=0)
    learn = reid_learner(dls, TinyNet, dtype=torch.float32, seed=5)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3)
    return learn.model.eval()

def learner(data, *cbs, augs=(hflip,), **kwargs):
    dls = tiny_dls(data, augs)
    return reid_learner(dls, **(dict(backbone=TinyNet, dtype=torch.float32, cbs=list(cbs))|kwargs))

def fit(learn, n=2, lr=1e-2, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kwargs)
    return learn

class Killed(Exception): pass

class Kill(Callback):
    order,run_valid = 98,False
    def __init__(self, step=None, how=Killed): self.at,self.error,self.n = step,how,0   # under other names: no settings of a run
    def after_batch(self):
        self.n += 1
        if self.n==self.at: raise self.error('now')
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

def test_terms_join_and_leave(data, teacher):
    learn = learner(data, Distill(teacher, LogitL1(.5), PKT(weight=2.), SoftKL(), SoftKL(4)))
    own,before = learn.loss_func,values(teacher)
    fit(learn)
    assert learn.loss_func is own and same(before, values(teacher)) and not teacher.training
    assert list(learn.recorder.parts)==['ce','triplet','logit_l1','pkt','soft_kl1','soft_kl2']
    assert learn.dls.train.dataset.preproc.size==(32,16) and learn.model.preproc.size==(32,16)

def test_the_sum(data, teacher):
    "The loss that is trained is the weighted sum of the terms"
    losses = []
    class Note(Callback):
        run_valid = False
        def after_loss(self): losses.append(self.learn.loss.detach())
    learn = fit(learner(data, Distill(teacher, LogitL1(.5), PKT(weight=2.)), Note()), 1)
    total = sum(w*learn.recorder.parts[k] for k,w in dict(ce=1, triplet=1, logit_l1=.5, pkt=2).items())
    close(torch.stack(losses), total)

@pytest.mark.parametrize('how', [Killed,KeyboardInterrupt])
def test_all_is_given_back_after_an_error(data, teacher, how):
    learn = learner(data, Distill(teacher, PKT()))
    own = learn.loss_func
    with pytest.raises(how): fit(learn, cbs=Kill(2, how))
    assert learn.loss_func is own and learn.dls.train.dataset.preproc.size==(32,16)
    fit(learn, 1)

def test_another_loss_than_ours(data, teacher):
    def plain(out, pid, camid): return F.cross_entropy(out.logits, pid)
    assert list(fit(learner(data, Distill(teacher, PKT()), loss=plain), 1).recorder.parts)==['plain','pkt']

def test_both_see_the_same_view(data, teacher):
    "What the student is given is the teacher's image made smaller, disturbed once"
    seen = {}
    class Eyes(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net,self.preproc = net,net.preproc
        def outputs(self, x):
            seen['teacher'] = x.clone()
            return self.net.outputs(x)
    class Note(Callback):
        order,run_valid = 0,False
        def before_batch(self): seen['student'] = self.xb[0].clone()
    fit(learner(data, Distill(Eyes(teacher), PKT()), Note(), augs=[hflip,random_erase]), 1)
    assert seen['teacher'].shape[2:]==(64,32)
    assert torch.equal(seen['student'], F.interpolate(seen['teacher'], (32,16), mode='bilinear', antialias=True))

def test_a_teacher_of_smaller_images(data):
    small = reid_model(TinyNet, 6, preproc=Preproc((16,8)))
    learn = fit(learner(data, Distill(small, SoftKL())), 1)
    assert learn.recorder.parts['soft_kl'].isfinite().all()

class Learns(nn.Module):
    "A term with parameters"
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(8, 8)
    def forward(self, s, t): return (self.map(s.emb)-t.emb).pow(2).mean()

@pytest.mark.parametrize('fused', [True,False])
def test_parameters_of_a_term(data, teacher, fused):
    "They are trained while a fit runs, by any optimiser, and are in no group afterwards"
    term = Learns()
    learn = learner(data, Distill(teacher, term), opt_func=partial(reid_adam, fused=fused))
    for _ in range(2):
        was = values(term)
        fit(learn)
        assert not any(torch.equal(a, b) for a,b in zip(was, values(term)))
    assert {id(o) for o in term.parameters()}.isdisjoint(id(p) for o in learn.opt.param_lists for p in o)
    assert [len(o) for o in learn.opt.param_lists]==[len(o) for o in learn.splitter(learn.model)]
    learn.opt.state_dict()

def test_own_rate_for_parameters_of_a_term(data, teacher):
    term = Learns()
    was = values(term)
    fit(learner(data, Distill(teacher, term), ParamGroups(loss_lr=0.)))
    assert same(was, values(term))

def test_several_teachers_are_averaged(data, teacher):
    other = reid_model(TinyNet, 6, preproc=Preproc((32,16))).eval()
    first = [fit(learner(data, Distill(o, SoftKL(4))), 1).recorder.parts['soft_kl'][0] for o in (teacher,other,[teacher,other])]
    assert abs(first[2]-(first[0]+first[1])/2)<.05*first[2]   # the student's images were read at another size

def test_ema_against_a_loop(data):
    class Naive(Callback):
        run_valid = False
        def before_fit(self): self.avg = values(self.model)
        def after_step(self): self.avg = [.9*a+.1*o if o.is_floating_point() else o.clone() for a,o in zip(self.avg, tensors_of(self.model))]
    naive,cb = Naive(),Distill(None, SoftKL(4), ema=.9)
    fit(learner(data, cb, naive))
    for a,b in zip(tensors_of(cb.average), naive.avg): assert torch.allclose(a.double(), b.double(), atol=1e-5)

def test_train_mode_leaves_the_teacher_as_it_was(data, teacher):
    before = values(teacher)
    a,b = (fit(learner(data, Distill(teacher, SoftKL(), train_mode=o)), 1).recorder.parts['soft_kl'][0] for o in (False,True))
    assert a!=b and same(before, values(teacher)) and not teacher.training
    assert all(o.track_running_stats for o in teacher.modules() if isinstance(o, nn.BatchNorm2d))

def test_bfloat16(data, teacher):
    "The teacher runs in the precision of the learner, whose own outputs fastai turns to 32 bits"
    kinds = {}
    class Note:
        name = 'note'
        def __call__(self, s, t):
            kinds.update(student=s.logits.dtype, teacher=t.logits.dtype)
            return PKT()(s, t)
    learn = fit(learner(data, Distill(teacher, Note()), dtype=torch.bfloat16), 1)
    assert kinds==dict(student=torch.float32, teacher=torch.bfloat16) and learn.recorder.parts['note'].isfinite().all()

def test_part_models(data):
    kw = dict(preproc=Preproc((32,16)))
    big = pcb(TinyNet, 6, n_parts=2, n_emb=4)
    big.preproc = Preproc((32,16))
    fit(learner(data, Distill(big, SoftKL(), PKT())), 1)

def find_lr(learn, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False, stop_div=False, **kwargs)

def test_lr_find(data, teacher, tmp_path):
    learn = learner(data, Distill(teacher, PKT()), path=tmp_path)
    find_lr(learn)
    assert isinstance(learn.loss_func, ReIDLoss) and len(learn.loss_func.terms)==2

@pytest.mark.filterwarnings('error:Could not load the optimizer')
@pytest.mark.parametrize('what,fused', [('overhaul',True), ('sskd',False)])
def test_lr_find_leaves_no_trace(data, teacher, tmp_path, what, fused):
    "Connectors, the second classifier, the moving average and the optimiser are what they were, after a Ctrl-C too"
    if what=='overhaul':
        student,big = nets(resnet18, resnet18)
        cb,own = Distill(big, SoftKL(), term := Overhaul(student, big), ema=.9),dict(model=student)
    else: cb,own = SSKD(teacher, data.gallery, bs=4, ema=.9),dict(backbone=TinyNet)
    learn = reid_learner(tiny_dls(data), dtype=torch.float32, cbs=cb, path=tmp_path, opt_func=partial(reid_adam, fused=fused), **own)
    fit(learn, 1, 1e-3)
    parts = [cb.average, term if what=='overhaul' else cb.aux, learn.model]
    was = [values(o) for o in parts]
    find_lr(learn, end_lr=1.)
    assert all(same(a, values(b)) for a,b in zip(was, parts)) and cb.average is parts[0] and learn.opt.state_dict()
    with pytest.raises(Killed), learn.no_bar(), learn.no_logging():
        learn.add_cb(kill := Kill(15))
        learn.lr_find(num_it=20, show_plot=False, stop_div=False)
    learn.remove_cb(kill)
    assert all(same(a, values(b)) for a,b in zip(was, parts))
    fit(learn, 1, 1e-3)

def test_the_average_begins_where_the_fit_begins(data):
    "After new weights as well"
    class First(Callback):
        order,run_valid = -5,False
        def before_batch(self):
            if self.train_iter==0: self.found = same(values(self.learn.distill.average), values(self.model))
    learn = learner(data, Distill(None, SoftKL(4), ema=.9), first := First())
    fit(learn, 1)
    assert first.found and not same(values(learn.distill.average), values(learn.model))
    learn.model.load_state_dict(reid_model(TinyNet, 6).state_dict())
    first.found = False
    fit(learn, 1)
    assert first.found

## What was said, kept

class Dim(Transform):
    def encodes(self, x:TensorImage): return x*.9

def count_calls(net):
    calls = []
    return calls,net.backbone.register_forward_hook(lambda *o: calls.append(1))

def test_cache(data, teacher, tmp_path):
    calls,hook = count_calls(teacher)
    plain = fit(learner(data, Distill(teacher, SoftKL(), PKT()), augs=[hflip,random_erase]))
    runs = []
    for _ in range(2):
        calls.clear()
        runs.append((fit(learner(data, Distill(teacher, SoftKL(), PKT(), cache=tmp_path), augs=[hflip,random_erase])), len(calls)))
    hook.remove()
    assert [n for _,n in runs]==[2*len(plain.dls.train), 0] and len(list(tmp_path.iterdir()))==2
    for learn,_ in runs: assert same(values(learn.model), values(plain.model))

@pytest.mark.parametrize('what', ['seed','augs','teacher','tfms'])
def test_cache_of_other_images_is_not_read(data, teacher, tmp_path, what):
    fit(learner(data, Distill(teacher, PKT(), cache=tmp_path)), 1)
    before = {o.name for o in tmp_path.iterdir()}
    net = deepcopy(teacher)
    if what=='teacher': net.head.classifier.weight.data += .1
    kw = dict(seed=1) if what=='seed' else {}
    if what=='tfms': kw['batch_tfms'] = [Dim]
    dls = tiny_dls(data, [hflip,random_erase] if what=='augs' else [hflip], **kw)
    fit(reid_learner(dls, TinyNet, dtype=torch.float32, cbs=Distill(net, PKT(), cache=tmp_path)), 1)
    assert len({o.name for o in tmp_path.iterdir()}-before)==1

def test_a_cache_belongs_to_the_teachers_size(data, tmp_path):
    "Both read the images as the student's loader does, and make them smaller or not"
    net = reid_model(TinyNet, 6, preproc=Preproc((32,16)))
    other = deepcopy(net)
    other.preproc = Preproc((16,8))
    for o in (net,other): fit(learner(data, Distill(o, PKT(), cache=tmp_path)), 1)
    assert len(list(tmp_path.iterdir()))==2

def test_cached_outputs_of_other_pixels_are_not_used(data, teacher, tmp_path):
    "The first batch is the same, a later one is not: a transform of one's own, or a file that has changed"
    class Late(Transform):
        def __init__(self, at): self.at,self.n = at,0
        def encodes(self, x:TensorImage):
            self.n += 1
            return x*.5 if self.n==self.at else x
    def go(at, **kwargs):
        learn = reid_learner(tiny_dls(data, [hflip], batch_tfms=[Late(at)]), TinyNet, dtype=torch.float32, cbs=Distill(teacher, SoftKL(), **kwargs))
        return fit(learn, 1)
    go(0, cache=tmp_path)
    want = go(2)
    calls,hook = count_calls(teacher)
    for n in (1,0):
        calls.clear()
        assert same(values(go(2, cache=tmp_path).model), values(want.model)) and len(calls)==n
    hook.remove()
    assert len(list(tmp_path.iterdir()))==1

def test_a_cache_wants_batches_that_come_again(data, teacher, tmp_path):
    dls = tiny_dls(data)
    dls.loaders[0] = dls.train.new(shuffle=False, dataset=dls.train.dataset, bs=8)
    with pytest.raises(ValueError, match='a ReIDLoader: expected the PKLoader'):
        fit(reid_learner(dls, TinyNet, dtype=torch.float32, cbs=Distill(teacher, PKT(), cache=tmp_path)), 1)

def test_a_broken_cache_is_named(data, teacher, tmp_path):
    fit(learner(data, Distill(teacher, PKT(), cache=tmp_path)), 1)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=path.name): fit(learner(data, Distill(teacher, PKT(), cache=tmp_path)), 1)

def test_no_half_epoch_in_the_cache(data, teacher, tmp_path):
    with pytest.raises(Killed): fit(learner(data, Distill(teacher, PKT(), cache=tmp_path), Kill(2)))
    assert not list(tmp_path.iterdir())

## Resuming

def run(data, teacher, *cbs, **kwargs):
    torch.manual_seed(0)
    return fit(learner(data, Distill(teacher, SoftKL(), PKT(), ema=.9, **kwargs), *cbs, augs=[hflip,random_erase]), 3)

@pytest.mark.parametrize('step', [1,4])
def test_resume(data, teacher, tmp_path, step):
    whole = run(data, teacher, Kill())
    with pytest.raises(Killed): run(data, teacher, Resumable(tmp_path, every_iters=1), Kill(step))
    again = run(data, teacher, Resumable(tmp_path, every_iters=1, resume=True), Kill())
    assert same(values(whole.model), values(again.model)) and same(values(whole.distill.average), values(again.distill.average))
    assert all(torch.equal(whole.recorder.parts[k], again.recorder.parts[k]) for k in whole.recorder.parts)
    assert max(o.stat().st_size for o in tmp_path.iterdir())<2e6

def test_resume_with_another_teacher_is_refused(data, teacher, tmp_path):
    with pytest.raises(Killed): run(data, teacher, Resumable(tmp_path, every_iters=1), Kill(2))
    other = deepcopy(teacher)
    other.head.classifier.weight.data += .1
    with pytest.raises(ValueError, match='other settings'): run(data, other, Resumable(tmp_path, resume=True), Kill())

## Bad teachers

def strangers(net):
    net = deepcopy(net)
    net.pid_names = [f'elsewhere/{i}' for i in range(6)]
    return net

def nameless(net, **kwargs):
    net = deepcopy(net)
    net.pid_names = []
    for k,o in kwargs.items(): setattr(net, k, o)
    return net

def fewer_names(net):
    net = deepcopy(net)
    net.pid_names = net.pid_names[:-1]
    return net

def more_classes(net):
    net = deepcopy(net)
    net.pids = list(range(9))
    return net

@pytest.mark.parametrize('make,text', [(lambda t: Distill(strangers(t), SoftKL()), '6 classes of the teacher are other people'),
    (lambda t: Distill(more_classes(t), LogitL1()), '9 classes, the data 6'), (lambda t: Distill(fewer_names(t), LogitL1()), '5 classes, the data 6'),
    (lambda t: Distill(nameless(t, pids=[o+100 for o in t.pids]), SoftKL()), '6 classes of the teacher are other people'), (lambda t: Distill(deepcopy(t).half(), PKT()), 'torch.float16'),
    (lambda t: Distill(deepcopy(t).bfloat16(), PKT()), 'torch.bfloat16'), (lambda t: Distill(deepcopy(t).to('meta'), PKT()), 'meta'),
    (lambda t: Distill(TinyNet(), PKT()), 'expected a ReIDModel'), (lambda t: Distill(reid_model(TinyNet, 0, preproc=t.preproc), SoftKL()), 'no logits'),
    (lambda t: Distill(reid_model(TinyNet, 7, preproc=t.preproc), SoftKL()), '6 classes, the teacher 7'),
    (lambda t: Distill([t,3], PKT()), 'the teacher is a int')])
def test_bad_teachers(data, teacher, make, text):
    with pytest.raises(ValueError, match=re.escape(text)): fit(learner(data, make(teacher)))

def test_teachers_of_other_people_may_say_who_is_alike(data, teacher):
    fit(learner(data, Distill([strangers(teacher),more_classes(teacher)], PKT(), RelationalKD(), SimilarityKD())), 1)

def test_a_teacher_without_names_or_numbers(data, teacher):
    "Numbers are compared where there are no names; without either nobody can check"
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='nobody can check')
        fit(learner(data, Distill(nameless(teacher), SoftKL())), 1)
        fit(learner(data, Distill(nameless(teacher, pids=[]), PKT())), 1)
    with pytest.warns(UserWarning, match='nobody can check'): fit(learner(data, Distill(nameless(teacher, pids=[]), SoftKL())), 1)

def test_from_a_file_and_from_names(tmp_path):
    teacher = reid_model(partial(osnet, width='x0_25'), 6)
    save_reid(path := tmp_path/'a teacher.pt', teacher)
    test = dict(fn='Distill', teacher=str(path), terms=['SoftKL', dict(fn='PKT', weight=2.)])
    exp = Experiment(dict(callbacks=[test], weights='none')).check()
    cb = next(o for o in _callbacks(exp) if isinstance(o, Distill))
    assert [type(o) for o in cb.terms]==[SoftKL,PKT] and cb.terms[1].weight==2
    assert all(torch.equal(a, b) for a,b in zip(cb.teachers[0].state_dict().values(), teacher.state_dict().values()))
    assert names_of('between').keys()=={'SoftKL','LogitL1','PKT','RelationalKD','SimilarityKD'}

@pytest.mark.parametrize('terms,text', [(['SoftKl'], 'did you mean SoftKL'), ([dict(fn='SoftKL', temperatur=2)], 'did you mean temperature'), (3, 'expected a name')])
def test_bad_names_of_terms(terms, text):
    with pytest.raises(ValueError, match=text): Experiment(dict(callbacks=[dict(fn='Distill', teacher='t.pt', terms=terms)]))

def test_a_teacher_file_that_is_not_there():
    exp = Experiment(dict(callbacks=[dict(fn='Distill', teacher='gone.pt', terms=['PKT'])]))
    with pytest.raises(ValueError, match='callbacks: there is no file gone.pt'): exp.check()
    for terms in ([],None):
        with pytest.raises(ValueError, match='callbacks: Distill has no term'): Experiment(dict(callbacks=[dict(fn='Distill', teacher='gone.pt', terms=terms)])).check()

def test_a_student_that_is_taught_already(data, teacher):
    with pytest.raises(ValueError, match='has teachers already'): fit(learner(data, Distill(teacher, PKT()), Distill(teacher, SoftKL())))

def test_the_student_is_its_own_teacher(data):
    learn = learner(data)
    with pytest.raises(ValueError, match='its own teacher'): fit(learn, cbs=Distill(learn.model, PKT()))

def test_an_unequal_batch_among_teachers(data, teacher):
    class Short(nn.Module):
        preproc = teacher.preproc
        def outputs(self, x): return ReIDOut(*(o[:-1] for o in teacher.outputs(x)))
    with pytest.raises(ValueError, match='12 images of the student and 11 of the teacher'): fit(learner(data, Distill([teacher,Short()], PKT())))

## Feature maps

def nets(student, teacher, size=(32,16)):
    kw = dict(preproc=Preproc(size))
    with thin_resnets(): return reid_model(student, 6, **kw),reid_model(teacher, 6, **kw).eval()

@pytest.mark.parametrize('name,make', slow_but([('resnet18',resnet18),('resnet34',resnet34),('resnet50_ibn',resnet50_ibn),
    ('resnet50_nl',partial(resnet50, nl=True)),('resnet18_se',partial(resnet18, se=True)),('resnest',partial(resnest, 50))], 'resnet18','resnet50_ibn'))
def test_taps_are_what_the_last_relu_gets(name, make):
    "The ReLU of a tapped map is what its block puts out"
    student,teacher = nets(resnet18, make)
    term,after = Overhaul(student, teacher),{}
    off = term.attach()
    blocks = [getattr(teacher.backbone, f'layer{i}')[-1] for i in (1,2,3,4)]
    hooks = [b.register_forward_hook(lambda m,a,y: after.__setitem__(m, y)) for b in blocks]
    with torch.no_grad(): teacher.outputs(torch.rand(4, 3, 64, 32))
    for tap,b in zip(term.taps[1], blocks):
        x = tap.take()
        assert torch.equal(x.relu(), after[b]) and (x<0).any()
    off()
    for o in hooks: o.remove()
    assert not any(o._forward_pre_hooks or o._forward_hooks for o in teacher.modules())

def test_overhaul_against_a_loop():
    student,teacher = nets(resnet18, resnet50_ibn)
    term = Overhaul(student, teacher)
    off,x = term.attach(),torch.rand(4, 3, 32, 16)
    s = student(x)
    with torch.no_grad(): t = teacher.outputs(x)
    maps = [[tap.map.clone() for tap in o] for o in term.taps]
    want = 0.
    for i,(a,b) in enumerate(zip(*maps)):
        a,m = term.connectors[i](a),getattr(term, f'margin{i+1}')
        for c in range(len(m)):
            target = b[:,c].clamp(min=m[c].item())
            want = want + ((a[:,c]-target)**2)[(a[:,c]>target)|(target>0)].sum()/2**(3-i)
    close(term(s, t), want/4/10000, 1e-4)
    off()

def test_a_smaller_student_map_is_compared_with_means():
    student,teacher = nets(resnet18, resnet18)
    term = Overhaul(student, teacher)
    off,x = term.attach(),torch.rand(4, 3, 64, 32)
    with torch.no_grad(): t = teacher.outputs(x)
    s = student(F.interpolate(x, (32,16)))
    assert term(s, t).isfinite()
    off()

def test_overhaul_in_a_fit(data):
    student,teacher = nets(resnet18, resnet18, (32,16))
    term = Overhaul(student, teacher)
    learn = reid_learner(tiny_dls(data), model=student, dtype=torch.bfloat16, cbs=Distill(teacher, SoftKL(), term))
    was = values(term)
    fit(learn, 1, 1e-3)
    assert learn.recorder.parts['overhaul'].isfinite().all()
    changed = [not torch.equal(a, b) for a,b in zip(was, values(term))]
    assert sum(changed)>=12   # all weights of the connectors, and their statistics
    assert not any(o._forward_pre_hooks for o in student.modules())

def test_a_term_of_one_teacher_among_several(data, teacher):
    student,big = nets(resnet18, resnet18)
    learn = reid_learner(tiny_dls(data), model=student, dtype=torch.float32, cbs=Distill([teacher,big], PKT(), Overhaul(student, big)))
    assert list(fit(learn, 1, 1e-3).recorder.parts)==['ce','triplet','pkt','overhaul']

def test_overhaul_of_two_teachers(data):
    "Connectors and margins for each teacher; with weights of a half the sum is the mean over teachers"
    torch.manual_seed(1)
    student,a = nets(resnet18, resnet18)
    b = nets(resnet18, resnet18)[1]
    start = deepcopy(student.state_dict())
    def parts(teachers, weight):
        student.load_state_dict(start)
        student.n_epochs,terms = 0,[]
        for o in teachers:
            torch.manual_seed(len(terms) if len(teachers)>1 else int(o is b))
            terms.append(Overhaul(student, o, weight=weight))
        learn = reid_learner(tiny_dls(data), model=student, dtype=torch.float32, cbs=[Distill(teachers, *terms), note := Loss()])
        return fit(learn, 1, 1e-3).recorder.parts,note.first
    class Loss(Callback):
        run_valid = False
        def after_loss(self):
            if self.train_iter==0: self.first = self.learn.loss.item()
    (of_a,_),(of_b,_),(both,loss) = parts([a], 1.),parts([b], 1.),parts([a,b], .5)
    close(both['overhaul1'][0], of_a['overhaul'][0], 1e-5)
    close(both['overhaul2'][0], of_b['overhaul'][0], 1e-5)
    assert of_a['overhaul'][0]!=of_b['overhaul'][0]
    close(torch.tensor(loss), sum(both[k][0] for k in ('ce','triplet'))+(of_a['overhaul'][0]+of_b['overhaul'][0])/2, 1e-5)
    assert not any(o._forward_pre_hooks for o in student.modules())

def test_overhaul_resumes(data, tmp_path):
    def go(*cbs):
        torch.manual_seed(0)
        student,teacher = nets(resnet18, resnet18, (32,16))
        learn = reid_learner(tiny_dls(data), model=student, dtype=torch.float32, cbs=[Distill(teacher, Overhaul(student, teacher)), *cbs])
        return fit(learn, 2, 1e-3)
    whole = go(Kill())
    with pytest.raises(Killed): go(Resumable(tmp_path, every_iters=1), Kill(2))
    assert same(values(whole.model), values(go(Resumable(tmp_path, every_iters=1, resume=True), Kill()).model))

def test_bad_overhaul(data, teacher):
    student,big = nets(resnet18, resnet18)
    term = Overhaul(student, big)
    off = term.attach()
    with pytest.raises(ValueError, match='attached already'): term.attach()
    off()
    with pytest.raises(ValueError, match='attached already'): fit(reid_learner(tiny_dls(data), model=student, dtype=torch.float32, cbs=Distill(big, term, term)))
    with pytest.raises(ValueError, match='no map'): term(None, None)
    with pytest.raises(ValueError, match='the teacher has a TinyNet'): Overhaul(student, teacher)
    with pytest.raises(ValueError, match='another teacher'): fit(learner(data, Distill(teacher, term)))
    with pytest.raises(ValueError, match='feature maps'): fit(learner(data, Distill(big, term, cache='nowhere')))

## Unlabelled images

def test_sskd(data, teacher, tmp_path):
    cb = SSKD(teacher, data.gallery, bs=5)
    learn = fit(learner(data, cb))
    assert list(learn.recorder.parts)==['ce','triplet','soft_kl','unlabelled']
    assert cb.more.plan.shape==(len(learn.dls.train),5)
    learn.save_reid(tmp_path/'model.pt')
    assert same(values(load_reid(tmp_path/'model.pt', reid_model(TinyNet, 6))), values(learn.model))

class NoNorm(nn.Sequential):
    n_feat = 8
    def __init__(self): super().__init__(nn.Conv2d(3,8,3,4,1), nn.ReLU())

def test_sskd_labelled_rows_are_the_same(data, teacher):
    "With weight 0 and no norm the unlabelled images change nothing, whichever they are; with another weight they do"
    noise = pd.DataFrame(dict(path=[str(i) for i in range(9)], image=list(np.random.default_rng(0).integers(0, 256, (9,32,16,3), dtype=np.uint8))))
    def ce(cb): return fit(learner(data, cb, head=LinearHead, backbone=NoNorm)).recorder.parts['ce']
    alone = ce(Distill(teacher, SoftKL()))
    for images in (data.gallery, noise):
        close(ce(SSKD(teacher, images, SoftKL(), bs=5, weight=0)), alone, 1e-4)
        assert (ce(SSKD(teacher, images, SoftKL(), bs=5, weight=1000.))[2:]-alone[2:]).abs().max()>1e-3

def test_unlabelled_images_are_disturbed_as_the_others_are(data, teacher):
    "By transforms of whole batches as well"
    seen = []
    class Dark(Transform):
        def encodes(self, x:TensorImage): return x*0
    class Note(Callback):
        order,run_valid = 0,False
        def before_batch(self): seen.append(self.xb[0].abs().max())
    fit(reid_learner(tiny_dls(data, batch_tfms=[Dark]), TinyNet, dtype=torch.float32, cbs=[SSKD(teacher, data.gallery, bs=5), Note()]), 1)
    assert not any(seen)

def test_sskd_with_other_images_is_no_resuming(data, teacher, tmp_path):
    "Other files, and other pixels under the same names"
    def table(seed): return pd.DataFrame(dict(path=list('abc'), image=list(np.random.default_rng(seed).integers(0, 256, (3,32,16,3), dtype=np.uint8))))
    for i,(a,b) in enumerate([(data.gallery, data.query), (table(0), table(1))]):
        folder = tmp_path/str(i)
        with pytest.raises(Killed): fit(learner(data, SSKD(teacher, a, bs=5), Resumable(folder, every_iters=1), Kill(2)))
        with pytest.raises(ValueError, match='other settings:\ncallbacks.SSKD.*pixels'): fit(learner(data, SSKD(teacher, b, bs=5), Resumable(folder, resume=True), Kill()))
        fit(learner(data, SSKD(teacher, a, bs=5), Resumable(folder, resume=True), Kill()))

def test_sskd_takes_no_terms_on_feature_maps(data):
    student,big = nets(resnet18, resnet18)
    with pytest.raises(ValueError, match='Overhaul looks into the networks'): SSKD(big, data.gallery, Overhaul(student, big))

def test_sskd_resumes(data, teacher, tmp_path):
    def go(*cbs): return fit(learner(data, SSKD(teacher, data.gallery.path.tolist(), bs=5), *cbs), 3)
    whole = go(Kill())
    with pytest.raises(Killed): go(Resumable(tmp_path, every_iters=1), Kill(4))
    again = go(Resumable(tmp_path, every_iters=1, resume=True), Kill())
    assert same(values(whole.model), values(again.model))

@pytest.mark.parametrize('make,text', [(lambda t: SSKD(t, []), 'no unlabelled images'), (lambda t: SSKD(t, ['a.jpg'], bs=0), 'bs=0'),
    (lambda t: SSKD(None, ['a.jpg'], ema=.9), 'no teacher'), (lambda t: SSKD(t, ['a.jpg'], temperature=0), 'temperature=0')])
def test_bad_sskd(teacher, make, text):
    with pytest.raises(ValueError, match=text): make(teacher)

def test_sskd_of_a_folder(data, teacher, tmp_path):
    for i,o in enumerate(data.query.path[:3]): shutil.copy(o, tmp_path/f'{i} ü.png')
    assert SSKD(teacher, tmp_path).images.path.map(lambda o: Path(o).name).tolist()==['0 ü.png','1 ü.png','2 ü.png']
    with pytest.raises(FileNotFoundError, match='no folder'): SSKD(teacher, tmp_path/'empty')

def test_an_unlabelled_image_that_is_gone(data, teacher):
    with pytest.raises(FileNotFoundError, match='gone.jpg'): fit(learner(data, SSKD(teacher, ['gone.jpg','gone too.jpg'], bs=2)))

## Mixed precision on a GPU

@pytest.mark.cuda
def test_float16_on_cuda(data):
    "Logits, embeddings, feature maps, unlabelled images and the average of the student"
    student,big = nets(resnet18, resnet18)
    dls = tiny_dls(data, device='cuda')
    cbs = Distill(big, SoftKL(), PKT(), Overhaul(student, big), ema=.9),SSKD(big, data.gallery, bs=4)
    for cb in cbs:
        learn = fit(reid_learner(dls, model=student, dtype=torch.float16, cbs=cb), 1, 1e-4)
        assert all(o.isfinite().all() for o in learn.recorder.parts.values()) and all(o.is_cuda for o in big.parameters())
        assert all(o.isfinite().all() for o in student.state_dict().values())

## Two processes

script = fresh.small+'''
class Block(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv,self.bn2,self.relu = nn.Conv2d(a, b, 3, 2, 1, bias=False),nn.BatchNorm2d(b),nn.ReLU()
    def forward(self, x): return self.relu(self.bn2(self.conv(x)))

class Stages(nn.Module):
    n_feat = 32
    def __init__(self):
        super().__init__()
        for i,(a,b) in enumerate([(3,8),(8,16),(16,16),(16,32)], 1): setattr(self, f'layer{i}', nn.Sequential(Block(a, b)))
    def forward(self, x):
        for i in (1,2,3,4): x = getattr(self, f'layer{i}')(x)
        return x

def network(backbone, size, seed):
    torch.manual_seed(seed)
    return reid_model(backbone, len(dls.pids), preproc=Preproc(size))

def taught(what, student, teacher):
    if what=='outputs': return Distill(teacher, SoftKL(4), PKT(weight=20.), SimilarityKD(weight=9.), ema=.9)
    if what=='maps': return Distill(teacher, SoftKL(4), Overhaul(student, teacher, weight=300.))
    return SSKD(teacher, data.gallery, bs=p, temperature=4)

data,res = toy_reid(folder, n_ids=23, size=(64,32), progress=False),{}
dls = reid_dls(data, (32,32), p, 4, augs=[], num_workers=0)
for what in ('outputs','maps','unlabelled'):
    net = Stages if what=='maps' else tiny
    student,teacher = network(net, (32,32), 4),network(net, (64,32), 3).eval()
    teacher.pids = dls.pids
    learn = reid_learner(dls, model=student, dtype=torch.float32, cbs=taught(what, student, teacher)).across_processes(minutes=1)
    note,dls.train.epoch = Note(),0
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3, cbs=note)
    res[what] = dict(losses=note.seen, weight=student.head.classifier.weight[0].tolist(), parts=list(learn.recorder.parts))
json.dump(res, open(out+os.environ.get('RANK', '0')+'.json', 'w'))
'''

@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    "What one process has learnt, and each of two"
    tmp = tmp_path_factory.mktemp('pair')
    def start(name, p, **env): return fresh.Fresh(tmp/f'{name}{env.get("RANK", "")}.txt', script, tmp/'toy', p, tmp/name, **env)
    alone = start('one', 8)
    assert alone.wait(300)==0, alone.text
    net = fresh.meeting()
    pair = [start('two', 4, RANK=str(r), LOCAL_RANK=str(r), **net) for r in range(2)]
    for o in pair: assert o.wait(300)==0, o.text
    return [json.loads((tmp/f'{o}.json').read_text()) for o in ('one0','two0','two1')]

@pytest.mark.slow
@pytest.mark.parametrize('what,parts', [('outputs',['soft_kl','pkt','similarity']), ('maps',['soft_kl','overhaul']), ('unlabelled',['soft_kl','unlabelled'])])
def test_two_processes_learn_what_one_learns(processes, what, parts):
    "Teachers' outputs are gathered as the student's are; of maps and unlabelled images each process has its part of the loss"
    one,*two = (o[what] for o in processes)
    mean = np.mean([o['losses'] for o in two], 0)
    assert two[0]['weight']==two[1]['weight'] and one['parts']==['ce','triplet',*parts]
    assert len(mean)==len(one['losses'])>2 and mean==pytest.approx(one['losses'], rel=1e-4)
    if what=='outputs': assert two[0]['losses']==pytest.approx(two[1]['losses'], rel=1e-5)
    assert two[0]['weight']==pytest.approx(one['weight'], rel=1e-2, abs=2e-4)
