"Own data, splits, protocols and pictures: 00_data and 00b_data.images"
import numpy as np, pandas as pd, pytest
from PIL import Image
from fastreid_nb.data.core import Protocol, ReIDData, as_protocol, matchable
from fastreid_nb.data.own import from_csv, from_df, from_folder
from fastreid_nb.data.readers import market1501
from fastreid_nb.data.core import choose_protocol, image_keys, pick_ids, protocols, split_query_gallery
from fastreid_nb.data.images import TableImages, list_images, open_image, read_bytes, read_image, to_rgb

def pic(path, seed=0, mode='RGB', size=(16,32), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1],size[0],3), dtype=np.uint8)).convert(mode).save(path, **kwargs)

def hwc(px): return px.permute(1,2,0).numpy()

def table(rng, n_ids, n_cams, n):
    return pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(n)], pid=rng.integers(n_ids, size=n), camid=rng.integers(n_cams, size=n), dsetid='x'))

@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('n_cams', [1,2,5])
def test_query_gallery(seed, n_cams):
    "Every row lands in exactly one table; every identity that can be asked is asked, and every query can be answered"
    df = table(np.random.default_rng(seed), 12, n_cams, 40)
    q,g = split_query_gallery(df, seed)
    assert sorted([*q.path, *g.path])==sorted(df.path)
    assert matchable(ReIDData('x', df, q, g)).all() if len(q) else True
    several = df.groupby('pid').agg(n=('path','size'), cams=('camid','nunique'))
    can = several[(several.n>1) & ((several.cams>1) | (df.camid.nunique()==1))].index
    assert set(can)==set(q.pid)

@pytest.mark.parametrize('seed', range(10))
def test_split_by_identity(seed):
    "Training and test share no identity, the share is right, and the seed decides"
    df = table(np.random.default_rng(seed), 30, 3, 300)
    a,b = from_df(df, seed=seed),from_df(df, seed=seed)
    assert a.train.equals(b.train) and a.query.equals(b.query)
    assert not set(a.train.pid) & (set(a.query.pid) | set(a.gallery.pid))
    assert a.train.pid.nunique()==df.pid.nunique()-round(.3*df.pid.nunique())
    assert len(a.train)+len(a.query)+len(a.gallery)==len(df)

@pytest.mark.parametrize('pids', [['a','b','c','d'], [1.5,2.5,3.5,4.5], ['x',7,2.5,'y'], ['0007','7','07','-0'], [10,20,30,40]])
def test_pids_of_any_type(pids):
    "Strings, floats and mixtures become codes and are kept as names"
    df = pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(12)], pid=pd.Series(pids*3, dtype=None)))
    data = from_df(df, test_frac=.5)
    rows = pd.concat(data.splits.values())
    assert rows.pid.nunique()==rows.pid_name.nunique()==4
    assert (rows.groupby('pid').pid_name.nunique()==1).all() and set(rows.pid_name)==set(pids)
    assert all(isinstance(o, (int,np.integer)) for o in rows.pid)

def test_split_column():
    df = pd.DataFrame(dict(path=list('abcdef'), pid=[1,1,2,2,2,-1], camid=[0,1,0,1,1,0], split=['train','train','query','gallery','gallery','gallery']))
    data = from_df(df)
    assert data.summary().images.tolist()==[2,1,3] and data.protocol=='market' and 'split' not in data.train
    assert data.summary().distractors.tolist()==[0,0,1]
    with pytest.raises(ValueError, match="split .'dev'.: expected some of"): from_df(df.assign(split='dev'))

@pytest.mark.parametrize('bad,msg', [
    (pd.DataFrame(dict(pid=[1])), "'path'. missing"), (pd.DataFrame(dict(path=['a'])), "'pid'. missing"),
    (pd.DataFrame(dict(path=[], pid=[])), 'is empty'), (pd.DataFrame(dict(path=['a','b'], pid=[1.,None])), 'pid is missing in 1 rows, first in row 1'),
    (pd.DataFrame(dict(path=['a','b'], pid=[-5,1])), 'pid -5: expected -1'),
])
def test_bad_tables(bad, msg):
    with pytest.raises(ValueError, match=msg): from_df(bad)

