"Exchanged normalisations: what they average, what they keep, and the reference implementation"
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fastreid_nb.backbone.core import IBN
from fastreid_nb.backbone.resnet import resnet18
from fastreid_nb.heads.core import BNNeck
from fastreid_nb.heads.rebuild import model_from_recipe
from fastreid_nb.heads.model import reid_model
from fastreid_nb.backbone.norms import FrozenNorm, GhostNorm, convert_norm, with_norm
from golden_files import close, golden_params, missing

kinds = dict(sync=nn.SyncBatchNorm, group=nn.GroupNorm, frozen=FrozenNorm, ghost=GhostNorm)

def filled(n, cls=nn.BatchNorm2d, **kw):
    "A batch normalisation with weights and statistics of its own"
    m = cls(n, **kw)
    for o in m.state_dict().values():
        if o.is_floating_point(): o.copy_(torch.rand(o.shape)+0.5)
    return m

## Golden

@pytest.fixture(params=golden_params('blocks*.npz'))
def blocks(request):
    if request.param is None: missing('blocks*.npz')
    return np.load(request.param)

# entry of the file, norm, options, does it keep statistics that move?
cases = [('bn','sync',{},True), ('bn','ghost',dict(splits=1),True), ('frozenbn','frozen',{},False), ('gn32','group',{},False)]

@pytest.mark.parametrize('entry,norm,kw,moves', cases, ids=[f'{o[0]}-{o[1]}' for o in cases])
def test_golden(blocks, entry, norm, kw, moves):
    if f'{entry}__eval' not in blocks.files: missing(f'the entry {entry}')
    x = torch.tensor(blocks['x']).requires_grad_()
    old = nn.BatchNorm2d(x.shape[1])
    old.load_state_dict({k.removeprefix(f'{entry}.'):torch.tensor(blocks[k]) for k in blocks.files if k.startswith(f'{entry}.')}, strict=False)
    new = convert_norm(old, norm, **kw)
    assert type(new) is kinds[norm]
    close(new.eval()(x), blocks[f'{entry}__eval'])
    y = new.train()(x)
    close(y, blocks[f'{entry}__train'])
    (torch.tensor(np.random.RandomState(602).randn(*y.shape), dtype=torch.float32)*y).sum().backward()
    close(x.grad, blocks[f'{entry}__train_grad_x'])
    after = [k for k in blocks.files if k.startswith(f'{entry}__after_train.')]
    for k in after: close(new.state_dict()[k.removeprefix(f'{entry}__after_train.')], blocks[k])
    assert bool(after)==(norm!='group')
    if after: assert moves==(not np.allclose(blocks[f'{entry}__after_train.running_mean'], blocks[f'{entry}.running_mean']))

def test_golden_ibn(blocks):
    "The batch half of IBN is exchanged too: one ghost and no grouping change nothing"
    x,ibn = torch.tensor(blocks['x']),IBN(64)
    ibn.load_state_dict({k.removeprefix('ibn.'):torch.tensor(blocks[k]) for k in blocks.files if k.startswith('ibn.')})
    for norm,key in (('ghost','train'), ('sync','train'), ('frozen','eval')):
        new = convert_norm(deepcopy(ibn), norm, splits=1).train()
        assert type(new.BN) is kinds[norm]
        with torch.no_grad(): close(new(x), blocks[f'ibn__{key}'])

## Ghost

@pytest.mark.parametrize('splits', [1,2,3,6])
@pytest.mark.parametrize('shape', [(5,4), (5,), (5,2,3,2)], ids=['map','feature','volume'])
def test_ghosts(splits, shape):
    "Each split is normalised by itself; the averages are the mean of what each split alone would keep"
    x = torch.randn(12, *((7,)+shape[1:] if len(shape)>1 else (7,)))*3 + 1
    old = filled(7)
    m = convert_norm(deepcopy(old), 'ghost', splits=splits).train()
    want,means,varis = torch.empty_like(x),[],[]
    for s in range(splits):
        mean,var = old.running_mean.clone(),old.running_var.clone()
        want[s::splits] = F.batch_norm(x[s::splits], mean, var, old.weight, old.bias, True, 0.1, old.eps)
        means.append(mean)
        varis.append(var)
    close(m(x), want)
    close(m.running_mean, torch.stack(means).mean(0))
    close(m.running_var, torch.stack(varis).mean(0))
    assert m.num_batches_tracked==old.num_batches_tracked+1
    old.load_state_dict(m.state_dict())
    if x.ndim==4: close(m.eval()(x), old.eval()(x))

