"OSNet: parity with the reference implementation and with torchreid's order of operations, files, shapes, receptive fields"
import re
from functools import partial
from itertools import product

import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn

from fastreid_nb.backbone.resnet import resnet18, resnet50
from fastreid_nb.backbone.weights import fill_network, weights_by_hand
from fastreid_nb.heads.rebuild import model_from_recipe
from fastreid_nb.heads.model import reid_model
from fastreid_nb.weights.load import load_pretrained
from fastreid_nb.backbone.osnet import OSGate, LiteConv, OSBlock, detect_osnet, osnet, osnet_page
from golden_files import close, golden_params, missing
from golden_models import golden_input, golden_state

widths = {'x1_0':512, 'x0_75':384, 'x0_5':256, 'x0_25':128}
kinds = ('plain','ibn','ain')

def shake(net, seed=0):
    "Give every entry of `net` numbers that training could have given it"
    gen = torch.Generator().manual_seed(seed)
    for k,v in net.state_dict().items():
        if k.endswith('running_var'): v.copy_(torch.rand(v.shape, generator=gen)+0.5)
        elif v.ndim>1: v.copy_(torch.randn(v.shape, generator=gen)*(2/v[0].numel())**0.5)
        elif v.ndim: v.copy_(torch.rand(v.shape, generator=gen)-(0.5 if k.endswith(('bias','mean')) else -0.5))
    return net.eval()

@pytest.mark.parametrize('path', golden_params('models/OSNet*.keys.json'))
def test_golden_model(path):
    if path is None: missing('models/OSNet*.keys.json')
    z = np.load(path.with_name(path.name.replace('.keys.json', '.npz')))
    state = {k.removeprefix('backbone.'):v for k,v in golden_state(path).items() if k.startswith('backbone.')}
    make,state = detect_osnet(state)
    net = make().eval()
    fill_network(net, state)
    mean,std = (torch.tensor(o).view(1, 3, 1, 1) for o in ((0.485,0.456,0.406), (0.229,0.224,0.225)))
    with torch.no_grad(): fmap = net((golden_input()-mean)/std)
    assert list(fmap.shape)==z['backbone_map_shape'].tolist() and make.keywords==dict(variant='plain', width=path.name.split('.')[0][6:])
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'], rel=1e-4)
    close(fmap.flatten()[::61], z['backbone_map_every61'], rel=1e-4)

def torchreid_name(k, kind):
    "The name that torchreid gives to our entry `k`"
    if kind!='ain': return k
    k = re.sub(r'^conv([23])\.2\.0\.', r'pool\1.0.', k)
    k = re.sub(r'\.conv2a\.', '.conv2.0.layers.0.', k)
    return re.sub(r'\.conv2([bcd])\.', lambda m: f'.conv2.{"abcd".index(m[1])}.layers.', k)

