"Neighbours, query expansion and re-ranking: against tables of all pairs, and the numbers of the published programs"
import json, re
from functools import partial
import numpy as np, pandas as pd, pytest, torch

from fastreid_nb.eval.features import Features, cosine_dist, euclidean_dist, evaluate, sq_euclidean_dist
from fastreid_nb.eval.neighbours import Neighbours
from fastreid_nb.rerank.core import rerank_dist
from fastreid_nb.rerank.expansion import expand_features
from fastreid_nb.rerank.online import OnlineReranker
from golden_files import golden_files, golden_params, missing

dists = [cosine_dist, euclidean_dist, sq_euclidean_dist]

def near(got, want, eps=1e-5):
    "Distances agree within `eps`"
    got,want = (torch.as_tensor(o).double() for o in (got,want))
    assert got.shape==want.shape and (got-want).abs().max()<=eps*max(1, float(want.abs().max())), float((got-want).abs().max())

def arrays(path, pattern):
    "What a golden file holds under names that fit, as (match, array)"
    o = np.load(path)
    found = [(m,o[k]) for k in o.files if (m := re.fullmatch(pattern, k))]
    if not found: missing(f'{path.stem}: {pattern}')
    return o,found

# ---- neighbours

@pytest.mark.parametrize('dist', dists)
@pytest.mark.parametrize('kind', ['far','half','ties','same','zeros','one'])
def test_neighbours_vs_table(dist, kind):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1 if kind=='one' else 300, 12, generator=gen)
    if kind=='far': x += 30
    if kind=='half': x = x.half()
    if kind=='ties': x = torch.cat([x, x.flip(0)])
    if kind=='same': x = x[:1].repeat(900, 1)
    if kind=='zeros': x[::7] = 0
    q = x[::3]
    d = dist(q.double(), x.double())
    if dist is not sq_euclidean_dist: d[d<1e-7] = 0
    k = min(9, len(x))
    nn = Neighbours(x, dist=dist)
    nn.finder.tile = 64 if kind!='same' else 500
    idx,got,most = nn.with_farthest(q, k)
    order = d.sort(dim=1, stable=True)
    near(got, order.values[:,:k], 2e-6)
    near(most, d.amax(1), 1e-4 if kind=='far' else 1e-5)
    near(d.gather(1, idx), order.values[:,:k], 2e-6)
    assert (idx.sort(1).values.diff(dim=1)>0).all()
    if kind=='same': assert (idx==torch.arange(k)).all()
    if kind in ('ties','same'): assert ((got.diff(dim=1)>0) | (idx.diff(dim=1)>0)).all()

def test_faiss_beside_torch():
    "Both in one process, in turn, give the same lists"
    x = torch.randn(1200, 16, generator=torch.Generator().manual_seed(0))
    exact,flat = Neighbours(x),Neighbours(x, 'flat')
    for _ in range(5): assert torch.equal(exact(x[:64], 5)[0], flat(x[:64], 5)[0])
    assert Neighbours(x, 'hnsw').recall(x, 5)>.9

# ---- re-ranking

def plain(x, n_q, k1, k2, lam, dist):
    "The published program, with tables"
    sq = dist(x, x)**2
    sq = sq/sq.amax(0)
    sq = sq.T
    rank,n = sq.sort(dim=1, stable=True).indices,len(x)
    def mutual(i, k): return [j for j in rank[i,:k+1].tolist() if i in rank[j,:k+1].tolist()]
    V = torch.zeros(n, n, dtype=x.dtype)
    for i in range(n):
        core = mutual(i, k1)
        grown = set(core)
        for j in core:
            half = mutual(j, int(np.around(k1/2)))
            if len(set(half) & set(core))>2/3*len(half): grown |= set(half)
        own = sorted(grown)
        V[i,own] = (-sq[i,own]).softmax(0)
    if k2>1: V = V[rank[:,:k2]].mean(1)
    shared = torch.stack([torch.minimum(o, V[n_q:]).sum(1) for o in V[:n_q]])
    return (1-lam)*(1-shared/(2-shared)) + lam*sq[:n_q,n_q:]