def test_ghosts_differ_from_batch():
    x,old = torch.randn(8, 4, 3, 3),nn.BatchNorm2d(4)
    assert (GhostNorm(4, splits=4)(x)-old(x)).abs().max()>0.05

def test_ghost_gradients():
    "Gradients of input, gain and shift are those of the splits one by one"
    x,m = torch.randn(6, 4, 3, 3),GhostNorm(4, splits=3)
    w,(a,b) = torch.randn_like(x),(x.clone().requires_grad_() for _ in range(2))
    (m(a)*w).sum().backward()
    gain,shift = (o.detach().clone().requires_grad_() for o in (m.weight,m.bias))
    sum((F.batch_norm(b[s::3], None, None, gain, shift, True)*w[s::3]).sum() for s in range(3)).backward()
    for ours,theirs in ((a.grad,b.grad), (m.weight.grad,gain.grad), (m.bias.grad,shift.grad)): torch.testing.assert_close(ours, theirs)

def test_ghost_channels_last_and_momentum_none():
    x,m = torch.randn(4, 6, 5, 3),GhostNorm(6, 2, momentum=None)
    close(m(x.to(memory_format=torch.channels_last)), GhostNorm(6, 2)(x))
    close(m.running_mean, x.mean((0,2,3)))
    m(x+1)
    close(m.running_mean, x.mean((0,2,3))+0.5)

def test_ghost_without_weights_and_statistics():
    x,m = torch.randn(4, 6, 5, 3),GhostNorm(6, 2, affine=False, track_running_stats=False)
    close(m(x)[::2], F.batch_norm(x[::2], None, None, training=True))
    close(m.eval()(x), F.batch_norm(x, None, None, training=True))

@pytest.mark.parametrize('shape,match', [((5,6,2,2), 'batch of 5 images.*splits=2.*multiple of 2'), ((4,5,2,2), r'\(B,6,\.\.\.\), got \(4, 5, 2, 2\)'), ((6,), 'B,6')])
def test_ghost_errors(shape, match):
    with pytest.raises(ValueError, match=match): GhostNorm(6, 2)(torch.zeros(shape))

def test_ghost_needs_a_split():
    with pytest.raises(ValueError, match='splits=0'): convert_norm(nn.BatchNorm2d(4), 'ghost', splits=0)

## Frozen

@pytest.mark.parametrize('shape', [(3,8), (3,8,5), (3,8,5,4), (3,8,2,2,2)])
def test_frozen_any_shape(shape):
    x,old = torch.randn(shape),filled(8)
    m,view = convert_norm(deepcopy(old), 'frozen').train(),(1,8)+(1,)*(len(shape)-2)
    mean,var,gain,shift = (getattr(old, k).detach().view(view) for k in ('running_mean','running_var','weight','bias'))
    close(m(x), (x-mean)/(var+old.eps).sqrt()*gain+shift)
    assert isinstance(m, FrozenBatchNorm2d) and not list(m.parameters()) and set(m.state_dict())=={'weight','bias','running_mean','running_var'}

def test_frozen_is_a_copy_and_reads_batchnorm_files():
    old = filled(8)
    m = convert_norm(deepcopy(old), 'frozen')
    other = FrozenNorm(8)
    other.load_state_dict(old.state_dict())
    assert all(torch.equal(v, other.state_dict()[k]) for k,v in m.state_dict().items())
    net = nn.Sequential(old)
    weight = old.weight
    convert_norm(net, 'frozen')
    with torch.no_grad(): weight.zero_()
    assert net[0].weight.min()>0

def test_frozen_keeps_16_bits():
    assert convert_norm(filled(8), 'frozen')(torch.randn(2, 8, 3, 3, dtype=torch.bfloat16)).dtype==torch.bfloat16

def test_frozen_needs_statistics():
    net = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="layer '1' keeps no statistics"): convert_norm(net, 'frozen')

## Exchange

@pytest.fixture
def net(): return nn.Sequential(nn.Conv2d(3, 64, 3), filled(64), IBN(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), filled(64, nn.BatchNorm1d), BNNeck(64))

