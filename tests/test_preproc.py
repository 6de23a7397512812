"Reading and resizing pictures"
import itertools, pickle
from io import BytesIO
from zipfile import ZipFile
import numpy as np, pandas as pd, pytest, torch
from golden_files import golden_params, missing
from PIL import Image, ImageFile
from fastreid_nb.data.images import TableImages, open_image, read_image
from fastreid_nb.data.preproc import Preproc

def noise(rng, h, w, grain=1):
    "A picture of smooth noise, or of the roughest there is"
    return Image.fromarray(rng.integers(0, 256, (-(-h//grain),-(-w//grain),3), dtype=np.uint8)).resize((w,h), Image.BICUBIC)

def encoded(im, kind='jpeg', **kwargs):
    im.save(buf := BytesIO(), kind, **kwargs)
    return buf.getvalue()

def hwc(px): return px.permute(1,2,0).numpy()

## The same as the reference and as Pillow

@pytest.mark.parametrize('path', golden_params('data/*transform*.npz'))
def test_golden(path):
    "Within one grey level of the reference's test pipeline, and grey pictures get three equal channels"
    if path is None: missing('test transform')
    z = np.load(path)
    names = [k.removesuffix('_hwc_uint8') for k in z.files if k.endswith('_hwc_uint8')]
    assert names or 'grey_in' in z.files
    for k in names:
        got = Preproc(z[f'{k}_target_hw'].tolist()).load(z[f'{k}_hwc_uint8'])
        assert np.abs(got.numpy().astype(int)-z[f'{k}_out_chw']).max()<=1
    if 'grey_in' in z.files: assert (hwc(read_image(z['grey_in']))==z['grey_read']).all()

@pytest.mark.parametrize('seed', range(40))
@pytest.mark.parametrize('resample', ['bilinear','bicubic'])
def test_resize_is_pillow(seed, resample):
    "Within one level of Pillow for any sizes; training's faster way on smooth pictures as well"
    rng = np.random.default_rng(seed)
    (h,w),size = rng.integers(1, 700, 2).tolist(),tuple(rng.integers(1, 300, 2).tolist())
    im,f = noise(rng, h, w, 1 if seed%2 else 8),getattr(Image, resample.upper())
    want = np.asarray(im.resize(size[::-1], f)).astype(int)
    assert np.abs(hwc(Preproc(size, resample).load(im))-want).max()<=1
    assert np.abs(hwc(Preproc(size, resample).load(im, exact=False))-want).mean()<1

@pytest.mark.parametrize('resample', ['nearest','lanczos'])
@pytest.mark.parametrize('exact', [True,False])
def test_other_filters_are_pillows(resample, exact):
    im = noise(np.random.default_rng(0), 77, 41)
    want = np.asarray(im.resize((32,64), getattr(Image, resample.upper())))
    assert (hwc(Preproc((64,32), resample).load(im, exact))==want).all()

def test_right_size_is_left_alone():
    im = noise(np.random.default_rng(0), 77, 41)
    for resample in ('nearest','bilinear','bicubic','lanczos'): assert (hwc(Preproc((77,41), resample).load(im))==np.asarray(im)).all()

def variants():
    "Name and bytes of pictures of all kinds"
    rng = np.random.default_rng(0)
    for (h,w),grain in itertools.product([(256,128),(61,33),(7,5),(1,1),(3,17)], (1,8)):
        im = noise(rng, h, w, grain)
        for sub,q,prog in itertools.product((0,1,2), (5,90), (False,True)): yield f'sampling {sub}',encoded(im, subsampling=sub, quality=q, progressive=prog)
        yield 'grey',encoded(im.convert('L'))
        yield 'CMYK',encoded(im.convert('CMYK'))
        yield 'RGB',encoded(im, keep_rgb=True)
        yield 'restarts',encoded(im, restart_marker_blocks=1)
        yield 'notes',encoded(im, dpi=(300,300), comment='note', icc_profile=b'0'*300)
        yield 'junk behind',encoded(im)+b'abc'*50
        xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
        yield 'turned by XMP',encoded(im, xmp=xmp)
        for o in range(10):
            exif = im.getexif()
            exif[274] = o
            yield f'turned {o}',encoded(im, exif=exif)
            yield f'grey turned {o}',encoded(im.convert('L'), exif=exif)
        for mode in ('1','L','P','LA','RGBA','RGB','I;16'): yield f'PNG {mode}',encoded(im.convert('L').convert(mode) if mode=='I;16' else im.convert(mode), 'png')

def test_decoding_is_pillows(monkeypatch):
    "Every kind of file gives exactly the pixels that Pillow reads, upright"
    monkeypatch.setattr(ImageFile, 'MAXBLOCK', 2**20)   # Pillow writes rough progressive pictures only into a large buffer
    for name,b in variants(): assert (hwc(read_image(b))==np.asarray(open_image(b))).all(), name

def test_ordinary_jpeg_does_not_need_pillow(monkeypatch):
    "The fast way is taken, and gives way to Pillow where torchvision has no decoder"
    b = encoded(noise(np.random.default_rng(0), 64, 32, 8))
    want = np.asarray(open_image(b))
    with monkeypatch.context() as m:
        m.setattr('fastreid_nb.data.images.open_image', lambda *_: pytest.fail('Pillow was asked'))
        assert (hwc(read_image(b))==want).all()
    def gone(*_): raise AttributeError('decode_jpeg')
    monkeypatch.setattr(torch.ops.image, 'decode_jpeg', gone)
    assert (hwc(read_image(b))==want).all()

@pytest.mark.parametrize('share', [0,.01,.1,.3,.6,.9,.99])
@pytest.mark.parametrize('progressive', [True,False])
def test_cut_files_are_named(tmp_path, share, progressive):
    b = encoded(noise(np.random.default_rng(0), 256, 128, 2), quality=90, progressive=progressive)
    f = tmp_path/'cut short.jpg'
    f.write_bytes(b[:int(len(b)*share)])
    for read in (lambda: read_image(f), lambda: Preproc((8,4)).load(str(f)), lambda: TableImages(pd.DataFrame(dict(path=[str(f)])))[0]):
        with pytest.raises(ValueError, match='cut short.jpg'): read()

def test_missing_files_are_named(tmp_path):
    for f in (tmp_path/'gone.jpg', tmp_path/'no.zip'/'gone.jpg'):
        with pytest.raises(FileNotFoundError, match='gone.jpg'): read_image(f)
    with pytest.raises(ValueError, match='cannot read'): read_image(tmp_path)

## Rows of a table

def test_rows_are_what_pillow_cuts(tmp_path):
    "Files, members of archives, bytes, pictures and arrays, whole and in boxes of all positions"
    im = noise(np.random.default_rng(0), 40, 30, 4)
    b = encoded(im)
    (tmp_path/'ü 1.jpg').write_bytes(b)
    with ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr('in ner/1.jpg', b)
    boxes = [(None,)*4, (0,0,30,40), (5,6,7,8), (-3,-4,10,12), (25,30,50,60), (29.4,39,1,1)]
    source = [(tmp_path/'ü 1.jpg',None), (tmp_path/'a.zip/in ner/1.jpg',None), ('bytes',b), ('picture',im), ('array',np.asarray(im))]
    df = pd.DataFrame([dict(path=str(p), image=i, x=x, y=y, w=w, h=h) for (p,i),(x,y,w,h) in itertools.product(source, boxes)])
    ims = TableImages(df)
    for i in range(len(df)):
        source = ims.source(i)
        pil = Image.fromarray(source) if isinstance(source, np.ndarray) else open_image(source)
        if box := ims.box(i): pil = pil.crop((max(box[0],0), max(box[1],0), min(box[2],pil.width), min(box[3],pil.height)))
        assert (hwc(ims[i])==np.asarray(pil)).all(), df.loc[i]
    out = TableImages(df.assign(x=300, y=0, w=5, h=5))
    for i in range(len(df)):
        with pytest.raises(ValueError, match='lies outside'): out[i]

## The object

def test_survives_a_checkpoint():
    pre = Preproc((9,8), 'bilinear', (0,0,0), (1,1,1))
    assert Preproc.from_dict(pre.to_dict())==pre==pickle.loads(pickle.dumps(pre))

@pytest.mark.parametrize('kwargs', [dict(size=(0,4)), dict(size=(4,)), dict(resample='cubic')])
def test_refuses_options(kwargs):
    with pytest.raises(ValueError, match='expected'): Preproc(**kwargs)

@pytest.mark.parametrize('bad', [np.zeros((4,4,4)), np.zeros((2,3,4,3)), torch.zeros(4,4,3), np.full((4,4,3), 2.), np.full((4,4,3), -.1), 7,
    np.zeros((4,4), dtype=np.int64), np.full((4,4,3), np.nan), torch.zeros(2,4,4, dtype=torch.uint8)])
def test_refuses_pictures(bad):
    with pytest.raises(ValueError, match='expected'): Preproc((8,4)).load(bad)

@pytest.mark.parametrize('dtype', [torch.uint8,torch.float16,torch.float32,torch.float64])
def test_tensors(dtype):
    "A tensor in any type holds the same picture; one channel becomes three; what is given stays as it is"
    px = torch.randint(0, 256, (3,20,10), dtype=torch.uint8)
    x = px if dtype==torch.uint8 else px.to(torch.float64).div(255).to(dtype)
    keep = x.clone()
    for size in ((20,10),(8,4)):
        assert (Preproc(size).load(x).int()-Preproc(size).load(px).int()).abs().max()<=1
        assert Preproc(size).load(x[:1]).equal(Preproc(size).load(x[:1].expand(3,-1,-1)))
    assert x.equal(keep)
