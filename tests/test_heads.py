"Heads and the model around them: properties, round trips, bad input, and parity with the reference implementation"
import copy, json, pickle
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F, torch.utils._pytree as pytree
from fastai.torch_core import TensorImage, apply, to_cpu, to_detach, to_device, to_float
from torch import nn

from fastreid_nb.backbone.resnet import resnet, resnet18, resnet18_ibn
from fastreid_nb.heads.core import BNNeck, BNNeckHead, Classifier, LinearHead, ReductionHead, ReIDOut, cosine_logits
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.heads.model import ReIDModel, reid_model
from fastreid_nb.heads import rebuild
from fastreid_nb.heads.ensemble import Ensemble
from fastreid_nb.heads.haa import haa
from fastreid_nb.heads.parts import mgn, pcb
from fastreid_nb.heads.rebuild import model_from_recipe
from fastreid_nb.heads.rmgl import rmgl
from fastreid_nb.losses.core import CrossEntropy
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.pooling.core import GlobalAvgPool, GeM, GlobalMaxPool
from golden_files import close, golden_files, missing
from tiny_models import thin_resnets

heads = [LinearHead, BNNeckHead, ReductionHead, partial(BNNeckHead, cosine=True), partial(ReductionHead, n_emb=7, neck=False),
         partial(LinearHead, cosine=True)]

@pytest.fixture(autouse=True)
def thin():
    "Small networks where the number of channels does not matter"
    with thin_resnets(): yield

class Tiny(nn.Module):
    "A backbone of one convolution"
    n_feat = 6
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=4, padding=1)

    def forward(self, x): return self.conv(x)

def tiny_model(**kwargs): return reid_model(Tiny, 5, **kwargs)

def cases():
    res = [pytest.param(p, c, id=c['tag']) for p in golden_files('embedding_head*.json') for c in json.loads(p.read_text())]
    return res or [pytest.param(None, None, id='none')]

def golden_head(case, z):
    "Our pool and head with the weights of one golden case"
    n_emb,bn = case['embedding_dim'],case['with_bnneck']
    tail = str(n_emb or 96)
    kw = dict(cosine=case['cls_layer']!='Linear')
    head = ReductionHead(96, 13, n_emb, neck=bn, **kw) if n_emb else (BNNeckHead if bn else LinearHead)(96, 13, **kw)
    state = {'classifier.weight':z[f'state_cls{tail}']}
    if n_emb: state['reduce.weight'] = z['state_conv512'][...,0,0]
    if bn: state |= {f'neck.{k}':z[f'state_bn{tail}_{k}'] for k in ('weight','bias','running_mean','running_var')}
    res = head.load_state_dict({k:torch.tensor(v) for k,v in state.items()}, strict=False)
    assert not res.unexpected_keys and set(res.missing_keys)<={'neck.num_batches_tracked'}
    return (GeM(float(z['state_gem_p'][0])) if case['pool'].startswith('Gen') else GlobalAvgPool()), head

@pytest.mark.parametrize('path,case', cases())
def test_golden_head(path, case):
    if path is None: missing('embedding_head*.json')
    z,tag = np.load(path.with_name(path.name.replace('_cases.json', '.npz'))),case['tag']
    pool,head = golden_head(case, z)
    fmap,pid = torch.tensor(z['features'], requires_grad=True),torch.tensor(z['targets']).long()
    close(head.eval()(pool(fmap)).emb, z[f'{tag}_eval'])
    out = head.train()(pool(fmap))
    close(out.logits*case['scale'], z[f'{tag}_pred_class_logits'])
    on = 'emb' if case['neck_feat']=='after' else 'feat'
    close(getattr(out, on), z[f'{tag}_features'])
    if case['with_bnneck']:
        close(head.neck.running_mean, z[f'{tag}_bn_running_mean_after'])
        close(head.neck.running_var, z[f'{tag}_bn_running_var_after'])
        assert bool(z[f'{tag}_bn_bias_requires_grad'])==head.neck.bias.requires_grad==False
    if case['cls_layer']!='Linear': return
    close(out.logits*case['scale'], z[f'{tag}_cls_outputs'])
    loss = CrossEntropy(0.1, spread='others')(out, pid)+TripletLoss(0.3, on=on)(out, pid)
    loss.backward()
    close(loss, z[f'{tag}_loss_ce0.1_plus_tri0.3'])
    close(fmap.grad.mean((2,3)), z[f'{tag}_grad_features_in_mean_hw'])

