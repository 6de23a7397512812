"Published weights: every golden model and every era through the loader, and files that must be refused"
import re
from functools import partial

import numpy as np, pytest, torch, torchvision
from torch import nn

from fastreid_nb.backbone.resnet import resnet18, resnet50
from fastreid_nb.heads.core import LinearHead, ReductionHead
from fastreid_nb.heads.model import reid_model
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.pooling.parts import FlattenPool
from fastreid_nb.heads.parts import mgn
from fastreid_nb.pooling.core import GlobalAvgPool, GeM
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.weights.core import detect_backbone, read_config
from fastreid_nb.weights.load import load_pretrained
from fastreid_nb.train.checkpoint import load_reid, save_reid
from fastreid_nb.heads.transreid import transreid
from fastreid_nb.backbone.vit import vit
from golden_files import close, golden_dir, golden_params, missing
from golden_models import golden_config, golden_input, golden_name, golden_state
from tiny_models import thin_resnets

quiet = partial(load_pretrained, verbose=False)
theirs = 'test_golden_model','test_golden_half_state','test_imagenet_of_torchvision'   # tests with networks as others made them

@pytest.fixture(autouse=True)
def thin(request):
    "Small files and networks where the number of channels does not matter"
    with thin_resnets(1 if request.node.originalname in theirs else 4): yield

def write(tmp_path, state, config=None, name='model.pth'):
    if config is not None: (tmp_path/'config.yaml').write_text(config)
    torch.save(state, tmp_path/name)
    return tmp_path/name

@pytest.mark.parametrize('path', golden_params('models/*.keys.json', slow=('bagtricks_R50_ibn','sbs_R50.'))) # their like are fast
def test_golden_model(path, tmp_path):
    "Names to weights to features, by way of a checkpoint of the reference implementation and its config"
    if path is None: missing('models/*.keys.json')
    gold = path.with_name(f'{golden_name(path)}.npz')
    if not gold.exists(): missing(gold.name)
    z,x = np.load(gold),golden_input()
    model = quiet(write(tmp_path, dict(model=golden_state(path)), golden_config(path)), size=tuple(x.shape[2:]))
    with torch.no_grad(): fmap,emb = model.fmap(x),model(x)
    close(emb, z['feature_f64'], rel=1e-4)
    assert list(fmap.shape)==z['backbone_map_shape'].tolist() or golden_name(path).startswith('ViT')
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'].reshape(fmap.shape[:2]), rel=1e-4)
    close(fmap.contiguous().flatten()[::61], z['backbone_map_every61'], rel=1e-4)

def half_states(): return golden_params('models/*_state_half.npz')

@pytest.mark.parametrize('kind', ['bagtricks','sbs','agw'])
@pytest.mark.parametrize('path', half_states())
def test_golden_half_state(path, kind, tmp_path):
    "Weights in half precision give the features that the reference computed with them"
    train = golden_dir()/'models/train18.npz'
    if path is None or not train.exists(): missing('models/*_state_half.npz and train18.npz')
    z,state = np.load(train),{k:torch.tensor(v) for k,v in np.load(path).items()}
    if kind=='sbs': state['heads.pool_layer.p'] = torch.full((1,), 3.)
    base = dict(bagtricks='bagtricks', sbs='SBS', agw='AGW')[kind]
    model = quiet(write(tmp_path, state, f'_BASE_: ../Base-{base}.yml'), size=(128,64))
    x = torch.tensor(z['images_uint8_nchw'])/255
    with torch.no_grad(): fmap,emb,flipped = model.fmap(x),model(x),model(x.flip(3))
    close(emb, z[f'{kind}_eval_feature'], rel=1e-4)
    close(flipped, z[f'{kind}_eval_feature_flipped'], rel=1e-4)
    close(fmap, z[f'{kind}_backbone_map'], rel=1e-4)

## Synthetic checkpoints of every kind


def a_model(**kw): return reid_model(**dict(dict(n_pids=6, backbone=partial(resnet18, ibn=True), pool=GlobalAvgPool), **kw)).eval()

