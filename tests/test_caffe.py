"Caffe files: every family of networks gives its embeddings through OpenCV, or is refused with the name of a layer"
from functools import partial
import numpy as np, pytest, torch
from torch import nn
from fastreid_nb.backbone.mobile import efficientnet, mobilenetv2, mobilenetv3, shufflenetv2
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.backbone.regnet import regnet
from fastreid_nb.backbone.repvgg import reparameterize, repvgg
from fastreid_nb.backbone.resnest import resnest
from fastreid_nb.backbone.resnet import resnet, resnet18, resnet18_ibn, resnet34, resnet50_ibn, resnext50
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.export.caffe import export_caffe, run_caffe
from fastreid_nb.export.layers import _blob, _field, _varint
from fastreid_nb.heads.core import LinearHead, ReductionHead
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.parts import mgn
from fastreid_nb.pooling.core import AvgMaxPool, ClipAvgPool, GeM, GlobalAvgPool, GlobalMaxPool
from slow import slow_but

size = Preproc((128,64))

def shake(model, seed=0):
    "Give every normalisation numbers that training could have given it"
    gen = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if getattr(m, 'running_mean', None) is None: continue
        m.running_mean.copy_(.3*torch.randn(m.running_mean.shape, generator=gen))
        m.running_var.copy_(.5+torch.rand(m.running_var.shape, generator=gen))
        if m.weight is not None: m.weight.data.copy_(.5+torch.rand(m.weight.shape, generator=gen))
    return model.eval()

def made(net, preproc=size, **kwargs):
    torch.manual_seed(0)
    return shake(reid_model(net, 4, preproc=preproc, **kwargs))

