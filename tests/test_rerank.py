"Neighbours, query expansion and re-ranking: against tables of all pairs, and the numbers of the published programs"
import re
import numpy as np, pandas as pd, pytest, torch

from fastreid_nb.eval.features import Features, cosine_dist, euclidean_dist, sq_euclidean_dist
from fastreid_nb.eval.neighbours import Neighbours
from fastreid_nb.rerank.core import rerank_dist
from fastreid_nb.rerank.expansion import expand_features
from golden_files import golden_params, missing

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
    if kind=='same': x = x[:1].repeat(40, 1)
    if kind=='zeros': x[::7] = 0
    q = x[::3]
    d = dist(q.double(), x.double())
    if dist is not sq_euclidean_dist: d[d<1e-7] = 0
    k = min(9, len(x))
    nn = Neighbours(x, dist=dist)
    nn.finder.tile = 64
    idx,got,most = nn.with_farthest(q, k)
    order = d.sort(dim=1, stable=True)
    near(got, order.values[:,:k], 2e-6)
    near(most, d.amax(1), 1e-4 if kind=='far' else 1e-5)
    near(d.gather(1, idx), order.values[:,:k], 2e-6)
    assert (idx.sort(1).values.diff(dim=1)>0).all()
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
        near(np.stack([1-s/(2-s) for s in _all_overlaps(one)]), want)

def _all_overlaps(res):
    V = torch.tensor(res.V.toarray())
    return [torch.minimum(row, V).sum(1).numpy() for row in V]

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
