"AutoAugment, RandAugment, TrivialAugment and AugMix: operations against Pillow, tables against torchvision, draws against chance"
import math, pickle, random
from functools import partial
from itertools import product
import numpy as np, pytest, torch
from fastai.torch_core import TensorImage
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf
from fastreid_nb.augment import policies
from fastreid_nb.augment.core import bagtricks_augs
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.augment.policies import OpSpace, OpRange, augmix, autoaugment, on_bytes, ops, rand_augment, trivial_augment, warp
from fastreid_nb.augment.policies import augmix_space, fastreid_space, imagenet_policy, rand_space, torchvision_space, trivial_space
from fastreid_nb.data.toy import toy_reid
from slow import slow_but

sizes = [(64,32),(33,17),(12,40),(5,7),(1,1)]
paper_mix = dict(depth=(1,3), severity=3, alpha=1)
augs = {'autoaugment':autoaugment, 'torchvision':partial(autoaugment, space=torchvision_space), 'rand':rand_augment, 'rand strong':partial(rand_augment, n=4, m=30),
    'trivial':trivial_augment, 'augmix':augmix, 'augmix paper':partial(augmix, **paper_mix)}
each_aug = pytest.mark.parametrize('aug', augs.values(), ids=augs)

def noise(h, w, seed=0): return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3,h,w), dtype=np.uint8))

