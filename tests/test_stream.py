"Counting instead of sorting: properties against a ten-line loop, golden files, draws, files of results, and extraction that resumes"
import json, pickle
from dataclasses import replace

import matplotlib
matplotlib.use('agg')
import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fastreid_nb.data.core import Protocol, ReIDData
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.eval import core
from fastreid_nb.eval.core import DistBlock, ReIDResult, dist_blocks, rank_dist
from fastreid_nb.eval.extract import extract
from fastreid_nb.eval.features import Features, cosine_dist, dist_rows, euclidean_dist, evaluate, sq_euclidean_dist
from fastreid_nb.eval.inference import embed, evaluate_data
from fastreid_nb.eval.results import evaluate_draws, one_per_identity, plot_cmc
from golden_files import golden_files, missing

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)

# ---- the loop

def loop(dist, q, g, protocol):
    "Ranks of the matches of every query, nearest first"
    res = []
    for d,pid,cam in zip(np.asarray(dist).tolist(), q.pid, q.camid):
        gone = {j for j in range(len(g)) if g.camid[j]==cam and (g.pid[j]==pid or protocol=='cross_view')}
        if protocol=='no_camera': gone = set()
        order = sorted((x,j) for j,x in enumerate(d) if j not in gone)
        res.append([r for r,(_,j) in enumerate(order, 1) if g.pid[j]==pid])
    return res

def by_query(res): return [o.tolist() for o in np.split(res.ranks, res.n_matches.cumsum()[:-1])]

@st.composite
def problems(draw, max_levels=40):
    "Tables, and distances with few or many different values; one query at least can be answered"
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    nq,ng,n_ids = (draw(st.integers(1, o)) for o in (12,40,8))
    q = pd.DataFrame(dict(pid=rng.integers(0, n_ids, nq), camid=rng.integers(0, 3, nq)))
    g = pd.DataFrame(dict(pid=rng.integers(-1, n_ids, ng), camid=rng.integers(0, 3, ng)))
    g.loc[draw(st.integers(0, ng-1))] = q.pid[0],q.camid[0]+1
    levels = draw(st.integers(1, max_levels))
    return q, g, rng.integers(0, levels, (nq,ng))/levels

protocols = ['market','cross_view','no_camera']
dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

@quick
@given(problems(), st.sampled_from(protocols), st.sampled_from(dtypes), st.integers(1, 13))
def test_ranks_are_those_of_the_loop(problem, protocol, dtype, chunk):
    "Ties, one match, many matches, no match, a gallery shorter than the list, any number of queries at a time"
    q,g,dist = problem
    dist = torch.tensor(dist).to(dtype)
    slow,res = loop(dist.double(), q, g, protocol),rank_dist(dist, q, g, protocol, chunk=chunk)
    assert by_query(res)==slow and res.used.tolist()==[bool(o) for o in slow]
    ap = [np.mean(np.arange(1, len(o)+1)/o) if o else np.nan for o in slow]
    inp = [len(o)/o[-1] if o else np.nan for o in slow]
    assert np.allclose(res.ap, ap, rtol=0, atol=1e-12, equal_nan=True) and np.allclose(res.inp, inp, rtol=0, atol=1e-12, equal_nan=True)
    assert res.first_match.tolist()==[o[0] if o else 0 for o in slow]

@quick
@given(problems(), st.sampled_from(protocols))
def test_ranks_on_a_device(problem, protocol):
    "What a GPU would do gives the same ranks"
    q,g,dist = problem
    rows = np.flatnonzero([bool(o) for o in loop(dist, q, g, protocol)])
    for block in dist_blocks(torch.tensor(dist), q, g, protocol, rows): assert np.array_equal(core._device_ranks(block), core._match_ranks(block))

