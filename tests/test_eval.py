"Scores, distances, features, ranked lists, inference and floors: against a loop, against fastai, and the reference implementation"
import json, os
from functools import partial
from pathlib import Path

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner
from matplotlib.colors import to_hex
from PIL import Image
from torch import nn

from fastreid_nb.data.preproc import Preproc
from fastreid_nb.augment.loaders import plain_dl, reid_dls
from fastreid_nb.data.core import Protocol, ReIDData, protocols
from fastreid_nb.eval import core, inference
from fastreid_nb.eval.core import ReIDResult, rank_dist, sum_dists
from fastreid_nb.eval.features import Features, cosine_dist, euclidean_dist, evaluate, sq_euclidean_dist
from fastreid_nb.eval.floors import color_hist, features_from, floor_scores, raw_pixels
from fastreid_nb.heads.model import reid_model
import fastreid_nb.data.subsets   # adds `rename`; chkstyle: ignore
from fastreid_nb.heads.model import eval_mode
from fastreid_nb.eval.score import ScoreReID
from fastreid_nb.eval.inference import embed, embed_batches, evaluate_data, evaluate_sets
from fastreid_nb.eval.ranklist import pick_queries
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.train.core import reid_learner
from golden_files import golden_files, missing

# ---- a judge that is slow and simple

def judge(dist, q, g, protocol):
    "(ap, inp, first match) of every query, None where there is no match; a plain loop"
    src = {'market':'camid', 'cross_view':'camid', 'tracklet':'trackid'}.get(protocol, 'path')
    q,g = q.to_dict('records'),g.to_dict('records')
    res = []
    for d,o in zip(dist.tolist(), q):
        def is_gone(c): return (c['pid']==o['pid'] or protocol=='cross_view') and src in c and c[src]==o[src]
        kept = [(x,j) for j,x in enumerate(d) if not is_gone(g[j])]
        ranks = [r for r,(_,j) in enumerate(sorted(kept), 1) if g[j]['pid']==o['pid']]
        res.append(None if not ranks else (np.mean([(i+1)/r for i,r in enumerate(ranks)]), len(ranks)/ranks[-1], ranks[0]))
    return res

def tables(rng, nq=40, ng=120, n_ids=15, n_cams=3, distractors=.1):
    "Random query and gallery tables; some queries have no match"
    q,g = (pd.DataFrame(dict(pid=rng.integers(0, n_ids, n), camid=rng.integers(0, n_cams, n), path=[f'{k}{i}.jpg' for i in range(n)]))
        for k,n in (('q',nq), ('g',ng)))
    q.loc[rng.random(nq)<.1, 'pid'] = n_ids+1
    g.loc[rng.random(ng)<distractors, 'pid'] = -1
    return q,g

def agree(res, slow, max_rank=50, eps=1e-12):
    "Does a result say what the judge says?"
    assert res.used.tolist()==[o is not None for o in slow]
    want = np.array([o for o in slow if o])
    got = np.stack([res.ap,res.inp,res.first_match], 1)
    assert np.allclose(got[res.used], want, rtol=0, atol=eps)
    assert np.isnan(got[~res.used,:2]).all() and (got[~res.used,2]==0).all()
    assert np.allclose([res.mAP,res.mINP], want[:,:2].mean(0))
    assert np.allclose(res.cmc, [(want[:,2]<=k).mean() for k in range(1, max_rank+1)])

# ---- scores

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('protocol', ['market','no_camera','cross_view','tracklet'])
@pytest.mark.parametrize('levels', [None,12,1]) # how many different distances there are: ties
def test_scores_vs_loop(seed, protocol, levels):
    rng = np.random.default_rng(seed)
    q,g = tables(rng, n_cams=2+seed)
    if protocol=='no_camera': q.loc[:9,'path'] = g.path[:10]
    if protocol=='tracklet': q,g = (o.assign(trackid=rng.integers(0, 8, len(o))) for o in (q,g))
    dist = rng.random((len(q),len(g)))
    if levels: dist = (dist*levels).astype(int)/levels
    agree(rank_dist(dist, q, g, protocol), judge(dist, q, g, protocol))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_scores_dtypes(dtype):
    rng = np.random.default_rng(0)
    q,g = tables(rng)
    dist = torch.tensor(rng.random((len(q),len(g)))*100).to(dtype)
    agree(rank_dist(dist, q, g), judge(dist, q, g, 'market'))

@pytest.mark.parametrize('ng,max_rank,chunk', [(120,50,None), (120,50,1), (120,50,7), (120,500,1000), (20,50,3), (1,5,1)])
def test_scores_sizes(ng, max_rank, chunk):
    "Chunks change nothing, and the curve is as long as asked for"
    rng = np.random.default_rng(1)
    q,g = tables(rng, ng=ng, distractors=0)
    g.loc[0,['pid','camid']] = q.pid[0],q.camid[0]+1
    dist = rng.random((len(q),ng))
    res = rank_dist(dist, q, g, 'market', max_rank, chunk)
    agree(res, judge(dist, q, g, 'market'), max_rank)
    assert len(res.cmc)==max_rank and res.top.shape==(len(q),min(ng,max_rank))

def test_scores_permutations():
    "Without ties the order of the gallery does not matter, and the order of the queries only orders the scores"
    rng = np.random.default_rng(2)
    q,g = tables(rng)
    dist = rng.random((len(q),len(g)))
    pq,pg = rng.permutation(len(q)),rng.permutation(len(g))
    a,b = rank_dist(dist, q, g),rank_dist(dist[pq][:,pg], q.iloc[pq], g.iloc[pg])
    assert np.array_equal(a.ap[pq], b.ap, equal_nan=True) and np.array_equal(a.first_match[pq], b.first_match)
    assert np.array_equal(a.top[pq], np.where(b.top<0, -1, pg[b.top]))

def test_duplicate_gallery():
    "Copies of every gallery picture keep a perfect list perfect and never improve rank-1"
    rng = np.random.default_rng(3)
    q,g = tables(rng)
    dist = rng.random((len(q),len(g)))
    one,two = rank_dist(dist, q, g),rank_dist(np.hstack([dist,dist]), q, pd.concat([g,g]))
    assert one.rank(1)==two.rank(1) and two.n_removed==2*one.n_removed
    right = (q.pid.to_numpy()[:,None]!=g.pid.to_numpy()).astype(float)
    assert rank_dist(np.hstack([right,right]), q, pd.concat([g,g])).mAP==1

@pytest.mark.parametrize('k', [1,2,7,30])
def test_single_match(k):
    "One match at rank k scores 1/k twice, and is in the curve from k on"
    g = pd.DataFrame(dict(pid=[5 if i==k-1 else i+10 for i in range(30)], camid=1))
    res = rank_dist(np.arange(30.)[None], pd.DataFrame(dict(pid=[5], camid=[0])), g)
    assert (res.mAP,res.mINP,res.first_match[0])==(1/k,1/k,k)
    assert res.cmc.tolist()==[float(i>=k) for i in range(1,51)]

