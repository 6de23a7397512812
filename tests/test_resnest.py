"ResNeSt: the reference implementation, timm, shapes, weight files, detection"
from pathlib import Path

import numpy as np, pytest, torch
from torch import nn

from fastreid_nb.backbone.core import SplitAttention
from fastreid_nb.backbone.resnet import detect_resnet, resnet18, resnet50
from fastreid_nb.backbone.weights import fill_network
from fastreid_nb.backbone.resnest import ResNeSt, SplitBottleneck, detect_resnest, resnest
from golden_files import close, golden_params, missing
from golden_models import golden_input, golden_state
from slow import slow_but

depths = 50,101,200,269
mean,std = (torch.tensor(o).view(1, 3, 1, 1) for o in ((0.485,0.456,0.406), (0.229,0.224,0.225)))

def meta(depth=50, **kw):
    with torch.device('meta'): return resnest(depth, **kw)

def shaken(net):
    "`net` with statistics that are not those of a fresh network"
    for k,v in net.state_dict().items():
        if k.endswith('running_mean'): v.normal_(std=0.1)
        if k.endswith('running_var'): v.uniform_(0.5, 1.5)
    return net.eval()

@pytest.mark.parametrize('path', golden_params('models/ResNeSt*.keys.json', slow='ResNeSt'))
def test_golden_model(path):
    if path is None: missing('models/ResNeSt*.keys.json')
    z = np.load(path.with_name(path.name.replace('.keys.json', '.npz')))
    make,state = detect_resnest({k.removeprefix('backbone.'):v for k,v in golden_state(path).items() if k.startswith('backbone.')})
    net = make(last_stride=1 if z['backbone_map_shape'][2]>=16 else 2).eval()
    assert fill_network(net, state, path)==[]
    with torch.no_grad(): fmap = net((golden_input()-mean)/std)
    assert list(fmap.shape)==z['backbone_map_shape'].tolist()
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'], rel=1e-4)
    close(fmap.flatten()[::61], z['backbone_map_every61'], rel=1e-4)
    for b in net.layer4[1:]: b.conv2.conv.dilation = b.conv2.conv.padding = (1,1)
    with torch.no_grad(), pytest.raises(AssertionError): close(net((golden_input()-mean)/std).mean((2,3)), z['backbone_map_mean_hw'], rel=1e-2)

@pytest.mark.parametrize('name,depth', slow_but([('resnest50d',50), ('resnest101e',101), ('resnest200e',200), ('resnest269e',269)], 'resnest50d', 'resnest101e'))
def test_has_timms_names(name, depth):
    timm = pytest.importorskip('timm')
    with torch.device('meta'): theirs = timm.create_model(name, num_classes=0).state_dict()
    assert {k:v.shape for k,v in theirs.items()}=={k:v.shape for k,v in meta(depth).state_dict().items()}
    assert detect_resnest(theirs)[0].args==(depth,)

def test_equals_timm():
    timm = pytest.importorskip('timm')
    theirs = shaken(timm.create_model('resnest50d', num_classes=0))
    make,state = detect_resnest(theirs.state_dict())
    ours = make(last_stride=2).eval()
    fill_network(ours, state, ignore=())
    x = torch.rand(2, 3, 96, 64)
    with torch.no_grad(): close(ours(x), theirs.forward_features(x))