@quick
@given(problems(), st.sampled_from(protocols), st.integers(1, 50))
def test_lists_are_those_of_the_loop(problem, protocol, k):
    q,g,dist = problem
    res = rank_dist(dist, q, g, protocol, max_rank=7)
    top,d = res.lists(np.arange(len(q)), k)
    for i in range(len(q)):
        gone = (g.camid==q.camid[i]) & ((g.pid==q.pid[i]) | (protocol=='cross_view')) & (protocol!='no_camera')
        want = sorted((x,j) for j,x in enumerate(dist[i]) if not gone[j])[:k] if res.used[i] else []
        assert top[i][top[i]>=0].tolist()==[j for _,j in want] and np.allclose(d[i][:len(want)], [x for x,_ in want])
        assert (top[i][len(want):]==-1).all() and np.isnan(d[i][len(want):]).all()
    assert np.array_equal(res.top, res.lists(np.arange(len(q)), 7)[0])

@quick
@given(problems(), st.sampled_from(protocols), st.randoms(use_true_random=False))
def test_order_of_the_gallery(problem, protocol, random):
    "Without ties it does not matter"
    q,g,dist = problem
    dist = dist + np.random.default_rng(0).permutation(dist.size).reshape(dist.shape)*1e-6
    order = random.sample(range(len(g)), len(g))
    a,b = rank_dist(dist, q, g, protocol),rank_dist(dist[:,order], q, g.iloc[order], protocol)
    assert np.array_equal(a.ranks, b.ranks) and np.array_equal(a.n_matches, b.n_matches)

@quick
@given(problems(), st.integers(1, 30))
def test_far_and_near_distractors(problem, n):
    "Strangers behind all matches change nothing; strangers before all matches move every rank by their number"
    q,g,dist = problem
    strangers = pd.DataFrame(dict(pid=-1, camid=7, index=range(n)))[['pid','camid']]
    wide = pd.concat([g, strangers], ignore_index=True)
    res = rank_dist(dist, q, g, 'market')
    add = lambda value: rank_dist(np.hstack([dist, np.full((len(q),n), value)]), q, wide, 'market')
    assert np.array_equal(add(2.).ranks, res.ranks) and np.array_equal(add(-1.).ranks, res.ranks+n)

@quick
@given(problems(), st.integers(-20, 20), st.integers(0, 99))
def test_cosine_knows_no_scale(problem, power, seed):
    q,g,_ = problem
    rng = np.random.default_rng(seed)
    qe,ge = (torch.from_numpy(rng.normal(size=(len(o),6))).float() for o in (q,g))
    res = evaluate(Features(qe, q), Features(ge, g), protocol='no_camera')
    scaled = evaluate(Features(qe*2.**power, q), Features(ge*2.**-power, g), protocol='no_camera')
    assert np.array_equal(res.ranks, scaled.ranks)   # powers of two round nothing

@quick
@given(problems(), st.integers(0, 99))
def test_copies_of_the_gallery(problem, seed):
    "Every image twice: the first of both keeps its order, ranks of copies follow the rule of ties"
    q,g,dist = problem
    twice = pd.concat([g,g], ignore_index=True)
    assert by_query(rank_dist(np.hstack([dist,dist]), q, twice, 'market'))==loop(np.hstack([dist,dist]), q, twice, 'market')

def test_huge_ids():
    q,g = dict(pid=np.array([2**62,5])),dict(pid=np.array([2**62,2**62+1,5,-1]))
    res = rank_dist([[.4,.1,.2,.3], [.4,.1,.2,.3]], q, g, 'no_camera')
    assert res.ranks.tolist()==[4,2]
    assert rank_dist([[.4,.1,.2,.3]]*2, q, g, Protocol('shots', 'path', draws=5)).shots.tolist()==[[4]*5,[2]*5]

@pytest.mark.parametrize('protocol', [Protocol('shots', draws=8), Protocol('shots', anyone=True, draws=8)])
def test_single_shots_against_a_loop(protocol):
    "The same random numbers, one query and one gallery at a time"
    rng = np.random.default_rng(0)
    q = pd.DataFrame(dict(pid=rng.integers(0, 9, 15), camid=rng.integers(0, 3, 15)))
    g = pd.DataFrame(dict(pid=rng.integers(-1, 9, 60), camid=rng.integers(0, 3, 60)))
    dist = rng.integers(0, 25, (15,60))/25
    res = rank_dist(dist, q, g, protocol, chunk=4)
    for i in np.flatnonzero(res.used):
        gone = (g.camid==q.camid[i]) & (protocol.anyone | (g.pid==q.pid[i]))
        for seed in range(8):
            luck = torch.randperm(60, generator=torch.Generator().manual_seed(seed)).numpy()
            ids = np.where(g.pid<0, -1-np.arange(60), g.pid)
            drawn = [max(np.flatnonzero((ids==p) & ~gone), key=lambda j: luck[j]) for p in set(ids[~gone])]
            order = sorted(drawn, key=lambda j: (dist[i,j],j))
            assert res.shots[i,seed]==1+[g.pid[j] for j in order].index(q.pid[i])