def test_bad_csv(tmp_path):
    with pytest.raises(FileNotFoundError, match='no file'): from_csv(tmp_path/'none.csv')
    (tmp_path/'empty.csv').touch()
    with pytest.raises(ValueError, match='no readable CSV'): from_csv(tmp_path/'empty.csv')
    (tmp_path/'cols.csv').write_text('file,id\na,1\n')
    with pytest.raises(ValueError, match=r"columns \['file', 'id'\]"): from_csv(tmp_path/'cols.csv')

def test_csv_keeps_text(tmp_path):
    (tmp_path/'a.csv').write_text('path,pid\n' + ''.join(f'{i}.jpg,{p}\n' for i,p in enumerate(['0007','7','007','7.0']*2)))
    rows = pd.concat(from_csv(tmp_path/'a.csv', test_frac=.5).splits.values())
    assert set(rows.pid_name)=={'0007','7','007','7.0'}

ODD = ['Ünïcode ★', 'a b (c)', 'x[1]+$.*', '-1x', "o'neil"]
def test_odd_names(tmp_path):
    "Spaces, unicode and regex characters in folder and file names"
    for i,o in enumerate(ODD):
        for j in range(3): pic(tmp_path/'my set (1) c1_c2'/o/f'{j} ü[{j}].JPG', i*3+j)
    data = from_folder(tmp_path/'my set (1) c1_c2', test_frac=.4)
    assert set(pd.concat(data.splits.values()).pid_name)==set(ODD) and data.protocol=='no_camera'

def test_parent_folder_is_never_read(tmp_path):
    "`exp1_c2` above the data must not be taken for identity 1, camera 2"
    root = tmp_path/'exp1_c2'/'0099_c9'
    for i in range(6):
        for c in (1,2): pic(root/f'{i:04d}_c{c}s1_{i:06d}_00.jpg')
    rows = pd.concat(from_folder(root).splits.values())
    assert rows.pid.nunique()==6 and rows.camid.nunique()==2
    assert market1501_of(tmp_path/'1_c1').train.pid.tolist()==[5]

def market1501_of(root):
    for o in ('bounding_box_train','query','bounding_box_test'): pic(root/o/'0005_c3s1_000001_00.jpg')
    return market1501(root)

def test_split_folders(tmp_path):
    for s in ('train','query','gallery'):
        for i in range(3): pic(tmp_path/s/f'id{i}'/f'{s}.png')
    assert from_folder(tmp_path).summary().images.tolist()==[3,3,3]

@pytest.mark.parametrize('mode,ext', [('RGB','jpg'), ('L','jpg'), ('CMYK','jpg'), ('P','png'), ('RGBA','png'), ('LA','png'), ('1','png'), ('I;16','png'), ('P','gif')])
def test_modes(tmp_path, mode, ext):
    "Readable pictures of every mode come back as 8-bit RGB of the same size and about the same brightness"
    f = tmp_path/f'a.{ext}'
    grey = np.tile(np.linspace(0, 255, 64, dtype=np.uint8), (32,1))
    im = Image.fromarray(grey.astype(np.uint16)*257) if mode=='I;16' else Image.fromarray(grey).convert('RGB').convert(mode)
    im.save(f)
    out = open_image(f)
    assert out.mode=='RGB' and out.size==(64,32)
    assert abs(np.asarray(out).mean()-127)<8 if mode!='1' else True

def test_every_form_is_the_same_image(tmp_path):
    "One door: path, text, archive, bytes, PIL image, arrays and tensors give equal bytes; none of them is changed or shared"
    import torch, zipfile
    im = np.random.default_rng(0).integers(0, 256, (9,6,3), dtype=np.uint8)
    f = tmp_path/'a.png'
    Image.fromarray(im).save(f)
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z: z.write(f, 'in/a.png')
    chw = torch.from_numpy(im.copy()).permute(2,0,1)
    forms = [f, str(f), f'{tmp_path}/z.zip/in/a.png', f.read_bytes(), Image.fromarray(im), im, im[:,::-1][:,::-1], im/255, (im/255).astype(np.float32),
        chw, chw.contiguous(), chw/255, chw.double()/255]
    for o in forms:
        px = read_image(o)
        assert px.dtype==torch.uint8 and px.shape==(3,9,6) and np.array_equal(hwc(px), im)
        assert np.array_equal(hwc(read_image(o, (1,-2,4,5))), im[:5,1:4])
    px = read_image(im)
    px[:] = 0
    assert im.any()

