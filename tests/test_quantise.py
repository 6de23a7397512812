"Files with smaller numbers: what they keep, what the gate refuses, what an image must be, and TensorRT's list"
from copy import deepcopy
from functools import partial
import numpy as np, onnx, pytest, torch
from torch import nn
from fastreid_nb.backbone.mobile import mobilenetv2
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.backbone.regnet import regnet
from fastreid_nb.backbone.repvgg import repvgg
from fastreid_nb.backbone.resnet import resnet18, resnet18_ibn
from fastreid_nb.backbone.vit import ViT
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.export.core import export_onnx
from fastreid_nb.export.predictor import Predictor, onnx_meta
from fastreid_nb.export.quantise import Quantiser, _feeds, _worst_node, precision_table, quantise_onnx, quantise_pt2e
from fastreid_nb.export.tensorrt import _known, check_tensorrt, trtexec_line
from fastreid_nb.heads.model import reid_model
from slow import slow_but

size = Preproc((64,32))

class Small(nn.Sequential):
    n_feat = 16
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())

@pytest.fixture(scope='module')
def people(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=24, size=(64,32), progress=False)

def seen(net, people, preproc=size):
    "A model whose normalisation has seen the people"
    torch.manual_seed(0)
    model = reid_model(net, 4, preproc=preproc)
    x = torch.stack([preproc.load(o) for o in people.train.path[:32]])/255
    with torch.no_grad(): model(torch.Tensor(x))
    return model.eval()

@pytest.fixture(scope='module')
def model(people): return seen(Small, people)

@pytest.fixture(scope='module')
def source(model, people, tmp_path_factory): return export_onnx(model, tmp_path_factory.mktemp('onnx')/'m.onnx', people, layout='NCHW')

@pytest.mark.parametrize('runtime', ['onnxruntime','tensorrt','openvino'])
def test_int8(model, source, people, runtime, tmp_path):
    path = quantise_onnx(source, model, people, tmp_path/'q.onnx', runtime=runtime, most_images=32)
    meta = onnx_meta(path)
    assert (meta['precision'],meta['runtime'])==('int8',runtime) and meta['gate']['mean_cosine']>=.99
    kinds = [o.data_type for o in onnx.load(path).graph.initializer if len(o.dims)==4]
    assert kinds.count(onnx.TensorProto.INT8)==2
    assert bool(check_tensorrt(path))==(runtime=='onnxruntime')

def test_same_ranges_same_file(model, source, people, tmp_path):
    paths = [quantise_onnx(source, model, people, tmp_path/f'{i}.onnx', most_images=32) for i in range(2)]
    assert paths[0].read_bytes()==paths[1].read_bytes()

def test_float16(model, source, tmp_path):
    path = quantise_onnx(source, model, how='float16', to=tmp_path/'h.onnx')
    x = np.random.default_rng(0).integers(0, 256, (3,3,64,32), dtype=np.uint8)
    a,b = (Predictor(o).run(x) for o in (source,path))
    assert b.dtype==np.float32 and (a*b).sum(1).min()>=.9999 and abs((b*b).sum(1)-1).max()<1e-5
    kinds = [o.data_type for o in onnx.load(path).graph.initializer if list(o.dims)[2:]==[3,3]]
    assert kinds==[onnx.TensorProto.FLOAT16]*2

def test_default_name_and_replaced_whole(model, source, people):
    path = quantise_onnx(source, model, how='float16')
    assert path.name=='m_float16.onnx'
    before = path.read_bytes()
    with pytest.raises(ValueError): quantise_onnx(source, deepcopy(model).apply(lambda m: m.weight.data.normal_() if isinstance(m, nn.Conv2d) else None),
        how='float16')
    assert path.read_bytes()==before and sorted(o.name for o in path.parent.iterdir())==['m.onnx','m_float16.onnx']

@pytest.mark.parametrize('n', [0,3,15])
def test_too_few_images(model, source, people, n, tmp_path):
    with pytest.raises(ValueError, match=f'{n} images to calibrate on'): quantise_onnx(source, model, [*people.train.path[:n]], tmp_path/'q.onnx')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='0 images'): quantise_onnx(source, model, tmp_path/'empty', tmp_path/'q.onnx')
    assert not (tmp_path/'q.onnx').exists()

@pytest.mark.parametrize('kwargs,match', [(dict(how='int3'),'choose one of'), (dict(runtime='tvm'),'choose one of'), (dict(most_float=-1),'most_float'),
    (dict(images=None),'your own'), (dict(how='dynamic'),'matrix product'), (dict(most_images=3),'most_images')])