def test_distractors():
    "They are never right, cost AP when nearest, and cannot be queries"
    q,g = pd.DataFrame(dict(pid=[1], camid=[0])),pd.DataFrame(dict(pid=[-1,1,-1], camid=[1,1,0]))
    assert rank_dist([[.1,.2,.3]], q, g).mAP==.5 and rank_dist([[.2,.1,.3]], q, g).mAP==1
    with pytest.raises(ValueError, match='-1 marks a distractor'): rank_dist([[.1,.2,.3]], q.assign(pid=-1), g)

def test_dropped_and_why():
    q = pd.DataFrame(dict(pid=[0,1,2,0], camid=[0,0,0,1]))
    g = pd.DataFrame(dict(pid=[0,1,9], camid=[1,0,1]))
    res = rank_dist(torch.rand(4,3), q, g)
    assert list(res.why)==['', 'only same-camera images', 'no other image of the identity', 'only same-camera images']
    assert res.dropped=={'only same-camera images':2, 'no other image of the identity':1} and (res.n_used,res.n_queries)==(1,4)
    text = repr(res)+res._repr_html_()
    assert text.count('2 only same-camera images')==2 and text.count('1 no other image')==2
    json.dumps(res.to_dict())

def test_protocol_chosen():
    rng = np.random.default_rng(4)
    q,g = tables(rng, n_cams=2)
    score = lambda q,g,*args: rank_dist(torch.rand(len(q),len(g)), q, g, *args).protocol
    assert score(q, g)=='market' and score(q, g, 'no_camera')=='no_camera'
    for change in (lambda o: o.drop(columns='camid'), lambda o: o.assign(camid=0), lambda o: o.assign(camid=-1)):
        assert score(change(q), change(g))=='no_camera'
    with pytest.raises(ValueError, match="needs a column 'camid', which query lack"): score(q.drop(columns='camid'), g, 'market')
    with pytest.raises(ValueError, match="protocol 'marked': expected one of"): score(q, g, 'marked')
    assert score(q.assign(trackid=1), g.assign(trackid=2, camid=-1))=='tracklet' and score(q.assign(camid=0), q.assign(camid=0))=='leave_one_out'
    assert score(q, g.assign(camid=np.where(g.pid<0, -1, g.camid)))=='market'   # nobody knows the cameras of strangers

@pytest.mark.parametrize('seed', range(3))
def test_single_shot(seed):
    "Rank-k agrees with galleries drawn one by one; mAP is that of the whole gallery; the number of queries at a time does not matter"
    rng = np.random.default_rng(seed)
    q,g = tables(rng, nq=25, ng=60)
    dist = rng.random((25,60))
    res,whole = rank_dist(dist, q, g, Protocol('shots', draws=1000)),rank_dist(dist, q, g)
    assert np.array_equal(res.ap, whole.ap, equal_nan=True) and res.shots.shape==(25,1000)
    assert np.array_equal(res.shots, rank_dist(dist, q, g, res.protocol, chunk=4).shots)
    for i in np.flatnonzero(res.used)[:4]:
        kept = g[~((g.pid==q.pid[i]) & (g.camid==q.camid[i]))]
        groups = [o.index.to_numpy() for _,o in kept.groupby(kept.pid.where(kept.pid>=0, -2-kept.index.to_numpy()))]
        own = next(k for k,o in enumerate(groups) if g.pid[o[0]]==q.pid[i])
        d = np.stack([dist[i,rng.choice(o, 1000)] for o in groups], 1)
        ranks = 1+(d<d[:,[own]]).sum(1)
        assert abs((res.shots[i]==1).mean()-np.mean(np.equal(ranks, 1)))<.07 and abs(res.shots[i].mean()-np.mean(ranks))<.07*np.mean(ranks)+.1

def test_same_file():
    "Without cameras a picture never finds itself; unknown files are nobody's"
    df = pd.DataFrame(dict(path=list('abcd'), pid=[0,0,1,2]))
    dist = 1-torch.eye(4)
    res = rank_dist(dist, df, df)
    assert (res.n_removed,res.n_used,res.first_match.tolist())==(4,2,[1,1,0,0])
    assert (res.top[range(4),0]!=np.arange(4)).all()
    assert rank_dist(dist, df[['pid']], df[['pid']]).rank(1)==1

@pytest.mark.parametrize('err,make', [
    ("none of 3 queries can be scored: 3 only same-camera images.*Give every source", lambda q,g: (q.assign(camid=0), g.assign(camid=0), 'market')),
    ('numbered together', lambda q,g: (q.assign(pid=q.pid+50), g, None)),
    ('the gallery is empty', lambda q,g: (q, g[:0], None)),
    ('the query is empty', lambda q,g: (q[:0], g, None)),
    ('no column `pid`', lambda q,g: (q.rename(columns=dict(pid='id')), g, None)),
    ('expected integers', lambda q,g: (q.assign(pid=['a','b','c']), g, None)),
    ('expected integers', lambda q,g: (q.assign(pid=q.pid+.5), g, None))])
def test_bad_tables(err, make):
    q,g = pd.DataFrame(dict(pid=[0,1,2], camid=1)),pd.DataFrame(dict(pid=[0,1,2], camid=2))
    q,g,protocol = make(q,g)
    with pytest.raises(ValueError, match=err): rank_dist(torch.rand(len(q),len(g)), q, g, protocol)

def test_bad_distances():
    q,g = pd.DataFrame(dict(pid=[0,1])),pd.DataFrame(dict(pid=[0,1,1]))
    with pytest.raises(ValueError, match=r'expected distances of shape \(2,3\)'): rank_dist(torch.rand(3,2), q, g)
    with pytest.raises(ValueError, match='NaN'): rank_dist(torch.tensor([[0,1,2],[0,float('nan'),1]]), q, g)
    with pytest.raises(ValueError, match='max_rank'): rank_dist(torch.rand(2,3), q, g, max_rank=0)
    assert rank_dist(torch.tensor([[0,float('inf'),1],[1,0,float('inf')]]), q, g).n_used==2

# ---- distances

@pytest.mark.parametrize('dtype,eps', [(torch.float64,1e-12), (torch.float32,2e-6), (torch.float16,2e-6), (torch.bfloat16,2e-6)])
@pytest.mark.parametrize('shift', [0,30])
def test_distances_vs_torch(dtype, eps, shift):
    torch.manual_seed(0)
    q,g = (torch.randn(n,24).add(shift).to(dtype) for n in (9,31))
    a,b = q.double()[:,None],g.double()[None]
    want = {cosine_dist: 1-F.cosine_similarity(a, b, dim=-1), euclidean_dist: (a-b).norm(dim=-1), sq_euclidean_dist: (a-b).square().sum(-1)}
    for f,w in want.items():
        d = f(q, g)
        assert d.dtype==(torch.float64 if dtype==torch.float64 else torch.float32)
        assert (d-w).abs().max()<=eps*w.abs().max().clamp_min(1), f.__name__
    assert torch.equal(cosine_dist(q.float().numpy(), g.float().numpy()), cosine_dist(q.float(), g.float()))

