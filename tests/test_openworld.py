"Verification, intervals, breakdowns, thresholds, fusion and the open world: against loops, and the reference's ROC"
import time
from functools import partial

import matplotlib
matplotlib.use('agg')
import numpy as np, pandas as pd, pytest, torch

from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.eval.breakdown import camera_pairs, cross_domain, heat_map
from fastreid_nb.eval.core import rank_dist
from fastreid_nb.eval.features import Features, cosine_dist
from fastreid_nb.eval.fusion import Calibrator, ece, fuse_dists, reliability
from fastreid_nb.eval.intervals import compare
from fastreid_nb.eval.openset import OpenResult, open_dist
from fastreid_nb.eval.threshold import SameVerdict, Threshold
from fastreid_nb.eval.verification import Roc, evaluate_roc, roc_dist, verify_pairs
from fastreid_nb.heads.model import reid_model
from fastreid_nb.train.checkpoint import load_reid, save_reid
from golden_files import golden_params, missing
from random_tables import tables

def judge(dist, q, g, protocol):
    "Genuine and impostor distances by a double loop"
    genuine,impostor = [],[]
    (q_pid,g_pid),(q_cam,g_cam) = ([o[c].tolist() for o in (q,g)] for c in ('pid','camid'))
    for (i,j),d in np.ndenumerate(dist):
        same = q_pid[i]==g_pid[j]
        if protocol!='no_camera' and q_cam[i]==g_cam[j] and (same or protocol=='cross_view'): continue
        (genuine if same else impostor).append(d)
    return np.sort(genuine),np.sort(impostor)

# ---- ROC

@pytest.mark.parametrize('path', golden_params('rank/r*.npz'))
def test_fastreid_roc(path):
    "The curve that the reference prints, array by array, and its numbers"
    if path is None: missing('rank/r*.npz')
    o = np.load(path)
    if 'roc_fpr' not in o: missing(f'{path.stem}: roc_fpr')
    q,g = (dict(pid=o[f'{k}_pids'], camid=o[f'{k}_camids']) for k in 'qg')
    if np.isnan(o['roc_fpr']).any():
        with pytest.raises(ValueError, match='no genuine pairs'): roc_dist(o['distmat'], q, g, 'market')
        return
    roc = roc_dist(o['distmat'], q, g, 'market', chunk=7)
    assert (roc.n_genuine,roc.n_impostor)==tuple(int((o['roc_py_labels']==k).sum()) for k in (0,1))
    for got,want in zip(roc.fastreid_roc(), (o['roc_fpr'],o['roc_tpr'],o['roc_thr'])): np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    rates = [k for k in o if k.startswith('roc_tpr_at_fpr_')]
    assert len(rates)==4
    for k in rates: assert roc.fastreid_tpr(float(k.rpartition('_')[2]))==pytest.approx(float(o[k]), abs=1e-6)

@pytest.mark.parametrize('protocol', ['market','no_camera','cross_view'])
@pytest.mark.parametrize('kind', ['float16','float32','float64','ties','negative'])
def test_roc_vs_loop(protocol, kind):
    rng = np.random.default_rng(len(kind))
    q,g = tables(rng)
    dist = rng.random((len(q),len(g)))
    if kind=='ties': dist = (dist*6).astype(int)/6
    if kind=='negative': dist = dist-.5
    dist = torch.tensor(dist).to(getattr(torch, kind) if 'float' in kind else torch.float32)
    genuine,impostor = judge(dist.double().numpy(), q, g, protocol)
    for keep,chunk in ((2**18,None), (300,4), (300,None)):
        roc = roc_dist(dist, q, g, protocol, keep=keep, chunk=chunk)
        assert np.array_equal(roc.genuine.astype(float), genuine) and roc.n_impostor==len(impostor)
        assert np.array_equal(roc.impostor[:roc.n_exact].astype(float), impostor[:roc.n_exact])
        pairs = dist.flatten()[roc.impostor_at].double().numpy()
        assert np.array_equal(pairs, impostor[:roc.n_exact])
        for far in (.001,.02,.1):
            t = impostor[int(far*len(impostor)+1e-9)]
            assert roc.threshold(far)==t and roc.far(t)<=far and roc.tar_at(far)==(genuine<t).mean()
    less = (genuine[:,None]<impostor)+(genuine[:,None]==impostor)/2
    assert roc.auc()==pytest.approx(less.mean(), abs=2e-3)
    assert roc_dist(dist, q, g, protocol).auc()==pytest.approx(less.mean(), abs=1e-9)

