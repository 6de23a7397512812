"Samplers: invariants over random tables, agreement with what was measured on the reference, and several processes"
import json, os, pickle, random
from collections import Counter, deque
from datetime import timedelta
from functools import partial

import numpy as np, pandas as pd, pytest, torch

from fastreid_nb.augment.samplers import pk_batches
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.augment.samplers import _next, add_positives, domain_shares, draw_rows, for_rank, take_turns
from fastreid_nb.augment.samplers import class_balanced_batches, cross_camera_batches, domain_batches, uniform_batches
from fastreid_nb.data.toy import toy_reid
from golden_files import golden_files, missing
from slow import slow_but

def rng(*seed): return np.random.default_rng(seed or 0)

def counts(r, kind, n):
    "Pictures of each of `n` identities"
    if kind=='single': return np.ones(n, int)
    if kind=='huge': return np.r_[500,np.ones(n-1, int)]
    return np.clip(r.geometric(r.uniform(.03,.9), n), 1, 200)

kinds = ['mixed','single','huge','one camera','camera each','one set']

def table(seed, kind):
    "Identities with gaps in their numbers, in random order; cameras belong to sets"
    r = rng(seed, kinds.index(kind))
    n = int(r.integers(2, 40))
    names = r.choice(10_000, n, replace=False)
    n_sets = 1 if kind=='one set' else int(r.integers(1, 5))
    i = np.repeat(np.arange(n), counts(r, kind, n))
    d = r.integers(n_sets, size=n)[i]
    cam = 0 if kind=='one camera' else np.arange(len(i)) if kind=='camera each' else r.integers(r.integers(1, 7), size=len(i)) + 10*d
    return pd.DataFrame(dict(pid=names[i], camid=cam, dsetid=np.array(list('abcd'))[d])).sample(frac=1, random_state=seed, ignore_index=True)

def call(f, df, p, k, r): return f(df.pid.to_numpy(), p, k, r, **(dict(df=df) if f in needs_df else {}))

by_camera,with_other_cams = partial(domain_batches, by='camid'),partial(domain_batches, cross_camera=True)
needs_df = [cross_camera_batches, domain_batches, by_camera, with_other_cams]
grouped = dict(pk=pk_batches, cross=cross_camera_batches, domain=domain_batches, camera=by_camera, domain_cross=with_other_cams)
samplers = grouped | dict(balanced=class_balanced_batches, uniform=uniform_batches)

def tables(n=5, fast=2): return pytest.mark.parametrize('seed,kind', slow_but([(s, k) for k in kinds for s in range(n)], *range(fast)))

def sizes(df, seed):
    "p and k for a table: any that a sampler may be asked for"
    r = rng(seed, 99)
    return int(r.integers(1, df.pid.nunique()+1)),int(r.integers(1, 9))

def draw(name, df, p, k, *seed):
    "An epoch, or None where the sampler says that it cannot"
    try: return call(samplers[name], df, p, k, rng(*seed))
    except ValueError as e:
        assert any(o in str(e) for o in ('lower', 'no place for', 'use p='))
        return None

## Every sampler

@tables()
@pytest.mark.parametrize('name', samplers)
def test_shape_len_and_seed(name, seed, kind):
    "Rows of the table, p·k in a batch, as many batches for any seed, and the same batches for the same seed"
    df = table(seed, kind)
    p,k = sizes(df, seed)
    b = draw(name, df, p, k, seed)
    if b is None: return
    assert b.ndim==2 and b.shape[1]==p*k and len(b)>=1 and np.issubdtype(b.dtype, np.integer)
    assert b.min()>=0 and b.max()<len(df)
    assert np.array_equal(b, draw(name, df, p, k, seed))
    assert {len(draw(name, df, p, k, seed, i)) for i in range(5)}=={len(b)}

@tables()
@pytest.mark.parametrize('name', grouped)
def test_groups(name, seed, kind):
    "A batch is p different identities with exactly k pictures each, side by side, and none repeated while there are enough"
    df = table(seed, kind)
    p,k = sizes(df, seed)
    b = draw(name, df, p, k, seed)
    if b is None: return
    who = df.pid.to_numpy()[b].reshape(len(b), p, k)
    assert (who==who[...,:1]).all()
    assert all(len(set(o))==p for o in who[...,0].tolist())
    if name in ('pk','domain','camera'):
        n_pics = df.pid.value_counts()
        assert all(len(set(g))==min(k, n_pics[df.pid[g[0]]]) for g in b.reshape(-1,k).tolist())