class Torchreid:
    "torchreid's networks from a dictionary with torchreid's names, without classes"
    def __init__(self, state): self.s = state
    def norm(self, p, x):
        w,b = self.s[f'{p}.weight'],self.s[f'{p}.bias']
        if f'{p}.running_mean' in self.s: return F.batch_norm(x, self.s[f'{p}.running_mean'], self.s[f'{p}.running_var'], w, b)
        return F.instance_norm(x, weight=w, bias=b)

    def conv(self, p, x, **kw):
        x = F.conv2d(x, self.s[f'{p}.conv.weight'], **kw)
        return self.norm(f'{p}.bn', x) if f'{p}.bn.weight' in self.s else x

    def lite(self, p, x):
        x = F.conv2d(x, self.s[f'{p}.conv1.weight'])
        return self.norm(f'{p}.bn', F.conv2d(x, self.s[f'{p}.conv2.weight'], padding=1, groups=x.shape[1])).relu()

    def gated(self, p, x):
        g = F.conv2d(x.mean((2,3), keepdim=True), self.s[f'{p}.fc1.weight'], self.s[f'{p}.fc1.bias']).relu()
        return F.conv2d(g, self.s[f'{p}.fc2.weight'], self.s[f'{p}.fc2.bias']).sigmoid()*x

    def layers(self, p, t):
        if f'{p}.conv2.0.layers.0.bn.weight' in self.s: return [f'{p}.conv2.{t}.layers.{i}' for i in range(t+1)]
        return [f'{p}.conv2a'] if t==0 else [f'{p}.conv2{"abcd"[t]}.{i}' for i in range(t+1)]

    def block(self, p, x):
        mid,total = self.conv(f'{p}.conv1', x).relu(),0
        for t in range(4):
            y = mid
            for q in self.layers(p, t): y = self.lite(q, y)
            total = total+self.gated(f'{p}.gate', y)
        y = self.conv(f'{p}.conv3', total)
        inside = f'{p}.conv3.bn.weight' not in self.s
        if inside: y = self.norm(f'{p}.IN', y)
        y = y+(self.conv(f'{p}.downsample', x) if f'{p}.downsample.conv.weight' in self.s else x)
        return (self.norm(f'{p}.IN', y) if f'{p}.IN.weight' in self.s and not inside else y).relu()

    def __call__(self, x):
        x = F.max_pool2d(self.conv('conv1', x, stride=2, padding=3).relu(), 3, 2, padding=1)
        for i in (2,3,4):
            for j in (0,1): x = self.block(f'conv{i}.{j}', x)
            last = f'pool{i}.0' if f'pool{i}.0.conv.weight' in self.s else f'conv{i}.2.0'
            if i<4: x = F.avg_pool2d(self.conv(last, x).relu(), 2)
        x = self.conv('conv5', x).relu()
        return F.linear(x.mean((2,3)), self.s['fc.0.weight'], self.s['fc.0.bias'])

    def feature(self, x): return self.norm('fc.1', self(x)).relu()

def torchreid_fc(n_feat): return nn.Sequential(nn.Linear(n_feat, 512), nn.BatchNorm1d(512), nn.ReLU())

def torchreid_file(width, kind, prefix=''):
    "A dictionary with all of a torchreid file's names"
    net,fc = shake(osnet(kind, width)),shake(torchreid_fc(widths[width]))
    state = {torchreid_name(k, kind):v for k,v in net.state_dict().items()} | {f'fc.{k}':v for k,v in fc.state_dict().items()}
    return {f'{prefix}{k}':v for k,v in (state|{'classifier.weight':torch.zeros(7, 512), 'classifier.bias':torch.zeros(7)}).items()}

@pytest.mark.parametrize('kind', kinds)
def test_torchreid_feature(kind):
    "A whole torchreid file through backbone, mean and `fc`, against torchreid's operations one by one"
    file = torchreid_file('x0_25', kind)
    make,state = detect_osnet(file)
    net,fc = make().eval(),torchreid_fc(128).eval()
    assert make.keywords==dict(variant=kind, width='x0_25') and {o.split('.')[0] for o in fill_network(net, state)}=={'fc','classifier'}
    fill_network(fc, {k[3:]:v for k,v in state.items() if k.startswith('fc.')})
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad(): close(fc(net(x).mean((2,3))), Torchreid(file).feature(x), rel=1e-5)

@pytest.mark.parametrize('kind', kinds)
def test_torchreid_model(kind, tmp_path):
    "`load_pretrained` makes torchreid's embedding of torchreid's file"
    file,x = torchreid_file('x0_25', kind, 'module.'),torch.rand(2, 3, 64, 32)
    torch.save(dict(state_dict=file, epoch=3), tmp_path/'o.pth')
    model = load_pretrained(tmp_path/'o.pth', verbose=False)
    plain = {k.removeprefix('module.'):v for k,v in file.items()}
    with torch.no_grad(): close(model(x), Torchreid(plain).feature((x-model.mean)/model.std), rel=1e-5)
    assert model.recipe['backbone']['kw']==dict(variant=kind, width='x0_25')