@pytest.mark.parametrize('dist', dists)
@pytest.mark.parametrize('k1,k2,lam', [(20,6,.3), (7,8,0), (1,1,.5)])
def test_rerank_vs_tables(dist, k1, k2, lam):
    gen = torch.Generator().manual_seed(k1)
    x = torch.randn(12, 8, generator=gen).repeat(8, 1) + .7*torch.randn(96, 8, generator=gen)
    near(rerank_dist(x[:20], x[20:], k1, k2, lam, dist).matrix(), plain(x.double(), 20, k1, k2, lam, dist))

@pytest.mark.parametrize('path', golden_params('rerank/*.npz'))
def test_golden_rerank(path):
    if path is None: missing('rerank/*.npz')
    o,found = arrays(path, r'(euclid|cosine)_k1_(\d+)_k2_(\d+)_l([\d.]+)')
    for m,want in found:
        dist = dict(euclid=euclidean_dist, cosine=cosine_dist)[m[1]]
        res = rerank_dist(o['query'], o['gallery'], int(m[2]), int(m[3]), float(m[4]), dist).matrix()
        near(res, want)

@pytest.mark.parametrize('path', golden_params('jaccard/*.npz'))
def test_golden_jaccard(path):
    if path is None: missing('jaccard/*.npz')
    o,found = arrays(path, r'(fp16_)?k1_(\d+)_k2_(\d+)')
    for m,want in found:
        res = rerank_dist(o['query'], o['gallery'], int(m[2]), int(m[3]), 0, sq_euclidean_dist, 'fastreid').matrix()
        near(res, want, 5e-3 if m[1] else 1e-5)
    whole = np.concatenate([o['query'],o['gallery']])
    for m,want in arrays(path, r'k1_(\d+)_k2_(\d+)_full_NxN')[1]:
        one = rerank_dist(whole[:0], whole, int(m[1]), int(m[2]), 0, sq_euclidean_dist, 'fastreid')
        V = torch.tensor(one.V.toarray())
        shared = torch.stack([torch.minimum(row, V).sum(1) for row in V])
        near(1-shared/(2-shared), want)
    for m,want in arrays(path, r'evaluator_mix_l([\d.]+)_cosine')[1]:
        q,g,lam = torch.tensor(o['query']),torch.tensor(o['gallery']),float(m[1])
        near((1-lam)*rerank_dist(q, g, 20, 6, 0, sq_euclidean_dist, 'fastreid').matrix() + lam*cosine_dist(q, g), want)

# ---- query expansion

def features(x): return Features(x, pd.DataFrame(dict(pid=np.arange(len(x)))))

@pytest.mark.parametrize('path', golden_params('aqe/*.npz'))
def test_golden_aqe(path):
    if path is None: missing('aqe/*.npz')
    o,found = arrays(path, r't(\d+)_k(\d+)_a([\d.]+)_query')
    q,g = (features(o[k]) for k in ('query','gallery'))
    for m,want in found:
        res = expand_features(q, g, int(m[2]), float(m[3]), int(m[1]), 'all')
        near(res[0].emb, want)
        near(res[1].emb, o[m[0].replace('query', 'gallery')])

# ---- both in an evaluation

def combinations():
    "Every combination of metric, expansion and re-ranking of every golden evaluator"
    found = [(p,k) for p in golden_files('evaluator/*.json') for k in json.loads(p.read_text())]
    return [pytest.param(*o, id=o[1]) for o in found] or [pytest.param(None, None, id='none')]

@pytest.mark.parametrize('path,name', combinations())
def test_golden_evaluator(path, name):
    "The complete evaluator of the reference: ranks exactly, mAP and mINP to 1e-5"
    m = re.fullmatch(r'(cosine|euclidean)_aqe([01])_rerank([01])', name or '')
    if not m: missing('evaluator/*.json')
    want,o = json.loads(path.read_text())[name],np.load(path.with_name('inputs.npz'))
    q,g = (Features(o[k], pd.DataFrame(dict(pid=o[f'{k[0]}_pids'], camid=o[f'{k[0]}_camids']))) for k in ('query','gallery'))
    dist = dict(cosine=cosine_dist, euclidean=sq_euclidean_dist)[m[1]]
    qe = m[2]=='1' and partial(expand_features, what='all')
    res = evaluate(q, g, dist, 'market', qe=qe, rerank=m[3]=='1' and partial(rerank_dist, variant='fastreid'))
    for k in (1,5,10): assert abs(100*res.rank(k)-want[f'Rank-{k}'])<1e-4
    assert abs(100*res.mAP-want['mAP'])<1e-3 and abs(100*res.mINP-want['mINP'])<1e-3

