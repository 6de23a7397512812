"An exported file computes what the model computes, or is not there; everything that is not such a file is refused"
import resource, subprocess, sys
from functools import partial
from pathlib import Path
import numpy as np, onnx, onnxruntime, pandas as pd, pytest, torch
from onnx import numpy_helper
from PIL import Image
from torch import nn
from fastreid_nb import __version__
from fastreid_nb.backbone.mobile import efficientnet, mobilenetv2, mobilenetv3, shufflenetv2
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.backbone.regnet import regnet
from fastreid_nb.backbone.repvgg import RepVGG
from fastreid_nb.backbone.resnest import resnest
from fastreid_nb.backbone.resnet import resnet18, resnet18_ibn, resnet50
from fastreid_nb.backbone.timmnets import timm_backbone
from fastreid_nb.backbone.vit import ViT
from fastreid_nb.data.images import from_pil, to_pil
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.eval.agreement import few, probe_images, same_cosine
from fastreid_nb.eval.inference import Mirrored, embed
from fastreid_nb.export import core, predictor
from fastreid_nb.export.core import Deployed, Resize, Runner, check_onnx, export_onnx, plain_copy, stage_errors, to_onnx, write_onnx
from fastreid_nb.export.folder import OnnxModel, embed_folder
from fastreid_nb.export.predictor import Predictor, onnx_meta
from fastreid_nb.heads.ensemble import Ensemble
from fastreid_nb.heads.haa import haa
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.parts import mgn, pcb
from fastreid_nb.heads.rmgl import rmgl
from fastreid_nb.heads.transreid import transreid
from fastreid_nb.pooling.core import AvgMaxPool, GeM
from fastreid_nb.recipes.cli import reid_main
from fastreid_nb.train.checkpoint import save_reid
from slow import slow_but
from tiny_models import TinyNet, thin_resnets

root = Path(__file__).parents[1]
small = Preproc((64,32))

def seeded(make):
    torch.manual_seed(0)
    return make().eval()

def thin(fn, **kw):
    with thin_resnets(): return reid_model(partial(fn, **kw), preproc=small)

def tiny(**kw): return reid_model(TinyNet, preproc=Preproc((32,16)), **kw)

def conv(n_in, n_out): return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU())

class Staged(nn.Module):
    "A stem and two layers"
    n_feat = 32
    def __init__(self):
        super().__init__()
        self.stem,self.layer1,self.layer2 = conv(3, 8),nn.Sequential(conv(8, 16)),nn.Sequential(conv(16, 32))
    def forward(self, x): return self.layer2(self.layer1(self.stem(x)))

@pytest.fixture(scope='module')
def model():
    m = seeded(tiny)
    m.threshold,m.experiment = dict(value=.3, metric='cosine'),dict(hash='0123abcd')
    return m

@pytest.fixture(scope='module')
def file(model, tmp_path_factory): return export_onnx(model, tmp_path_factory.mktemp('file')/'model.onnx')

@pytest.fixture(scope='module')
def staged(tmp_path_factory):
    "A model, its file, and what the file says about itself"
    m = seeded(lambda: reid_model(Staged, preproc=small))
    path = export_onnx(m, tmp_path_factory.mktemp('staged')/'staged.onnx')
    return m,path,onnx_meta(path)

@pytest.fixture(scope='module')
def imgs(): return np.random.default_rng(0).integers(0, 256, (5,32,16,3), dtype=np.uint8)

# ---- every family

def tiny_vit(n_cams=0, **kw):
    m = reid_model(partial(ViT, dim=24, depth=2, heads=2, img_size=(64,32), n_cams=n_cams, **kw))
    if n_cams: nn.init.normal_(m.backbone.sie_embed)
    return m

def tiny_transreid():
    m = transreid('deit_tiny', img_size=(64,32), n_cams=2)
    nn.init.normal_(m.backbone.sie_embed)
    return m

def part_model(fn, net=resnet18, size=(128,64), **kw):
    with thin_resnets(): m = fn(net, **kw)
    m.preproc = Preproc(size)
    return m

