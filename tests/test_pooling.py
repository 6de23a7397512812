"Pooling: properties over random maps, export, and parity with the reference implementation"
import io, re
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F

from fastreid_nb.pooling.parts import ABPool, AttentionPool, FlattenPool, GridGeM, row_votes, strip_borders
from fastreid_nb.pooling.core import AvgMaxPool, GlobalAvgPool, ClipAvgPool, GeM, GlobalMaxPool, full_precision, narrow_to
from golden_files import close, golden_files, missing
from slow import slow_but

def seeded(pool, seed=0):
    "`pool` with random weights in place of zeros"
    torch.manual_seed(seed)
    for q in pool.parameters():
        if q.ndim>1: torch.nn.init.normal_(q)
    return pool

def attention(n_feat=5, **kwargs): return seeded(AttentionPool(n_feat, **kwargs))

pools = [GlobalAvgPool, GlobalMaxPool, GeM, partial(GeM, p=1.5, learn=False)]
plain = pools+[AvgMaxPool, ClipAvgPool, attention, partial(attention, shared=True)] # one value per channel, order of positions is nothing
split = [partial(FlattenPool, (4,2)), partial(GridGeM, (2,2)), partial(GridGeM, (3,1)), ABPool, partial(ABPool, 2, p=1.5)]

def maps(b=3, dtype=torch.float32, h=4, w=2, seed=0):
    return torch.rand(b, 5, h, w, generator=torch.Generator().manual_seed(seed)).to(dtype)+.1

built = dict(GlobalAvgPool=GlobalAvgPool, FastGlobalAvgPool=GlobalAvgPool, GlobalMaxPool=GlobalMaxPool, AdaptiveAvgMaxPool=AvgMaxPool,
             ClipGlobalAvgPool=ClipAvgPool, GeneralizedMeanPooling=partial(GeM, learn=False), GeneralizedMeanPoolingP=GeM)
golden_key = re.compile(r'(?P<inp>x|relu)_(?P<name>[A-Za-z]+?)(_p(?P<p>[\d.]+))?(_out(?P<h>\d+)x(?P<w>\d+))?(_(?P<what>shape|flatten|grad_\w+))?')

def golden_keys():
    "Every (file, key) that says something about a layer"
    keys = [(p,k) for p in golden_files('pooling*.npz') for k in np.load(p).files if k not in ('seed','x','x_relu','w')]
    return [pytest.param(p, k, id=f'{p.stem}-{k}') for p,k in keys] or [pytest.param(None, None, id='none')]

def golden_pool(m, hw):
    "Our layer for a matched key"
    p = float(m['p'] or 3)
    if m['name']=='Flatten': return FlattenPool(hw)
    if m['name']=='GeM': return GridGeM((int(m['h']), int(m['w'])), p) if m['h'] else GeM(p)
    if m['name'] not in built or m['p'] or m['h']: missing(f'pooling layer {m[0]}')
    return built[m['name']]()

@pytest.mark.parametrize('path,key', golden_keys())
def test_golden_pooling(path, key):
    if path is None: missing('pooling*.npz')
    z,m = np.load(path),golden_key.fullmatch(key)
    if not m: missing(f'the meaning of {key}')
    x = torch.tensor(z['x' if m['inp']=='x' else 'x_relu'], requires_grad=True)
    pool,what = golden_pool(m, tuple(x.shape[2:])),m['what'] or 'flatten'
    y,z = pool(x),{k:torch.tensor(z[k]) for k in (key,'w')}
    if what=='shape': return close(torch.tensor([*y.shape,1,1]), z[key])
    if what=='flatten': return close(y, z[key].flatten(1))
    (z['w']*y.view(*x.shape[:2], -1, 1)).sum().backward()
    got = dict(grad_x_mean_hw=lambda: x.grad.mean((2,3)), grad_x_sample0=lambda: x.grad[0,:4], grad_p=lambda: pool.p.grad)
    if what not in got: missing(f'the meaning of {key}')
    close(got[what](), z[key])

@pytest.mark.parametrize('pool,expected', [
    (GlobalAvgPool, [.069217,.172744,-.119485,-.137974,.159636,.09152]), (GlobalMaxPool, [.909297,.990607,.912945,.956376,.999912,.901788]),
    (GeM, [.588921,.665661,.552595,.550971,.653903,.604254]), (ClipAvgPool, [.069217,.172744,0,0,.159636,.09152])])
