"Restricted parts: nothing crosses a border inside the restricted stages, and everything else is an MGN"
import copy, pickle
from functools import partial

import pytest, torch
from torch import nn

from fastreid_nb.data.preproc import Preproc
from fastreid_nb.backbone.core import SE, NonLocal
from fastreid_nb.backbone.resnet import resnet18, resnet34, resnet50, resnext50
from fastreid_nb.backbone.weights import fill_network
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.heads.parts import cut_stages, full_height, mgn, row_reach
from fastreid_nb.backbone.resnest import resnest
from fastreid_nb.heads.rmgl import leaks, restrict, rmgl
from fastreid_nb.train.checkpoint import load_reid, save_reid
from golden_files import close
from slow import slow_but
from tiny_models import thin_resnets

pid = torch.arange(4).repeat_interleave(2)
nets = dict(plain=resnet18, ibn=partial(resnet34, ibn=True), se=partial(resnet18, ibn=True, se=True), deep=partial(resnet50, ibn='a4'),
            resnext=resnext50, resnest=resnest)

@pytest.fixture(autouse=True)
def seeded():
    "Repeatable, and with small networks where the number of channels does not matter"
    torch.manual_seed(0)
    with thin_resnets(): yield

def make(backbone=resnet18, **kwargs): return rmgl(backbone, 4, n_emb=16, **kwargs)

def batch(n=8): return torch.rand(n, 3, 80, 32)

def moved(head, row, h=48):
    mid = torch.rand(1, head.branches[0].layer4[0].conv1.in_channels, h, 2)
    poked = mid.clone()
    poked[:,:,row] += 1
    with torch.no_grad(): a,b = head(mid).emb,head(poked).emb
    return {k for k,p,q in zip(head.heads, a, b) if not torch.equal(p, q)}

@pytest.mark.parametrize('name', slow_but(nets, 'plain', 'ibn', 'se', 'deep'))
def test_nothing_crosses(name):
    "The plain branch leaks, the restricted one does not, whatever its blocks are made of; names and weights stay"
    branch = full_height(cut_stages(nets[name]())[1])
    state = copy.deepcopy(branch.state_dict())
    assert leaks(branch, 3)
    assert restrict(branch, 3) is branch and not leaks(branch, 3)
    after = branch.state_dict()
    assert list(after)==list(state) and all(torch.equal(state[k], v) for k,v in after.items()) and branch.training

@pytest.mark.parametrize('h,n', [(12,3), (16,3), (9,2), (5,3)])
@pytest.mark.parametrize('name', ['plain','se'])
def test_is_the_branch_on_each_part(name, h, n):
    branch = full_height(cut_stages(nets[name]().eval())[1])
    mid = torch.rand(2, 64, h, 3)
    with torch.no_grad():
        want = torch.cat([branch(o) for o in mid.chunk(n, 2)], 2)
        close(restrict(branch, n)(mid), want, rel=1e-5)

def test_statistics_are_of_the_joined_map():
    "In training the batch normalisation of a restricted layer sees all parts together"
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, momentum=1.))
    x = torch.rand(2, 4, 8, 4)
    with torch.no_grad(): want = torch.cat([net[0](o) for o in x.chunk(2, 2)], 2).mean((0,2,3))
    restrict(net, 2)(x)
    close(net[1].running_mean, want)

@pytest.mark.parametrize('apart,reach', [('both',0), ('layer4',2), ('layer3',6)])
def test_reach_between_parts(apart, reach):
    "A third hears of a neighbour only in stages that are not restricted; if the last is one, as far as in an MGN"
    head = make(apart=apart).eval().head
    assert 'b31' not in moved(head, 16+reach) and ('b31' in moved(head, 15+reach))
    assert moved(head, 16+reach)>={'b1','b2','b3','b32'}

def test_plain_model_leaks():
    head = mgn(resnet18, 4, n_emb=16).eval().head
    assert {'b31','b32'}<=moved(head, 16) and 'b33' not in moved(head, 16)