@pytest.mark.parametrize('f', [cosine_dist, euclidean_dist, sq_euclidean_dist])
def test_distances_extremes(f):
    "Zero vectors, copies, huge and tiny numbers, and many gallery blocks"
    torch.manual_seed(0)
    x = torch.randn(5,8)
    x[2] = 0
    d = f(x, x)
    assert d.isfinite().all() and (d>=0).all() and d.diag()[[0,1,3,4]].max()<1e-6 and torch.allclose(d, d.T, atol=1e-6)
    assert f(x, x[:0]).shape==(5,0) and f(x[:0], x).shape==(0,5)
    g = torch.randn(20000,8)
    assert torch.allclose(f(x, g)[:,8190:8200], f(x, g[8190:8200]), atol=1e-5)

def test_distances_of_copies_are_never_negative():
    torch.manual_seed(0)
    x = torch.randn(500,64)
    for f in (cosine_dist, euclidean_dist, sq_euclidean_dist):
        d = f(x, x).diag()
        assert (d>=0).all() and d.max()<1e-6
    assert cosine_dist(x, -x).max()<=2

def test_euclidean_far_from_origin():
    "Points 0.001 apart and a million away, in float64"
    torch.manual_seed(0)
    x = torch.randn(5,8).double()*1e-3
    assert torch.allclose(euclidean_dist(x+1e6, -x+1e6), euclidean_dist(x, -x), rtol=1e-5)

def test_cosine_scale_free():
    torch.manual_seed(0)
    x,g = torch.randn(4,8),torch.randn(6,8)
    for s in (1e-30,1e-5,1e5,1e30): assert torch.allclose(cosine_dist(x*s, g), cosine_dist(x, g), atol=1e-6)
    assert (cosine_dist(torch.zeros(1,8), g)==1).all()

@pytest.mark.parametrize('f', [cosine_dist, euclidean_dist, sq_euclidean_dist])
def test_distances_under_autocast(f):
    torch.manual_seed(0)
    x = torch.randn(6,32)
    with torch.autocast('cpu', dtype=torch.bfloat16): d = f(x, x+1e-3)
    assert torch.equal(d, f(x, x+1e-3)) and d.dtype==torch.float32

@pytest.mark.parametrize('q,g,err', [(torch.rand(2,3), torch.rand(2,4), 'one width'), (torch.rand(3), torch.rand(2,3), r'x\[None\]'),
    (torch.rand(2,0), torch.rand(2,0), 'one width'), (torch.tensor([[1.,2.],[float('nan'),0]]), torch.rand(2,2), '1 of 2 query.*row 1'),
    (torch.rand(2,2), torch.tensor([[float('inf'),2.]]), '1 of 1 gallery')])
def test_distances_refuse(q, g, err):
    for f in (cosine_dist, euclidean_dist, sq_euclidean_dist):
        with pytest.raises(ValueError, match=err): f(q, g)

def feats(rng, nq=40, ng=120, **kwargs): return [Features(rng.normal(size=(len(o),16)), o) for o in tables(rng, nq, ng, **kwargs)]

@pytest.mark.parametrize('f', [cosine_dist, euclidean_dist, partial(torch.cdist, p=1.)])
def test_evaluate_streams(f):
    "The whole matrix is never asked for, and the scores are those of the whole matrix"
    q,g = feats(np.random.default_rng(5))
    sizes = []
    def spy(a, b):
        sizes.append(a.shape[0])
        return f(a, b)
    res = evaluate(q, g, spy, chunk=6)
    assert max(sizes)==6 and sum(sizes)==res.n_used
    assert np.array_equal(res.ap, rank_dist(f(q.emb, g.emb), q, g).ap, equal_nan=True)
    agree(res, judge(f(q.emb, g.emb), q.df, g.df, 'market'))

@pytest.mark.parametrize('n_gallery', [10, 20_000, 300_000, 10**7, 10**9])
@pytest.mark.parametrize('n_rows', [1, 30, 10**5])
def test_default_chunk_is_bounded(n_rows, n_gallery):
    "64 MB of distances; for large galleries 256 MB, with up to 64 queries; one query always"
    size = core._chunk_size(n_rows, n_gallery)
    assert 1<=size<=n_rows and (size*n_gallery<=2**24 or size<=64) and (size*n_gallery<=2**26 or size==1)

def test_default_chunk_is_used(monkeypatch):
    "A gallery is ranked as many queries at a time as `_chunk_size` says"
    monkeypatch.setattr(core, '_chunk_size', lambda n_rows, n_gallery: 7)
    n,sizes = 5000,[]
    g = Features(torch.zeros(n,1), pd.DataFrame(dict(pid=np.arange(n)%50, camid=1)))
    q = Features(torch.zeros(30,1), pd.DataFrame(dict(pid=np.arange(30), camid=0)))
    def spy(a, b):
        sizes.append(len(a))
        return torch.zeros(len(a), len(b))
    res = evaluate(q, g, spy)
    assert sizes==[7,7,7,7,2] and res.first_match.tolist()==list(range(1,31))

def test_evaluate_says_who():
    q,g = feats(np.random.default_rng(6))
    assert evaluate(q, g, partial(torch.cdist, p=1.)).metric=='cdist' and evaluate(q, g, euclidean_dist).metric=='euclidean'
    with pytest.raises(ValueError, match='expected distances of shape'): evaluate(q, g, lambda a,b: cosine_dist(a,b)[:,:5])
    q.emb[3,0] = float('nan')
    with pytest.raises(ValueError, match='did training diverge'): evaluate(q, g)

# ---- features

def test_features_roundtrip(tmp_path):
    rng = np.random.default_rng(7)
    df = pd.DataFrame(dict(path=[f'p/{i}.jpg' for i in range(6)], pid=range(6), camid=0, score=[.1,np.nan,3,4,5,6], seen=[True,False]*3,
        view=pd.array([1,None,3,4,5,6], dtype='Int64'), kind=pd.Categorical(['b','a',None]*2, ['c','b','a'], ordered=True)), index=[9,8,7,6,5,4])
    df['pid_name'] = pd.Series(['x',2,3.5,None,True,'y'], dtype=object, index=df.index)
    f = Features(rng.normal(size=(6,3)), df)
    back = Features.load(f.save(tmp_path/'deep'/'f.pt'))
    assert torch.equal(back.emb, f.emb) and back.emb.dtype==torch.float32
    pd.testing.assert_frame_equal(back.df, f.df)
    assert back.df.pid_name.map(type).tolist()==[str,int,float,type(None),bool,str] and os.listdir(tmp_path/'deep')==['f.pt']