def test_roc_invariance():
    "Neither the order of the gallery nor the scale of features matters for the cosine; far distractors lower the FAR"
    rng = np.random.default_rng(0)
    q,g = tables(rng)
    q,g = (Features(torch.tensor(rng.normal(size=(len(o),16))), o) for o in (q,g))
    roc,order = evaluate_roc(q, g),rng.permutation(len(g))
    other = evaluate_roc(Features(3*q.emb, q.df), Features(g.emb[order]*7, g.df.iloc[order]))
    np.testing.assert_allclose(other.genuine, roc.genuine, atol=1e-6)
    assert other.tar_at(.05)==pytest.approx(roc.tar_at(.05), abs=.02) and other.eer()==pytest.approx(roc.eer(), abs=.02)
    dist = cosine_dist(q.emb, g.emb)
    far = np.hstack([dist, np.full((len(q),100), 2.)])
    more = roc_dist(far, q.df, pd.concat([g.df, pd.DataFrame(dict(pid=[-1]*100, camid=0, path=[f'd{i}.jpg' for i in range(100)]))]))
    t = roc.threshold(.1)
    assert more.tar(t)==roc.tar(t) and more.far(t)*more.n_impostor==pytest.approx(roc.far(t)*roc.n_impostor)

def test_roc_refused():
    roc = Roc([.1,.2], np.linspace(.1, 1, 50))
    for far in (0,1,-.1,1.5,float('nan')):
        with pytest.raises(ValueError, match='between 0 and 1'): roc.threshold(far)
    with pytest.raises(ValueError, match='at least 100,'): roc.tar_at(.01)
    with pytest.raises(ValueError, match='one identity only'): roc_dist([[.1,.2]], dict(pid=[1], camid=[0]), dict(pid=[1,1], camid=[1,1]))
    with pytest.raises(ValueError, match='NaN among the distances'): roc_dist([[.1,float('nan')]], dict(pid=[1], camid=[0]), dict(pid=[1,2], camid=[1,1]))
    with pytest.raises(ValueError, match='keep=0'): roc_dist([[.1,.2]], dict(pid=[1], camid=[0]), dict(pid=[1,2], camid=[1,1]), keep=0)
    big = roc_dist([[.1,.2]], dict(pid=[2**62], camid=[0]), dict(pid=[2**62,2**62-1], camid=[1,1]))
    assert (big.n_genuine,big.n_impostor,big.auc())==(1,1,1)