def shaken(model):
    "The same model with no entry left at its start value"
    torch.manual_seed(1)
    for k,v in model.state_dict().items():
        if k.endswith('running_var'): v.uniform_(0.5, 1.5)
        elif k.endswith('W.1.weight'): v.fill_(0.005)
        elif v.is_floating_point() and not k.endswith('.p'): v.mul_(1+0.1*torch.randn_like(v)) if v.ndim>1 else v.add_(0.02*torch.randn_like(v))
    return model

def rename(state, *pairs):
    for a,b in pairs: state = {re.sub(a, b, k):v for k,v in state.items()}
    return state

pixels = dict(pixel_mean=torch.tensor([123.675,116.28,103.53]).view(1,3,1,1), pixel_std=torch.tensor([58.395,57.12,57.375]).view(1,3,1,1))
conv = {'heads.bottleneck.0.weight'}

def fastreid(model, era):
    "The state of `model` as fast-reid wrote it in an era"
    state,reduced,post = model.state_dict(),hasattr(model.head, 'reduce'),hasattr(model.head, 'post') and len(model.head.post)
    neck = 'heads.bnneck.' if era=='A' else 'heads.bottleneck.1.' if reduced else 'heads.bottleneck.0.'
    state = rename(state, (r'^head\.neck\.', neck), (r'^head\.reduce\.', 'heads.bottleneck.0.'), (r'^head\.post\.0\.', 'heads.bottleneck.1.'),
        (r'^head\.classifier\.', 'heads.' if era=='C' else 'heads.classifier.'), (r'^pool\.', 'heads.pool_layer.'))
    state = {k:v[...,None,None] if reduced and k in conv else v for k,v in state.items()}
    return state|({} if era=='C' else pixels)

def same_features(model, path, rel=1e-5, **kw):
    loaded,x = quiet(path, **kw),torch.rand(2, 3, 96, 32)
    with torch.no_grad(): close(loaded(x), model(x), rel)
    return loaded

models = dict(plain={}, gem=dict(pool=GeM), reduced=dict(head=partial(ReductionHead, n_emb=16)), nl=dict(backbone=partial(resnet18, nl=True, nl_width='half')),
    bare=dict(head=LinearHead))

@pytest.mark.parametrize('era', 'ABC')
@pytest.mark.parametrize('name,wrapped', [*((o, False) for o in models), ('plain', True)])
def test_eras(era, name, wrapped, tmp_path):
    model = shaken(a_model(**models[name]))
    state = fastreid(model, era)
    if name=='bare' and era=='A': pytest.skip('era A always had the neck')
    if wrapped: state = {f'module.{k}':v for k,v in state.items()}
    path = write(tmp_path, dict(model=state, optimizer=dict(lr=.1), metric=np.float64(.9)))
    loaded = same_features(model, path, 1e-4 if name=='nl' else 1e-5, stem_pool='pad', pool='avgpool' if name!='gem' else None)
    assert loaded.origin.source==f'fastreid {"A" if name=="bare" and era=="B" else era}' and set(loaded.origin.dropped)==(set() if era=='C' else set(pixels))
    close(loaded.head.classifier.weight, model.head.classifier.weight)
    if name=='nl': assert loaded.backbone.NL_2[0].g.out_channels==16

def test_reduction_head_of_era_a(tmp_path):
    model = shaken(a_model(head=partial(ReductionHead, n_emb=16, norm=True, act='leaky')))
    loaded = same_features(model, write(tmp_path, fastreid(model, 'A')))
    assert isinstance(loaded.head.post[1], nn.LeakyReLU)

def test_first_pooling_follows_the_era(tmp_path):
    model = a_model()
    made = {era:quiet(write(tmp_path, fastreid(model, era))).backbone.maxpool.ceil_mode for era in 'ABC'}
    assert made==dict(A=False, B=True, C=True)
    autumn = a_model(backbone=partial(resnet18, nl=True, nl_width='half'))
    assert not quiet(write(tmp_path, fastreid(autumn, 'B'))).backbone.maxpool.ceil_mode