def test_features_bad_files(tmp_path):
    f = Features(torch.rand(3,2), pd.DataFrame(dict(pid=[1,2,3])))
    path = f.save(tmp_path/'f.pt')
    whole = path.read_bytes()
    for junk,what in ((b'', 'not a readable file of features'), (b'hello', 'it is a text'), (whole[:len(whole)//2], 'truncated')):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match=what): Features.load(path)
    torch.save(dict(a=1), path)
    with pytest.raises(ValueError, match='something other than features'): Features.load(path)
    with pytest.raises(FileNotFoundError, match='nowhere.pt'): Features.load(tmp_path/'nowhere.pt')
    torch.save(dict(kind='fastreid_nb.Features', emb=f.emb, cols=[('pid','int64',[1,2,3])]), path)   # as 0.0.1 wrote them
    back = Features.load(path)
    assert torch.equal(back.emb, f.emb) and back.protocol is None

def test_features_run_no_code(tmp_path):
    "A pickle that would run a command is refused, and does not run it"
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save(dict(kind='fastreid_nb.Features', emb=torch.rand(1,2), cols=[], x=Evil()), tmp_path/'f.pt')
    with pytest.raises(ValueError, match='would run code'): Features.load(tmp_path/'f.pt')
    assert not (tmp_path/'ran').exists()

def test_features_refuse(tmp_path):
    df = pd.DataFrame(dict(pid=[1,2,3]))
    for emb in (torch.rand(2,4), torch.rand(4,4)):
        with pytest.raises(ValueError, match='for a table of 3 rows'): Features(emb, df)
    with pytest.raises(ValueError, match=r'must be \(N,D\)'): Features(torch.rand(3), df)
    path = Features(torch.rand(3,2), df).save(tmp_path/'f.pt')
    before = path.read_bytes()
    with pytest.raises(ValueError, match="'box' holds a tuple"): Features(torch.rand(3,2), df.assign(box=[(1,2)]*3)).save(path)
    assert path.read_bytes()==before and len(os.listdir(tmp_path))==1

def half_and_half(protocol):
    "Features of random tables that carry `protocol`"
    return [Features(o.emb, o.df, protocol) for o in feats(np.random.default_rng(8))]

own = Protocol('own', source='shift', anyone=True, draws=3)

@pytest.mark.parametrize('protocol', [None, *protocols, own])
def test_features_keep_the_protocol(tmp_path, protocol):
    "In a file, and when pooled"
    df = pd.DataFrame(dict(pid=[1,1,2], camid=[0,0,1]))
    f = Features(torch.rand(3,2), df, protocol)
    for o in (Features.load(f.save(tmp_path/'f.pt')), f.pool()):
        assert o.protocol==protocol and (protocol is None or type(o.protocol) is Protocol)
    assert ('protocol' in repr(f))==(protocol is not None)

def test_features_of_0_0_1(tmp_path):
    "A file of the first version, which knew no protocol"
    f = Features(torch.rand(3,2), pd.DataFrame(dict(pid=[1,2,3])), 'cuhk03')
    old = torch.load(f.save(tmp_path/'f.pt'), weights_only=True)
    assert old.pop('protocol')==dict(name='cuhk03', source='camid', anyone=False, draws=100)
    torch.save(old, tmp_path/'old.pt')
    back = Features.load(tmp_path/'old.pt')
    assert back.protocol is None and torch.equal(back.emb, f.emb)

def test_features_protocols_that_cannot_be_saved(tmp_path):
    class Mine(Protocol): pass
    df = pd.DataFrame(dict(pid=[1]))
    with pytest.raises(ValueError, match="protocol 'a' is a Mine"): Features(torch.rand(1,2), df, Mine('a')).save(tmp_path/'f.pt')
    with pytest.raises(ValueError, match='expected one of market'): Features(torch.rand(1,2), df, 'markt')
    odd = Features(torch.rand(1,2), df, Protocol('b', draws=np.int64(3)))
    assert Features.load(odd.save(tmp_path/'f.pt')).protocol==Protocol('b', draws=3) and os.listdir(tmp_path)==['f.pt']

def test_protocol_of_features_counts():
    "It is used unless another is named; tables alone choose; two protocols are one too many"
    plain,strict = half_and_half(None),half_and_half('cross_view')
    assert evaluate(*plain).protocol=='market' and evaluate(*strict).protocol=='cross_view'
    assert evaluate(*strict, protocol='market').mAP==evaluate(*plain).mAP!=evaluate(*strict).mAP
    assert evaluate(plain[0], strict[1]).protocol==evaluate(strict[0], plain[1]).protocol=='cross_view'
    dist = cosine_dist(strict[0].emb, strict[1].emb)
    assert rank_dist(dist, *strict).mAP==evaluate(*strict).mAP
    named = Protocol('cross_view')   # another with the same name
    for other in (half_and_half('cuhk03'), half_and_half(named)):
        with pytest.raises(ValueError, match='expected features of one data set'): evaluate(strict[0], other[1])
        assert evaluate(strict[0], other[1], protocol='no_camera').protocol=='no_camera'

# ---- ranked lists

@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=16, test_frac=.5, size=(48,24), progress=False)

@pytest.fixture(scope='module')
def toy_res(toy): return evaluate(*[features_from(raw_pixels, o) for o in (toy.query,toy.gallery)])

@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')

@pytest.mark.parametrize('order', ['mixed','worst','median','best','random'])
@pytest.mark.parametrize('n', [1,3,1000])
def test_pick_queries(toy_res, order, n):
    rows = pick_queries(toy_res, n, order)
    ap = toy_res.ap[rows]
    assert len(set(rows))==len(rows)==min(n, toy_res.n_used) and toy_res.used[rows].all()
    if order in ('mixed','worst','median'): assert (np.diff(ap)>=0).all()
    if order=='best': assert (np.diff(ap)<=0).all() and ap[0]==np.nanmax(toy_res.ap)
    if order in ('mixed','worst'): assert ap[0]==np.nanmin(toy_res.ap)
    if order=='mixed' and n==3: assert ap[2]==np.nanmax(toy_res.ap)

def test_show_ranks_is_true(toy, toy_res, tmp_path):
    "Frames, marks, distances and ranks are those of the result, and the order is said"
    fig = toy_res.show_ranks(n=3, k=6, save=tmp_path/'new'/'ranks.png')
    rows,axs = pick_queries(toy_res, 3),np.reshape(fig.axes, (3,7))
    for r,a in zip(rows, axs):
        said = f'AP {toy_res.ap[r]:.2f}\ncam {toy.query.camid[r]}'
        assert a[0].get_title()=='query' and a[0].get_xlabel()==said and to_hex(a[0].spines['left'].get_edgecolor())=='#1f5fbf'
        for i,ax in enumerate(a[1:]):
            j = toy_res.top[r,i]
            right = toy.gallery.pid[j]==toy.query.pid[r]
            said = f"{'✓' if right else '✗'} {toy_res.top_dist[r,i]:.2f}\ncam {toy.gallery.camid[j]}"
            assert ax.get_title()==str(i+1) and ax.get_xlabel()==said
            assert to_hex(ax.spines['top'].get_edgecolor())==('#14833b' if right else '#c8281e')
            assert np.array_equal(ax.images[0].get_array(), np.array(Image.open(toy.gallery.path[j])))
    assert 'worst' in fig.get_suptitle() and os.listdir(tmp_path/'new')==['ranks.png'] and Image.open(tmp_path/'new'/'ranks.png').width==1200

def test_show_ranks_marks_have_glyphs(recwarn, toy_res, tmp_path):
    toy_res.show_ranks(n=1, save=tmp_path/'a.png')
    assert not [o for o in recwarn if 'Glyph' in str(o.message)]

@pytest.mark.parametrize('suffix', ['png','jpg','pdf'])
def test_show_ranks_formats(toy_res, tmp_path, suffix):
    toy_res.show_ranks(n=1, k=2, save=tmp_path/f'a.{suffix}')
    assert (tmp_path/f'a.{suffix}').read_bytes()[:4] in (b'\x89PNG', b'%PDF', b'\xff\xd8\xff\xe0')

def test_show_ranks_edges(tmp_path):
    "Wide pictures, a query that was dropped, fewer pictures than asked for, EXIF, greyscale"
    exif = Image.Exif()
    exif[274] = 6
    for i,mode in enumerate(('RGB','L','P','CMYK')): Image.new(mode, (40,20)).save(tmp_path/f'{i}.tif' if mode=='CMYK' else tmp_path/f'{i}.png')
    Image.new('RGB', (20,40)).save(tmp_path/'4.jpg', exif=exif)
    paths = sorted(str(o) for o in tmp_path.iterdir())
    df = pd.DataFrame(dict(path=paths, pid=[0,0,1,1,2]))
    res = rank_dist(torch.rand(5,5)*100, df, df)
    fig = res.show_ranks(order=[4,0], k=10)
    assert 'dropped' in [o.get_xlabel() for o in fig.axes] and fig.get_figwidth()==8 and fig.get_figheight()<2.5
    assert fig.axes[0].images[0].get_array().shape==(20,40,3)
    assert sum(o.axison for o in fig.axes)==1+5

def test_show_ranks_refuses(toy_res):
    before = plt.get_fignums()
    q = toy_res.q.drop(columns='path')
    with pytest.raises(ValueError, match='no column `path`'): ReIDResult(**{**vars(toy_res), 'q':q}).show_ranks()
    with pytest.raises(ValueError, match='unknown order'): toy_res.show_ranks(order='middle')
    with pytest.raises(ValueError, match='one query or more'): toy_res.show_ranks(n=0)
    assert plt.get_fignums()==before

def test_plot(toy_res):
    a,b = toy_res.plot().axes
    assert np.allclose(a.lines[0].get_ydata(), toy_res.cmc) and sum(o.get_height() for o in b.patches)==toy_res.n_used

# ---- inference

class Tiny(nn.Sequential):
    n_feat = 8
    def __init__(self): super().__init__(nn.Conv2d(3,8,3,4,1), nn.BatchNorm2d(8), nn.ReLU())

@pytest.fixture(scope='module')
def dls(toy): return reid_dls(toy, size=(48,24), p=4, k=2, augs=[], num_workers=0, val_bs=24)

def tiny(dls, **kwargs):
    torch.manual_seed(0)
    return reid_learner(dls, Tiny, **kwargs)

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f()

def test_eval_mode_restores():
    m = reid_model(Tiny, 4)
    m.train()
    m.backbone[1].eval()
    flags = [o.training for o in m.modules()]
    with pytest.raises(KeyboardInterrupt):
        with eval_mode(m):
            assert not any(o.training for o in m.modules())
            raise KeyboardInterrupt
    assert [o.training for o in m.modules()]==flags

def test_embed_batches_order_and_workers(toy, dls):
    "One row per picture in table order, whatever the batch size and the number of workers"
    learn = tiny(dls, dtype=torch.float32)
    q,g = learn.features(progress=False)
    assert q.df.path.tolist()==toy.query.path.tolist() and g.df.path.tolist()==toy.gallery.path.tolist()
    one = torch.cat([embed(learn.model, p, normalize=False) for p in toy.query.path[:5]])
    assert torch.allclose(q.emb[:5], one, atol=1e-5) and not q.emb.requires_grad
    a,b = (evaluate_data(learn.model, toy, bs=bs, num_workers=w, progress=False) for bs,w in ((7,0),(16,2)))
    assert np.allclose(a.ap, b.ap, atol=1e-6, equal_nan=True) and np.allclose(a.ap, evaluate(q, g).ap, atol=1e-6, equal_nan=True)

def test_embed_batches_refuses(dls):
    with pytest.raises(ValueError, match='no batch'): embed_batches(nn.Flatten(), [], progress=False)
    with pytest.raises(ValueError, match='expected an embedding'): embed_batches(nn.Identity(), [torch.rand(2,3,4,4)], progress=False)
    assert embed_batches(nn.Flatten(), [torch.rand(2,3,4,4)], progress=False).shape==(2,48)

def test_embed_forms(toy, dls):
    model,path = tiny(dls).model,toy.query.path[0]
    model.preproc = Preproc((48,24))
    model.train()
    arr = np.array(Image.open(path))
    t = torch.tensor(arr).permute(2,0,1)
    want = embed(model, path)
    assert want.shape==(1,8) and want.dtype==torch.float32 and torch.allclose(want.norm(dim=1), torch.ones(1)) and model.training
    for o in (Path(path), Image.open(path), arr, t, arr/255, t/255, [path], np.stack([arr]), t[None], pd.Series([path])):
        assert torch.allclose(embed(model, o), want, atol=1e-5)
    assert embed(model, [path]*5, bs=2).shape==(5,8)
    assert torch.allclose(F.normalize(embed(model, path, normalize=False)), want, atol=1e-6)

@pytest.mark.parametrize('x,err', [(np.full((4,4,3), 7.), r'\[0,1\]'), (torch.full((3,4,4), -1.), r'\[0,1\]'), (np.full((4,4,3), np.nan), r'\[0,1\]'),
    (torch.rand(4,4,3,1,1), 'expected'), ([], 'empty list'), (None, 'expected a path')])
def test_embed_refuses(dls, x, err):
    with pytest.raises(ValueError, match=err): embed(tiny(dls).model, x, Preproc((48,24)))

def test_evaluate_in_training_precision(dls):
    half = tiny(dls, dtype=torch.bfloat16)
    seen = []
    half.model.backbone[0].register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    half.features(progress=False)
    assert set(seen)=={torch.bfloat16}

def under(toy, protocol):
    "The toy data, changed so that `protocol` matters"
    query,gallery = (o.assign(trackid=np.arange(len(o))%5, shift=np.arange(len(o))%3) for o in (toy.query,toy.gallery))
    if protocol=='leave_one_out': query = gallery
    return ReIDData('toy', toy.train, query, gallery, protocol)

@pytest.mark.parametrize('protocol', [*protocols, own], ids=str)
def test_features_score_as_the_learner(toy, protocol, tmp_path):
    "Features of a learner, also from a file, score what the learner scores; so do a model without one, and the callback"
    data = under(toy, protocol)
    learn = tiny(reid_dls(data, size=(48,24), p=4, k=2, augs=[], num_workers=0), dtype=torch.float32)
    want = learn.evaluate(progress=False)
    feats = learn.features(progress=False)
    kept = [Features.load(o.save(tmp_path/f'{i}.pt')) for i,o in enumerate(feats)]
    quiet(learn, learn.validate)
    direct = evaluate_data(learn.model, data, num_workers=0, progress=False)
    assert want.protocol==protocol
    for o in (evaluate(*feats), evaluate(*kept), rank_dist(cosine_dist(*(o.emb for o in feats)), *feats), learn.reid_result, direct):
        assert o.protocol==protocol and o.n_removed==want.n_removed
        assert np.allclose(o.ap, want.ap, atol=1e-6, equal_nan=True) and np.allclose(o.cmc, want.cmc, atol=1e-6)
    other = evaluate(*feats, protocol='market' if protocol!='market' else 'cross_view')
    assert other.to_dict()!=want.to_dict()

def test_floors_carry_the_protocol(toy):
    data = under(toy, 'cross_view')
    sides = [features_from(raw_pixels, o, protocol=data.protocol) for o in (data.query,data.gallery)]
    assert evaluate(*sides).mAP==floor_scores(data).mAP['raw pixels']!=floor_scores(toy).mAP['raw pixels']

@pytest.mark.parametrize('workers', [None,0,2])
def test_embed_many_paths(toy, dls, workers, monkeypatch):
    "A long list of paths goes through the loader once; rows, order and errors are those of one file after the other"
    model,pre = tiny(dls, dtype=torch.float32).model,Preproc((48,24))
    paths = [*toy.gallery.path, *toy.query.path[::-1], toy.query.path[0]]
    assert len(paths)>64
    calls = []
    def spy(*args, **kwargs):
        calls.append(args[3])
        return plain_dl(*args, **kwargs)
    monkeypatch.setattr(inference, 'plain_dl', spy)
    few = torch.cat([embed(model, paths[i:i+32], pre, bs=32) for i in range(0, len(paths), 32)])
    assert not calls
    mixed = [Path(o) if i%2 else o for i,o in enumerate(paths)]
    for form in (paths, mixed, pd.Series(paths, index=range(9, 9+len(paths)))):
        assert torch.equal(embed(model, form, pre, bs=32, num_workers=workers), few)
    assert calls==[workers or 0]*3
    with pytest.raises(FileNotFoundError, match='nobody.jpg'): embed(model, [*paths, 'nobody.jpg'], pre)
    with Image.open(paths[0]) as im: assert torch.allclose(embed(model, [*paths, im], pre)[:-1], few, atol=1e-5)

def test_embed_many_paths_asks_no_camera(toy):
    "Files have no camera, also for a model that would take one"
    class Knows(nn.Module):
        n_cams = 4
        def forward(self, x, camid=None):
            assert camid is None
            return x.mean((2,3))
    assert embed(Knows(), toy.gallery.path.tolist()*3, Preproc((48,24))).shape==(3*len(toy.gallery),3)

# ---- devices

cpu,cuda = torch.device('cpu'),torch.device('cuda', 0)

class Elsewhere:
    "Stands for a tensor on a device; notes what is done to it"
    def __init__(self, device, log=()): self.device,self.log = device,list(log)
    def pin_memory(self): return Elsewhere(self.device, [*self.log, 'pin'])
    def to(self, device, non_blocking=False): return Elsewhere(torch.device(device), [*self.log, (str(device),non_blocking)])

def test_copies_to_and_from_a_gpu_do_not_wait():
    assert inference.send(Elsewhere(cpu), cuda).log==['pin', ('cuda:0',True)]
    assert inference.send(Elsewhere(cuda), cuda).log==[('cuda:0',False)]
    assert inference.send(Elsewhere(cpu), cpu).log==[('cpu',False)]
    assert inference.fetch(Elsewhere(cuda)).log==[('cpu',True)]
    for device in (cpu, torch.device('mps')): assert inference.fetch(Elsewhere(device)).log==[('cpu',False)]

def test_join_waits_once(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, 'synchronize', waited.append)
    parts = torch.rand(3,2).split(2)
    assert torch.equal(inference.join(parts, cpu), torch.cat(parts)) and not waited
    assert torch.equal(inference.join(parts, cuda), torch.cat(parts)) and waited==[cuda]

def test_evaluate_data_ranks_where_the_model_is(toy, dls, monkeypatch):
    asked = []
    def spy(*args, device=None, **kwargs):
        asked.append(device)
        return evaluate(*args, **kwargs)
    monkeypatch.setattr(inference, 'evaluate', spy)
    model = tiny(dls).model
    evaluate_data(model, toy, num_workers=0, progress=False)
    assert asked==[next(model.parameters()).device]

@pytest.mark.parametrize('devices,want', [([cpu,cpu],cpu), ([cpu,cuda],cuda), ([cuda,cpu],cuda), ([cpu,torch.device('mps')],torch.device('mps'))])
def test_distances_meet(devices, want): assert core._meeting_point(devices)==want

def test_sum_dists_forms():
    "Arrays, tensors, lists and functions; matrices or rows of them"
    a,b = torch.rand(4,6),torch.rand(4,6).double()
    pos = torch.tensor([2,0])
    want = (a+3*b)/4
    assert torch.allclose(sum_dists([a.numpy(),b], [1,3]), want)
    for d in ([a,lambda i: b[i]], [lambda i: a[i].numpy(),b.numpy()]): assert torch.allclose(sum_dists(d, [1,3])(pos), want[pos])
    with pytest.raises(ValueError, match='sum above 0'): sum_dists([a,b], [1,-1])

@pytest.mark.cuda
def test_devices_mix_on_cuda(toy, tmp_path):
    "Distances of two devices add up, and a model on the GPU is scored there, as on the CPU"
    a,b = torch.rand(2,4,6)
    for d in ([a.cuda(),b], [a,lambda i: b[i].cuda()], [a.cuda(),lambda i: b[i]]):
        total = sum_dists(d)
        total = total(torch.arange(4)) if callable(total) else total
        assert total.device.type=='cuda' and torch.allclose(total.cpu(), (a+b)/2)
    model = nn.Sequential(Tiny(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.preproc = Preproc((48,24))
    paths = toy.gallery.path.tolist()*3
    slow,res = embed(model, paths),evaluate_data(model, toy, num_workers=0, progress=False)
    model.cuda()
    assert torch.allclose(embed(model, paths), slow, atol=1e-2)   # TF32
    assert abs(evaluate_data(model, toy, num_workers=0, progress=False).mAP-res.mAP)<.02

# ---- scores while training

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_score_is_the_score(dls, dtype, tmp_path):
    "The table shows, epoch by epoch, what an evaluation of that epoch's model gives"
    learn,want = tiny(dls, dtype=dtype, path=tmp_path),[]
    class Peek(Callback):
        order = 56
        def after_epoch(self): want.append(self.learn.evaluate(progress=False))
    quiet(learn, lambda: learn.fit(3, 1e-2, cbs=Peek()))
    assert list(learn.recorder.metric_names)==['epoch','train_loss','mAP','rank-1','time']
    assert [o[1:] for o in learn.recorder.values]==[[o.mAP,o.rank(1)] for o in want] and len(want)==3
    assert np.array_equal(learn.reid_result.ap, want[-1].ap, equal_nan=True)
    assert len({o.mAP for o in want})>1

def test_score_on_plain_learner(dls, capsys):
    "It needs only a fastai learner and `reid_dls`; the table has no column without values"
    model = reid_model(Tiny, len(dls.pids))
    learn = Learner(dls, model, loss_func=lambda o,pid,camid: F.cross_entropy(o.logits.float(), pid), cbs=MixedPrecision('bf16'), path='.')
    with learn.no_bar(): learn.fit(1, cbs=ScoreReID())
    assert list(learn.recorder.metric_names)==['epoch','train_loss','mAP','rank-1','time'] and 'None' not in capsys.readouterr().out
    assert learn.recorder.values[0][1]==learn.reid_result.mAP

@pytest.mark.parametrize('every,epochs,scored', [(1,3,[0,1,2]), (2,5,[1,3,4]), (10,3,[2])])
def test_score_every(dls, every, epochs, scored):
    learn,n = tiny(dls),[]
    learn.model.register_forward_hook(lambda m,i,o: None if m.training else n.append(len(i[0])))
    quiet(learn, lambda: learn.fit(epochs, cbs=ScoreReID(every)))
    assert sum(n)==len(scored)*len(dls.valid.dataset) # an epoch that is not scored costs no validation
    assert [i for i,o in enumerate(learn.recorder.values) if not np.isnan(o[1])]==scored
    assert [len(o) for o in learn.recorder.values]==[3]*epochs and len(learn.recorder.metric_names)==5
    quiet(learn, lambda: learn.fit(1))
    assert not np.isnan(learn.recorder.values[0][1])

def test_score_and_the_rest_of_fastai(toy, dls, tmp_path):
    learn = tiny(dls, dtype=torch.float32, path=tmp_path)
    quiet(learn, lambda: learn.fit(2, 1e-2, cbs=SaveModelCallback('mAP')))
    res = learn.evaluate(progress=False)
    assert quiet(learn, learn.validate)==[res.mAP,res.rank(1)]
    emb = quiet(learn, learn.get_preds)[0]
    assert torch.allclose(emb, torch.cat([o.emb for o in learn.features(False)]), atol=1e-5)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    assert quiet(learn, lambda: learn.lr_find(show_plot=False, num_it=3*len(dls.train)-1, stop_div=False)).valley>0
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and (tmp_path/'models'/'model.pth').exists()
    assert np.isnan(quiet(learn, lambda: learn.validate(dl=[dls.valid.one_batch()]))).all() and learn.reid_result.mAP==res.mAP
    assert quiet(learn, learn.validate)==[res.mAP,res.rank(1)] and not torch.is_autocast_enabled('cpu')

@pytest.mark.parametrize('exc', [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize('when', ['after_backward','after_pred'])
def test_score_after_interruption(dls, exc, when):
    "A fit that was stopped, in training or while scoring, leaves a learner that fits and scores as before"
    learn = tiny(dls)
    class Stop(Callback):
        order = 99
    def stop(self):
        if when=='after_backward' or not self.training: raise exc('stop')
    setattr(Stop, when, stop)
    with pytest.raises(exc): quiet(learn, lambda: learn.fit(1, cbs=[ScoreReID(5),Stop()]))
    quiet(learn, lambda: learn.fit(1))
    assert list(learn.recorder.metric_names)==['epoch','train_loss','mAP','rank-1','time'] and learn.recorder.values[0][1]==learn.reid_result.mAP

def test_score_refuses(toy, dls):
    "Nothing to score is said before the first epoch, and loaders of other pictures at the end of it"
    none = ReIDData('lonely', toy.train, toy.query.assign(pid=toy.query.pid+9999), toy.gallery)
    learn = tiny(reid_dls(none, size=(48,24), p=4, k=2, augs=[], num_workers=0))
    with pytest.raises(ValueError, match='none of .* queries'): quiet(learn, lambda: learn.fit(1))
    other = reid_dls(toy, size=(48,24), p=4, k=2, augs=[], num_workers=0)
    other.data = ReIDData('short', toy.train, toy.query[1:], toy.gallery)
    learn = tiny(other)
    with pytest.raises(ValueError, match='queries first'): quiet(learn, lambda: learn.fit(1))
    with pytest.raises(ValueError, match='1 or more'): ScoreReID(every=0)

# ---- floors

def test_floors(toy, tmp_path):
    res = floor_scores(toy)
    assert res.index.tolist()==['raw pixels','colour histogram'] and ((res>0) & (res<1)).all(None)
    assert res.mAP['raw pixels']==evaluate(*[features_from(raw_pixels, o) for o in (toy.query,toy.gallery)]).mAP
    path = toy.query.path[0]
    for f in (raw_pixels, color_hist):
        assert np.array_equal(f(path), f(Image.open(path))) and f(path).dtype==np.float32
        assert len({f(Image.new(m, (9,21))).shape for m in ('L','P','CMYK','RGBA','RGB')})==1
    assert abs(np.linalg.norm(color_hist(path))-1)<1e-6
    assert np.allclose(raw_pixels(Image.new('RGB', (9,21), (255,0,51))).reshape(-1,3), [1,0,.2])
    with pytest.raises(FileNotFoundError): raw_pixels(tmp_path/'none.jpg')

@pytest.mark.parametrize('n', [1,6,7])
def test_color_hist_counts(n):
    "Each stripe holds its share of the pixels, and knows nothing of the other stripes"
    a,b = Image.new('RGB', (48,96), (255,0,0)),Image.new('RGB', (48,96), (255,0,0))
    b.paste((0,0,255), (0,48,48,96))
    ha,hb = (color_hist(o, stripes=n).reshape(n,-1)**2 for o in (a,b))
    assert np.allclose(ha.sum(1), [len(o)/96 for o in np.array_split(range(96), n)], atol=1e-6)
    assert n==1 or np.allclose(ha[0], hb[0]) and not np.allclose(ha[-1], hb[-1])

@pytest.mark.parametrize('seed', range(3))
def test_pool(seed):
    "Against a loop; the order of rows and a zero vector are no trouble"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(pid=rng.integers(4, size=60), camid=rng.integers(2, size=60), trackid=rng.integers(3, size=60), path=[f'{i}' for i in range(60)]))
    emb = torch.randn(60,5)
    emb[7] = 0
    res = Features(emb, df).pool()
    for (i,row),e in zip(res.df.iterrows(), res.emb):
        same = (df[['pid','camid','trackid']]==row[['pid','camid','trackid']]).all(axis=1).to_numpy()
        assert row.n_pooled==same.sum() and row.path==df.path[same].iloc[0]
        assert torch.allclose(e, F.normalize(emb[same], dim=1).mean(0), atol=1e-6)
    assert res.df.n_pooled.sum()==60 and [int(o) for o in res.df.path]==sorted(int(o) for o in res.df.path)
    with pytest.raises(ValueError, match='name those that make a track'): Features(emb, df).pool(['walk'])

def test_features_save_leaves_pictures_out(tmp_path):
    f = Features(torch.rand(2,3), pd.DataFrame(dict(pid=[0,1], path=['a','b'], image=[b'x',np.zeros((2,2))])))
    assert list(Features.load(f.save(tmp_path/'f.pt')).df)==['pid','path'] and 'image' in f.df

def test_evaluate_sets(toy):
    "The same numbers as one at a time, a row each"
    model,pre = nn.Sequential(Tiny(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),Preproc((64,32))
    res = evaluate_sets(model, [toy, toy.rename('again')], preproc=pre, num_workers=0, progress=False)
    one = evaluate_data(model, toy, pre, num_workers=0, progress=False)
    assert res.index.tolist()==[toy.name,'again'] and res.mAP.tolist()==[one.mAP]*2
    for bad in ([], [toy,toy]):
        with pytest.raises(ValueError, match='each with a name of its own'): evaluate_sets(model, bad, preproc=pre)

def test_ranks_of_boxes_in_memory_with_names():
    "Crops of one picture in memory are shown and called by the user's names"
    im = np.zeros((20,60,3), np.uint8)
    im[:,:20],im[:,20:40] = 255,90
    df = pd.DataFrame(dict(path='frame', image=[im]*3, x=[0,20,40], y=0, w=20, h=20, pid=[0,1,0], camid=[0,1,1], pid_name=['ann','bartholomew','ann']))
    res = rank_dist([[0.,1.]], df[:1].reset_index(drop=True), df[1:].reset_index(drop=True))
    fig = res.show_ranks(1, k=2)
    assert [o.get_title() for o in fig.axes[:3]]==['ann','1 bartholom…','2 ann']
    assert [np.asarray(o.images[0].get_array()).max() for o in fig.axes[:3]]==[255,90,0]
    plt.close(fig)

# ---- parity with the reference implementation

def kinds(pattern, key):
    "Golden files of one kind, told from others in the same folder by an array they hold"
    return [pytest.param(p, id=p.stem) for p in golden_files(pattern) if key in np.load(p).files] or [pytest.param(None, id='none')]

def truth(z):
    "Which of the recorded results is the definition: ties by gallery index, and no curve that runs past the end of a list"
    short = z['kept_gallery_count'].min()<z['max_rank']
    order = ['stable','padded','py','cy'] if z['has_ties'] or not short else ['padded','stable','py','cy']
    return next((o for o in order if f'{o}_cmc' in z.files), None)

@pytest.mark.parametrize('path', kinds('rank/*.npz', 'valid_query_mask'))
def test_golden_rank(path):
    if path is None: missing('rank/*.npz')
    z = np.load(path)
    q,g = (dict(pid=z[f'{o}_pids'], camid=z[f'{o}_camids']) for o in 'qg')
    score = lambda: rank_dist(z['distmat'], q, g, 'market', int(z['max_rank']))
    if not z['valid_query_mask'].any():
        with pytest.raises(ValueError, match='can be scored'): score()
        return
    res,o = score(),truth(z)
    assert np.array_equal(res.used, z['valid_query_mask']) and o, f'no recorded result in {z.files}'
    n = len(z[f'{o}_cmc'])
    assert np.allclose(res.cmc[:n], z[f'{o}_cmc'], rtol=0, atol=1e-6) and (res.cmc[n:]==res.cmc[n-1]).all()
    eps = 1e-6 if o=='cy' else 1e-12
    for k,v in (('AP',res.ap), ('INP',res.inp)): assert np.allclose(v[res.used], z[f'{o}_{k}'], rtol=0, atol=eps), (o,k)

@pytest.mark.parametrize('path', kinds('rank/*.npz', 'py_cmc_mean_of_60'))
def test_golden_single_shot(path):
    "The reference averages 10 draws a run; 60 runs agree with 2,000 of ours within their noise"
    if path is None: missing('rank/*.npz with single-gallery-shot scores')
    z = np.load(path)
    q,g = (dict(pid=z[f'{o}_pids'], camid=z[f'{o}_camids']) for o in 'qg')
    res = rank_dist(z['distmat'], q, g, Protocol('cuhk03', draws=2000), int(z['max_rank']))
    assert np.abs(res.cmc-z['py_cmc_mean_of_60']).max()<4*z['py_cmc_std_of_60'].max()/60**.5+.005
    assert abs(res.mAP-z['py_mAP'])<1e-6

@pytest.mark.parametrize('name,dist', [('euclidean_squared',sq_euclidean_dist), ('cosine',cosine_dist)])
@pytest.mark.parametrize('path', kinds('distance/*.npz', 'cosine_f64'))
def test_golden_distance(path, name, dist):
    if path is None: missing('distance/*.npz')
    z = np.load(path)
    q,g = (Features(z[o], pd.DataFrame(dict(pid=z[f'{o[0]}_pids'], camid=z[f'{o[0]}_camids']))) for o in ('query','gallery'))
    want = z[f'{name}_f64']
    for emb,eps in ((lambda o: o.emb,1e-6), (lambda o: o.emb.double(),1e-13)):
        assert np.abs(dist(emb(q), emb(g)).numpy()-want).max()<=eps*np.abs(want).max()
    if name!='cosine': assert np.allclose(euclidean_dist(q.emb, g.emb), np.sqrt(want), rtol=1e-6)
    res = evaluate(q, g, dist, 'market')
    assert np.allclose(res.cmc[:len(z[f'{name}_cmc'])], z[f'{name}_cmc'], rtol=0, atol=1e-6)
    for k,v in (('AP',res.ap), ('INP',res.inp)): assert np.allclose(v[res.used], z[f'{name}_{k}'], rtol=0, atol=1e-12)
