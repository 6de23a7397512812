"What users ran into with files of weights and checkpoints: every report as a test, and its neighbours"
import argparse, gzip, hashlib, io, pickle, re, socket, sys, tarfile, zipfile
from functools import partial

import numpy as np, pandas as pd, pytest, torch, torchvision
from torch import nn

from fastreid_nb.backbone import weights as backbone_weights
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.backbone.resnet import resnet18, resnet34
from fastreid_nb.backbone.vit import vit
from fastreid_nb.backbone.weights import download_weights, fill_network
from fastreid_nb.data.files import read_torch
from fastreid_nb.eval.features import Features
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.parts import mgn
from fastreid_nb.heads.transreid import transreid
from fastreid_nb.pooling.core import GlobalAvgPool
from fastreid_nb.train.checkpoint import load_reid, save_reid
from fastreid_nb.weights.core import read_config
from fastreid_nb.weights.load import load_pretrained
from tiny_models import thin_resnets

quiet = partial(load_pretrained, verbose=False)
small = dict(size=(64,32))

@pytest.fixture(scope='module', autouse=True)
def thin():
    "Small files: what is tested here does not depend on the number of channels"
    with thin_resnets(): yield

@pytest.fixture(scope='module')
def sd(thin):
    torch.manual_seed(0)
    return resnet18().state_dict()

def write(path, o, **kw):
    torch.save(o, path, **kw)
    return path

def same(model, sd):
    "Does a model or a backbone hold the weights of `sd`?"
    net = getattr(model, 'backbone', model)
    own = net.state_dict()
    return all(torch.equal(own[k], v) for k,v in sd.items() if k in own and not k.endswith('tracked')) and len(own)<=len(sd)

def bagtricks(sd, n=9):
    head = {f'bottleneck.{k}':v for k,v in nn.BatchNorm1d(128).state_dict().items()}
    return {f'base.{k}':v for k,v in sd.items()}|head|{'classifier.weight':torch.randn(n, 128)}

## Kind 1: whole files of timm

timm_names = ['resnet18','vit_tiny_patch16_224','tf_efficientnet_lite0','mobilenetv3_small_050','convnext_atto','deit_tiny_distilled_patch16_224','hrnet_w18_small']

@pytest.mark.parametrize('name', timm_names)
def test_whole_files_of_timm(name, tmp_path):
    timm = pytest.importorskip('timm')
    theirs = timm.create_model(name).eval()
    path = write(tmp_path/'t.pth', theirs.state_dict())
    model = quiet(path, backbone=f'timm/{name}')
    cfg = theirs.pretrained_cfg
    classifiers = cfg['classifier'] if isinstance(cfg['classifier'], (tuple,list)) else (cfg['classifier'],)
    assert {f'{o}.{p}' for o in classifiers for p in ('weight','bias')}==set(model.origin.dropped)
    assert set(model.origin.dropped.values())=={'classifier of ImageNet'}
    assert (model.preproc.resample, model.preproc.mean, model.preproc.std)==(cfg['interpolation'], tuple(cfg['mean']), tuple(cfg['std']))
    assert not any(o.startswith(('size=','mean=','std=','resample=')) for o in model.origin.assumed)
    own,want = model.backbone.net.state_dict(),theirs.state_dict()
    assert all(torch.equal(v, want[k]) for k,v in own.items() if own[k].shape==want[k].shape)

def test_old_swin_of_timm(tmp_path):
    "Before 2023 the classifier was `head`, and the patch merging stood one stage earlier"
    timm = pytest.importorskip('timm')
    theirs = timm.create_model('swin_tiny_patch4_window7_224').state_dict()
    old = {re.sub(r'^layers\.(\d)\.downsample', lambda m: f'layers.{int(m[1])-1}.downsample', k).replace('head.fc.', 'head.'):v for k,v in theirs.items()}
    model = quiet(write(tmp_path/'s.pth', dict(model=old)), backbone='timm/swin_tiny_patch4_window7_224')
    assert set(model.origin.dropped)=={'head.weight','head.bias'} and model.preproc.resample=='bicubic'

def test_safetensors(tmp_path, sd):
    safe = pytest.importorskip('safetensors.torch')
    safe.save_file(sd, tmp_path/'r.safetensors', metadata=dict(format='pt'))
    assert same(quiet(tmp_path/'r.safetensors'), sd) and same(resnet18(pretrained=tmp_path/'r.safetensors'), sd)
    halves = {k:v.bfloat16() if v.is_floating_point() else v for k,v in sd.items()}
    safe.save_file(halves, tmp_path/'h.safetensors')
    read = read_torch(tmp_path/'h.safetensors')
    assert all(torch.equal(read[k], v) and read[k].dtype==v.dtype for k,v in halves.items())
    (tmp_path/'cut.safetensors').write_bytes((tmp_path/'r.safetensors').read_bytes()[:-5000])
    with pytest.raises(ValueError, match='truncated'): read_torch(tmp_path/'cut.safetensors')