@pytest.mark.parametrize('kind', ['Linear','CircleSoftmax'])
@pytest.mark.parametrize('path', golden_files('classification_head*.npz') or [None])
def test_golden_classification_head(path, kind):
    "A model that gives logits in evaluation is the reference's image classifier; its scale is in the loss here"
    if path is None: missing('classification_head*.npz')
    z = np.load(path)
    if f'{kind}_eval_logits' not in z.files: missing(f'{path.name}: {kind}')
    neck = 'state_bn96_weight' in z.files
    head = (BNNeckHead if neck else LinearHead)(96, 13, cosine=kind!='Linear')
    state = {'classifier.weight':z['state_cls96']}|{f'neck.{k}':z[f'state_bn96_{k}'] for k in ('weight','bias','running_mean','running_var')}
    assert set(head.load_state_dict({k:torch.tensor(v) for k,v in state.items()}, strict=False).missing_keys)<={'neck.num_batches_tracked'}
    model = ReIDModel(nn.Identity(), GlobalAvgPool(), head, Preproc(mean=(0.,)*96, std=(1.,)*96), test_on='logits')
    x = torch.tensor(z['features'])
    want = torch.tensor(z[f'{kind}_eval_logits'])
    with torch.no_grad(): logits = model.eval()(x)
    scale = (want/logits).median()
    close(logits*scale, want)
    out = model.train()(x)
    close(out.logits*scale, z[f'{kind}_train_pred_class_logits'])
    close(out.emb, z[f'{kind}_train_features'])
    if kind=='Linear': close(scale, torch.tensor(1.))

def an_out(): return ReIDOut(torch.rand(2, 3), torch.rand(2, 4), torch.rand(2, 5))

def test_reidout_is_built_in_every_way():
    a,b,c = an_out()
    for o in (ReIDOut(a, b, c), ReIDOut([a, b, c]), ReIDOut(x for x in (a, b, c)), ReIDOut(logits=a, feat=b, emb=c), ReIDOut(a, b, emb=c),
              ReIDOut._make([a, b, c]), type(an_out())([a, b, c])):
        assert o.logits is a and o.feat is b and o.emb is c and len(o)==3
    with pytest.raises(TypeError): ReIDOut(a, b)

@pytest.mark.parametrize('lists', [False,True])
def test_reidout_survives(lists):
    out = an_out()
    if lists: out = ReIDOut([out.logits], [out.feat, out.feat], [out.emb])
    leaf = (lambda o: o.feat[0]) if lists else (lambda o: o.feat)
    leaves,spec = pytree.tree_flatten(out)
    trips = dict(pickle=pickle.loads(pickle.dumps(out)), deepcopy=copy.deepcopy(out), pytree=pytree.tree_unflatten(leaves, spec),
        tree_map=pytree.tree_map(lambda t: t, out), apply=apply(lambda t: t, out), detach=to_detach(out), float=to_float(out),
        device=to_device(out, 'cpu'), cpu=to_cpu(out), replace=out._replace(emb=out.emb))
    for how,o in trips.items(): assert type(o) is ReIDOut and torch.equal(leaf(o), leaf(out)), how
    assert len(leaves) in (1, 4 if lists else 3) # older torch (2.6) keeps a subclass of a named tuple whole

