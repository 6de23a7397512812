"Augmentation and P×K batches"
import gc, multiprocessing, os, pickle, signal, time, warnings
from functools import partial
from zipfile import ZipFile
import numpy as np, pandas as pd, pytest, torch
from fastai.data.transforms import Transform
from fastai.torch_core import TensorCategory, TensorImage, set_seed
from fastai.vision.data import CategoryBlock, ColReader, DataBlock, ImageBlock
from fastcore.basics import defaults
from PIL import Image
from fastreid_nb.augment import loaders
from fastreid_nb.augment.loaders import ItemAugs, ReIDDataset, ReIDLoader, plain_dl, reid_dls
from fastreid_nb.augment.core import bagtricks_augs, hflip, pad_crop, random_erase
from fastreid_nb.augment.samplers import pk_batches, pk_len
from fastreid_nb.data.core import ReIDData
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.data.toy import toy_reid

@pytest.fixture(scope='module', autouse=True)
def impatient():
    "torch waits five seconds for workers that are stuck, whenever a loader that failed is thrown away"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.utils.data._utils, 'MP_STATUS_CHECK_INTERVAL', .5)
        yield
        gc.collect()

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
@pytest.mark.parametrize('aug', [*bagtricks_augs, partial(random_erase, p=1), partial(hflip, p=1), partial(pad_crop, pad=.2)])
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
    for aug in (hflip, random_erase):
        hits = sum(not torch.equal(aug(x, np.random.default_rng(i), p=p), x) for i in range(300))/300
        assert abs(hits-p)<.09

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

def hurt(data, path, rows, how=lambda b: b[:-50]):
    "The data with the files of training `rows` damaged"
    train = data.train.copy()
    for i in rows:
        (f := path/f'broken {i}.jpg').write_bytes(how(open(train.path[i], 'rb').read()))
        train.loc[i,'path'] = str(f)
    return ReIDData('hurt', train, data.query, data.gallery)

def batches(dl): return [tuple(o.clone() for o in b) for b in dl]

def same(a, b): return len(a)==len(b) and all(u.equal(v) for x,y in zip(a, b) for u,v in zip(x, y))

@pytest.mark.parametrize('n', [0,2])
@pytest.mark.parametrize('how', [lambda b: b'', lambda b: b[:-50], lambda b: b[:300]])
def test_bad_file_in_training_is_named(data, tmp_path, n, how):
    dls = reid_dls(hurt(data, tmp_path, [7], how), (64,32), p=9, k=8, num_workers=n)
    with pytest.raises(ValueError, match=r'broken 7.jpg.*\(row 7 of the table\)'): list(dls.train)

@pytest.mark.parametrize('n', [0,2])
def test_skipping_bad_files(data, tmp_path, n):
    "The next picture of the identity takes the place, marked in every process, counted once; the same batches with any number of workers"
    bad = hurt(data, tmp_path, [3,4,30])
    pid,fixed = data.train.pid.to_numpy(),data.train.path.to_numpy().copy()
    assert pid[3]==pid[4]==pid[5] and pid[30]==pid[31]
    fixed[[3,4,30]] = fixed[[5,5,31]]
    want = reid_dls(ReIDData('x', data.train.assign(path=fixed), data.query, data.gallery), (64,32), p=9, k=8, num_workers=0)
    dls = reid_dls(bad, (64,32), p=9, k=8, num_workers=n, skip_bad=True)
    with pytest.warns(UserWarning, match='3 of 72 images cannot be read.*broken 3.jpg'): assert same(batches(dls.train), batches(want.train))
    assert dls.train.bad.nonzero().flatten().tolist()==[3,4,30]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert same(batches(dls.train), batches(want.train))

@pytest.mark.parametrize('n', [0,1])
def test_an_identity_without_pictures_is_an_error(data, tmp_path, n):
    rows = np.flatnonzero(data.train.pid==data.train.pid[0])
    dls = reid_dls(hurt(data, tmp_path, rows), (64,32), p=9, k=8, num_workers=n, skip_bad=True)
    with pytest.raises(ValueError, match='none of the 8 images of class 0 can be read; the last: .*broken'): list(dls.train)