families = [
    ('ibn', lambda: thin(resnet18_ibn)), ('pcb', lambda: part_model(pcb, n_emb=16)), ('vit', lambda: tiny_vit(3)),
    ('resnet', lambda: thin(resnet18)), ('bottleneck', lambda: reid_model(resnet50, preproc=small)),
    ('nonlocal', lambda: reid_model(partial(resnet50, nl=True), preproc=small)),
    ('resnest', lambda: reid_model(resnest, preproc=small)), ('osnet', lambda: reid_model(osnet, preproc=small)),
    ('osnet_ain', lambda: reid_model(partial(osnet, 'ain'), preproc=small)), ('mobilenetv2', lambda: reid_model(mobilenetv2, preproc=small)),
    ('mobilenetv3', lambda: reid_model(mobilenetv3, preproc=small)), ('efficientnet', lambda: reid_model(efficientnet, preproc=small)),
    ('shufflenetv2', lambda: reid_model(shufflenetv2, preproc=small)), ('regnet', lambda: reid_model(regnet, preproc=small)),
    ('repvgg', lambda: reid_model(partial(RepVGG, 'A0'), preproc=small)), ('avgmax', lambda: tiny(pool=AvgMaxPool)),
    ('learned_gem', lambda: tiny(pool=partial(GeM, p=4.3))), ('mgn', lambda: part_model(mgn, n_emb=16)), ('grid', lambda: part_model(mgn, n_emb=16, grid=True)),
    ('refined', lambda: part_model(pcb, n_emb=16, refined=True)), ('rmgl', lambda: part_model(rmgl, n_emb=16)), ('haa', lambda: part_model(haa)),
    ('transreid', tiny_transreid), ('patches', lambda: tiny_vit(tokens='patches')),
    ('timm', lambda: reid_model(partial(timm_backbone, 'resnet10t'), preproc=small)),
    ('ensemble', lambda: Ensemble([tiny(), thin(resnet18)]))]

@pytest.mark.parametrize('name,make', slow_but(families, 'ibn', 'pcb', 'vit'))
def test_every_family_makes_the_round_trip(name, make, tmp_path):
    "The gate lets the file through; every stage agrees, and batches of any size give the same"
    model = seeded(make)
    path = export_onnx(model, tmp_path/'m.onnx')
    meta,reid = onnx_meta(path),Predictor(path, threads=1)
    assert meta['gate']['worst_cosine']>.99999 and meta['gate']['mAP_change']==0
    runner = Runner(None, meta, model)
    raw = torch.randint(0, 256, (3,3,*meta['size']), dtype=torch.uint8)
    errors = stage_errors(path, plain_copy(model), raw, runner.cams(0, 3))
    assert len(errors)>=3 and min(errors.values())>.9999, errors
    x,cams = raw.permute(0,2,3,1).numpy(),runner.cams(0, 3).numpy() if 'camid' in meta['inputs'] else None
    one = [reid.run(x[i:i+1], None if cams is None else cams[i:i+1]) for i in range(3)]
    np.testing.assert_allclose(np.concatenate(one), reid.run(x, cams), atol=1e-5)

@pytest.mark.slow
def test_branches_are_folded(tmp_path):
    "A RepVGG is exported as a chain of convolutions"
    proto = to_onnx(Deployed(seeded(lambda: reid_model(partial(RepVGG, 'A0'), preproc=small)), 'NHWC', (64,32), False, None).eval(), False, 18)
    ops = [o.op_type for o in proto.graph.node]
    assert ops.count('Conv')==22 and ops.count('BatchNormalization')==1   # that of the neck

def test_a_learned_exponent_is_kept(tmp_path):
    models = [seeded(lambda: tiny(pool=partial(GeM, p=p))) for p in (1.5,6.)]
    files = [Predictor(export_onnx(m, tmp_path/f'{i}.onnx')) for i,m in enumerate(models)]
    x = np.random.default_rng(0).integers(0, 256, (2,32,16,3), dtype=np.uint8)
    for m,f in zip(models, files): np.testing.assert_allclose(f.embed(x), embed(m, list(x)), atol=1e-5)
    assert np.abs(files[0].embed(x)-files[1].embed(x)).max()>1e-3

# ---- the input

@pytest.mark.parametrize('resample', ['nearest', 'bilinear', 'bicubic', 'lanczos'])
@pytest.mark.parametrize('size', [(128,64), (300,111), (70,200), (40,20), (600,64)])
def test_two_products_are_pillows_resizing(resample, size):
    "Not more than one level of 256 off, and that in less than a hundredth of the pixels"
    px = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3,*size), dtype=np.uint8))
    wanted = from_pil(to_pil(px).resize((64,128), getattr(Image, resample.upper()))).float()
    error = (Resize(Preproc((128,64), resample), size)(px.float())-wanted).abs()
    assert error.max()<=1 and error.ne(0).float().mean()<.01