def test_timm_trained_by_others(tmp_path):
    "Under Lightning's prefix, with a classifier of other size, without backbone in the name"
    timm = pytest.importorskip('timm')
    state = timm.create_model('convnext_atto', num_classes=7).state_dict()
    path = write(tmp_path/'t.ckpt', dict(state_dict={f'model.{k}':v for k,v in state.items()}, epoch=3, global_step=9))
    model = quiet(path, backbone='timm/convnext_atto')
    assert len(model.origin.dropped)==2 and 'model. removed from the names' in str(model.origin)
    from fastreid_nb.backbone.timmnets import timm_backbone
    net = timm_backbone('convnext_atto', pretrained=path)
    assert all(torch.equal(v, state[k.removeprefix('net.')]) for k,v in net.state_dict().items())

## Kind 2: side information

def jigsaw_file(tmp_path, n_rows=160, name='veri.pth', size=(64,64), n_pids=5):
    "A file of TransReID with branches and `n_rows` rows of side information"
    def theirs(k):
        k = re.sub(r'^backbone\.', 'base.', k).removeprefix('head.branches.')
        m = re.match(r'head\.heads\.(\d)\.(neck|classifier)(.*)', k)
        if not m: return k
        return dict(neck='bottleneck', classifier='classifier')[m[2]] + (f'_{m[1]}' if m[1]!='0' else '') + m[3]
    net = transreid('deit_tiny', n_pids, img_size=size, stride=16, n_cams=n_rows)
    nn.init.normal_(net.backbone.sie_embed)
    return write(tmp_path/name, {theirs(k):v for k,v in net.state_dict().items()}), net.backbone.sie_embed.detach()

def plain_file(tmp_path, n_rows=6):
    "A file of TransReID without branches"
    net = reid_model(partial(vit, 'deit_tiny', (64,64), n_cams=n_rows), 3, pool=GlobalAvgPool)
    nn.init.normal_(net.backbone.sie_embed)
    state = {re.sub('^backbone', 'base', re.sub(r'^head\.neck', 'bottleneck', re.sub(r'^head\.cl', 'cl', k))):v for k,v in net.state_dict().items()}
    return write(tmp_path/'plain.pth', state), net.backbone.sie_embed.detach()

def test_cameras_and_views(tmp_path):
    path,rows = jigsaw_file(tmp_path)
    model = quiet(path, size=(64,64), options=dict(n_cams=20, n_views=8))
    assert (model.backbone.n_cams, model.backbone.n_views)==(20,8) and torch.equal(model.backbone.sie_embed, rows)
    x,net = torch.rand(2, 3, 64, 64),model.backbone
    cams,views = torch.tensor([3,19]),torch.tensor([5,0])
    with torch.no_grad():
        bare = net.embed(x, cams, views)-net.sie_weight*rows[cams*8+views]
        mean = net.embed(x, cams, None)
    torch.testing.assert_close(mean-bare, (net.sie_weight*rows.view(20, 8, -1)[cams].mean(1))[:,None].expand_as(bare), atol=1e-5, rtol=1e-4)
    with torch.no_grad(): assert model(x, cams).shape[0]==2

@pytest.mark.parametrize('make', [jigsaw_file, plain_file])
def test_what_rows_were_taken_for_is_said(make, tmp_path):
    path,rows = make(tmp_path)
    model = quiet(path, size=(64,64))
    assert model.n_cams==len(rows) and any('rows of side information' in o and 'n_views' in o for o in model.origin.assumed)

@pytest.mark.parametrize('make', [jigsaw_file, plain_file])
@pytest.mark.parametrize('kw,cams', [(dict(n_cams=4), 4), (dict(n_cams=0), 0), (dict(n_cams=2, n_views=5), 2)])
def test_other_cameras(make, kw, cams, tmp_path):
    path,rows = make(tmp_path)
    model = quiet(path, size=(64,64), n_pids=4, options=kw)
    assert model.n_cams==cams and 'sie_embed' in model.origin.dropped
    with torch.no_grad(): model(torch.rand(1, 3, 64, 64))

def test_views_alone_give_the_cameras(tmp_path):
    path,rows = jigsaw_file(tmp_path)
    assert quiet(path, size=(64,64), options=dict(n_views=8)).backbone.n_cams==20
    said = quiet(path, size=(64,64), options=dict(n_cams=20)).origin.dropped['sie_embed']
    assert 'n_views=8' in said

def test_views_without_cameras(tmp_path):
    net = reid_model(partial(vit, 'deit_tiny', (64,64), n_views=8), 3, pool=GlobalAvgPool)
    path = write(tmp_path/'v.pth', {f'base.{k.removeprefix("backbone.")}':v for k,v in net.state_dict().items() if k.startswith('backbone.')})
    model = quiet(path, size=(64,64), options=dict(n_cams=0, n_views=8))
    assert (model.backbone.n_cams, model.backbone.n_views)==(0,8) and 'sie_embed' not in model.origin.dropped

## Kind 3: a whole model as starting weights

def our_file(path, sd):
    model = reid_model(resnet18, 7)
    fill_network(model.backbone, sd)
    save_reid(path, model, range(7))

