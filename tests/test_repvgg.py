"RepVGG: parity with the reference implementation and with timm, folding that changes nothing, files of every tradition"
from copy import deepcopy
from functools import partial

import numpy as np, pytest, torch
from torch import nn

from fastreid_nb.backbone.resnet import resnet18
from fastreid_nb.backbone.weights import fill_network
from fastreid_nb.heads.rebuild import model_from_recipe
from fastreid_nb.heads.model import reid_model
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.pooling.core import GlobalAvgPool
from fastreid_nb.backbone.repvgg import RepVGGBlock, reparameterize, detect_repvgg, repvgg
from golden_files import close, golden_params, missing
from golden_models import golden_input, golden_state

sizes = {'A0':7.83, 'A1':12.81, 'A2':26.80, 'B0':14.54, 'B1':55.37, 'B2':86.46, 'B3':120.52}
names = [*sizes, *(f'B{i}g{g}' for i in (1,2,3) for g in (2,4))]

def shake(net, seed=0):
    "Give every normalisation of `net` numbers that training could have given it"
    gen = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        for o in (m.running_mean, m.bias): o.data = torch.randn(o.shape, generator=gen).to(o)*0.3
        for o in (m.running_var, m.weight): o.data = torch.rand(o.shape, generator=gen).to(o)+0.5
    return net.eval()

def run(net, x):
    with torch.no_grad(): return net(x)

def fast_reid_name(k): return k.replace('rbr_reparam.', 'fused_')

@pytest.fixture(scope='module')
def a0():
    torch.manual_seed(0)
    return shake(repvgg())

@pytest.mark.parametrize('path', golden_params('models/RepVGG*.keys.json'))
@pytest.mark.parametrize('folded', [False,True])
def test_golden_model(path, folded):
    if path is None: missing('models/RepVGG*.keys.json')
    z = np.load(path.with_name(path.name.replace('.keys.json', '.npz')))
    state = {k.removeprefix('backbone.'):v for k,v in golden_state(path).items() if k.startswith('backbone.')}
    make,state = detect_repvgg(state)
    net = make().eval()
    fill_network(net, state)
    mean,std = (torch.tensor(o).view(1, 3, 1, 1) for o in ((0.485,0.456,0.406), (0.229,0.224,0.225)))
    fmap = run(reparameterize(net) if folded else net, (golden_input()-mean)/std)
    assert list(fmap.shape)==z['backbone_map_shape'].tolist() and make.keywords==dict(variant=path.name.split('.')[0][7:])
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'], rel=1e-4)
    close(fmap.flatten()[::61], z['backbone_map_every61'], rel=1e-4)

@pytest.mark.parametrize('args', [(4,4), (4,6), (4,4,2), (4,6,2), (4,4,1,2), (8,8,1,4), (8,4,2,2)])
@pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
def test_fused_block(args, dtype):
    block = shake(RepVGGBlock(*args)).to(dtype)
    x = torch.randn(3, args[0], 9, 6, dtype=dtype)
    new = block.fused()
    assert {p.dtype for p in new.parameters()}=={dtype} and [n for n,_ in new.named_parameters()]==['rbr_reparam.weight','rbr_reparam.bias']
    close(run(new, x), run(block, x), rel=1e-6 if dtype==torch.float32 else 1e-12)

def test_deploy_changes_nothing(a0):
    x = torch.randn(2, 3, 96, 48)
    low = reparameterize(a0)
    close(run(low, x), run(a0, x), rel=1e-5)
    assert not any(isinstance(m, (RepVGGBlock, nn.BatchNorm2d)) for m in low.modules())
    assert sum(p.numel() for p in low.parameters())<0.95*sum(p.numel() for p in a0.parameters())

def test_deploy_works_on_a_copy(a0):
    before = deepcopy(a0.state_dict())
    for p in reparameterize(a0).parameters(): p.data.zero_()
    assert all(torch.equal(v, before[k]) for k,v in a0.state_dict().items())

