"Augmentations of frame, colour and occlusion, and the recipes made of them"
import json, pickle
from functools import partial

import numpy as np, pytest, torch, torchvision.transforms.v2.functional as F
from fastai.torch_core import TensorImage
from PIL import Image
from torchvision.transforms import InterpolationMode

from fastreid_nb.augment.core import as_dtype, bagtricks_augs, fills, paste, random_erase, random_rect, show_draws
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.data.images import TableImages
from fastreid_nb.augment.geometry import affine, color_jitter, grey_patch, random_resized_crop, random_shift, shift_hue
from fastreid_nb.augment.occlusion import RandomPatch, cutout, occlude
from fastreid_nb.recipes.augs import aug_recipes, sbs_augs, strong_augs, weak_augs
from fastreid_nb.data.toy import toy_reid
from golden_files import golden_params, missing

u8,f32 = torch.uint8,torch.float32
obstacles = [torch.from_numpy(np.random.default_rng(i).integers(0, 256, (3,40,30), dtype=np.uint8)) for i in range(4)]
augs = dict(random_resized_crop=random_resized_crop, affine=affine, random_shift=random_shift, color_jitter=color_jitter, grey_patch=grey_patch,
    mean=random_erase, zero=partial(random_erase, fill='zero'), random=partial(random_erase, fill='random'), colour=partial(random_erase, fill=(.2,.4,.6)),
    cutout=cutout, occlude=partial(occlude, images=obstacles))
tv = dict(area=(.02,.33), aspect=(.3,3.3), log=True) # ranges of torchvision's erasing
sizes = [(128,64), (64,128), (33,33), (7,5), (3,4)]
every_aug = pytest.mark.parametrize('name', augs)

def gen(*seed): return np.random.default_rng(seed)

def picture(size=(128,64), seed=0, smooth=False):
    "Random bytes; smooth ones look like a photograph to a filter"
    x = torch.from_numpy(gen(seed).integers(0, 256, (3,*size), dtype=np.uint8))
    return F.resize(F.resize(x, [8,4]), list(size)) if smooth else x

def apply(recipe, x, rng):
    for f in recipe: x = f(x, rng)
    return x

@pytest.fixture(scope='module')
def data(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=12, size=(64,32), progress=False)

# --- what all of them promise

@pytest.mark.parametrize('size', sizes)
@pytest.mark.parametrize('dtype', [u8, f32, torch.float64, torch.float16])
@every_aug
def test_shape_dtype_range_and_input(name, dtype, size):
    x = as_dtype(picture(size), dtype)
    keep,aug = x.clone(),partial(augs[name], p=1)
    for i in range(8):
        y = aug(x, gen(i))
        assert y.shape==x.shape and y.dtype==dtype and torch.equal(aug(x, gen(i)), y)
        assert dtype==u8 or 0<=y.min() and y.max()<=1
    assert torch.equal(x, keep)

@every_aug
def test_memory_layout_does_not_matter(name):
    x,aug = picture(),partial(augs[name], p=1)
    for i in range(5):
        want = aug(x, gen(i))
        for o in (x.flip(-1).contiguous().flip(-1), x.permute(1,2,0).contiguous().permute(2,0,1), TensorImage(x)): assert torch.equal(aug(o, gen(i)), want)

