"Partial bodies: reconstruction against fast-reid's numbers and pair by pair, the foreground head, visible parts, hidden queries"
import json
from dataclasses import replace
from functools import partial
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from PIL import Image
from torch import nn
from fastreid_nb.backbone.resnet import resnet
from fastreid_nb.backbone.vit import vit
from fastreid_nb.data.images import read_image
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.data.toy import toy_camera, toy_person, toy_photo, toy_reid
from fastreid_nb.eval.core import rank_dist, sum_dists
from fastreid_nb.eval.features import Features, dist_rows
from fastreid_nb.eval.fusion import Calibrator, fuse_dists
from fastreid_nb.eval.verification import roc_dist
from fastreid_nb.heads.core import BNNeckHead
from fastreid_nb.heads.model import ReIDModel, reid_model
from fastreid_nb.heads.parts import mgn, pcb
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.partial_dsr import core
from fastreid_nb.partial_dsr.core import LocalFeatures, dsr_dist, embed_maps, fit_fusion, reconstruct, spatial_pyramid, weight_on_test_labels
from fastreid_nb.partial_dsr.foreground import ForegroundHead
from fastreid_nb.partial_dsr.scale import PartialFeatures, _own_shape, embed_partial, scale_dist, window_dist
from fastreid_nb.partial_dsr.visible import VisibilityLoss, part_dist, visible_parts
from fastreid_nb.pooling.core import GlobalAvgPool
from golden_files import close, golden_params, missing

def features(o, side):
    "Queries 'q' or gallery 'g' of a golden file"
    name = dict(q='query', g='gallery')[side]
    df = pd.DataFrame(dict(pid=o[f'{side}_pids'], camid=o[f'{side}_camids']))
    return LocalFeatures(o[f'{name}_feature'], o[f'{name}_maps'], df, 'market', o[f'{name}_scores'])

# ---- fast-reid's numbers

@pytest.mark.parametrize('path', golden_params('dsr/*.npz'))
def test_golden_distances(path):
    "Within 1e-4 of the largest value of the distances in 64 bits, and the same pairs are left out"
    if path is None: missing('dsr')
    o = np.load(path)
    got = dsr_dist(features(o, 'q'), features(o, 'g'), int(o['topk']), float(o['kappa']), far=100.).matrix()
    want = o['dsr_dist_f64']
    inside = want<100
    assert ((got<100).numpy()==inside).all()
    close(got.numpy()[inside], want[inside], 1e-5)