def test_reidout_shows_shapes():
    assert repr(an_out())=='ReIDOut(logits=(2, 3), feat=(2, 4), emb=(2, 5))'
    assert repr(ReIDOut(None, [torch.zeros(2, 1)], 3))=='ReIDOut(logits=None, feat=[(2, 1)], emb=3)'

@pytest.mark.parametrize('head', heads)
def test_heads_return_the_same_in_every_mode(head):
    head,feat = head(6, 4),torch.randn(8, 6)
    for mode in (head.train(), head.eval()):
        out = mode(feat)
        assert type(out) is ReIDOut and out.logits.shape==(8,4) and out.feat is feat and out.emb.shape[0]==8
    assert 'bias' not in [n.rpartition('.')[2] for n,_ in head.named_parameters()]

@pytest.mark.parametrize('head', heads)
def test_cosines_stay_in_range(head):
    head,feat = head(6, 4).train(),torch.randn(64, 6)*100
    if head.classifier.cosine: assert head(feat).logits.abs().max()<=1+1e-6

def test_classifier_start():
    c = Classifier(500, 400)
    assert c.bias is None and abs(c.weight.std().item()-0.01)<2e-4 and abs(c.weight.mean().item())<2e-4

def test_cosine_logits_against_torch():
    emb,w = torch.randn(5, 7),torch.randn(3, 7)
    torch.testing.assert_close(cosine_logits(emb, w), F.cosine_similarity(emb[:,None], w[None], dim=2))

def test_cosine_logits_do_not_lose_digits_under_autocast():
    emb,w = torch.randn(16, 512),torch.randn(10, 512)
    with torch.autocast('cpu', dtype=torch.bfloat16): got = cosine_logits(emb, w)
    assert got.dtype==torch.float32
    torch.testing.assert_close(got, cosine_logits(emb, w))

def test_neck_equals_batchnorm_with_a_frozen_shift():
    neck,bn,x = BNNeck(5),nn.BatchNorm1d(5),torch.randn(8, 5)*3+2
    torch.testing.assert_close(neck(x), bn(x))
    torch.testing.assert_close(neck.eval()(x), bn.eval()(x))
    assert [n for n,_ in neck.named_parameters()]==['weight'] and 'bias' in neck.state_dict() and isinstance(neck, nn.BatchNorm1d)
    neck.requires_grad_(True)
    assert not neck.bias.requires_grad and neck.bias.eq(0).all() and neck.weight.eq(1).all()

def test_neck_takes_a_shift_from_elsewhere():
    neck = BNNeck(3).eval()
    neck.load_state_dict(dict(neck.state_dict(), bias=torch.ones(3)))
    torch.testing.assert_close(neck(torch.zeros(2, 3)), torch.ones(2, 3))

def test_model_normalises_without_touching_its_input():
    model,x = tiny_model(),torch.rand(4, 3, 8, 8)
    before = x.clone()
    mean,std = (torch.tensor(o).view(3, 1, 1) for o in (Preproc.mean, Preproc.std))
    torch.testing.assert_close(model.fmap(x), model.backbone((x-mean)/std))
    assert torch.equal(x, before)

def test_model_modes():
    model,x = tiny_model(),torch.rand(4, 3, 8, 8)
    out = model.train()(x, torch.zeros(4, dtype=torch.long))
    assert type(out) is ReIDOut
    emb = model.eval()(x)
    assert emb.shape==(4,6) and torch.equal(emb, model.outputs(x).emb) and model.fmap(x).shape==(4,6,2,2)

def test_model_joins_the_embeddings_of_parts():
    class Parts(nn.Module):
        def forward(self, feat): return ReIDOut([feat[:,:5]]*2, [feat, feat], [feat[:,:2], feat])
    model = reid_model(Tiny, 5, head=Parts()).eval()
    assert model(torch.rand(3, 3, 8, 8)).shape==(3,8)

def test_model_takes_fastai_images():
    model,x = tiny_model().eval(),torch.rand(2, 3, 8, 8)
    y = model(TensorImage(x))
    assert type(y) is torch.Tensor and torch.equal(y, model(x))