@every_aug
def test_rng_is_the_only_source(name):
    x,aug,out = picture(),partial(augs[name], p=1),[]
    for seed in (0,1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        out.append(aug(x, gen(3)))
    assert torch.equal(*out)
    assert not all(torch.equal(aug(x, gen(i)), out[0]) for i in range(10))

@every_aug
def test_bytes_and_floats_agree(name):
    for i in range(20):
        x = picture(seed=i, smooth=i%2==0)
        a,b = (augs[name](o, gen(i), p=1) for o in (x, x/255))
        assert (a.float()-b*255).abs().max()<=(1 if name=='grey_patch' else .5)+1e-3   # torchvision's grey cuts off fractions in bytes

@pytest.mark.parametrize('p', [0,.3,1])
@every_aug
def test_probability(name, p):
    x = picture((40,20))
    hits = np.mean([not torch.equal(augs[name](x, gen(i), p=p), x) for i in range(400)])
    assert hits==0 if p==0 else abs(hits-p)<.08

@pytest.mark.parametrize('bad', [torch.full((3,8,8), 2.), torch.full((3,8,8), -.5), torch.full((3,8,8), float('nan'))])
def test_normalised_pictures_are_refused(bad):
    for aug in (color_jitter, random_resized_crop, random_shift):
        with pytest.raises(ValueError, match='augment before normalising'): aug(bad, gen(0), p=1)

# --- tools

@pytest.mark.parametrize('log', [False,True])
@pytest.mark.parametrize('size,area,aspect', [((256,128),(.02,.4),(.3,3.33)), ((200,300),(.1,.2),(.5,2)), ((384,128),(.01,.5),(.1,10.))])
def test_rectangles(size, area, aspect, log):
    "Inside the picture, area and aspect in their ranges up to rounding, anywhere"
    rng,(H,W),edges = gen(0),size,[]
    for _ in range(1500):
        r,c = random_rect(size, rng, area, aspect, log)
        h,w = r.stop-r.start,c.stop-c.start
        assert 0<=r.start<r.stop<=H and 0<=c.start<c.stop<=W and h<H and w<W
        assert (h-.5)*(w-.5)<=area[1]*H*W and (h+.5)*(w+.5)>=area[0]*H*W
        assert (h-.5)/(w+.5)<=aspect[1] and (h+.5)/(w-.5)>=aspect[0]
        edges.append((r.start/H, c.start/W, 1-r.stop/H, 1-c.stop/W))
    assert np.min(edges, 0).max()<.02 and np.ptp(np.mean(edges, 0)[[0,2]])<.03 and np.ptp(np.mean(edges, 0)[[1,3]])<.03

def test_rectangle_distribution():
    "Where everything fits, area is uniform, and the aspect or its logarithm"
    r = [[random_rect((2000,2000), rng, (.01,.05), (.25,4), log) for _ in range(3000)] for log,rng in ((False,gen(0)),(True,gen(1)))]
    h,w = np.array([[(a.stop-a.start,b.stop-b.start) for a,b in o] for o in r], float).transpose(2,0,1)
    share,aspect = h*w/4e6,h/w
    assert np.allclose(share.mean(1), .03, atol=.001) and np.allclose(share.std(1), .04/12**.5, atol=.0005)
    assert abs(aspect[0].mean()-2.125)<.06 and abs(np.log(aspect[1]).mean())<.05 and abs((aspect[1]<1).mean()-.5)<.03

@pytest.mark.parametrize('kw', [dict(area=(0,.1)), dict(area=(.3,.1)), dict(area=(.1,1.1)), dict(aspect=(0,1)), dict(aspect=(2,1))])
def test_rectangle_refuses(kw):
    with pytest.raises(ValueError, match='expected ranges'): random_rect((64,32), gen(0), **kw)

def test_rectangle_that_never_fits():
    rect = random_rect((64,32), gen(0), (.9,1), (8,9))
    x = picture((64,32))
    assert x[(..., *rect)].numel()==0 and torch.equal(paste(x, rect, (1,0,0)), x)
    for aug in (partial(random_erase, fill='random'), grey_patch, random_resized_crop, partial(occlude, images=obstacles)):
        for o in (x, x/255): assert torch.equal(aug(o, gen(0), p=1, area=(.9,1), aspect=(8,9)), o)

def test_as_dtype_round_trip():
    x = torch.arange(256, dtype=u8).view(1,16,16).expand(3,-1,-1)
    for o in (torch.float16, f32, torch.float64): assert torch.equal(as_dtype(as_dtype(x, o), u8), x) and as_dtype(x, o).dtype==o
    assert as_dtype(x, u8) is x

def test_show_draws():
    import matplotlib.pyplot as plt
    state = np.random.get_state()[1].copy()
    for x in (picture(), picture()/255): assert show_draws(x, dict(a=affine, b=cutout), n=3) is None
    assert len(plt.gcf().axes)==8 and (np.random.get_state()[1]==state).all()
    plt.close('all')

# --- against torchvision

@pytest.mark.parametrize('dtype', [u8, f32])
def test_affine_is_torchvisions(dtype):
    x = as_dtype(picture(), dtype)
    for i in range(20):
        rng = gen(i)
        rng.random()
        angle,scale,shear = rng.uniform(-10, 10),rng.uniform(.9, 1.1),rng.uniform(-.1, .1)
        assert torch.equal(affine(x, gen(i)), F.affine(x, angle, [0,0], scale, [shear,0.], InterpolationMode.NEAREST))

def test_crop_is_torchvisions():
    x = picture(smooth=True)
    for i in range(20):
        rng = gen(i)
        rng.random()
        r,c = random_rect((128,64), rng, (.16,1), (1.5,8/3), log=True)
        want = F.resized_crop(x, r.start, c.start, r.stop-r.start, c.stop-c.start, [128,64], InterpolationMode.BICUBIC, antialias=True) if r.stop else x
        assert torch.equal(random_resized_crop(x, gen(i)), want)

def test_crop_never_stretches():
    "A picture of two ramps tells from which rows and columns each pixel comes"
    ramps = torch.stack([torch.linspace(0,1,256)[:,None].expand(-1,128), torch.linspace(0,1,128).expand(256,-1), torch.zeros(256,128)])
    for i in range(60):
        y = random_resized_crop(ramps, gen(i))
        h,w = (y[0,-3]-y[0,2]).mean()/(250/255),(y[1,:,-3]-y[1,:,2]).mean()/(122/127)
        assert .15<h*w<1.05 and .72<h/w<1.39

@pytest.mark.parametrize('d', [-.5,-.21,0.,.1,.5])
def test_hue_is_torchvisions(d):
    for x in (picture()/255, picture(smooth=True)/255, torch.zeros(3,4,4), torch.ones(3,4,4), torch.eye(3).view(3,3,1)):
        assert (shift_hue(x, d)-F.adjust_hue(x, d)).abs().max()<1e-5

def test_hue_keeps_lightest_and_darkest():
    x = picture()/255
    for d in np.linspace(-.5, .5, 7):
        y = shift_hue(x, d)
        assert torch.allclose(y.amax(0), x.amax(0), atol=1e-6) and torch.allclose(y.amin(0), x.amin(0), atol=1e-6)
    assert torch.allclose(shift_hue(shift_hue(x, .2), -.2), x, atol=1e-5)

@pytest.mark.parametrize('strengths', [(.15,.15,.1,.1), (.4,.3,.8,.5), (.15,.1,0,0)])
def test_jitter_is_torchvisions(strengths):
    "The same steps in the same order in floats; in bytes torchvision cuts off a fraction at each of them"
    fs,mids = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue),(1,1,1,0)
    for i in range(20):
        x,rng = picture(seed=i),gen(i)
        rng.random()
        steps = [(fs[o], rng.uniform(mids[o]-strengths[o], mids[o]+strengths[o]), strengths[o]) for o in rng.permutation(4)]
        want,want8 = x/255,x
        for f,v,by in steps: want,want8 = (f(want, v),f(want8, v)) if by else (want,want8)
        jitter = partial(color_jitter, p=1, **dict(zip(('brightness','contrast','saturation','hue'), strengths)))
        assert (jitter(x/255, gen(i))-want).abs().max()<2e-5
        assert (jitter(x, gen(i)).float()-want*255).abs().max()<=.51
        if max(strengths)<.2: assert (jitter(x, gen(i)).int()-want8.int()).float().mean().abs()<2.5