def test_grey_forms_are_the_same_image(tmp_path):
    "One channel becomes three, in every form"
    import torch
    im = np.random.default_rng(0).integers(0, 256, (9,6), dtype=np.uint8)
    Image.fromarray(im).save(tmp_path/'a.png')
    for o in (tmp_path/'a.png', Image.fromarray(im), im, im[...,None], im/255, torch.from_numpy(im)[None], torch.from_numpy(im/255)[None]):
        assert np.array_equal(hwc(read_image(o)), np.stack([im]*3, -1))

@pytest.mark.parametrize('bad', [7, None, [1,2], np.zeros((2,2,4), np.uint8), np.zeros((4,), np.uint8), np.zeros((4,4), np.int64), np.full((2,2), 1.5)])
def test_other_forms_are_refused(bad):
    with pytest.raises(ValueError, match='expected'): read_image(bad)

def test_errors_bear_the_name(tmp_path):
    "The name that the caller gives, or the path"
    for kw,said in (({}, 'row.jpg'), (dict(name='row 3'), 'row 3')):
        with pytest.raises(FileNotFoundError, match=f'no image .*{said}'): read_image(tmp_path/'row.jpg', **kw)
        (tmp_path/'bad.row.jpg').write_text('nonsense')
        with pytest.raises(ValueError, match=f'cannot read the image .*{said}'): read_image(tmp_path/'bad.row.jpg', **kw)
    with pytest.raises(ValueError, match='image row 3 with values from'): read_image(np.full((2,2), 9.), name='row 3')
    with pytest.raises(ValueError, match='lies outside the image row 3 of 2×2'): read_image(np.zeros((2,2)), (2,0,3,1), name='row 3')

def test_one_list_of_images(tmp_path):
    "Sorted, without what is hidden, the same from a folder and from an archive of it"
    import shutil
    for o in ('b/1.JPG', 'a b/2.png', '._1.jpg', '.hidden/3.jpg', 'c/__MACOSX/1.jpg', 'c/notes.txt'): pic(tmp_path/'set'/o) if not o.endswith('txt') else (tmp_path/'set'/o).touch()
    shutil.make_archive(tmp_path/'set', 'zip', tmp_path/'set')
    assert list_images(tmp_path/'set')==list_images(tmp_path/'set.zip')==['a b/2.png','b/1.JPG']

def test_choose_protocol():
    "By the tables alone; strangers and unknown cameras count for nothing"
    df = pd.DataFrame(dict(path=list('abcd'), pid=[1,1,2,2], camid=[0,1,0,1]))
    assert choose_protocol(df, df)=='market'
    one = df.assign(camid=0)
    assert choose_protocol(one, one)=='leave_one_out' and choose_protocol(one[:2], one)=='no_camera'
    assert choose_protocol(one.assign(trackid=0), one.assign(trackid=1))=='tracklet'
    assert choose_protocol(one[:2], pd.concat([one, one.assign(pid=-1, camid=7)]))=='no_camera'
    assert choose_protocol(df.assign(camid=-1), df)=='leave_one_out'

def test_transparency_is_black():
    im = Image.new('RGBA', (4,4), (255,255,255,0))
    assert np.asarray(to_rgb(im)).max()==0

@pytest.mark.parametrize('seed', range(10))
def test_split_is_stratified(seed):
    "Each set of cameras keeps its share of the test identities, give or take one"
    rng = np.random.default_rng(seed)
    cams = [(0,), (0,1), (1,2,3)]
    kind = rng.integers(3, size=120)
    df = pd.DataFrame([dict(path=f'{i}_{c}', pid=i, camid=c) for i,k in enumerate(kind) for c in cams[k]])
    test = pick_ids(df, 36, seed)
    assert len(set(test))==36
    got = np.bincount(kind[test], minlength=3)
    assert np.abs(got-.3*np.bincount(kind, minlength=3)).max()<=1.0001
    assert not set(test)==set(pick_ids(df, 36, seed+1)) and (pick_ids(df.sample(frac=1, random_state=seed), 36, seed)==test).all()

@pytest.mark.parametrize('n', [0,1,5])
def test_pick_ids_edges(n):
    df = pd.DataFrame(dict(pid=[0,1,2,3,4,-1], camid=0))
    assert len(set(pick_ids(df, n)))==n and -1 not in pick_ids(df, n)