wholes = dict(bagtricks=bagtricks, fastreid=lambda sd: {f'backbone.{k}':v for k,v in sd.items()}|{'heads.weight':torch.zeros(5, 128), 'heads.bottleneck.0.weight':torch.ones(128)},
    fastreid_a=lambda sd: dict(model={f'module.backbone.{k}':v for k,v in sd.items()}|{'module.heads.bnneck.weight':torch.ones(128), 'module.pixel_mean':torch.ones(1,3,1,1)}),
    torchreid=lambda sd: dict(state_dict={f'module.{k}':v for k,v in sd.items()}|{'module.classifier.weight':torch.zeros(5, 128)}, rank1=np.float64(.9)),
    lightning=lambda sd: dict(state_dict={f'net.backbone.{k}':v for k,v in sd.items()}|{'net.loss.centers':torch.zeros(2)}),
    imagenet=lambda sd: sd|{'fc.weight':torch.zeros(1000, 128)})

@pytest.mark.parametrize('kind', wholes)
def test_a_whole_model_fills_a_backbone(kind, tmp_path, sd):
    path = write(tmp_path/'w.pth', wholes[kind](sd))
    assert same(resnet18(pretrained=path), sd)

def test_our_checkpoint_fills_a_backbone(tmp_path, sd):
    our_file(tmp_path/'model.pt', sd)
    assert same(resnet18(pretrained=tmp_path/'model.pt'), sd) and same(resnet18(pretrained=str(tmp_path/'model.pt'), last_stride=2), sd)

def test_a_transformer_of_ours_fills_one(tmp_path):
    model = reid_model(partial(vit, 'deit_tiny', (64,32), n_cams=3), 4, pool=GlobalAvgPool)
    save_reid(tmp_path/'v.pt', model)
    net = vit('deit_tiny', (64,32), pretrained=tmp_path/'v.pt')
    assert torch.equal(net.norm.weight, model.backbone.norm.weight)

def test_misfit_says_whose_file_it_is(tmp_path, sd):
    with pytest.raises(ValueError, match='bagtricks; load_pretrained'): resnet34(pretrained=write(tmp_path/'b.pth', bagtricks(sd)))

def test_load_reid_names_the_function(tmp_path, sd):
    with pytest.raises(ValueError, match=r'bagtricks.*load_pretrained') as e: load_reid(write(tmp_path/'b.pth', bagtricks(sd)))
    assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='no fastreid_nb checkpoint: it holds'): load_reid(write(tmp_path/'c.pth', dict(epoch=3)))

def test_load_pretrained_reads_ours(tmp_path, sd):
    our_file(tmp_path/'model.pt', sd)
    model = load_pretrained(tmp_path/'model.pt')
    assert same(model, sd) and model.pids==list(range(7)) and model.origin.source=='fastreid_nb'

## Kind 4: wrappings and prefixes

@pytest.mark.parametrize('key', ['model_state_dict','net_dict','teacher','state_dict_ema','weights','params','my_own_word'])
def test_any_single_entry(key, tmp_path, sd):
    for o in ({key:sd, 'epoch':3}, dict(run={key:sd}, optimizer=dict(state={0:dict(exp_avg=torch.ones(9))}, param_groups=[{}])), [dict([(key, sd)])]):
        path = write(tmp_path/'w.pth', o)
        assert same(quiet(path), sd) and same(resnet18(pretrained=path), sd)

def other(sd): return {k:v+1 if v.is_floating_point() else v for k,v in sd.items()}

@pytest.mark.parametrize('taken,left', [('teacher','student'), ('model_ema','model'), ('state_dict_ema','state_dict'), ('ema','net'), ('swa_model','model')])
def test_the_average_of_two(taken, left, tmp_path, sd):
    path = write(tmp_path/'w.pth', {left:other(sd), taken:sd, 'epoch':1})
    model = quiet(path)
    assert same(model, sd) and left in str(model.origin) and 'entry' in str(model.origin)
    assert same(quiet(path, entry=left), other(sd))
    with pytest.raises(ValueError, match=f"no entry 'nix'.*{left}"): quiet(path, entry='nix')

def test_a_student_of_a_larger_teacher(tmp_path, sd):
    path = write(tmp_path/'kd.pth', dict(teacher=resnet34().state_dict(), student=sd))
    assert same(quiet(path), sd) and same(resnet18(pretrained=path), sd)

def test_the_printed_recipe_works(tmp_path, sd):
    for i,o in enumerate((dict(teacher=sd, student=sd, args=argparse.Namespace(a=1)), dict(sd)|{'args':argparse.Namespace()},
            dict(run=dict(ckpt=dict(model=sd, opt=argparse.Namespace()))),
            dict(model=resnet18(), when=3), resnet18())):
        path,new_path = write(tmp_path/f'{i}.pth', o),tmp_path/f'{i}_new.pth'
        with pytest.raises(ValueError, match='would run code') as e: quiet(path)
        recipe = re.search(r'o = torch\.load.*', str(e.value))[0]
        exec(recipe, dict(torch=torch, path=path, new_path=new_path))
        assert len(quiet(new_path).backbone.state_dict())==len([k for k in sd])

@pytest.mark.parametrize('prefix', ['model.','module.encoder_q.','module.model.','model.model.','backbone.','_orig_mod.module.','base.','my_net.','visual_extractor.trunk.'])
def test_prefixes(prefix, tmp_path, sd):
    path = write(tmp_path/'p.pth', {f'{prefix}{k}':v for k,v in sd.items()})
    for kw in ({}, dict(backbone=resnet18)):
        model = quiet(path, **kw)
        assert same(model, sd)
        if prefix not in ('backbone.','base.'): assert f'{prefix} removed from the names' in str(model.origin)
    assert same(resnet18(pretrained=path), sd)