@pytest.mark.parametrize('bad,match', [(torch.rand(2, 1, 8, 8), r'\(2, 1, 8, 8\)'), (torch.rand(3, 8, 8), r'\(3, 8, 8\)'),
    (torch.rand(0, 3, 8, 8), r'\(0, 3, 8, 8\)'), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 'uint8'), (torch.rand(2, 8, 8, 3), r'B,3,H,W')])
def test_model_names_a_bad_batch(bad, match):
    with pytest.raises(ValueError, match=match): tiny_model()(bad)

def test_model_names_a_picture_smaller_than_the_stride():
    with pytest.raises(ValueError, match='at least 16'): reid_model(resnet18, 3)(torch.rand(2, 3, 8, 32))

@pytest.mark.parametrize('kw', [dict(std=(0.2,0.,0.2)), dict(mean=(0.5,0.5))])
def test_model_bad_normalisation(kw):
    with pytest.raises(ValueError, match='expected values in .0,1., one per channel, std above 0'): tiny_model(preproc=Preproc(**kw))

@pytest.mark.parametrize('n', [1,3])
def test_model_of_other_channels(n):
    net = nn.Conv2d(n, 4, 3, stride=2)
    net.n_feat = 4
    model = reid_model(net, 3, preproc=Preproc(mean=(0.5,)*n, std=(0.5,)*n)).eval()
    assert model(torch.rand(2, n, 8, 8)).shape==(2,4)

@pytest.mark.parametrize('kw', [{}, dict(pool=GlobalAvgPool), dict(pool=partial(GeM, p=2., learn=False)), dict(head=LinearHead),
    dict(head=partial(ReductionHead, n_emb=8, cosine=True)), dict(backbone=partial(resnet18, ibn=True)),
    dict(backbone=partial(resnet, 18, 2)), dict(test_on='feat')])
def test_recipe_round_trip(kw):
    kw = dict(dict(backbone=partial(resnet18, last_stride=2)), **kw)
    model = reid_model(n_pids=7, **kw).eval()
    twin = model_from_recipe(json.loads(json.dumps(model.recipe))).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(twin(x), model(x))
    assert twin.recipe==model.recipe and 'mean' not in model.state_dict()

@pytest.mark.parametrize('fn', ['fastreid_nb.toy.toy_reid','fastreid_nb.losses.smooth_cross_entropy','fastreid_nb.data.from_csv'])
def test_recipe_calls_only_what_makes_networks(fn):
    recipe = reid_model(resnet18, 3).recipe
    for bad in (dict(recipe, backbone=dict(fn=fn, kw={})), dict(model=dict(fn=fn, kw={}))):
        with pytest.raises(ValueError, match='makes no part of a network'): model_from_recipe(bad)

def test_backbone_comes_first():
    assert reid_model(resnet18).head.classifier.out_features==0 and reid_model(resnet18, 7).head.classifier.out_features==7
    for make in (reid_model, pcb, mgn, rmgl, haa):
        with pytest.raises(ValueError, match='expected the backbone first'): make(100, resnet18)
    assert reid_model(resnet18).eval()(torch.rand(1, 3, 32, 32)).shape==(1,128)

def test_timm_by_name():
    pytest.importorskip('timm')
    model = reid_model('timm/vit_tiny_patch16_224', 7)
    assert isinstance(model.pool, GlobalAvgPool) and model.mean.flatten().tolist()==pytest.approx(model.backbone.mean)
    twin = model_from_recipe(json.loads(json.dumps(model.recipe)))
    assert twin.state_dict().keys()==model.state_dict().keys()

def test_signed_maps_are_not_clamped():
    class Signed(Tiny): signed_map = True
    assert isinstance(reid_model(Signed, 5).pool, GlobalAvgPool)
    assert isinstance(reid_model(Tiny, 5).pool, GeM) and isinstance(reid_model(Signed, 5, GeM).pool, GeM)