def test_jitter_ranges():
    "On a grey picture only brightness and contrast act, and the mean moves by the brightness factor"
    x = torch.full((3,8,8), .5)
    v = np.array([color_jitter(x, gen(i), p=1)[0,0,0]*2 for i in range(300)])
    assert .85<=v.min()<.86 and 1.14<v.max()<=1.15 and abs(v.mean()-1)<.015
    orders = {tuple(gen(i).permutation(4)) for i in range(400)}
    assert len(orders)==24

def test_grey_patch_keeps_the_grey_version():
    for i in range(30):
        x = picture(seed=i)
        y = grey_patch(x, gen(i), p=1)
        change = (x!=y).any(0)
        assert (F.rgb_to_grayscale(x).int()-F.rgb_to_grayscale(y).int()).abs().max()<=1
        assert (y[0]==y[2])[change].all() and change.float().mean()<=.41

# --- frame and occlusion

def test_random_shift_parts():
    "Outside the box the canvas, inside it the resized crop"
    x = picture(smooth=True)
    canvas = as_dtype(torch.tensor(fills['mean']), u8).view(3,1,1)
    for i in range(40):
        y,rng = random_shift(x, gen(i), p=1),gen(i)
        rng.random()
        crop,s = round(128*rng.uniform(.7, 1)),rng.uniform(.5, 1)
        top,h,w = rng.integers(128-crop+1),round(crop*s),round(64*s)
        a,b = rng.integers(128-h+1),rng.integers(64-w+1)
        inside = torch.zeros(128,64, dtype=torch.bool)
        inside[a:a+h,b:b+w] = True
        assert (y==canvas)[:,~inside].all()
        assert torch.equal(y[:,a:a+h,b:b+w], F.resize(x[:,top:top+crop], [h,w], InterpolationMode.BICUBIC, antialias=True))