def test_validation_never_skips(data, tmp_path):
    broken = tmp_path/'broken.jpg'
    broken.write_bytes(b'')
    query = data.query.assign(path=[str(broken), *data.query.path[1:]])
    dls = reid_dls(ReIDData('x', data.train, query, data.gallery), (64,32), p=3, k=2, num_workers=0, skip_bad=True)
    with pytest.raises(ValueError, match='broken.jpg'): list(dls.valid)
    bad = reid_dls(hurt(data, tmp_path, [7]), (64,32), p=3, k=2, num_workers=0, skip_bad=True)
    with pytest.raises(ValueError, match='broken 7.jpg'): list(bad.train.new(shuffle=False))

def many(pids, p, k, rng): return np.resize(pk_batches(pids, p, k, rng), (100,p*k))

def slow(x, rng):
    time.sleep(.01)
    return x

@pytest.mark.parametrize('how', [signal.SIGKILL,signal.SIGTERM])
def test_a_killed_worker_ends_training(data, how):
    "Within seconds and with advice; the alarm is for the day it hangs"
    def hangs(*_): raise TimeoutError('still waiting for a dead worker')
    old = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        dl,start = reid_dls(data, (64,32), p=3, k=2, augs=[slow], batches=many, num_workers=2).train,time.time()
        with pytest.raises(RuntimeError, match='num_workers'):
            for i,_ in enumerate(dl):
                if i==1: os.kill(multiprocessing.active_children()[0].pid, how)
        assert i<99 and time.time()-start<30
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)

def test_more_identities_than_there_are(data):
    with pytest.raises(ValueError, match='9 identities for batches of p=16: use p=9 or less'): reid_dls(data, (64,32))

## Batches

def test_batches_are_bytes_until_they_are_delivered(data):
    ds = ReIDDataset(data.train, Preproc((64,32)))
    for n in (0,1):
        for b in ReIDLoader(ds, bs=32, num_workers=n):
            assert [type(o) for o in b]==[TensorImage,TensorCategory,TensorCategory] and [o.dtype for o in b]==[torch.uint8,torch.int64,torch.int64]
            assert b[0].is_contiguous() and b[0].shape==(len(b[1]),3,64,32)
    x,pid,camid = ds[5]
    assert torch.equal(x, Preproc((64,32)).load(data.train.path[5])) and (int(pid),int(camid))==tuple(data.train.loc[5,['pid','camid']])

@pytest.mark.parametrize('n', [0,2])
def test_delivered_values(data, n):
    "Validation pictures are exactly those of `load`; training pictures, unaugmented, within a level"
    dls,pre = reid_dls(data, (48,24), p=3, k=2, augs=[], num_workers=n, val_bs=7),Preproc((48,24))
    want = torch.stack([torch.Tensor(pre.load(f)) for f in pd.concat([data.query, data.gallery]).path])
    got = torch.cat([b[0] for b in dls.valid])
    assert got.dtype==torch.float32 and (got*255).equal(want.float())
    rows = torch.from_numpy(dls.train.plan.ravel())
    train = torch.cat([b[0] for b in dls.train])
    want = torch.stack([torch.Tensor(pre.load(f)) for f in data.train.path])
    rows = torch.from_numpy(dls.train.plan.ravel())
    assert (train*255-want[rows]).abs().max()<=1.001