def test_sine(pool, expected):
    y = pool()(torch.arange(48.).sin().view(2, 3, 4, 2))
    torch.testing.assert_close(y.flatten(), torch.tensor(expected), atol=2e-6, rtol=0)

@pytest.mark.parametrize('pool', pools+[ClipAvgPool])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtype_and_loop(pool, dtype):
    x,pool = maps(dtype=dtype),pool()
    y = pool(x)
    assert y.dtype==dtype and y.shape==(3,5)
    one = torch.stack([torch.cat([pool(x[b:b+1,c:c+1])[0] for c in range(5)]) for b in range(3)])
    assert torch.equal(y, one)
    lo,hi = x.amin((2,3)),x.amax((2,3))
    assert ((y>=lo*(1-1e-2)) & (y<=hi*(1+1e-2))).all()

@pytest.mark.parametrize('pool', plain+split)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_width_dtype_and_pictures_apart(pool, dtype):
    x,pool = maps(dtype=dtype),pool()
    with torch.no_grad(): y,each = pool(x),torch.cat([pool(o[None]) for o in x])
    assert y.dtype==dtype and y.shape==(3,5*getattr(pool, 'n_out', 1))
    tol = {torch.float64:1e-12, torch.float32:1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(y, each, rtol=tol, atol=tol)
    exact = pool.double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=tol, atol=tol)