@tables(4)
@pytest.mark.parametrize('name', samplers)
def test_row_order_does_not_matter(name, seed, kind):
    "Who is in which batch depends on the identities, not on the order of the rows"
    if name=='uniform': return
    df = table(seed, kind)
    p,k = sizes(df, seed)
    b = draw(name, df, p, k, seed)
    if b is None: return
    mixed = df.sample(frac=1, random_state=seed+1, ignore_index=True)
    assert np.array_equal(df.pid.to_numpy()[b], mixed.pid.to_numpy()[draw(name, mixed, p, k, seed)])

@pytest.mark.parametrize('name', samplers)
def test_other_randomness_is_left_alone(name):
    state = lambda: (np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate(), torch.get_rng_state().tolist())
    df = table(1, 'one set').assign(camid=0)
    keep,before = df.copy(),state()
    assert draw(name, df, 2, 2) is not None
    assert state()==before
    pd.testing.assert_frame_equal(df, keep)

@pytest.mark.parametrize('name', samplers)
@pytest.mark.parametrize('p,k,msg', [(0,2,'expected 1 or more'), (2,0,'expected 1 or more'), (99,2,'lower p|use p=')])
def test_refuses(name, p, k, msg):
    df = table(0, 'single')
    if name=='balanced' and p==99: return
    with pytest.raises(ValueError, match=msg): call(samplers[name], df, p, k, rng())

@pytest.mark.parametrize('name', samplers)
def test_nothing_to_draw_from(name):
    with pytest.raises(ValueError): call(samplers[name], table(0, 'mixed')[:0], 2, 2, rng())

@pytest.mark.parametrize('name', ['cross','domain','camera','balanced'])
def test_more_pictures_than_there_are(name):
    "p·k may be larger than the data, as long as there are p identities"
    df = pd.DataFrame(dict(pid=[4,5,6,6], camid=[0,1,2,2], dsetid='a'))
    f = partial(samplers[name], weights={0:1, 1:1, 2:1}) if name=='camera' else samplers[name]
    b = f(df.pid, 3, 8, rng(), **({} if name=='balanced' else dict(df=df)))
    assert b.shape==(1,24)
    if name!='balanced': assert Counter(df.pid[b[0]])=={4:8, 5:8, 6:8} and set(b[0])=={0,1,2,3}

def test_identities_may_be_words():
    df = table(1, 'one set').assign(camid=0)
    named = df.assign(pid=df.pid.map('person {:05}'.format))
    for f in grouped.values(): assert np.array_equal(call(f, df, 2, 3, rng()), call(f, named, 2, 3, rng()))

## Which pictures

def test_draw_rows_is_even():
    labels = rng().permutation(np.repeat([3,1,7], [2,5,1]))
    rows = draw_rows(labels, np.repeat([7,1,3,1], 5000), rng())
    assert (labels[rows]==np.repeat([7,1,3,1], 5000)).all()
    n = np.bincount(rows, minlength=8)
    expected = np.select([labels==3, labels==1], [2500, 2000], 5000)
    assert (abs(n-expected)<5*np.sqrt(expected)).all()

@pytest.mark.parametrize('labels,which', [([1,2], [3]), ([1,2], [0,1]), ([], [1]), (['a'], ['b'])])
def test_draw_rows_refuses(labels, which):
    with pytest.raises(ValueError, match='has no rows'): draw_rows(labels, which, rng())

def candidates(df, row, cross):
    "Places from which the positives of `row` may come, in plain words"
    same = df.pid==df.pid[row]
    other,rest = same & (df.camid!=df.camid[row]) & cross,same & (df.index!=row)
    return set(np.flatnonzero(other if other.any() else rest if rest.any() else same))