@pytest.mark.parametrize('n', [0,2])
def test_pictures_in_archives_memory_and_boxes(data, tmp_path, n):
    "Whatever holds the pictures, the batches are the same"
    with ZipFile(tmp_path/'all.zip', 'w') as z:
        for i,f in enumerate(data.train.path): z.write(f, f'in ner/{i}.jpg')
    zipped = data.train.assign(path=[str(tmp_path/f'all.zip/in ner/{i}.jpg') for i in range(len(data.train))])
    held = data.train.assign(image=[open(f, 'rb').read() for f in data.train.path], path='held')
    frame = [Image.fromarray(np.pad(np.asarray(Image.open(f)), ((3,4),(5,6),(0,0)))) for f in data.train.path]
    boxed = data.train.assign(image=frame, x=5, y=3, w=32, h=64)
    loaders = [reid_dls(ReIDData('x', o, data.query, data.gallery), (48,24), p=3, k=2, num_workers=n).train for o in (data.train, zipped, held, boxed)]
    first,*others = map(batches, loaders)
    for o in others: assert same(o, first)

def test_item_transforms_still_work(data):
    "With a transform of single pictures the loader falls back on fastai's way, with the same pictures"
    class Invert(Transform):
        def encodes(self, x:TensorImage): return 255-x
    a,b = (reid_dls(data, (64,32), p=3, k=2, num_workers=0) for _ in range(2))
    b.add_tfms([Invert()], 'after_item')
    for dl,other in zip(a.loaders, b.loaders):
        assert all(torch.allclose(1-x[0], y[0], atol=1e-6) and all(map(torch.equal, x[1:], y[1:])) for x,y in zip(dl, other))

def test_batch_transforms_for_training_run_in_training_only(data):
    class Black(Transform):
        split_idx,order = 0,99
        def encodes(self, x:TensorImage): return x*0
    dls = reid_dls(data, (64,32), p=3, k=2, num_workers=0, batch_tfms=[Black()])
    assert dls.train.one_batch()[0].max()==0 and dls.valid.one_batch()[0].max()>0 and dls.train.new(shuffle=False).one_batch()[0].max()>0

## Augmentation and sampling of one's own

def test_an_augmentation_may_change_the_size(data):
    crop = lambda x, rng: x[:,4:-4,2:-2]
    x = reid_dls(data, (64,32), p=3, k=2, augs=[crop,bagtricks_augs[0]], num_workers=0).one_batch()[0]
    assert x.shape==(6,3,64,32)

@pytest.mark.parametrize('n', [0,1])
def test_an_augmentation_may_not_change_the_type(data, n):
    with pytest.raises(ValueError, match='made torch.float32 of an image of torch.uint8'):
        list(reid_dls(data, (64,32), p=3, k=2, augs=[lambda x, rng: x/255], num_workers=n).train)

def test_augmentations_may_work_in_place(data):
    "Every picture is read anew, so that not even this goes from one epoch to the next"
    def darken(x, rng): return x.mul_(0)
    dls = reid_dls(data, (64,32), p=3, k=2, augs=[darken], num_workers=0)
    for _ in range(2): assert all(b[0].max()==0 for b in dls.train)
    assert dls.valid.one_batch()[0].max()>0

def test_samplers_may_ask_for_the_table(data):
    seen = []
    def look(pids, p, k, rng, df):
        seen.append(df)
        return pk_batches(pids, p, k, rng)
    a,b = (reid_dls(data, (64,32), p=3, k=2, num_workers=0, batches=o).train for o in (look,pk_batches))
    assert same(batches(a), batches(b))
    assert seen[0].camid.tolist()==data.train.camid.tolist() and seen[0].dsetid.tolist()==data.train.dsetid.tolist()
    assert seen[0].pid.tolist()==np.searchsorted(sorted(set(data.train.pid)), data.train.pid).tolist()

def test_samplers_are_checked(data):
    for bad in (lambda pids, p, k, rng: np.zeros((2,5), int), lambda pids, p, k, rng: np.zeros(6, int)):
        with pytest.raises(ValueError, match=r'expected \(B, 6\)'): reid_dls(data, (64,32), p=3, k=2, batches=bad)
    n = iter([3,4])
    dls = reid_dls(data, (64,32), p=3, k=2, num_workers=0, batches=lambda pids, p, k, rng: np.zeros((next(n),6), int))
    with pytest.raises(ValueError, match='4 batches after 3'): list(dls.train)