def test_deploy_twice(a0):
    low = reparameterize(a0)
    again = reparameterize(low)
    assert low is not again and list(low.state_dict())==list(again.state_dict())
    assert all(torch.equal(a, b) for a,b in zip(low.state_dict().values(), again.state_dict().values()))

def test_deploy_of_half_precision(a0):
    low = reparameterize(deepcopy(a0).bfloat16())
    assert {p.dtype for p in low.parameters()}=={torch.bfloat16}

@pytest.mark.parametrize('part', ['all','norm'])
def test_deploy_refuses_training_mode(part):
    net = nn.Sequential(RepVGGBlock(4, 4)).eval()
    if part=='all': net.train()
    else: net[0].rbr_1x1.bn.train()
    with pytest.raises(ValueError, match=r'training mode.*model\.eval'): reparameterize(net)

def test_deploy_allows_training_of_the_rest():
    "A head in training mode has no part in the folding"
    net = nn.Sequential(shake(RepVGGBlock(4, 4)), nn.Dropout())
    net[1].train()
    assert reparameterize(net)[1].training and not reparameterize(net)[0].training

def test_deploy_needs_statistics():
    for norm in (nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)):
        block = RepVGGBlock(4, 4)
        block.rbr_identity = norm
        with pytest.raises(ValueError, match=type(norm).__name__): reparameterize(block.eval())

def test_deploy_of_other_networks():
    net = resnet18().eval()
    other = reparameterize(net)
    assert other is not net and all(torch.equal(a, b) for a,b in zip(net.state_dict().values(), other.state_dict().values()))
    block = shake(RepVGGBlock(4, 4))
    assert not isinstance(reparameterize(block), RepVGGBlock)

@pytest.mark.parametrize('backbone', [repvgg, partial(repvgg, 'A0', last_stride=2), resnet18])
def test_deploy_of_a_model(backbone):
    "The recipe of the folded model builds a folded model"
    model = shake(reid_model(backbone, 5, GlobalAvgPool))
    low,x = reparameterize(model),torch.rand(2, 3, 64, 32)
    close(run(low, x), run(model, x), rel=1e-5)
    again = model_from_recipe(low.recipe)
    again.load_state_dict(low.state_dict())
    close(run(again.eval(), x), run(low, x))
    assert model.recipe['backbone']['kw'].get('deployed') is None

def test_deploy_of_a_model_of_unknown_make():
    "A recipe that would rebuild the branches is dropped"
    model = shake(reid_model(repvgg(), 5, GlobalAvgPool))
    assert reparameterize(model).recipe is None

@pytest.mark.parametrize('size', names)
def test_every_file_is_recognised(size):
    with torch.device('meta'): before,after = (repvgg(size, deployed=o).state_dict() for o in (False,True))
    head = {'linear.weight':torch.zeros(3, 4), 'linear.bias':torch.zeros(3)}
    make,got = detect_repvgg(before|head)
    assert make.func is repvgg and make.keywords==dict(variant=size) and set(got)==set(before)|set(head)
    for file in (after, {fast_reid_name(k):v for k,v in after.items()}):
        make,got = detect_repvgg(file)
        assert make.keywords==dict(variant=size, deployed=True) and {k:v.shape for k,v in got.items()}=={k:v.shape for k,v in after.items()}

def test_not_a_repvgg():
    with torch.device('meta'): others = [resnet18().state_dict(), osnet(width='x0_25').state_dict(), repvgg().state_dict()]
    others[2].pop('stage3.7.rbr_dense.conv.weight')
    assert [detect_repvgg(o) for o in ({}, *others)]==[None]*4

@pytest.mark.parametrize('size', names)
def test_parameter_counts(size):
    "The counts of the reference implementation; a grouped network has smaller kernels in 13 blocks, every second one"
    with torch.device('meta'): a,b = repvgg(size),repvgg(size, deployed=True)
    n,m = (sum(p.numel() for p in o.parameters()) for o in (a,b))
    assert m<n and (size not in sizes or round(n/1e6, 2)==sizes[size])
    if 'g' in size:
        with torch.device('meta'): whole = repvgg(size[:2])
        split = [i for i,(p,q) in enumerate(zip(a.parameters(), whole.parameters())) if p.shape!=q.shape]
        assert all(p.numel()*int(size[3])==q.numel() for i,(p,q) in enumerate(zip(a.parameters(), whole.parameters())) if i in split)
        assert len(split)==2*13