def cosines(model, path, n=3, seed=1):
    "Cosine of the file's embeddings to the model's on images that the gate did not see"
    px = torch.randint(256, (n, 3, *model.preproc.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(): want = model(px/255)
    return torch.cosine_similarity(torch.tensor(run_caffe(path, px)), want)

class Plain(nn.Sequential):
    "A network that is exported in a tenth of a second"
    n_feat = 8
    def __init__(self): super().__init__(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1))

class Turned(Plain):
    "The same, on its side: Caffe has no layer for that"
    def forward(self, x): return super().forward(x).transpose(2, 3)

families = dict(resnet18=resnet18, resnet18_ibn=resnet18_ibn, ibn_b=partial(resnet, 18, ibn='b'), se=partial(resnet, 18, se=True),
    ceil=partial(resnet, 18, stem_pool='ceil'), resnet34=resnet34, resnet50_ibn=resnet50_ibn, resnext50=resnext50, osnet=osnet,
    osnet_ibn=partial(osnet, 'ibn', 'x0_5'), osnet_ain=partial(osnet, 'ain', 'x0_25'), mobilenetv2=partial(mobilenetv2, .35),
    mobilenetv3=mobilenetv3, efficientnet=efficientnet, regnet_x=partial(regnet, 'x_200mf'), regnet_y=partial(regnet, 'y_200mf'),
    repvgg=repvgg)
refused = dict(turned=(Turned,'backbone: .* transpose'), nl=(partial(resnet, 18, nl=True),'backbone.NL_2'), shufflenetv2=(partial(shufflenetv2, .5),'backbone.stage2.0'),
    resnest=(resnest,'backbone.layer1.0'))

@pytest.mark.parametrize('name', slow_but(families, 'resnet18_ibn'))
def test_family(name, tmp_path):
    model = made(families[name])
    files = export_caffe(model, tmp_path/'m')
    assert files.worst_cosine>=.9999 and cosines(model, files.prototxt).min()>=.9999

@pytest.mark.parametrize('name', slow_but(refused, 'turned'))
def test_refused(name, tmp_path):
    net,where = refused[name]
    with pytest.raises(ValueError, match=where): export_caffe(made(net), tmp_path/'m')
    assert not list(tmp_path.iterdir())

@pytest.mark.slow
@pytest.mark.parametrize('make', [lambda: mgn(resnet18, 4, preproc=size), lambda: reparameterize(made(repvgg))])
def test_other_models(make, tmp_path):
    torch.manual_seed(0)
    model = shake(make())
    assert export_caffe(model, tmp_path/'m').worst_cosine>=.9999

@pytest.mark.parametrize('hw', [(128,64), (100,52), (97,33)])
@pytest.mark.parametrize('pool', [GeM,partial(GeM, p=6.5),GlobalAvgPool,GlobalMaxPool,AvgMaxPool,ClipAvgPool])
def test_sizes_and_pools(hw, pool, tmp_path):
    model = made(Plain, Preproc(hw), pool=pool)
    assert cosines(model, export_caffe(model, tmp_path/'m').prototxt).min()>=.9999

@pytest.mark.parametrize('head', [LinearHead,partial(ReductionHead, n_emb=6, norm=True, act='leaky', bias=True)])
@pytest.mark.parametrize('test_on', ['emb','feat','logits'])
def test_heads(head, test_on, tmp_path):
    model = made(Plain, head=head, test_on=test_on)
    path = export_caffe(model, tmp_path/'m').prototxt
    with torch.no_grad(): want = model(torch.full((1,3,*size.size), .5))
    assert cosines(model, path).min()>=.9999
    assert run_caffe(path, np.full((1,3,*size.size), 127, np.uint8)).shape==want.shape

@pytest.mark.parametrize('mean,std', [((0.,0.,0.), (1.,1.,1.)), ((.5,.4,.3), (.1,.2,.3))])
def test_mean_and_std(mean, std, tmp_path):
    model = made(Plain, Preproc((64,32), mean=mean, std=std))
    assert cosines(model, export_caffe(model, tmp_path/'m').prototxt).min()>=.9999

def test_values_not_only_directions(tmp_path):
    model = made(Plain)
    px = torch.randint(256, (2,3,*size.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(): want = model(px/255)
    got = run_caffe(export_caffe(model, tmp_path/'m').prototxt, px)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

def test_model_is_left_alone(tmp_path):
    model = made(Plain).train()
    before = {k:v.clone() for k,v in model.state_dict().items()}
    export_caffe(model, tmp_path/'m')
    assert model.training and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert type(model.pool) is GeM

def test_files_are_replaced_whole(tmp_path):
    export_caffe(made(Plain), tmp_path/'m')
    before = {o.name:o.read_bytes() for o in tmp_path.iterdir()}
    with pytest.raises(ValueError): export_caffe(made(Turned), tmp_path/'m')
    assert {o.name:o.read_bytes() for o in tmp_path.iterdir()}==before and sorted(before)==['m.caffemodel','m.prototxt']

def test_mixed_files(tmp_path):
    torch.manual_seed(0)
    for o in 'ab': export_caffe(shake(reid_model(Plain, 4, preproc=size)), tmp_path/o)
    (tmp_path/'a.caffemodel').write_bytes((tmp_path/'b.caffemodel').read_bytes())
    with pytest.raises(ValueError, match='export both again'): run_caffe(tmp_path/'a', np.zeros((1,3,128,64), np.uint8))

def test_cameras_and_strangers_are_refused(tmp_path):
    model = made(Plain)
    model.backbone.n_cams = 3
    with pytest.raises(ValueError, match='cameras'): export_caffe(model, tmp_path/'m')
    with pytest.raises(ValueError, match='expected a ReIDModel'): export_caffe(nn.Linear(2, 2), tmp_path/'m')

# The encoding against a decoder written from its description

def read_number(raw, at):
    n,shift = 0,0
    while raw[at]&128: n,shift,at = n|(raw[at]&127)<<shift,shift+7,at+1
    return n|raw[at]<<shift,at+1

def read_fields(raw):
    at,found = 0,[]
    while at<len(raw):
        key,at = read_number(raw, at)
        n,at = read_number(raw, at)
        if key&7==2: found,at = [*found,(key>>3, raw[at:at+n])],at+n
        else: found.append((key>>3, n))
    return found

def test_numbers():
    rng = np.random.default_rng(0)
    for n in [0,1,127,128,16383,16384,2**31,*rng.integers(2**40, size=50).tolist()]:
        assert read_number(_varint(n), 0)==(n,len(_varint(n)))

@pytest.mark.parametrize('shape', [(1,), (300,), (2,3), (4,3,5,5)])
def test_blobs(shape):
    a = np.random.default_rng(0).standard_normal(shape)
    (k,dims),(j,data) = read_fields(_blob(a))
    at,read = 0,[]
    (_,packed), = read_fields(dims)
    while at<len(packed):
        n,at = read_number(packed, at)
        read.append(n)
    assert (k,j)==(7,5) and tuple(read)==shape
    np.testing.assert_array_equal(np.frombuffer(data, '<f4').reshape(shape), a.astype('f4'))

def test_weights_of_a_file(tmp_path):
    files = export_caffe(made(Plain), tmp_path/'m')
    layers = [dict(read_fields(v)) for k,v in read_fields(files.caffemodel.read_bytes()) if k==100]
    text = files.prototxt.read_text()
    assert len(layers)==files.n_layers and all(f'name: "{o[1].decode()}"' in text for o in layers)
    assert _field(1, b'x')==b'\x0a\x01x'
