"A killed run ends as one that was not killed, and whatever is wrong with its files or settings is said"
import multiprocessing, os, random, signal, warnings
import numpy as np, pytest, torch
from collections import deque
from dataclasses import replace
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedLin
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import Transform
from fastai.torch_core import TensorImage
from torch import nn
from fastreid_nb.data.subsets import *
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.augment.core import hflip, random_erase
from fastreid_nb.augment.loaders import ReIDDataset, reid_dls
from fastreid_nb.augment.occlusion import RandomPatch
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.memory import CenterLoss, QueueLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.train.averages import EMA
from fastreid_nb.train.core import reid_learner
from fastreid_nb.train.finetune import KeepBest
from fastreid_nb.train.groups import reid_adamw
from fastreid_nb.train.resume import *
from fastreid_nb.train.resume import last_state, read_state, state_files, write_state
from fastreid_nb.train.schedules import *
from fastreid_nb.train.schedules import SchedLoss
from fastreid_nb.train.state import NotPlain, Packer, differences, named_tensors, put_back, set_rng_states, rng_states, unpack
from fastreid_nb.train.watch import WatchLoss

class TinyNet(nn.Sequential):
    n_feat = 8
    def __init__(self): super().__init__(nn.Conv2d(3,8,3,4,1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(.2))

class Noise(Transform):
    "Draws from all three generators, in the main process"
    split_idx,order = 0,30
    def encodes(self, x:TensorImage): return x+torch.rand(())*.1+random.random()*.1+np.random.rand()*.1

class Killed(BaseException): "No `except Exception` sees it"

class Kill(Callback):
    "Ends the process, or what plays its part, at the `n`-th of an event"
    order = 98
    def __init__(self, event='never', n=0, how=None): self.kind,self.left,self.act = event,n,how
    def __call__(self, name):
        if name!=self.kind or name=='after_batch' and not self.training: return
        self.left -= 1
        if self.left>=0: return
        if self.act: self.act()
        raise Killed
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

n_epoch = 2 # of four batches
every = dict(every_iters=3)

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "A copy of this process may not use threads that it does not have"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope='module')
def data(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=14, size=(32,16), progress=False).holdout(.3)

def new_learner(data, workers=0, **kwargs):
    dls = reid_dls(data, (32,16), p=3, k=4, num_workers=workers, augs=[hflip, random_erase],
        batch_tfms=[RandomPatch(warmup=9, capacity=20), Noise()])
    loss = ReIDLoss(CrossEntropy(.1), TripletLoss(.3), QueueLoss(8, 24), CenterLoss(len(dls.pids), 8))
    return reid_learner(dls, TinyNet, loss=loss, **(dict(dtype=torch.float32)|kwargs))

def seed(n):
    random.seed(n)
    np.random.seed(n)
    torch.manual_seed(n)

def fit(learn, *cbs, start=0):
    "A fit in which everything remembers something; a new process begins with other random numbers, `start`"
    seed(start)
    more = [EMA(.9, both=False), KeepBest(None), SchedLoss('triplet.margin', SchedLin(.1, .5)), WatchLoss(),
        GradientAccumulation(24), GradientClip(1.)]
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(n_epoch, 1e-2, freeze_iters=3, cbs=[*more, *cbs])
    return learn

def end(learn):
    "All that a run leaves behind"
    rec,tensors = learn.recorder,{**named_tensors(learn.model), **named_tensors(learn.loss_func)}
    return dict(tensors) | {'losses':torch.stack(rec.losses), 'values':torch.tensor([list(map(float, o)) for o in rec.values]),
        'hps':torch.tensor([list(map(float, rec.hps[k])) for k in ('lr','triplet.margin')]), **rec.parts}

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    "A run that was not killed, and a folder with all its states"
    folder = tmp_path_factory.mktemp('runs')/'whole'
    return end(fit(new_learner(data), Resumable(folder, keep=99, **every), Kill())),folder

def killed(data, folder, event, n, workers=0, how=None, **kwargs):
    with pytest.raises(Killed): fit(new_learner(data, workers), Resumable(folder, **every, **kwargs), Kill(event, n, how))