def test_verify_pairs_vs_all_thresholds():
    rng = np.random.default_rng(0)
    feats = Features(torch.tensor(rng.normal(size=(40,3))), pd.DataFrame(dict(pid=np.arange(40)//4)))
    a,b = rng.integers(0, 40, (2,300))
    pairs = pd.DataFrame(dict(a=a, b=b, same=a//4==b//4, fold=np.arange(300)%3))
    d,same,folds = cosine_dist(feats.emb, feats.emb).numpy()[a,b],pairs.same.to_numpy(),pairs.fold.to_numpy()
    for fold,row in verify_pairs(feats, pairs).iterrows():
        rest = folds!=fold
        best = max(((d[rest]<t)==same[rest]).mean() for t in [*d,9.])
        assert ((d[rest]<row.threshold)==same[rest]).mean()==pytest.approx(best)
        assert row.accuracy==pytest.approx(((d[~rest]<row.threshold)==same[~rest]).mean())

# ---- intervals

def scored(seed=0, nq=60, **kwargs):
    q,g = tables(np.random.default_rng(seed), nq, 200, 30)
    return rank_dist(np.random.default_rng(seed+100).random((nq,200)), q, g, **kwargs)

def test_intervals_market_size():
    "A thousand draws over 750 identities in less than two seconds, the same for the same seed"
    rng = np.random.default_rng(0)
    res = scored()
    res.why,res.q = np.full(3368, ''),pd.DataFrame(dict(pid=rng.integers(0, 750, 3368)))
    res.ap,res.inp,res.first_match = rng.random(3368),rng.random(3368),rng.integers(1, 30, 3368)
    start = time.perf_counter()
    table = res.intervals(n=1000, seed=3)
    assert time.perf_counter()-start<2
    assert table.equals(res.intervals(n=1000, seed=3)) and not table.equals(res.intervals(n=1000, seed=4))
    sd = (table.high-table.low).mAP/3.92
    assert sd==pytest.approx(res.ap.std()/3368**.5, rel=.15)   # here all queries are independent

def test_intervals_of_draws():
    "With single-shot galleries rank-k is the mean over galleries, and dropped queries are left out"
    res = scored(protocol='cuhk03')
    table = res.intervals(n=200)
    assert not res.used.all() and res.shots.shape[1]==100
    for name,want in (('mAP',res.mAP),('mINP',res.mINP),('rank-1',res.rank(1)),('rank-10',res.rank(10))):
        assert table.value[name]==pytest.approx(want) and table.low[name]<=want<=table.high[name]

def test_compare():
    a = scored()
    right = (a.q.pid.to_numpy()[:,None]==a.g.pid.to_numpy())
    b = rank_dist(np.random.default_rng(100).random(right.shape)-.5*right, a.q, a.g)
    table,back = compare(a, b, n=500),compare(b, a, n=500)
    assert table.difference['mAP']==pytest.approx(b.mAP-a.mAP) and table.p['mAP']<.01
    np.testing.assert_allclose(back.low, -table.high, atol=.02)
    with pytest.raises(ValueError, match='that differ'): compare(a, scored(1))
    with pytest.raises(ValueError, match='under market and 60 under no_camera that differ'): compare(a, scored(protocol='no_camera'))

# ---- breakdown

def test_breakdown_groups():
    res = scored()
    table = res.breakdown(np.where(np.arange(60)<50, np.arange(60)/7, np.nan), bins=3)
    assert table.queries.sum()==res.n_used and len(table)==4 and table.index[-1]!=table.index[-1]   # NaN is a group
    assert (table.mAP*table.queries).sum()/res.n_used==pytest.approx(res.mAP)
    alone = res.breakdown(np.where(res.q.pid==res.q.pid[res.used].iloc[0], 'one', 'others'))
    assert np.isnan(alone.low['one']) and alone.ids['one']==1

def test_camera_pairs_vs_parts():
    rng = np.random.default_rng(2)
    q,g = (Features(torch.tensor(rng.normal(size=(len(o),8))), o) for o in tables(rng, 60, 200))
    table,dist = camera_pairs(q, g),cosine_dist(q.emb, g.emb)
    for (a,b),row in table.iterrows():
        if a==b: assert row.queries==0 and np.isnan(row.mAP)
        else:
            rows,cols = np.flatnonzero(q.df.camid==a),np.flatnonzero(g.df.camid==b)
            res = rank_dist(dist[rows][:,cols], q.df.iloc[rows], g.df.iloc[cols], 'market')
            assert (row.queries,row.mAP)==(res.n_used,pytest.approx(res.mAP))
    assert len(heat_map(table.mAP.unstack()).texts)==9
    with pytest.raises(ValueError, match='expected a dict'): cross_domain({}, [])

# ---- threshold

@pytest.mark.parametrize('levels', [None,40])
def test_threshold_never_exceeds(levels):
    "The threshold is the largest that accepts at most the wanted share, with ties too"
    rng = np.random.default_rng(0)
    impostor = rng.random(5000)
    if levels: impostor = (impostor*levels).astype(int)/levels
    roc = Roc(rng.random(100)/2, impostor)
    for far in (.01,.1,.5):
        t = Threshold.fit(roc, far, n=100)
        assert roc.far(t.value)<=far and t.low<=t.value<=t.high
        above = impostor[impostor>t.value]
        assert not len(above) or roc.far(above.min())>far

def test_threshold_draws_people():
    "People who look alike widen the interval; distractors are drawn one by one"
    rng = np.random.default_rng(0)
    pid = np.repeat(np.arange(60), 2)
    q,g = (pd.DataFrame(dict(pid=pid, camid=c)) for c in (0,1))
    g.loc[:9,'pid'] = -1
    block = rng.random((60,60))
    dist = block[pid][:,pid]+.01*rng.random((120,120))   # four pairs of images for each pair of people
    roc = roc_dist(dist, q, g)
    people,pairs = Threshold.fit(roc, .01),Threshold.fit((roc.genuine,roc.impostor), .01)
    assert people.value==pairs.value and people.high-people.low>1.3*(pairs.high-pairs.low)
    assert people==Threshold.fit(roc, .01)

def test_threshold_in_checkpoint(tmp_path):
    model = reid_model(partial(osnet, width='x0_25'), 3)
    model.threshold = Threshold.fit((np.linspace(0, .5, 50), np.linspace(.3, 1, 2000)), .01).to_dict()
    save_reid(tmp_path/'a.pt', model)
    back = load_reid(tmp_path/'a.pt')
    assert back.threshold==model.threshold and Threshold.of(back).far==.01
    save_reid(tmp_path/'b.pt', model, threshold=Threshold(.5, metric='euclidean'))
    back = load_reid(tmp_path/'b.pt')
    assert Threshold.of(back).metric=='euclidean'
    im = torch.rand(3,64,32)
    assert back.same(im, im) and isinstance(back.same(im, im), SameVerdict)
    back.threshold = .5   # as in files of 0.0.1
    assert Threshold.of(back)==Threshold(.5)
    back.threshold = None
    with pytest.raises(ValueError, match='has no threshold'): back.same(im, im)
    with pytest.raises(ValueError, match='no plain values'): save_reid(tmp_path/'c.pt', model, threshold=dict(value=.5, far=np.float64(.01)))
    with pytest.raises(ValueError, match='threshold=None'): save_reid(tmp_path/'c.pt', model, threshold=dict(far=.01))

# ---- fusion

@pytest.mark.parametrize('how', ['isotonic','logistic'])
def test_calibrator(how):
    rng = np.random.default_rng(0)
    train,test = (Roc(rng.normal(.5, .15, 2000), rng.normal(.9, .15, 20000)) for _ in range(2))
    c = Calibrator.fit(train, how)
    x = np.linspace(-1, 3, 200)
    p = c(x)
    assert ((p>=0) & (p<=1)).all() and (np.diff(p)<=1e-12).all() and (np.diff(c.dist(x))>0).all()
    np.testing.assert_allclose(c(torch.tensor(x)).numpy(), p, atol=1e-6)
    assert ece(reliability(c, test))<.03 and reliability(c, test).weight.sum()==pytest.approx(1)
    binned = Roc(train.genuine, np.unique(train.impostor.round(2)), np.unique(train.impostor.round(2), return_counts=True)[1])
    assert abs(Calibrator.fit(binned, how)(x)-p).mean()<.01

def test_fuse_functions():
    rng = np.random.default_rng(0)
    a,b = torch.tensor(rng.random((2,20,30)), dtype=torch.float32)
    c = Calibrator.fit(Roc(rng.random(50)/2, rng.random(500)))
    whole,rows = fuse_dists([a,b], [c,c], [3,1]),fuse_dists([lambda pos: a[pos],b], [c,c], [3,1])
    pos = torch.tensor([3,7])
    torch.testing.assert_close(rows(pos), whole[pos])
    torch.testing.assert_close(whole, 1-.75*c(a)-.25*c(b), rtol=0, atol=1e-5)

# ---- open world

def test_open_vs_loop():
    rng = np.random.default_rng(0)
    q,g = tables(rng, 25, 60)
    dist = torch.tensor((rng.random((25,60))*20).astype(int)/20)   # ties
    res = open_dist(dist, q, g, k=4, enrolled=.5, seed=1)
    ids = np.unique(g.pid[g.pid>=0])
    there = np.isin(g.pid, np.random.default_rng(1).permutation(ids)[:round(len(ids)/2)]) | (g.pid<0)
    g_pid,g_cam = g.pid.tolist(),g.camid.tolist()
    for i,o in q.iterrows():
        kept = [j for j in range(60) if there[j] and not (g_pid[j]==o.pid and g_cam[j]==o.camid)]
        first = sorted(kept, key=lambda j: (dist[i,j].item(), j))[:4]
        assert np.allclose(res.top_dist[i], dist[i,first]) and res.right[i].tolist()==[g.pid[j]==o.pid for j in first]
        assert res.known[i]==any(g.pid[j]==o.pid for j in kept)
    t = res.threshold(.2)
    assert (res.top_dist[~res.known,0]<t).mean()<=.2
    found = [(res.right[i,:2] & (res.top_dist[i,:2]<t)).any() for i in np.flatnonzero(res.known)]
    assert res.tpir(.2, rank=2)==pytest.approx(np.mean(found))
    rule = res.rule(.3, k=3)
    alarms = (res.top_dist[:,:3]<.3).any(1)
    right = ((res.top_dist[:,:3]<.3) & res.right[:,:3]).any(1)
    assert rule==dict(precision=right.sum()/alarms.sum(), recall=right.sum()/res.known.sum(), false_alarms=1000*(alarms & ~right).mean())

def test_open_small_gallery():
    "Lists longer than the gallery are filled with infinite distances that are never right"
    q,g = dict(pid=[1,5], camid=[0,0]),dict(pid=[1,2], camid=[1,1])
    res = open_dist([[.1,.2],[.3,.4]], q, g, k=5)
    assert res.top_dist.shape==(2,5) and np.isinf(res.top_dist[:,2:]).all() and not res.right[:,2:].any()
    assert res.known.tolist()==[True,False] and res.rule(np.inf)['precision']==.5
    assert np.isnan(res.rule(0.)['precision'])
    with pytest.raises(ValueError, match='rate of 0.1 is less than one of 1 unknown queries: expected at least 10'): res.tpir(.1)
    with pytest.raises(ValueError, match='enrolled=0'): open_dist([[.1,.2],[.3,.4]], q, g, enrolled=0)
    with pytest.raises(ValueError, match='no query is known'): OpenResult(np.ones((2,1)), np.zeros((2,1), bool), np.zeros(2, bool)).tpir(.5)