@pytest.mark.parametrize('path', golden_params('dsr/*.npz'))
def test_golden_head(path):
    "Scores of columns, the foreground feature and the embedding"
    if path is None: missing('dsr')
    o = {k:torch.from_numpy(np.asarray(v)) for k,v in np.load(path).items()}
    head = ForegroundHead(o['query_maps'].shape[1], 3).eval()
    head.unit.load_state_dict(dict(weight=o['mask_weight'], bias=o['mask_bias']))
    bn = {k:o[f'bn_{k}'] for k in ('weight','running_mean','running_var')}
    head.front.neck.load_state_dict(bn, strict=False)
    with torch.no_grad(): out,w = head(o['query_maps']),head.column_weights(o['query_maps'])
    close(w, o['query_mask_unnormalised'])
    close(w/w.sum(1, keepdim=True), o['query_scores'])
    close(out.feat[1], o['query_foreground_raw'])
    close(out.emb[0], o['query_feature'], 1e-4)
    assert [o.shape[1] for o in out.logits]==[3,3]
    sizes = [((o['query_maps'].shape[2]-s)//2+1)*((o['query_maps'].shape[3]-s)//2+1) for s in (2,4,6,8)]
    assert sizes==o['pool_sizes'].tolist()

@pytest.mark.parametrize('path', golden_params('dsr/*.json'))
def test_golden_scores(path):
    "The evaluator's scores from its own distances in 32 bits, with the weight it chose on the test labels"
    if path is None: missing('dsr')
    o = np.load(path.with_name(path.name.replace('_results.json', '.npz')))
    q,g = features(o, 'q'),features(o, 'g')
    local = lambda pos: torch.from_numpy(o['dsr_dist'])[pos]
    weight = weight_on_test_labels(q, g, local)
    scores = dict(dsr0=0, dsr1=weight)
    for name,want in json.loads(path.read_text()).items():
        if name not in scores: continue
        res = rank_dist(sum_dists([dist_rows(q, g),local], [1-scores[name],scores[name]]), q, g)
        got = {'Rank-1':res.rank(1), 'Rank-5':res.rank(5), 'Rank-10':res.rank(10), 'mAP':res.mAP, 'mINP':res.mINP}
        for k,v in got.items(): assert abs(100*v-want[k])<1e-3, (name, k, 100*v, want[k])

# ---- the distance

def maps(n, c, size, seed): return torch.randn(n, c, *size, generator=torch.Generator().manual_seed(seed)).relu()

def slowly(q, g, sizes, weights=None):
    q,g = (spatial_pyramid(o, sizes) for o in (q,g))
    w = torch.ones(len(q), q.shape[2]) if weights is None else weights
    w = w/w.sum(1, keepdim=True)
    return torch.stack([torch.stack([(w[i]*reconstruct(a, b).residual).sum() for b in g]) for i,a in enumerate(q)])

@pytest.mark.parametrize('c', [1,3,9,40])
@pytest.mark.parametrize('sizes', [(1,),(2,3)])
def test_pair_by_pair(c, sizes, monkeypatch):
    "Any channels and sizes, blocks of one image; an image of the gallery as query has residuals near 0"
    q,g = maps(4, c, (5,4), 0),maps(9, c, (7,4), 1)
    q[0] = g[3,:,2:]
    w = torch.rand(4, spatial_pyramid(q, sizes).shape[2], generator=torch.Generator().manual_seed(2))
    want = slowly(q, g, sizes, w)
    close(dsr_dist(q, g, sizes=sizes, weights=w).matrix(), want, 2e-5)
    monkeypatch.setattr(core._LocalScorer, 'block', lambda self: 1)
    close(dsr_dist(q, g, sizes=sizes, weights=w).matrix(), want, 2e-5)

def test_gallery_order_does_not_matter():
    q,g = maps(3, 8, (6,4), 0),maps(20, 8, (6,4), 1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    a,b = (dsr_dist(q, o, k=5, sizes=(2,)).matrix() for o in (g,g[order]))
    close(a[:,order], b, 1e-6)
    assert ((a<1).sum(1)==5).all() and a.isfinite().all()

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
def test_types(dtype):
    q,g = maps(3, 8, (6,4), 0),maps(6, 8, (6,4), 1)
    close(dsr_dist(q.to(dtype), g.to(dtype), sizes=(2,)).matrix(), dsr_dist(q, g, sizes=(2,)).matrix(), 2e-2)

def test_exact_for_copies():
    "More channels than columns: the short way is too inexact for residuals near 0, so they are computed the long way"
    g = maps(5, 300, (8,4), 0)
    d = dsr_dist(g, g, sizes=(2,)).matrix()
    close(d, slowly(g, g, (2,)), 2e-5)
    assert (d.diag()<2e-3).all()

@pytest.mark.cuda
def test_on_cuda():
    q,g = maps(3, 40, (6,4), 0),maps(9, 40, (6,4), 1)
    close(dsr_dist(q, g, sizes=(2,), device='cuda').matrix().cpu(), dsr_dist(q, g, sizes=(2,)).matrix(), 1e-4)

def held(seed, n=12):
    "Partial queries and whole gallery of `n` people, as maps whose rows are the people's own"
    gen = torch.Generator().manual_seed(seed)
    people = torch.rand(n, 16, 8, 4, generator=gen)
    def side(cam):
        df = pd.DataFrame(dict(pid=range(n), camid=cam))
        return people+.4*torch.rand(n, 16, 8, 4, generator=gen),df
    q,g = side(0),side(1)
    return LocalFeatures(None, q[0][:,:,:5], q[1], 'market'),LocalFeatures(None, *g, 'market')

def test_fusion():
    "What is learnt from some people is a distance for others, and no worse than the global one"
    make = lambda q,g: dsr_dist(q, g, sizes=(1,), stride=1)
    q,g = held(1)
    alone = rank_dist(dist_rows(q, g), q, g).mAP
    for how in ('calibrated','weight'):
        res = rank_dist(fit_fusion(*held(0), make, how)(q, g), q, g)
        assert alone<=res.mAP<=1

# ---- visible parts

def test_parts_by_loop():
    gen = torch.Generator().manual_seed(0)
    q,g = (torch.cat([torch.randn(n, 12, generator=gen),torch.rand(n, 3, generator=gen)], 1) for n in (4,5))
    d = part_dist(q, g, 3)
    for i,j in np.ndindex(4, 5):
        v = q[i,12:]*g[j,12:]
        cos = torch.cosine_similarity(q[i,:12].view(3, 4), g[j,:12].view(3, 4))
        assert abs((v*(1-cos)).sum()/v.sum()-d[i,j])<1e-5
    for bad in (q[:,:5],q[:,:13]):
        with pytest.raises(ValueError, match='expected 3 parts'): part_dist(bad, bad, 3)

@pytest.mark.parametrize('make,n_parts', [(partial(pcb, n_parts=4), 4), (mgn, 8)])
def test_visible_parts(make, n_parts):
    "Each part model gives its parts and then their visibilities, and is trained with its loss"
    torch.manual_seed(0)
    model = visible_parts(partial(make, partial(resnet, variant=18), n_emb=8), 4)
    x,pid = torch.randn(6, 3, 128, 32),torch.tensor([0,0,1,1,2,3])
    loss = ReIDLoss(CrossEntropy(), VisibilityLoss(model))
    total = loss(model(x), pid)
    total.backward()
    assert total.isfinite() and model.rows.weight.grad.abs().sum()>0
    emb = model.eval()(x)
    assert emb.shape==(6,8*n_parts+n_parts) and part_dist(emb, emb, n_parts).diag().abs().max()<1e-5

# ---- queries at their own scale

class Cells(nn.Module):
    "Means of cells of 8 × 8 pixels and of their squares"
    n_feat = 6
    def forward(self, x): return F.avg_pool2d(torch.cat([x, x**2], 1), 8)

@pytest.fixture(scope='module')
def cut(tmp_path_factory):
    "A model, the gallery of a toy set, and queries of three sizes in turn"
    made = [toy_reid(tmp_path_factory.mktemp('cut'), n_ids=8, test_frac=.7, size=(64,32), occlusion=0, progress=False,
        **(dict(hidden=h, hidden_by='cut') if h else {})) for h in (0,.3,.6)]
    model = ReIDModel(Cells(), GlobalAvgPool(), BNNeckHead(6, 0), Preproc((64,32))).eval()
    paths = [made[i%3].query.path[i] for i in range(len(made[0].query))]
    for i in (1,3): Image.open(made[0].query.path[i]).crop((0,0,23,64)).save(paths[i])
    df = made[0].query.assign(path=paths).set_index(pd.Index(range(100, 100-len(paths), -1)))
    return model,embed_maps(model, made[0].gallery, num_workers=0),embed_partial(model, df, num_workers=0)

@pytest.mark.parametrize('image,size,grid,want', [((128,64),(128,64),(8,4),(8,4)), ((64,64),(128,64),(8,4),(4,4)), ((1000,100),(128,64),(8,4),(8,2)),
    ((1,1),(256,128),(16,8),(8,8)), ((3,2000),(256,128),(16,8),(2,8)), ((224,224),(224,224),(7,7),(7,7)), ((100,200),(64,64),(1,1),(1,1))])
def test_own_shapes(image, size, grid, want): assert _own_shape(image, size, grid)==want

def test_own_scale_against_loops(cut):
    "Every query alone, its windows cut out of the gallery's maps by hand"
    model,g,q = cut
    assert sorted(tuple(o.maps.shape[2:]) for _,o in q.groups)==[(3,4),(6,4),(8,3),(8,4)]
    d = scale_dist(q, g, partial(window_dist, model=model))(torch.arange(len(q)))
    own = scale_dist(q, g, dsr_dist, sizes=(1,2), stride=1)(torch.arange(len(q)))
    for i,path in enumerate(q.df.path):
        x = read_image(path)
        size = _own_shape(x.shape[1:], (64,32), (8,4))
        fmap = model.fmap(replace(model.preproc, size=(8*size[0],8*size[1])).resize(x)[None]/255)
        emb = lambda m: F.normalize(model.head(model.pool(m)).emb, dim=1)
        places = [(i,j) for i in range(9-size[0]) for j in range(5-size[1])]
        with torch.no_grad(): want = torch.stack([1-emb(fmap)@emb(g.maps[:,:,i:i+size[0],j:j+size[1]].float()).T for i,j in places]).amin(0)[0]
        torch.testing.assert_close(d[i], want, atol=2e-3, rtol=0)
        alone = dsr_dist(LocalFeatures(q.emb[i:i+1], fmap), g, sizes=(1,2), stride=1).matrix()[0]
        torch.testing.assert_close(own[i], alone, atol=2e-3, rtol=1e-3)

def test_own_scale_in_any_order(cut):
    model,g,q = cut
    d = scale_dist(q, g, partial(window_dist, model=model, bs=3))
    pos = torch.randperm(len(q), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(d(pos), d(torch.arange(len(q)))[pos])
    assert d(pos[:0]).shape==(0,len(g))

def test_gate(cut):
    "Only the images that the gate ranks first have a local distance, and the others keep its order behind them"
    _,g,q = cut
    rows,own = q.groups[0]
    own = LocalFeatures(own.emb, own.maps)
    other = torch.rand(len(own), len(g), generator=torch.Generator().manual_seed(3))
    whole,gated = (dsr_dist(own, g, sizes=(1,2), stride=1, **o).matrix() for o in (dict(k=len(g)), dict(k=3, gate=lambda pos: other[pos])))
    near = other.argsort(1)[:,:3]
    torch.testing.assert_close(gated.gather(1, near), whole.gather(1, near))
    far = other.argsort(1)[:,3:]
    assert gated.gather(1, far).min()>=1 and torch.equal(gated.gather(1, far).argsort(1), torch.arange(far.shape[1]).expand(far.shape))
    with pytest.raises(ValueError, match='the gate gives .1, 2. for one query: expected its distances'): dsr_dist(own, g, sizes=(1,2), gate=lambda pos: other[pos,:2])

def test_fusion_of_several(cut):
    model,g,q = cut
    makes = [partial(scale_dist, make=o) for o in (partial(window_dist, model=model), partial(dsr_dist, sizes=(1,2), stride=1))]
    fused = fit_fusion(q, g, makes, protocol='market')
    dists = [dist_rows(q, g),*(o(q, g) for o in makes)]
    by_hand = [Calibrator.fit(r, prior=r.n_genuine/(r.n_genuine+r.n_impostor)) for r in (roc_dist(o, q, g, 'market') for o in dists)]
    pos = torch.arange(4)
    torch.testing.assert_close(fused(q, g)(pos), fuse_dists(dists, by_hand)(pos))
    torch.testing.assert_close(fused(q, g, *dists[1:])(pos), fuse_dists(dists, by_hand)(pos))
    with pytest.raises(ValueError, match='2 local distances'): fit_fusion(q, g, makes, 'weight', 'market')
    with pytest.raises(ValueError, match='no local distance'): fit_fusion(q, g, [], protocol='market')

def test_saved_and_read_back(cut, tmp_path):
    "Distances of what was saved are the same; a file of one kind is no file of another"
    model,g,q = cut
    g2,q2 = LocalFeatures.load(g.save(tmp_path/'g.pt')),PartialFeatures.load(q.save(tmp_path/'q.pt'))
    for make in (dsr_dist, partial(window_dist, model=model)):
        both = [scale_dist(a, b, make)(torch.arange(len(q))) for a,b in ((q,g), (q2,g2))]
        assert torch.equal(*both)
    weighted = LocalFeatures(None, torch.rand(3, 2, 4, 4), weights=torch.rand(3, 5))
    torch.testing.assert_close(LocalFeatures.load(weighted.save(tmp_path/'w.pt')).weights, weighted.weights)
    pd.testing.assert_frame_equal(q2.df, q.df)
    with pytest.raises(ValueError, match='holds LocalFeatures: expected a file written by `Features.save`'): Features.load(tmp_path/'g.pt')
    with pytest.raises(ValueError, match='holds PartialFeatures: expected a file written by `LocalFeatures.save`'): LocalFeatures.load(tmp_path/'q.pt')
    with pytest.raises(ValueError, match='holds Features'): PartialFeatures.load(Features(q.emb, q.df).save(tmp_path/'f.pt'))

def test_bad_own_scale(cut, tmp_path):
    model,g,q = cut
    with pytest.raises(ValueError, match='expected those of embed_partial'): scale_dist(g, g)
    with pytest.raises(ValueError, match='do not fit gallery maps'): window_dist(g, q.groups[-1][1], model)
    with pytest.raises(ValueError, match='each row in one group'): PartialFeatures(q.emb, q.groups[1:], q.df)
    with pytest.raises(ValueError, match='more rows or fewer'): PartialFeatures(q.emb, [(q.groups[0][0],q.groups[1][1]),*((o,f) for o,f in q.groups[1:])], q.df)
    with pytest.raises(ValueError, match='go to `scale_dist`'): dsr_dist(q, g)
    with pytest.raises(ValueError, match='have no maps'): window_dist(q.groups[0][1], q, model)
    with pytest.raises(ValueError, match='channels'): window_dist(q.groups[0][1].maps[:,:5], g, model)
    with pytest.raises(ValueError, match='NaN'): window_dist(q.groups[0][1].maps*float('nan'), g, model)
    with pytest.raises(ValueError, match='has no `.fmap`'): embed_partial(nn.Identity(), q.df, model.preproc)
    with pytest.raises(ValueError, match='expected a ReIDModel'): window_dist(q.groups[0][1], g, nn.Identity())
    for tokens,text in (('cls','one position'),('patches','size')):
        fixed = reid_model(partial(vit, 'deit_tiny', (64,32), tokens=tokens), preproc=Preproc((64,32)))
        with pytest.raises(ValueError, match=text): embed_partial(fixed, q.df, num_workers=0)
    (tmp_path/'bad.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match='bad.png'): embed_partial(model, pd.DataFrame(dict(path=[q.df.path[0],str(tmp_path/'bad.png')], pid=[0,1], camid=0)), num_workers=0)

# ---- hidden queries and dark clothes

@pytest.mark.parametrize('by', ['wall','side','stranger'])
def test_hidden_share(by):
    "A wall of 40 % changes 40 % of the rows and nothing else; the other ways change more than the noise"
    p,cam = toy_person(np.random.default_rng(0)),toy_camera(np.random.default_rng(0))|dict(blur=0)
    shot = lambda **kw: np.asarray(toy_photo(p, cam, np.random.default_rng(1), 0, (100,50), **kw), int)
    diff = np.abs(shot()-shot(hidden=.4, hidden_by=by)).sum(2)
    assert diff.mean()>10
    if by=='wall': assert not diff[:58].any() and diff[62:].any(1).all()
    if by in ('side','stranger'): assert .35<(diff.any(0)).mean()<.48

def test_a_cut_image_is_less_tall():
    p,cam = toy_person(np.random.default_rng(0)),toy_camera(np.random.default_rng(0))|dict(blur=1.5,noise=0)
    whole,cut = (np.asarray(toy_photo(p, cam, np.random.default_rng(1), 0, (100,50), **kw), int) for kw in ({},dict(hidden=.4, hidden_by='cut')))
    assert cut.shape==(60,50,3) and np.abs(cut[:50]-whole[:50]).mean()<1.5<np.abs(cut-whole[40:]).mean()

def test_plain_sets_stay_what_they_are(tmp_path):
    "The folder of a set without the knobs has the name it always had"
    toy_reid(tmp_path, n_ids=4, size=(16,8), progress=False)
    assert [o.name for o in tmp_path.iterdir()]==['toy_reid_4x4x2_15ba01c8']
