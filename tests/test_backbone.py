"Backbones: shapes, surgery, weight files, and whole models against the reference implementation"
import inspect, json, zlib
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np, pytest, torch, torchvision

from fastreid_nb import backbone as bb
from fastreid_nb.backbone import IBN, ResNet, resnet, resnet18, resnet18_ibn, weights_url
from fastreid_nb.heads import reid_model
from fastreid_nb.pooling import AvgPool, GeM
from golden_files import close, golden_dir, golden_params, missing

renamed = {'heads.bottleneck.0.':'head.neck.', 'heads.weight':'head.classifier.weight', 'heads.pool_layer.':'pool.'}

def golden_array(name, shape):
    "The value that the state entry `name` has in the golden models: drawn from a generator seeded by the name"
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith('num_batches_tracked'): return torch.zeros(shape, dtype=torch.long)
    if name.endswith('pool_layer.p'): res = np.full(shape, 3.)
    elif name.endswith('running_mean'): res = 0.1*rng.standard_normal(shape)
    elif name.endswith('running_var'): res = rng.uniform(0.5, 1.5, shape)
    elif len(shape)>=2: res = rng.standard_normal(shape)*np.sqrt(2/np.prod(shape[1:]))
    elif name.endswith('weight'): res = rng.uniform(0.5, 1.0, shape)*(0.005 if '.W.1.' in name else 1)
    else: res = 0.1*rng.standard_normal(shape)
    return torch.tensor(np.asarray(res, dtype=np.float32))

def our_name(name):
    for a,b in renamed.items(): name = name.replace(a, b)
    return name

def golden_model(keys, last_stride):
    "Our untrained model with exactly the state entries `keys` (name → shape), None if it is not built yet"
    want = {our_name(k):tuple(v) for k,v in keys.items()}
    make = partial(reid_model, keys['heads.weight'][0] if 'heads.weight' in keys else 1, pool=GeM if 'pool.p' in want else AvgPool)
    for depth,ibn in product((18,34,50,101,152), (False,True)):
        net = partial(resnet, depth, ibn=ibn, last_stride=last_stride, stem_pool='ceil')
        with torch.device('meta'): have = {k:tuple(v.shape) for k,v in make(net).state_dict().items()}
        if have==want: return make(net)

@pytest.mark.parametrize('path', golden_params('models/*.keys.json'))
def test_golden_model(path):
    if path is None: missing('models/*.keys.json')
    keys,name = json.loads(path.read_text()),path.name.removesuffix('.keys.json')
    gold = path.with_name(f'{name}.npz')
    if not gold.exists(): missing(gold.name)
    z = np.load(gold)
    model = golden_model(keys, last_stride=1 if len(z['backbone_map_shape'])==4 and z['backbone_map_shape'][2]>=16 else 2)
    if model is None: missing(f'model {name}')
    model.load_state_dict({our_name(k):golden_array(k, s) for k,s in keys.items()})
    x = torch.tensor(np.load(golden_dir()/'models/input.npz')['images_uint8_nchw'])/255
    with torch.no_grad():
        model.eval()
        fmap,emb = model.fmap(x),model(x)
    assert list(fmap.shape)==z['backbone_map_shape'].tolist()
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'], rel=1e-4)
    close(fmap.flatten()[::61], z['backbone_map_every61'], rel=1e-4)
    close(fmap.abs().mean(), z['backbone_map_abs_mean'], rel=1e-4)
    close(emb, z['feature_f64'], rel=1e-4)

def test_golden_model_needs_the_stem():
    "The padded stem is another network: the parity test would see it"
    x = torch.randn(1, 64, 16, 8)
    assert not torch.allclose(resnet18(stem_pool='pad').maxpool(x), resnet18(stem_pool='ceil').maxpool(x))

@pytest.mark.parametrize('depth,ibn', [(18,False), (18,True), (34,False), (50,False), (50,True)])
@pytest.mark.parametrize('last_stride', [1,2])
@pytest.mark.parametrize('stem_pool', ['pad','ceil'])
def test_shapes(depth, ibn, last_stride, stem_pool):
    with torch.device('meta'):
        net = resnet(depth, last_stride, ibn, stem_pool).eval()
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
    with torch.no_grad(): torch.testing.assert_close(theirs.fc(AvgPool()(ours(x))), theirs(x))

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
    with pytest.raises(ValueError, match='not a readable'): resnet18(pretrained=tmp_path/'evil.pth')
    assert not mark.exists()

def test_pretrained_offline_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs): raise OSError('no route to host')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(FileNotFoundError) as e: resnet18(pretrained=True)
    for part in ('no route to host', 'resnet18-f37072fd.pth', str(tmp_path), 'pretrained=False'): assert part in str(e.value)

@pytest.mark.parametrize('what,match', [('depth', 'does not fit'), ('ibn', 'plain'), ('short', 'does not fit'), ('grey', 'does not fit'), ('text', 'not a readable'),
    ('empty', 'not a readable'), ('cut', 'not a readable'), ('checkpoint', 'plain dictionary')])
def test_wrong_weight_files(r18_file, what, match):
    state = torch.load(r18_file, weights_only=True)
    if what=='short': torch.save({k:v for k,v in state.items() if 'layer4.1' not in k}, r18_file)
    if what=='grey': torch.save(dict(state, **{'conv1.weight':state['conv1.weight'][:,:1]}), r18_file)
    if what=='text': r18_file.write_text('hello')
    if what=='empty': r18_file.write_bytes(b'')
    if what=='cut': r18_file.write_bytes(r18_file.read_bytes()[:100_000])
    if what=='checkpoint': torch.save(dict(model=state, epoch=3), r18_file)
    with pytest.raises(ValueError, match=match): resnet(34 if what=='depth' else 18, ibn=what=='ibn', pretrained=r18_file)

def test_ibn_weights_need_an_ibn_network(tmp_path):
    f = tmp_path/'ibn.pth'
    torch.save(resnet18_ibn().state_dict(), f)
    assert resnet18_ibn(pretrained=f)
    with pytest.raises(ValueError, match='an IBN ResNet'): resnet18(pretrained=f)

def test_missing_weight_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): resnet18(pretrained=tmp_path/'nowhere.pth')

@pytest.mark.parametrize('kw,match', [(dict(depth=20), r'depth=20.*18, 34, 50, 101, 152'), (dict(last_stride=3), 'last_stride=3'),
    (dict(stem_pool='same'), "stem_pool='same'"), (dict(depth='50'), 'depth')])
def test_bad_arguments(kw, match):
    with pytest.raises(ValueError, match=match): resnet(**kw)

@pytest.mark.parametrize('name', [f'resnet{d}' for d in (18,34,50,101,152)] + [f'resnet{d}_ibn' for d in (18,34,50,101)])
def test_short_names(name):
    fn = getattr(bb, name)
    with torch.device('meta'): net = fn(last_stride=2, stem_pool='ceil')
    assert isinstance(net, ResNet) and net.total_stride==32 and net.maxpool.ceil_mode
    assert any(isinstance(m, IBN) for m in net.modules())==name.endswith('_ibn')
    want = set(inspect.signature(resnet).parameters)-{'depth'}-({'ibn'} if name.endswith('_ibn') else set())
    assert set(inspect.signature(fn).parameters)==want
    with pytest.raises(TypeError): fn(last_strid=1)
