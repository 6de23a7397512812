"Mobile backbones: parameter counts, surgery, weight files, and the maps of the reference implementation"
import json

import numpy as np, pytest, torch, torch.nn.functional as F, torchvision
from torch import nn

from fastreid_nb.backbone.weights import fill_network
from fastreid_nb.backbone.mobile import SplitBlock, MobileTrunk, efficientnet, mobilenetv2, mobilenetv3, shufflenetv2
from fastreid_nb.backbone.mobile import detect_efficientnet, detect_mobilenet, detect_shufflenet
from golden_files import close, golden_params, missing
from golden_models import golden_array, golden_input, golden_name, golden_state
from slow import slow_but

detectors = (detect_mobilenet, detect_shufflenet, detect_efficientnet)
mean,std = (torch.tensor(o).view(1, 3, 1, 1) for o in ((.485,.456,.406), (.229,.224,.225)))

def from_shapes(shapes):
    "A state with believable numbers for every name"
    return {k:golden_array(k, s) for k,s in shapes.items()}

def names(k, n):
    "The entries of a normalisation `k` of `n` channels"
    return {f'{k}.{o}':(n,) for o in ('weight','bias','running_mean','running_var')} | {f'{k}.num_batches_tracked':()}

def seeded(net):
    "Give a new network weights and statistics that are not all alike"
    fill_network(net, from_shapes({k:tuple(v.shape) for k,v in net.state_dict().items()}))
    return net.eval()

def bn(x, state, k, eps=1e-5):
    return F.batch_norm(x, state[f'{k}.running_mean'], state[f'{k}.running_var'], state[f'{k}.weight'], state[f'{k}.bias'], eps=eps)

