"How a network is run fastest: measured, remembered, and true to float32"
import time

import fresh, pytest, torch

from fastreid_nb.backbone.resnet import resnet18_ibn
from fastreid_nb.heads import speed
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.speed import Speed, best_dtype, fastest, fastest_model, quickest

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
