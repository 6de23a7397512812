"Head-shoulder adaptive attention: what each mechanism must do, contracts, bad input"
import copy
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.backbone.resnet import resnet18, resnet50, resnext50
from fastreid_nb.heads.haa import HAA, Attention, BlackLoss, DarkGate, HAAHead, Locator, PoolReduce, StripAttention, corner_mse, darkness, haa, zoom
from fastreid_nb.heads.core import ReIDOut
from fastreid_nb.heads.rebuild import model_from_recipe
from fastreid_nb.heads.model import reid_model
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.data.toy import toy_camera, toy_person, toy_photo, toy_reid
from fastreid_nb.train.checkpoint import load_reid, save_reid
from fastreid_nb.train.core import reid_learner, reid_splitter
from torch import nn
from tiny_models import thin_resnets

small = dict(backbone=resnet18, n_global=48, n_strip=16)
pids = torch.arange(4).repeat_interleave(2)

@pytest.fixture(autouse=True)
def thin():
    "Small networks where the number of channels does not matter"
    with thin_resnets(): yield

def small_model(n_pids=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    return haa(n_pids=n_pids, **(small|kwargs))

def rand_pics(b=8, h=64, w=32, seed=0): return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed))

def people(seed, n, black, size=(64,32)):
    "`n` drawn people, in black or in bright clothes"
    res = []
    for i in range(n):
        rng = np.random.default_rng([seed,i])
        shade = rng.integers(10, 40, 3) if black else rng.integers(150, 250, 3)
        p = toy_person(rng)|dict.fromkeys(('upper','upper2','lower'), tuple(int(o) for o in shade))|dict(height=1.)
        res.append(np.array(toy_photo(p, toy_camera(rng, cast=0)|dict(scale=1.), rng, occlusion=0, size=size)))
    return torch.from_numpy(np.stack(res)).permute(0, 3, 1, 2)/255

def below(model, h): return int(model.head.locator.lowest*h)+1

# Place and zoom

def naive_zoom(x, box, size):
    "Bilinear interpolation of one picture, pixel by pixel; zeros outside"
    (c,h,w),(cx,cy,bw,bh) = x.shape,box.tolist()
    res = torch.zeros(c, *size)
    at = lambda y,x_: x[:,y,x_] if 0<=y<h and 0<=x_<w else torch.zeros(c)
    for i in range(size[0]):
        for j in range(size[1]):
            py,px = h*(cy+bh*((i+.5)/size[0]-.5))-.5,w*(cx+bw*((j+.5)/size[1]-.5))-.5
            y0,x0 = int(np.floor(py)),int(np.floor(px))
            fy,fx = py-y0,px-x0
            res[:,i,j] = (1-fy)*((1-fx)*at(y0,x0)+fx*at(y0,x0+1))+fy*((1-fx)*at(y0+1,x0)+fx*at(y0+1,x0+1))
    return res