def test_pixels_of_the_file_are_used(tmp_path):
    other = {k:torch.full((1,3,1,1), 127.5) for k in pixels}
    loaded = quiet(write(tmp_path, fastreid(a_model(), 'A')|other))
    assert loaded.mean.flatten().tolist()==[.5]*3 and loaded.preproc.std==(.5,)*3 and not [o for o in loaded.origin.assumed if o.startswith('mean')]

def mgn_file(model, era):
    "An MGN of ours as fast-reid wrote it in an era"
    def theirs(k):
        if m := re.match(r'backbone\.(conv1|bn1|layer1|layer2|layer3\.0)\.(.*)', k):
            return f'backbone.{dict(conv1="0", bn1="1", layer1="4", layer2="5")[m[1]] if "." not in m[1] else "6"}.{m[2]}'
        if m := re.match(r'head\.branches\.(\d)\.layer([34])\.(\d+)\.(.*)', k):
            return f'b{int(m[1])+1}.{int(m[2])-3}.{int(m[3])-(m[2]=="3")}.{m[4]}'
        b,rest = re.match(r'head\.heads\.(b\d+)\.(.*)', k).groups()
        pool = {'pool.p':f'{b}_pool.0.p', 'head.reduce.weight':f'{b}_pool.1.weight'}
        if era=='A': return pool.get(rest) or rest.replace('head.post.0.', f'{b}_pool.2.').replace('head.neck.', f'{b}_head.bnneck.').replace('head.classifier.', f'{b}_head.classifier.')
        rows = f'{b}_head.classifier.' if era=='B' else f'{b}_head.'
        return rest.replace('pool.', f'{b}_head.pool_layer.').replace('head.reduce.', f'{b}_head.bottleneck.0.').replace('head.neck.', f'{b}_head.bottleneck.1.').replace('head.classifier.', rows)
    state = {theirs(k):v for k,v in model.state_dict().items()}
    return {k:v[...,None,None] if re.search(r'pool\.1\.weight|bottleneck\.0\.weight', k) else v for k,v in state.items()}|({} if era=='C' else pixels)

@pytest.mark.parametrize('era', 'ABC')
def test_mgn_of_every_era(era, tmp_path):
    model = shaken(mgn(resnet18, 6, n_emb=8, variant='2020' if era=='A' else 'current').eval())
    loaded = same_features(model, write(tmp_path, dict(model=mgn_file(model, era))), stem_pool='pad')
    assert loaded.origin.source==f'fastreid {era}' and loaded.preproc.size==(384,128)
    save_reid(tmp_path/'m.pt', loaded)
    x = torch.rand(2, 3, 96, 32)
    with torch.no_grad(): assert torch.equal(load_reid(tmp_path/'m.pt')(x), loaded(x))
    assert len(quiet(tmp_path/'model.pth', n_pids=9).head.heads['b1'].head.classifier.weight)==9

def test_bagtricks(tmp_path):
    model = shaken(a_model())
    state = rename(model.state_dict(), (r'^backbone\.', 'base.'), (r'^head\.neck', 'bottleneck'), (r'^head\.', ''))
    loaded = same_features(model, write(tmp_path, state))
    assert loaded.origin.source=='bagtricks' and not loaded.origin.dropped and loaded.preproc.resample=='bilinear'

def test_bagtricks_forgot_a_relu(tmp_path):
    "The plain ResNet of reid-strong-baseline has none behind its first normalisation, the IBN one has"
    model = shaken(a_model(backbone=partial(resnet18, stem_relu=False)))
    state = rename(model.state_dict(), (r'^backbone\.', 'base.'), (r'^head\.neck', 'bottleneck'), (r'^head\.', ''))
    assert any('stem_relu=False' in o for o in same_features(model, write(tmp_path, state)).origin.assumed)

@pytest.mark.parametrize('kind', ['plain','ain'])
def test_torchreid_osnet(kind, tmp_path):
    head = partial(ReductionHead, n_emb=512, neck=False, bias=True, norm=True, act='relu')
    model = shaken(a_model(backbone=partial(osnet, kind, 'x0_25'), head=head))
    state = rename(model.state_dict(), (r'^backbone\.', ''), (r'^head\.reduce', 'fc.0'), (r'^head\.post\.0', 'fc.1'), (r'^head\.', ''))
    state = {f'module.{k}':v for k,v in state.items()}|{'module.classifier.bias':torch.zeros(6)}
    loaded = same_features(model, write(tmp_path, dict(state_dict=state, epoch=60, rank1=np.float64(.9), optimizer={})))
    assert loaded.origin.source=='torchreid' and list(loaded.origin.dropped)==['classifier.bias']
    assert loaded.recipe['backbone']['kw']['variant']==kind