@pytest.mark.parametrize('width,kind', list(product(widths, kinds)))
def test_every_file_is_recognised(width, kind):
    with torch.device('meta'): state = osnet(kind, width).state_dict()
    for file in (state, {torchreid_name(k, kind):v for k,v in state.items()}):
        make,got = detect_osnet(file | {'fc.0.weight':torch.zeros(512, 4)})
        assert make.func is osnet and make.keywords==dict(variant=kind, width=width)
        assert set(got)-set(state)=={'fc.0.weight'} and all(got[k].shape==v.shape for k,v in state.items())

def test_names_of_a_numbered_file_are_torchreids():
    file = torchreid_file('x0_25', 'ain')
    assert {'conv2.0.conv2.3.layers.3.conv2.weight', 'conv4.0.IN.weight', 'pool3.0.bn.running_mean'}<=file.keys()
    assert not any('conv2a' in k for k in file)

@pytest.mark.parametrize('state', [{}, {'conv1.weight':torch.zeros(64, 3, 7, 7)}, {'conv5.conv.weight':torch.zeros(512, 512, 1, 1)},
    {'conv5.conv.weight':torch.zeros(77, 512, 1, 1), 'conv2.0.gate.fc1.weight':torch.zeros(4, 64, 1, 1)}])
def test_not_an_osnet(state): assert detect_osnet(state) is None

def test_other_families_are_left_alone():
    with torch.device('meta'): assert detect_osnet(resnet18().state_dict()) is None and detect_osnet(resnet50().state_dict()) is None