@tables(3, 1)
@pytest.mark.parametrize('cross', [True,False])
def test_positives(seed, kind, cross):
    "Only candidates, all different while there are enough, and then repeated in turn"
    df = table(seed, kind)
    df,k = df[:150],int(rng(seed).integers(1, 9))
    out = add_positives(np.arange(len(df)), k, df.pid, rng(seed), df.camid if cross else None)
    assert (out[:,0]==np.arange(len(df))).all()
    for row,*pos in out.tolist():
        cands,n = candidates(df, row, cross),Counter(pos)
        assert set(pos)<=cands and len(n)==min(k-1, len(cands))
        if pos: assert max(n.values())-min(n.values())<=1

def test_positives_are_even():
    df = pd.DataFrame(dict(pid=[8,8,3,8,8,8], camid=[0,0,0,1,2,1]))
    out = add_positives([1]*6000, 3, df.pid, rng(), df.camid)
    n = Counter(map(tuple, out[:,1:].tolist()))
    assert set(n)=={(a,b) for a in (3,4,5) for b in (3,4,5) if a!=b} and max(n.values())<1150 and min(n.values())>850

def test_positives_refuse():
    with pytest.raises(ValueError, match='k=0'): add_positives([0], 0, [1,1], rng())

## Positives from other cameras

@tables()
@pytest.mark.parametrize('passes', [1,3])
def test_cross_camera(seed, kind, passes):
    "Each identity once in a pass, as many passes as asked for, positives by other cameras wherever there are any"
    df = table(seed, kind)
    p,k = sizes(df, seed)
    n = df.pid.nunique()//p
    b = cross_camera_batches(df.pid, p, k, rng(seed), df, passes=passes)
    assert b.shape==(passes*n, p*k)
    for one in np.split(b, passes): assert len(set(df.pid[one[:,::k].ravel()]))==n*p
    cam,n_cams = df.camid.to_numpy()[b].reshape(-1,k),df.groupby('pid').camid.nunique()
    several = n_cams[df.pid[b[:,::k].ravel()]].to_numpy()>1
    assert (cam[several,1:]!=cam[several,:1]).all()

def test_everybody_comes_in_the_end():
    "Who is left out changes from epoch to epoch, and every picture is drawn"
    df = table(5, 'mixed')
    for f in grouped.values():
        if f is not by_camera: assert set(np.concatenate([call(f, df, 3, 2, rng(i)).ravel() for i in range(300)]))==set(range(len(df)))

@pytest.mark.parametrize('f', [cross_camera_batches, with_other_cams, by_camera])
def test_tables_that_do_not_fit(f):
    df = table(1, 'one camera')
    df['dsetid'] = 'a'
    with pytest.raises(ValueError, match="no column 'camid'"): f(df.pid, 1, 2, rng(), df[['pid','dsetid']])
    with pytest.raises(ValueError, match='same rows in the same order'): f(df.pid, 1, 2, rng(), df[1:])
    with pytest.raises(ValueError, match='passes=0'): f(df.pid, 1, 2, rng(), df, passes=0)

## Several sets

@pytest.mark.parametrize('seed', range(40))
def test_shares(seed):
    "They sum to p, differ from the exact share by less than one, and follow the weights"
    r = rng(seed)
    w = dict(zip('abcdef', r.random(r.integers(1, 7)) + .05))
    p = int(r.integers(1, 64))
    try: got = domain_shares(list(w), p, w)
    except ValueError as e:
        assert 'no place for' in str(e) and p*min(w.values())/sum(w.values())<1
        return
    exact = {k:p*v/sum(w.values()) for k,v in w.items()}
    assert sum(got.values())==p and all(abs(got[k]-exact[k])<1 for k in w)
    assert all(got[a]>=got[b] for a in w for b in w if w[a]>w[b])
    n = r.integers(1, 9, len(w))
    assert domain_shares(list(w), n.sum(), dict(zip(w, n)))==dict(zip(w, n))

@pytest.mark.parametrize('weights', [dict(a=1), dict(a=1, b=1, c=1), dict(a=0, b=0), dict(a=-1, b=1), dict(a=float('nan'), b=1), dict(a=float('inf'), b=1), {}])
def test_shares_refuse(weights):
    with pytest.raises(ValueError, match='expected'): domain_shares('ab', 4, weights)

