"Global context and split attention: against loops, other libraries and the reference implementation"
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn

from fastreid_nb.backbone.core import GlobalContext, SplitAttention
from golden_files import close, golden_params, missing

def entries(z, name): return {k.removeprefix(f'{name}.'):torch.tensor(z[k]) for k in z.files if k.startswith(f'{name}.')}

def golden_split(z):
    "`SplitAttention` of the stored shapes, with the stored weights"
    state = entries(z, 'splat')
    out,n_in = state['conv.weight'].shape[0],z['x'].shape[1]
    radix = n_in//state['conv.weight'].shape[1]
    m = SplitAttention(n_in, out//radix, radix=radix)
    m.load_state_dict(state)
    return m

@pytest.fixture(params=golden_params('blocks*.npz'))
def blocks(request):
    if request.param is None: missing('blocks*.npz')
    z = np.load(request.param)
    if 'splat__eval' not in z.files: missing('the entry splat')
    return z

def test_golden_eval(blocks):
    with torch.no_grad(): close(golden_split(blocks).eval()(torch.tensor(blocks['x'])), blocks['splat__eval'])

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_golden_train(blocks, dtype):
    "The gradient within 1e-5 in double only: the inner normalisation sees three numbers per channel, which multiplies rounding errors"
    m,x = golden_split(blocks).train().to(dtype),torch.tensor(blocks['x'], dtype=dtype).requires_grad_()
    y = m(x)
    close(y, blocks['splat__train'])
    (torch.tensor(np.random.RandomState(602).randn(*y.shape), dtype=dtype)*y).sum().backward()
    close(x.grad, blocks['splat__train_grad_x'], rel=1e-5 if dtype==torch.float64 else 1e-4)
    for k in blocks.files:
        if k.startswith('splat__after_train.'): close(m.state_dict()[k.removeprefix('splat__after_train.')], blocks[k])

@pytest.mark.parametrize('radix,n_in,n_out,stride,dilation', [(2,8,12,1,1), (3,6,5,2,1), (4,16,8,1,2)])
def test_split_attention_is_a_mixture(radix, n_in, n_out, stride, dilation):
    "Every split convolves its own part of the channels, and every answer lies between the smallest and the largest split"
    m,x = SplitAttention(n_in, n_out, radix, stride, dilation).eval(),torch.randn(2, n_in, 9, 7)
    nn.init.normal_(m.fc2.weight)
    with torch.no_grad():
        parts = [F.conv2d(p, w, None, stride, dilation, dilation) for p,w in zip(x.chunk(radix, 1), m.conv.weight.chunk(radix))]
        splits = m.bn0(torch.cat(parts, 1)).relu().unflatten(1, (radix,n_out))
        shares,y = m.shares(splits),m(x)
    assert y.shape==(2, n_out, -(-9//stride), -(-7//stride)) and shares.std()>1e-3
    torch.testing.assert_close(shares.sum(1), torch.ones(2, n_out, 1, 1))
    torch.testing.assert_close(y, torch.einsum('brcij,brchw->bchw', shares, splits))
    assert ((y<=splits.amax(1)+1e-5) & (y>=splits.amin(1)-1e-5)).all()

def test_split_attention_sees_the_whole_map():
    m,x = SplitAttention(8, 8).eval(),torch.randn(1, 8, 16, 16)
    nn.init.normal_(m.fc2.weight)
    poked = x.clone()
    poked[...,0,0] += 50
    with torch.no_grad(): assert (m(poked)-m(x))[...,8:,8:].abs().max()>1e-4

def test_split_attention_keeps_16_bits():
    m,x = SplitAttention(8, 8).eval(),torch.randn(2, 8, 4, 4)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16): y = m(x)
    assert y.dtype==torch.bfloat16
    with torch.no_grad(): close(y.float(), m(x), rel=0.03)

@pytest.mark.parametrize('args,match', [((8,8,1), 'at least 2'), ((8,8,3), 'radix=3 with n_in=8'), ((7,8), 'divides')])
def test_split_attention_errors(args, match):
    with pytest.raises(ValueError, match=match): SplitAttention(*args)

@pytest.mark.parametrize('fusion', ['add','scale'])
def test_global_context_is_timms(fusion):
    layers = pytest.importorskip('timm.layers')
    theirs = layers.GlobalContext(32, fuse_add=fusion=='add', fuse_scale=fusion=='scale', rd_channels=8)
    ours,names = GlobalContext(32, ratio=4, fusion=fusion),{'fc1':'0', 'norm':'1', 'fc2':'3'}
    for o in theirs.parameters(): nn.init.normal_(o)
    with torch.no_grad():
        for k,v in theirs.named_parameters():
            part,_,rest = k.partition('.')
            layer,_,leaf = rest.rpartition('.')
            name = f'conv_mask.{rest}' if part=='conv_attn' else f'channel_{"add" if fusion=="add" else "mul"}_conv.{names[layer]}.{leaf}'
            own = ours.get_parameter(name)
            own.copy_(v.view_as(own))
        x = torch.randn(3, 32, 6, 4)
        close(ours(x), theirs(x))
        assert not torch.allclose(ours(x), x, atol=0.1)

def test_global_context_starts_as_the_identity():
    x = torch.randn(2, 32, 5, 3)
    with torch.no_grad():
        assert torch.equal(GlobalContext(32)(x), x)
        close(GlobalContext(32, fusion='scale')(x), x/2)

def test_global_context_weights_positions():
    "A place that the mask likes decides; equal places count alike"
    gc,x = GlobalContext(4, ratio=2),torch.zeros(1, 4, 3, 3)
    with torch.no_grad():
        gc.conv_mask.weight.zero_()[0,0] = 1
        close(gc.attend(x), torch.full((1,1,3,3), 1/9))
        x[0,0,1,2] = 20
        assert gc.attend(x)[0,0,1,2]>0.999
        close(gc.attend(x).sum(), 1.)

def test_global_context_trains():
    gc,x = GlobalContext(8, ratio=2),torch.randn(2, 8, 4, 4)
    gc(x).square().sum().backward()
    assert gc.channel_add_conv[-1].weight.grad.abs().max()>0

@pytest.mark.parametrize('kw,match', [(dict(n=16), 'at most 8'), (dict(n=64, fusion='mul'), "'add', 'scale'")])
def test_global_context_errors(kw, match):
    with pytest.raises(ValueError, match=match): GlobalContext(**kw)