def test_torchreid_resnet(tmp_path):
    model = shaken(a_model(head=LinearHead, backbone=partial(resnet50, last_stride=2)))
    state = rename(model.state_dict(), (r'^backbone\.', ''), (r'^head\.', ''))|{'classifier.bias':torch.zeros(6)}
    assert same_features(model, write(tmp_path, dict(state_dict=state))).origin.source=='torchreid'

@pytest.mark.parametrize('name,stride', [('resnet18',2), ('resnext50_32x4d',2), ('mobilenet_v2',None), ('shufflenet_v2_x0_5',None), ('efficientnet_b0',None), ('regnet_y_400mf',None)])
def test_imagenet_of_torchvision(name, stride, tmp_path):
    net = shaken(getattr(torchvision.models, name)(weights=None).eval())
    loaded = quiet(write(tmp_path, net.state_dict()), last_stride=stride or 2)
    assert loaded.origin.source=='imagenet' and loaded.head.classifier.out_features==0
    assert set(loaded.origin.dropped.values())=={'classifier of ImageNet'}
    x,got = torch.rand(1, 3, 64, 64),{}
    pool = getattr(net, 'avgpool', None)
    if pool is not None: pool.register_forward_pre_hook(lambda m, i: got.setdefault('fmap', i[0]))
    with torch.no_grad(): net((x-loaded.mean)/loaded.std)
    if got:
        with torch.no_grad(): close(loaded.fmap(x), got['fmap'], rel=1e-4)

def test_transreid(tmp_path):
    pre = Preproc((64,32), mean=(.5,)*3, std=(.5,)*3)
    net = partial(vit, 'deit_tiny', (64,32), n_cams=3, stride=12)
    model = shaken(a_model(backbone=net, pool=FlattenPool, preproc=pre, test_on='feat'))
    state = rename(model.state_dict(), (r'^backbone\.', 'base.'), (r'^head\.neck', 'bottleneck'), (r'^head\.', ''))|{'base.fc.weight':torch.zeros(1000, 192)}
    loaded,x = quiet(write(tmp_path, state), size=(64,32)),torch.rand(2, 3, 64, 32)
    assert loaded.backbone.n_cams==3 and loaded.origin.dropped=={'backbone.fc.weight':'classifier of ImageNet'}
    cams = torch.tensor([0,2])
    with torch.no_grad(): close(loaded(x, cams), model(x, cams))

def test_transreid_with_branches(tmp_path):
    model = shaken(transreid('deit_tiny', 6, (64,32), n_cams=2).eval())
    def theirs(k):
        k = re.sub(r'^backbone\.', 'base.', k).replace('head.branches.', '')
        m = re.match(r'head\.heads\.(\d)\.(neck|classifier)(.*)', k)
        return k if not m else ('bottleneck' if m[2]=='neck' else 'classifier')+('' if m[1]=='0' else f'_{m[1]}')+m[3]
    loaded,x = quiet(write(tmp_path, {theirs(k):v for k,v in model.state_dict().items()}|{'base.fc.weight':torch.zeros(9, 192)}), size=(64,32)),torch.rand(2, 3, 64, 32)
    cams = torch.tensor([0,1])
    with torch.no_grad(): close(loaded(x, cams), model(x, cams))
    assert loaded.backbone.grid==model.backbone.grid and list(loaded.origin.dropped)==['backbone.fc.weight']

def test_our_own(tmp_path):
    model = a_model()
    loaded = quiet(write(tmp_path, model.state_dict()))
    assert loaded.origin.source=='fastreid_nb'
    save_reid(tmp_path/'m.pt', loaded)
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad(): assert torch.equal(load_reid(tmp_path/'m.pt')(x), loaded(x))
    assert load_pretrained(tmp_path/'m.pt').preproc==loaded.preproc