@pytest.mark.parametrize('kw', [dict(keep=(0,1)), dict(scale=(.5,1.2)), dict(scale=(1,.5))])
def test_random_shift_refuses(kw):
    with pytest.raises(ValueError, match='expected a range'): random_shift(picture(), gen(0), **kw)

@pytest.mark.parametrize('dtype', [u8, f32])
@pytest.mark.parametrize('fill', ['mean','zero','random',(.1,.5,1.)])
def test_random_erase(fill, dtype):
    "One rectangle, the same for any fill, of the right colour; the rest untouched"
    x = as_dtype(picture(), dtype)
    for i in range(30):
        rng = gen(i)
        rng.random()
        rect = random_rect((128,64), rng, **tv)
        y = random_erase(x, gen(i), p=1, fill=fill, **tv)
        assert torch.equal(paste(y, rect, (0,0,0)), paste(x, rect, (0,0,0)))
        hole = as_dtype(y[(..., *rect)], u8)
        if fill=='random': assert hole.numel()<100 or (hole[0]!=hole[1]).any() and abs(hole.float().mean()-127.5)<20 and len(hole.unique())>50
        else: assert (hole==as_dtype(torch.tensor(fills.get(fill, fill), dtype=f32), u8).view(3,1,1)).all()

def erased(x, rng):
    "The erasing of version 0.0.1, with its defaults"
    if rng.random()>=.5: return x
    H,W = x.shape[-2:]
    for _ in range(100):
        a,r = rng.uniform(.02,.4)*H*W,rng.uniform(.3,3.33)
        h,w = round((a*r)**.5),round((a/r)**.5)
        if not (0<h<H and 0<w<W): continue
        i,j = int(rng.integers(H-h+1)),int(rng.integers(W-w+1))
        x = x.clone()
        v = torch.tensor((0.485,0.456,0.406)).view(3,1,1)
        x[...,i:i+h,j:j+w] = v if x.is_floating_point() else (v*255).round().to(x.dtype)
        return x
    return x