def test_moco(tmp_path, sd):
    copies = {f'module.{o}.{k}':v for o,s in (('encoder_q',sd), ('encoder_k',other(sd))) for k,v in s.items()}
    head = {f'module.encoder_q.fc.{i}.weight':torch.zeros(128, 128) for i in (0,2)}|{f'module.encoder_k.fc.{i}.weight':torch.zeros(128, 128) for i in (0,2)}
    path = write(tmp_path/'moco.pth.tar', dict(state_dict=copies|head|{'module.queue':torch.zeros(128, 99), 'module.queue_ptr':torch.zeros(1)}, epoch=200))
    model = quiet(path)
    why = model.origin.dropped
    assert same(model, sd) and why['module.queue']=='memory of its training' and why['module.encoder_k.conv1.weight']=='copy of encoder_q'
    assert same(resnet18(pretrained=path), sd)

@pytest.mark.parametrize('name', ['criterion.weight','loss.centers','center_loss.centers','margin.weight','triplet_loss.margin','losses.0.proxies','loss_fn.weight'])
def test_parameters_of_a_loss(name, tmp_path, sd):
    path = write(tmp_path/'c.pth', dict(sd)|{name:torch.randn(100, 128)})
    assert quiet(path).origin.dropped=={name:'part of a loss'} and same(resnet18(pretrained=path), sd)
    prefixed = write(tmp_path/'d.pth', {f'model.{k}':v for k,v in sd.items()}|{name:torch.randn(100, 128)})
    assert quiet(prefixed).origin.dropped=={name:'part of a loss'}

def test_a_stray_entry_has_its_own_name_and_a_way_out(tmp_path, sd):
    path = write(tmp_path/'s.pth', dict(sd)|{'gate.weight':torch.randn(3)})
    with pytest.raises(ValueError, match=r"not in the network: 1, such as \['gate.weight'\]"): quiet(path)
    assert quiet(path, ignore='gate.').origin.dropped=={'gate.weight':'left out by the caller'}

mm = {'head.fcs.0.fc.weight':torch.randn(64, 128), 'head.fcs.0.fc.bias':torch.zeros(64), 'head.classifier.weight':torch.randn(9, 64)}
foreign = dict(mmtracking=dict(meta=dict(epoch=6), state_dict=('backbone.', mm)), mmpretrain=dict(state_dict=('backbone.', {'head.fc.weight':torch.zeros(9, 128), 'head.fc.bias':torch.zeros(9)})),
    dino=dict(teacher=('module.backbone.', {'module.head.mlp.0.weight':torch.zeros(4, 128), 'module.head.last_layer.weight_g':torch.zeros(4)})),
    layumi=dict(net=('model.', {'model.fc.weight':torch.zeros(1000, 128), 'classifier.add_block.0.weight':torch.zeros(128, 128), 'classifier.classifier.0.weight':torch.zeros(9, 128)})))

@pytest.mark.parametrize('kind', foreign)
def test_heads_of_other_projects(kind, tmp_path, sd):
    def filled(o):
        if isinstance(o, tuple): return {f'{o[0]}{k}':v for k,v in sd.items()}|o[1]
        return {k:filled(v) for k,v in o.items()} if isinstance(o, dict) else o
    model = quiet(write(tmp_path/'mm.pth', filled(foreign[kind])))
    assert same(model, sd) and 'head of another project' in model.origin.dropped.values()
    with torch.no_grad(): assert model(torch.rand(1, 3, 64, 32)).shape==(1,128)

def test_wrapped_states_with_notes(tmp_path, sd):
    assert same(quiet(write(tmp_path/'n.pth', dict(sd, epoch=3, arch='resnet18', history=[.1,.2]))), sd)

## Kind 5: files that are something else

def py2_file(path, sd):
    torch.save(dict(state_dict=dict(sd)|{'classifier.weight':torch.randn(9,128), 'classifier.bias':torch.zeros(9)}, note='QQQQQ', rank1=np.float64(.9)), path, _use_new_zipfile_serialization=False)
    b = path.read_bytes().replace(b'X\5\0\0\0QQQQQ', b'U\5\x9f\xbe\xcd\xef\1')
    scalar = re.search(rb'bc_codecs\nencode\nPX.\0{3}.*?PX\x06\0{3}latin1P\x86PRP'.replace(b'P', rb'(?:q.|r.{4})'), b, re.DOTALL)
    raw = np.float64(.9).tobytes()
    path.write_bytes(b.replace(scalar[0], b'bU\x08'+raw))   # a number of numpy as Python 2 wrote it
    return path

def test_pickles_of_python_2(tmp_path, sd):
    path = py2_file(tmp_path/'py2.pth.tar', sd)
    with pytest.raises(Exception): torch.load(path, weights_only=True)
    assert read_torch(path)['rank1']==.9
    model = quiet(path)
    assert same(model, sd) and model.origin.source=='torchreid' and same(resnet18(pretrained=path), sd)

def zipped(names):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w') as z: [z.writestr(n, b'x') for n in names]
    return b.getvalue()

def tarred():
    b = io.BytesIO()
    with tarfile.open(fileobj=b, mode='w') as t: t.addfile(tarfile.TarInfo('model.pth'), io.BytesIO())
    return b.getvalue()