@pytest.mark.parametrize('seed', range(4))
def test_zoom_is_bilinear_interpolation(seed):
    x,g = rand_pics(2, 9, 7, seed),torch.Generator().manual_seed(seed)
    box = torch.rand(2, 4, generator=g)*.8+.1
    got = zoom(x, box, (5,6))
    torch.testing.assert_close(got, torch.stack([naive_zoom(o, b, (5,6)) for o,b in zip(x, box)]), atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize('dtype', [torch.float64,torch.float32,torch.bfloat16])
def test_zoom_keeps_dtype_and_moves_with_the_box(dtype):
    x = rand_pics(2, 16, 16).to(dtype)
    box = torch.tensor([[.5,.4,.5,.5]]).repeat(2, 1).requires_grad_()
    out = zoom(x, box, (8,8))
    assert out.dtype==dtype
    out.float().pow(2).sum().backward()
    assert box.grad.isfinite().all() and (box.grad!=0).all()

def test_locator_stays_in_reach():
    loc = Locator(prior=(.5,.3,.6,.3), reach=(.1,.2,.3,.1)).eval()
    assert torch.equal(loc(rand_pics()), loc.prior.expand(8, 4))
    nn.init.normal_(loc.box.weight, std=1e3)
    box = loc(rand_pics())
    assert ((box-loc.prior).abs()<=loc.reach+1e-6).all() and ((box-loc.prior).abs().amax(0)>.5*loc.reach).all()
    assert (box[:,1]+box[:,3]/2).max()<=loc.lowest+1e-6

def test_locator_learns_boxes():
    "Bright squares on black: 60 steps find them in new pictures, and a locator that may not move does not"
    def squares(seed, n=48):
        g = torch.Generator().manual_seed(seed)
        box = torch.cat([torch.rand(n, 2, generator=g)*torch.tensor([.2,.3])+torch.tensor([.4,.07]), torch.tensor([[.4,.2]]).expand(n, 2)], 1)
        y,x = (torch.arange(o)/o for o in (64,32))
        inside = lambda c,s,t: (t[None]-c[:,None]).abs()<s[:,None]/2
        m = inside(box[:,1], box[:,3], y)[:,:,None]&inside(box[:,0], box[:,2], x)[:,None]
        return m[:,None].float().repeat(1, 3, 1, 1), box
    torch.manual_seed(0)
    errs = {}
    for name,loc in dict(free=Locator(), fixed=Locator(reach=(0,0,0,0))).items():
        opt = torch.optim.Adam(loc.parameters(), lr=3e-3)
        x,box = squares(0)
        for _ in range(60 if name=='free' else 3):
            opt.zero_grad()
            corner_mse(loc(x), box).backward()
            opt.step()
        x,box = squares(1)
        with torch.no_grad(): errs[name] = corner_mse(loc.eval()(x), box).item()
    assert errs['free']<errs['fixed']/4, errs

def test_features_for_triplets():
    "With 'whole' a triplet sees the image and what is joined, and no strip alone; the joined one reaches the strips"
    pid = torch.arange(4).repeat_interleave(2)
    for feat,widths in (('all',[48,16,16,16,48,96]),('whole',[48,96])):
        model = small_model(feat=feat).train()
        out = model(rand_pics())
        assert len(out.logits)==6 and [o.shape[1] for o in out.feat]==widths
        for feats,moves in ((out.feat[:1],False),(out.feat[-1:],True)):
            model.zero_grad()
            TripletLoss(5.)(out._replace(feat=feats), pid).backward(retain_graph=True)
            grad = model.head.strips[0].reduce.weight.grad
            assert (grad is not None and bool(grad.abs().sum()>0))==moves

def test_a_frozen_locator_stays_as_it_is():
    model = small_model()
    model.head.locator.requires_grad_(False)
    before = {k:v.clone() for k,v in model.head.locator.state_dict().items()}
    model.train()(people(1, 4, black=False, size=(64,32)))
    assert all(torch.equal(v, before[k]) for k,v in model.head.locator.state_dict().items())
    model.head.locator.requires_grad_(True)
    assert model.train().head.locator.training

def test_corner_mse():
    a,b = torch.rand(5, 4, generator=torch.Generator().manual_seed(1)),torch.rand(5, 4, generator=torch.Generator().manual_seed(2))
    tot = 0
    for (x,y,w,h),(x2,y2,w2,h2) in zip(a.tolist(), b.tolist()):
        tot += (2*(x-w/2)-2*(x2-w2/2))**2+(2*(y-h/2)-2*(y2-h2/2))**2+(2*(x+w/2)-2*(x2+w2/2))**2+(2*(y+h/2)-2*(y2+h2/2))**2
    assert corner_mse(a, b).item()==pytest.approx(tot/20, rel=1e-5) and corner_mse(a, a)==0

# The head-shoulder stream

def streams(model, x):
    with torch.no_grad(): out = model.outputs(x)
    n = len(model.head.strips)
    return dict(whole=out.feat[0], strips=torch.cat(out.feat[1:n+1], 1), shoulders=out.feat[n+1], joined=out.feat[-1])

def gap(model, x, y, key): return (streams(model, x)[key]-streams(model, y)[key]).abs().max().item()

@pytest.mark.parametrize('train_locator', [False,True])
def test_legs_do_not_reach_the_head_shoulder_stream(train_locator):
    "Fails if the region is the whole picture"
    model = small_model().eval()
    if train_locator: nn.init.normal_(model.head.locator.box.weight, std=1.)
    x = people(1, 4, black=False, size=(128,64))
    y = x.clone()
    y[:,:,below(model, 128):] = rand_pics(4, 128-below(model, 128), 64)
    assert gap(model, x, y, 'shoulders')==gap(model, x, y, 'strips')==0
    assert gap(model, x, y, 'whole')>1e-3
    class Whole(nn.Module):
        def forward(self, x): return x.new_tensor([.5,.5,1.,1.]).expand(len(x), 4)
    model.head.locator = Whole()
    y = x.clone()
    y[:,:,100:] = rand_pics(4, 28, 64)
    assert gap(model, x, y, 'shoulders')>1e-3

def test_head_changes_reach_both_streams():
    model,x = small_model().eval(),people(1, 4, black=False)
    y = x.clone()
    y[:,:,2:20] = rand_pics(4, 18, 32)
    assert min(gap(model, x, y, k) for k in ('whole','strips','shoulders','joined'))>1e-3

def test_region_is_enlarged_before_the_second_network():
    "It sees as many pixels of the region as `size` says, not a cut of the first network's map"
    seen = {}
    for size in (None,(96,80)):
        model = small_model(size=size).eval()
        hook = model.head.branches['shoulder'].register_forward_pre_hook(lambda m,args: seen.update({size:args[0]}))
        x = rand_pics(2, 128, 64)
        with torch.no_grad(): model(x)
        hook.remove()
        assert seen[size].shape==(2,3,*(size or (128,64)))
        torch.testing.assert_close(seen[size], zoom(model.normalise(x), model.head.locator.prior.expand(2, 4), size or (128,64)))

def test_second_network_is_a_copy_with_own_weights():
    torch.manual_seed(0)
    model = small_model()
    a,b = model.backbone.state_dict(),model.head.branches['shoulder'].state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not {p.data_ptr() for p in model.backbone.parameters()}&{p.data_ptr() for p in model.head.branches.parameters()}
    other = small_model(shoulder=partial(resnet18, last_stride=2))
    assert (other.backbone.total_stride,other.head.branches['shoulder'].total_stride)==(16,32)

def test_each_strip_sees_its_rows():
    "Strip features are those of the three parts of the map, top to bottom"
    model,x = small_model().eval(),rand_pics(2, 128, 64)
    with torch.no_grad():
        box,strips = model.head.look(x)
        fmap = model.head.branches['shoulder'](zoom(x, box, (128,64)))
        rows = [(0,3),(3,6),(6,8)]
        for o,a,s,(lo,hi) in zip(strips, model.head.attend, model.head.strips, rows): torch.testing.assert_close(o, s(a(fmap[:,:,lo:hi])))

def test_strip_attention():
    torch.manual_seed(0)
    att,fmap = StripAttention(6, squeeze=3),torch.rand(2, 6, 3, 2)
    w1,w2 = (o.weight for o in (att.channels[0],att.channels[2]))
    assert w1.shape==(2,6)
    pooled = fmap.pow(3).mean((2,3)).pow(1/3)
    c = torch.sigmoid(torch.relu(pooled@w1.T)@w2.T)
    want = fmap*(1+c[:,:,None,None])
    want = want*torch.sigmoid(want.mean(1, keepdim=True))
    torch.testing.assert_close(att(fmap), want)
    ratio = att(fmap)/fmap
    assert ratio.std()>1e-3                          # not a constant factor

# Darkness and the gate

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float32,torch.float64])
def test_darkness_of_plain_pictures(dtype):
    for rgb in ((0,0,0),(1,1,1),(1,0,0),(.2,.5,.8)):
        x = torch.tensor(rgb, dtype=dtype).view(1, 3, 1, 1).expand(2, 3, 40, 20)
        d = darkness(x)
        want = 1-(.299*rgb[0]+.587*rgb[1]+.114*rgb[2])
        assert d.shape==(2,) and d.dtype in (torch.float32,torch.float64) and d.sub(want).abs().max()<5e-3

