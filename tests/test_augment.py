"Preprocessing, augmentation and P×K batches"
import pickle
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastreid_nb.augment import Preproc, bagtricks_augs, erase, hflip, pad_crop, pk_batches, pk_len, plain_dl, reid_dls
from fastreid_nb.data import ReIDData
from fastreid_nb.toy import toy_reid

@pytest.fixture(scope='module')
def data(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=12, size=(64,32), progress=False)

def labels(rng):
    "Identities of any shape: few or many, one picture or a hundred"
    n = rng.integers(2, 40)
    return np.repeat(rng.choice(10_000, n, replace=False), np.maximum(1, rng.geometric(rng.uniform(.03,.9), n)))

@pytest.mark.parametrize('seed', range(60))
def test_pk_invariants(seed):
    "Exact `len`, distinct identities, exactly k pictures, none repeated unless there are fewer than k"
    rng = np.random.default_rng(seed)
    pids = rng.permutation(labels(rng))
    n_ids,k = len(set(pids)),int(rng.integers(1,9))
    p = int(rng.integers(1, n_ids+1))
    count = dict(zip(*np.unique(pids, return_counts=True)))
    b = pk_batches(pids, p, k, np.random.default_rng(seed))
    assert b.shape==(pk_len(list(count.values()), p, k), p*k) and len(b)>=1
    for rows in b:
        got,n = np.unique(pids[rows], return_counts=True)
        assert len(got)==p and (n==k).all()
    used = np.bincount(b.ravel(), minlength=len(pids))
    for i,o in enumerate(pids): assert used[i]<=1 if count[o]>=k else used[i]<=-(-k//count[o])
    assert (pk_batches(pids, p, k, np.random.default_rng(seed))==b).all()

@pytest.mark.parametrize('seed', range(20))
def test_pk_len_is_the_most(seed):
    "No epoch could hold one batch more (checked by counting groups)"
    rng = np.random.default_rng(seed)
    counts = np.unique(labels(rng), return_counts=True)[1]
    p,k = int(rng.integers(1, len(counts)+1)),int(rng.integers(1,6))
    n,c = pk_len(counts, p, k),np.maximum(counts//k, 1)
    assert np.minimum(c, n).sum()>=n*p and np.minimum(c, n+1).sum()<(n+1)*p

def test_pk_coverage():
    "Where pictures divide evenly every picture is used once per epoch; otherwise different ones are left out each time"
    even = pk_batches(np.repeat(np.arange(8), 8), 4, 4, np.random.default_rng(0))
    assert sorted(even.ravel())==list(range(64))
    odd = np.repeat(np.arange(8), 9)
    seen = set().union(*(pk_batches(odd, 4, 4, np.random.default_rng(i)).ravel().tolist() for i in range(20)))
    assert len(seen)==72

def test_pk_co_occurrence():
    "Over many epochs every pair of identities meets"
    pids,met = np.repeat(np.arange(6), 4),set()
    for i in range(60):
        for rows in pk_batches(pids, 2, 2, np.random.default_rng(i)): met.add(tuple(sorted(set(pids[rows]))))
    assert len(met)==15

@pytest.mark.parametrize('counts,p,k,msg', [([4,4], 3, 2, 'use p=2 or less'), ([4,4], 0, 2, 'expected 1 or more'), ([4,4], 2, 0, 'expected 1 or more')])
def test_pk_refuses(counts, p, k, msg):
    with pytest.raises(ValueError, match=msg): pk_len(counts, p, k)

@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
@pytest.mark.parametrize('aug', [*bagtricks_augs, partial(erase, p=1), partial(hflip, p=1), partial(pad_crop, pad=.2)])
def test_augs_keep_shape_dtype_and_input(aug, dtype):
    x = torch.randint(0, 256, (3,64,32), dtype=torch.uint8)
    x = x if dtype==torch.uint8 else x/255
    keep = x.clone()
    for i in range(20):
        y = aug(x, np.random.default_rng(i))
        assert y.shape==x.shape and y.dtype==dtype and torch.equal(aug(x, np.random.default_rng(i)), y)
    assert torch.equal(x, keep)

@pytest.mark.parametrize('p', [0,.3,1])
def test_probabilities(p):
    x = torch.arange(3*64*32).view(3,64,32).float()/6144
    for aug in (hflip, erase):
        hits = sum(not torch.equal(aug(x, np.random.default_rng(i), p=p), x) for i in range(300))/300
        assert abs(hits-p)<.09

def test_preproc_is_pillow(tmp_path):
    im = Image.fromarray(np.random.default_rng(0).integers(0, 255, (77,41,3), dtype=np.uint8))
    for size in ((64,32), (128,64), (77,41)):
        want = np.asarray(im.resize(size[::-1], Image.BICUBIC))
        assert (Preproc(size).load(im).permute(1,2,0).numpy()==want).all()
    assert Preproc.from_dict(Preproc((9,8), 'bilinear', (0,0,0), (1,1,1)).to_dict())==Preproc((9,8), 'bilinear', (0,0,0), (1,1,1))

@pytest.mark.parametrize('bad', [np.zeros((4,4,4)), np.zeros((2,3,4,3)), torch.zeros(4,4,3), np.full((4,4,3), 2.), np.full((4,4,3), -.1), 7,
    np.zeros((4,4), dtype=np.int64), np.full((4,4,3), np.nan)])
def test_preproc_refuses(bad):
    with pytest.raises(ValueError, match='expected'): Preproc((8,4)).load(bad)

@pytest.mark.parametrize('n', [1,2])
def test_same_with_any_number_of_workers(data, n):
    a,b = (reid_dls(data, (64,32), p=3, k=2, num_workers=o, seed=3) for o in (0,n))
    for _ in range(2):
        for x,y in zip(a.train, b.train): assert all(torch.equal(u, v) for u,v in zip(x, y))
    first = next(iter(a.train))[0]
    assert not torch.equal(first, next(iter(a.train))[0])

def test_validation_order(data):
    dls = reid_dls(data, (64,32), p=3, k=2, num_workers=0, val_bs=5)
    pid,cam = (torch.cat(o).tolist() for o in list(zip(*((b[1],b[2]) for b in dls.valid))))
    rows = pd.concat([data.query, data.gallery])
    assert pid==rows.pid.tolist() and cam==rows.camid.tolist()
    assert dls.pids==sorted(data.train.pid.unique()) and len(list(dls.train))==len(dls.train)

@pytest.mark.parametrize('n', [0,2])
def test_bad_file_in_training_is_named(data, tmp_path, n):
    bad = tmp_path/'broken.jpg'
    bad.write_bytes(b'')
    train = data.train.copy()
    train.loc[0,'path'] = str(bad)
    dls = reid_dls(ReIDData('x', train, data.query, data.gallery), (64,32), p=9, k=8, num_workers=n)
    with pytest.raises(ValueError, match='broken.jpg'): list(dls.train)

def test_loaders_pickle(data):
    "Worker processes that are not forked get a pickled loader"
    dls = reid_dls(data, (64,32), p=3, k=2, num_workers=0)
    for dl in dls.loaders:
        copy = pickle.loads(pickle.dumps(dl.dataset))
        assert torch.equal(copy[1][0], dl.dataset[1][0])
    assert pickle.loads(pickle.dumps(dls.train.augs))==dls.train.augs

def test_a_new_loader_can_be_copied(data):
    assert len(reid_dls(data, (64,32), p=3, k=2, num_workers=0).train.new())==len(reid_dls(data, (64,32), p=3, k=2, num_workers=0).train)

def test_distractors_are_no_class(data):
    train = data.train.assign(pid=data.train.pid.where(data.train.pid>1, -1))
    with pytest.raises(ValueError, match='a distractor is no class'): reid_dls(ReIDData('x', train, data.query, data.gallery))

def test_empty_tables(data):
    none = data.query.iloc[:0]
    with pytest.raises(ValueError, match='empty'): plain_dl(none, Preproc((64,32)))
    with pytest.raises(ValueError, match='no training pictures'): reid_dls(ReIDData('x', none, data.query, data.gallery))
    with pytest.raises(ValueError, match='no query or gallery'): reid_dls(ReIDData('x', data.train, none, none))