def test_column_mapping():
    "Any names, also when another column already has ours"
    df = pd.DataFrame(dict(file=['a','b','c','d'], who=list('xxyy'), pid=[9,9,9,9], station=[5,7,5,7]))
    data = from_df(df, cols=dict(path='file', pid='who', camid='station'), test_frac=.5)
    rows = pd.concat(data.splits.values())
    assert set(rows.pid_name)=={'x','y'} and rows.camid.nunique()==2 and sorted(rows.path)==list('abcd')
    with pytest.raises(ValueError, match=r"cols names \['nobody'\], but the columns are"): from_df(df, cols=dict(pid='nobody'))
    with pytest.raises(ValueError, match="say what you call them, such as cols=dict"): from_df(df.drop(columns='pid'))

def test_csv_mapping_keeps_text(tmp_path):
    (tmp_path/'a.csv').write_text('file,who\n' + ''.join(f'{i}.jpg,{p}\n' for i,p in enumerate(['0007','NA','null','7']*2)))
    rows = pd.concat(from_csv(tmp_path/'a.csv', cols=dict(path='file', pid='who'), test_frac=.5).splits.values())
    assert set(rows.pid_name)=={'0007','NA','null','7'}

@pytest.mark.parametrize('split,msg', [
    (['train','train','query','query'], "'gallery' is missing|gallery is missing"), (['train','train',None,'test'], 'split is missing in 1 rows, first in row 2'),
])
def test_bad_splits(split, msg):
    with pytest.raises(ValueError, match=msg): from_df(pd.DataFrame(dict(path=list('abcd'), pid=[1,1,2,2], split=split)))

def test_protocol_is_chosen_and_announced():
    df = pd.DataFrame(dict(path=[f'{i}' for i in range(12)], pid=[0,1,2]*4))
    assert from_df(df).protocol=='no_camera' and 'protocol no_camera' in from_df(df).notes[-1]
    assert from_df(df.assign(camid=[0]*6+[1]*6)).protocol=='market'
    assert from_df(df.assign(trackid=[0]*6+[1]*6)).protocol=='tracklet'
    one = from_df(df, protocol='leave_one_out', test_frac=1.)
    assert len(one.query)==len(one.gallery)==12 and matchable(one).all()
    assert ReIDData('x', one.train, one.query, one.gallery).protocol=='leave_one_out'
    with pytest.raises(ValueError, match="protocol 'marked': expected one of market, cross_view"): from_df(df, protocol='marked')

@pytest.mark.parametrize('name', list(protocols))
@pytest.mark.parametrize('seed', range(4))
def test_matchable_is_the_definition(name, seed):
    "Against a loop over all pairs"
    rng = np.random.default_rng(seed)
    df = table(rng, 6, 3, 30).assign(trackid=rng.integers(9, size=30))
    q,g = df.sample(12, random_state=seed),df.sample(15, random_state=seed+1)
    o = as_protocol(name)
    src = dict(camid='camid', path='path', trackid='trackid')[o.source]
    want = [any(a.pid==b.pid and getattr(a, src)!=getattr(b, src) for b in g.itertuples()) for a in q.itertuples()]
    assert matchable(ReIDData('x', df, q, g, protocol=name)).tolist()==want

def test_own_protocol():
    df = pd.DataFrame(dict(path=list('abcd'), pid=[1,1,2,2], camid=0, dsetid='x', day=[1,1,1,2]))
    data = ReIDData('door', df, df, df, Protocol('day', 'day'))
    assert matchable(data).tolist()==[False,False,True,True] and 'protocol day' in repr(data)
    with pytest.raises(ValueError, match="needs a column 'day', which query and gallery lack"): ReIDData('x', df, df.drop(columns='day'), df.drop(columns='day'), data.protocol)

def test_unknown_source_equals_nothing():
    df = pd.DataFrame(dict(path=list('ab'), pid=[1,1], camid=0, dsetid='x', trackid=[None,None]))
    assert matchable(ReIDData('x', df, df[:1], df[1:], 'tracklet')).tolist()==[True]