def test_new_classifier(tmp_path):
    path = write(tmp_path, fastreid(a_model(), 'C'))
    for n in (0,9):
        loaded = quiet(path, n_pids=n)
        assert len(loaded.head.classifier.weight)==n and loaded.origin.dropped=={'head.classifier.weight':'classifier of other identities'}
        assert loaded.recipe['n_pids']==n

def test_backbone_of_the_caller(tmp_path):
    class Mine(nn.Sequential):
        n_feat = 4
        def __init__(self): super().__init__(nn.Conv2d(3, 4, 3, 2))
    model = shaken(a_model(backbone=Mine))
    with pytest.raises(ValueError, match='unknown network'): quiet(write(tmp_path, fastreid(model, 'C')))
    same_features(model, write(tmp_path, fastreid(model, 'C')), backbone=Mine)

## What it says

def test_everything_assumed_is_said(tmp_path, capsys):
    load_pretrained(write(tmp_path, fastreid(a_model(), 'A')))
    said = capsys.readouterr().out
    for o in ('fastreid A', "resnet(18, ibn='a'", 'last_stride=1', "stem_pool='pad'", 'size=(256, 128)', 'pool=avgpool', 'pixel_mean, pixel_std'): assert o in said, o
    load_pretrained(write(tmp_path, fastreid(a_model(), 'A'), '_BASE_: x/Base-AGW.yml'), stem_pool='pad')
    said = capsys.readouterr().out
    assert said.count('assumed')==1 and 'assumed: resample=bicubic' in said and 'GeM' in said and 'config: config.yaml (size, last_stride, pool, cosine)' in said

def test_config(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'base.yml').write_text("INPUT: {SIZE_TEST: '(100, 50)'}\nMODEL: {PIXEL_STD: [51, 51, 51], HEADS: {CLS_LAYER: circle}}")
    (tmp_path/'sub/config.yaml').write_text('_BASE_: ../base.yml\nMODEL: {BACKBONE: {LAST_STRIDE: 2}, HEADS: {POOL_LAYER: gempool}}')
    assert read_config(tmp_path/'sub/config.yaml')==dict(size=(100,50), std=[.2]*3, cosine=True, last_stride=2, pool='gempool')
    loaded = quiet(write(tmp_path, fastreid(a_model(pool=partial(GeM, learn=False)), 'B')), config=tmp_path/'sub/config.yaml')
    assert loaded.preproc.size==(100,50) and loaded.backbone.total_stride==32 and loaded.head.classifier.cosine and 'p' in dict(loaded.pool.named_buffers())

@pytest.mark.parametrize('text,match', [('_BASE_: ../Base-Mine.yml', 'Base-Mine.yml, which is not there'), ('- a\n- b', 'expected a section'), ('MODEL: resnet50', 'expected a section'), ('_BASE_: config.yaml', 'builds on itself'),
    ('INPUT: {SIZE_TEST: 256}', 'expected 2 numbers'), ('MODEL: {BACKBONE: {NAME: build_vit_backbone}}', 'of another model'), ('MODEL: {BACKBONE: {WITH_IBN: False}}', "ibn=False, but the file has True"), ('a: [1', 'cannot be read as YAML'),
    ('MODEL: {HEADS: {POOL_LAYER: SoftPool}}', "pool='softpool'")])
def test_bad_config(text, match, tmp_path):
    with pytest.raises(ValueError, match=match): quiet(write(tmp_path, fastreid(a_model(), 'C'), text))

def test_pixels_of_the_file_outweigh_the_config(tmp_path):
    other = {k:torch.full((1,3,1,1), 127.5) for k in pixels}
    loaded = quiet(write(tmp_path, fastreid(a_model(), 'A')|other, '_BASE_: ../Base-bagtricks.yml'))
    assert loaded.preproc.mean==(.5,)*3

def test_pixels_may_be_in_the_unit_range(tmp_path):
    state = fastreid(a_model(), 'A')|{k:v/255 for k,v in pixels.items()}
    assert quiet(write(tmp_path, state)).preproc.mean==pytest.approx((.485,.456,.406), abs=1e-3)

