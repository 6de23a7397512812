"Backbones: shapes, surgery, weight files, and whole models against the reference implementation"
import inspect
from functools import partial
from pathlib import Path

import numpy as np, pytest, torch, torchvision

from fastreid_nb.backbone import resnet as bb
from fastreid_nb.backbone.core import IBN, SE, NonLocal
from fastreid_nb.backbone.resnet import (ReIDBasicBlock, ReIDBottleneck, ReIDResNet, add_nonlocal, as_ours, detect_resnet, resnet, resnet18, resnet18_ibn,
    resnet50, resnext50, weights_url)
from fastreid_nb.pooling.core import GlobalAvgPool
from golden_files import close, golden_files, missing
from tiny_models import thin_resnets

def golden_block(name, z):
    "Our block with the weights of one entry of blocks.npz; None if it is built elsewhere"
    state = {k.removeprefix(f'{name}.'):torch.tensor(z[k]) for k in z.files if k.startswith(f'{name}.')}
    make = dict(ibn=lambda: IBN(64), ibn2=lambda: IBN(64), se=lambda: SE(64), nonlocal_=lambda: NonLocal(64),
        basic_ibn_se=lambda: hooked(ReIDBasicBlock(64, 64)), bottleneck_ibn_se=lambda: hooked(ReIDBottleneck(64, 16)))
    block = make.get('nonlocal_' if name=='nonlocal' else name, lambda: None)()
    if block is not None: block.load_state_dict(state)
    return block

def hooked(block):
    block.bn1,block.se = IBN(block.bn1.num_features),SE(64)
    return block

def blocks():
    "Every (file, block) of the golden files that is of this room"
    res = [pytest.param(p, k.removesuffix('__eval'), id=k) for p in golden_files('blocks*.npz') for k in np.load(p).files
           if k.endswith('__eval') and golden_block(k.removesuffix('__eval'), np.load(p)) is not None]
    return res or [pytest.param(None, None, id='none')]

@pytest.mark.parametrize('path,name', blocks())
def test_golden_block(path, name):
    if path is None: missing('blocks*.npz')
    z = np.load(path)
    block,x = golden_block(name, z),torch.tensor(z['x'], requires_grad=True)
    with torch.no_grad(): close(block.eval()(x), z[f'{name}__eval'])
    y = block.train()(x)
    close(y, z[f'{name}__train'])
    (torch.tensor(np.random.RandomState(602).randn(*y.shape), dtype=torch.float32)*y).sum().backward()
    close(x.grad, z[f'{name}__train_grad_x'])
    after = {k.removeprefix(f'{name}__after_train.'):z[k] for k in z.files if k.startswith(f'{name}__after_train.')}
    for k,v in after.items(): close(block.state_dict()[k], v)

def test_golden_model_needs_the_stem():
    "The padded stem is another network: the parity test would see it"
    x = torch.randn(1, 64, 16, 8)
    assert not torch.allclose(resnet18(stem_pool='pad').maxpool(x), resnet18(stem_pool='ceil').maxpool(x))