@pytest.mark.parametrize('n', [0,2])
def test_item_augs(data, n):
    "In a pipeline of fastai: training only, other numbers for every picture and epoch, the same for a seed"
    def stamp(x, rng): return torch.full_like(x, int(rng.integers(256)))
    block = DataBlock((ImageBlock,CategoryBlock), get_x=ColReader('path'), get_y=ColReader('pid'), item_tfms=ItemAugs([stamp]))
    set_seed(0)
    dls = block.dataloaders(data.train, bs=8, num_workers=n)
    def epoch(): return torch.cat([b[0] for b in dls.train])[:,0,0,0].tolist()
    set_seed(1)
    a,b = epoch(),epoch()
    set_seed(1)
    assert a==epoch() and a!=b and len(set(a))>20
    assert all(len(x.unique())>9 for x in next(iter(dls.valid))[0])

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
    with pytest.raises(ValueError, match='no training images'): reid_dls(ReIDData('x', none, data.query, data.gallery))
    with pytest.raises(ValueError, match='no query or gallery'): reid_dls(ReIDData('x', data.train, none, none))

## Workers and devices

def test_at_most_eight_workers(data, monkeypatch):
    "By default one for each processor and no more than eight; more if asked for"
    ds = ReIDDataset(data.train, Preproc((64,32)))
    for cpus,n in ((1,1), (5,5), (64,8)):
        monkeypatch.setattr(defaults, 'cpus', cpus)
        dls = reid_dls(data, (64,32), p=3, k=2)
        assert [o.fake_l.num_workers for o in (ReIDLoader(ds), *dls, plain_dl(data.query, Preproc((64,32))))]==[n]*4
    assert ReIDLoader(ds, num_workers=12).fake_l.num_workers==12

def test_only_batches_for_cuda_are_pinned(data):
    "Whatever device the loader has now, and not the device it was made for"
    dls = reid_dls(data, (64,32), p=3, k=2, num_workers=0, device='cpu')
    for dl in dls: assert not dl.pins and not dl.pin_memory
    dls.to('cuda')
    for dl in dls: assert dl.pins
    dls.to('cpu')
    for dl in dls: assert not dl.pins and not dl.new().pins

@pytest.mark.parametrize('pins', [False,True])
def test_copies_wait_unless_pinned(data, monkeypatch, pins):
    "What the loop asks of torch; pinning makes lists of tuples, and batches are tuples all the same"
    seen = []
    def copy(b, device, non_blocking):
        seen.append((type(b), str(device), non_blocking))
        return b
    monkeypatch.setattr(loaders, 'to_device', copy)
    monkeypatch.setattr(ReIDLoader, 'pins', pins)
    dl = reid_dls(data, (64,32), p=3, k=2, num_workers=0, device='cpu').train
    assert all(type(b)==tuple and b[0].dtype==torch.float32 for b in dl)
    assert set(seen)=={(tuple,'cpu',pins)} and dl.fake_l.pin_memory==pins

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('n', [0,2])
def test_batches_on_cuda(data, n):
    "The same epochs as on the CPU, from pinned memory"
    on = {o:reid_dls(data, (64,32), p=3, k=2, num_workers=n, device=o) for o in ('cpu','cuda')}
    for a,b in zip(on['cpu'].loaders, on['cuda'].loaders):
        for x,y in zip(a, b):
            assert y[0].device.type==y[1].device.type=='cuda' and y[0].dtype==torch.float32
            assert torch.allclose(x[0], y[0].cpu(), atol=1e-6) and torch.equal(x[1], y[1].cpu())

def test_epoch_may_be_set_and_read(data):
    "It is the number of the next epoch: a loader set to it gives what an uninterrupted one gave"
    a,b = (reid_dls(data, (64,32), p=3, k=2, num_workers=0, seed=3).train for _ in range(2))
    runs = [batches(a) for _ in range(3)]
    assert a.epoch==3
    b.epoch = 2
    assert same(batches(b), runs[2]) and b.epoch==3
    b.epoch = 0
    assert same(batches(b), runs[0]) and not same(runs[0], runs[2])