@pytest.mark.parametrize('pool', plain+split)
def test_gradients_are_right(pool):
    pool,x = pool().double(),maps(2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(pool, x)
    ps = dict(pool.named_parameters())
    if ps: assert torch.autograd.gradcheck(lambda *o: torch.func.functional_call(pool, dict(zip(ps, o)), (x,)), tuple(ps.values()))

def permuted(x, seed=0):
    order = torch.randperm(x.shape[2]*x.shape[3], generator=torch.Generator().manual_seed(seed))
    return x.flatten(2)[:,:,order].view_as(x)

@pytest.mark.parametrize('pool', plain)
def test_order_of_positions_does_not_matter(pool):
    x,pool = maps(h=4, w=4),pool()
    torch.testing.assert_close(pool(x), pool(permuted(x)))

@pytest.mark.parametrize('pool', split)
def test_order_of_positions_matters(pool):
    x,pool = maps(),pool()
    assert not torch.allclose(pool(x), pool(permuted(x)), rtol=1e-2)

@pytest.mark.parametrize('pool', [partial(GridGeM, (2,1)), ABPool])
def test_strips_do_not_care_about_order_in_a_row(pool):
    x,pool = maps(h=6, w=4),pool()
    torch.testing.assert_close(pool(x), pool(x[...,[2,0,3,1]]))

@pytest.mark.parametrize('pool', plain+split)
def test_channels_last(pool):
    x,pool = maps(),pool()
    torch.testing.assert_close(pool(x), pool(x.to(memory_format=torch.channels_last)))

@pytest.mark.parametrize('pool', plain+split)
def test_input_is_left_alone(pool):
    x = maps()-.5
    before = x.clone()
    pool()(x)
    assert torch.equal(x, before)

def test_gem_grows_from_average_to_maximum():
    x = torch.rand(4, 7, 8, 4)
    ys = torch.stack([GeM(p)(x) for p in (1, 2, 3, 6.5, 20, 100, 2000)])
    assert (ys.diff(dim=0)>=-1e-6).all()
    torch.testing.assert_close(ys[0], GlobalAvgPool()(x))
    torch.testing.assert_close(ys[-1], GlobalMaxPool()(x), rtol=5e-3, atol=0)

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

@pytest.mark.parametrize('pool', [p for p in plain if p is not attention and getattr(p, 'func', 0) is not attention]+split[1:])
def test_autocast_keeps_precision(pool):
    x,pool = maps(2, h=8, w=4).bfloat16()*50,pool()
    with torch.autocast('cpu', dtype=torch.bfloat16): y = pool(x)
    assert y.dtype==torch.float32
    torch.testing.assert_close(y, pool(x.float()))

@pytest.mark.parametrize('shared', [False, True])
def test_attention_under_autocast(shared):
    x,pool = maps(2, h=8, w=4).bfloat16(),attention(shared=shared)
    with torch.autocast('cpu', dtype=torch.bfloat16): y,w = pool(x),pool.weights(x)
    assert y.dtype==w.dtype==torch.float32
    torch.testing.assert_close(w.sum((2,3)), torch.ones(w.shape[:2]))
    torch.testing.assert_close(y, pool(x.float()), rtol=2e-2, atol=0)

def test_flatten_under_autocast_changes_nothing():
    x = maps().bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(FlattenPool((4,2))(x), x.flatten(1))

def test_precision_helpers():
    for d in (torch.float16, torch.bfloat16, torch.float32): assert full_precision(torch.ones(1, dtype=d)).dtype==torch.float32
    x = torch.ones(1, dtype=torch.float64)
    assert full_precision(x) is x and narrow_to(x, x.half()).dtype==torch.float16

@pytest.mark.parametrize('pool', plain+split)
@pytest.mark.parametrize('shape', [(2,3,4), (3,4), (0,3,2,2), (2,3,0,2)])
def test_wrong_maps_are_named(pool, shape):
    with pytest.raises(ValueError, match=r'\(B,C,h,w\)'): pool()(torch.zeros(shape))

@pytest.mark.parametrize('kw', [dict(p=0), dict(p=-1.), dict(p=float('nan')), dict(eps=0)])
def test_gem_bad_arguments(kw):
    with pytest.raises(ValueError, match='p>0 and eps>0'): GeM(**kw)

def test_avg_max_and_clip_against_pytorch():
    x = torch.randn(3, 5, 6, 4, generator=torch.Generator().manual_seed(1))*4
    avg,top = F.adaptive_avg_pool2d(x, 1).flatten(1),F.adaptive_max_pool2d(x, 1).flatten(1)
    torch.testing.assert_close(AvgMaxPool()(x), avg+top)
    torch.testing.assert_close(ClipAvgPool()(x), avg.clamp(0, 1))
    assert (avg<0).any() and (avg>1).any()

@pytest.mark.parametrize('shared', [False, True])
def test_attention_against_a_loop(shared):
    pool,x = attention(shared=shared).double(),maps(2, torch.float64)
    y,weight = pool(x),pool.score.weight[:,:,0,0]
    for b in range(2):
        scores = weight@x[b].flatten(1)
        w = torch.stack([s.exp()/s.exp().sum() for s in scores])
        torch.testing.assert_close(y[b], (w*x[b].flatten(1)).sum(1))
    assert pool.weights(x).shape==(2,1 if shared else 5,4,2) and (pool.weights(x)>0).all()

def test_attention_starts_as_the_average_and_can_learn():
    x,pool = maps(),AttentionPool(5)
    torch.testing.assert_close(pool(x), GlobalAvgPool()(x))
    pool(x).square().sum().backward()
    assert pool.score.weight.grad.abs().min()>0 and [n for n,_ in pool.named_parameters()]==['score.weight']

def test_attention_survives_large_scores():
    pool = attention()
    with torch.no_grad(): pool.score.weight *= 1e4
    x = maps().requires_grad_()
    pool(x).sum().backward()
    assert pool(x).isfinite().all() and x.grad.isfinite().all()

@pytest.mark.parametrize('hw', [(4,2), (7,5), (16,8), (5,3)])
@pytest.mark.parametrize('grid', [(1,1), (2,2), (3,1), (4,2), (1,2)])
def test_grid_is_pytorchs_adaptive_grid(hw, grid):
    x = maps(2, torch.float64, *hw)
    y = GridGeM(grid, 2.5).cells(x)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x.pow(2.5), grid).pow(1/2.5))
    assert torch.equal(GridGeM(grid, 2.5)(x), y.flatten(1)) and GridGeM(grid).n_out==grid[0]*grid[1]

@pytest.mark.parametrize('pool', [partial(GridGeM, (2,2)), ABPool])
def test_cells_of_a_faint_corner_do_not_vanish(pool):
    x = maps(1, h=8, w=4)
    x[:,:,:4] *= 1e-5
    x[:,:,4:] *= 1e4
    x.requires_grad_()
    pool = pool(p=6.5)
    y = pool(x)
    y.sum().backward()
    assert (y>0).all() and x.grad.isfinite().all() and pool.p.grad.isfinite().all()

