"Pooling: properties over random maps, and parity with the reference implementation"
import re
from functools import partial

import numpy as np, pytest, torch

from fastreid_nb.pooling import AvgPool, GeM, MaxPool, full_precision, narrow_to
from golden_files import close, golden_files, missing

pools = [AvgPool, MaxPool, GeM, partial(GeM, p=1.5, learn=False)]
built = dict(GlobalAvgPool=AvgPool, FastGlobalAvgPool=AvgPool, GlobalMaxPool=MaxPool,
             GeneralizedMeanPooling=partial(GeM, learn=False), GeneralizedMeanPoolingP=GeM)

def layers():
    "Every (file, input, layer) of the golden files"
    res = []
    for p in golden_files('pooling*.npz'):
        for k in np.load(p).files:
            m = re.fullmatch(r'(x|relu)_([A-Za-z]*Pool[A-Za-z]*|GeM_p[\d.]+)', k)
            if m: res.append(pytest.param(p, *m.groups(), id=f'{p.stem}-{k}'))
    return res or [pytest.param(None, None, None, id='none')]

@pytest.mark.parametrize('path,inp,layer', layers())
def test_golden_pooling(path, inp, layer):
    if path is None: missing('pooling*.npz')
    z = np.load(path)
    power = re.fullmatch(r'GeM_p([\d.]+)', layer)
    if not power and layer not in built: missing(f'pooling layer {layer}')
    pool = GeM(float(power[1])) if power else built[layer]()
    x = torch.tensor(z['x' if inp=='x' else 'x_relu'], requires_grad=True)
    y,key = pool(x),f'{inp}_{layer}'
    close(y, z[key][...,0,0])
    if f'{key}_grad_x_mean_hw' not in z.files: return
    (torch.tensor(z['w'])[...,0,0]*y).sum().backward()
    close(x.grad.mean((2,3)), z[f'{key}_grad_x_mean_hw'])
    close(x.grad[0,:4], z[f'{key}_grad_x_sample0'])
    if f'{key}_grad_p' in z.files: close(pool.p.grad, z[f'{key}_grad_p'])

@pytest.mark.parametrize('pool', pools)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_loop(pool, dtype):
    x = torch.rand(3, 5, 4, 2, generator=torch.Generator().manual_seed(0)).to(dtype)+0.1
    pool = pool()
    y = pool(x)
    assert y.dtype==dtype and y.shape==(3,5)
    one = torch.stack([torch.cat([pool(x[b:b+1,c:c+1])[0] for c in range(5)]) for b in range(3)])
    assert torch.equal(y, one)
    lo,hi = x.amin((2,3)),x.amax((2,3))
    assert ((y>=lo*(1-1e-2)) & (y<=hi*(1+1e-2))).all()

@pytest.mark.parametrize('pool', pools)
def test_order_of_positions_does_not_matter(pool):
    x = torch.rand(2, 6, 4, 4)
    mixed = x.flatten(2)[:,:,torch.randperm(16)].view_as(x)
    torch.testing.assert_close(pool()(x), pool()(mixed))
    torch.testing.assert_close(pool()(x), pool()(x.to(memory_format=torch.channels_last)))

@pytest.mark.parametrize('pool', pools)
def test_input_is_left_alone(pool):
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    pool()(x)
    assert torch.equal(x, before)

def test_gem_grows_from_average_to_maximum():
    x = torch.rand(4, 7, 8, 4)
    ys = torch.stack([GeM(p)(x) for p in (1, 2, 3, 6.5, 20, 100, 2000)])
    assert (ys.diff(dim=0)>=-1e-6).all()
    torch.testing.assert_close(ys[0], AvgPool()(x))
    torch.testing.assert_close(ys[-1], MaxPool()(x), rtol=5e-3, atol=0)

@pytest.mark.parametrize('scale', [1e-20, 1e-3, 1., 1e4, 1e20, 1e30])
def test_gem_never_overflows(scale):
    x = (torch.rand(2, 3, 4, 4)*scale).requires_grad_()
    pool = GeM(6.5)
    y = pool(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and pool.p.grad.isfinite().all()

def test_gem_gradients():
    x = torch.rand(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    pool = GeM(2.5).double()
    assert torch.autograd.gradcheck(pool, x+0.1)
    assert torch.autograd.gradcheck(lambda p: torch.func.functional_call(pool, {'p':p}, (x+0.1,)), pool.p)

def test_gem_of_an_empty_map_of_zeros():
    x = torch.zeros(1, 2, 4, 4, requires_grad=True)
    y = GeM()(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.full((1,2), 1e-6))
    assert x.grad.isfinite().all()

def test_gem_learns_p_or_not():
    assert [n for n,_ in GeM().named_parameters()]==['p']
    assert not list(GeM(learn=False).parameters()) and GeM(4., learn=False).state_dict()['p'].tolist()==[4.]

@pytest.mark.parametrize('pool', pools)
def test_autocast_keeps_precision(pool):
    x = torch.rand(2, 3, 8, 4)*50
    with torch.autocast('cpu', dtype=torch.bfloat16): y = pool()(x.bfloat16())
    assert y.dtype==torch.float32
    torch.testing.assert_close(y, pool()(x.bfloat16().float()))

def test_precision_helpers():
    for d in (torch.float16, torch.bfloat16, torch.float32): assert full_precision(torch.ones(1, dtype=d)).dtype==torch.float32
    x = torch.ones(1, dtype=torch.float64)
    assert full_precision(x) is x and narrow_to(x, x.half()).dtype==torch.float16

@pytest.mark.parametrize('pool', pools)
@pytest.mark.parametrize('shape', [(2,3,4), (3,4), (0,3,2,2), (2,3,0,2)])
def test_wrong_maps_are_named(pool, shape):
    with pytest.raises(ValueError, match=r'\(B,C,h,w\)'): pool()(torch.zeros(shape))

@pytest.mark.parametrize('kw', [dict(p=0), dict(p=-1.), dict(p=float('nan')), dict(eps=0)])
def test_gem_bad_arguments(kw):
    with pytest.raises(ValueError, match='p>0 and eps>0'): GeM(**kw)