@pytest.mark.parametrize('layout,size,flip', [('NCHW', (50,40), True)])
def test_options_of_the_input(model, tmp_path, layout, size, flip):
    path = export_onnx(model, tmp_path/'m.onnx', layout=layout, input_size=size, flip=flip)
    raw = np.random.default_rng(0).integers(0, 256, (2,*size,3), dtype=np.uint8)
    got = Predictor(path).run(raw.transpose(0,3,1,2))
    wanted = embed(Mirrored(model), [Image.fromarray(o) for o in raw], model.preproc)
    assert same_cosine(torch.from_numpy(got), wanted).min()>.9999
    with pytest.raises(ValueError, match='expected 50×40, which this file resizes itself'): Predictor(path).embed(raw[0,:20])
    with pytest.raises(ValueError, match='without input_size'): OnnxModel(path)

def test_cameras_are_an_input_or_fixed(tmp_path):
    m = seeded(lambda: tiny_vit(3))
    path = export_onnx(m, tmp_path/'fixed.onnx', camera=2)
    x = np.random.default_rng(0).integers(0, 256, (2,64,32,3), dtype=np.uint8)
    with torch.no_grad(): wanted = nn.functional.normalize(m(torch.from_numpy(x).permute(0,3,1,2)/255, torch.tensor([2,2])))
    np.testing.assert_allclose(Predictor(path).embed(x), wanted, atol=1e-5)
    with pytest.raises(ValueError, match='takes no cameras'): Predictor(path).embed(x, camid=[0,0])
    with pytest.raises(ValueError, match='camera=3: expected -1 to 2'): export_onnx(m, tmp_path/'no.onnx', camera=3)
    with pytest.raises(ValueError, match='knows no cameras'): export_onnx(seeded(tiny), tmp_path/'no.onnx', camera=0)

# ---- the gate

def damaged(staged, path, change):
    "A copy of the file whose graph was changed by a function"
    _,whole,meta = staged
    proto = onnx.load(whole)
    change(proto)
    write_onnx(path, proto, meta)
    return path

def scale(name, factor, ndim=4):
    def change(proto):
        w = next(o for o in proto.graph.initializer if name in o.name and len(o.dims)==ndim)
        w.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(w)*factor).astype(np.float32), w.name))
    return change

def scale_input(kind, factor):
    "Change the constant that the first operator of a kind gets"
    def change(proto):
        name = next(o for o in proto.graph.node if o.op_type==kind).input[1]
        w = next(o for o in proto.graph.initializer if o.name==name)
        w.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(w)*factor).astype(np.float32), w.name))
    return change

@pytest.mark.parametrize('change,place', [(scale_input('Div', np.float32(2)), r'the stem|the preprocessing'), (scale('stem', -1), r'the stem \(backbone.stem'),
    (scale('layer1', -1), r'the layers \(backbone.layer1'), (scale('layer2', -1), r'the layers \(backbone.layer2'),
    (scale('head.neck', np.linspace(-1, 1, 32), 1), r'the neck \(head.neck')])
def test_the_gate_names_the_stage(staged, tmp_path, change, place):
    with pytest.raises(ValueError, match=f'does not compute what the model computes.*is in ({place})'):
        check_onnx(damaged(staged, tmp_path/'bad.onnx', change), staged[0])

def test_a_swap_of_channels_is_found(staged, tmp_path):
    "BGR in place of RGB: the weights of the first convolution are turned around"
    def swap(proto):
        w = next(o for o in proto.graph.initializer if 'stem' in o.name and len(o.dims)==4)
        w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w)[:,::-1].copy(), w.name))
    with pytest.raises(ValueError, match='the stem'): check_onnx(damaged(staged, tmp_path/'bad.onnx', swap), staged[0])

def test_no_file_is_left_by_a_wrong_export(model, tmp_path, monkeypatch):
    "An earlier file stays, and no temporary one"
    (tmp_path/'m.onnx').write_text('earlier')
    def wrong(net, with_cameras, opset):
        proto = to_onnx(net, with_cameras, opset)
        w = next(o for o in proto.graph.initializer if len(o.dims)==4)
        w.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(w), w.name))
        return proto
    monkeypatch.setattr(core, 'to_onnx', wrong)
    with pytest.raises(ValueError, match='does not compute'): export_onnx(model, tmp_path/'m.onnx')
    assert [o.name for o in tmp_path.iterdir()]==['m.onnx'] and (tmp_path/'m.onnx').read_text()=='earlier'