@pytest.mark.parametrize('width,kind', [('x1_0','plain'), ('x0_75','ibn'), ('x0_5','ain'), ('x0_25','plain'), ('x0_25','ain')])
def test_shapes(width, kind):
    with torch.device('meta'):
        net = osnet(kind, width)
        y = net(torch.zeros(2, 3, 256, 128))
    assert y.shape==(2, widths[width], 16, 8)==(2, net.n_feat, 256//net.total_stride, 128//net.total_stride)

@pytest.mark.parametrize('h,w', [(16,16), (37,21), (160,64), (33,100)])
def test_odd_sizes(h, w):
    with torch.device('meta'): assert osnet(width='x0_25')(torch.zeros(2, 3, h, w)).shape[2:]==(-(-h//4)//4, -(-w//4)//4)

def test_parameter_counts():
    "The counts of the reference implementation, and with `fc` those of torchreid's model zoo"
    def n(m): return sum(p.numel() for p in m.parameters())/1e6
    with torch.device('meta'):
        counts = {w:n(osnet(width=w)) for w in widths}
        zoo = {w:round(counts[w]+n(torchreid_fc(c)), 1) for w,c in widths.items()}
    assert (round(counts['x1_0'], 2), round(counts['x0_25'], 2))==(1.91, 0.13)
    assert zoo=={'x1_0':2.2, 'x0_75':1.3, 'x0_5':0.6, 'x0_25':0.2}

@pytest.mark.parametrize('kind,norms,inside', [('plain', [], False), ('ibn', ['conv1.bn','conv2.0.IN','conv2.1.IN'], False),
    ('ain', ['conv1.bn','conv2.0.IN','conv2.1.IN','conv3.1.IN','conv4.0.IN'], True)])
def test_places_of_instance_norm(kind, norms, inside):
    with torch.device('meta'): net = osnet(kind, 'x0_5')
    assert [n for n,m in net.named_modules() if isinstance(m, nn.InstanceNorm2d)]==norms
    for n,m in net.named_modules():
        if isinstance(m, OSBlock): assert hasattr(m.conv3, 'bn')!=(inside and f'{n}.IN' in norms)

@pytest.mark.parametrize('kind', kinds)
def test_all_weights_are_trained(kind):
    torch.manual_seed(0)
    net = osnet(kind, 'x0_25').train()
    net(torch.rand(4, 3, 64, 32)).square().mean().backward()
    assert not [n for n,p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert len([n for n,p in net.named_parameters() if p.grad.abs().max()==0])<5

@pytest.mark.parametrize('t', range(4))
def test_receptive_field(t):
    "Stream 0 has one layer of size 3, and every further one a layer more"
    torch.manual_seed(0)
    x = torch.rand(1, 64, 15, 15, requires_grad=True)
    shake(OSBlock(64, 256)).streams(x)[t][0,:,7,7].sum().backward()
    seen = x.grad.abs().sum((0,1))>0
    assert (seen.any(0).sum(), seen.any(1).sum())==(2*t+3, 2*t+3)

def test_one_gate_for_all_streams():
    block = OSBlock(16, 64)
    assert [n for n,m in block.named_modules() if isinstance(m, OSGate)]==['gate'] and block.gate.fc1.weight.shape==(1, 16, 1, 1)

def test_weights_of_a_lite_conv(): assert sum(p.numel() for p in LiteConv(64).parameters())==64*64 + 9*64 + 2*64

@pytest.fixture
def ain_file(tmp_path):
    f = tmp_path/'checkpoints/osnet_ain_x0_25_imagenet.pth'
    f.parent.mkdir()
    torch.save(torchreid_file('x0_25', 'ain', 'module.'), f)
    return f

def test_pretrained(ain_file, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(ain_file.parent.parent))
    want = shake(osnet('ain', 'x0_25')).state_dict()
    for src in (ain_file, str(ain_file), True):
        net = osnet('ain', 'x0_25', pretrained=src)
        assert all(torch.equal(v, want[k]) for k,v in net.state_dict().items())

@pytest.mark.parametrize('width,kind,name', [('x1_0','plain','osnet_x1_0_imagenet.pth'), ('x1_0','ibn','osnet_ibn_x1_0_imagenet.pth'),
    ('x0_5','ain','osnet_ain_x0_5_imagenet.pth')])
def test_pretrained_by_hand_says_what_to_do(width, kind, name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError) as e: osnet(kind, width, pretrained=True)
    for part in (osnet_page(kind, width), str(tmp_path/'checkpoints'/name), 'pretrained=False'): assert part in str(e.value)

def test_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match='https://there'): weights_by_hand('https://there', 'a.pth')
    (tmp_path/'checkpoints').mkdir()
    (tmp_path/'checkpoints/a.pth').touch()
    assert weights_by_hand('https://there', 'a.pth')==tmp_path/'checkpoints/a.pth'

def test_pages():
    pages = [osnet_page(k, w) for w,k in product(widths, kinds) if k!='ibn' or w=='x1_0']
    assert len(set(pages))==9 and all(re.fullmatch(r'https://drive\.google\.com/file/d/[\w-]{33}/view', o) for o in pages)
    for w in list(widths)[1:]:
        with pytest.raises(ValueError, match="x1_0"): osnet_page('ibn', w)

@pytest.mark.parametrize('kw', [dict(variant='plain', width='x0_25'), dict(variant='ibn', width='x0_25'), dict(variant='ain', width='x0_5')])
def test_a_file_of_another_network(ain_file, kw):
    with pytest.raises(ValueError, match='does not fit'): osnet(**kw, pretrained=ain_file)

def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): osnet(pretrained=tmp_path/'nowhere.pth')

@pytest.mark.parametrize('fn,match', [(partial(osnet, width='x2_0'), "width='x2_0'.*x0_75"), (partial(osnet, variant='in'), "variant='in'.*ain"), (partial(osnet, width=1.), 'width=1.0'),
    (partial(osnet_page, variant='in'), "variant='in'"), (partial(OSBlock, 16, 64, 'before'), "norm='before'.*inside")])
def test_bad_arguments(fn, match):
    with pytest.raises(ValueError, match=match): fn()

def test_recipe():
    model = reid_model(partial(osnet, 'ain', width='x0_25'), 5)
    assert list(model_from_recipe(model.recipe).state_dict())==list(model.state_dict())
