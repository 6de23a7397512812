"Copies and the doctor: what is planted is found and nothing else, pairs without a matrix, and the check before training"
import os, shutil, signal, sys, tracemalloc, zipfile
from io import BytesIO
from pathlib import Path
from dataclasses import replace
import numpy as np, pandas as pd, pytest
from PIL import Image, ImageOps
import fastreid_nb.data.subsets   # adds `resample`; chkstyle: ignore
from fastreid_nb.data import copies as room
from fastreid_nb.data.core import ReIDData
from fastreid_nb.data.own import from_df, from_folder
from fastreid_nb.data.images import open_image
from fastreid_nb.data.copies import hamming, near_other, near_pairs, perceptual_hash, scan_images, unreadable
from fastreid_nb.data.doctor import DoctorReport, Finding, severities

def drawing(seed, size=(48,96)):
    "A picture of its own: coloured blobs, smooth enough to survive compression"
    x = np.random.default_rng(seed).integers(0, 256, (8,4,3), dtype=np.uint8)
    return Image.fromarray(x).resize(size, Image.BICUBIC)

def save(path, im, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    im.save(path, **kwargs)
    return path

def make_set(root, n_ids=8, n_cams=2, n=2, n_train=4, n_query=1):
    "A healthy set: `n_train` identities to learn from, the others for the test with a query in the first camera"
    rows = []
    for p in range(n_ids):
        for c in range(n_cams):
            for k in range(n):
                f = save(root/f'{p}_{c}_{k}.jpg', drawing([p,c,k]), quality=92)
                rows.append(dict(path=str(f), pid=p, camid=c, split='train' if p<n_train else 'query' if c==0 and k<n_query else 'gallery'))
    return pd.DataFrame(rows)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A healthy set, and where it is"
    root = tmp_path_factory.mktemp('healthy')
    return root,make_set(root)

@pytest.fixture
def healthy(made, tmp_path):
    "A copy of the healthy set"
    root,df = made
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    return df.assign(path=[str(tmp_path/Path(o).name) for o in df.path])

def kinds(report): return [f.what.split(' (')[0] for f in report.findings]
def examine(df, **kwargs): return from_df(df).doctor(progress=False, **kwargs)
def row(path, pid, camid, split): return pd.DataFrame([dict(path=str(path), pid=pid, camid=camid, split=split)])

def hashes_in(scan): return scan[['hash_a','hash_b']].to_numpy()

## Planted illnesses

def test_healthy(healthy):
    report = examine(healthy)
    assert report.ok and report.findings==[] and '32 images, 0 errors, 0 warnings, 0 notes' in repr(report)

def truncated(d, df):
    f = d/'0_0_0.jpg'
    f.write_bytes(f.read_bytes()[:-200])
    return df,['unreadable images'],1

def missing(d, df):
    (d/'0_0_0.jpg').unlink()
    return df,['unreadable images'],1

def empty(d, df):
    (d/'5_1_0.jpg').write_bytes(b'')
    return df,['unreadable images'],1

def text(d, df):
    (d/'5_1_0.jpg').write_text('no picture')
    return df,['unreadable images'],1

def copy_other_identity(d, df):
    (d/'x.jpg').write_bytes((d/'0_0_0.jpg').read_bytes())
    return pd.concat([df, row(d/'x.jpg', 1, 0, 'train')]),['images filed under two identities'],2

def same_file_other_identity(d, df): return pd.concat([df, row(d/'5_1_1.jpg', -1, 1, 'gallery')]),['images filed under two identities','files listed twice in one split'],1

def recompressed_other_identity(d, df):
    save(d/'x.jpg', Image.open(d/'0_0_0.jpg'), quality=50)
    return pd.concat([df, row(d/'x.jpg', 1, 0, 'train')]),['images like one of another identity'],2

def resized_in_test(d, df):
    save(d/'x.png', Image.open(d/'0_0_0.jpg').resize((60,120)))
    return pd.concat([df, row(d/'x.png', 5, 1, 'gallery')]),['images like one of another identity','test images like one in train'],2

def distractor_copy_in_test(d, df):
    (d/'x.jpg').write_bytes((d/'0_0_0.jpg').read_bytes())
    return pd.concat([df, row(d/'x.jpg', -1, 1, 'gallery')]),['images filed under two identities','test images also in train'],2

def same_file_in_test(d, df):
    return pd.concat([df, df[df.pid==0].assign(split='gallery')]),['test images also in train','identities in training and in the test'],4

def copy_same_identity(d, df):
    (d/'x.jpg').write_bytes((d/'0_0_0.jpg').read_bytes())
    return pd.concat([df, row(d/'x.jpg', 0, 0, 'train')]),['copies of an image of the same identity'],1

def recompressed_same_identity(d, df):
    save(d/'x.jpg', Image.open(d/'0_0_0.jpg'), quality=50)
    return pd.concat([df, row(d/'x.jpg', 0, 0, 'train')]),['images like another of their identity'],2

def query_copy(d, df):
    save(d/'x.jpg', Image.open(d/'5_0_0.jpg'), quality=50)
    return pd.concat([df, row(d/'x.jpg', 5, 1, 'gallery')]),['queries with a copy of themselves as a match'],1

def query_copy_that_is_ignored(d, df):
    save(d/'x.jpg', Image.open(d/'5_0_0.jpg'), quality=50)
    return pd.concat([df, row(d/'x.jpg', 5, 0, 'gallery')]),[],0

def query_copied_as_query(d, df):
    save(d/'x.jpg', Image.open(d/'5_0_0.jpg'), quality=50)
    return pd.concat([df, row(d/'x.jpg', 5, 1, 'query')]),['images like another of their identity'],2

def query_copy_under_another_name(d, df):
    save(d/'x.jpg', Image.open(d/'5_0_0.jpg'), quality=50)
    return pd.concat([df, row(d/'x.jpg', 6, 1, 'gallery')]),['images like one of another identity'],2

def listed_twice(d, df): return pd.concat([df, df[:3]]),['files listed twice in one split'],3

def unanswerable(d, df): return df[~((df.pid==5) & (df.camid==1))],['of 4 queries have no match in the gallery under market'],1

def black(d, df):
    save(d/'0_0_0.jpg', Image.new('RGB', (48,96), (3,2,4)))
    return df,['constant images'],1

def two_black(d, df):
    for o in ('0_0_0','1_0_0','5_1_0'): save(d/f'{o}.png', Image.fromarray(np.full((96,48,3), len(o)+int(o[0]), np.uint8)))
    return df.replace({'path':{str(d/f'{o}.jpg'):str(d/f'{o}.png') for o in ('0_0_0','1_0_0','5_1_0')}}),['constant images'],3

def grey(d, df):
    save(d/'0_0_0.jpg', ImageOps.grayscale(Image.open(d/'0_0_0.jpg')))
    return df,['grey images'],1

def tiny(d, df):
    save(d/'0_0_0.jpg', drawing(99, (20,40)))
    return df,['tiny images'],1

def narrow(d, df):
    save(d/'0_0_0.jpg', drawing(99, (25,130)))
    return df,['narrow images'],1

def frame(d, df):
    save(d/'0_0_0.jpg', drawing(99, (700,500)))
    return df,['images over 4 times higher or lower than the median of 96 pixels'],1

def one_picture(d, df): return df[~((df.pid==0) & df.path.str.contains('0_1_|_1.jpg'))],['training identities with one image'],1

def one_camera(d, df): return df[~((df.pid==0) & (df.camid==1))],['training identities seen by one camera'],1

def many(d, df):
    more = [row(save(d/f'm{i}.jpg', drawing([77,i])), 0, i%2, 'train') for i in range(40)]
    return pd.concat([df, *more]),['training identities with over 10 times the median of 4 images'],1

def no_test(d, df): return df[df.split=='train'],['empty tables'],2

illnesses = [truncated, missing, empty, text, copy_other_identity, same_file_other_identity, recompressed_other_identity, resized_in_test,
    distractor_copy_in_test, same_file_in_test, copy_same_identity, recompressed_same_identity, query_copy, query_copy_that_is_ignored,
    query_copied_as_query, query_copy_under_another_name, listed_twice, unanswerable, black, two_black, grey, tiny, narrow, frame,
    one_picture, one_camera, many, no_test]

@pytest.mark.parametrize('ill', illnesses, ids=lambda f: f.__name__)
def test_planted_illness(tmp_path, healthy, ill):
    "Each illness is found under its name, with the right number, and nothing else is"
    df,expected,n = ill(tmp_path, healthy)
    report = examine(df.reset_index(drop=True))
    assert sorted(kinds(report))==sorted(expected)
    if expected: assert len(report.findings[kinds(report).index(expected[0])].rows)==n
    assert report.ok==all(f.severity!='error' for f in report.findings)
    for f in report.findings:
        about = dict(test={'query','gallery'}, training={'train'}, queries={'query'}).get(f.what.split()[0], {'train','query','gallery'})
        assert set(f.rows.split)<=about

def test_negative_pid_and_single_identity(tmp_path):
    df = make_set(tmp_path, n_train=1, n_ids=4)
    parts = {k:o.assign(dsetid='x').drop(columns='split') for k,o in df.groupby('split')}
    assert kinds(ReIDData('x', **parts).doctor(progress=False))==['identity in train']
    parts['train'] = pd.concat([parts['train'], parts['train'][:1].assign(pid=-1, path=str(save(tmp_path/'n.jpg', drawing(5))))])
    with_distractor = ReIDData('x', **parts).doctor(progress=False)
    assert 'images in train with a pid below 0' in kinds(with_distractor) and not with_distractor.ok

def test_no_query_has_a_match(healthy):
    report = from_df(healthy[(healthy.split=='train') | (healthy.camid==0)], protocol='market').doctor(progress=False)
    assert [(f.severity,str(f)) for f in report.findings]==[('error', '4 of 4 queries have no match in the gallery under market')]

def test_leave_one_out(tmp_path):
    "Every test picture is both query and gallery, and that is no illness; a saved-again copy is"
    df = make_set(tmp_path).drop(columns='camid').assign(split=lambda d: d.split.where(d.split=='train', 'test'))
    assert from_df(df, protocol='leave_one_out').doctor(progress=False).findings==[]
    save(tmp_path/'x.jpg', Image.open(tmp_path/'6_0_0.jpg'), quality=60)
    df = pd.concat([df, pd.DataFrame([dict(path=str(tmp_path/'x.jpg'), pid=6, split='test')])])
    report = from_df(df, protocol='leave_one_out').doctor(progress=False)
    assert sorted(kinds(report))==['images like another of their identity', 'queries with a copy of themselves as a match']
    assert all(len(f.rows)==2 for f in report.findings)

def test_thresholds(tmp_path, healthy):
    "Every threshold does what it says, at the value it names"
    narrow(tmp_path, healthy)
    assert 'narrow images' not in kinds(examine(healthy, max_aspect=5.2)) and 'narrow images' in kinds(examine(healthy, max_aspect=5.19))
    assert 'tiny images' not in kinds(examine(healthy, min_side=25)) and 'tiny images' in kinds(examine(healthy, min_side=26))
    grey(tmp_path, healthy)
    assert 'grey images' not in kinds(examine(healthy, grey=0))
    black(tmp_path, healthy)
    assert 'constant images' not in kinds(examine(healthy, flat=0))
    with pytest.raises(ValueError, match='radius 17: expected 0 to 16'): examine(healthy, radius=17)

## Pictures

@pytest.mark.parametrize('kwargs', [dict(format='jpeg'), dict(format='jpeg', progressive=True), dict(format='png'), dict(format='jpeg', mode='L'),
    dict(format='jpeg', mode='CMYK'), dict(format='webp'), dict(format='bmp')], ids=str)
def test_truncated_anywhere(kwargs):
    "The reduced decoding fails for the same lengths of a file as the full one, and says the same"
    drawing(3, (40,72)).convert(kwargs.pop('mode', 'RGB')).save(buf := BytesIO(), **kwargs)
    raw = buf.getvalue()
    cuts = [*range(0, len(raw), max(1, len(raw)//200)), *range(len(raw)-6, len(raw)+1)]
    scan = scan_images(pd.DataFrame(dict(path=[f'{n}' for n in cuts], image=[raw[:n] for n in cuts])), 1, progress=False)
    for n,e in zip(cuts, scan.error):
        try: open_image(raw[:n], f'{n}')
        except ValueError as full: assert e==str(full)
        else: assert not isinstance(e, str)
    assert scan.error.notna().any() and not isinstance(scan.error.iloc[-1], str)

def test_upright_size(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path/'lying.jpg', drawing(1).rotate(90, expand=True), exif=exif, quality=95)
    save(tmp_path/'plain.jpg', drawing(1), quality=95)
    scan = scan_images(pd.DataFrame(dict(path=[str(tmp_path/o) for o in ('lying.jpg','plain.jpg')])), progress=False)
    assert scan.width.tolist()==[48,48] and scan.height.tolist()==[96,96] and hamming(*hashes_in(scan))<=10

def test_held_anywhere(tmp_path):
    "A file, a member of an archive, bytes, a picture, an array, and a box of a frame: the same picture"
    im = drawing(2)
    f = save(tmp_path/'a.png', im)
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.write(f, 'in/a.png')
    frame = Image.new('RGB', (200,200), 'red')
    frame.paste(im, (30,50))
    save(tmp_path/'frame.png', frame)
    df = pd.DataFrame(dict(path=[f, tmp_path/'a.zip'/'in'/'a.png', 'bytes', 'picture', 'array', tmp_path/'frame.png'], image=[None, None, f.read_bytes(), im, np.asarray(im), None]))
    df = df.assign(path=df.path.astype(str), **{k:[None]*5 + [v] for k,v in zip('xywh', (30,50,48,96))})
    scan = scan_images(df, progress=False)
    assert scan.error.isna().all() and (scan.width==48).all() and (scan.height==96).all()
    assert len(np.unique(hashes_in(scan), axis=0))==1 and scan.content[:3].nunique()==1 and scan.content[3:].nunique()==1

def test_boxes_of_one_frame_are_no_copies(tmp_path):
    f = save(tmp_path/'frame.png', drawing(4, (400,300)))
    df = pd.DataFrame(dict(path=str(f), pid=[0,1,2,3,4,5], x=range(0,300,50), y=[0,60]*3, w=60, h=120, split='train'))
    assert kinds(from_df(df).doctor(progress=False))==['empty tables','training identities with one image']
    scan = scan_images(df.assign(x=[0,50,100,150,200,5000]), progress=False)
    assert 'lies outside' in scan.error[5] and scan.error[:5].isna().all()

def test_processes_change_nothing(tmp_path):
    "300 files, some broken, by one process and by two"
    df = pd.concat([make_set(tmp_path/str(i), n_ids=19) for i in range(4)], ignore_index=True)
    for o in df.path[::41]: open(o, 'wb').close()
    one,two = (scan_images(df, n, progress=False) for n in (1,2))
    pd.testing.assert_frame_equal(one, two)
    assert one.error.notna().sum()==len(df[::41]) and len(df)>256

@pytest.mark.skipif(sys.platform!='linux', reason='needs forked processes')
def test_killed_process(monkeypatch):
    "The death of a worker ends in a sentence, not in a wait"
    me = os.getpid()
    def look(pics, i):
        if os.getpid()!=me and i==7: os.kill(os.getpid(), signal.SIGKILL)
        return drawing(i),(48,96),i
    monkeypatch.setattr(room, '_look', look)
    with pytest.raises(ChildProcessError, match='was killed.*try fewer workers'):
        scan_images(pd.DataFrame(dict(path=[str(i) for i in range(1000)])), 2, progress=False)

def test_unreadable(tmp_path, healthy):
    (tmp_path/'0_0_0.jpg').write_bytes(b'')
    bad = unreadable([*healthy.path, *healthy.path[:3], tmp_path/'none.jpg'], progress=False)
    assert [*bad]==[str(tmp_path/'0_0_0.jpg'), str(tmp_path/'none.jpg')] and 'no image' in bad[str(tmp_path/'none.jpg')]
    assert unreadable([], progress=False)=={}

@pytest.mark.parametrize('change', [lambda im: im.resize((90,180)), lambda im: im.point(lambda o: o*.7), lambda im: im.resize((30,60)),
    lambda im: Image.blend(im, Image.new('RGB', im.size, 'white'), .2)])
def test_hash_survives(change):
    bits = lambda im: perceptual_hash(np.asarray(im.convert('L').resize((16,16), Image.BILINEAR))[None])[0]
    d = [hamming(bits(drawing(i)), bits(change(drawing(i)))) for i in range(30)]
    others = [hamming(bits(drawing(i)), bits(drawing(i+1))) for i in range(30)]
    assert max(d)<=10 and min(others)>20

def test_hash_of_constant_pictures():
    "No noise of the arithmetic: all constant pictures have one hash"
    assert len(np.unique(perceptual_hash(np.arange(1, 256)[:,None,None]*np.ones((1,16,16))), axis=0))==1

## Pairs

def hashes_of(kind, rng, words, n=240):
    size = (n,words)
    if kind=='random': return rng.integers(0, 2**64, size, dtype=np.uint64)
    if kind=='equal': return np.full(size, 7, np.uint64)
    if kind=='few': return rng.integers(0, 12, size).astype(np.uint64)   # many equal, all within a few bits
    if kind=='ends': return np.array([0, 2**64-1, 2**63, 1], np.uint64)[rng.integers(0, 4, size)]
    h = rng.integers(0, 2**64, (12,words), dtype=np.uint64)[rng.integers(0, 12, n)]
    for _ in range(5): h ^= np.uint64(1) << rng.integers(0, 64, size, dtype=np.uint64)
    return h

all_kinds = ['random','equal','few','ends','crowd']

@pytest.mark.parametrize('radius', [0,1,4,10,16])
@pytest.mark.parametrize('words', [1,2,4])
@pytest.mark.parametrize('kind', all_kinds)
def test_pairs(kind, words, radius):
    "The parts find exactly the pairs that comparing all with all finds, each once"
    h = hashes_of(kind, np.random.default_rng(radius), words)
    near = hamming(h[:,None], h[None])<=radius
    found = [(min(p),max(p)) for i,j in near_pairs(h, radius) for p in zip(i.tolist(), j.tolist())]
    assert len(found)==len(set(found)) and set(found)==set(zip(*(o.tolist() for o in np.nonzero(np.triu(near, 1)))))

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('kind', all_kinds)
def test_doubles(kind, seed):
    "A double is reported for exactly the rows that have one, and it is one"
    rng = np.random.default_rng(seed)
    h = hashes_of(kind, rng, 1+seed%2)
    for radius in (0,4,10):
        values,groups,among = rng.integers(0, [1,2,3,40][seed], len(h)),rng.integers(0, 3, len(h)),rng.random(len(h))<.2
        for g,a in ((None,None), (groups,None), (None,among), (groups,among)):
            ok = (hamming(h[:,None], h[None])<=radius) & (values[:,None]!=values)
            if g is not None: ok &= g[:,None]==g
            if a is not None: ok &= a
            j = near_other(h, values, radius, g, a)
            assert ((j>=0)==ok.any(1)).all() and ok[j>=0,j[j>=0]].all()

def test_doubles_of_nothing():
    assert near_other(np.zeros(0, np.uint64), []).shape==near_other(np.zeros((0,2), np.uint64), [], 10).shape==(0,)
    assert near_other([5], ['x'], 10).tolist()==[-1]

def peak_memory(f):
    tracemalloc.start()
    f()
    return (tracemalloc.get_traced_memory()[1], tracemalloc.stop())[0]

def test_memory():
    "Far from 20,000 × 20,000 bytes, for equal hashes and for neighbours in one small ball"
    equal = np.zeros((20_000,2), np.uint64)
    assert peak_memory(lambda: near_other(equal, np.arange(20_000), 10))<20e6
    ball = np.arange(3000, dtype=np.uint64)[:,None]
    assert peak_memory(lambda: near_other(ball, np.arange(3000), 10))<5e6
    steps = near_pairs(equal, 10)
    assert max(len(next(steps)[0]) for _ in range(20))<20_000

def test_many_equal_pictures(tmp_path):
    "3,000 equal pictures of 3,000 identities: found, quickly, with a row each"
    f = save(tmp_path/'a.png', drawing(1)).read_bytes()
    n = 3000
    df = pd.DataFrame(dict(path=[f'{i}' for i in range(n)], image=[f]*n, pid=range(n), dsetid='x', camid=0))
    report = ReIDData('x', df[:-2], df[-2:-1], df[-1:]).doctor(progress=False)
    assert [len(f.rows) for f in report.findings if f.what=='images filed under two identities']==[n]

## Report

def every_illness(d, df):
    "As many illnesses at once as go together"
    more = [df, row(d/'x.jpg', 3, 1, 'train')]
    (d/'x.jpg').write_bytes((d/'1_1_0.jpg').read_bytes())
    for f in (text, black): f(d, df)
    save(d/'0_1_0.jpg', ImageOps.grayscale(Image.open(d/'0_1_0.jpg')))
    (d/'1_0_0.jpg').unlink()
    save(d/'2_0_0.jpg', drawing(98, (20,160)))
    save(d/'3_0_0.jpg', drawing(97, (700,500)))
    save(d/'y.jpg', Image.open(d/'2_0_1.jpg'), quality=60)
    save(d/'z.jpg', Image.open(d/'5_0_0.jpg'), quality=60)
    (d/'w.jpg').write_bytes((d/'3_1_1.jpg').read_bytes())
    more += [row(d/'y.jpg', 6, 1, 'gallery'), row(d/'z.jpg', 5, 1, 'gallery'), row(d/'w.jpg', 3, 1, 'train'), row(d/'3_0_1.jpg', 3, 0, 'gallery'), df[4:6]]
    return pd.concat(more, ignore_index=True).query('not (pid==7 and camid==1)')

@pytest.fixture
def report(tmp_path, healthy): return examine(every_illness(tmp_path, healthy), imbalance=1.1)

def test_report_order_and_size(report):
    "Most serious first, in words; one screen, whatever the number of findings; the same findings in the table"
    assert len(report.findings)>=14 and not report.ok
    order = [severities.index(f.severity) for f in report.findings]
    assert order==sorted(order)
    for w,h in ((80,40), (80,25), (60,60)):
        lines = report.text(w, h).splitlines()
        assert len(lines)<=h and max(map(len, lines))<=w
        assert [o.split()[0] for o in lines[1:] if o.split()[0] in severities]==[f.severity for f in report.findings]
    heads = [o for o in report.text(80, 400).splitlines() if o.split()[0] in severities]
    assert [int(o.split()[1]) for o in heads]==[len(f.rows) for f in report.findings]
    assert report.text(80, 400).count('fix: ')==report.text(80, 400).count('such as ')==len(report.findings)
    assert all(f.what.replace('<', '&lt;') in report._repr_html_() for f in report.findings)

def test_three_examples():
    rows = pd.DataFrame(dict(split='train', path=[f'd/{i}.jpg' for i in range(9)], other='', detail=''))
    assert 'such as 0.jpg; 1.jpg; 2.jpg\n' in DoctorReport('x', 9, [Finding('note', 'things', 'nothing', rows)]).text()

def test_the_same_file_is_not_shown_twice(tmp_path, healthy):
    df,_,_ = same_file_other_identity(tmp_path, healthy)
    assert '5_1_1.jpg (same content; gallery -1)' in repr(examine(df)) and '5_1_1.jpg and' not in repr(examine(df))

def test_names_of_identities_where_some_have_none(healthy):
    parts = {k:o.assign(dsetid='x').drop(columns='split') for k,o in healthy.groupby('split')}
    parts['train'] = parts['train'].assign(pid_name='rex').query('pid>0 or camid==0')
    report = ReIDData('x', **parts).doctor(progress=False)
    assert [f.rows.detail.tolist() for f in report.findings]==[['identity rex: 2 images']]

def test_names_that_are_not_unique_show_their_folder():
    rows = pd.DataFrame(dict(split='train', path=['/data/x/a/0.jpg', '/data/x/b/0.jpg'], other='', detail=''))
    assert 'such as a/0.jpg; b/0.jpg\n' in DoctorReport('x', 9, [Finding('note', 'things', 'nothing', rows)]).text()

def test_csv_has_every_row(tmp_path, report):
    report.to_csv(tmp_path/'out'/'f.csv')
    df = pd.read_csv(tmp_path/'out'/'f.csv', keep_default_na=False)
    assert len(df)==sum(len(f.rows) for f in report.findings)==len(report.to_df())
    assert df.groupby('finding').size().to_dict()=={f.what:len(f.rows) for f in report.findings}
    assert df.path.tolist()==[o for f in report.findings for o in f.rows.path] and set(df.severity)==set(severities)
    pairs = df[df.finding=='images filed under two identities']
    assert {tuple(map(os.path.basename, o)) for o in zip(pairs.path, pairs.other)}>={('x.jpg','1_1_0.jpg'), ('1_1_0.jpg','x.jpg')}

def test_csv_of_a_healthy_set(tmp_path, healthy):
    examine(healthy).to_csv(tmp_path/'f.csv')
    assert len(pd.read_csv(tmp_path/'f.csv'))==0

def test_csv_appears_whole_or_not_at_all(tmp_path, report, monkeypatch):
    (tmp_path/'f.csv').write_text('old')
    def broken(self, path, **kwargs):
        with open(path, 'w') as f: f.write('half')
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pd.DataFrame, 'to_csv', broken)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OSError, match='cannot write .*No space left.*choose a folder'): report.to_csv(tmp_path/'f.csv')
    assert (tmp_path/'f.csv').read_text()=='old' and sorted(os.listdir(tmp_path))==before

def test_nothing_is_changed(tmp_path, healthy):
    data = from_df(every_illness(tmp_path, healthy))
    copies = {k:o.copy() for k,o in data.splits.items()}
    files = {f:(f.read_bytes(), f.stat().st_mtime_ns) for f in tmp_path.iterdir()}
    notes = [*data.notes]
    data.doctor(progress=False)
    assert {f:(f.read_bytes(), f.stat().st_mtime_ns) for f in tmp_path.iterdir()}==files and data.notes==notes
    for k,o in data.splits.items(): pd.testing.assert_frame_equal(o, copies[k])

## Check

def test_check_unreadable(tmp_path):
    "All bad files in one error, or skipped and counted"
    for i in range(4):
        for j in range(3): save(tmp_path/f'id{i}'/f'{j}.jpg', drawing([i,j]))
    whole = (tmp_path/'id0/0.jpg').read_bytes()
    (tmp_path/'id0/0.jpg').write_bytes(whole[:len(whole)//2])
    (tmp_path/'id1/1.jpg').write_bytes(b'')
    (tmp_path/'id2/2.jpg').write_text('not a picture')
    data = from_folder(tmp_path, test_frac=.5)
    with pytest.raises(ValueError) as e: data.check(progress=False)
    assert all(o in str(e.value) for o in ('3 unreadable', 'id0', 'id1', 'id2', 'skip_bad'))
    ok = data.check(skip_bad=True, progress=False)
    assert sum(map(len, ok.splits.values()))==9 and '3 unreadable images skipped' in ok.notes[-1]
    left = {o for df in ok.splits.values() for o in df.path}
    assert left.isdisjoint({str(tmp_path/o) for o in ('id0/0.jpg','id1/1.jpg','id2/2.jpg')}) and len(left)==9

def test_check_tables(tmp_path):
    "What makes a result meaningless is raised at once, what weakens it is noted"
    def rows(pid, cam):
        paths = [str(save(tmp_path/f'{p}_{c}.jpg', drawing([p,c]))) for p,c in zip(pid,cam)]
        return pd.DataFrame(dict(path=paths, pid=pid, camid=cam, dsetid='x'))
    check = lambda *parts: ReIDData('x', *parts).check(progress=False)
    with pytest.raises(ValueError, match='1 identity in train'): check(rows([1,1],[0,1]), rows([2],[0]), rows([2,2],[1,2]))
    with pytest.raises(ValueError) as e: check(rows([1,1],[0,1]), rows([3,4],[0,0]), rows([3,5],[0,1]))
    assert '1 identity in train' in str(e.value) and '2 of 2 queries have no match in the gallery under market' in str(e.value)
    half = rows([1,1,2,2],[0,1,0,1]),rows([3,4],[0,0]),rows([3,5],[1,1])
    ok = check(*half)
    assert len(ok.notes)==1 and ok.notes[0].startswith('1 of 2 queries have no match in the gallery under market: they will be dropped')
    with pytest.raises(ValueError, match='4 files listed twice in one split'): check(pd.concat([half[0]]*2), *half[1:])
    single = check(rows([1,2],[0,1]), *half[1:])
    assert any(o.startswith('2 training identities with one image') for o in single.notes)
    leak = check(half[0], rows([1],[2]), rows([1],[0]))
    assert [o.split(':')[0] for o in leak.notes]==['1 identities in training and in the test', '1 test images also in train']
    assert leak.check(progress=False).notes==leak.notes

ODD = ['Ünïcode ★', 'a b (c)', 'x[1]+$.*', '-1x', "o'neil"]
def test_odd_names(tmp_path):
    "Spaces, unicode, regex characters and a tag in folder and file names"
    for i,o in enumerate(ODD):
        for j in range(3): save(tmp_path/'my set (1) c1_c2'/o/f'{j} ü<b>[{j}].JPG', drawing([i,j]), format='jpeg')
    data = from_folder(tmp_path/'my set (1) c1_c2', test_frac=.4)
    assert data.doctor(progress=False).findings==[] and data.check(progress=False).notes==data.notes
    (tmp_path/'my set (1) c1_c2'/ODD[0]/'0 ü<b>[0].JPG').write_bytes(b'')
    report = data.doctor(progress=False)
    assert '0 ü<b>[0].JPG (cannot identify image file)' in repr(report) and 'ü&lt;b&gt;' in report._repr_html_()

def test_copies_that_were_meant():
    "What `resample` listed twice is no finding; the same rows without its mark are"
    ims = [np.random.default_rng(i).integers(0, 255, (64,32,3), dtype=np.uint8) for i in range(12)]
    data = from_df(pd.DataFrame(dict(image=ims, pid=[i//3 for i in range(12)])), test_frac=.5)
    twice = data.resample(p=1)
    assert not any('listed twice' in o.what for o in twice.doctor(progress=False, n_workers=1).findings) and len(twice.train)==2*len(data.train)
    twice.check(progress=False)
    with pytest.raises(ValueError, match='files listed twice'): replace(twice, train=twice.train.drop(columns='copy')).check(progress=False)

def test_strangers_as_queries_are_an_error():
    "What evaluation refuses, the doctor calls an error"
    rng = np.random.default_rng(0)
    def rows(pid, cam, k):
        ims = [np.asarray(drawing(rng.integers(1e9))) for _ in pid]
        return pd.DataFrame(dict(path=[f'{k}{i}' for i in range(len(pid))], pid=pid, camid=cam, dsetid='x', image=ims))
    data = ReIDData('x', rows([1,1,2,2],[0,1,0,1],'t'), rows([3,-1],[0,0],'q'), rows([3,4],[1,1],'g'))
    report = data.doctor(progress=False, n_workers=1)
    assert not report.ok and [str(f) for f in report.findings if f.severity=='error']==['1 queries with a pid below 0']
    with pytest.raises(ValueError, match='queries with a pid below 0'): data.check(progress=False)

def test_a_crowd_of_static_scenes_takes_no_square_time():
    "Frames of ten fixed backgrounds: a double for nearly every one, with a number of steps that does not depend on the crowd"
    rng = np.random.default_rng(0)
    scenes = rng.normal(128, 40, (10,16,16))
    h = perceptual_hash(scenes[rng.integers(10, size=2000)]+rng.normal(0, 3, (2000,16,16)))
    assert (near_other(h, np.arange(2000), 10)>=0).mean()>.99
    assert sum(1 for _ in near_pairs(h, 10, reach=50))<=11*50