@pytest.mark.parametrize('depth,ibn', [(18,False), (18,True), (34,False), (50,False), (50,True)])
@pytest.mark.parametrize('last_stride', [1,2])
@pytest.mark.parametrize('stem_pool', ['pad','ceil'])
def test_shapes(depth, ibn, last_stride, stem_pool):
    with torch.device('meta'):
        net = resnet(depth, last_stride, ibn, stem_pool=stem_pool).eval()
        y = net(torch.zeros(2, 3, 128, 64))
    assert y.shape==(2, net.n_feat, 128//net.total_stride, 64//net.total_stride) and net.n_feat==(512 if depth<50 else 2048)

@pytest.mark.parametrize('hw', [(16,16), (37,21), (224,224), (33,100)])
def test_odd_sizes(hw):
    net = resnet18().eval()
    with torch.no_grad(): y = net(torch.zeros(1, 3, *hw))
    assert y.shape[2:]==tuple(-(-o//16) for o in hw)

@pytest.mark.parametrize('depth', [18,50])
def test_equals_torchvision(depth):
    theirs = getattr(torchvision.models, f'resnet{depth}')().eval()
    ours = resnet(depth, last_stride=2).eval()
    ours.load_state_dict({k:v for k,v in theirs.state_dict().items() if not k.startswith('fc.')})
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad(): torch.testing.assert_close(theirs.fc(GlobalAvgPool()(ours(x))), theirs(x))

@pytest.mark.parametrize('depth', [18,34,50,101,152])
def test_parameter_counts(depth):
    with torch.device('meta'): n = {ibn:sum(p.numel() for p in resnet(depth, ibn=ibn).parameters()) for ibn in (False,True)}
    want = {18:11176512, 34:21284672, 50:23508032, 101:42500160, 152:58143808}[depth]
    assert n=={False:want, True:want}

def test_ibn_only_in_the_first_three_stages():
    names = [n for n,m in resnet(50, ibn=True).named_modules() if isinstance(m, IBN)]
    assert len(names)==3+4+6 and all(n.startswith(('layer1','layer2','layer3')) and n.endswith('.bn1') for n in names)
    assert {k for k in resnet18_ibn().state_dict() if k.startswith('layer1.0.bn1')}>={'layer1.0.bn1.IN.weight', 'layer1.0.bn1.BN.running_var'}

@pytest.mark.parametrize('n', [2,5,64])
def test_ibn_halves(n):
    x,ibn = torch.randn(4, n, 6, 3)*2+1,IBN(n)
    y,half = ibn(x),n//2
    torch.testing.assert_close(y[:,:half], torch.nn.functional.instance_norm(x[:,:half]))
    torch.testing.assert_close(y[:,half:], torch.nn.functional.batch_norm(x[:,half:], None, None, training=True))

@pytest.fixture
def r18_file(tmp_path):
    f = tmp_path/'r18.pth'
    torch.save(torchvision.models.resnet18().state_dict(), f)
    return f

def test_pretrained_from_a_file(r18_file):
    net,state = resnet18(pretrained=r18_file),torch.load(r18_file, weights_only=True)
    assert all(torch.equal(v, state[k]) for k,v in net.state_dict().items()) and resnet18(pretrained=str(r18_file))

def test_pretrained_from_the_cache(r18_file, monkeypatch):
    folder = r18_file.parent/'hub/checkpoints'
    folder.mkdir(parents=True)
    r18_file.rename(folder/weights_url(18).rpartition('/')[2])
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(r18_file.parent/'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *a, **k: pytest.fail('downloaded though it was there'))
    assert resnet18(pretrained=True)

def test_pretrained_is_downloaded_once_and_checked(r18_file, monkeypatch):
    asked = []
    def download(url, dst, hash_prefix=None):
        asked.append((url, hash_prefix))
        Path(dst).write_bytes(r18_file.read_bytes())
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(r18_file.parent/'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    for _ in range(2): resnet18(pretrained=True)
    assert asked==[(weights_url(18), 'f37072fd')]

def test_a_weight_file_cannot_run_code(tmp_path):
    mark = tmp_path/'ran'
    class Evil:
        def __reduce__(self): return mark.touch, ()
    torch.save(dict(conv1=Evil()), tmp_path/'evil.pth')
    with pytest.raises(ValueError, match='would run code'): resnet18(pretrained=tmp_path/'evil.pth')
    assert not mark.exists()

def test_pretrained_offline_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(FileNotFoundError) as e: resnet18(pretrained=True)
    for part in ('no route to host', 'resnet18-f37072fd.pth', str(tmp_path), 'pretrained=False'): assert part in str(e.value)

@pytest.fixture
def thin_file(tmp_path):
    "A file of a network with few channels, where `resnet18` makes such networks"
    with thin_resnets():
        torch.save(resnet18().state_dict(), tmp_path/'thin.pth')
        yield tmp_path/'thin.pth'

@pytest.mark.parametrize('what,match', [('depth', 'does not fit'), ('ibn', 'a plain network'), ('short', 'does not fit'), ('grey', 'does not fit'), ('text', 'not a readable'),
    ('empty', 'not a readable'), ('cut', 'not a readable'), ('checkpoint', 'plain dictionary'), ('nan', 'NaN')])
def test_wrong_weight_files(thin_file, what, match):
    state = torch.load(thin_file, weights_only=True)
    if what=='short': torch.save({k:v for k,v in state.items() if 'layer4.1' not in k}, thin_file)
    if what=='grey': torch.save(dict(state, **{'conv1.weight':state['conv1.weight'][:,:1]}), thin_file)
    if what=='text': thin_file.write_text('hello')
    if what=='empty': thin_file.write_bytes(b'')
    if what=='cut': thin_file.write_bytes(thin_file.read_bytes()[:100_000])
    if what=='nan': torch.save(dict(state, **{'layer2.0.conv1.weight':state['layer2.0.conv1.weight']*torch.nan}), thin_file)
    if what=='checkpoint': torch.save(dict(weights=list(state.values()), epoch=3), thin_file)
    with pytest.raises(ValueError, match=match): resnet(34 if what=='depth' else 18, ibn=what=='ibn', pretrained=thin_file)

def test_ibn_weights_need_an_ibn_network(tmp_path):
    f = tmp_path/'ibn.pth'
    torch.save(resnet18_ibn().state_dict(), f)
    assert resnet18_ibn(pretrained=f)
    with pytest.raises(ValueError, match='an IBN network'): resnet18(pretrained=f)

def test_missing_weight_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): resnet18(pretrained=tmp_path/'nowhere.pth')

@pytest.mark.parametrize('kw,match', [(dict(variant=20), r'variant=20.*18, 34, 50, 101, 152'), (dict(last_stride=3), 'last_stride=3'),
    (dict(stem_pool='same'), "stem_pool='same'"), (dict(variant='50'), 'variant')])
def test_bad_arguments(kw, match):
    with pytest.raises(ValueError, match=match): resnet(**kw)

@pytest.mark.parametrize('name', [f'resnet{d}' for d in (18,34,50,101,152)] + [f'resnet{d}_ibn' for d in (18,34,50,101)])
def test_short_names(name):
    fn = getattr(bb, name)
    with torch.device('meta'): net = fn(last_stride=2, stem_pool='ceil')
    assert isinstance(net, ReIDResNet) and net.total_stride==32 and net.maxpool.ceil_mode
    assert any(isinstance(m, IBN) for m in net.modules())==name.endswith('_ibn')
    want = set(inspect.signature(resnet).parameters)-{'variant'}-({'ibn'} if name.endswith('_ibn') else set())
    assert set(inspect.signature(fn).parameters)==want
    with pytest.raises(TypeError): fn(last_strid=1)

@pytest.mark.parametrize('kw', [dict(variant=18), dict(variant=34, ibn='a', se=True), dict(variant=50, ibn='b'), dict(variant=50, nl=True, nl_width='one'),
    dict(variant=101, ibn='a', nl=True, nl_width='half'),
    dict(variant=152, se=True), dict(variant=50, groups=32, base_width=4, ibn='a4'), dict(variant=101, groups=32, base_width=4)])
def test_detect(kw):
    with torch.device('meta'):
        net = resnet(**kw)
        make,state = detect_resnet(net.state_dict())
        twin = make()
    assert make.args==(kw.pop('variant'),) and make.keywords==kw
    assert {k:v.shape for k,v in twin.state_dict().items()}=={k:v.shape for k,v in state.items()}

def test_detect_leaves_others_alone():
    with torch.device('meta'): others = [torchvision.models.mobilenet_v2(), torchvision.models.densenet121(), torch.nn.Linear(3, 4)]
    assert [detect_resnet(o.state_dict()) for o in others]==[None]*3
    with torch.device('meta'): state = resnet18().state_dict()
    assert detect_resnet({k:v for k,v in state.items() if not k.startswith('layer3.1')}) is None

@pytest.mark.parametrize('width', ['one','half'])
def test_nonlocal_is_the_sum_over_pairs(width):
    block,x = NonLocal(8, width).eval(),torch.randn(2, 8, 5, 3)
    torch.nn.init.normal_(block.W[1].weight)
    theta,phi,g = (o(x).flatten(2) for o in (block.theta, block.phi, block.g))
    y = torch.einsum('bdi,bdj,bcj->bci', theta, phi, g)/15
    torch.testing.assert_close(block(x), x+block.W(y.view(2, -1, 5, 3)))

def test_nonlocal_comes_after_the_last_blocks():
    net,seen = resnet(50, nl=True).eval(),[]
    for name,m in net.named_modules():
        if isinstance(m, (NonLocal,ReIDBottleneck)): m.register_forward_hook(lambda *_, n=name: seen.append(n))
    with torch.no_grad(): net(torch.rand(1, 3, 32, 32))
    at = [seen[i-1] for i,n in enumerate(seen) if n.startswith('NL')]
    assert at==['layer2.2','layer2.3','layer3.3','layer3.4','layer3.5'] and len(seen)==16+5

@pytest.mark.parametrize('counts', [{2:0}, {3:7}])
def test_nonlocal_needs_blocks(counts):
    with torch.device('meta'), pytest.raises(ValueError, match='non-local blocks in stage'): add_nonlocal(resnet(50), counts)

def test_se_gates():
    x = torch.randn(3, 16, 4, 2)
    y = SE(16, 4)(x)
    gate = (y/x).flatten(2)
    torch.testing.assert_close(gate, gate[:,:,:1].expand_as(gate))
    assert ((gate>0) & (gate<1)).all()
    with pytest.raises(ValueError, match='8 channels'): SE(8)

def test_ibn_b_normalises_the_first_two_stages():
    net = resnet(50, ibn='b')
    names = [n for n,m in net.named_modules() if isinstance(m, torch.nn.InstanceNorm2d)]
    assert names==['bn1','layer1.2.IN','layer2.3.IN'] and not any(isinstance(m, IBN) for m in net.modules())

def test_pretrained_fills_a_network_with_nonlocal_blocks(thin_file):
    plain,asking = (resnet18(nl=o, pretrained=thin_file).eval() for o in (False,True))
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(plain(x), asking(x))

def test_resnext_equals_torchvision():
    theirs,ours = torchvision.models.resnext50_32x4d().eval(),resnext50(last_stride=2).eval()
    ours.load_state_dict({k:v for k,v in theirs.state_dict().items() if not k.startswith('fc.')})
    x = torch.rand(1, 3, 64, 32)
    with torch.no_grad(): torch.testing.assert_close(theirs.fc(GlobalAvgPool()(ours(x))), theirs(x))

@pytest.mark.parametrize('kw,end', [(dict(variant=50, groups=32), 'resnext50_32x4d-7cdf4587.pth'), (dict(variant=101, ibn='a', se=True), 'se_resnet101_ibn_a-fabed4e2.pth'),
    (dict(variant=50, ibn='b'), 'resnet50_ibn_b-9ca61e85.pth'), (dict(variant=101, groups=32, ibn=True), 'resnext101_ibn_a-6ace051d.pth')])
def test_weight_addresses(kw, end): assert weights_url(**kw).endswith('/'+end)

@pytest.mark.parametrize('kw', [dict(variant=50, se=True), dict(variant=101, groups=32), dict(variant=152, ibn=True)])
def test_no_weights_are_made_up(kw):
    with pytest.raises(ValueError, match='no ImageNet weights are published'): weights_url(**kw)

## Memory layout

def plain_ibn(m, x): return torch.cat([m.IN(x[:,:m.half]), m.BN(x[:,m.half:])], 1)

def numbers(m, fn, x):
    "The result, the gradients of input and weights, and the statistics"
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = fn(x)
    (y*torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum().backward()
    return [y, x.grad, *(p.grad for p in m.parameters()), *(b.float() for b in m.buffers())]

@pytest.mark.parametrize('last', [False,True])
@pytest.mark.parametrize('train', [False,True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_ibn_keeps_the_layout(last, train, dtype):
    "The layout that comes in goes out (but in float32 training on a CPU), with the numbers of both halves to the last bit"
    layout = torch.channels_last if last else torch.contiguous_format
    torch.manual_seed(0)
    ours,theirs = IBN(8).train(train),IBN(8).train(train)
    x = torch.randn(4, 8, 6, 5).to(dtype).contiguous(memory_format=layout)
    for a,b in zip(numbers(ours, ours, x), numbers(theirs, partial(plain_ibn, theirs), x)): assert torch.equal(a, b)
    assert ours(x).is_contiguous(memory_format=layout) or last and train and dtype==torch.float32

def test_a_network_keeps_the_layout():
    "No map between two blocks of an IBN network is channels first"
    net,seen = resnet18_ibn().eval().to(memory_format=torch.channels_last),[]
    for m in net.modules():
        if isinstance(m, (IBN,ReIDBasicBlock)): m.register_forward_hook(lambda m, args, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
    with torch.no_grad(): net(torch.rand(2, 3, 64, 32).to(memory_format=torch.channels_last))
    assert len(seen)==6+8 and all(seen)

@pytest.mark.parametrize('train', [pytest.param(False, marks=pytest.mark.slow),True])
def test_one_graph(train):
    "torch.compile takes the network whole"
    torch._dynamo.reset()
    res = torch._dynamo.explain(resnet18_ibn(se=True).train(train))(torch.rand(2, 3, 64, 32))
    assert (res.graph_count, res.graph_break_count)==(1,0), [str(o.reason) for o in res.break_reasons]

## torchvision's functions

tv = torchvision.models

@pytest.mark.parametrize('name', ['resnet18','resnet34','resnet50','resnet101','resnet152'])
def test_torchvisions_functions_are_ours(name):
    theirs,ours = getattr(tv, name),getattr(bb, name)
    assert as_ours(theirs) is ours and as_ours(partial(theirs, weights=None, progress=False)) is ours
    assert as_ours(ours) is ours and as_ours(partial(ours, last_stride=2)).keywords==dict(last_stride=2)

v1,v2 = tv.ResNet50_Weights.IMAGENET1K_V1,tv.ResNet50_Weights.IMAGENET1K_V2

@pytest.mark.parametrize('kw,want', [(dict(weights='IMAGENET1K_V1'), True), (dict(weights=v1), True), (dict(pretrained=True), True), (dict(weights='ResNet50_Weights.IMAGENET1K_V1'), True),
    (dict(weights=v2), v2.url), (dict(weights='DEFAULT'), v2.url), (dict(pretrained='a.pth'), 'a.pth')])
def test_torchvisions_weights_are_asked_for(kw, want):
    got = as_ours(partial(tv.resnet50, **kw))
    assert (got.func, got.args, got.keywords)==(resnet50, (), dict(pretrained=want))

def test_torchvisions_function_builds_ours():
    with torch.device('meta'): net = as_ours(partial(tv.resnet50, last_stride=2, ibn='a'))()
    assert isinstance(net, ReIDResNet) and net.total_stride==32 and isinstance(net.layer1[0].bn1, IBN)

@pytest.mark.parametrize('other', [tv.densenet121, tv.wide_resnet50_2, partial(tv.vgg11, weights=None), 'timm/resnet18', None, 3, torch.nn.Identity()])
def test_others_are_left_alone(other): assert as_ours(other) is other

@pytest.mark.parametrize('kw,match', [(dict(num_classes=7), 'no option num_classes'), (dict(weights='IMAGENET'), 'IMAGENET1K_V1'), (dict(weights=tv.ResNet50_Weights.DEFAULT, norm_layer=1), 'norm_layer')])
def test_torchvisions_options_are_refused_by_name(kw, match):
    with pytest.raises(ValueError, match=match): as_ours(partial(tv.resnet50, **kw))
