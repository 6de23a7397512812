"RegNet: the published widths, depths and sizes, pycls' and torchvision's names, and a forward pass of our own"
import json

import numpy as np, pytest, torch, torch.nn.functional as F, torchvision
from torch import nn
from torchvision.models.regnet import BlockParams

from fastreid_nb.backbone import regnet as rn
from fastreid_nb.backbone.weights import fill_network
from fastreid_nb.backbone.mobile import detect_efficientnet, detect_mobilenet, detect_shufflenet
from fastreid_nb.backbone.regnet import detect_regnet, regnet, regnet_params
from golden_files import close, golden_params, missing
from golden_models import golden_array, golden_input, golden_name, golden_state

mean,std = (torch.tensor(o).view(1, 3, 1, 1) for o in ((.485,.456,.406), (.229,.224,.225)))

published = { # widths, depths, group, channels out, millions of parameters without a classifier
    'x_200mf':([24,56,152,368],[1,1,4,7],8,2.32), 'x_400mf':([32,64,160,384],[1,2,7,12],16,4.77), 'x_800mf':([64,128,288,672],[1,3,7,5],16,6.59),
    'x_1_6gf':([72,168,408,912],[2,4,10,2],24,8.28), 'x_3_2gf':([96,192,432,1008],[2,6,15,2],48,14.29), 'x_4gf':([80,240,560,1360],[2,5,14,2],40,20.76),
    'x_6_4gf':([168,392,784,1624],[2,4,10,1],56,24.58), 'y_800mf':([64,128,320,768],[1,3,8,2],16,5.49)}
y_sizes = {'y_200mf':(368,2.79), 'y_400mf':(440,3.90), 'y_800mf':(768,5.49), 'y_1_6gf':(888,10.31), 'y_3_2gf':(1512,17.92), 'y_4gf':(1088,19.56), 'y_6_4gf':(1296,29.29)}

def millions(net): return round(sum(p.numel() for p in net.parameters())/1e6, 2)

@pytest.mark.parametrize('size', published)
def test_published_stages(size):
    widths,depths,group,n = published[size]
    p = regnet_params(size)
    assert (p.widths, p.depths, p.group_widths, p.se_ratio)==(widths, depths, [group]*4, .25 if size[0]=='y' else None)
    with torch.device('meta'): net = regnet(size)
    assert (millions(net), net.n_feat)==(n, widths[-1])

@pytest.mark.parametrize('size', y_sizes)
def test_published_y_sizes(size):
    with torch.device('meta'): net = regnet(size)
    assert (net.n_feat, millions(net))==y_sizes[size]

@pytest.mark.parametrize('size', rn._sizes)
def test_rule(size):
    "The paper's rule, one block after the other; torchvision's rounding as an option; widths are multiples of groups"
    depth,w0,wa,wm,group = rn._sizes[size]
    per_block = [8*round(w0*wm**round(np.log((w0+wa*j)/w0)/np.log(wm))/8) for j in range(depth)]
    want = {w:per_block.count(w) for w in sorted(per_block)}
    p,q = regnet_params(size),regnet_params(size, rounding='torchvision')
    assert (p.widths, p.depths)==([round(w/min(w, group))*min(w, group) for w in want], list(want.values()))
    assert len(want)==4 and all(w%g==0 for w,g in zip(p.widths, p.group_widths))
    assert vars(q)==vars(BlockParams.from_init_params(depth, w0, wa, wm, group, se_ratio=p.se_ratio))