def test_gem_of_era_a_is_no_strong_baseline(tmp_path):
    "Its GeM was always learned, so that an exponent does not mean larger pictures and cosines"
    loaded = quiet(write(tmp_path, fastreid(a_model(pool=GeM), 'A')))
    assert loaded.preproc.size==(256,128) and not loaded.head.classifier.cosine
    loaded = quiet(write(tmp_path, fastreid(a_model(pool=GeM), 'C')))
    assert loaded.preproc.size==(384,128) and loaded.head.classifier.cosine

@pytest.mark.parametrize('hw,stride', [((256,256),12), ((384,128),16), ((256,128),(16,12))])
def test_transformer_finds_its_pictures(hw, stride, tmp_path):
    model = a_model(backbone=partial(vit, 'deit_tiny', hw, stride=stride), pool=FlattenPool)
    path = write(tmp_path, rename(fastreid(model, 'C')))
    if isinstance(stride, tuple):
        with pytest.raises(ValueError, match='fit none of'): quiet(path)
        loaded = quiet(path, options=dict(stride=stride))
    else: loaded = quiet(path)
    assert loaded.preproc.size==hw and loaded.backbone.grid==model.backbone.grid
    assert torch.equal(loaded.backbone.pos_embed, model.backbone.pos_embed)

def test_side_information_of_cameras_and_views(tmp_path):
    net = partial(vit, 'deit_tiny', (256,256), n_cams=3, n_views=2)
    path = write(tmp_path, rename(fastreid(a_model(backbone=net, pool=FlattenPool), 'C')))
    assert quiet(path).backbone.n_cams==6
    told = quiet(path, options=dict(n_cams=3, n_views=2))
    assert (told.backbone.n_cams, told.backbone.n_views)==(3,2)

def test_backbone_of_timm(tmp_path):
    pytest.importorskip('timm')
    model = reid_model('timm/vit_tiny_patch16_224', 6).eval()
    state = {k.removeprefix('net.'):v for k,v in model.backbone.state_dict().items()}
    with pytest.raises(ValueError, match='fit none of|unknown network|missing'): quiet(write(tmp_path, {k:v for k,v in state.items() if 'blocks.3' not in k}))
    loaded,x = quiet(write(tmp_path, state), backbone='timm/vit_tiny_patch16_224'),torch.rand(1, 3, *model.backbone.img_size)
    assert loaded.preproc.mean==tuple(pytest.approx(o) for o in model.backbone.mean) and loaded.preproc.size==tuple(model.backbone.img_size)
    with torch.no_grad(): close(loaded.fmap(x), model.fmap(x), 1e-4)

@pytest.mark.parametrize('wrap', [lambda s: dict(state_dict=dict(model=s)), lambda s: dict({f'module.{k}':v for k,v in s.items()}, n_averaged=torch.tensor(3)),
    lambda s: s|{'queue':torch.zeros(3), 'heads.classifier.bias':torch.zeros(6)}])
def test_wrappings(wrap, tmp_path):
    model = shaken(a_model())
    same_features(model, write(tmp_path, wrap(fastreid(model, 'C'))), stem_pool='pad')

@pytest.mark.parametrize('kw,match', [(dict(mean=(123.,116.,103.)), 'expected three values'), (dict(mean=(.5,)), 'expected three values'), (dict(options=dict(strides=3)), 'no option strides'),
    (dict(dilation=True), 'no option dilation'), (dict(stem_pool='same'), "stem_pool='same'"), (dict(pool='softpool'), "pool='softpool'")])
def test_bad_arguments(kw, match, tmp_path):
    with pytest.raises(ValueError, match=match): quiet(write(tmp_path, fastreid(a_model(), 'C')), **kw)

def test_no_option_is_ignored(tmp_path):
    class Mine(nn.Sequential):
        n_feat = 4
        def __init__(self): super().__init__(nn.Conv2d(3, 4, 3, 2))
    path = write(tmp_path, fastreid(a_model(backbone=Mine), 'C'))
    with pytest.raises(ValueError, match='no option last_stride'): quiet(path, backbone=Mine, last_stride=1)
    path = write(tmp_path, fastreid(a_model(backbone=partial(osnet, width='x0_25')), 'C'))
    with pytest.raises(ValueError, match='no option last_stride'): quiet(path, last_stride=1)