def test_there_is_no_way_around_the_gate(): assert not {'gate','min_cosine','check','verify'} & {*export_onnx.__code__.co_varnames[:8]}

def test_a_batch_that_is_fixed_is_found(staged, tmp_path):
    "A graph that was exported for two images fails for one or seven"
    m,_,meta = staged
    net,x = Deployed(m, 'NHWC', (64,32), False, None).eval(),torch.zeros(2, 64, 32, 3, dtype=torch.uint8)
    made = torch.onnx.export(net, (x,), dynamo=True, opset_version=18, verbose=False, input_names=['images'], output_names=['emb'])
    write_onnx(tmp_path/'two.onnx', made.model_proto, meta)
    with pytest.raises(ValueError, match='cannot run 1 images'): check_onnx(tmp_path/'two.onnx', m)

def test_the_probe_takes_what_users_have(data, tmp_path):
    q,g = few(data, 6)
    assert len(q)+len(g)<=6 or q.pid.nunique()==1
    assert {*q.pid}=={*g.pid}
    for o in (data.query.path[:2].tolist(), Image.open(data.query.path[0]), Path(data.query.path[0])): assert len([*probe_images(o)])>=52
    with pytest.raises(ValueError, match='no images'): probe_images(tmp_path)
    with pytest.raises(ValueError, match='no images'): probe_images([])

@pytest.mark.parametrize('change', [dict(layout='HWC'), dict(opset=17), dict(opset=18.), dict(input_size=(0,4)), dict(input_size=5), dict(camera=0), dict(images=[])])
def test_options_that_no_file_can_have(model, tmp_path, change):
    with pytest.raises((ValueError,TypeError)): export_onnx(model, tmp_path/'no.onnx', **change)
    assert not [*tmp_path.iterdir()]

def test_what_is_no_embedding_of_images(tmp_path):
    m = seeded(tiny)
    m.test_on = 'logits'
    with pytest.raises(ValueError, match="gives logits"): export_onnx(m, tmp_path/'m.onnx')
    grey = reid_model(TinyNet, preproc=Preproc((32,16), mean=(.5,), std=(.5,)))
    with pytest.raises(ValueError, match='1 channels: expected a model of RGB images'): export_onnx(grey, tmp_path/'m.onnx')
    with pytest.raises(ValueError, match='how are images read'): export_onnx(nn.Flatten(), tmp_path/'m.onnx')

class Decides(nn.Module):
    "Its graph depends on the numbers"
    preproc = small
    def forward(self, x): return x.mean((2,3)) if x.sum()>3 else x.amax((2,3))

def test_what_is_no_graph(tmp_path):
    with pytest.raises(ValueError, match='Decides cannot be written as a graph: '): export_onnx(Decides(), tmp_path/'m.onnx')
    assert not [*tmp_path.iterdir()]

def test_the_model_is_left_as_it_is(model, tmp_path):
    m = seeded(tiny).train()
    before = {k:v.clone() for k,v in m.state_dict().items()}
    export_onnx(m, tmp_path/'m.onnx')
    assert m.training and m.head.neck.training and all(torch.equal(before[k], v) for k,v in m.state_dict().items())

# ---- the file

def test_the_file_says_what_it_is(file):
    meta = onnx_meta(file)
    wanted = dict(format=1, version=__version__, inputs=['images'], outputs=['emb'], layout='NHWC', channels='RGB', size=[32,16], input_size=[32,16],
        resample='bicubic', width=8, normalised=True, flip=False, n_cams=0, camera=None, threshold=dict(value=.3, metric='cosine'), experiment='0123abcd',
        opset=18, precision='float32')
    assert {k:meta[k] for k in wanted}==wanted and meta['gate']['n']==51 and 'worst' not in meta['gate']
    assert predictor._newest==meta['format']

def test_the_file_tells_nothing_about_this_machine(file):
    raw = file.read_bytes()
    assert b'/site-packages/' not in raw and str(root).encode() not in raw and b'stack_trace' not in raw