@pytest.mark.parametrize('sep', ['/', '\\'])
def test_zip(tmp_path, sep):
    "Members are read in place, by name, and from a forked or threaded reader alike"
    import zipfile
    from concurrent.futures import ThreadPoolExecutor
    for i in range(30): pic(tmp_path/'in'/ODD[i%5]/f'{i} ü.png', i)
    files = sorted((tmp_path/'in').rglob('*.png'))
    with zipfile.ZipFile(tmp_path/'a b.ZIP', 'w') as z:
        for f in files: z.write(f, f.relative_to(tmp_path/'in').as_posix())
    data = from_folder(tmp_path/'a b.ZIP', test_frac=0.)
    assert set(data.train.pid_name)==set(ODD)
    with ThreadPoolExecutor(8) as ex: got = list(ex.map(lambda p: open_image(p.replace('ZIP/', 'ZIP'+sep)).tobytes(), data.train.path))
    assert got==[open_image(f).tobytes() for f in files]
    with pytest.raises(FileNotFoundError, match='none.png'): open_image(tmp_path/'a b.ZIP'/'none.png')

def test_folder_called_zip(tmp_path):
    pic(tmp_path/'set.zip'/'ada'/'1.png')
    assert read_bytes(tmp_path/'set.zip'/'ada'/'1.png')==(tmp_path/'set.zip/ada/1.png').read_bytes()

def test_links(tmp_path):
    "Linked folders are read, and a loop ends"
    for i in range(3): pic(tmp_path/'far'/f'id{i}'/'0.png', i)
    (tmp_path/'set').mkdir()
    (tmp_path/'set/near').symlink_to(tmp_path/'far')
    (tmp_path/'far/back').symlink_to(tmp_path/'set')
    assert sorted(from_folder(tmp_path/'set', test_frac=0.).train.pid_name)==['near/id0','near/id1','near/id2']

def test_pictures_in_memory_and_boxes(tmp_path):
    im = np.random.default_rng(0).integers(0, 255, (40,30,3), dtype=np.uint8)
    Image.fromarray(im).save(tmp_path/'f.png')
    df = pd.DataFrame(dict(image=[im, Image.fromarray(im), (tmp_path/'f.png').read_bytes(), None], path=['a','b','c',str(tmp_path/'f.png')]))
    ps = TableImages(df)
    assert all(np.array_equal(hwc(ps[i]), im) for i in range(4)) and len(ps)==4
    boxed = TableImages(df.assign(x=2, y=[3,3,3,-4], w=10, h=[5,5,100,9]))
    assert [tuple(boxed[i].shape) for i in range(4)]==[(3,5,10),(3,5,10),(3,37,10),(3,5,10)]
    assert np.array_equal(hwc(boxed[1]), im[3:8,2:12])
    assert image_keys(df.assign(path='same', x=[1,1,2,2], y=0, w=1, h=1)).nunique()==2
    data = from_df(df[['image']].assign(pid=[0,0,1,1]), test_frac=.5)
    assert TableImages(data.train)[0].shape==(3,40,30)

@pytest.mark.parametrize('box', [dict(w=0), dict(w=-3), dict(x=None), dict(h='tall'), dict(y=float('inf'))])
def test_bad_boxes(box):
    df = pd.DataFrame(dict(path=['a','b'], x=1, y=1, w=5, h=5)).astype(object)
    for k,v in box.items(): df.loc[1,k] = v
    with pytest.raises(ValueError, match='1 boxes are no boxes, first in row 1'): TableImages(df)

def test_bad_picture_names_the_row_in_memory():
    with pytest.raises(ValueError, match='cannot read the image row 7'): TableImages(pd.DataFrame(dict(path=['row 7'], image=[b'nonsense'])))[0]

def test_market_counts_are_compared(tmp_path):
    "Under the benchmark's own name a difference is a warning with both numbers; under another name nothing is compared"
    import warnings
    for root in ('Market-1501-v15.09.15','mine'):
        for o in ('bounding_box_train','query','bounding_box_test'): pic(tmp_path/root/o/'0005_c3s1_000001_00.jpg')
    with pytest.warns(UserWarning, match=r'train: .* are \(1, 1, 1\), published are \(751, 12936, 6\)'): data = market1501(tmp_path)
    assert 'not as published' in data.notes[-1]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        market1501(tmp_path/'mine')

def test_market_distractors(tmp_path):
    for o in ('bounding_box_train','query','bounding_box_test'): pic(tmp_path/o/'0005_c3s1_000001_00.jpg')
    with pytest.raises(FileNotFoundError, match='images'): market1501(tmp_path, distractors=True)
    for i in range(3): pic(tmp_path/'images'/f'{i:08d}.jpg')
    data = market1501(tmp_path, distractors=True)
    assert data.gallery.pid.tolist()==[5,-1,-1,-1] and data.summary().distractors.tolist()==[0,0,3]