def resumed(data, folder, workers=0, **kwargs):
    cb = Resumable(folder, resume=True, **every, **kwargs)
    return end(fit(new_learner(data, workers), cb, Kill(), start=99)),cb

@pytest.fixture
def broken(data, whole, tmp_path):
    "A copy of the folder, which a test may break"
    for _,o in state_files(whole[1])[:3]: (tmp_path/o.name).write_bytes(o.read_bytes())
    return tmp_path

## Killed

def test_writing_changes_nothing(data, whole): assert same(whole[0], end(fit(new_learner(data), Kill())))

@pytest.mark.parametrize('event,n', [('after_batch',1), ('after_step',2), ('before_validate',0), ('after_epoch',0)])
def test_killed_anywhere(data, whole, tmp_path, event, n):
    killed(data, tmp_path, event, n)
    assert same(whole[0], resumed(data, tmp_path)[0])

def test_killed_twice_and_in_a_write(data, whole, tmp_path, monkeypatch):
    "Half of a file is there when the process ends: it is not taken for a state, and goes away later"
    killed(data, tmp_path, 'after_batch', 3)
    save,left = torch.save,[1]
    def half(o, f):
        left[0] -= 1
        if left[0]>=0: return save(o, f)
        f.write(b'PK'+bytes(999))
        raise Killed
    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(Killed): resumed(data, tmp_path)
    monkeypatch.undo()
    got,cb = resumed(data, tmp_path)
    assert same(whole[0], got) and 'goes on in epoch' in cb.note

def _doomed(data, folder):
    "A process of its own, with workers, that is killed"
    fit(new_learner(data, 2), Resumable(folder, **every), Kill('after_batch', 6, lambda: os.kill(os.getpid(), signal.SIGKILL)))

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_sigkill_with_workers(data, whole, tmp_path):
    child = multiprocessing.get_context('fork').Process(target=_doomed, args=(data, tmp_path))
    child.start()
    child.join(60)
    assert child.exitcode==-signal.SIGKILL
    assert same(whole[0], resumed(data, tmp_path, workers=2)[0])

def test_done_batches_are_not_read(data, whole, broken, monkeypatch):
    (_,newest),(_,middle),_ = state_files(broken)
    newest.unlink()
    at,n,reads = read_state(middle)['at'],len(new_learner(data).dls.train),[]
    real = ReIDDataset._pixels
    monkeypatch.setattr(ReIDDataset, '_pixels', lambda self, i: reads.append(len(self)) or real(self, i))
    assert at['iters'] and same(whole[0], resumed(data, broken)[0])
    train = len(data.train)
    assert reads.count(train)==12*((n_epoch-at['epoch'])*n-at['iters'])

def test_torch_optimiser(data, tmp_path):
    "An optimiser of torch's, and a second fit"
    def run(folder, *cbs):
        learn = new_learner(data, opt_func=reid_adamw)
        going = Resumable(folder, resume=True, every_iters=2)
        seed(0)
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-2, freeze_epochs=1, cbs=[*cbs, going])
        return named_tensors(learn.model)
    want = run(tmp_path/'a', Kill())
    with pytest.raises(Killed): run(tmp_path/'b', Kill('after_batch', 6))
    assert read_state(state_files(tmp_path/'b')[0][1])['at']['fit']==1
    assert same(want, run(tmp_path/'b', Kill()))

## Files