def test_a_file_that_is_not_ours_or_not_whole(file, tmp_path):
    raw,meta = file.read_bytes(),onnx_meta(file)
    def put(content):
        (tmp_path/'x.onnx').write_bytes(content)
        return tmp_path/'x.onnx'
    for n in (0, 1, 100, len(raw)//2, len(raw)-1):
        with pytest.raises(ValueError, match='truncated|was changed|not written by'): Predictor(put(raw[:n]))
    for content in (b'hello', b'PK\x03\x04'+raw, raw+b'x'):
        with pytest.raises(ValueError, match='truncated|was changed'): Predictor(put(content))
    for i in np.random.default_rng(0).integers(0, len(raw), 20):
        wrong = bytearray(raw)
        wrong[i] ^= 1
        with pytest.raises(ValueError): Predictor(put(bytes(wrong)))
    proto = onnx.load(file)
    write_onnx(tmp_path/'x.onnx', proto, meta|dict(format=2, version='9.0'))
    with pytest.raises(ValueError, match='by version 9.0 of fastreid_nb.*update it'): Predictor(tmp_path/'x.onnx')
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path/'x.onnx')
    with pytest.raises(ValueError, match='was not written by fastreid_nb'): Predictor(tmp_path/'x.onnx')
    with pytest.raises(FileNotFoundError): Predictor(tmp_path/'gone.onnx')
    with pytest.raises(FileNotFoundError): Predictor(tmp_path)

def test_a_full_disk_leaves_nothing(model, tmp_path):
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000,hard))
    try:
        with pytest.raises(OSError, match='cannot write .*m.onnx.*room on the disk'): export_onnx(model, tmp_path/'m.onnx')
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft,hard))
    assert not [*tmp_path.iterdir()]

def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r'pip install "fastreid-nb\[export\]"'): export_onnx(model, tmp_path/'m.onnx')

# ---- the predictor

def test_equal_pixels_give_equal_numbers(model, file, imgs):
    np.testing.assert_allclose(Predictor(file).embed(imgs), embed(model, list(imgs)), atol=1e-4)

@pytest.mark.parametrize('ending', ['jpg', 'png', 'bmp', 'webp'])
def test_paths_give_nearly_equal_numbers(model, file, data, tmp_path, ending):
    path = tmp_path/f'x.{ending}'
    Image.open(data.query.path[0]).save(path)
    assert float(embed(model, path)[0].numpy()@Predictor(file).embed(path)[0])>.999

def test_any_form_and_any_batch(file, imgs, tmp_path):
    reid = Predictor(file, threads=1, bs=2)
    pil = [Image.fromarray(o) for o in imgs]
    pil[0].save(tmp_path/'0.png')
    wanted = reid.embed(imgs)
    for form in (list(imgs), pil, tuple(pil), [str(tmp_path/'0.png'), *pil[1:]], iter(pil), np.array(imgs), pd.Series(pil)):
        np.testing.assert_allclose(reid.embed(form), wanted, atol=1e-6)
    assert reid.embed(tmp_path/'0.png').shape==(1,8) and reid.same(pil[0], tmp_path/'0.png') is True
    assert reid.same(pil[0], pil[1]) is bool(1-wanted[0]@wanted[1]<.3)

@pytest.mark.parametrize('make,match', [(lambda x: x/255, 'expected uint8'), (lambda x: x.astype(np.int64), 'expected uint8'), (lambda x: x[0].transpose(2,0,1), 'channels last'),
    (lambda x: x[0,:,:,0], 'channels last'), (lambda x: x[:0], 'empty list'), (lambda x: [], 'empty list'), (lambda x: (x[0]>99).astype(np.uint8), 'only 0 and 1'),
    (lambda x: [None], 'expected a path'), (lambda x: 3, 'expected a path'), (lambda x: np.zeros((0,4,3), np.uint8), 'channels last')])
def test_images_that_are_none(file, imgs, make, match):
    with pytest.raises(ValueError, match=match): Predictor(file).embed(make(imgs))

@pytest.mark.parametrize('make', [lambda x: x.astype(np.float32), lambda x: x[0], lambda x: x[:0], lambda x: x.transpose(0,3,1,2), lambda x: x[:,:16]])
def test_batches_that_do_not_fit(file, imgs, make):
    with pytest.raises(ValueError, match=r'expected \(B,32,16,3\) uint8, B at least 1'): Predictor(file).run(make(imgs))

