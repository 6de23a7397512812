"Models that torch.compile has compiled: one graph, the same training, precision on and off, plain names in the file"
import copy

import pytest, torch
from fastai.callback.core import Callback
from torch import nn

from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.backbone.core import IBN
from fastreid_nb.backbone.resnet import resnet18_ibn
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.heads.model import reid_model
from fastreid_nb.train.checkpoint import load_reid, plain_state, save_reid
from fastreid_nb.train.core import reid_learner

class Count:
    "A backend that runs graphs as they are and counts them"
    def __init__(self): self.n = 0
    def __call__(self, graph, args):
        self.n += 1
        return graph.forward

@pytest.fixture(autouse=True)
def fresh(): torch._dynamo.reset()

@pytest.mark.parametrize('train,amp', [(False,False),(True,True)])
def test_one_graph(train, amp):
    "No break of ours, and the same numbers"
    model,x = reid_model(resnet18_ibn, 10).train(train),torch.rand(4, 3, 64, 32)
    same = copy.deepcopy(model)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        told = torch._dynamo.explain(copy.deepcopy(model))(x)
        assert (told.graph_count,told.graph_break_count)==(1,0), [str(o.reason) for o in told.break_reasons]
        torch._dynamo.reset()
        got,want = torch.compile(model, backend=Count(), fullgraph=True)(x),same(x)
    for a,b in zip(got if train else [got], want if train else [want]): assert a.dtype==b.dtype and torch.equal(a, b)

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    data = toy_reid(tmp_path_factory.mktemp('toy'), n_ids=8, size=(64,32), progress=False)
    return reid_dls(data, (64,32), p=3, k=4, num_workers=0, augs=[])

class Small(nn.Sequential):
    "A backbone that compiles in a moment"
    n_feat = 16
    def __init__(self): super().__init__(nn.Conv2d(3, 16, 3, 4), IBN(16), nn.ReLU())

ways = [None,'in place','wrapped']

def learner(dls, way, dtype=torch.bfloat16):
    "A learner whose model is not compiled, compiled in place, or wrapped; and the backend that counts"
    torch._dynamo.reset()
    learn,count = reid_learner(dls, Small, dtype=dtype),Count()
    if way=='in place': learn.model.compile(backend=count, dynamic=False)
    if way=='wrapped': learn.model = torch.compile(learn.model, backend=count, dynamic=False)
    return learn,count

def fit(learn, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, **kwargs)

@pytest.mark.parametrize('way', ways[1:])
def test_trains_compiled(dls, way):
    "The same weights as without compiling, and nothing is compiled again by a second fit"
    states = []
    for o in (way,None):
        learn,count = learner(dls, o)
        fit(learn)
        n = count.n
        fit(learn)
        assert not torch.is_autocast_enabled('cpu') and (o is None or 1<=n==count.n<=4)
        states.append(plain_state(learn.model))
    assert states[0].keys()==states[1].keys()
    assert all(torch.equal(states[0][k], v) for k,v in states[1].items())

@pytest.mark.parametrize('way', ways)
@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float32])
def test_precision_is_on(dls, way, dtype):
    "Logits come in the precision asked for, and the model sees plain tensors"
    learn,seen = learner(dls, way, dtype)[0],set()
    class Watch(Callback):
        def after_pred(self):
            if self.training: seen.add((self.pred.logits.dtype, type(self.xb[0])))
    fit(learn, cbs=Watch())
    assert seen=={(dtype, torch.Tensor)}

@pytest.mark.parametrize('way', ways)
@pytest.mark.parametrize('exc', [KeyboardInterrupt,ZeroDivisionError])
def test_off_after_errors(dls, way, exc):
    learn,_ = learner(dls, None)
    def fail(x): raise exc
    learn.model.pool.forward = fail
    if way=='in place': learn.model.compile(backend='eager')
    if way=='wrapped': learn.model = torch.compile(learn.model, backend='eager')
    with pytest.raises((exc, torch._dynamo.exc.TorchDynamoException)): fit(learn)
    assert not torch.is_autocast_enabled('cpu')
    assert (learn.model.__dict__.get('_compiled_call_impl') is None)==(way!='in place')

def test_copies_are_clean(dls):
    "A deep copy made during a fit, as a mean teacher is, has no autocast of its own"
    learn,got = learner(dls, None)[0],[]
    class Copy(Callback):
        def before_train(self): got.append(copy.deepcopy(self.model))
    fit(learn, cbs=Copy())
    assert '_compiled_call_impl' not in got[0].__dict__

@pytest.mark.parametrize('part', [False,True])
def test_file_has_plain_names(part, tmp_path):
    model = reid_model(resnet18_ibn, 10).eval()
    x = torch.rand(1, 3, 64, 32)
    with torch.no_grad(): want = model(x)
    if part: model.backbone = torch.compile(model.backbone, backend='eager')
    else: model = torch.compile(model, backend='eager')
    save_reid(tmp_path/'m.pt', model)
    again = load_reid(tmp_path/'m.pt')
    assert not any('_orig_mod' in k for k in again.state_dict())
    with torch.no_grad(): assert torch.allclose(again(x), want, atol=1e-5)
