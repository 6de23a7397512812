"torch's fused Adam against fastai's loop: the same steps"
import io
from functools import partial

import pytest, torch
from fastai.optimizer import Adam
from torch import nn

from fastreid_nb.train.core import reid_adam

loop = partial(Adam, eps=1e-8, sqr_mom=.999, decouple_wd=False)
makers = dict(fused=partial(reid_adam, fused=True))

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

def groups(m): return [list(m[0].parameters()), [*m[2].parameters(), *m[4].parameters()]]

def steps(m, opt, n, seed=1, used=lambda i: True):
    "All parameters after each of `n` steps; where `used` is false only the last layer has gradients"
    gen,out = torch.Generator().manual_seed(seed),[]
    for i in range(n):
        y = m(torch.randn(16, 6, generator=gen)) if used(i) else m[4](torch.randn(16, 4, generator=gen))
        y.square().mean().backward()
        opt.step()
        opt.zero_grad()
        out.append(torch.cat([p.detach().flatten() for p in m.parameters()]))
    return torch.stack(out)

@pytest.mark.parametrize('kind', makers)
@pytest.mark.parametrize('case', ['plain','two rates','frozen','unused','other averages'])
def test_agrees(kind, case):
    found = []
    for make in (loop,makers[kind]):
        m,parts = net(),[]
        opt = make(groups(m), lr=1e-3)
        opt.set_hypers(wd=5e-4)
        if case=='two rates': opt.set_hyper('lr', slice(1e-4,1e-2))
        if case=='other averages': opt.set_hypers(mom=.85, sqr_mom=.99, eps=1e-6)
        if case=='frozen':
            opt.freeze_to(1)
            parts.append(steps(m, opt, 4, 2))
            assert torch.equal(m[0].weight, net()[0].weight)
            opt.unfreeze()
        parts.append(steps(m, opt, 10, used=(lambda i: i%3!=1) if case=='unused' else lambda i: True))
        found.append(torch.cat(parts))
    assert (found[0]-found[1]).abs().max()<1e-6

def test_the_loop_is_fastais():
    a,b = net(),net()
    assert torch.equal(steps(a, reid_adam(groups(a), lr=1e-3, fused=False), 5), steps(b, loop(groups(b), lr=1e-3, wd=5e-4), 5))

@pytest.mark.parametrize('kind', makers)
def test_state(kind):
    "Saved and loaded in the middle, it goes on as if nothing had happened"
    m = net()
    opt = makers[kind](groups(m), lr=1e-3)
    steps(m, opt, 5)
    f = io.BytesIO()
    torch.save(dict(model=m.state_dict(), opt=opt.state_dict()), f)
    f.seek(0)
    ck,twin = torch.load(f, weights_only=True),net()
    new = makers[kind](groups(twin), lr=5.)
    twin.load_state_dict(ck['model'])
    new.load_state_dict(ck['opt'])
    assert torch.equal(steps(m, opt, 5, 3), steps(twin, new, 5, 3))

def test_no_decay_on_norms_is_refused():
    opt = reid_adam(groups(net()), lr=1e-3, fused=True)
    opt.state[opt.param_lists[0][0]]['do_wd'] = False
    with pytest.raises(ValueError, match='wd_bn_bias'): opt.step()