def test_darkness_is_precise_under_autocast():
    x = rand_pics()
    with torch.autocast('cpu', dtype=torch.bfloat16): d = darkness(x)
    assert d.dtype==torch.float32 and torch.equal(d, darkness(x))

def test_darkness_looks_at_the_clothes():
    x = torch.ones(1, 3, 100, 100)
    x[:,:,30:75,35:65] = 0
    assert darkness(x)==1 and darkness(1-x)==0
    x[:,:,30:50] = 1                                 # less than half of the area
    assert darkness(x)==1
    assert darkness(x, (.0,.0,.2,1.))==0
    assert darkness(torch.zeros(1, 3, 1, 1)).shape==(1,)
    assert darkness(people(3, 20, True)).min()>.75>darkness(people(3, 20, False)).max()

def test_gate_weights():
    torch.manual_seed(0)
    gate,feat = DarkGate(5).eval(),torch.randn(7, 5)
    nn.init.normal_(gate.mix.weight)
    w,logits = gate(feat)
    z = feat/(1+1e-5)**.5@gate.black.weight.T
    torch.testing.assert_close(logits, z)
    e = (z/(1+1e-5)**.5@gate.mix.weight.T).exp()
    torch.testing.assert_close(w, e/e.sum(1, keepdim=True))

def test_joined_is_the_weighed_pair():
    model,x = small_model().eval(),rand_pics()
    with torch.no_grad(): out,w = model.outputs(x),model.attention(x).weights
    assert w.std()>0
    torch.testing.assert_close(out.feat[-1], torch.cat([w[:,:1]*out.feat[0], w[:,1:]*out.feat[4]], 1))
    torch.testing.assert_close(model(x), out.emb[0])