# ---- distances in tiles

@pytest.mark.parametrize('dist', [cosine_dist, euclidean_dist, sq_euclidean_dist])
def test_tiles_and_types(dist, monkeypatch, tmp_path):
    "The size of a tile, a memory map and half precision change nothing but rounding"
    from fastreid_nb.eval import features
    rng = np.random.default_rng(0)
    q,g = (torch.from_numpy(rng.normal(size=(n,24))).half() for n in (7,50))
    want = dist(q.double(), g.double())
    for size in (3,50,999):
        monkeypatch.setattr(features, '_tiles', lambda x, n=1: [slice(i, i+size) for i in range(0, len(x), size)])
        assert torch.allclose(dist(q, g).double(), want, atol=1e-5) and dist(q, g).dtype==torch.float32
    disk = np.memmap(tmp_path/'g', np.float16, 'w+', shape=(50,24))
    disk[:] = g.numpy()
    disk.flush()
    ro = np.memmap(tmp_path/'g', np.float16, 'r', shape=(50,24))
    feats = Features(ro, pd.DataFrame(dict(pid=np.arange(50)%5)))
    assert feats.emb.dtype==torch.float16 and feats.emb.data_ptr()==ro.ctypes.data
    asked = Features(q, pd.DataFrame(dict(pid=np.arange(7)%5)))
    assert torch.allclose(dist_rows(asked, feats, dist)(torch.arange(7)).double(), want, atol=1e-5)
    assert feats.pool(['pid']).emb.dtype==torch.float32

def test_zero_features_are_noted():
    df = pd.DataFrame(dict(pid=[0,1,0,1]))
    emb = torch.randn(4,8)
    emb[[1,3]] = 0
    res = evaluate(Features(emb[:2]+1, df[:2]), Features(emb, df))
    assert any('2 of 4 gallery features are zero, in rows 1, 3' in o for o in res.notes)
    assert not evaluate(Features(emb[:1]*1e-30, df[:1]), Features(emb[[0,2]]*1e30, df.iloc[[0,2]])).notes[1:]
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match='1 of 4 gallery features hold NaN or infinity, in row 2'):
            evaluate(Features(emb[:2]+1, df[:2]), Features(emb.index_fill(0, torch.tensor(2), bad), df))

def test_blocks_cover_everything():
    rng = np.random.default_rng(1)
    q,g = (pd.DataFrame(dict(pid=rng.integers(0, 5, n), camid=rng.integers(0, 2, n))) for n in (30,40))
    dist = torch.rand(30,40)
    blocks = list(dist_blocks(dist, q, g, 'market', chunk=7))
    assert all(isinstance(o, DistBlock) for o in blocks) and torch.equal(torch.cat([o.dist for o in blocks]), dist)
    match = q.pid.to_numpy()[:,None]==g.pid.to_numpy()
    own = match & (q.camid.to_numpy()[:,None]==g.camid.to_numpy())
    for o in blocks:
        for pairs,want in ((o.same,match & ~own), (o.gone,own)):
            assert np.array_equal(np.stack(pairs), np.stack(np.nonzero(want[o.rows])))

def test_a_pickled_result_keeps_its_lists():
    rng = np.random.default_rng(2)
    q,g = (pd.DataFrame(dict(pid=rng.integers(0, 5, n))) for n in (9,20))
    dist = torch.rand(9,20)
    res = rank_dist(lambda pos: dist[pos], q, g)
    assert pickle.loads(pickle.dumps(res)).mAP==res.mAP
    with pytest.raises(ValueError, match='no distances'): pickle.loads(pickle.dumps(res)).top
    top = res.top
    assert np.array_equal(pickle.loads(pickle.dumps(res)).top, top)