@pytest.mark.parametrize('depth', slow_but(depths, 50))
@pytest.mark.parametrize('last_stride', [1,2])
def test_shapes(depth, last_stride):
    with torch.device('meta'):
        net = resnest(depth, last_stride)
        y = net.eval()(torch.zeros(2, 3, 128, 64))
    assert (net.n_feat, net.total_stride)==(2048, 16*last_stride) and y.shape==(2, 2048, 128//net.total_stride, 64//net.total_stride)

@pytest.mark.parametrize('hw', [(32,32), (37,21), (65,130)])
@pytest.mark.parametrize('last_stride', [1,2])
def test_odd_sizes(hw, last_stride):
    with torch.device('meta'): y = resnest(last_stride=last_stride).eval()(torch.zeros(1, 3, *hw))
    assert y.shape[2:]==tuple(-(-o//(16*last_stride)) for o in hw)

@pytest.mark.parametrize('depth,n', [(50,25434240), (101,46226016), (200,68152544), (269,108880480)])
def test_parameter_counts(depth, n):
    "With a classifier of 2048 × 1000 + 1000 these are the 27.5, 48.3, 70.2 and 110.9 million of the paper"
    assert sum(p.numel() for p in meta(depth).parameters())==n

def test_dilation():
    def dilations(net): return [[b.conv2.conv.dilation[0] for b in getattr(net, f'layer{i}')] for i in (3,4)]
    assert dilations(meta())==[[1]*6, [1,2,2]]
    assert dilations(meta(dilation=False))==dilations(meta(last_stride=2))==[[1]*6, [1,1,1]]
    assert all(m.conv.padding==m.conv.dilation for m in meta().modules() if isinstance(m, SplitAttention))

def test_pooling_in_blocks():
    "Average pooling in the first block of stages 2 to 4, strided in 2, 3 and, with `last_stride=2`, 4"
    for last in (1,2):
        net = meta(last_stride=last)
        found = {(i,j):b.avd_layer.stride for i in (1,2,3,4) for j,b in enumerate(getattr(net, f'layer{i}')) if isinstance(b.avd_layer, nn.AvgPool2d)}
        assert found=={(2,0):2, (3,0):2, (4,0):last}
        assert [getattr(net, f'layer{i}')[0].downsample[0].kernel_size for i in (1,2,3,4)]==[(1,1),(2,2),(2,2),(last,last)]
    assert all(m.stride in (1,(1,1)) for m in net.layer4.modules() if isinstance(m, nn.Conv2d))

def test_shortcut_averages():
    "Every place of the map reaches the next stage through the shortcut"
    x = torch.randn(1, 256, 6, 6, requires_grad=True)
    resnest().layer2[0].downsample.eval()(x).sum().backward()
    assert (x.grad.abs().sum(1)>0).all()

def test_starts_like_the_reference():
    "Convolutions are drawn with variance 2/(9·channels out), the stem included"
    net = resnest()
    for conv in (net.conv1[6], net.layer3[1].conv2.conv, net.layer4[0].downsample[1]):
        fan = conv.weight[0,0].numel()*conv.out_channels
        assert abs(conv.weight.std()/(2/fan)**0.5-1)<0.05
    assert torch.equal(net.bn1.weight, torch.ones(64)) and torch.equal(net.layer1[0].conv2.bn0.bias, torch.zeros(128))

@pytest.mark.parametrize('width,n', [('one',1), ('half',256)])
def test_nonlocal(width, n):
    net = meta(nl=True, nl_width=width)
    assert (len(net.NL_2), len(net.NL_3))==(2,3) and net.NL_2[0].g.out_channels==n
    assert set(net.state_dict())-set(meta().state_dict())=={k for k in net.state_dict() if k.startswith('NL_')}

def test_nonlocal_is_used():
    torch.manual_seed(0)
    net,x = resnest(nl=True).eval(),torch.rand(1, 3, 64, 32)
    with torch.no_grad():
        plain = net(x)
        nn.init.ones_(net.NL_3[2].W[1].weight)
        assert not torch.allclose(net(x), plain)

def test_trains():
    net = resnest().train()
    net(torch.rand(2, 3, 64, 32)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())

## Files

@pytest.fixture(scope='module')
def published(tmp_path_factory):
    "A file like the published one: a 50-layer network with a classifier"
    f = tmp_path_factory.mktemp('weights')/'resnest50-528c19ca.pth'
    torch.save(shaken(resnest(last_stride=2)).state_dict() | {'fc.weight':torch.zeros(1000, 2048), 'fc.bias':torch.zeros(1000)}, f)
    return f

@pytest.mark.parametrize('kw', [dict(nl=True), dict(last_stride=2, stem_pool='ceil')])
def test_pretrained_from_a_file(published, kw):
    net,state = resnest(pretrained=published, **kw),torch.load(published, weights_only=True)
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items() if not k.startswith('NL_'))

def test_other_depth_does_not_fit(published):
    with torch.device('meta'), pytest.raises(ValueError, match='does not fit ResNeSt'): resnest(101, pretrained=published)

def test_pretrained_is_downloaded(published, monkeypatch, tmp_path):
    asked = []
    def download(url, dst, hash_prefix=None, **kw):
        asked.append((url, hash_prefix))
        Path(dst).write_bytes(published.read_bytes())
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    assert resnest(pretrained=True)
    assert asked==[('https://github.com/zhanghang1989/ResNeSt/releases/download/weights_step1/resnest50-528c19ca.pth', '528c19ca')]

## Detection

@pytest.mark.parametrize('depth,nl', slow_but([*((d,{}) for d in depths), (50,dict(nl=True, nl_width='one')), (101,dict(nl=True, nl_width='half'))], 50, 101))
def test_detect(depth, nl):
    state = meta(depth, **nl).state_dict() | {'fc.weight':torch.zeros(3, 2048)}
    make,new = detect_resnest(state)
    assert (make.func, make.args, make.keywords)==(resnest, (depth,), nl) and set(new)==set(state)
    with torch.device('meta'): built = make().state_dict()
    assert {k:v.shape for k,v in built.items()}=={k:v.shape for k,v in state.items() if k!='fc.weight'}

def test_others_are_not_claimed():
    with torch.device('meta'): others = [resnet18().state_dict(), resnet50(ibn=True, nl=True).state_dict(), resnet50(se=True).state_dict(), {}]
    assert [detect_resnest(o) for o in others]==[None]*4
    assert detect_resnet(meta().state_dict()) is None

@pytest.mark.parametrize('name', ['resnest14d', 'resnest26d', 'resnest50d_1s4x24d', 'resnest50d_4s2x40d', 'resnet50d'])
def test_relatives_are_not_claimed(name):
    timm = pytest.importorskip('timm')
    with torch.device('meta'): state = timm.create_model(name, num_classes=0).state_dict()
    assert detect_resnest(state) is None

def test_partial_files_are_not_claimed():
    state = meta().state_dict()
    assert detect_resnest({k:v for k,v in state.items() if not k.startswith('layer3.5')}) is None
    assert detect_resnest({k:v for k,v in state.items() if not k.startswith('conv1')}) is None

@pytest.mark.parametrize('kw,match', [(dict(variant=152), 'variant=152.*50, 101, 200, 269'), (dict(last_stride=3), 'last_stride=3'),
    (dict(stem_pool='same'), "stem_pool='same'"), (dict(nl=True, nl_width='two'), "'one', 'half'"), (dict(variant='50'), 'variant')])
def test_bad_arguments(kw, match):
    with pytest.raises(ValueError, match=match): resnest(**kw)

def test_block_types(): assert all(isinstance(b, SplitBottleneck) for b in ResNeSt(50).layer3)