def test_bad_arguments(model, source, people, kwargs, match, tmp_path):
    with pytest.raises(ValueError, match=match): quantise_onnx(source, model, **{**dict(images=people, to=tmp_path/'q.onnx'), **kwargs})
    assert not list(tmp_path.iterdir())

def test_strange_files(model, people, tmp_path):
    with pytest.raises(FileNotFoundError): quantise_onnx(tmp_path/'none.onnx', model, people)
    (tmp_path/'text.onnx').write_text('no graph')
    with pytest.raises(ValueError): quantise_onnx(tmp_path/'text.onnx', model, people)

@pytest.mark.parametrize('n', [1,2,3,7,50])
def test_halving_finds_the_worst(n):
    for bad in range(n): assert _worst_node(range(n), lambda o: float(bad in o))==bad

def test_more_in_integers_loses_more(source, people, tmp_path):
    q = Quantiser(source, _feeds(people, onnx_meta(source), 32), False, tmp_path)
    assert q.lost([])==0 and 0<q.lost(q.nodes)<.01

class Longer(Small):
    def __init__(self):
        super().__init__()
        for o in (nn.Conv2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()): self.append(o)

def test_a_loud_channel_stays_in_float(people, tmp_path):
    model = seen(Longer, people)
    with torch.no_grad():
        model.backbone[1].weight[0] *= 300
        model.backbone[3].weight[:,0] /= 300
    source = export_onnx(model, tmp_path/'m.onnx', people)
    path = quantise_onnx(source, model, people, most_images=32)
    assert 1<=len(onnx_meta(path)['left_float'])<=2
    with pytest.raises(ValueError, match='most_float'): quantise_onnx(source, model, people, tmp_path/'n.onnx', most_float=0, most_images=32)

def test_table(model, source, people, tmp_path):
    small = quantise_onnx(source, model, people, tmp_path/'q.onnx', most_images=32)
    df = precision_table(dict(a=source, b=small), model, people, bs=2, threads=1, budget=.1)
    assert df['mean']['a']>=.99999>df['mean']['b']>=.99 and (df.images_per_s*df.ms/2000).round(6).eq(1).all()
    with pytest.raises(ValueError, match='no files'): precision_table({}, model)

families = dict(resnet18=resnet18, resnet18_ibn=resnet18_ibn, osnet=partial(osnet, width='x0_25'), mobilenetv2=partial(mobilenetv2, .5),
    regnet=partial(regnet, 'x_200mf'), repvgg=repvgg)

@pytest.mark.parametrize('name', slow_but(families))
def test_family(people, name, tmp_path):
    model = seen(families[name], people)
    source = export_onnx(model, tmp_path/'m.onnx', people, layout='NCHW')
    assert check_tensorrt(source)==[]
    q = Quantiser(source, _feeds(people, onnx_meta(source), 32), True, tmp_path)   # scores of an untrained network say nothing
    onnx.save(q.make(q.nodes), tmp_path/'q.onnx')
    assert check_tensorrt(tmp_path/'q.onnx')==[] and q.lost(q.nodes)<.1

@pytest.mark.slow
def test_transformer(people, tmp_path):
    model = seen(partial(ViT, img_size=(64,32), dim=48, depth=2, heads=3), people)
    source = export_onnx(model, tmp_path/'m.onnx', people, layout='NCHW')
    assert check_tensorrt(source)==[]
    assert onnx_meta(quantise_onnx(source, model, people, how='dynamic'))['gate']['mean_cosine']>=.99

@pytest.mark.slow
def test_pt2e(model, people):
    pytest.importorskip('torchao')
    small = quantise_pt2e(model, people, most_images=32, compiled=False)
    with pytest.raises(ValueError, match='3 images'): quantise_pt2e(model, [*people.train.path[:3]])
    x = torch.randint(256, (3,3,64,32), dtype=torch.uint8)
    with torch.no_grad(): assert torch.cosine_similarity(small(x), model(x/255)).mean()>=.95

# TensorRT's list

@pytest.mark.parametrize('op', ['Conv','Relu','InstanceNormalization','ReduceLogSumExp','MatMul','QuantizeLinear','Sub','Xor','Abs'])
def test_known(op): assert op in _known

@pytest.mark.parametrize('op', ['Unique','QLinearConv','ConvInteger','DynamicQuantizeLinear','Compress','BitShift','MatMulInteger','Det'])
def test_unknown(op): assert op not in _known

def test_line(source):
    line = trtexec_line(source, 'e.engine', (1,4,16))
    assert line.startswith(f'trtexec --onnx={source} --saveEngine=e.engine') and '--maxShapes=images:16x3x64x32' in line
    for bad in ((4,1,16),(1,4),(0,1,2)):
        with pytest.raises(ValueError): trtexec_line(source, batches=bad)