def test_our_file_takes_no_arguments(tmp_path):
    save_reid(tmp_path/'m.pt', a_model())
    assert quiet(tmp_path/'m.pt').origin.source=='fastreid_nb'
    with pytest.raises(ValueError, match='knows all about itself'): quiet(tmp_path/'m.pt', size=(64,32))

def test_raw_state_of_a_part_model(tmp_path):
    with pytest.raises(ValueError, match='save_reid'): quiet(write(tmp_path, mgn(resnet18, 6).state_dict()))

def test_raw_state_with_the_usual_pool(tmp_path):
    model = shaken(a_model(pool=GeM))
    same_features(model, write(tmp_path, model.state_dict()))

def test_one_can_train_on_it(tmp_path):
    from fastreid_nb.augment.loaders import reid_dls
    from fastreid_nb.eval.inference import embed
    from fastreid_nb.data.toy import toy_reid
    from fastreid_nb.train.core import reid_learner
    data = toy_reid(tmp_path/'toy', n_ids=8, size=(64,32), progress=False)
    dls = reid_dls(data, size=(64,32), p=2, k=2, num_workers=0)
    model = quiet(write(tmp_path, fastreid(a_model(), 'A')), n_pids=len(dls.pids), size=(64,32))
    learn = reid_learner(dls, model=model, dtype=torch.float32)
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(1)
    assert embed(model, data.query.path[0]).shape==(1,128)

## Refused, with nothing half loaded

broken = dict(missing=lambda s: {k:v for k,v in s.items() if k!='backbone.layer2.0.conv1.weight'}, stage=lambda s: {k:v for k,v in s.items() if 'layer4' not in k},
    extra=lambda s: s|{'backbone.layer9.weight':torch.zeros(1)}, extra_head=lambda s: s|{'heads.gate.weight':torch.zeros(1)},
    nan=lambda s: s|{'backbone.conv1.weight':s['backbone.conv1.weight']*torch.nan}, size=lambda s: s|{'heads.weight':torch.zeros(6, 99)},
    grey=lambda s: s|{'backbone.conv1.weight':s['backbone.conv1.weight'][:,:1]}, ibn=lambda s: {k:v for k,v in s.items() if 'layer2.0.bn1.IN' not in k})
says = dict(missing='missing in the file: 1', stage='unknown network', extra='layer9', extra_head='gate', nan='NaN', size=r'\(6, 99\) for \(6, 128\)', grey=r'\(64, 1, 7, 7\)', ibn='layer2.0.bn1.IN')

@pytest.mark.parametrize('how', broken)
def test_broken_states(how, tmp_path):
    with pytest.raises(ValueError, match=says[how]): quiet(write(tmp_path, broken[how](fastreid(a_model(), 'C'))))

@pytest.mark.parametrize('content,match', [(b'hello', 'not a readable'), (b'', 'not a readable')])
def test_no_weights_at_all(content, match, tmp_path):
    (tmp_path/'x.pth').write_bytes(content)
    with pytest.raises(ValueError, match=match): quiet(tmp_path/'x.pth')
    with pytest.raises(FileNotFoundError, match='no file'): quiet(tmp_path/'y.pth')

def test_truncated(tmp_path):
    path = write(tmp_path, fastreid(a_model(), 'C'))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match='truncated'): quiet(path)

@pytest.mark.parametrize('o', [dict(model=[1,2]), [1,2], dict(epoch=3), {}])
def test_other_contents(o, tmp_path):
    with pytest.raises(ValueError, match='no plain dictionary'): quiet(write(tmp_path, o))

@pytest.mark.parametrize('name', ['densenet121','vgg11','squeezenet1_0','inception_v3'])
def test_unknown_networks_are_not_claimed(name):
    with torch.device('meta'): state = getattr(torchvision.models, name)(weights=None).state_dict()
    with pytest.raises(ValueError, match='unknown network'): detect_backbone(state)