def npz():
    b = io.BytesIO()
    np.savez(b, a=np.ones(3))
    return b.getvalue()

def jit():
    b = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Conv2d(3, 8, 3), torch.rand(1, 3, 8, 8)), b)
    return b.getvalue()

others = dict(html=(b'\n<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title>', 'web page.*browser'), html2=(b'<html>404', 'web page'),
    lfs=(b'version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3', 'Git LFS pointer.*git lfs pull'), onnx=(b'\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xb6\x9c', 'ONNX'),
    openvino=(b'<?xml version="1.0"?>\n<net name="r" version="11">', 'OpenVINO'), hdf5=(b'\x89HDF\r\n\x1a\n'+bytes(99), 'HDF5'), empty=(b'', 'empty'), gz=(gzip.compress(b'a'*99), 'compressed'),
    tar=(tarred(), 'tar archive'), zip=(zipped(['a/model.pth','a/README']), 'zip archive with 2 files'), keras=(zipped(['config.json','model.weights.h5']), 'Keras'), npz=(npz(), 'numpy.*new_path'),
    torchscript=(jit(), r'is a TorchScript file: torch\.jit\.load\(path\)\.state_dict\(\) has its weights'), pickle=(pickle.dumps(dict(a=np.ones(3))), 'pickle that torch did not write'),
    npy=(b'\x93NUMPY\1\0', 'array of numpy'), json=(b'{"metadata": {"total_size": 9}, "weight_map": {}}', 'JSON'), s3=(b'<?xml version="1.0"?><Error>', 'XML'), tflite=(b'\x1c\0\0\0TFL3', 'TensorFlow Lite'),
    gguf=(b'GGUF\3', 'GGUF'), text=('# Gewichte für später\n'.encode(), 'is a text'), zeros=(bytes(9999), 'zeros'), jpeg=(b'\xff\xd8\xff\xe0', 'image'))

@pytest.mark.parametrize('kind', others)
def test_other_files_are_named(kind, tmp_path):
    content,says = others[kind]
    (tmp_path/'model.pth').write_bytes(content)
    for f in (quiet, load_reid, lambda p: resnet18(pretrained=p), Features.load):
        with pytest.raises(ValueError, match=f'model.pth is not a readable file of.*{says}') as e: f(tmp_path/'model.pth')
        assert 'delete it and download' not in str(e.value) and '\n' not in str(e.value)

def test_the_recipe_for_a_pickle_works(tmp_path, sd):
    path,new_path = tmp_path/'model.pkl',tmp_path/'new.pth'
    path.write_bytes(pickle.dumps(dict(model={f'backbone.{k}':v.numpy() for k,v in sd.items()}, author='x')))
    with pytest.raises(ValueError) as e: quiet(path)
    exec(re.search(r'import pickle.*', str(e.value))[0], dict(path=path, new_path=new_path))
    assert same(quiet(new_path), sd)

def test_torchscript_recipe_works(tmp_path, sd):
    path,new_path = tmp_path/'jit.pt',tmp_path/'new.pth'
    net = torchvision.models.resnet18()
    torch.jit.trace(net.eval(), torch.rand(1, 3, 64, 32)).save(str(path))
    with pytest.raises(ValueError) as e: quiet(path)
    exec(re.search(r'torch\.save\(torch\.jit\.load.*', str(e.value))[0], dict(torch=torch, path=path, new_path=new_path))
    with thin_resnets(1): assert same(quiet(new_path), {k:v for k,v in net.state_dict().items()})

def test_folders_and_devices(tmp_path, sd):
    write(tmp_path/'a.pth', sd)
    with pytest.raises(ValueError, match=r"is a folder.*a\.pth"): quiet(tmp_path)
    with pytest.raises(ValueError, match='no regular file'): quiet('/dev/null')

def test_osnet_without_its_last_layer(tmp_path):
    net = osnet('plain', 'x0_25')
    model = quiet(write(tmp_path/'o.pth', net.state_dict()))
    assert model.origin.source=='torchreid' and isinstance(model.pool, GlobalAvgPool) and 'no layer behind the pooling' in str(model.origin)

def test_no_advice_that_cannot_work(tmp_path):
    state = {k:torch.randn(8,3,3,3) for k in ('_conv_stem.weight','_bn0.weight','_blocks.0._depthwise_conv.weight','_fc.weight')}
    with pytest.raises(ValueError, match='efficientnet_pytorch') as e: quiet(write(tmp_path/'l.pth', state))
    assert 'Give `backbone`' not in str(e.value)

## Kind 14: damage that loads

