"Part models: PCB, MGN and its grid against the reference implementation, and what each part may see"
import copy
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn

from fastreid_nb.data.preproc import Preproc
from fastreid_nb.backbone.resnet import resnet18, resnet18_ibn, resnet34, resnet50, resnext50
from fastreid_nb.backbone.weights import fill_network
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.heads.parts import MGNHead, RefinedPool, StripePool, cells, cut_stages, detect_mgn, full_height, mgn, part_head, pcb, row_reach
from fastreid_nb.pooling.core import GlobalMaxPool
from fastreid_nb.backbone.resnest import resnest
from fastreid_nb.train.schedules import FreezeBackbone
from fastreid_nb.train.checkpoint import load_reid, save_reid
from golden_files import close, golden_params, missing
from golden_models import golden_input, golden_state
from slow import slow_but
from tiny_models import thin_resnets

makers = dict(pcb=partial(pcb, n_parts=3), refined=partial(pcb, n_parts=3, refined=True), mgn=mgn, era=partial(mgn, variant='2020'),
              grid=partial(mgn, grid=True), pool=partial(mgn, feat='pool', pool=GlobalMaxPool, cosine=True))
order = ['b1','b2','b3','b21','b22','b31','b32','b33']
pid = torch.arange(4).repeat_interleave(2)

@pytest.fixture(autouse=True)
def seeded():
    "Repeatable, and with small networks where the number of channels does not matter"
    torch.manual_seed(0)
    with thin_resnets(): yield

def make(name, n_pids=4, backbone=resnet18, **kwargs): return makers[name](backbone, n_pids, n_emb=16, **kwargs)

def batch(h=80, w=32, n=8): return torch.rand(n, 3, h, w)

def with_shared(model):
    "Names of all parameters, of shared ones too"
    return [n for n,_ in model.named_parameters(remove_duplicate=False)]

# the reference implementation

def era_a(state):
    "Today's file of an MGN as the code of 2020 would have written it, with random values where it had more layers"
    res = {k:v for k,v in state.items() if '_head.' not in k}
    for b in order:
        res |= {f'{b}_pool.0.p':torch.full((1,), 2.5), f'{b}_pool.1.weight':state[f'{b}_head.bottleneck.0.weight']}
        for k in ('weight','bias','running_mean','running_var'):
            res |= {f'{b}_pool.2.{k}':torch.rand(256)+.1, f'{b}_head.bnneck.{k}':state[f'{b}_head.bottleneck.1.{k}']}
        res[f'{b}_head.classifier.weight'] = state[f'{b}_head.weight']
    return res

def golden_mgn(path):
    state = golden_state(path)
    found = detect_mgn(state)
    if found is None: missing(f'{path.name}: no MGN')
    fn,ours = found
    model = fn(backbone=partial(fn.keywords['backbone'], stem_pool='ceil'))
    assert fill_network(model, ours)==[]
    return model.eval(),state

@pytest.mark.parametrize('path', golden_params('models/MGN*.keys.json', slow='MGN'))
def test_golden(path):
    if path is None: missing('models/MGN*.keys.json')
    model,state = golden_mgn(path)
    z = np.load(path.with_name(path.name.replace('.keys.json', '.npz')))
    with torch.no_grad(): fmap,emb = model.fmap(golden_input()),model(golden_input())
    assert list(fmap.shape)==z['backbone_map_shape'].tolist()
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'], rel=1e-4)
    close(fmap.flatten()[::61], z['backbone_map_every61'], rel=1e-4)
    close(emb, z['feature_f64'], rel=1e-4)
    check_era_a(model, state)

def check_era_a(today, state):
    "The heads of 2020, computed layer by layer with plain functions on the maps of the same branches"
    old = era_a(state)
    fn,ours = detect_mgn(old)
    assert fn.keywords['variant']=='2020' and detect_mgn(state)[0].keywords['variant']=='current'
    model = fn(backbone=partial(fn.keywords['backbone'], stem_pool='ceil'))
    assert fill_network(model, ours)==[]
    with torch.no_grad():
        mid = today.fmap(golden_input())
        b1,b2,b3 = (o(mid) for o in today.head.branches)
        maps = dict(zip(order, [b1, b2, b3, *b2.chunk(2, 2), *b3.chunk(3, 2)]))
        want = torch.cat([era_a_head(old, b, m) for b,m in maps.items()], 1)
        close(model.eval()(golden_input()), want, rel=1e-5)