@pytest.mark.parametrize('last_stride', [1,2])
@pytest.mark.parametrize('h,w', [(256,128), (37,21)])
def test_shapes(last_stride, h, w):
    with torch.device('meta'):
        net = repvgg(last_stride=last_stride)
        y = net(torch.zeros(2, 3, h, w))
    assert y.shape==(2, net.n_feat, -(-h//net.total_stride), -(-w//net.total_stride)) and net.total_stride==16*last_stride

def test_channels():
    with torch.device('meta'): assert {s:repvgg(s).n_feat for s in sizes}==dict(A0=1280, A1=1280, A2=1408, B0=1280, B1=2048, B2=2560, B3=2560)

@pytest.mark.parametrize('size', ['A0','B1g4'])
def test_timm(size):
    "timm's network, read from its own file, computes the same"
    timm = pytest.importorskip('timm')
    with torch.device('meta' if size!='A0' else 'cpu'): theirs = shake(timm.create_model(f'repvgg_{size.lower()}'))
    make,state = detect_repvgg(theirs.state_dict())
    assert make.keywords==dict(variant=size)
    with torch.device('meta' if size!='A0' else 'cpu'): net = make(last_stride=2).eval()
    assert {k:v.shape for k,v in net.state_dict().items()}=={k:v.shape for k,v in state.items() if not k.startswith('head.')}
    if size!='A0': return
    fill_network(net, state, ignore=('head.',))
    x = torch.randn(2, 3, 64, 64)
    close(run(net, x), run(theirs.forward_features, x))
    close(run(reparameterize(net), x), run(theirs.forward_features, x))

def test_training_reaches_every_weight():
    torch.manual_seed(0)
    net = nn.Sequential(RepVGGBlock(3, 8, 2), RepVGGBlock(8, 8), RepVGGBlock(8, 8, 1, 2))
    net(torch.randn(4, 3, 16, 8)).square().mean().backward()
    assert not [n for n,p in net.named_parameters() if p.grad is None or not p.grad.abs().max()>0]

def test_pretrained(a0, tmp_path, monkeypatch):
    f = tmp_path/'checkpoints/RepVGG-A0-train.pth'
    f.parent.mkdir()
    torch.save({**a0.state_dict(), 'linear.weight':torch.zeros(9, 1280), 'linear.bias':torch.zeros(9)}, f)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    for src in (f, str(f), True):
        assert all(torch.equal(v, a0.state_dict()[k]) for k,v in repvgg(last_stride=2, pretrained=src).state_dict().items())
    for kw in (dict(variant='A1'), dict(deployed=True)):
        with pytest.raises(ValueError, match='does not fit'): repvgg(**kw, pretrained=f)

def test_pretrained_deployed(a0, tmp_path):
    low,f = reparameterize(a0),tmp_path/'deploy.pth'
    torch.save({fast_reid_name(k):v for k,v in low.state_dict().items()}, f)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(run(repvgg(deployed=True, pretrained=f).eval(), x), run(low, x))

def test_pretrained_by_hand_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as e: repvgg('B1g2', pretrained=True)
    for part in ('drive.google.com', str(tmp_path/'checkpoints/RepVGG-B1g2-train.pth'), 'pretrained=False'): assert part in str(e.value)

@pytest.mark.parametrize('kw,match', [(dict(variant='C1'), "variant='C1'.*B3g4"), (dict(variant='A0g2'), 'A0g2'), (dict(last_stride=3), 'last_stride=3')])
def test_bad_arguments(kw, match):
    with pytest.raises(ValueError, match=match): repvgg(**kw)