def zeroed(path, n=4000):
    b = bytearray(path.read_bytes())
    b[len(b)//2:len(b)//2+n] = bytes(n)
    path.write_bytes(b)
    return path

def test_damage_in_the_middle(tmp_path, sd):
    for name in 'mn': our_file(tmp_path/f'{name}.pt', sd)
    Features(torch.randn(500, 64), pd.DataFrame(dict(pid=range(500)))).save(tmp_path/'f.pt')
    for f,path in ((load_reid, tmp_path/'m.pt'), (Features.load, tmp_path/'f.pt'), (quiet, write(tmp_path/'w.pth', sd)), (quiet, tmp_path/'n.pt')):
        f(path)
        with pytest.raises(ValueError, match='damaged'): f(zeroed(path))

@pytest.mark.parametrize('n', [1, 40])
def test_a_changed_byte(n, tmp_path, sd):
    path = write(tmp_path/'w.pth', sd)
    b = bytearray(path.read_bytes())
    at = bytes(b).find(sd['layer4.1.conv2.weight'].numpy().tobytes()[:4000])
    b[at+100:at+100+n] = bytes(255-o for o in b[at+100:at+100+n])
    path.write_bytes(b)
    with pytest.raises(ValueError, match='damaged'): quiet(path)

def test_files_without_checksums_load(tmp_path, sd):
    set_crc = getattr(torch.serialization, 'set_crc32_options', None)
    if set_crc is None: pytest.skip('this torch always writes them')
    set_crc(False)
    try: path = write(tmp_path/'w.pth', sd)
    finally: set_crc(True)
    assert same(quiet(path), sd)

@pytest.mark.parametrize('dtype', [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_kind(dtype, tmp_path, sd):
    odd = {k:v.to(dtype) for k,v in sd.items()}
    with pytest.raises(ValueError, match=str(dtype).removeprefix('torch.')): quiet(write(tmp_path/'i.pth', odd))
    our_file(tmp_path/'m.pt', sd)
    ck = torch.load(tmp_path/'m.pt')
    torch.save({**ck, 'state':{k:v.to(dtype) for k,v in ck['state'].items()}}, tmp_path/'m.pt')
    with pytest.raises(ValueError, match='floating point'): load_reid(tmp_path/'m.pt')
    with pytest.raises(ValueError, match='floating point'): resnet18(pretrained=tmp_path/'m.pt')

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(dtype, tmp_path, sd):
    file = {k:v.to(dtype) if v.is_floating_point() else v for k,v in sd.items()}
    got = quiet(write(tmp_path/'h.pth', file)).backbone.state_dict()
    assert all(torch.equal(v, file[k].to(v.dtype)) for k,v in got.items()) and got['conv1.weight'].dtype==torch.float32

def wrapped_inside(model):
    model.backbone = nn.DataParallel(model.backbone)
    return model

@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m)), torch.optim.swa_utils.AveragedModel])
def test_wrapped_models_are_saved_bare(wrap, tmp_path):
    model = reid_model(resnet18, 3).eval()
    model.pids = [4,5,6]
    save_reid(tmp_path/'w.pt', wrap(model))
    back,x = load_reid(tmp_path/'w.pt'),torch.rand(1, 3, 64, 32)
    with torch.no_grad(): torch.testing.assert_close(back(x), model(x))
    assert back.pids==[4,5,6]
    again = wrap(reid_model(resnet18, 3))
    load_reid(tmp_path/'w.pt', again)

def test_a_wrapped_part_is_saved_bare(tmp_path):
    model = reid_model(resnet18, 3)
    keys = list(model.state_dict())
    for wrap in (nn.DataParallel, torch.compile):
        twin = reid_model(resnet18, 3)
        twin.backbone = wrap(twin.backbone)
        save_reid(tmp_path/'w.pt', twin)
        assert list(torch.load(tmp_path/'w.pt')['state'])==keys and load_reid(tmp_path/'w.pt')

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_not_saved(bad, tmp_path):
    model = reid_model(resnet18, 3)
    model.backbone.conv1.weight.data[0,0,0,0] = bad
    with pytest.raises(ValueError, match='nothing was saved'): save_reid(tmp_path/'nan.pt', model)
    assert not list(tmp_path.iterdir())

## Kind 15: files of other versions

@pytest.fixture
def ck(tmp_path):
    save_reid(tmp_path/'v.pt', reid_model(resnet18, 5))
    return torch.load(tmp_path/'v.pt')

changes = dict(preproc=(lambda c: dict(preproc={**c['preproc'], 'letterbox':True}), r'version 99\.0.*letterbox.*pip install'),
    recipe=(lambda c: dict(recipe={**c['recipe'], 'backbone':dict(fn='fastreid_nb.mamba.mamba', kw={})}), r'version 99\.0.*mamba.*pip install'),
    argument=(lambda c: dict(recipe={**c['recipe'], 'backbone':dict(fn='resnet18', kw=dict(flux=3))}), r'version 99\.0.*flux.*pip install'),
    half_recipe=(lambda c: dict(recipe=dict(backbone=dict(fn='resnet18', kw={}))), r'version 99\.0.*rebuilt.*pip install'),
    odd_recipe=(lambda c: dict(recipe=dict(model='resnet18')), r'version 99\.0.*rebuilt.*pip install'), huge=(lambda c: dict(recipe={**c['recipe'], 'n_pids':10**15}), 'rebuilt'),
    test_on=(lambda c: dict(test_on='soul'), "test_on='soul'"), state=(lambda c: dict(state=[1]), r'state is missing'), size=(lambda c: dict(preproc={}), 'size, resample'),
    no_size=(lambda c: dict(preproc={**c['preproc'], 'size':'big'}), r'v2\.pt'))