def test_onnxruntime_itself_refuses_floats(file, imgs):
    with pytest.raises(Exception, match='Unexpected input data type'): onnxruntime.InferenceSession(file).run(None, {'images':imgs.astype(np.float32)})

@pytest.mark.parametrize('kw', [dict(threads=0), dict(threads=1.5), dict(bs=0), dict(bs='8'), dict(providers=('NoSuch',))])
def test_options_of_the_predictor(file, kw):
    with pytest.raises(ValueError): Predictor(file, **kw)

def test_verdicts_need_a_cosine_threshold(file):
    reid = Predictor(file)
    for reid.threshold,match in ((None,'no threshold'), (dict(value=1., metric='euclidean'),"'euclidean'")):
        with pytest.raises(ValueError, match=match): reid.same('a', 'b')
    reid.threshold = .5
    assert reid.same(*[Image.new('RGB', (16,32), 'red')]*2)

def test_where_nothing_else_is_installed(file, data, tmp_path):
    "Python without site-packages, but for the three packages that a server installs"
    lib = tmp_path/'lib'
    lib.mkdir()
    for o in (np, onnxruntime, Image):
        place = Path(o.__file__).parent
        for p in (place, place.with_name(f'{place.name.lower()}.libs'), place.with_name('pillow.libs')):
            if p.exists() and not (lib/p.name).exists(): (lib/p.name).symlink_to(p)
    (lib/'fastreid_nb').symlink_to(root/'fastreid_nb')
    code = f"""import sys
sys.path.append({str(lib)!r})
from fastreid_nb.export.predictor import Predictor
print(Predictor({str(file)!r}).embed({data.query.path[0]!r}).shape, *(o for o in ('torch','fastai','pandas','fastcore','torchvision') if o in sys.modules))
try: import torch
except ImportError: print('no torch')"""
    told = subprocess.run([sys.executable, '-I', '-S', '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert told.stdout.splitlines()==['(1, 8)', 'no torch'], told.stderr

# ---- folders and commands

def test_a_folder_goes_on_where_it_stopped(file, data, tmp_path):
    folder = Path(data.gallery.path[0]).parent
    class Stops(OnnxModel):
        seen,limit = 0,5
        def forward(self, x, camid=None):
            self.seen += len(x)
            if self.seen>self.limit: raise KeyboardInterrupt
            return super().forward(x, camid)
    model,how = Stops(file),dict(bs=2, shard=4, num_workers=0, progress=False)
    with pytest.raises(KeyboardInterrupt): embed_folder(model, folder, tmp_path/'out', **how)
    model.seen,model.limit = 0,10**6
    table = embed_folder(model, folder, tmp_path/'out', **how)
    assert model.seen==len(table)-4
    np.testing.assert_allclose(np.load(tmp_path/'out'/'emb.npy'), Predictor(file).embed(table.path), atol=.02)

@pytest.mark.slow
def test_a_folder_with_cameras(data, tmp_path):
    "Cameras of a folder are unknown"
    path = export_onnx(seeded(lambda: tiny_vit(3)), tmp_path/'m.onnx')
    folder = Path(data.query.path[0]).parent
    table = embed_folder(path, folder, tmp_path/'out', num_workers=0, progress=False)
    np.testing.assert_allclose(np.load(tmp_path/'out'/'emb.npy'), Predictor(path).embed(table.path), atol=.02)

def test_commands(data, tmp_path, capsys):
    save_reid(tmp_path/'model.pt', seeded(lambda: reid_model(resnet18, preproc=small)))
    folder = Path(data.gallery.path[0]).parents[1]
    assert reid_main(['export', str(tmp_path/'model.pt'), str(folder), '--out', str(tmp_path/'m.onnx')])==0
    assert 'cosine to PyTorch 1.000000 at worst' in capsys.readouterr().out
    assert reid_main(['embed', str(folder/'query'), '--model', str(tmp_path/'m.onnx'), '--workers', '0', '--out', str(tmp_path/'out')])==0
    assert f'{len(data.query)} embedded, 0 cannot be read' in capsys.readouterr().out
    assert reid_main(['bench', str(tmp_path/'m.onnx'), '--batches', '1', '2', '--threads', '1', '--seconds', '0'])==0
    assert len(capsys.readouterr().out.splitlines())==5
    assert reid_main(['bench', str(tmp_path/'model.pt')])==1
    assert 'cannot be run by onnxruntime' in capsys.readouterr().err