def trained_gap(steps=20, constant=False):
    "Mean weight of head and shoulders of strangers in black, minus that of strangers in bright clothes"
    x,pid = torch.cat([people(5, 8, False, (48,24)), people(6, 8, True, (48,24))]),torch.arange(16)
    model = small_model(16)
    if constant: model.head.gate.forward = lambda feat: (torch.full((len(feat),2), .5), DarkGate.forward(model.head.gate, feat)[1])
    loss = ReIDLoss(CrossEntropy(), BlackLoss(model, weight=1.))
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        opt.zero_grad()
        loss(model.train()(x), pid).backward()
        opt.step()
    w = [model.eval().attention(people(7, 12, b, (48,24))).weights[:,1].mean().item() for b in (True,False)]
    return w[0]-w[1], loss

def test_dark_clothes_raise_the_weight_of_head_and_shoulders():
    "Fails if the weights are constant"
    raised,loss = trained_gap()
    assert raised>.2
    assert set(loss.parts)>={'black'}
    assert trained_gap(1, constant=True)[0]==0

def test_fused_loss_reaches_the_gate():
    "Without the black loss too: the weights are learned from who is who"
    model,x = small_model(),rand_pics()
    F.cross_entropy(model(x).logits[-1], pids).backward()
    for p in (model.head.gate.mix.weight, model.head.gate.black.weight): assert p.grad.abs().max()>0

# Contract

def test_output_lists():
    model = small_model(n_strips=2)
    out = model(rand_pics())
    assert isinstance(model, HAA) and isinstance(model.head, HAAHead) and type(out) is ReIDOut
    assert [tuple(o.shape) for o in out.logits]==[(8,4)]*5
    assert [o.shape[1] for o in out.feat]==[48,16,16,32,80] and [o.shape for o in out.emb]==[(8,80)]
    torch.testing.assert_close(out.logits[-1], model.head.heads[-1].classifier(out.emb[0]))
    assert type(model.pool) is nn.Identity and set(model.head.branches)=={'shoulder'}
    assert model.fmap(rand_pics()).shape==(8,128,4,2)

@pytest.mark.parametrize('backbone', [resnet18, partial(resnet18, ibn=True, last_stride=1),
    pytest.param(partial(resnet50, last_stride=1), marks=pytest.mark.slow), pytest.param(resnext50, marks=pytest.mark.slow)])
def test_gradients_are_finite_in_every_parameter(backbone):
    model = small_model(backbone=backbone)
    nn.init.normal_(model.head.locator.box.weight, std=.01)     # at 0 the layers before it get a gradient of 0
    loss = ReIDLoss(CrossEntropy(), TripletLoss(), BlackLoss(model))
    loss(model(rand_pics(4, 48, 24)), pids[:4]).backward()
    for n,p in model.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), n
    silent = [n for n,p in model.named_parameters() if not p.grad.abs().max()>0]
    assert not silent