def era_a_head(s, b, fmap):
    y = fmap.clamp(min=1e-6).pow(2.5).mean((2,3), keepdim=True).pow(1/2.5)
    y = F.conv2d(y, s[f'{b}_pool.1.weight'])[...,0,0]
    norm = lambda o, y: F.batch_norm(y, *(s[f'{o}.{k}'] for k in ('running_mean','running_var','weight','bias')))
    return norm(f'{b}_head.bnneck', norm(f'{b}_pool.2', y).relu())

def test_parameters():
    "The count in the reference implementation's summary"
    with torch.device('meta'): model = mgn(partial(resnet50, ibn=True), 751)
    assert sum(o.numel() for o in model.parameters())==70_343_752 and len(model.state_dict())==728

# detection

@pytest.mark.parametrize('kw,depth', [(dict(), 50), (dict(ibn=True), 50), (dict(se=True), 50)])
def test_detect(kw, depth):
    with torch.device('meta'):
        model = mgn(partial(resnet50, **kw), 7, n_emb=32)
        fn,state = detect_mgn({theirs(k):v[...,None,None] if 'reduce' in k else v for k,v in model.state_dict().items()})
        again = fn()
    assert fn.keywords['n_pids']==7 and fn.keywords['n_emb']==32 and fn.keywords['backbone'].args==(depth,)
    assert fn.keywords['backbone'].keywords=={k:'a' if k=='ibn' else v for k,v in kw.items()}
    assert {k:v.shape for k,v in again.state_dict().items()}=={k:v.shape for k,v in state.items()}

def theirs(k):
    "fast-reid's name of an entry of our MGN"
    p = k.split('.')
    if p[0]=='backbone':
        where = dict(conv1='0', bn1='1', layer1='4', layer2='5', layer3='6')[p[1]]
        return '.'.join(['backbone', where, *p[3 if p[1]=='layer3' else 2:]])
    if p[1]=='branches':
        s = int(p[3]=='layer4')
        return '.'.join([f'b{int(p[2])+1}', str(s), str(int(p[4])-1+s), *p[5:]])
    rest = '.'.join(p[3:])
    for a,b in (('pool.','pool_layer.'), ('head.reduce.','bottleneck.0.'), ('head.neck.','bottleneck.1.'), ('head.classifier.','')): rest = rest.replace(a, b)
    return f'{p[2]}_head.{rest}'

def test_detect_not_ours():
    assert detect_mgn({}) is None and detect_mgn(resnet18().state_dict()) is None
    s = {theirs(k):v for k,v in mgn(resnet18, 3, n_emb=4).state_dict().items()}
    assert detect_mgn(s) is not None
    assert detect_mgn({k:v for k,v in s.items() if not k.startswith('b33_head')}) is None
    assert 'extra.weight' in detect_mgn(s | {'extra.weight':torch.zeros(1)})[1]

# stripes, cells, soft parts