def naive_strips(x, parts):
    "Votes, borders and strips of one picture with p=1, counted in plain Python"
    c,h,w = x.shape
    votes = [0.]*h
    for ch in x:
        top = [(i,j) for i in range(h) for j in range(w) if ch[i,j]==ch.max()]
        for i,_ in top: votes[i] += 1/len(top)/c
    borders,i,below = [0.],0,0.
    for k in range(1, parts):
        while below+votes[i]<k/parts-1e-9: below,i = below+votes[i],i+1
        borders.append(i+(k/parts-below)/votes[i])
    borders.append(float(h))
    cells = []
    for a,b in zip(borders, borders[1:]):
        inside = [max(0., min(b, i+1)-max(a, i)) for i in range(h)]
        cells.append(sum(o*x[:,i].mean(1) for i,o in enumerate(inside))/sum(inside))
    return votes,borders,torch.stack(cells, 1)

@pytest.mark.parametrize('parts', [1, 2, 3, 6])
def test_abpool_against_a_loop(parts):
    x = torch.rand(4, 37, 12, 3, generator=torch.Generator().manual_seed(parts), dtype=torch.float64)*(torch.arange(1, 13)/12)[:,None]
    x[:,:5] = x[:,:5].mul(4).round().div(4)+.01                                            # ties
    votes,borders,cells = zip(*(naive_strips(o, parts) for o in x))
    torch.testing.assert_close(row_votes(x), torch.tensor(votes, dtype=torch.float64))
    torch.testing.assert_close(ABPool(parts).borders(x), torch.tensor(borders, dtype=torch.float64))
    torch.testing.assert_close(ABPool(parts, p=1.).cells(x)[...,0], torch.stack(cells))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_abpool_borders(dtype):
    x = torch.randn(16, 64, 24, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    b = ABPool(4).borders(x)
    assert b.shape==(16,5) and not b.requires_grad and (b[:,0]==0).all() and (b[:,-1]==24).all()
    assert (b.diff(dim=1)>0).all() and len(b[:,1].unique())>8
    share = torch.cat([torch.zeros(16, 1), row_votes(x).cumsum(1)], 1)
    low,part = b.floor().long().clamp(max=23),b-b.floor().clamp(max=23)
    passed = share.gather(1, low)+part*(share.gather(1, low+1)-share.gather(1, low))
    torch.testing.assert_close(passed, (torch.arange(5)/4).expand(16, 5), rtol=0, atol=1e-4)

@pytest.mark.parametrize('value', [0., 1., -2.])
@pytest.mark.parametrize('h,parts', [(24,3), (24,6), (16,3), (7,2)])
def test_abpool_of_a_uniform_map_has_equal_strips(value, h, parts):
    x = torch.full((2,8,h,4), value)
    torch.testing.assert_close(ABPool(parts).borders(x), torch.linspace(0, h, parts+1).expand(2, -1), rtol=0, atol=1e-4)

@pytest.mark.parametrize('row', [0, 5, 11])
def test_abpool_with_all_votes_in_one_row(row):
    x = maps(2, h=12)
    x[:,:,row] += 5
    pool = ABPool(3)
    torch.testing.assert_close(pool.borders(x)[:,1:-1], torch.tensor([row+1/3, row+2/3]).expand(2, 2), rtol=0, atol=1e-4)
    torch.testing.assert_close(pool.cells(x)[:,:,1,0], GeM()(x[:,:,row:row+1]))
    assert pool(x).isfinite().all()

def test_abpool_follows_a_shift():
    body = maps(1, h=12, w=4)
    x = torch.cat([F.pad(body, (0, 0, k, 12-k)) for k in range(12)])
    b,cells = ABPool(3).borders(x),ABPool(3).cells(x)[...,0]
    torch.testing.assert_close(b[:,1:-1], b[:1,1:-1]+torch.arange(12.)[:,None])
    assert F.cosine_similarity(cells, cells[:1], dim=1).min()>.999
    equal = GridGeM((3,1)).cells(x)[...,0]
    assert F.cosine_similarity(equal, equal[:1], dim=1).min()<.99

def test_strip_borders_skip_rows_without_votes():
    votes = torch.tensor([[0.,0.,.5,0.,0.,.5,0.]])
    assert strip_borders(votes, 2).tolist()==[[0.,3.,7.]]
    torch.testing.assert_close(strip_borders(votes, 4), torch.tensor([[0.,2.5,3.,5.5,7.]]))

class Named(torch.nn.Module):
    "A pooling layer between a convolution and the output, as in a model"
    def __init__(self, pool):
        super().__init__()
        self.conv,self.pool = torch.nn.Conv2d(3, 5, 3, padding=1),pool
    def forward(self, x): return self.pool(self.conv(x).relu())

@pytest.mark.parametrize('pool', plain+split)
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::torch.jit.TracerWarning', 'ignore::FutureWarning')
def test_onnx_with_another_batch_size(pool):
    ort = pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    net,file = Named(pool()).eval(),io.BytesIO()
    torch.onnx.export(net, torch.rand(2, 3, 4, 2), file, input_names=['x'], dynamic_axes=dict(x={0:'batch'}), dynamo=False)
    x = torch.randn(5, 3, 4, 2)
    out, = ort.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider']).run(None, dict(x=x.numpy()))
    with torch.no_grad(): torch.testing.assert_close(torch.from_numpy(out), net(x), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('pool', slow_but(plain+split, GeM, attention, ABPool))
def test_exported_graph_takes_any_batch(pool):
    pool = pool().eval()
    graph = torch.export.export(pool, (maps(2),), dynamic_shapes=({0:torch.export.Dim('batch')},)).module()
    torch.testing.assert_close(graph(maps(7)), pool(maps(7)))

@pytest.mark.parametrize('pool', plain+split)
def test_state_travels(pool):
    mine,theirs = seeded(pool(), 1),seeded(pool(), 2)
    theirs.load_state_dict(mine.state_dict())
    assert torch.equal(mine(maps()), theirs(maps()))
    assert set(mine.state_dict())<={'p','score.weight'}

@pytest.mark.parametrize('size', [(0,1), (1,), (2,2,2), (1.5,2)])
@pytest.mark.parametrize('pool', [FlattenPool, GridGeM])
def test_bad_sizes(pool, size):
    with pytest.raises(ValueError, match='two whole numbers'): pool(size)

@pytest.mark.parametrize('parts', [0, -1, 2.5, '3'])
def test_abpool_bad_parts(parts):
    with pytest.raises(ValueError, match='whole number of parts'): ABPool(parts)

def test_maps_that_do_not_fit():
    with pytest.raises(ValueError, match=r'\(B,C,1,1\), got \(3, 5, 4, 2\)'): FlattenPool()(maps())
    with pytest.raises(ValueError, match='4x2 positions is too small for 2x3 cells'): GridGeM((2,3))(maps())
    with pytest.raises(ValueError, match='4 rows is too small for 5 strips'): ABPool(5)(maps())
    with pytest.raises(ValueError, match='made for maps of 7 channels'): AttentionPool(7)(maps())

@pytest.mark.parametrize('pool', plain+split)
def test_nothing_is_left_on_another_device(pool):
    y = pool().to('meta')(maps().to('meta'))
    assert y.is_meta and y.shape[0]==3

def test_sizes_from_a_saved_recipe(): assert GridGeM([4,2]).grid==(4,2) and FlattenPool([7,7]).size==(7,7) and FlattenPool([7,7]).n_out==49

def test_layers_show_their_settings():
    assert 'grid=(4, 2), p=3' in repr(GridGeM()) and 'parts=3, p=3' in repr(ABPool()) and 'size=(1, 1)' in repr(FlattenPool())

@pytest.mark.parametrize('amp', slow_but([False,True], True))
@pytest.mark.parametrize('make', plain+split)
def test_one_graph(make, amp):
    "torch.compile takes the layer whole, under autocast too"
    torch._dynamo.reset()
    with torch.autocast('cpu', torch.bfloat16, enabled=amp): res = torch._dynamo.explain(make())(maps())
    assert (res.graph_count, res.graph_break_count)==(1,0), [str(o.reason) for o in res.break_reasons]