def test_locator_learns_from_identities():
    model = small_model()
    loss = ReIDLoss(CrossEntropy(), TripletLoss())
    loss(model(rand_pics()), pids).backward()
    assert (model.head.locator.box.weight.grad.abs().max(1).values>0).all()

@pytest.mark.parametrize('shape', [(1,3,64,32), (1,3,101,51), (3,3,75,33), (1,3,48,16)])
def test_eval_of_any_size(shape):
    model,x = small_model().eval(),rand_pics(*shape[:1], *shape[2:])
    with torch.no_grad(): emb = model(x)
    assert emb.shape==(shape[0],96) and emb.isfinite().all()
    with torch.no_grad(): torch.testing.assert_close(emb[:1], model(x[:1]), atol=1e-4, rtol=1e-4)

def test_input_is_left_alone_and_evaluation_is_repeatable():
    model,x = small_model().eval(),rand_pics()
    before,state = x.clone(),copy.deepcopy(model.state_dict())
    with torch.no_grad(): assert torch.equal(model(x), model(x)) and torch.equal(model(x), model(x, camid=torch.zeros(8)))
    model.attention(x)
    assert torch.equal(x, before) and all(torch.equal(v, state[k]) for k,v in model.state_dict().items())
    assert model.head.last is None

def test_autocast():
    model,x = small_model(),rand_pics()
    nn.init.normal_(model.head.locator.box.weight, std=.01)
    loss = ReIDLoss(CrossEntropy(), TripletLoss(), BlackLoss(model))
    with torch.autocast('cpu', dtype=torch.bfloat16): out = model(x)
    assert model.head.last.box.dtype==model.head.last.weights.dtype==torch.float32
    assert {o.dtype for k in ('feat','emb') for o in getattr(out, k)}=={torch.float32}
    loss(out, pids).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad(): full = model(x)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16): half = model(x)
    assert F.cosine_similarity(full, half).min()>.99

def test_whole_model_in_bfloat16():
    model = small_model().eval().to(torch.bfloat16)
    with torch.no_grad(): assert model(rand_pics().bfloat16()).dtype==torch.bfloat16

def test_recipe_round_trip(tmp_path):
    model = small_model(backbone=partial(resnet18, last_stride=1), shoulder=partial(resnet18, last_stride=2), size=(96,48), n_strips=2,
                        prior=(.5,.2,.6,.3), reach=(.1,.1,.1,.1), preproc=Preproc((64,32), mean=(.4,.4,.4), std=(.2,.2,.2))).eval()
    nn.init.normal_(model.head.locator.box.weight, std=.1)
    x = rand_pics()
    save_reid(tmp_path/'m.pt', model, pids=range(4))
    again = load_reid(tmp_path/'m.pt')
    with torch.no_grad(): torch.testing.assert_close(again(x), model(x), atol=1e-4, rtol=1e-4)
    assert isinstance(again, HAA) and again.recipe==model.recipe and again.head.size in ((96,48), [96,48])
    fresh = model_from_recipe(model.recipe)
    assert {k:v.shape for k,v in fresh.state_dict().items()}=={k:v.shape for k,v in model.state_dict().items()}

def test_ready_modules_can_be_passed():
    net = resnet18()
    model = haa(net, 4, n_global=8, n_strip=8)
    assert model.backbone is net and model.head.branches['shoulder'] is not net

def test_copies_after_a_training_step():
    model = small_model()
    model(rand_pics())
    assert isinstance(model.head.last, Attention)
    twin = copy.deepcopy(model)
    assert twin.head.last is None and model.head.last is not None
    assert not any('last' in k for k in model.state_dict())

def test_traces():
    model,x = small_model().eval(),rand_pics(2)
    with torch.no_grad(): torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), model(x))

