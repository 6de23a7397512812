"How a network is run fastest: measured, remembered, and true to float32"
import time

import fresh, pytest, torch
from fastai.callback.core import Callback

from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.backbone.resnet import resnet18, resnet18_ibn
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.eval.inference import embed
from fastreid_nb.heads import speed
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.speed import Speed, _allocator, best_dtype, fastest, fastest_model, kept_memory, quickest
from fastreid_nb.train.core import reid_learner

def test_measured_once(capsys):
    "The first call measures, says so in one line and leaves the random numbers alone; the second remembers"
    speed._fastest.cache_clear()
    rng = torch.get_rng_state()
    way,said = fastest('cpu'),capsys.readouterr().out
    start = time.perf_counter()
    assert fastest('cpu')==way and best_dtype(torch.device('cpu')) is way.dtype
    assert time.perf_counter()-start<.1 and capsys.readouterr().out==''
    assert said.count('\n')==1 and str(way) in said and torch.equal(rng, torch.get_rng_state())

def test_other_devices(capsys): assert fastest('meta')==Speed(torch.float32) and capsys.readouterr().out==''

def test_equals_and_clear_wins():
    assert quickest(dict(a=[1.,9.], b=[.95,.96]))=='a'
    assert quickest(dict(a=[1.], b=[.5], c=[.48]))=='b'

def test_threads_stay():
    "One thread is timed, and all of them are back afterwards"
    n = torch.get_num_threads()
    speed._fastest.cache_clear()
    fastest('cpu')
    assert torch.get_num_threads()==n

def test_not_at_import(tmp_path):
    code = 'from fastreid_nb.all import *; from fastreid_nb.heads import speed; assert speed._fastest.cache_info().currsize==0'
    new = fresh.Fresh(tmp_path/'said.txt', code)
    assert new.wait()==0, new.text

def test_fastest_model(capsys):
    model,xb = reid_model(resnet18_ibn, 5).eval(),torch.rand(4, 3, 64, 32)
    model.pids = [1,2]
    fast = fastest_model(model, xb, budget=.1)
    with torch.no_grad(): want,got = model(xb),fast(xb)
    assert got.dtype==torch.float32 and torch.cosine_similarity(want, got).min()>.999
    assert fast.pids==[1,2] and fast.n_cams==0 and 'images/s' in capsys.readouterr().out
    assert fast.model is not model and model.backbone.conv1.weight.is_contiguous()
    fastest_model(model.train(), xb, budget=.1)
    assert model.training

def test_wrong_ways_are_not_used(capsys):
    "Where 16 bits give another direction, float32 stays"
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*64*32, 2))
    with torch.no_grad():
        net[1].weight.fill_(1e4)
        net[1].bias.fill_(-3.07e7)
        net[1].weight[0,::2] *= 1.001
    fast = fastest_model(net, torch.rand(4, 3, 64, 32), budget=.1)
    assert fast.speed.dtype==torch.float32

def test_unknown_attribute():
    fast = speed.FastModel(torch.nn.Identity(), Speed())
    with pytest.raises(AttributeError, match='no_such'): fast.no_such

def pages(n=2**24):
    "Pages that each of five blocks of `n` numbers takes from the system"
    import resource
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range(5):
        torch.ones(n)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return [b-a for a,b in zip(counts, counts[1:])]

needs_glibc = pytest.mark.skipif(_allocator() is None, reason='the allocator is not glibc, or set up by the environment')

@needs_glibc
def test_memory_stays_and_goes_back():
    with kept_memory():
        with kept_memory('cpu'): pages()
        assert sum(pages())<500   # the inner block has given nothing back
    assert pages()[0]>16_000

@needs_glibc
def test_memory_stays_in_training_and_embedding(tmp_path):
    data = toy_reid(tmp_path, n_ids=8, size=(32,16), progress=False)
    seen = []
    class Look(Callback):
        def after_batch(self): seen.append(len(speed._open))
        def before_fit(self): seen.append(len(speed._open))
    learn = reid_learner(reid_dls(data, (32,16), 2, 2, num_workers=0), resnet18, dtype=torch.float32)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Look()])
    assert set(seen)<={1,2} and len(seen)>3
    hook = learn.model.register_forward_hook(lambda *_: seen.append(('embed', len(speed._open))))
    embed(learn.model, [data.train.path[0]])
    hook.remove()
    assert ('embed',1) in seen and not speed._open

def test_kept_memory_ends_with_an_error_and_leaves_a_gpu_alone():
    with pytest.raises(ZeroDivisionError), kept_memory(): 1/0
    with kept_memory('meta'): assert not speed._open
    assert not speed._open

def test_memory_that_the_environment_set_up(monkeypatch):
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '131072')
    assert speed._allocator.__wrapped__() is None