@pytest.mark.parametrize('dtype', [u8, f32, torch.float64, torch.float16])
def test_erase_as_before(dtype):
    "The defaults cover what they covered in version 0.0.1, bit for bit, and leave the generator in the same state"
    for i in range(200):
        x,a,b = as_dtype(picture(sizes[i%5], seed=i), dtype),gen(i),gen(i)
        assert torch.equal(random_erase(x, a), erased(x, b)) and a.random()==b.random()

@pytest.mark.parametrize('fill,msg', [('grey','expected .*mean.*zero.*random'), ((124,116,104),'colours as fractions')])
def test_random_erase_refuses(fill, msg):
    with pytest.raises(ValueError, match=msg): random_erase(picture(), gen(0), p=1, fill=fill)

def test_cutout():
    "The square of side 32 meets every pixel, is cut by the border, and never covers less than a quarter of itself"
    x,seen,areas = torch.ones(3,128,64),torch.zeros(128,64),[]
    for i in range(1500):
        hole = cutout(x, gen(i), value=(0,0,0))[0]==0
        r,c = hole.any(1).nonzero(),hole.any(0).nonzero()
        assert hole.sum()==(r[-1]-r[0]+1)*(c[-1]-c[0]+1)
        seen += hole
        areas.append(int(hole.sum()))
    assert max(areas)==32*32 and min(areas)>=16*16 and seen.min()>0
    assert abs(np.mean(areas)/1024-(1-32/4/128)*(1-32/4/64))<.02

def test_occlude_takes_from_the_pictures(tmp_path):
    "All pixels that change come from one of the pictures, given in any form"
    flat = [torch.full((3,9,7), v, dtype=u8) for v in (10,90,200)]
    files = [tmp_path/f'{i}.png' for i in range(3)]
    for f,o in zip(files, flat): Image.fromarray(o.permute(1,2,0).numpy()).save(f)
    x,seen = torch.zeros(3,64,32, dtype=u8),set()
    for i in range(40):
        y = occlude(x, gen(i), p=1, images=flat)
        seen |= set(y[y>0].tolist())
        assert len(y[y>0].unique())==1 and .09<(y>0)[0].float().mean()<.41
        for o in ([str(f) for f in files], [Image.open(f) for f in files]): assert torch.equal(occlude(x, gen(i), p=1, images=o), y)
    assert seen=={10,90,200}
    with pytest.raises(ValueError, match='no images'): occlude(x, gen(0))

def test_occlude_reads_a_table(data):
    x = picture((64,32))
    aug = partial(occlude, images=TableImages(data.train), p=1)
    by_path = partial(occlude, images=data.train.path.tolist(), p=1)
    for i in range(5): assert torch.equal(aug(x, gen(i)), by_path(x, gen(i)))
    assert torch.equal(pickle.loads(pickle.dumps(aug))(x, gen(0)), aug(x, gen(0)))

# --- random patch

def patched(data, n, **kw):
    return reid_dls(data, (64,32), p=3, k=4, augs=weak_augs, batch_tfms=[RandomPatch(**{**dict(warmup=6), **kw})], num_workers=n, seed=5)

@pytest.mark.parametrize('n', [1,2])
def test_random_patch_with_any_number_of_workers(data, n):
    a,b = patched(data, 0),patched(data, n)
    for _ in range(2):
        for x,y in zip(a.train, b.train): assert all(torch.equal(u, v) for u,v in zip(x, y))

def test_random_patch_only_in_training(data):
    dls,plain = (reid_dls(data, (64,32), p=3, k=4, augs=weak_augs, batch_tfms=o, num_workers=0, seed=5) for o in ([RandomPatch(p=1, warmup=1)], None))
    a,b = (o.train.one_batch()[0] for o in (dls,plain))
    assert a.dtype==f32 and a[a!=b].mean()>.1
    for a,b in zip(dls.valid, plain.valid): assert torch.equal(a[0], b[0])
    for a,b in zip(dls.train.new(shuffle=False), plain.train.new(shuffle=False)): assert torch.equal(a[0], b[0])
    assert not torch.equal(dls.train.new().one_batch()[0], plain.train.new().one_batch()[0])
    x = TensorImage(torch.rand(4,3,64,32))
    assert RandomPatch(p=1, warmup=1)(x, split_idx=1) is x