@pytest.mark.parametrize('how', ['truncated','flipped','empty','foreign'])
def test_broken_newest(data, whole, broken, how):
    newest = state_files(broken)[0][1]
    content = bytearray(newest.read_bytes())
    for i in range(len(content)//4, len(content)//2, 97): content[i] ^= 255 # one alone may hit what fills gaps between tensors
    if how=='foreign': torch.save({'weights':torch.ones(2)}, newest)
    else: newest.write_bytes(dict(truncated=bytes(content[:4000]), flipped=bytes(content), empty=b'')[how])
    state,path,said = last_state(broken)
    assert path!=newest and len(said)==1 and newest.name in said[0]
    if how!='truncated': return
    with pytest.warns(UserWarning, match='goes on from an older state'): got,_ = resumed(data, broken)
    assert same(whole[0], got) and newest.name in [o.name for _,o in state_files(broken)] # written again

def test_full_disk(data, whole, tmp_path):
    "From the second state on no file may be larger than a few bytes"
    resource = pytest.importorskip('resource')
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    class Full(Callback):
        def before_validate(self): resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        def state_dict(self): return {}
        def load_state_dict(self, state): pass
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter('always')
            got = end(fit(new_learner(data), Resumable(tmp_path, **every), Kill(), Full()))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(whole[0], got) and any('Training goes on; if it is killed' in str(o.message) for o in told)
    assert last_state(tmp_path)[0]['at']['step']>0 and not list(tmp_path.glob('.*.tmp'))

def test_read_only_folder(data, whole, broken, monkeypatch):
    "A run can be resumed from a folder that cannot be written to, but not begun in one"
    def refuse(path): raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr('fastreid_nb.data.files._temporary', refuse)
    state_files(broken)[0][1].unlink() # so that something is left to do
    with pytest.raises(OSError, match='choose a folder you may write to'): fit(new_learner(data), Resumable(broken/'new'))
    with pytest.warns(UserWarning, match='Permission denied'): assert same(whole[0], resumed(data, broken)[0])

def test_keep_and_future(tmp_path):
    "The newest are kept, and a newer broken one does not push them out"
    from fastreid_nb.train.resume import drop_states
    for step in (1,2,3,50): write_state(tmp_path, dict(at=dict(step=step)))
    drop_states(tmp_path, 3, 2)
    assert [o for o,_ in state_files(tmp_path)]==[3,2]

def test_nan_is_not_written(data, tmp_path):
    class Poison(Callback):
        def after_step(self): next(self.model.parameters()).data.fill_(float('nan'))
    with pytest.warns(UserWarning, match='weights are NaN'), pytest.raises(ValueError, match='no finite number'):
        fit(new_learner(data), Resumable(tmp_path, every_iters=1), Poison())
    assert [o for o,_ in state_files(tmp_path)][0]<=5

## Settings

@pytest.mark.parametrize('change,names', [
    (lambda l,d: setattr(l.dls.train, 'seed', 7), 'batches.seed: 0 → 7'),
    (lambda l,d: setattr(l.dls.train, 'augs', [hflip]), 'batches.augmentation'),
    (lambda l,d: setattr(l.loss_func.terms[2], 'margin', .5), 'loss.terms'),
    (lambda l,d: setattr(l, 'wd', .1), 'optimiser.wd'),
    (lambda l,d: l.add_cb(WatchLoss()), r'callbacks.WatchLoss \d'),
    (lambda l,d: setattr(l.dls.data, 'query', d.query.iloc[1:]), 'data.query')])
def test_other_settings(data, broken, change, names):
    learn = new_learner(replace(data))
    change(learn, data)
    with pytest.raises(ValueError, match=names): fit(learn, Resumable(broken, resume=True, **every), Kill())

def test_newer_version_and_other_identities(data, broken):
    newest = state_files(broken)[0][1]
    state = read_state(newest)
    def with_settings(**kwargs): write_state(broken, state|{'settings':state['settings']|kwargs})
    with_settings(version='9.9.9')
    with pytest.raises(ValueError, match='version: 9.9.9'): resumed(data, broken)
    with pytest.warns(UserWarning, match='forced to go on'): resumed(data, broken, force=True)
    with_settings(identities='3 (00000000)')
    with pytest.raises(ValueError, match='cannot go on here'): resumed(data, broken, force=True)

def test_forced_decay(data, broken):
    "A new decay holds, although the old one is in the optimiser's state"
    learn = new_learner(data, wd=.1)
    with pytest.warns(UserWarning, match='optimiser.wd'): fit(learn, Resumable(broken, resume=True, force=True, **every), Kill())
    assert {o['wd'] for o in learn.opt.hypers}=={.1}

def test_config_and_machine(data, broken):
    with pytest.raises(ValueError, match='experiment.lr: none → 0.1'): resumed(data, broken, config=dict(lr=.1))
    newest = state_files(broken)[0][1]
    write_state(broken, read_state(newest)|{'machine':dict(torch='0.0')})
    with pytest.warns(UserWarning, match='torch: 0.0'): resumed(data, broken)

def test_other_ranks_only_read(data, whole, broken):
    before = sorted(o.name for o in broken.iterdir())
    resumed(data, broken, rank=1)
    assert sorted(o.name for o in broken.iterdir())==before

@pytest.mark.parametrize('kw', [dict(every_epochs=0), dict(every_iters=1.5), dict(every_minutes=-1), dict(keep=0), dict(rank=-1)])
def test_bad_arguments(kw, tmp_path):
    with pytest.raises(ValueError, match=next(iter(kw))): Resumable(tmp_path, **kw)

def test_differences_show_where():
    a,b = 'x'*100+'1'+'y'*100,'x'*100+'2'+'y'*100
    said = differences(dict(k=a), dict(k=b))['k']
    assert 'x1y' in said and 'x2y' in said and len(said)<200 and differences(dict(k=a), dict(k=a))=={}

## Plain values

def _random(rng, depth=0):
    kinds = [lambda: int(rng.integers(9)), lambda: float(rng.random()), lambda: 'text', lambda: None, lambda: True,
        lambda: np.float64(rng.random()), lambda: torch.rand(3), lambda: torch.rand(4, 6)[:,::2], lambda: np.arange(3)]
    nested = [lambda: [_random(rng, depth+1) for _ in range(3)], lambda: (_random(rng, depth+1),),
        lambda: {k:_random(rng, depth+1) for k in ('a',1)}, lambda: deque([_random(rng, depth+1)], 5), lambda: {1,2}]
    found = kinds+(nested if depth<3 else [])
    return found[rng.integers(len(found))]()

def _equal(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, np.ndarray): return a.dtype==b.dtype and (a==b).all()
    if isinstance(a, dict): return a.keys()==b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list,tuple,deque)): return type(a) is type(b) and len(a)==len(b) and all(map(_equal, a, b))
    return a==b