def test_numbers_of_numpy_are_written_down():
    recipe = reid_model(resnet18, np.int64(3), head=partial(ReductionHead, n_emb=np.int64(5), dropout=np.float64(.5))).recipe
    assert recipe['head']['kw']==dict(n_emb=5, dropout=.5) and json.dumps(recipe)

class Told(Tiny):
    "A backbone that says how its images are read"
    mean,std,img_size = (.5,)*3,(.25,)*3,[64,32]

def norm_of(model): return model.mean.flatten().tolist(),model.std.flatten().tolist()

def test_model_has_a_preproc_from_birth():
    assert tiny_model().preproc==Preproc() and reid_model(Told).preproc==Preproc((64,32), mean=(.5,)*3, std=(.25,)*3)
    assert norm_of(reid_model(Told))==([.5]*3,[.25]*3)
    own = Preproc((96,32), 'bilinear', std=(.5,)*3)
    assert reid_model(Told, preproc=own).preproc is own

def test_preproc_is_the_only_home_of_mean_and_std():
    model,x = tiny_model().eval(),torch.rand(2, 3, 8, 8)
    model.preproc = Preproc(mean=(.5,)*3, std=(.25,)*3)
    assert norm_of(model)==([.5]*3,[.25]*3) and not {'mean','std','preproc'} & model.recipe.keys()
    torch.testing.assert_close(model.fmap(x), model.backbone((x-.5)/.25))
    with pytest.raises(ValueError, match='expected values in .0,1., one per channel, std above 0'): model.preproc = Preproc(std=(0.,)*3)
    assert norm_of(model)==([.5]*3,[.25]*3)

def test_preproc_follows_the_model():
    model = tiny_model().double()
    model.preproc = Preproc(mean=(.5,)*3)
    assert model.mean.dtype==torch.float64 and copy.deepcopy(model).preproc==model.preproc
    model.preproc = Preproc(mean=(.5,), std=(.5,))
    assert model.mean.shape==(1,1,1,1)

@pytest.mark.parametrize('make', [lambda: tiny_model(), lambda: pcb(resnet18, n_parts=2), lambda: Ensemble([tiny_model()])])
def test_fields_are_declared(make):
    model = make()
    assert (model.pids,model.threshold,model.origin,model.n_epochs)==([],None,None,0) and model.preproc==Preproc() and hasattr(model, 'recipe')
    assert make().pids is not model.pids

def test_recipe_leaves_preproc_out():
    model = pcb(resnet18, 3, n_parts=2, preproc=Preproc((64,32)))
    assert model.recipe['model']['kw']==dict(backbone=dict(fn='resnet18', kw={}), n_pids=3, n_parts=2)

def test_old_recipes_say_mean_and_std():
    recipe = reid_model(resnet18, 3).recipe|dict(mean=[.5]*3, std=[.25]*3)
    assert norm_of(model_from_recipe(recipe))==([.5]*3,[.25]*3)
    part = dict(model=dict(fn='fastreid_nb.parts.pcb', kw=dict(n_pids=3, backbone=dict(fn='fastreid_nb.backbone.resnet18', kw={}), mean=[.5]*3)))
    assert model_from_recipe(part).preproc==Preproc(mean=(.5,)*3)

def test_old_names_in_recipes(monkeypatch):
    monkeypatch.setitem(rebuild._old_names, 'OldGeM', 'GeM')
    monkeypatch.setitem(rebuild._old_args, 'GeM', dict(power='p'))
    recipe = reid_model(resnet18, 3).recipe|dict(pool=dict(fn='fastreid_nb.pooling.OldGeM', kw=dict(power=4.)))
    assert model_from_recipe(recipe).pool.p.item()==4

def test_recipe_leaves_pretrained_out(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path/'w.pth')
    model = reid_model(partial(resnet18, pretrained=tmp_path/'w.pth'), 3)
    assert model.recipe['backbone']==dict(fn='resnet18', kw={})
    assert model_from_recipe(model.recipe)