@pytest.mark.parametrize('h,n', [(24,6), (16,6), (7,3), (6,6), (5,1)])
def test_stripe_pool(h, n):
    fmap = torch.rand(2, 5, h, 3)
    want = [fmap[:,:,i*h//n:-(-(i+1)*h//n)].mean((2,3)) for i in range(n)]
    close(StripePool(n)(fmap), torch.stack(want, 2))

def test_stripes_need_rows():
    with pytest.raises(ValueError, match='5 rows cannot be cut into 6'): StripePool(6)(torch.rand(1, 2, 5, 4))

@pytest.mark.parametrize('h,rows,heights', [(24,3,[8,8,8]), (16,3,[6,6,4]), (16,2,[8,8]), (5,3,[2,2,1])])
def test_cells(h, rows, heights):
    fmap = torch.rand(2, 3, h, 4)
    res = cells(fmap, rows)
    assert [o.shape[2] for o in res]==heights
    assert torch.equal(torch.cat(res, 2), fmap)

def test_grid_cells():
    fmap = torch.rand(1, 2, 7, 5)
    a,b,c,d = cells(fmap, 2, 2)
    assert torch.equal(torch.cat([torch.cat([a, b], 3), torch.cat([c, d], 3)], 2), fmap) and a.shape[2:]==(4,3)

@pytest.mark.parametrize('h,w,rows,cols', [(4,2,3,1), (1,4,2,2), (4,1,2,2)])
def test_cells_too_small(h, w, rows, cols):
    with pytest.raises(ValueError, match=f'{h} × {w} positions cannot be cut into {rows} × {cols}'): cells(torch.rand(1, 2, h, w), rows, cols)

def test_refined_pool():
    fmap,pool = torch.rand(2, 5, 6, 3),RefinedPool(5, 4)
    w = torch.einsum('pc,bchw->bphw', pool.classify.weight[...,0,0], fmap).softmax(1)
    want = torch.stack([(w[:,i:i+1]*fmap).sum((2,3))/w[:,i:i+1].sum((2,3)) for i in range(4)], 2)
    close(pool(fmap), want)
    nn.init.zeros_(pool.classify.weight)
    close(pool(fmap), fmap.mean((2,3))[...,None].expand(2, 5, 4))

def test_refined_pool_can_be_stripes():
    "With a classifier that knows the rows, soft parts are the stripes, on the same scale"
    fmap = torch.cat([torch.rand(2, 4, 6, 3), torch.eye(6)[None,:,:,None].expand(2, 6, 6, 3)], 1)
    pool = RefinedPool(10, 3)
    pool.classify.weight.data = F.pad(50*torch.eye(3).repeat_interleave(2, 1), (4,0))[...,None,None]
    close(pool(fmap), StripePool(3)(fmap), rel=1e-4)

def test_induced_training():
    trained,soft = make('pcb'),make('refined')
    assert fill_network(soft, trained.state_dict(), new=('head.parts.',))==[]
    soft.requires_grad_(False).head.parts.requires_grad_(True)
    torch.stack([F.cross_entropy(o, pid) for o in soft(batch()).logits]).mean().backward()
    assert [n for n,p in soft.named_parameters() if p.grad is not None and p.grad.abs().sum()>0]==['head.parts.classify.weight']

# what a part sees

def moved(head, mid, row):
    poked = mid.clone()
    poked[:,:,row] += 1
    with torch.no_grad(): return [not torch.equal(p, q) for p,q in zip(head(mid).emb, head(poked).emb)]

def test_pcb_parts_see_their_rows():
    head = make('pcb').eval().head
    assert [moved(head, torch.rand(2, 128, 12, 4), r) for r in (0,5,11)]==[[True,False,False],[False,True,False],[False,False,True]]

def test_mgn_parts_see_their_rows():
    "Six 3×3 convolutions carry six rows across a border; a head of the whole map sees all"
    head,mid = make('grid').eval().head,torch.rand(1, 64, 48, 2)
    names = list(head.heads)
    def seen(row): return {n for n,o in zip(names, moved(head, mid, row)) if o}
    whole = {'b1','b2','b3','b4'}
    assert seen(0)==whole|{'b21','b31','b41','b42'} and seen(47)==whole|{'b22','b33','b43','b44'}
    assert 'b31' in seen(21) and 'b31' not in seen(22) and 'b32' in seen(10) and 'b32' not in seen(9)

def test_grid_cells_see_their_columns():
    head,mid = make('grid').eval().head,torch.rand(2, 64, 8, 32)
    poked = mid.clone()
    poked[...,0] += 1
    with torch.no_grad(): a,b = head(mid).emb,head(poked).emb
    assert [torch.equal(p, q) for p,q in zip(a, b)][-4:]==[False,True,False,True]

def test_row_reach():
    model = make('mgn')
    before = copy.deepcopy(model.state_dict())
    reach = row_reach(model, (192,32))
    assert reach.shape==(8,192) and model.training and all(p.grad is None for p in model.parameters())
    close(reach.sum(1), torch.ones(8))
    centre = (reach*torch.arange(192)).sum(1)
    assert centre[3]<centre[4] and centre[5]<centre[6]<centre[7]
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

# the contract

@pytest.mark.parametrize('name', makers)
def test_outputs(name):
    model = make(name).train()
    out = model(batch())
    n = {'pcb':3, 'refined':3, 'grid':13}.get(name, 8)
    assert len(out.logits)==len(out.emb)==n and all(o.shape==(8,4) for o in out.logits) and all(o.shape==(8,16) for o in out.emb)
    x = batch(n=2)
    with torch.no_grad(): emb,parts_ = model.eval()(x),model.outputs(x).emb
    assert torch.equal(emb, torch.cat(parts_, 1)) and emb.shape==(2,16*n)

def test_order_and_features():
    "Logits, embeddings and metric features in the published order, each from its own head"
    model = make('grid').eval()
    head,x = model.head,batch(n=2)
    assert list(head.heads)==[*order, 'b4','b41','b42','b43','b44']
    with torch.no_grad():
        mid,out = model.fmap(x),model.outputs(x)
        b = [o(mid) for o in head.branches]
        pieces = dict(zip(head.heads, [*b[:3], *b[1].chunk(2, 2), *b[2].chunk(3, 2), b[3], *cells(b[3], 2, 2)]))
        own = {k:head.heads[k](m) for k,m in pieces.items()}
    for got,o in zip(out.emb, own.values()): close(got, o.emb)
    for got,o in zip(out.logits, own.values()): close(got, o.logits)
    groups = ['b1'],['b2'],['b3'],['b21','b22'],['b31','b32','b33'],['b4'],['b41','b42','b43','b44']
    for got,g in zip(out.feat, groups, strict=True): close(got, torch.cat([own[k].emb for k in g], 1))

def test_pooled_features():
    out = make('pool')(batch())
    assert [o.shape[1] for o in out.feat]==[128,128,128,256,384] and all(o.abs().max()<=1+1e-5 for o in out.logits)

def test_published_weights_of_the_losses():
    "The mean over our lists is 1/8 of each cross entropy and 1/5 of each triplet loss"
    out = make('mgn')(batch())
    ce,tri = CrossEntropy(eps=0.1),TripletLoss(margin=None)
    one = lambda o: type(out)(o, o, o)
    close(ce(out, pid), sum(ce(one(o), pid) for o in out.logits)*0.125)
    close(tri(out, pid), sum(tri(one(o), pid) for o in out.feat)*0.2)
    assert len(out.logits)==8 and len(out.feat)==5

@pytest.mark.parametrize('name', makers)
def test_training_step(name):
    model,x = make(name),batch()
    loss_fn,opt = ReIDLoss(CrossEntropy(), TripletLoss(weight=.1)),torch.optim.Adam(model.parameters(), 3e-4)
    losses = []
    for _ in range(3):
        loss = loss_fn(model(x), pid)
        opt.zero_grad()
        loss.backward()
        bad = [n for n,p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not bad
        opt.step()
        losses.append(loss.item())
    assert losses[-1]<losses[0]

@pytest.mark.parametrize('name', ['refined','grid','pool'])
def test_checkpoint(name, tmp_path):
    model,x = make(name, backbone=partial(resnet18, ibn=True)),batch(n=2)
    model(batch())
    model.preproc = Preproc((96,32))
    save_reid(tmp_path/'m.pt', model, [3,5,7,9])
    with torch.no_grad(): close(load_reid(tmp_path/'m.pt')(x), model.eval()(x), rel=1e-5)

def test_shared_exponent(tmp_path):
    "One exponent for eight parts, saved eight times, still one after loading"
    model = make('era')
    ps = [h.pool.p for h in model.head.heads.values()]
    assert all(o is ps[0] for o in ps) and len([n for n in with_shared(model) if n.endswith('pool.p')])==8
    with torch.no_grad(): ps[0].fill_(2.)
    model.preproc = Preproc((96,32))
    save_reid(tmp_path/'m.pt', model)
    again = load_reid(tmp_path/'m.pt')
    assert len({id(h.pool.p) for h in again.head.heads.values()})==1 and again.head.heads['b33'].pool.p.item()==2.
    own = [h.pool.p for h in make('mgn').head.heads.values()]
    assert len({id(o) for o in own})==8

# branches

def test_pretrained_reaches_every_branch(tmp_path):
    net = resnet18()
    torch.save(net.state_dict(), tmp_path/'net.pth')
    model = make('grid', backbone=partial(resnet18, pretrained=tmp_path/'net.pth'))
    want = net.state_dict()
    for i,b in enumerate(model.head.branches):
        state = b.state_dict()
        assert state.keys()=={k for k in want if k.startswith(('layer3.1.','layer4.'))}, i
        assert all(torch.equal(v, want[k]) for k,v in state.items())
    assert all(torch.equal(v, want[k]) for k,v in model.backbone.state_dict().items())
    assert not {id(p) for p in model.head.branches[0].parameters()} & {id(p) for p in model.head.branches[1].parameters()}

@pytest.mark.parametrize('backbone', [resnet18, partial(resnet34, ibn=True), partial(resnet50, se=True), resnext50, partial(resnet50, ibn='b'),
                                      resnest, pytest.param(partial(resnet50, ibn='a4'), marks=pytest.mark.slow)])
@pytest.mark.parametrize('last_stride', slow_but([1,2], 2))
def test_cut(backbone, last_stride):
    "Trunk and branch in a row are the network; branches of stripes keep the trunk's height"
    with torch.device('meta'):
        net = backbone(last_stride=last_stride).eval()
        trunk,branch = cut_stages(net)
        mid = trunk(torch.zeros(1, 3, 128, 64))
        assert mid.shape==(1,trunk.n_feat,8,4) and trunk.total_stride==16
        assert branch(mid).shape==net(torch.zeros(1, 3, 128, 64)).shape==(1,net.n_feat,8//last_stride,4//last_stride)
        tall = full_height(branch)
        assert tall(mid).shape==(1,net.n_feat,8,4)
    assert tall.state_dict().keys()==branch.state_dict().keys()
    assert sum(map(len, (trunk.state_dict(),branch.state_dict())))==len(net.state_dict()) and len(net.layer3)>1

def test_cut_leaves_the_network():
    net = resnet18(last_stride=2).eval()
    x = batch()
    with torch.no_grad(): want = net(x)
    trunk,branch = cut_stages(net)
    full_height(branch)
    with torch.no_grad(): assert torch.equal(net(x), want) and torch.equal(branch(trunk(x)), want)
    assert not branch.training and cut_stages(resnet18())[1].training

def test_same_weights_at_stride_1():
    "A branch of full height computes what a network built with last_stride=1 computes"
    a,b = resnet18(last_stride=2).eval(),resnet18().eval()
    b.load_state_dict(a.state_dict())
    trunk,branch = cut_stages(a)
    x = batch()
    with torch.no_grad(): assert torch.equal(full_height(branch)(trunk(x)), b(x))

def test_branch_1_keeps_its_stride():
    model = mgn(partial(resnet18_ibn, last_stride=2), 4, n_emb=8).eval()
    with torch.no_grad(): hs = [b(model.fmap(batch(n=1))).shape[2] for b in model.head.branches]
    assert hs==[3,5,5]

def test_cannot_be_cut():
    with pytest.raises(ValueError, match='Conv2d has no stages'): cut_stages(nn.Conv2d(3, 8, 3))
    with pytest.raises(ValueError, match='nl=False'), torch.device('meta'): mgn(partial(resnet50, nl=True), 4)

def test_freezing():
    "A frozen backbone is the trunk and the copies of pretrained stages: no gradient, no step of their statistics"
    model = make('mgn')
    cb,before = FreezeBackbone(1),copy.deepcopy(model.state_dict())
    cb.learn = type('L', (), dict(model=model, cbs=[]))()
    cb.before_fit()
    cb.before_train()
    torch.stack([o.sum() for o in model(batch()).logits]).sum().backward()
    body = ('backbone.','head.branches.')
    assert {n for n,p in model.named_parameters() if p.grad is None}=={n for n,_ in model.named_parameters() if n.startswith(body)}
    after = model.state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and not any(k.startswith(body) for k in moved)
    cb.undo()
    assert all(p.requires_grad for p in model.parameters()) and model.head.branches[2].training

@pytest.mark.parametrize('kw', [dict(variant='2021'), dict(feat='before')])
def test_bad_choice(kw):
    with pytest.raises(ValueError, match='choose one of'): make('mgn', **kw)

def test_bad_input():
    with pytest.raises(ValueError, match='cannot be cut'): make('mgn')(torch.rand(2, 3, 64, 32))
    with pytest.raises(ValueError, match='at least 16'): make('mgn')(torch.rand(2, 3, 8, 32))
    with pytest.raises(ValueError, match='choose one of'): make('pcb', feat='before')

def test_autocast():
    model = make('mgn').eval()
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16): out = model.outputs(batch(n=2))
    assert all(o.dtype==torch.float32 and o.isfinite().all() for o in [*out.emb, *out.feat])

def test_own_cuts():
    trunk,branch = cut_stages(resnet18())
    head = MGNHead([branch, full_height(branch)], ((1,1),(4,1)), partial(part_head, 128, 3, 8))
    assert list(head.heads)==['b1','b2','b21','b22','b23','b24'] and len(head(torch.rand(2, 64, 8, 4)).feat)==3
