"Holding out, folds, joining and balancing of 00h_data.subsets"
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from fastreid_nb.data.own import from_df
from fastreid_nb.data.core import image_keys, matchable
import fastreid_nb.data.subsets   # adds the methods; chkstyle: ignore

def table(rng, n_ids, n_cams, n):
    return pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(n)], pid=rng.integers(n_ids, size=n), camid=rng.integers(n_cams, size=n)))

def made(seed, name='x', n_ids=20, n_cams=3, n=200): return from_df(table(np.random.default_rng(seed), n_ids, n_cams, n), name=name, seed=seed)
def same(a, b): return all(a.splits[k].equals(b.splits[k]) for k in a.splits)

@pytest.mark.parametrize('seed', range(5))
def test_add(seed):
    "Joined sets share no identity and no camera, keep every row, and leave the parts as they were"
    a,b,c = (made(seed, o) for o in 'abc')
    was = [o.train.copy() for o in (a,b,c)]
    j = sum([b,c], a)
    assert j.train.pid.nunique()==sum(o.train.pid.nunique() for o in (a,b,c)) and j.query.equals(a.query) and j.name=='a+b+c'
    assert j.train.groupby('pid').dsetid.nunique().max()==1 and j.train.groupby('camid').dsetid.nunique().max()==1
    assert not set(j.train.pid[j.train.dsetid!='a']) & (set(a.query.pid) | set(a.gallery.pid))
    assert all(o.train.equals(w) for o,w in zip((a,b,c), was))

def test_add_extra_columns():
    "A column that one set lacks, tracks that would collide, cameras that nobody knows"
    a,b = made(0, 'a'),made(1, 'b')
    a,b = (replace(o, train=o.train.assign(trackid=range(len(o.train)))) for o in (a,b))
    b = replace(b, train=b.train.assign(camid=-1, x=0, y=0, w=5, h=5))
    j = (a+b).train
    assert j.trackid.is_unique and (j.camid[j.dsetid=='b']==-1).all()
    assert image_keys(j).is_unique is not None and j.x.isna().sum()==len(a.train)

def test_add_same_name():
    with pytest.raises(ValueError, match=r"both sets hold \['x'\] in dsetid"): made(0) + made(1)
    with pytest.raises(ValueError, match='both sets hold'): (made(0) + made(1, 'y')) + made(2, 'y')
    assert set((made(0) + made(1).rename('y')).train.dsetid)=={'x','y'}

@pytest.mark.parametrize('seed', range(5))
def test_holdout(seed):
    d = made(seed)
    h = d.holdout(.3, seed=seed)
    assert not set(h.train.pid) & set(h.gallery.pid) and set(h.train.pid) | set(h.gallery.pid) | set(h.query.pid)==set(d.train.pid)
    assert same(h, d.holdout(.3, seed=seed)) and not same(h, d.holdout(.3, seed=seed+1))
    assert matchable(h).all()

@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('k', [2,3,7])
def test_folds(seed, k):
    "Every training row is tested exactly once, and sizes differ by one identity at most"
    d = made(seed)
    fs = list(d.folds(k, seed))
    assert len(fs)==k
    paths = [p for f in fs for o in (f.query,f.gallery) for p in o.path]
    assert sorted(paths)==sorted(d.train.path)
    for f in fs: assert not set(f.train.pid) & (set(f.query.pid) | set(f.gallery.pid))
    n = [pd.concat([f.query,f.gallery]).pid.nunique() for f in fs]
    assert max(n)-min(n)<=1

@pytest.mark.parametrize('k', [0,1,50])
def test_bad_folds(k):
    with pytest.raises(ValueError, match=f'{k} folds of 14 identities: expected 2 to 7'): made(0).folds(k)

def test_combine_all():
    d = made(0)
    d = replace(d, gallery=pd.concat([d.gallery, d.gallery[:3].assign(pid=-1, path=['s1','s2','s3']), d.query[:2]], ignore_index=True))
    a = d.combine_all()
    assert sorted(a.train.path)==sorted([*d.train.path, *d.query.path, *made(0).gallery.path]) and (a.train.pid>=0).all()
    assert same(replace(a, train=d.train), d) and 'say nothing' in a.notes[-1]

@pytest.mark.parametrize('n', [1,2,9])
def test_drop_tail(n):
    d = made(0, n_ids=40)
    c = d.train.pid.value_counts()
    s = d.drop_tail(n)
    assert set(s.train.pid)==set(c[c>=n].index) and len(s.train)==c[c>=n].sum() and same(replace(s, train=d.train), d)
    with pytest.raises(ValueError, match='no identity has 999 images'): d.drop_tail(999)

@pytest.mark.parametrize('seed', range(5))
def test_resample(seed):
    "Only identities in the open range are doubled, about half of them, and every old row stays"
    d = made(seed, n_ids=300, n=2000)
    was,r = d.train.pid.value_counts().sort_index(),d.resample(4, 9, seed=seed)
    ratio = r.train.pid.value_counts().sort_index()/was
    mid = (was>4) & (was<9)
    assert set(ratio[~mid])=={1} and set(ratio[mid])=={1,2} and .3<(ratio[mid]==2).mean()<.7
    assert r.train[r.train['copy']==0].drop(columns='copy').equals(d.train) and r.train.path[r.train['copy']==1].is_unique
    assert same(r, d.resample(4, 9, seed=seed)) and len(d.resample(4, 9, p=0).train)==len(d.train)
    with pytest.raises(ValueError, match='p=1.5: expected a probability'): d.resample(p=1.5)

@pytest.mark.parametrize('seed', range(5))
def test_relabel(seed, tmp_path):
    "Codes are 0, 1, 2, … with training first; who is who does not change; the file says it all"
    rng = np.random.default_rng(seed)
    d = made(seed)
    code = pd.Series(rng.permutation(10**6)[:20], index=range(20))
    big = replace(d, **{k:o.assign(pid=o.pid.map(code)) for k,o in d.splits.items()})
    big = replace(big, gallery=pd.concat([big.gallery, big.gallery[:2].assign(pid=-1, path=['s1','s2'])], ignore_index=True))
    r = big.relabel(tmp_path/'ids.csv')
    assert sorted(r.train.pid.unique())==list(range(r.train.pid.nunique()))
    assert sorted(set().union(*(o.pid for o in r.splits.values())) - {-1})==list(range(20)) and (r.gallery.pid<0).sum()==2
    m = pd.read_csv(tmp_path/'ids.csv').set_index('pid').pid_was
    for k,o in r.splits.items(): assert o.pid.map(m).fillna(-1).tolist()==big.splits[k].pid.tolist()==o.pid_was.tolist()
    assert [p.name for p in tmp_path.iterdir()]==['ids.csv']

def test_leave_one_out_stays_leave_one_out():
    d = from_df(table(np.random.default_rng(0), 20, 1, 200).drop(columns='camid'), protocol='leave_one_out')
    for o in (d.holdout(.5), *d.folds(3)): assert o.protocol=='leave_one_out' and o.query.path.equals(o.gallery.path) and matchable(o).all()