def test_weights_of_mgn_fit():
    a,b = mgn(resnet18, 4, n_emb=16).eval(),make().eval()
    assert fill_network(b, a.state_dict())==[] and fill_network(a, b.state_dict())==[]
    mid = torch.rand(1, 64, 48, 2)
    with torch.no_grad():
        x,y = ([o(mid) for o in m.head.branches] for m in (a,b))
        assert torch.equal(x[0], y[0])
        close(x[2][:,:,:10], y[2][:,:,:10], rel=1e-5)
        assert not torch.allclose(x[2][:,:,12:16], y[2][:,:,12:16])
    assert sum(o.numel() for o in a.parameters())==sum(o.numel() for o in b.parameters())

def test_reach_in_the_picture():
    own = [row_reach(m, (192,32))[5][:64].sum() for m in (mgn(resnet18, 4), rmgl(resnet18, 4))]
    assert own[1]>own[0]

def test_outputs_and_order():
    model = make()
    out = model(batch())
    assert list(model.head.heads)==['b1','b2','b3','b21','b22','b31','b32','b33']
    assert [len(o) for o in out]==[8,5,8] and model.eval()(batch(2)).shape==(2,128)

def test_training_step():
    model,x = make(partial(resnet18, ibn=True)),batch()
    loss_fn,opt = ReIDLoss(CrossEntropy(), TripletLoss(weight=.1)),torch.optim.Adam(model.parameters(), 3e-4)
    losses = []
    for _ in range(3):
        loss = loss_fn(model(x), pid)
        opt.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        opt.step()
        losses.append(loss.item())
    assert losses[-1]<losses[0]

@pytest.mark.parametrize('apart', ['both','layer3'])
def test_checkpoint(apart, tmp_path):
    model = make(partial(resnet18, ibn=True), apart=apart)
    model(batch())
    model.preproc = Preproc((80,32))
    save_reid(tmp_path/'m.pt', model, [3,5,7,9])
    again,x = load_reid(tmp_path/'m.pt'),batch(2)
    with torch.no_grad(): close(again(x), model.eval()(x), rel=1e-5)
    assert model.recipe['model']['fn']=='rmgl' and [leaks(b, 3) for b in again.head.branches]==[leaks(b, 3) for b in model.head.branches]

def test_pickles_and_copies():
    model = make().eval()
    x = batch(2)
    with torch.no_grad(): want = model(x)
    for o in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(): assert torch.equal(o(x), want)
        assert not leaks(o.head.branches[2], 3)

def test_pretrained_reaches_every_branch(tmp_path):
    net = resnet18()
    torch.save(net.state_dict(), tmp_path/'net.pth')
    model = make(partial(resnet18, pretrained=tmp_path/'net.pth'))
    for b in model.head.branches: assert all(torch.equal(v, net.state_dict()[k]) for k,v in b.state_dict().items())

@pytest.mark.parametrize('odd', [NonLocal(4), nn.LayerNorm([4,4,2]), nn.MaxPool2d(3, 1, 1)])
def test_unknown_layer(odd):
    with pytest.raises(ValueError, match=f'unknown to restrict.*{type(odd).__name__}'): restrict(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), odd), 2)

def test_known_layers():
    for o in (SE(128), nn.GroupNorm(2, 128), nn.InstanceNorm2d(128), nn.AvgPool2d(3, 1, 1)):
        net = nn.Sequential(nn.Conv2d(128, 128, 1), o)
        assert leaks(net, 2) and not leaks(restrict(net, 2), 2), type(o)

def test_one_part_and_meta():
    assert leaks(restrict(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), 1), 2)
    with torch.device('meta'): assert sum(p.numel() for p in rmgl(partial(resnet50, ibn=True), 751).parameters())==70_343_752

def test_bad_input():
    with pytest.raises(ValueError, match="apart='all': choose one of"): make(apart='all')
    with pytest.raises(ValueError, match='cannot be cut'): make()(torch.rand(2, 3, 64, 32))
    with pytest.raises(ValueError, match='n_feat'): make(nn.Conv2d(3, 8, 3))