def test_steps_of_an_evaluation():
    "True stands for the functions of the library, and the result names them"
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(12, 8, generator=gen).repeat(6, 1) + .8*torch.randn(72, 8, generator=gen)
    df = pd.DataFrame(dict(pid=np.tile(np.arange(12), 6), camid=np.arange(72)//12))
    q,g = Features(x[:24], df[:24]),Features(x[24:], df[24:])
    both = evaluate(q, g, qe=True, rerank=True, max_rank=5)
    q1,g1 = expand_features(q, g)
    want = evaluate(q1, g1, rerank=lambda q,g,dist,device: rerank_dist(q, g).matrix())
    assert np.array_equal(both.ap, want.ap) and both.metric=='cosine, expanded, re-ranked'
    assert np.isfinite(both.top_dist).all()

# ---- what cannot be

@pytest.mark.parametrize('change,text', [(dict(k1=0),'k1=0'), (dict(k1=30),'k1=30 for 30 images'), (dict(k1=5, k2=7),'k2=7: expected 1 to 6'),
    (dict(k2=0),'k2=0'), (dict(lam=-.1),'lam=-0.1'), (dict(lam=float('nan')),'lam=nan'), (dict(variant='mine'),"variant='mine'"),
    (dict(source='ivfpq'),'1,000 or more'), (dict(dist=torch.cdist),'by one of')])
def test_bad_numbers(change, text):
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=re.escape(text)): rerank_dist(x[:5], x[5:], **change)

def test_bad_features():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    holed,large = x.clone(),x.clone()
    holed[3],large[3] = float('nan'),1e9
    for bad in (holed,large.half()):
        with pytest.raises(ValueError, match='NaN or infinity, in row 3'): rerank_dist(bad[:5], bad[5:], 5, 2)
    with pytest.raises(ValueError, match='of one width'): rerank_dist(x[:5,:3], x[5:])
    with pytest.raises(ValueError, match='gallery image or more'): rerank_dist(x, x[:0])
    import faiss
    index = faiss.IndexFlatL2(4)
    index.add(x[:7].numpy())
    with pytest.raises(ValueError, match='an index of 7 vectors of width 4'): rerank_dist(x[:5], x[5:], 5, 2, source=index)
    assert rerank_dist(x[:0], x, 5, 2).matrix().shape==(0,30)
    for variant in ('published','fastreid'):
        d = rerank_dist(x[:1].repeat(6, 1), x[:1].repeat(50, 1), 5, 2, variant=variant).matrix()
        assert d.isfinite().all()

# ---- online

@pytest.mark.parametrize('variant', ['published','fastreid'])
@pytest.mark.parametrize('kind', ['usual','copies','far','short'])
def test_online_is_the_batch_of_one(kind, variant):
    "For every distance, with copies of gallery images and queries far away; afterwards the gallery is what it was"
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(20, 8, generator=gen).repeat(9, 1) + .6*torch.randn(180, 8, generator=gen)
    x,q = x[6:],x[:6]
    if kind=='copies': q = torch.cat([x[:3], q[:3]])
    if kind=='far': q = 4*q+3
    k1,k2 = (2,1) if kind=='short' else (9,3)
    for dist in dists:
        online = OnlineReranker(x, k1, k2, .3, dist, variant)
        got = online(q)
        want = torch.cat([rerank_dist(o[None], x, k1, k2, .3, dist, variant).matrix() for o in q])
        near(got, want, 1e-6 if dist is cosine_dist else 5e-6)
        assert torch.equal(online(q.flip(0)).flip(0), got)