def test_random_patch_warmup_and_probability():
    x = TensorImage(torch.rand(400,3,32,16))
    for p in (0,.5,1):
        t = RandomPatch(p=p, warmup=100)
        y = t(x, split_idx=0)
        moved = (x!=y).flatten(1).any(1)
        assert not moved[:99].any() and abs(moved[99:].float().mean()-p)<.1 and len(t.pool)==400 and moved[99]==(p==1)

def test_random_patch_pastes_earlier_pictures():
    "Pictures of one value each: whatever appears in one stood in it or in an earlier one"
    v = torch.arange(200)/255
    x = TensorImage(v.view(-1,1,1,1).expand(-1,3,40,20).clone())
    keep,t = x.clone(),RandomPatch(p=1, warmup=10, seed=1)
    y = t(x, split_idx=0)
    assert torch.equal(x, keep)
    shares = []
    for i,o in enumerate(y):
        other = (o-v[i]).abs().amax(0)>1e-6
        shares.append(other.float().mean().item())
        assert len(o[:,other].unique())<=1 and (o[:,other]<v[i]).all()
        if other.any(): assert other.sum()==other.any(0).sum()*other.any(1).sum()
    assert max(shares)<=.55 and .1<np.mean(shares[10:])<.35

def test_random_patch_of_bytes():
    x = torch.stack([picture((64,32), i) for i in range(60)])
    a,b = (RandomPatch(warmup=5)(TensorImage(o), split_idx=0) for o in (x, x/255))
    assert a.dtype==u8 and torch.equal(as_dtype(torch.Tensor(b), u8), torch.Tensor(a).to(u8)) and not torch.equal(torch.Tensor(a).to(u8), x)
    with pytest.raises(ValueError, match='augment before normalising'): RandomPatch()(TensorImage(x/255-.5), split_idx=0)

def test_random_patch_flips():
    ramp = TensorImage(torch.linspace(0,1,16).expand(300,3,32,16).clone())
    y = RandomPatch(p=1, warmup=1, area=(.2,.4), aspect=(.5,2))(ramp, split_idx=0)
    falling = ((y[...,1:]-y[...,:-1])<-1e-3).flatten(1).sum(1)>10
    always = RandomPatch(p=1, warmup=1, flip=0, area=(.2,.4), aspect=(.5,2))(ramp, split_idx=0)
    assert .4<falling.float().mean()<.95 and ((always[...,1:]-always[...,:-1])<0).flatten(1).sum(1).float().mean()<(falling.float().mean()*32)

def test_random_patch_memory():
    "The pool holds bytes of its own, no views of batches, and no more than its capacity"
    t = RandomPatch(capacity=30, warmup=10)
    for i in range(3): t(TensorImage(torch.rand(20,3,64,32)), split_idx=0)
    assert len(t.pool)==30
    assert all(o.dtype==u8 and o.untyped_storage().nbytes()==o.numel()<=.55*3*64*32 for o in t.pool)
    copy = pickle.loads(pickle.dumps(t))
    assert len(copy.pool)==0 and copy.pool.maxlen==30 and len(t.pool)==30
    assert len(pickle.dumps(t))<5000

def test_random_patch_other_sizes_and_types():
    "Patches of larger pictures are cut to fit; half precision stays what it is"
    t = RandomPatch(p=1, warmup=1)
    t(TensorImage(torch.rand(20,3,64,64)), split_idx=0)
    for size,dtype in (((8,8),f32), ((32,16),torch.float16), ((128,64),f32)):
        y = t(TensorImage(torch.rand(20,3,*size).to(dtype)), split_idx=0)
        assert y.shape==(20,3,*size) and y.dtype==dtype and isinstance(y, TensorImage) and 0<=y.min() and y.max()<=1