def test_plain_values_come_back(tmp_path):
    rng = np.random.default_rng(0)
    o = [_random(rng) for _ in range(200)]
    torch.save(Packer()(o), tmp_path/'o.pt')
    assert _equal(o, unpack(torch.load(tmp_path/'o.pt', weights_only=True)))

def test_generators_come_back(tmp_path):
    state,rng = rng_states(),np.random.default_rng(3)
    torch.save(dict(all=state, one=Packer()(rng)), tmp_path/'o.pt')
    want = [rng.random(), random.random(), np.random.normal(), torch.randn(2).tolist()]
    got = torch.load(tmp_path/'o.pt', weights_only=True)
    set_rng_states(got['all'])
    twin = np.random.default_rng(9)
    put_back(twin, got['one'])
    assert want==[twin.random(), random.random(), np.random.normal(), torch.randn(2).tolist()]

@pytest.mark.parametrize('o', [print, object(), nn.Parameter(torch.ones(2)), {('a',print):1}, [1,[2,print]]])
def test_not_plain(o):
    with pytest.raises(NotPlain): Packer()(o)

## Best epoch

def test_best_is_chosen_on_held_out_identities(tmp_path):
    data = toy_reid(tmp_path, n_ids=8, size=(32,16), progress=False)
    learn = reid_learner(reid_dls(data, (32,16), p=3, k=4, num_workers=0, augs=[]), TinyNet, dtype=torch.float32)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match=r'on the test of .* data.holdout\(\)'): learn.fit(1, 1e-3, cbs=KeepBest())
        best = KeepBest(None, 'rank-1', on='test')
        learn.fit(2, 1e-2, cbs=best)
    assert best.best==max(o[2] for o in learn.recorder.values)
    for bad in ('loss','rank-0'):
        with pytest.raises(ValueError, match='expected .mAP'): KeepBest(monitor=bad)