def smooth(h, w, seed=0):
    "Blobs of colour, enlarged as a photograph might be"
    small = np.random.default_rng(seed).integers(0, 256, (max(h//8,2),max(w//8,2),3), dtype=np.uint8)
    return tensor(Image.fromarray(small).resize((w,h), Image.BICUBIC))

def pictures(h, w):
    "Noise, a smooth picture, a dark one with few values, a constant one"
    return [noise(h, w), smooth(h, w), noise(h, w)//32+20, torch.full((3,h,w), 77, dtype=torch.uint8)]

def tensor(im): return torch.from_numpy(np.array(im)).permute(2,0,1).contiguous()
def pil(x): return Image.fromarray(x.permute(1,2,0).contiguous().numpy())
def gap(a, b): return (a.int()-b.int()).abs()
def rng(seed=0): return np.random.default_rng(seed)

## What every policy promises

@each_aug
@pytest.mark.parametrize('size', sizes)
@pytest.mark.parametrize('dtype', slow_but([torch.uint8, torch.float32, torch.float64, torch.float16], torch.uint8, torch.float32))
def test_shape_dtype_input_and_seed(aug, size, dtype):
    "Shape and dtype stay, the input is not touched, one seed gives one picture"
    for k,x in enumerate(pictures(*size)):
        x = x if dtype==torch.uint8 else (x/255).to(dtype)
        keep = x.clone()
        for i in range(3*k, 3*k+3):
            y = aug(x, rng(i), p=1)
            assert y.shape==x.shape and y.dtype==dtype and torch.equal(aug(x, rng(i), p=1), y)
            if dtype!=torch.uint8: assert y.min()>=0 and y.max()<=1
        assert torch.equal(x, keep)

@each_aug
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_floats_mean_the_same(aug, dtype):
    x = smooth(32, 16)
    for i in range(40): assert torch.equal((aug((x/255).to(dtype), rng(i), p=1).double()*255).round(), aug(x, rng(i), p=1).double())

@each_aug
def test_not_drawn_is_untouched(aug):
    "With p=0 the very picture comes back, also a float one that is no multiple of 1/255"
    for x in (noise(16,8), torch.rand(3,16,8, generator=torch.Generator().manual_seed(0))): assert all(aug(x, rng(i), p=0) is x for i in range(20))

@pytest.mark.parametrize('aug', [pytest.param(v, id=k, marks=[pytest.mark.slow] if k=='augmix paper' else []) for k,v in augs.items()])
def test_share_of_pictures(aug):
    "Among the pictures that `p=1` changes, a share `p` is changed"
    x = noise(8,4)
    hits = [np.mean([not torch.equal(aug(x, rng(i), p=p), x) for i in range(800)]) for p in (1,.3)]
    assert abs(hits[1]-.3*hits[0])<.05 and hits[0]>.4

@each_aug
def test_no_other_source_of_chance(aug):
    "The global generators of Python, numpy and torch are neither read nor moved"
    x,outs = smooth(32,16),[]
    for seed in (0,1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(),np.random.get_state(),torch.get_rng_state()
        outs.append([aug(x, rng(i), p=1) for i in range(30)])
        after = random.getstate(),np.random.get_state(),torch.get_rng_state()
        assert before[0]==after[0] and all(np.array_equal(a, b) for a,b in zip(before[1], after[1])) and torch.equal(before[2], after[2])
    assert all(map(torch.equal, *outs))

@each_aug
def test_keeps_views_and_subclasses(aug):
    "A picture that is a view of another, and fastai's image type"
    x = noise(32,32)
    for i in range(10):
        want = aug(x[:,4:20,::2].clone(), rng(i), p=1)
        for o in (x[:,4:20,::2], TensorImage(x[:,4:20,::2])): assert torch.equal(aug(o, rng(i), p=1).as_subclass(torch.Tensor), want)

@each_aug
def test_pickles(aug):
    "Worker processes that are not forked get a pickled list of augmentations"
    assert torch.equal(pickle.loads(pickle.dumps(partial(aug, p=1)))(noise(16,8), rng(3)), aug(noise(16,8), rng(3), p=1))

def test_same_with_any_number_of_workers(tmp_path):
    data = toy_reid(tmp_path, n_ids=8, size=(64,32), progress=False)
    augs = [partial(autoaugment, p=.5), augmix, *bagtricks_augs]
    a,b = (reid_dls(data, (64,32), p=3, k=2, num_workers=o, seed=3, augs=augs) for o in (0,2))
    assert all(torch.equal(x[0], y[0]) for x,y in zip(a.train, b.train))

bad = [(torch.zeros(16,8,3), r'expected \(3,H,W\)'), (torch.zeros(2,3,16,8), r'expected \(3,H,W\)'), (torch.zeros(3,8,8, dtype=torch.int64), 'expected uint8'),
    (torch.full((3,8,8), 1.5), 'before normalising'), (torch.full((3,8,8), -.1), 'before normalising'), (torch.full((3,8,8), math.nan), 'before normalising')]

@each_aug
@pytest.mark.parametrize('x,msg', bad)
def test_refuses_other_pictures(aug, x, msg):
    with pytest.raises(ValueError, match=msg): aug(x, rng())

@pytest.mark.parametrize('f,msg', [
    (partial(rand_augment, n=-1), 'n=-1'), (partial(rand_augment, m=31), 'level 31: expected 0 to 30'), (partial(rand_augment, m=-1), 'expected 0 to 30'),
    (partial(augmix, severity=11), 'severity=11: .* 0.1 to 10'), (partial(augmix, severity=0), 'severity=0'), (partial(augmix, width=0), 'width=0'),
    (partial(autoaugment, p=1, policy=[[('Blur',1,1)]]), "operation 'Blur': expected one of"),
    (partial(autoaugment, p=1, policy=[[('Rotate',1,10.5)]]), 'level 10.5: expected 0 to 10')])
def test_refuses_settings(f, msg):
    with pytest.raises(ValueError, match=msg): f(noise(8,8), rng())

## Operations

def enhance(kind): return lambda im, m: getattr(ImageEnhance, kind)(im).enhance(m)
def affine(*rows): return lambda im, m: im.transform(im.size, Image.AFFINE, [m if o=='m' else -m if o=='-m' else o for o in rows], Image.BILINEAR, fillcolor=(128,)*3)

factors = [0,.1,.28,.5,1,1.36,1.72,1.9]
as_pil = dict( # operation: Pillow's, magnitudes, levels it may be off
    Identity=(lambda im, m: im, [0], 0), AutoContrast=(lambda im, m: ImageOps.autocontrast(im), [0], 1), Equalize=(lambda im, m: ImageOps.equalize(im), [0], 0),
    Invert=(lambda im, m: ImageOps.invert(im), [0], 0), Posterize=(ImageOps.posterize, range(1,9), 0),
    Solarize=(ImageOps.solarize, [0,1,25,128,230,255,256], 0),
    Color=(enhance('Color'), factors, 2), Contrast=(enhance('Contrast'), factors, 2), Brightness=(enhance('Brightness'), factors, 1),
    Sharpness=(enhance('Sharpness'), factors, 1), Rotate=(lambda im, m: im.rotate(m, Image.BILINEAR, fillcolor=(128,)*3), [-30,-7,0,3,27,100,135], 1),
    ShearX=(affine(1,'m',0,0,1,0), [-.3,-.07,0,.15,.93], 1), ShearY=(affine(1,0,0,'m',1,0), [-.3,-.07,0,.15,.93], 1),
    TranslateX=(affine(1,0,'-m',0,1,0), [-9,0,4,2.5], 1), TranslateY=(affine(1,0,0,0,1,'-m'), [-9,0,4,2.5], 1))

@pytest.mark.parametrize('size', [(64,32),(33,17),(12,40)])
@pytest.mark.parametrize('name', as_pil)
def test_operation_is_pillows(name, size):
    "Equal to Pillow's within 1 level, 2 for Color and Contrast, whose grey is rounded differently; but for pixels whose source lies exactly on the border, which floats may put on either side"
    f,magnitudes,most = as_pil[name]
    for x,m in product(pictures(*size), magnitudes):
        off = gap(ops[name](x, m), tensor(f(pil(x), m))).amax(0)>most
        assert off.float().mean()<=(.01 if name in policies._warps else 0), m

def test_every_operation_is_compared(): assert set(as_pil)==set(ops)

@pytest.mark.parametrize('name', as_pil)
def test_operation_on_floats_and_in_place(name):
    _,magnitudes,_ = as_pil[name]
    for x,m in product(pictures(16,12), magnitudes):
        keep = x.clone()
        assert torch.equal((ops[name](x/255, m)*255).round(), ops[name](x, m)) and torch.equal(x, keep)

def test_sharpness_by_channel():
    "Three grey pictures are sharpened as one of three channels"
    for m in factors: assert torch.equal(ops['Sharpness'](noise(33,17), m), tvf.adjust_sharpness(noise(33,17), m))

@pytest.mark.parametrize('name', [k for k in as_pil if k not in policies._warps and k!='Sharpness'])
def test_colour_operations_keep_places(name):
    "Shuffling the pixels before or after gives the same; the mean in Contrast may be summed in another order"
    perm = torch.from_numpy(rng().permutation(33*17))
    def shuffle(o): return o.flatten(1)[:,perm].view_as(o)
    for x,m in product(pictures(33,17), as_pil[name][1]):
        assert gap(ops[name](shuffle(x), m), shuffle(ops[name](x, m))).max()<=(name=='Contrast')

@pytest.mark.parametrize('seed', range(10))
def test_bilinear_warp_is_torchvisions(seed):
    "Inside, away from the border that torchvision blends with black"
    angle = rng(seed).uniform(-30, 30)
    x = noise(40,24)
    theirs = tvf.rotate(x, angle, tvf.InterpolationMode.BILINEAR, fill=[128]*3)
    inside = tvf.rotate(torch.nn.functional.pad(torch.ones(1,36,20), (2,2,2,2)), angle)[0]>0
    assert inside.sum()>300 and gap(ops['Rotate'](x, angle), theirs).amax(0)[inside].max()<=1

@pytest.mark.parametrize('angle', [-24,9,27])
def test_bicubic_warp_is_nearly_pillows(angle):
    "Another cubic filter: on smooth pictures a few levels off, and nearer to Pillow's bicubic than bilinear is"
    x = smooth(64,32)
    theirs = tensor(pil(x).rotate(angle, Image.BICUBIC, fillcolor=(128,)*3))
    cubic,linear = (gap(ops['Rotate'](x, angle, mode), theirs).float() for mode in ('bicubic','bilinear'))
    assert cubic.max()<=8 and cubic.mean()<1 and cubic.mean()<linear.mean()

def test_warp_by_hand():
    "Whole shifts, a mirror, a quarter turn, and a map that sees nothing of the picture"
    x = noise(6,6)
    for mode in ('nearest','bilinear','bicubic'):
        y = warp(x, ((1,0,2),(0,1,-1)), mode, fill=9)
        assert torch.equal(y[:,1:,:4], x[:,:5,2:]) and (y[:,0]==9).all() and (y[:,:,4:]==9).all()
        assert torch.equal(warp(x, ((-1,0,6),(0,1,0)), mode), x.flip(-1))
        assert torch.equal(ops['Rotate'](x, 90), x.rot90(1, (1,2)))
        assert (warp(x, ((1,0,50),(0,1,0)), mode)==128).all()

## Tables

@pytest.mark.parametrize('level', range(11))
def test_fastreid_table(level):
    "The formulas of fast-reid, in whole numbers where they are whole"
    got = {k:[fastreid_space.magnitude(k, level, s) for s in (1,-1)] for k in fastreid_space.ranges}
    assert got['Posterize']==[4*level//10+4]*2 and got['Solarize']==[256*level//10]*2
    assert got['Rotate']==pytest.approx([3*level,-3*level])
    for k in ('ShearX','ShearY'): assert got[k]==pytest.approx([.03*level,-.03*level])
    for k in ('Color','Contrast','Brightness','Sharpness'): assert got[k]==pytest.approx([.1+.18*level]*2)
    assert isinstance(got['Posterize'][0], int) and len(got)==12

facts = '''Posterize .4 8, Rotate .6 9; Solarize .6 5, AutoContrast .6 5; Equalize .8 8, Equalize .6 3; Posterize .6 7, Posterize .6 6
Equalize .4 7, Solarize .2 4; Equalize .4 4, Rotate .8 8; Solarize .6 3, Equalize .6 7; Posterize .8 5, Equalize 1 2; Rotate .2 3, Solarize .6 8
Equalize .6 8, Posterize .4 6; Rotate .8 8, Color .4 0; Rotate .4 9, Equalize .6 2; Equalize 0 7, Equalize .8 8; Invert .6 4, Equalize 1 8
Color .6 4, Contrast 1 8; Rotate .8 8, Color 1 2; Color .8 8, Solarize .8 7; Sharpness .4 7, Invert .6 8; ShearX .6 5, Equalize 1 9
Color .4 0, Equalize .6 3; Equalize .4 7, Solarize .2 4; Solarize .6 5, AutoContrast .6 5; Invert .6 4, Equalize 1 8; Color .6 4, Contrast 1 8
Equalize .8 8, Equalize .6 3'''

def test_imagenet_policy():
    "As fast-reid lists it, and as torchvision does, which leaves out levels that are not used"
    rows = [[o.split() for o in row.split(',')] for row in facts.replace('\n', ';').split(';')]
    assert [[(n,float(p),int(l)) for n,p,l in row] for row in rows]==[list(map(tuple, row)) for row in imagenet_policy]
    theirs = [[o[:2] for o in row] for row in v2.AutoAugment()._policies]
    assert [[o[:2] for o in row] for row in imagenet_policy]==theirs
    assert all(b[2] in (None, a[2]) for x,y in zip(imagenet_policy, v2.AutoAugment()._policies) for a,b in zip(x, y))

@pytest.mark.parametrize('size', [(256,128),(33,17)])
@pytest.mark.parametrize('space,theirs', [(torchvision_space,v2.AutoAugment), (rand_space,v2.RandAugment), (trivial_space,v2.TrivialAugmentWide)],
    ids=['auto','rand','trivial'])
def test_torchvision_tables(space, theirs, size):
    "Every operation, level and sign at torchvision's number of levels; factors count from 1, thresholds are shares of 255, and shifts are cut off to whole pixels"
    assert set(space.ranges)==set(theirs._AUGMENTATION_SPACE)
    assert space.top+1==getattr(theirs(), 'num_magnitude_bins', 10)
    for name,(f,signed) in theirs._AUGMENTATION_SPACE.items():
        want = f(space.top+1, *size)
        for level,sign in product(range(space.top+1), (1,-1)):
            got = space.magnitude(name, level, sign, size)
            if want is None: assert got==0
            else:
                m = float(want[level])*(sign if signed else 1)
                if name in ('Color','Contrast','Brightness','Sharpness'): m += 1
                if name=='Solarize': m *= 255
                if name.startswith('Translate'): m = int(round(m, 3)) # theirs counts in float32, 15.999999 for 16
                assert got==pytest.approx(m, abs=1e-4)

@pytest.mark.parametrize('s', [1,2,3,10])
@pytest.mark.parametrize('size', [(256,128),(384,128),(60,30)])
def test_augmix_table(s, size):
    "Fast-reid's formulas, for a drawn level `u` up to `s`"
    at = partial(augmix_space.magnitude, size=size)
    for u in rng(s).uniform(.1, s, 50):
        assert at('Posterize', u)==4-math.floor(4*u/10) and at('Solarize', u)==256-math.floor(256*u/10)
        assert [at('Rotate', u, i) for i in (1,-1)]==[math.floor(30*u/10),-math.floor(30*u/10)]
    for i in (1,-1):
        assert at('ShearX', s, i)==at('ShearY', s, i)==pytest.approx(.03*s*i)
        assert at('TranslateY', s, i)==i*int(size[0]/3*s/10) and at('TranslateX', s, i)==i*int(size[1]/3*s/10)
    assert len(augmix_space.ranges)==9

## Draws

@pytest.fixture
def acts(monkeypatch):
    "What is drawn: names, levels, signs and interpolations of all operations, without their work"
    log = []
    def act(x, rng, space, name, level, modes=('bilinear',)):
        log.append((name, float(level), rng.random()<.5, modes[rng.integers(len(modes))]))
        return x
    monkeypatch.setattr(policies, '_act', act)
    return log

def even(counts, n):
    "Do counts of `n` equally likely outcomes differ no more than chance allows? Chi-square below its mean plus four deviations"
    counts = np.asarray(list(counts))
    assert len(counts)==n
    want = counts.sum()/n
    return ((counts-want)**2/want).sum()<n-1+4*(2*(n-1))**.5

def tally(xs): return np.unique(list(xs), return_counts=True)[1]

def test_sub_policies_are_drawn_evenly(acts):
    r,x = rng(),noise(4,4)
    rows = [[(f'{i}',1,0),('second',.25,0)] for i in range(25)]
    for _ in range(5000): autoaugment(x, r, p=1, policy=rows)
    assert even(tally(o[0] for o in acts if o[0]!='second'), 25)
    assert abs(np.mean([o[0]=='second' for o in acts])-.2)<.02

def test_interpolations_are_drawn_evenly(monkeypatch):
    seen,r = [],rng()
    for k in policies._warps: monkeypatch.setitem(policies._warps, k, lambda x, m, mode: seen.append((m>0, mode)) or x)
    for _ in range(1000): autoaugment(noise(4,4), r, p=1, policy=[[('Rotate',1,5)]])
    assert even(tally(map(str, seen)), 4)
    seen.clear()
    for _ in range(50): rand_augment(noise(4,4), r, m=5)
    assert {o[1] for o in seen}=={'bilinear'}

def test_rand_and_trivial_draw_evenly(acts):
    r,x = rng(),noise(4,4)
    for _ in range(2000): rand_augment(x, r, n=3, m=7)
    assert len(acts)==6000 and {o[1] for o in acts}=={7} and even(tally(o[0] for o in acts), 14)
    acts.clear()
    for _ in range(5000): trivial_augment(x, r)
    assert len(acts)==5000 and even(tally(o[0] for o in acts), 14) and even(tally(o[1] for o in acts), 31)

def test_augmix_draws(acts):
    "Operations and depths evenly, levels up to the severity, shears and shifts at it"
    r,x,depths = rng(),noise(4,4),[]
    for _ in range(1500):
        n = len(acts)
        augmix(x, r, p=1, width=1, depth=(1,3), severity=3)
        depths.append(len(acts)-n)
    assert even(tally(depths), 3) and even(tally(o[0] for o in acts), 9)
    moves = [o[1] for o in acts if o[0][:5] in ('Shear','Trans')]
    drawn = [o[1] for o in acts if o[0][:5] not in ('Shear','Trans')]
    assert set(moves)=={3} and .1<=min(drawn)<.2 and 2.9<max(drawn)<=3 and even(np.histogram(drawn, 10, (.1,3))[0], 10)
    acts.clear()
    augmix(x, r, p=1)
    assert len(acts)==3 and all(o[1]<=1 for o in acts)

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('width,alpha', [(3,.1),(3,1),(5,.5),(1,1)])
def test_augmix_formula(monkeypatch, width, alpha, seed):
    "(1-m)·x + m·Σ w·chain, rounded, with the draws replayed"
    x = noise(9,5)
    chains = [noise(9,5, i+1) for i in range(width)]
    todo = iter(chains)
    monkeypatch.setattr(policies, '_act', lambda *args: next(todo))
    r = rng(seed)
    r.random()
    m,w = r.beta(alpha, alpha),r.dirichlet([alpha]*width)
    want = (1-m)*x.double() + m*sum(a*c.double() for a,c in zip(w, chains))
    assert (augmix(x, rng(seed), p=1, width=width, alpha=alpha).double()-want).abs().max()<=.501

def test_chains_apply_in_turn():
    "A chain starts at the picture and its operations follow each other: brightness doubled `depth` times"
    x = torch.full((3,4,4), 3, dtype=torch.uint8)
    twice = OpSpace(10, dict(Brightness=OpRange(2)))
    tops = {d:max(int(augmix(x, rng(i), p=1, depth=d, space=twice)[0,0,0]) for i in range(40)) for d in (0,1,3)}
    assert tops=={0:3, 1:6, 3:24}

def test_share_of_changed_pictures():
    "As the table foretells, for a picture that every operation changes"
    x = noise(24,12).clamp(10,240)
    hit = np.mean([1-(1-a[1])*(1-b[1]) for a,b in imagenet_policy])
    for p in (.1,1):
        changed = np.mean([not torch.equal(autoaugment(x, rng(i), p=p), x) for i in range(1500)])
        assert abs(changed-p*hit)<.035

@pytest.mark.parametrize('space', [fastreid_space, torchvision_space, rand_space, augmix_space], ids=['fastreid','torchvision','rand','augmix'])
def test_nothing_is_mirrored(space):
    "What stands left stays left, what stands high stays high; wide turns by up to 135° apart"
    x = torch.zeros(3,96,96, dtype=torch.uint8)
    x[0,40:44,40:44] = x[1,40:44,52:56] = x[2,52:56,40:44] = 255
    def places(y): return [(c*torch.stack(torch.meshgrid(*map(torch.arange, c.shape), indexing='ij'))).sum((1,2))/c.sum() for c in y.float()]
    for name,sign,level in product(set(space.ranges)&set(policies._warps), (1,-1), np.linspace(0, space.top, 7)):
        y = policies._warps[name](x, space.magnitude(name, level, sign, (96,96)))
        red,green,blue = places(y*(y!=128))
        assert red[1]<green[1] and red[0]<blue[0]
        (a,b),(c,d) = green-red,blue-red
        assert b*c-a*d>0

def test_on_bytes_keeps_the_signature():
    "Name and docstring stay, and a function that returns its input returns the caller's"
    assert autoaugment.__name__=='autoaugment' and 'sub-policy' in autoaugment.__doc__
    x = torch.rand(3,4,4, generator=torch.Generator().manual_seed(0))
    assert on_bytes(lambda o: o)(x) is x
    assert torch.equal(on_bytes(lambda o: o.clone())(x), (x*255).round()/255)

def test_floats_a_hair_outside():
    "Rounding errors of an earlier float augmentation are no reason to refuse"
    x = torch.tensor([-1e-6,1+1e-6]).expand(3,2,2)
    assert torch.equal(on_bytes(lambda o: 255-o)(x), torch.tensor([1.,0.]).expand(3,2,2))