@tables()
@pytest.mark.parametrize('passes', [1,2])
def test_domains(seed, kind, passes):
    "Fixed numbers per domain, nobody of a domain drawn twice more than another, everybody at least once, and the length as documented"
    df = table(seed, kind)
    p,k = sizes(df, seed)
    n_ids = df.groupby('dsetid').pid.nunique()
    r = rng(seed, 7)
    weights = dict(zip(n_ids.index, r.integers(1, 4, len(n_ids)).tolist())) if seed%2 else None
    try: share = domain_shares(n_ids.index, p, weights)
    except ValueError: return
    if any(n_ids[o]<share[o] for o in share):
        with pytest.raises(ValueError, match='places in each batch'): domain_batches(df.pid, p, k, rng(seed), df, weights=weights, passes=passes)
        return
    b = domain_batches(df.pid, p, k, rng(seed), df, weights=weights, passes=passes)
    assert len(b)==max(-(-passes*n_ids[o]//share[o]) for o in share)
    sets = df.dsetid.to_numpy()[b[:,::k]]
    for o in share:
        assert ((sets==o).sum(1)==share[o]).all()
        n = Counter(df.pid.to_numpy()[b[:,::k]][sets==o])
        assert len(n)==n_ids[o] and max(n.values())-min(n.values())<=1 and min(n.values())>=passes

@pytest.mark.parametrize('seed', range(20))
def test_cameras(seed):
    "Each camera has its share of the anchors in every batch, and everybody is drawn; positives may come from anywhere"
    r = rng(seed)
    df = pd.DataFrame(dict(pid=r.integers(40, size=600), camid=r.integers(6, size=600), dsetid='a'))
    p = int(r.integers(6, 20))
    b = domain_batches(df.pid, p, 4, rng(seed), df, by='camid')
    share,cam = domain_shares(range(6), p),df.camid.to_numpy()[b].reshape(-1,4)
    for c in share: assert ((cam[:,0].reshape(-1,p)==c).sum(1)==share[c]).all()
    assert len(set(df.pid[b.ravel()]))==df.pid.nunique()
    assert .7<(cam[:,1:]!=cam[:,:1]).mean()<.95

def test_rounds_are_not_alike():
    "Every pair of a domain meets, though its identities fill whole batches"
    out = take_turns(dict(a=range(6)), dict(a=2), 90, rng())
    assert len({tuple(sorted(o)) for o in out.tolist()})==15 and set(np.bincount(out.ravel()))=={30}

def test_short_lists_choose_first():
    "Camera 0 saw two people, whom camera 1 saw as well: there are enough if camera 0 comes first"
    df = pd.DataFrame(dict(pid=[0,1,0,1,2,3,4,5], camid=[9]*2+[2]*6))
    b = domain_batches(df.pid, 4, 1, rng(), df, by='camid')
    assert all({0,1}<set(df.pid[o]) and sorted(df.camid[o])==[2,2,9,9] for o in b)

def test_weight_zero_leaves_out():
    df = pd.DataFrame(dict(pid=np.repeat(range(12), 3), camid=0, dsetid=np.repeat(list('abc'), 12)))
    b = domain_batches(df.pid, 4, 2, rng(), df, weights=dict(a=1, b=0, c=3))
    assert set(df.dsetid[b.ravel()])=={'a','c'} and len(b)==4

@pytest.mark.parametrize('seed', range(150))
def test_lists_that_overlap(seed):
    "Either refused at once, or never stuck: different identities, each from its list"
    r = rng(seed)
    lists = {i:np.flatnonzero(r.random(12)<r.uniform(.2,1)) for i in range(r.integers(1, 5))}
    if not all(len(o) for o in lists.values()): return
    lists = dict(sorted(lists.items(), key=lambda o: len(o[1])))
    n = {i:int(r.integers(1, 5)) for i in lists}
    try: out = take_turns(lists, n, 30, rng(seed))
    except ValueError as e:
        assert 'places in each batch' in str(e)
        if not sum(map(len, lists.values()))>len(set(np.concatenate(list(lists.values())))): assert any(len(lists[i])<n[i] for i in lists)
        return
    assert out.shape==(30, sum(n.values())) and all(len(set(o))==len(o) for o in out.tolist())
    for i,part in zip(lists, np.split(out, np.cumsum(list(n.values()))[:-1], axis=1)): assert np.isin(part, lists[i]).all()

def test_waiting():
    "Who is in the batch already waits at the front, and comes once in a new round"
    queue = deque([1,2,3,4])
    assert _next(queue, [1,2,3,4,5], 1, {1,2}, rng())==[3] and list(queue)==[1,2,4]
    got = _next(queue, [1,2,3,4,5], 3, {1,2}, rng())
    assert set(got)=={3,4,5} and list(queue)[:2]==[1,2] and len(queue)==len(set(queue))

def test_some_overlapping_lists_fit():
    "The test above is not passed by refusing everything"
    lists = dict(a=[1,2,3], b=[2,3,4,5], c=[3,4,5,6,7,8])
    out = take_turns(lists, dict(a=2, b=2, c=2), 100, rng())
    assert out.shape==(100,6) and set(out.ravel())==set(range(1,9))

## Without groups

@tables(4)
def test_uniform(seed, kind):
    df = table(seed, kind)
    p,k = sizes(df, seed)
    if len(df)<p*k: return
    b = uniform_batches(df.pid, p, k, rng(seed))
    assert b.shape==(len(df)//(p*k), p*k) and len(np.unique(b))==b.size

def test_class_balanced():
    "Every identity as often as any other, and within it every picture"
    n = [1,3,40,200]
    pids = rng().permutation(np.repeat(range(4), n))
    b = np.concatenate([class_balanced_batches(pids, 8, 4, rng(i)) for i in range(400)])
    assert b.shape==(400*(244//32), 32)
    often = np.bincount(b.ravel(), minlength=244)
    assert abs(np.bincount(pids, often)/b.size-.25).max()<.006
    for i in range(4): assert often[pids==i].std()<1.3*np.sqrt(often[pids==i].mean())
    assert class_balanced_batches([5,5,6], 8, 4, rng()).shape==(1,32)

## Several processes

@tables(3, 1)
@pytest.mark.parametrize('name', samplers)
@pytest.mark.parametrize('world', [1,2,3])
def test_ranks(name, seed, kind, world):
    "All processes together have the batches of one with p·world; in a batch no two share an identity; all have as many"
    df = table(seed, kind)
    p,k = sizes(df, seed)
    p = max(p//world, 1)
    whole = draw(name, df, p*world, k, seed)
    f = [for_rank(samplers[name], r, world) for r in range(world)]
    if whole is None:
        with pytest.raises(ValueError, match=f'{world} processes with p={p} each'): f[0](df.pid, p, k, rng(seed), df)
        return
    parts = [o(df.pid, p, k, rng(seed), df) for o in f]
    assert {o.shape for o in parts}=={(len(whole), p*k)}
    assert np.array_equal(np.sort(np.hstack(parts)), np.sort(whole))
    if name not in grouped: return
    for rows in zip(*parts): assert len(set.union(*(set(df.pid[o]) for o in rows)))==sum(len(set(df.pid[o])) for o in rows)==p*world

def test_ranks_share_domains():
    "Shares that can be divided by the number of processes are the same in each"
    df = pd.DataFrame(dict(pid=np.repeat(range(60), 4), camid=0, dsetid=np.repeat(['a','b','b'], 80)))
    for r in range(4):
        b = for_rank(domain_batches, r, 4)(df.pid, 4, 2, rng(), df)
        assert ((df.dsetid.to_numpy()[b[:,::2]]=='a').sum(1)==2).all()

@pytest.mark.parametrize('rank,world', [(2,2), (-1,2), (0,0)])
def test_ranks_refuse(rank, world):
    with pytest.raises(ValueError, match='expected 0 to'): for_rank(pk_batches, rank, world)

def test_ranks_refuse_other_shapes():
    with pytest.raises(ValueError, match=r'batches of shape \(1, 3\)'): for_rank(lambda pids, p, k, rng: np.zeros((1,3), int), 0, 2)([1,2], 1, 1, rng())

def test_samplers_survive_pickling():
    df = table(2, 'one set')
    for f in (for_rank(pk_batches, 1, 2), for_rank(partial(domain_batches, by='dsetid'), 0, 1)):
        assert np.array_equal(pickle.loads(pickle.dumps(f))(df.pid, 1, 2, rng(), df), f(df.pid, 1, 2, rng(), df))

@pytest.fixture(scope='module')
def data(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=16, size=(64,32), progress=False)

def own_loader(data, batches, **kwargs): return reid_dls(data, size=(64,32), augs=[], num_workers=0, device='cpu', batches=batches, **kwargs).train

def process(rank, world, folder, data):
    "What one of several processes does: two epochs of its own batches, told to all others"
    torch.set_num_threads(1)   # a fork has none of the threads
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world,
        timeout=timedelta(minutes=3))
    dl = own_loader(data, for_rank(cross_camera_batches, rank, world), p=2, k=2, seed=3)
    pids = torch.tensor([b[1].tolist() for _ in range(2) for b in dl])
    everyone = [torch.zeros_like(pids) for _ in range(world)]
    torch.distributed.all_gather(everyone, pids)
    if rank==0: np.save(f'{folder}/pids.npy', torch.stack(everyone))
    torch.distributed.destroy_process_group()

@pytest.mark.skipif(not torch.distributed.is_available(), reason='this torch has no torch.distributed')
def test_two_processes(tmp_path, data):
    "Two real processes: the same number of batches, nobody in both at the same step, together the plan of one"
    torch.multiprocessing.start_processes(process, (2, tmp_path, data), nprocs=2, start_method='fork' if hasattr(os, 'fork') else 'spawn')
    pids = np.load(tmp_path/'pids.npy')
    one = own_loader(data, cross_camera_batches, p=4, k=2, seed=3)
    plan = np.array([b[1].tolist() for _ in range(2) for b in one])
    assert pids.shape==(2, len(plan), 4)
    assert np.array_equal(np.sort(np.hstack(pids)), np.sort(plan))
    assert not (pids[0][:,:,None]==pids[1][:,None]).any()

## In a loader

@pytest.mark.parametrize('name', samplers)
def test_loader(data, name):
    "A loader takes every sampler, with the table if it wants one, and its length is the number of batches it gives"
    dl = own_loader(data, samplers[name], p=4, k=2)
    for _ in range(2): assert len(list(dl))==len(dl)
    if name=='cross':
        cam = dl.one_batch()[2].view(-1,2)
        assert (cam[:,0]!=cam[:,1]).all()

## Golden data

built = dict(NaiveIdentitySampler=pk_batches, BalancedIdentitySampler=cross_camera_batches, ImbalancedDatasetSampler=class_balanced_batches)

def measured(weighted):
    "Every (file, set of labels, sampler) that was measured on the reference"
    res = [(p, *key.split('_', 1)) for p in golden_files('data/sampler_invariants*.json') for key in json.loads(p.read_text())]
    def marks(o): return [pytest.mark.slow] if weighted and o[1]=='d' else []   # many identities, as many draws
    res = [pytest.param(*o, id='-'.join(o[1:]), marks=marks(o)) for o in res if (o[2]=='ImbalancedDatasetSampler')==weighted]
    return res or [pytest.param(None, None, None, id='none')]

def golden_case(path, labels, name):
    "What was measured, the table it was measured on, and p and k"
    if path is None: missing('data/sampler_invariants*.json')
    if name not in built: missing(f'sampler {name}')
    z = np.load(path.with_name(path.name.replace('invariants', 'orders')).with_suffix('.npz'))
    bs,k = z[f'{labels}_batch_and_instances'].tolist()
    df = pd.DataFrame(dict(pid=z[f'{labels}_pids'], camid=z[f'{labels}_camids'], dsetid=labels))
    return json.loads(path.read_text())[f'{labels}_{name}'],df,bs//k,k

def describe(b, df, p, k, cross):
    "The invariants of the golden file for batches `b`"
    pid,cam,g = df.pid.to_numpy(),df.camid.to_numpy(),b.reshape(-1,k)
    first,n_pics,n_cams = pid[g[:,0]],df.pid.value_counts(),df.groupby('pid').camid.nunique()
    several,repeats = (n_cams[first]>1).to_numpy(),np.array([len(set(o))<k for o in g.tolist()])
    enough = np.array([len(candidates(df, o, cross)-{o})>=k-1 for o in range(len(df))])
    return dict(pids_per_batch_always=all(len(set(pid[o]))==p for o in b), groups_are_contiguous_same_pid=bool((pid[g]==first[:,None]).all()),
        min_distinct_pids=min(len(set(pid[o])) for o in b), images_never_drawn_in_200_batches=len(df)-len(np.unique(b)), n_images=len(df),
        groups_with_repeated_image_though_enough_images=int((repeats & enough[g[:,0]]).sum()),
        images_per_pid_min_max=[n_pics.min(), n_pics.max()], share_of_other_cameras=(cam[g][several,1:]!=cam[g][several,:1]).all(1).mean())

@pytest.mark.parametrize('path,labels,name', measured(weighted=False))
def test_golden_invariants(path, labels, name):
    want,df,p,k = golden_case(path, labels, name)
    epochs = [call(built[name], df, p, k, rng(i)) for i in range(200)]
    b = np.concatenate(epochs)[:200]
    cross = name=='BalancedIdentitySampler'
    got = describe(b, df, p, k, cross)
    want['groups_with_repeated_image_though_enough_images'] = 0   # where the reference repeats, we do not
    if cross: got['images_never_drawn_in_200_batches'] = len(df)-len(np.unique(epochs))  # one of a rare kind needs more than 200 batches
    assert {o:got[o] for o in got if o in want}=={o:want[o] for o in got if o in want}
    assert len([o for o in got if o in want])>=6
    if cross:
        assert got['share_of_other_cameras']==want['multi_camera_groups_where_all_others_differ_in_camera_from_first']/want['multi_camera_groups']==1
        assert len(epochs[0])==want['batches_per_epoch']
        assert all(len(set(df.pid[o[:,::k].ravel()]))==o.size//k for o in epochs) and want['no_identity_repeated_within_epoch']
        lo,hi = want['group_count_per_pid_min_max']
        often = np.bincount(np.unique(df.pid, return_inverse=True)[1][b[:,::k].ravel()])
        assert lo-3<=often.min() and often.max()<=hi+3

@pytest.mark.parametrize('path,labels,name', measured(weighted=False))
def test_golden_orders(path, labels, name):
    "The same measurements on the stored batches of the reference find what they should"
    want,df,p,k = golden_case(path, labels, name)
    z = np.load(path.with_name(path.name.replace('invariants', 'orders')).with_suffix('.npz'))
    got = describe(z[f'{labels}_{name}_seed42_first20_batches'], df, p, k, name=='BalancedIdentitySampler')
    assert all(got[o]==want[o] for o in ('pids_per_batch_always', 'groups_are_contiguous_same_pid', 'min_distinct_pids', 'images_per_pid_min_max'))
    share = want['multi_camera_groups_where_all_others_differ_in_camera_from_first']/want['multi_camera_groups']
    assert abs(got['share_of_other_cameras']-share)<.15

@pytest.mark.parametrize('path,labels,name', measured(weighted=True))
def test_golden_class_frequency(path, labels, name):
    want,df,p,k = golden_case(path, labels, name)
    rows = np.concatenate([call(built[name], df, p, k, rng(i)).ravel() for i in range(200_000//len(df)+1)])
    often = df.pid.iloc[rows].value_counts(normalize=True)
    assert want['pid_frequency_min']<=often.min() and often.max()<=want['pid_frequency_max'] and len(often)==df.pid.nunique()
    assert abs(often.mean()-want['uniform'])<1e-12

@pytest.mark.parametrize('path', golden_files('data/sampler_orders*.npz') or [None])
def test_golden_uniform(path):
    "Every picture once in a pass, as in the reference, except those that do not fill a batch"
    if path is None: missing('data/sampler_orders*.npz')
    z = np.load(path)
    keys = [o for o in z.files if '_TrainingSampler' in o]
    assert keys
    for key in keys:
        labels,n = key.split('_')[0],len(z[key])//2
        assert all(len(set(o))==n for o in np.split(z[key], 2))
        bs,k = z[f'{labels}_batch_and_instances'].tolist()
        b = uniform_batches(z[f'{labels}_pids'], bs//k, k, rng())
        assert len(np.unique(b))==b.size==n//bs*bs