def conv(x, state, k, stride=1, groups=1):
    w = state[f'{k}.weight']
    return F.conv2d(x, w, state.get(f'{k}.bias'), stride, w.shape[-1]//2, groups=groups)

## The reference implementation

@pytest.mark.parametrize('path', golden_params('models/*.keys.json'))
def test_golden_map(path):
    "Detected, built and filled through the public way, ours give the published maps; other families are left alone"
    if path is None: missing('models/*.keys.json')
    shapes = {k.removeprefix('backbone.'):torch.empty(v, device='meta') for k,v in json.loads(path.read_text()).items() if k.startswith('backbone.')}
    found = [d for d in detectors if d(shapes)]
    assert len(found)==golden_name(path).startswith(('MobileNet','ShuffleNet','Eff'))
    if not found: return
    make,named = found[0]({k.removeprefix('backbone.'):v for k,v in golden_state(path).items() if k.startswith('backbone.')})
    z = np.load(path.with_name(f'{golden_name(path)}.npz'))
    net = make(last_stride=1 if z['backbone_map_shape'][2]==16 else 2).eval()
    assert fill_network(net, named)==[]
    with torch.no_grad(): fmap = net((golden_input()-mean)/std)
    assert list(fmap.shape)==z['backbone_map_shape'].tolist() and fmap.shape[1]==net.n_feat
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'], rel=1e-4)
    close(fmap.flatten()[::61], z['backbone_map_every61'], rel=1e-4)

counts = {**{(mobilenetv2,w):o for w,o in zip((1.,.75,.5,.35,.25,.1), (2.22,1.36,.69,.40,.24,.08))},
    (mobilenetv3,'large'):2.97, (mobilenetv3,'small'):.93, (mobilenetv3,'large','fastreid'):4.20, (mobilenetv3,'small','fastreid'):1.52,
    **{(shufflenetv2,w,'fastreid'):o for w,o in {.5:.34, 1.:1.25, 1.5:2.48, 2.:5.35}.items()},
    **{(efficientnet,f'b{i}'):o for i,o in enumerate((4.01,6.51,7.70,10.70,17.55,28.34))}}
channels = {mobilenetv2:lambda *_: 1280, mobilenetv3:lambda s,f='torchvision': dict(large=(960,1280), small=(576,1024))[s][f=='fastreid'],
    shufflenetv2:lambda w,_: 2048 if w==2 else 1024, efficientnet:lambda s: [1280,1280,1408,1536,1792,2048][int(s[1])]}

@pytest.mark.parametrize('last_stride', slow_but([1,2], 1))
@pytest.mark.parametrize('key', counts, ids=lambda k: '-'.join([k[0].__name__, *map(str, k[1:])]))
def test_sizes(key, last_stride):
    "Parameters in millions and channels as published by the reference implementation, and the size of the map"
    make,size,*form = key
    with torch.device('meta'):
        net = make(size, last_stride, *form).eval()
        y = net(torch.zeros(2, 3, 128, 64))
    assert round(sum(p.numel() for p in net.parameters())/1e6, 2)==counts[key]
    assert y.shape==(2, channels[make](size, *form), 64//8//last_stride, 64//16//last_stride) and net.n_feat==y.shape[1]
    assert net.total_stride==16*last_stride

@pytest.mark.parametrize('hw', [(33,17), (224,224), (64,100)])
@pytest.mark.parametrize('make', [mobilenetv2, mobilenetv3, shufflenetv2, efficientnet])
def test_odd_sizes(make, hw):
    "A map has one place per begun stride"
    with torch.device('meta'): net = make(last_stride=1).eval()
    assert tuple(net(torch.zeros(1, 3, *hw, device='meta')).shape[2:])==tuple(-(-o//16) for o in hw)

## torchvision

@pytest.mark.parametrize('make,name', [(mobilenetv2,'mobilenet_v2'), (mobilenetv3,'mobilenet_v3_large'), (lambda **k: mobilenetv3('small', **k),'mobilenet_v3_small'),
    (shufflenetv2,'shufflenet_v2_x1_0'), (lambda **k: efficientnet('b0', **k),'efficientnet_b0')])
def test_equals_torchvision(make, name):
    "With the stride of classification the network is torchvision's, and its file is read under its own names"
    theirs = seeded(getattr(torchvision.models, name)())
    state,x = theirs.state_dict(),torch.rand(2, 3, 64, 32)
    net = make(last_stride=2).eval()
    assert all(k.startswith(('classifier.','fc.')) for k in fill_network(net, state))
    head = theirs.fc if hasattr(theirs, 'fc') else theirs.classifier
    with torch.no_grad(): torch.testing.assert_close(head(net(x).mean((2,3))), theirs(x))

@pytest.mark.parametrize('make', [mobilenetv2, mobilenetv3, shufflenetv2, efficientnet])
def test_last_stride_changes_no_weight(make):
    "Strides differ in the last stage that halves, and nowhere else"
    with torch.device('meta'): fine,coarse = make(last_stride=1),make(last_stride=2)
    assert {k:v.shape for k,v in fine.state_dict().items()}=={k:v.shape for k,v in coarse.state_dict().items()}
    strides = [{k:m.stride for k,m in o.named_modules() if isinstance(m, nn.Conv2d)} for o in (fine,coarse)]
    changed = [k for k in strides[0] if strides[0][k]!=strides[1][k]]
    assert changed and {strides[0][k] for k in changed}=={(1,1)} and {strides[1][k] for k in changed}=={(2,2)}
    assert sum(o==(2,2) for o in strides[1].values())==len(changed)+sum(o==(2,2) for o in strides[0].values())

## fast-reid's forms

v3_large = [(3,'RE',0,1),(3,'RE',0,2),(3,'RE',0,1),(5,'RE',1,2),(5,'RE',1,1),(5,'RE',1,1),(3,'HS',0,2),(3,'HS',0,1),(3,'HS',0,1),(3,'HS',0,1),
    (3,'HS',1,1),(3,'HS',1,1),(5,'HS',1,2),(5,'HS',1,1),(5,'HS',1,1)]
v3_small = [(3,'RE',1,2),(3,'RE',0,2),(3,'RE',0,1),*[(5,'HS',1,o) for o in (2,1,1,1,1,2,1,1)]]
v3_rows = dict(large=v3_large, small=v3_small) # kernel, activation, squeeze and excitation, stride

def v3_block(x, state, k, act, se, stride, expands):
    "One block: widen, filter each channel, weigh channels, narrow without activation; a sum where shapes allow"
    y,i = x,0
    if expands: y,i = act(bn(conv(y, state, f'{k}.0.0'), state, f'{k}.0.1')),1
    y = act(bn(conv(y, state, f'{k}.{i}.0', stride, groups=y.shape[1]), state, f'{k}.{i}.1'))
    if se:
        i += 1
        scale = conv(conv(y.mean((2,3), keepdim=True), state, f'{k}.{i}.fc1').relu(), state, f'{k}.{i}.fc2')
        y = y*((scale+3).clamp(0, 6)/6)
    y = bn(conv(y, state, f'{k}.{i+1}.0'), state, f'{k}.{i+1}.1')
    return x+y if stride==1 and x.shape==y.shape else y

def v3_reference(x, state, rows):
    x = F.hardswish(bn(conv(x, state, 'features.0.0', 2), state, 'features.0.1'))
    for i,(kernel,act,se,stride) in enumerate(rows, 1):
        k = f'features.{i}.block'
        expands = state[f'{k}.0.0.weight'].shape[1]>1
        assert state[f'{k}.{int(expands)}.0.weight'].shape[-1]==kernel
        x = v3_block(x, state, k, F.relu if act=='RE' else F.hardswish, se, stride, expands)
    x = F.hardswish(bn(conv(x, state, f'features.{len(rows)+1}.0'), state, f'features.{len(rows)+1}.1'))
    return F.relu6(bn(conv(x, state, 'conv.0'), state, 'conv.1'))

@pytest.mark.parametrize('size', v3_rows)
def test_mobilenet_v3_of_fastreid(size):
    "The named form equals a plain forward pass with eps 1e-5 and the last convolution; the other form's eps does not"
    with torch.device('meta'): shapes = {k:tuple(v.shape) for k,v in mobilenetv3(size, form='fastreid').state_dict().items()}
    assert shapes['conv.0.weight']==dict(large=(1280,960,1,1), small=(1024,576,1,1))[size]
    state,x = from_shapes(shapes),torch.rand(2, 3, 64, 32)
    make,named = detect_mobilenet(state)
    net = make().eval()
    fill_network(net, named)
    want = v3_reference(x, state, v3_rows[size])
    with torch.no_grad(): close(net(x), want)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.eps, m.momentum)==(1e-5, .1)
            m.eps = 1e-3
    with torch.no_grad(), pytest.raises(AssertionError): close(net(x), want, rel=1e-4)

@pytest.mark.parametrize('width,mid', [(.5,24), (1.,58), (1.5,88), (2.,122)])
def test_authors_shufflenet_is_another_network(width, mid):
    "Shapes of the first block as the authors have them, and another map than torchvision's with the same numbers"
    net = shufflenetv2(width, form='fastreid')
    first = net.stage2[0]
    assert (first.branch1[2].weight.shape[:2], first.branch2[5].weight.shape[:2])==((24,24), (2*mid-24,mid))
    make,_ = detect_shufflenet(net.state_dict())
    assert make.args==(width,) and make.keywords['form']==('torchvision' if width==.5 else 'fastreid')

def test_split_block_by_hand():
    "Even channels pass, odd ones go through the branch; the first block joins both branches without mixing"
    block = seeded(SplitBlock(8, 8, 1))
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        y = block(x)
        assert torch.equal(y[:,:4], x[:,[0,2,4,6]])
        torch.testing.assert_close(y[:,4:], block.branch2(x[:,[1,3,5,7]]))
        start = seeded(SplitBlock(6, 16, 2))
        torch.testing.assert_close(start(x[:,:6]), torch.cat([start.branch1(x[:,:6]), start.branch2(x[:,:6])], 1))

## pycls' EfficientNet

b0 = dict(depths=(1,2,2,3,3,4,1), widths=(16,24,40,80,112,192,320), kernels=(3,3,5,3,5,5,3), strides=(1,2,2,2,1,2,1))

def pycls_effnet_shapes(depths, widths, kernels, strides, stem=32, head=1280):
    "Names and shapes as pycls has them: six times wider inside but for the first stage, squeezed to a quarter of the input"
    res,inp = {'stem.conv.weight':(stem,3,3,3), **names('stem.bn', stem)},stem
    for s,(d,out,kernel) in enumerate(zip(depths, widths, kernels), 1):
        for b in range(1, d+1):
            k,mid,few = f's{s}.b{b}',inp*(1 if s==1 else 6),inp//4
            if s>1: res |= {f'{k}.exp.weight':(mid,inp,1,1), **names(f'{k}.exp_bn', mid)}
            res |= {f'{k}.dwise.weight':(mid,1,kernel,kernel), **names(f'{k}.dwise_bn', mid)}
            res |= {f'{k}.se.f_ex.0.weight':(few,mid,1,1), f'{k}.se.f_ex.0.bias':(few,), f'{k}.se.f_ex.2.weight':(mid,few,1,1), f'{k}.se.f_ex.2.bias':(mid,)}
            res |= {f'{k}.lin_proj.weight':(out,mid,1,1), **names(f'{k}.lin_proj_bn', out)}
            inp = out
    return res | {'head.conv.weight':(head,inp,1,1), **names('head.conv_bn', head), 'head.fc.weight':(1000,head), 'head.fc.bias':(1000,)}

def swish(x): return x*x.sigmoid()

def mbconv(x, state, k, stride):
    y = x
    if f'{k}.exp.weight' in state: y = swish(bn(conv(y, state, f'{k}.exp'), state, f'{k}.exp_bn'))
    y = swish(bn(conv(y, state, f'{k}.dwise', stride, y.shape[1]), state, f'{k}.dwise_bn'))
    y = y*conv(swish(conv(y.mean((2,3), keepdim=True), state, f'{k}.se.f_ex.0')), state, f'{k}.se.f_ex.2').sigmoid()
    y = bn(conv(y, state, f'{k}.lin_proj'), state, f'{k}.lin_proj_bn')
    return x+y if stride==1 and x.shape==y.shape else y

def effnet_reference(x, state, depths, strides, last_stride):
    x = swish(bn(conv(x, state, 'stem.conv', 2), state, 'stem.bn'))
    for s,(d,stride) in enumerate(zip(depths, strides), 1):
        for b in range(1, d+1): x = mbconv(x, state, f's{s}.b{b}', 1 if b>1 else last_stride if s==6 else stride)
    return swish(bn(conv(x, state, 'head.conv'), state, 'head.conv_bn'))

@pytest.mark.parametrize('last_stride', [1,2])
def test_efficientnet_of_pycls(last_stride):
    "A file with pycls' names gives what a plain forward pass over those names gives; only the classifier is left over"
    state,x = from_shapes(pycls_effnet_shapes(**b0)),torch.rand(2, 3, 64, 32)
    make,named = detect_efficientnet(state)
    net = make(last_stride=last_stride).eval()
    assert make.args==('b0',) and fill_network(net, named)==['classifier.1.weight','classifier.1.bias']
    with torch.no_grad(): close(net(x), effnet_reference(x, state, b0['depths'], b0['strides'], last_stride), rel=1e-4)

pycls_sizes = {'b1':((2,3,3,4,4,5,2),(16,24,40,80,112,192,320),32,1280), 'b2':((2,3,3,4,4,5,2),(16,24,48,88,120,208,352),32,1408),
    'b3':((2,3,3,5,5,6,2),(24,32,48,96,136,232,384),40,1536), 'b4':((2,4,4,6,6,8,2),(24,32,56,112,160,272,448),48,1792),
    'b5':((3,5,5,7,7,9,3),(24,40,64,128,176,304,512),48,2048)}

@pytest.mark.parametrize('size', slow_but(pycls_sizes, 'b1'))
def test_efficientnet_sizes_of_pycls(size):
    "Every published size has pycls' depths, widths and kernels, and its eps in fast-reid's form"
    depths,widths,stem,head = pycls_sizes[size]
    with torch.device('meta'):
        state = {k:torch.empty(s) for k,s in pycls_effnet_shapes(depths, widths, b0['kernels'], b0['strides'], stem, head).items()}
        make,named = detect_efficientnet(state)
        net = make()
    assert make.args==(size,) and make.keywords==dict(form='fastreid')
    assert {k:v.shape for k,v in net.state_dict().items()}=={k:v.shape for k,v in named.items() if not k.startswith('classifier.')}
    assert {(m.eps, m.momentum) for m in net.modules() if isinstance(m, nn.BatchNorm2d)}=={(1e-5,.1)}

def test_efficientnet_eps():
    "torchvision's b5 has another eps than its smaller sizes"
    with torch.device('meta'): eps = [efficientnet(o).features[0][1].eps for o in ('b4','b5')]
    assert eps==[1e-5,1e-3]

@pytest.mark.parametrize('drop', [0.,.2])
def test_drop(drop):
    "The probability rises from 0 towards `drop`; without it training and evaluation leave out nothing"
    net = efficientnet(drop=drop)
    ps = [m.p for m in net.modules() if type(m).__name__=='StochasticDepth']
    assert len(ps)==16 and ps==pytest.approx([drop*i/16 for i in range(16)])

## Detection and files

makes = [lambda: mobilenetv2(.35), lambda: mobilenetv3('large'), lambda: mobilenetv3('small', form='fastreid'), lambda: shufflenetv2(2.),
    lambda: shufflenetv2(1., form='fastreid'), lambda: efficientnet('b2')]

@pytest.mark.parametrize('make', makes)
def test_own_names_are_detected(make):
    "What we save is found again, by one detector alone, with nothing renamed"
    with torch.device('meta'): net = make()
    state = net.state_dict()
    found = [o for o in (d(state) for d in detectors) if o]
    assert len(found)==1 and found[0][1].keys()==state.keys()
    with torch.device('meta'): again = found[0][0]()
    assert {k:v.shape for k,v in again.state_dict().items()}=={k:v.shape for k,v in state.items()}

@pytest.mark.parametrize('name', ['resnet18','mnasnet0_5','efficientnet_v2_s','densenet121','vgg11','squeezenet1_0','convnext_tiny'])
def test_other_networks_are_left_alone(name):
    with torch.device('meta'): state = getattr(torchvision.models, name)().state_dict()
    assert [d(state) for d in detectors]==[None]*3 and [d({}) for d in detectors]==[None]*3

def test_odd_widths_are_left_alone():
    "A MobileNetV2 or EfficientNet of a size that has no name is not taken for one that has"
    with torch.device('meta'):
        assert detect_mobilenet(torchvision.models.mobilenet_v2(width_mult=1.4).state_dict()) is None
        state = efficientnet('b0').state_dict()
    assert detect_efficientnet({k:v for k,v in state.items() if not k.startswith('features.6.3')}) is None

def old_v2(state):
    "torchvision's names of MobileNetV2 as the first PyTorch version has them: parts of a block in one row"
    res = {}
    for k,v in state.items():
        p = k.split('.')
        if p[1]=='18': p = ['conv', *p[2:]]
        elif p[2]=='conv':
            at = {'0.0':0, '0.1':1, '1.0':3, '1.1':4, '1':3, '2':4 if p[1]=='1' else 6, '3':7}
            n = 5 if '.'.join(p[3:5]) in at else 4
            p = [*p[:3], str(at['.'.join(p[3:n])]), *p[n:]]
        res['.'.join(p)] = v
    return res

def test_pretrained_reads_either_naming(tmp_path):
    net = seeded(mobilenetv2(.1))
    old = old_v2(net.state_dict())
    assert 'features.1.conv.3.weight' in old and 'features.17.conv.7.running_var' in old and 'conv.1.bias' in old
    for i,state in enumerate((net.state_dict(), {**old, 'classifier.weight':torch.zeros(2, 2)})):
        torch.save(state, tmp_path/f'{i}.pth')
        read = mobilenetv2(.1, pretrained=tmp_path/f'{i}.pth')
        assert all(torch.equal(a, b) for a,b in zip(read.state_dict().values(), net.state_dict().values()))

def old_shuffle(state):
    "torchvision's names of ShuffleNetV2 as its authors have them: blocks of all stages in one row"
    starts,parts = dict(stage2=0, stage3=4, stage4=12),dict(branch1='branch_proj', branch2='branch_main', conv1='first_conv', conv5='conv_last')
    split = {k:k.split('.') for k in state}
    return {'.'.join(['features', str(starts[p[0]]+int(p[1])), parts[p[2]], *p[3:]] if p[0] in starts else [parts[p[0]], *p[1:]]):state[k] for k,p in split.items()}

@pytest.mark.parametrize('width', [.5,1.])
def test_pretrained_never_mixes_the_orders_of_channels(width, tmp_path):
    "A file of the authors fits their form alone, and torchvision's file its own, even where all shapes agree"
    net = seeded(shufflenetv2(width, form='fastreid'))
    torch.save({**old_shuffle(net.state_dict()), 'classifier.0.weight':torch.zeros(2, 1024)}, tmp_path/'authors.pth')
    torch.save(getattr(torchvision.models, f'shufflenet_v2_x{width}'.replace('.', '_'))().state_dict(), tmp_path/'tv.pth')
    read,x = shufflenetv2(width, form='fastreid', pretrained=tmp_path/'authors.pth').eval(),torch.rand(1, 3, 64, 32)
    with torch.no_grad(): assert torch.equal(read(x), net(x))
    with pytest.raises(ValueError, match='does not fit'): shufflenetv2(width, pretrained=tmp_path/'authors.pth')
    with pytest.raises(ValueError, match='order of channels'): shufflenetv2(width, form='fastreid', pretrained=tmp_path/'tv.pth')

def test_pretrained_efficientnet_of_pycls(tmp_path):
    torch.save(from_shapes(pycls_effnet_shapes(**b0)), tmp_path/'b0.pyth')
    assert efficientnet(form='fastreid', pretrained=tmp_path/'b0.pyth').features[6][0].block[2].fc1.bias.abs().sum()>0
    with pytest.raises(ValueError, match='does not fit'): efficientnet(pretrained=tmp_path/'b0.pyth')

def test_pretrained_v3_leaves_only_the_last_convolution_untrained(tmp_path):
    theirs = seeded(torchvision.models.mobilenet_v3_small())
    torch.save(theirs.state_dict(), tmp_path/'v3.pth')
    net = mobilenetv3('small', form='fastreid', pretrained=tmp_path/'v3.pth')
    same = {k:torch.equal(v, theirs.state_dict()[k]) for k,v in net.state_dict().items() if not k.startswith('conv.')}
    assert all(same.values()) and len(same)==len(net.state_dict())-6

@pytest.mark.parametrize('make,url', [(mobilenetv2,'mobilenet_v2-'), (lambda **k: mobilenetv3('small', **k),'mobilenet_v3_small-'),
    (lambda **k: shufflenetv2(1.5, **k),'shufflenetv2_x1_5-'), (lambda **k: efficientnet('b1', **k),'efficientnet_b1_')])
def test_pretrained_addresses(make, url, monkeypatch):
    asked = []
    def stop(u):
        asked.append(u)
        raise FileNotFoundError(u)
    monkeypatch.setattr('fastreid_nb.backbone.weights.download_weights', stop)
    with pytest.raises(FileNotFoundError): make(pretrained=True)
    assert asked[0].startswith(f'https://download.pytorch.org/models/{url}')

@pytest.mark.parametrize('make,match', [(lambda: mobilenetv2(.7), 'width=0.7'), (lambda: mobilenetv2('1.0'), "width='1.0'"),
    (lambda: mobilenetv2(last_stride=4), 'last_stride=4'), (lambda: mobilenetv3('medium'), "variant='medium'"), (lambda: mobilenetv3(form='x'), "form='x'"),
    (lambda: shufflenetv2(3.), 'width=3.0'), (lambda: shufflenetv2(form='x'), "form='x'"), (lambda: efficientnet('b9'), "variant='b9'"),
    (lambda: efficientnet(drop=1.), 'drop=1.0'), (lambda: efficientnet(drop=-.1), 'drop=-0.1'), (lambda: efficientnet(form='x'), "form='x'"),
    (lambda: mobilenetv2(.5, pretrained=True), 'width=0.5'), (lambda: shufflenetv2(form='fastreid', pretrained=True), "form='fastreid'"),
    (lambda: efficientnet(form='fastreid', pretrained=True), "form='fastreid'")])
def test_bad_arguments(make, match):
    with torch.device('meta'), pytest.raises(ValueError, match=match): make()

def test_wrong_file_loads_nothing(tmp_path):
    torch.save(mobilenetv2(.1).state_dict(), tmp_path/'small.pth')
    with pytest.raises(ValueError, match='does not fit'): mobilenetv2(.25, pretrained=tmp_path/'small.pth')
    with pytest.raises(FileNotFoundError, match='nowhere'): mobilenetv2(.25, pretrained=tmp_path/'nowhere.pth')

def test_gradients_reach_every_weight():
    "No surgery cuts a branch off"
    x = torch.randn(2, 3, 64, 32)
    for net in (mobilenetv3('small', 1, 'fastreid'), shufflenetv2(.5, 1, 'fastreid'), mobilenetv2(.1, 1)):
        net(x).square().mean().backward()
        assert [k for k,p in net.named_parameters() if p.grad is None]==[] and isinstance(net, MobileTrunk)
