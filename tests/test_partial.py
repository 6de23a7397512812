"Partial bodies: reconstruction against fast-reid's numbers and pair by pair, the foreground head, visible parts, hidden queries"
import json
import numpy as np, pandas as pd, pytest, torch
from fastreid_nb.data.toy import toy_camera, toy_person, toy_photo, toy_reid
from fastreid_nb.eval.core import rank_dist, sum_dists
from fastreid_nb.eval.features import dist_rows
from fastreid_nb.partial_dsr import core
from fastreid_nb.partial_dsr.core import LocalFeatures, dsr_dist, fit_fusion, reconstruct, spatial_pyramid, weight_on_test_labels
from fastreid_nb.partial_dsr.foreground import ForegroundHead
from fastreid_nb.partial_dsr.visible import part_dist
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
    p,cam = toy_person(np.random.default_rng(0)),toy_camera(np.random.default_rng(0))|dict(blur=0,noise=0)
    whole,cut = (np.asarray(toy_photo(p, cam, np.random.default_rng(1), 0, (100,50), **kw), int) for kw in ({},dict(hidden=.4, hidden_by='cut')))
    assert cut.shape==(60,50,3) and np.abs(cut[:58]-whole[:58]).max()<=2

def test_plain_sets_stay_what_they_are(tmp_path):
    "The folder of a set without the knobs has the name it always had"
    toy_reid(tmp_path, n_ids=4, size=(16,8), progress=False)
    assert [o.name for o in tmp_path.iterdir()]==['toy_reid_4x4x2_15ba01c8']