@pytest.mark.parametrize('kw', [dict(warmup=0), dict(capacity=5), dict(capacity=0, warmup=0)])
def test_random_patch_refuses(kw):
    with pytest.raises(ValueError, match='expected 1 or more'): RandomPatch(**kw)

def test_export_does_not_carry_the_pool(data):
    dls = patched(data, 0)
    list(dls.train)
    pool = lambda o: [t.pool for t in o.train.after_batch.fs if isinstance(t, RandomPatch)][0]
    assert len(pool(dls))>0 and len(pool(pickle.loads(pickle.dumps(dls.new_empty()))))==0

# --- recipes

@pytest.mark.parametrize('name', ['weak','bagtricks','sbs','strong'])
def test_recipes(name):
    recipe = aug_recipes[name]
    assert isinstance(recipe, list) and aug_recipes['bagtricks'] is bagtricks_augs
    copy = pickle.loads(pickle.dumps(recipe))
    for dtype in (u8, f32):
        x = as_dtype(picture(smooth=True), dtype)
        keep = x.clone()
        for i in range(15):
            y = apply(recipe, x, gen(i))
            assert y.shape==x.shape and y.dtype==dtype and torch.equal(apply(copy, x, gen(i)), y)
        assert torch.equal(x, keep)

def test_recipes_are_the_published_ones():
    "Order and settings: reid-strong-baseline, fast-reid's Base-SBS and its NAIC20 project"
    def named(recipe): return [(getattr(f, 'func', f).__name__, getattr(f, 'keywords', {})) for f in recipe]
    assert named(weak_augs)==[('hflip',{}), ('pad_crop',{})]
    assert named(sbs_augs)==[('autoaugment',dict(p=.1)), ('pad_crop',dict(pad=10/384)), ('hflip',{}), ('random_erase',tv)]
    assert named(strong_augs)[1:]==[('pad_crop',{}), ('hflip',{}), ('color_jitter',dict(brightness=.15, contrast=.1, saturation=0, hue=0)), ('affine',{}),
        ('augmix',dict(p=.5)), ('random_erase',{**tv, 'fill':'zero'})]

@pytest.mark.parametrize('n', [1,2])
def test_strong_with_any_number_of_workers(data, n):
    a,b = (reid_dls(data, (64,32), p=3, k=2, augs=strong_augs, batch_tfms=[RandomPatch(warmup=6)], num_workers=o, seed=3) for o in (0,n))
    for x,y in zip(a.train, b.train): assert all(torch.equal(u, v) for u,v in zip(x, y))

@pytest.mark.parametrize('path', golden_params('data/train_transform_statistics*.json', slow='train'))
def test_golden_sbs_statistics(path):
    "4000 draws of the reference's strong-baseline pipeline on a flat picture, against half as many of ours"
    if path is None: missing('data/train_transform_statistics*.json')
    want,x,n = json.loads(path.read_text()),torch.full((3,384,128), 200, dtype=u8),2000
    mean = as_dtype(torch.tensor(fills['mean']), u8).view(3,1,1)
    ys = [apply(sbs_augs, x, gen(i)) for i in range(n)]
    erased = np.array([(y==mean).all(0).float().mean() for y in ys])
    black = np.array([(y==0).all(0).float().mean() for y in ys])
    some,area = erased[erased>0],want['erased_area_when_erased']
    assert abs((erased>0).mean()-want['erased_probability'])<.03
    assert abs(some.mean()-area['mean'])<.007
    assert abs(some.min()-area['min'])<.002 and abs(some.max()-area['max'])<.004
    assert abs(black.mean()-want['zero_padding_fraction_mean'])<.002