@pytest.mark.parametrize('how', changes)
def test_files_of_a_later_version(how, tmp_path, ck):
    change,says = changes[how]
    torch.save({**ck, 'version':'99.0', **change(ck)}, tmp_path/'v2.pt')
    for f in (load_reid, quiet):
        with pytest.raises(ValueError, match=says) as e: f(tmp_path/'v2.pt')
        assert len(str(e.value))<600 and '\n' not in str(e.value)

@pytest.mark.parametrize('part', ['state','preproc','pids'])
def test_files_without_a_part(part, tmp_path, ck):
    torch.save({k:v for k,v in ck.items() if k!=part}, tmp_path/'v2.pt')
    for f in (load_reid, quiet):
        with pytest.raises(ValueError, match=f'written by version .*{part}.* missing') as e: f(tmp_path/'v2.pt')
        assert '\n' not in str(e.value)

@pytest.mark.parametrize('part', ['version','threshold','test_on'])
def test_what_may_be_missing(part, tmp_path, ck):
    torch.save({k:v for k,v in ck.items() if k!=part}, tmp_path/'v2.pt')
    assert load_reid(tmp_path/'v2.pt') and quiet(tmp_path/'v2.pt')

@pytest.mark.parametrize('kw', [dict(mean=[123.,116.,103.]), dict(std=[58.,57.,57.]), dict(std=[0.,0.,0.]),
    dict(mean=[float('nan')]*3), dict(size=[0,32]), dict(resample='magic')])
def test_preproc_that_cannot_be(kw, tmp_path, ck):
    torch.save({**ck, 'preproc':{**ck['preproc'], **kw}}, tmp_path/'q.pt')
    with pytest.raises(ValueError, match=r'q\.pt'): load_reid(tmp_path/'q.pt')

@pytest.mark.parametrize('spec', [dict(fn='fastreid_nb.train.load_reid', kw=dict(path='r.pt')), dict(fn='load_pretrained', kw=dict(path='r.pt')), dict(fn='load_pretrained', kw={}),
    dict(fn='resnet18', kw=dict(pretrained='r.pt')), dict(fn='resnet18', kw=dict(pretrained=True)), dict(fn='os.system', kw=dict(command='ls')), dict(fn='load_backbone', kw=dict(net=3, pretrained='r.pt'))])
@pytest.mark.parametrize('where', ['model','backbone','pool','deep'])
def test_recipes_that_read_files(spec, where, tmp_path, ck):
    recipe = dict(model=spec) if where=='model' else {**ck['recipe'], where:spec}
    if where=='deep': recipe = dict(model=dict(fn='mgn', kw=dict(backbone=spec, n_pids=3)))
    torch.save({**ck, 'recipe':recipe}, tmp_path/'r.pt')
    with pytest.raises(ValueError, match='not run') as e: load_reid(tmp_path/'r.pt')
    assert '\n' not in str(e.value)

def test_a_recipe_without_bottom(tmp_path, ck):
    spec = dict(fn='resnet18', kw={})
    for _ in range(1000): spec = dict(fn='mgn', kw=dict(backbone=spec))
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20000)
    try: torch.save({**ck, 'recipe':dict(model=spec)}, tmp_path/'r.pt')
    finally: sys.setrecursionlimit(limit)
    with pytest.raises(ValueError): load_reid(tmp_path/'r.pt')

def bomb():
    s = 'a: &a [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n'
    for p,c in zip('abcdefg','bcdefgh'): s += f'{c}: &{c} [{",".join(["*"+p]*9)}]\n'
    return s

@pytest.mark.parametrize('line', ['INPUT: {SIZE_TEST: *h}','INPUT: *h','MODEL: {PIXEL_MEAN: *h}','MODEL: {HEADS: {POOL_LAYER: *h}}','MODEL: {BACKBONE: {NAME: *h}}','MODEL: {HEADS: {CLS_LAYER: *h}}',
    '_BASE_: *h', 'MODEL: {BACKBONE: {WITH_IBN: *h}}', f'INPUT: {{SIZE_TEST: "{"("*5000}"}}', 'INPUT: {SIZE_TEST: '+'['*3000+']'*3000+'}', 'MODEL: {BACKBONE: {LAST_STRIDE: *h}}'])
def test_configs_that_explode(line, tmp_path):
    (tmp_path/'c.yaml').write_text(bomb()+line)
    with pytest.raises(ValueError) as e: read_config(tmp_path/'c.yaml')
    assert len(str(e.value))<1000

def test_a_config_that_is_not_there(tmp_path, sd):
    with pytest.raises(FileNotFoundError, match='nix.yaml'): quiet(write(tmp_path/'a.pth', sd), config=tmp_path/'nix.yaml')

## Downloads

def test_a_server_that_never_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(backbone_weights, '_patience', .5)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        url = f'http://127.0.0.1:{s.getsockname()[1]}/x-12345678.pth'
        with pytest.raises(FileNotFoundError, match=r'127\.0\.0\.1.*put the file at.*x-12345678\.pth'): download_weights(url)
    assert socket.getdefaulttimeout() is None and not list((tmp_path/'checkpoints').iterdir())

@pytest.fixture
def served(tmp_path, monkeypatch):
    "Serve one answer; gives the function that sets it"
    import http.server, threading
    box = {}
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(box['body'])
        def log_message(self, *args): pass
    server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    def get(name, body):
        box['body'] = body
        return download_weights(f'http://127.0.0.1:{server.server_port}/{name}')
    yield get
    server.shutdown()
    server.server_close()