def test_trains_and_evaluates_in_a_learner(tmp_path):
    "Frozen together with the backbone, then trained with the black loss, then scored"
    dls = reid_dls(toy_reid(tmp_path, n_ids=6, n_cams=2, size=(64,32), progress=False), (64,32), p=2, k=2, num_workers=0, augs=[])
    model = small_model(len(dls.pids))
    body = {id(p) for p in reid_splitter(model)[0]}
    assert {id(p) for p in model.head.branches.parameters()}<=body and not {id(p) for p in model.head.locator.parameters()}&body
    loss = ReIDLoss(CrossEntropy(), TripletLoss(), BlackLoss(model))
    learn = reid_learner(dls, model=model, loss=loss, dtype=torch.float32, path=tmp_path)
    old = {k:v.clone() for k,v in model.state_dict().items()}
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(1, 1e-3, freeze_iters=100)
    moved = {k for k,v in model.state_dict().items() if not torch.equal(v, old[k])}
    assert not any(k.startswith(('backbone.','head.branches.')) for k in moved)
    assert {'head.locator.box.weight','head.gate.mix.weight','head.heads.5.classifier.weight'}<=moved
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(1, 1e-3)
    assert not torch.equal(model.head.branches['shoulder'].conv1.weight, old['head.branches.shoulder.conv1.weight'])
    assert np.isfinite(loss.parts['black']) and all(torch.isfinite(v).all() for v in model.state_dict().values())

# Loss

def test_black_loss():
    model,x = small_model(),torch.cat([people(8, 4, True), people(9, 4, False)])
    out = model(x)
    z = model.head.last.logits
    want = -torch.cat([z.log_softmax(1)[:4,1], z.log_softmax(1)[4:,0]]).mean()
    assert BlackLoss(model)(out, pids).item()==pytest.approx(want.item(), rel=1e-5)
    by_id = torch.tensor([True,False,False,True])
    want = -z.log_softmax(1)[torch.arange(8), by_id[pids].long()].mean()
    assert BlackLoss(model, black=by_id)(out, pids).item()==pytest.approx(want.item(), rel=1e-5)
    total = ReIDLoss(CrossEntropy(), BlackLoss(model, weight=.5))
    assert total(out, pids).item()==pytest.approx((CrossEntropy()(out, pids)+.5*BlackLoss(model)(out, pids)).item(), rel=1e-5)

def test_black_loss_does_not_own_the_model():
    model = small_model()
    assert not list(ReIDLoss(CrossEntropy(), BlackLoss(model)).parameters())

# Bad input

def test_bad_input():
    with pytest.raises(ValueError, match='n_strips=0'): haa(resnet18, 4, n_strips=0)
    with pytest.raises(ValueError, match=r'size=\(64,\)'): haa(resnet18, 4, size=(64,))
    with pytest.raises(ValueError, match='n_feat'): haa(nn.Conv2d(3, 8, 3), 4)
    with pytest.raises(ValueError, match='n_feat'): haa(resnet18, 4, nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match='resnet'): haa('resnet51', 4)
    with pytest.raises(ValueError, match='feat'): haa(resnet18, 4, feat='joined')
    with pytest.raises(ValueError, match='smaller than width'): haa(resnet18, 4, reach=(.1,.1,.9,.1))
    with pytest.raises(ValueError, match='prior'): Locator(prior=(.5,.5,.5))
    with pytest.raises(ValueError, match='reach'): Locator(reach=(-.1,0,0,0))
    with pytest.raises(ValueError, match='top<bottom'): darkness(rand_pics(), (.5,0,.2,1))
    model = small_model().eval()
    with pytest.raises(ValueError, match='too few for 3 strips'): model(rand_pics(2, 32, 32))
    with pytest.raises(ValueError, match='float in'): model((rand_pics()*255).byte())
    with pytest.raises(ValueError, match='at least 16'): model(rand_pics(2, 8, 32))
    with pytest.raises(ValueError, match='more than 1 value'): small_model()(rand_pics(1))

def test_bad_input_of_the_loss():
    model = small_model()
    with pytest.raises(ValueError, match='had 0 images'): BlackLoss(model)(None, pids)
    out = model(rand_pics())
    with pytest.raises(ValueError, match='had 8 images, not 3'): BlackLoss(model)(out, pids[:3])
    with pytest.raises(ValueError, match='made by haa'): BlackLoss(reid_model(resnet18, 4))
    with pytest.raises(ValueError, match='threshold=1.5'): BlackLoss(model, threshold=1.5)
    with pytest.raises(ValueError, match='3 entries for 4'): BlackLoss(model, black=torch.ones(3))

def test_pool_reduce_is_normalised():
    torch.manual_seed(0)
    out = PoolReduce(16, 5)(100*torch.rand(64, 16, 3, 2)+50)
    assert out.min()==0 and .2<out.mean()<.7