# ---- results

@pytest.fixture
def result():
    rng = np.random.default_rng(3)
    q = pd.DataFrame(dict(pid=rng.integers(0, 7, 40), camid=rng.integers(0, 3, 40), path=[f'ä{i}' for i in range(40)], view=pd.array([None,2]*20, dtype='Int64')))
    g = pd.DataFrame(dict(pid=rng.integers(-1, 6, 90), camid=rng.integers(0, 3, 90), light=np.where(rng.random(90)<.5, np.nan, 1.5)))
    return rank_dist(rng.random((40,90)), q, g, Protocol('mine', draws=6), metric='random')

def test_results_roundtrip(result, tmp_path):
    back = ReIDResult.load(result.save(tmp_path/'new'/'r.json', k=4))
    for o in ('ap','inp','first_match','why','shots','ranks','n_matches'):
        a,b = getattr(back, o),getattr(result, o)
        assert a.dtype.kind==b.dtype.kind and np.array_equal(a, b, equal_nan=a.dtype.kind=='f'), o
    assert (back.protocol,back.to_dict(),repr(back))==(result.protocol,result.to_dict(),repr(result))
    for o in ('q','g'): pd.testing.assert_frame_equal(getattr(back, o), getattr(result, o))
    assert all(np.array_equal(a, b, equal_nan=True) for a,b in zip(back.lists(range(40), 4), result.lists(range(40), 4)))
    text = (tmp_path/'new'/'r.json').read_text(encoding='utf-8')
    json.loads(text, parse_constant=lambda o: pytest.fail(f'{o} is no JSON'))

def test_precision_and_recall(result):
    lists = by_query(result)
    for k in (1,5,90):
        hits = [sum(r<=k for r in o) for o in lists if o]
        assert result.hits_at(k).tolist()==hits and result.recall_at(k)==np.mean(np.array(hits)>0)
        assert np.isclose(result.precision_at(k), np.mean(hits)/k)
    assert result.score==(result.rank(1)+result.mAP)/2
    for bad in (0,91,2.5):
        with pytest.raises(ValueError, match='k='): result.precision_at(bad)

def test_draws_say_how_sure(result):
    draws = (result.shots[result.used]<=1).mean(0)
    assert np.isclose(result.rank_sd(1), draws.std(ddof=1)) and '±' in repr(result) and '±' not in repr(replace(result, shots=None))
    assert len(plot_cmc([result, replace(result, shots=None)]).lines)==2

def test_vehicle_draws():
    rng = np.random.default_rng(4)
    df = pd.DataFrame(dict(pid=rng.integers(0, 12, 80), camid=0)).assign(path=[f'{i:03d}' for i in rng.permutation(80)])
    feats = Features(torch.randn(80,5), df)
    q,g = one_per_identity(feats, 3)
    test = df.sort_values('path')   # as the reader of VehicleID draws
    want = test.loc[test.sample(frac=1, random_state=3).drop_duplicates('pid').index]
    assert set(g.df.path)==set(want.path) and len(q)+len(g)==80
    draws = evaluate_draws(q, g, n=3, seed=3)   # the order of the rows does not matter
    assert draws.to_df()['rank-1'][3]==evaluate(q, g, protocol='no_camera').rank(1)
    assert np.isclose(draws.sd['mAP'], draws.to_df().mAP.std(ddof=1)) and repr(draws).count('±')==6

# ---- extraction

class Mean(nn.Module):
    preproc = Preproc((32,16))
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(24, 9, generator=torch.Generator().manual_seed(0)))
        self.n,self.limit = 0,10**9
    def forward(self, x):
        self.n += len(x)
        if self.n>self.limit: raise KeyboardInterrupt
        return nn.functional.adaptive_avg_pool2d(x, (4,2)).flatten(1)@self.w

@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=16, test_frac=.8, size=(32,16), progress=False)

options = dict(num_workers=0, progress=False)