@pytest.mark.parametrize('norm', kinds)
def test_exchange(net, norm):
    "Exactly the batch normalisations are exchanged, weights are the same objects unless frozen, and a neck is left alone"
    old = deepcopy(net)
    weights = {k:dict(net.named_parameters())[k] for k in ('1.weight','1.bias','2.BN.weight')}
    assert convert_norm(net, norm) is net
    assert [type(o) for o in (net[1], net[2].BN, net[5])]==[kinds[norm]]*3
    assert type(net[6]) is BNNeck and type(net[2].IN) is nn.InstanceNorm2d and type(net[0]) is nn.Conv2d
    for k,v in net.state_dict().items(): assert torch.equal(v, old.state_dict()[k])
    if norm!='frozen': assert all(dict(net.named_parameters())[k] is v for k,v in weights.items())
    lost = {'group':('running_mean','running_var','num_batches_tracked'), 'frozen':('num_batches_tracked',)}.get(norm, ())
    assert set(old.state_dict())-set(net.state_dict())=={f'{m}.{k}' for m in ('1','2.BN','5') for k in lost}

@pytest.mark.parametrize('norm', ['sync','frozen','ghost'])
def test_evaluation_is_unchanged(net, norm):
    x = torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        want = net.eval()(x)
        close(convert_norm(net, norm)(x), want)

@pytest.mark.parametrize('norm', kinds)
def test_mode_momentum_and_eps_are_kept(norm):
    old = filled(32, eps=0.1, momentum=0.3).eval()
    new = convert_norm(old, norm)
    assert new.eps==0.1 and not new.training and getattr(new, 'momentum', 0.3)==0.3
    assert convert_norm(filled(32).train(), norm).training

@pytest.mark.parametrize('norm', kinds)
def test_meta_device_and_double(norm):
    assert all(o.device.type=='meta' for o in convert_norm(nn.BatchNorm2d(32, device='meta'), norm).state_dict().values())
    floats = [o for o in convert_norm(nn.BatchNorm2d(32).double(), norm).state_dict().values() if o.is_floating_point()]
    assert floats and all(o.dtype==torch.float64 for o in floats)

@pytest.mark.parametrize('norm', kinds)
def test_frozen_weights_stay_frozen(norm):
    old = filled(32)
    old.bias.requires_grad_(False)
    assert not convert_norm(old, norm).bias.requires_grad

@pytest.mark.parametrize('norm', kinds)
def test_without_weights(norm):
    new = convert_norm(nn.BatchNorm2d(32, affine=False), norm)
    x = torch.randn(4, 32, 3, 3)
    assert new(x).shape==x.shape and not list(new.parameters())

def test_a_shared_layer_stays_shared():
    bn = nn.BatchNorm2d(4)
    net = convert_norm(nn.Sequential(bn, nn.ReLU(), bn), 'ghost')
    assert type(net[0]) is GhostNorm and net[0] is net[2]

def test_from_ghost_to_frozen():
    m = convert_norm(nn.Sequential(GhostNorm(4)), 'frozen')
    assert type(m[0]) is FrozenNorm

def test_errors_change_nothing(net):
    with pytest.raises(ValueError, match="layer '2.BN': 32 channels cannot be divided into groups=64"): convert_norm(net, 'group', groups=64)
    assert type(net[1]) is nn.BatchNorm2d

@pytest.mark.parametrize('make,norm,kw,match', [(partial(nn.BatchNorm2d, 4), 'batch', {}, "norm='batch'.*'sync', 'group', 'frozen', 'ghost'"),
    (partial(nn.BatchNorm2d, 4), 'group', {}, "'itself': 4 channels.*groups=32"), (partial(nn.BatchNorm2d, 4), 'group', dict(groups=0), 'groups=0'),
    (partial(nn.Linear, 4, 4), 'ghost', {}, 'Linear has no batch normalisation'), (partial(BNNeck, 4), 'ghost', {}, 'BNNeck has no')])
def test_errors(make, norm, kw, match):
    with pytest.raises(ValueError, match=match): convert_norm(make(), norm, **kw)

## Backbone

@pytest.mark.parametrize('norm', kinds)
def test_with_norm(norm):
    with torch.device('meta'):
        old = resnet18(ibn=True, last_stride=2)
        new = with_norm(partial(resnet18, ibn=True, last_stride=2), norm)
    assert (new.n_feat, new.total_stride)==(512,32) and not any(type(m) is nn.BatchNorm2d for m in new.modules())
    assert sum(type(m) is kinds[norm] for m in new.modules())==sum(type(m) is nn.BatchNorm2d for m in old.modules())==20

def test_with_norm_trains_and_has_a_recipe():
    with torch.device('meta'): model = reid_model(partial(with_norm, resnet18, norm='ghost', splits=4), 5)
    assert model.recipe['backbone'] is not None
    with torch.device('meta'): twin = model_from_recipe(model.recipe)
    assert {m.splits for m in twin.modules() if type(m) is GhostNorm}=={4} and type(twin.head.neck) is BNNeck