def test_a_wrong_checksum_is_explained(served, tmp_path):
    with pytest.raises(ValueError, match='not the file that its name promises'): served('net-12345678.pth', b'other')
    assert not list((tmp_path/'checkpoints').iterdir())

def test_a_page_in_place_of_a_file(served, tmp_path):
    with pytest.raises(FileNotFoundError, match='web page'): served('net.pth', b'<html>please log in')
    assert not list((tmp_path/'checkpoints').iterdir())
    good = io.BytesIO()
    torch.save(dict(a=torch.ones(2)), good)
    digest = hashlib.sha256(good.getvalue()).hexdigest()[:8]
    assert read_torch(served(f'net-{digest}.pth', good.getvalue()))['a'].tolist()==[1,1]

## What a model says about its images is what was asked for

@pytest.mark.parametrize('kw', [dict(size=(96,48)), dict(resample='lanczos'), dict(mean=(.1,.2,.3)), dict(std=(.4,.5,.6)), dict(size=(96,48), resample='nearest', mean=(.5,.5,.5))])
@pytest.mark.parametrize('own', [False,True])
def test_options_reach_the_preproc(kw, own, tmp_path, sd):
    model = quiet(write(tmp_path/'a.pth', sd), **kw, **(dict(backbone=resnet18) if own else {}))
    for k,v in kw.items(): assert getattr(model.preproc, k)==v
    assert torch.allclose(model.mean.flatten(), torch.tensor(model.preproc.mean)) and torch.allclose(model.std.flatten(), torch.tensor(model.preproc.std))

def test_the_size_of_a_transformer(tmp_path):
    path = write(tmp_path/'v.pth', reid_model(partial(vit, 'deit_tiny', (96,48)), 3, pool=GlobalAvgPool).backbone.state_dict()|{'head.weight':torch.zeros(1000, 192)})
    assert quiet(path, size=(96,48)).preproc.size==(96,48)
    model = quiet(path, options=dict(img_size=(96,48)))
    assert model.preproc.size==model.backbone.img_size==(96,48)

def test_the_size_of_a_timm_network(tmp_path):
    timm = pytest.importorskip('timm')
    path = write(tmp_path/'v.pth', timm.create_model('vit_tiny_patch16_224').state_dict())
    model = quiet(path, backbone='timm/vit_tiny_patch16_224', size=(64,32))
    assert model.preproc.size==tuple(model.backbone.img_size)==(64,32)
    with pytest.raises(ValueError, match='size'): quiet(path, backbone='timm/vit_tiny_patch16_224', size=(64,32), options=dict(img_size=(96,48)))

## Several networks, and heads of training without labels

def test_two_networks_are_not_chosen_from(tmp_path, sd):
    path = write(tmp_path/'two.pth', {f'{o}.{k}':v for o,s in (('rgb',sd), ('infrared',other(sd))) for k,v in s.items()})
    with pytest.raises(ValueError, match="several networks.*rgb.*infrared.*entry='rgb'"): quiet(path)
    assert same(quiet(path, entry='infrared'), other(sd))

def test_heads_of_training_without_labels(tmp_path, sd):
    heads = {'module.projection_head.0.weight':torch.zeros(3, 128), 'module.prototypes.weight':torch.zeros(9, 3)}
    model = quiet(write(tmp_path/'swav.pth', {f'module.{k}':v for k,v in sd.items()}|heads))
    assert same(model, sd) and set(model.origin.dropped.values())=={'head of its training'} and set(model.origin.dropped)==set(heads)

def test_a_model_of_branches_fills_a_backbone(tmp_path, sd):
    model = mgn(resnet18, 3)
    save_reid(tmp_path/'mgn.pt', model)
    net = resnet18(pretrained=tmp_path/'mgn.pt')
    assert torch.equal(net.layer4[1].conv2.weight, model.head.branches[0].layer4[1].conv2.weight) and torch.equal(net.conv1.weight, model.backbone.conv1.weight)

def test_files_of_version_0_0_1_with_names_of_a_wrapper(tmp_path, ck):
    for prefix in ('_orig_mod.','module.'):
        torch.save({**ck, 'state':{f'{prefix}{k}':v for k,v in ck['state'].items()}}, tmp_path/'old.pt')
        assert torch.equal(load_reid(tmp_path/'old.pt').backbone.conv1.weight, ck['state']['backbone.conv1.weight'])

def test_features_are_no_weights(tmp_path):
    Features(torch.randn(5, 4), pd.DataFrame(dict(pid=range(5)))).save(tmp_path/'f.pt')
    for f in (quiet, load_reid, lambda p: resnet18(pretrained=p)):
        with pytest.raises(ValueError, match='features.*Features.load'): f(tmp_path/'f.pt')

def test_sparse_weights_are_refused(tmp_path, sd):
    with pytest.raises(ValueError, match='sparse'): quiet(write(tmp_path/'s.pth', {k:v.to_sparse() if v.ndim==4 else v for k,v in sd.items()}))

def test_backbone_must_be_a_function(tmp_path, sd):
    with pytest.raises(ValueError, match='give the function'): quiet(write(tmp_path/'a.pth', sd), backbone=resnet18())