@pytest.mark.parametrize('pid', [-5, '-5', -2.5, '-7.0', np.uint64(2**63+5), '-12'])
def test_negative_pids(pid):
    with pytest.raises(ValueError, match=f'pid {pid}: expected -1'): from_df(pd.DataFrame(dict(path=['a','b'], pid=[1,pid])))

@pytest.mark.parametrize('minus', [-1, '-1', '-1.0', -1.])
def test_distractors_in_any_form(minus):
    df = pd.DataFrame(dict(path=list('abcde'), pid=pd.Series(['x','x','y','y',minus], dtype=object)))
    assert from_df(df, test_frac=1.).gallery.pid.min()==-1

def test_strangers_do_not_choose_cameras():
    "The cameras of distractors neither make queries impossible nor the protocol stricter"
    df = pd.DataFrame(dict(path=[f'{i}' for i in range(12)], pid=[0,1,2]*4, camid=0))
    more = pd.concat([df, pd.DataFrame(dict(path=['s','t'], pid=-1, camid=1))], ignore_index=True)
    data = from_df(more, test_frac=1.)
    assert len(data.query)==3 and data.protocol=='no_camera'

def test_no_query_is_said():
    df = pd.DataFrame(dict(path=list('abcdef'), pid=[0,1,2,3,4,5], camid=[0,0,1,1,2,2]))
    data = from_df(df, test_frac=1.)
    assert not len(data.query) and 'no query could be made' in data.notes[-1]

def test_cols_refuses_and_reuses():
    df = pd.DataFrame(dict(file=list('abcd'), who=list('xxyy')))
    with pytest.raises(ValueError, match=r"cols has \['cam'\]: expected some of"): from_df(df, cols=dict(path='file', pid='who', cam='who'))
    data = from_df(df, cols=dict(path='file', pid='who', trackid='who'), test_frac=0.)
    assert data.train.trackid.tolist()==[0,0,1,1]

def test_empty_path():
    with pytest.raises(ValueError, match='path is missing in 1 rows, first in row 1'): from_df(pd.DataFrame(dict(path=['a',None], pid=[1,2])))

def test_image_column_of_names_or_pictures(tmp_path):
    "A column `image` with file names is `path`; pictures in memory get names of their own whatever the index"
    for i in range(4): pic(tmp_path/f'{i}.png', i)
    (tmp_path/'a.csv').write_text('image,pid\n' + ''.join(f'{i}.png,{i//2}\n' for i in range(4)))
    assert TableImages(from_csv(tmp_path/'a.csv', test_frac=0.).train)[3].shape==(3,32,16)
    df = pd.DataFrame(dict(image=[np.zeros((4,4), np.uint8)]*2, pid=[0,1]))
    assert from_df(pd.concat([df,df]), test_frac=0.).train.path.is_unique

def test_archives_rewritten_broken_and_nested(tmp_path):
    import zipfile
    def write(f, n):
        f.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(f, 'w') as z:
            for i in range(n): z.writestr(f'id{i}/0.png', (tmp_path/'0.png').read_bytes())
    pic(tmp_path/'0.png')
    write(tmp_path/'s.zip', 2)
    assert len(from_folder(tmp_path/'s.zip', test_frac=0.).train)==2
    write(tmp_path/'s.zip', 3)
    train = from_folder(tmp_path/'s.zip', test_frac=0.).train
    assert len(train)==3 and TableImages(train)[2].shape==(3,32,16)
    write(tmp_path/'f.zip'/'s.zip', 1)
    assert TableImages(from_folder(tmp_path/'f.zip'/'s.zip', test_frac=0.).train)[0].shape==(3,32,16)
    (tmp_path/'half.zip').write_bytes((tmp_path/'s.zip').read_bytes()[:50])
    for f in ('half.zip','0.png'):
        with pytest.raises(ValueError, match='is no zip archive, or a broken one'): from_folder(tmp_path/f)

def test_market_folder_is_no_folder_of_identities(tmp_path):
    for o in ('bounding_box_train','query','bounding_box_test'): pic(tmp_path/o/'x.jpg')
    with pytest.raises(ValueError, match='read it with market1501'): from_folder(tmp_path)