@pytest.mark.parametrize('bs,shard,limit', [(16,20,40), (7,5,10), (64,50,0), (8,100,16)])
def test_extraction_resumes(toy, tmp_path, bs, shard, limit):
    "Killed anywhere, with another batch size afterwards: the same rows, and no image of a whole shard again"
    model = Mean()
    want = embed(model, toy.gallery.path.tolist(), normalize=False)
    model.n,model.limit = 0,limit
    with pytest.raises(KeyboardInterrupt): extract(model, toy.gallery, tmp_path, bs=bs, shard=shard, **options)
    n_kept = limit//bs*bs//shard*shard
    assert len(list(tmp_path.glob('0*.npy')))==n_kept//shard
    model.n,model.limit = 0,10**9
    got = extract(model, toy.gallery, tmp_path, bs=11, shard=999, protocol='market', **options)
    assert model.n==len(want)-n_kept and torch.allclose(got.emb, want, atol=1e-6) and got.protocol=='market'
    assert not list(tmp_path.glob('0*.npy')) and isinstance(np.load(tmp_path/'emb.npy', mmap_mode='r'), np.memmap)
    with torch.no_grad(): model.w += 1
    with pytest.raises(ValueError, match='another model'): extract(model, toy.gallery, tmp_path, **options)

def test_images_are_read_once(toy, monkeypatch):
    "Also when some of them cannot be read"
    reads = []
    from fastreid_nb.data.images import TableImages
    plain = TableImages.__getitem__
    monkeypatch.setattr(TableImages, '__getitem__', lambda self,i: (reads.append(i), plain(self, i))[1])
    model,n = Mean(),len(toy.query)+len(toy.gallery)
    full = evaluate_data(model, toy, **options)
    assert len(reads)==n
    lost = toy.gallery.assign(path=['gone.jpg', *toy.gallery.path[1:]])
    data = ReIDData('lost', toy.train, toy.query, lost, toy.protocol)
    reads.clear()
    res = evaluate_data(model, data, skip_bad=True, **options)
    assert len(reads)==n and len(res.g)==len(lost)-1 and '1 of' in res.notes[-1] and full.n_used==res.n_used
    with pytest.raises(FileNotFoundError, match=rf'1 of {n} images cannot be read.*gone.jpg'): evaluate_data(model, data, **options)

def test_a_diverged_model_is_not_an_unreadable_image(toy, tmp_path):
    model = Mean()
    with torch.no_grad(): model.w[0] = torch.nan
    with pytest.raises(ValueError, match='did training diverge'): extract(model, toy.gallery, tmp_path, skip_bad=True, **options)

# ---- parity with the reference implementation

@pytest.mark.parametrize('path', golden_files('evaluator/*.npz') or [None], ids=lambda o: o and o.stem)
def test_golden_evaluator(path):
    if path is None: missing('evaluator/*.npz')
    z,want = np.load(path),json.loads(path.with_name(path.stem.replace('inputs', 'results')+'.json').read_text())
    q,g = (Features(z[k], pd.DataFrame(dict(pid=z[f'{k[0]}_pids'], camid=z[f'{k[0]}_camids']))) for k in ('query','gallery'))
    for name,dist in (('cosine',cosine_dist), ('euclidean',sq_euclidean_dist)):
        row,res = want[f'{name}_aqe0_rerank0'],evaluate(q, g, dist, 'market')
        got = {'Rank-1':res.rank(1), 'Rank-5':res.rank(5), 'Rank-10':res.rank(10), 'mAP':res.mAP, 'mINP':res.mINP, 'metric':res.score}
        for k,v in got.items(): assert abs(100*v-row[k])<1e-5, (name,k)

@pytest.mark.parametrize('path', golden_files('recall_at_k*.npz') or [None], ids=lambda o: o and o.stem)
def test_golden_recall(path):
    if path is None: missing('recall_at_k*.npz')
    z = np.load(path)
    df = pd.DataFrame(dict(pid=z['labels'])).assign(path=np.arange(len(z['labels'])).astype(str))
    feats = Features(z['features'], df, 'leave_one_out')
    for key in (o for o in z.files if o.startswith('recall_at_')):
        k,cosine = int(key.split('_')[2]),key.endswith('cosine1')
        res = evaluate(feats, feats, cosine_dist if cosine else euclidean_dist)
        assert round(100*res.recall_at(k), 2)==z[key], key