def test_recipe_of_a_ready_module_is_none():
    model = tiny_model(pool=GlobalMaxPool())
    assert model.recipe['pool'] is None and model.recipe['backbone']['fn'].endswith('test_heads.Tiny')

@pytest.mark.parametrize('spec,match', [(None, 'does not say'), (dict(fn='os.system', kw={}), 'not part of fastreid_nb'),
    (dict(fn='fastreid_nb.heads.import_module', kw={}), 'no public name'), (dict(fn='fastreid_nb.heads.torch.load', kw={}), 'not part of|no public'),
    (dict(fn='fastreid_nb..heads.GeM', kw={}), 'not part of'), (dict(fn='fastreid_nb.pooling.NoSuch', kw={}), 'no public name'),
    (dict(fn='test_heads.Tiny', kw={}), 'not part of')])
def test_recipe_refuses(spec, match):
    recipe = dict(reid_model(resnet18, 3).recipe, backbone=spec)
    with pytest.raises(ValueError, match=match): model_from_recipe(recipe)

@pytest.mark.parametrize('kw,match', [(dict(backbone='resnet50'), "'resnet50'"), (dict(backbone=lambda: nn.Conv2d(3, 4, 3)), 'n_feat')])
def test_reid_model_bad_pieces(kw, match):
    with pytest.raises(ValueError, match=match): reid_model(n_pids=3, **kw)

@pytest.mark.parametrize('head', heads)
def test_autocast_keeps_features_and_embeddings_precise(head):
    model,x = tiny_model(head=head),torch.rand(4, 3, 8, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert model.fmap(x).dtype==torch.bfloat16
        out = model(x)
        assert out.feat.dtype==out.emb.dtype==model.eval()(x).dtype==torch.float32

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_model_in_another_dtype(dtype):
    model = tiny_model(head=ReductionHead).to(dtype).eval()
    assert model(torch.rand(2, 3, 8, 8, dtype=dtype)).dtype==dtype

def test_model_copies_and_pickles():
    model,x = reid_model(resnet18, 3).eval(),torch.rand(2, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x)) and twin.recipe==model.recipe

def test_every_parameter_learns():
    model = reid_model(resnet18, 4, head=partial(ReductionHead, n_emb=16))
    out,pid = model(torch.rand(8, 3, 32, 32)),torch.arange(4).repeat_interleave(2)
    (CrossEntropy()(out, pid)+TripletLoss(None)(out, pid)).backward()
    assert not [n for n,p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]

@pytest.mark.slow   # tests/test_compiling.py has the two that differ most
@pytest.mark.parametrize('amp', [False,True])
@pytest.mark.parametrize('train', [False,True])
def test_compiles_into_one_graph(train, amp):
    torch._dynamo.reset()
    model = reid_model(resnet18_ibn, 5).train(train)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp): found = torch._dynamo.explain(model)(torch.rand(4, 3, 64, 32))
    assert (found.graph_count,found.graph_break_count)==(1,0), [str(o.reason) for o in found.break_reasons]

def test_loaded_backbone_with_a_new_head_is_rebuilt(tmp_path):
    "The backbone of a file of weights, trained with a head of its own, comes back from its checkpoint"
    from fastreid_nb.train.checkpoint import load_reid, save_reid
    first = reid_model(partial(resnet18, last_stride=2), 5)
    model = reid_model(first.backbone, 3, head=partial(ReductionHead, n_emb=16)).eval()
    save_reid(tmp_path/'m.pt', model)
    again,x = load_reid(tmp_path/'m.pt'),torch.rand(2, 3, 64, 32)
    for k,v in model.state_dict().items(): assert torch.equal(again.state_dict()[k], v), k
    with torch.no_grad(): assert torch.allclose(again(x), model(x), atol=1e-3)