@pytest.mark.parametrize('last_stride', [1,2])
@pytest.mark.parametrize('size', ['x_200mf','y_600mf'])
def test_map_size(size, last_stride):
    with torch.device('meta'):
        net = regnet(size, last_stride)
        for h,w in ((128,64), (33,17), (224,224)):
            assert net(torch.zeros(2, 3, h, w)).shape==(2, net.n_feat, -(-h//net.total_stride), -(-w//net.total_stride))
    assert net.total_stride==16*last_stride

def test_last_stride_changes_only_the_last_stage():
    with torch.device('meta'): nets = [regnet('y_200mf', o) for o in (1,2)]
    strides = [{k:m.stride for k,m in o.named_modules() if isinstance(m, nn.Conv2d)} for o in nets]
    assert [k for k in strides[0] if strides[0][k]!=strides[1][k]]==[f'trunk_output.block4.block4-0.{o}.0' for o in ('proj','f.b')]

def test_no_state_is_shared_between_x_and_y():
    "Building a Y network leaves the next X network without squeeze and excitation"
    with torch.device('meta'):
        regnet('y_200mf')
        assert not [k for k in regnet('x_200mf').state_dict() if '.se.' in k]

## torchvision

@pytest.mark.parametrize('size,name', [('y_400mf','regnet_y_400mf'), ('x_400mf','regnet_x_400mf'), ('y_800mf','regnet_y_800mf')])
def test_equals_torchvision(size, name):
    theirs,x = getattr(torchvision.models, name)().eval(),torch.rand(2, 3, 64, 32)
    make,named = detect_regnet(theirs.state_dict())
    assert make.args==(size,) and make.keywords['rounding']==('paper' if size=='y_400mf' else 'torchvision')
    net = make(last_stride=2).eval()
    assert fill_network(net, named)==['fc.weight','fc.bias']
    with torch.no_grad(): torch.testing.assert_close(theirs.fc(net(x).mean((2,3))), theirs(x))

## pycls' names

def bn_shapes(k, n): return {f'{k}.{o}':(n,) for o in ('weight','bias','running_mean','running_var')} | {f'{k}.num_batches_tracked':()}

def pycls_shapes(widths, depths, group, se, stem=32):
    "Names and shapes as pycls has them: every block as wide inside as outside, squeezed to a quarter of its input"
    res,inp = {'stem.conv.weight':(stem,3,3,3), **bn_shapes('stem.bn', stem)},stem
    for s,(w,d) in enumerate(zip(widths, depths), 1):
        for b in range(1, d+1):
            k = f's{s}.b{b}'
            if b==1: res |= {f'{k}.proj.weight':(w,inp,1,1), **bn_shapes(f'{k}.bn', w)}
            res |= {f'{k}.f.a.weight':(w,inp,1,1), **bn_shapes(f'{k}.f.a_bn', w), f'{k}.f.b.weight':(w,group,3,3), **bn_shapes(f'{k}.f.b_bn', w)}
            few = round(inp/4)
            if se: res |= {f'{k}.f.se.f_ex.0.weight':(few,w,1,1), f'{k}.f.se.f_ex.0.bias':(few,), f'{k}.f.se.f_ex.2.weight':(w,few,1,1), f'{k}.f.se.f_ex.2.bias':(w,)}
            res |= {f'{k}.f.c.weight':(w,w,1,1), **bn_shapes(f'{k}.f.c_bn', w)}
            inp = w
    return res | {'head.fc.weight':(1000,inp), 'head.fc.bias':(1000,)}

def bn(x, state, k): return F.batch_norm(x, *(state[f'{k}.{o}'] for o in ('running_mean','running_var','weight','bias')))

def conv(x, state, k, stride=1):
    w = state[f'{k}.weight']
    return F.conv2d(x, w, state.get(f'{k}.bias'), stride, w.shape[-1]//2, groups=x.shape[1]//w.shape[1])

def block(x, state, k, stride):
    y = bn(conv(x, state, f'{k}.f.a'), state, f'{k}.f.a_bn').relu()
    y = bn(conv(y, state, f'{k}.f.b', stride), state, f'{k}.f.b_bn').relu()
    if f'{k}.f.se.f_ex.0.weight' in state:
        y = y*conv(conv(y.mean((2,3), keepdim=True), state, f'{k}.f.se.f_ex.0').relu(), state, f'{k}.f.se.f_ex.2').sigmoid()
    y = bn(conv(y, state, f'{k}.f.c'), state, f'{k}.f.c_bn')
    if f'{k}.proj.weight' in state: x = bn(conv(x, state, f'{k}.proj', stride), state, f'{k}.bn')
    return (x+y).relu()

def reference(x, state, depths, last_stride):
    x = bn(conv(x, state, 'stem.conv', 2), state, 'stem.bn').relu()
    for s,d in enumerate(depths, 1):
        for b in range(1, d+1): x = block(x, state, f's{s}.b{b}', 1 if b>1 else last_stride if s==4 else 2)
    return x

@pytest.mark.parametrize('size,last_stride', [('x_200mf',1), ('y_200mf',1), ('y_200mf',2)])
def test_pycls_names(size, last_stride):
    "A file with pycls' names gives what a plain forward pass over those names gives; only the classifier is left over"
    widths,depths,group,_ = published['x_200mf']
    state = {k:golden_array(k, s) for k,s in pycls_shapes(widths, depths, group, size[0]=='y').items()}
    make,named = detect_regnet(state)
    net = make(last_stride=last_stride).eval()
    assert make.args==(size,) and fill_network(net, named)==['fc.weight','fc.bias']
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad(): close(net(x), reference(x, state, depths, last_stride), rel=1e-4)

@pytest.mark.parametrize('size', published)
def test_pycls_shapes(size):
    "Every published size is found from pycls' names and shapes, and has exactly those entries"
    widths,depths,group,_ = published[size]
    with torch.device('meta'):
        state = {k:torch.empty(s) for k,s in pycls_shapes(widths, depths, group, size[0]=='y').items()}
        make,named = detect_regnet(state)
        own = make().state_dict()
    assert make.args==(size,) and {k:v.shape for k,v in own.items()}=={k:v.shape for k,v in named.items() if not k.startswith('fc.')}

@pytest.mark.parametrize('path', golden_params('models/*.keys.json'))
def test_golden_map(path):
    "Models of the reference implementation: ours are found and give the published maps, others are left alone"
    if path is None: missing('models/*.keys.json')
    shapes = {k.removeprefix('backbone.'):torch.empty(v, device='meta') for k,v in json.loads(path.read_text()).items() if k.startswith('backbone.')}
    assert bool(detect_regnet(shapes))==golden_name(path).startswith('RegNet')
    if not detect_regnet(shapes): return
    make,named = detect_regnet({k.removeprefix('backbone.'):v for k,v in golden_state(path).items() if k.startswith('backbone.')})
    z = np.load(path.with_name(f'{golden_name(path)}.npz'))
    net = make(last_stride=1 if z['backbone_map_shape'][2]==16 else 2).eval()
    assert fill_network(net, named)==[]
    with torch.no_grad(): fmap = net((golden_input()-mean)/std)
    assert list(fmap.shape)==z['backbone_map_shape'].tolist()
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'], rel=1e-4)
    close(fmap.flatten()[::61], z['backbone_map_every61'], rel=1e-4)

## Detection and files

@pytest.mark.parametrize('rounding', ['paper','torchvision'])
@pytest.mark.parametrize('size', ['x_400mf','y_600mf','x_4gf','y_8gf','y_12gf'])
def test_own_names_are_detected(size, rounding):
    with torch.device('meta'):
        state = regnet(size, rounding=rounding).state_dict()
        make,named = detect_regnet(state)
        again = make().state_dict()
    assert make.args==(size,) and named.keys()==again.keys() and all(v.shape==again[k].shape for k,v in state.items())
    assert [d(state) for d in (detect_mobilenet, detect_shufflenet, detect_efficientnet)]==[None]*3

@pytest.mark.parametrize('name', ['resnet50','mobilenet_v2','efficientnet_b0','shufflenet_v2_x1_0'])
def test_other_networks_are_left_alone(name):
    with torch.device('meta'): assert detect_regnet(getattr(torchvision.models, name)().state_dict()) is None

def test_other_regnets_are_left_alone():
    "A size without a name, or a stage that is missing, is not taken for one of ours"
    with torch.device('meta'): state = regnet('x_200mf').state_dict()
    assert detect_regnet({}) is None and detect_regnet({k:v for k,v in state.items() if '.block4-6.' not in k}) is None
    assert detect_regnet({k:v for k,v in state.items() if '.block3.' not in k}) is None

def test_pretrained_from_a_file_of_pycls(tmp_path):
    widths,depths,group,_ = published['x_200mf']
    state = {k:golden_array(k, s) for k,s in pycls_shapes(widths, depths, group, False).items()}
    torch.save(state, tmp_path/'x.pyth')
    net = regnet('x_200mf', pretrained=tmp_path/'x.pyth')
    assert torch.equal(net.trunk_output.block2[0].proj[1].running_var, state['s2.b1.bn.running_var'])
    with pytest.raises(ValueError, match='does not fit'): regnet('y_200mf', pretrained=tmp_path/'x.pyth')

@pytest.mark.parametrize('size,rounding,file', [('x_800mf','paper','regnet_x_800mf-ad17e45c.pth'), ('y_800mf','torchvision','regnet_y_800mf-1b27b58c.pth'),
    ('y_16gf','paper','regnet_y_16gf-9e6ed7dd.pth')])
def test_pretrained_address(size, rounding, file, monkeypatch):
    asked = []
    def stop(u):
        asked.append(u)
        raise FileNotFoundError(u)
    monkeypatch.setattr('fastreid_nb.backbone.weights.download_weights', stop)
    with torch.device('meta'), pytest.raises(FileNotFoundError): regnet(size, rounding=rounding, pretrained=True)
    assert asked==[f'https://download.pytorch.org/models/{file}']

@pytest.mark.parametrize('kw,match', [(dict(variant='800'), "variant='800'"), (dict(variant=800), 'variant=800'), (dict(last_stride=4), 'last_stride=4'), (dict(rounding='up'), "rounding='up'"),
    (dict(variant='x_200mf', pretrained=True), '400mf, 800mf, 1_6gf'), (dict(variant='y_4gf', pretrained=True), '400mf, 800mf, 1_6gf'),
    (dict(variant='y_800mf', pretrained=True), "64, 144, 320, 784.*rounding='torchvision'")])
def test_bad_arguments(kw, match):
    with torch.device('meta'), pytest.raises(ValueError, match=match): regnet(**kw)

def test_names_of_version_0_0_1():
    "Recipes of files of version 0.0.1 name the sizes otherwise"
    for old,new in {'200x':'x_200mf', '800y':'y_800mf', '1600y':'y_1_6gf', '4000x':'x_4gf', '32000y':'y_32gf'}.items():
        assert vars(regnet_params(old))==vars(regnet_params(new))
