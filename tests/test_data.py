"Readers, splits and bad input of 00_data"
import numpy as np, pandas as pd, pytest
from PIL import Image
from fastreid_nb.data import ReIDData, from_csv, from_df, from_folder, market1501, matchable, open_image, split_query_gallery, to_rgb

def pic(path, seed=0, mode='RGB', size=(16,32), **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1],size[0],3), dtype=np.uint8)).convert(mode).save(path, **kwargs)

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
    data = from_folder(tmp_path/'my set (1) c1_c2', test_frac=.4).check(progress=False)
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

def test_transparency_is_black():
    im = Image.new('RGBA', (4,4), (255,255,255,0))
    assert np.asarray(to_rgb(im)).max()==0

def test_unreadable(tmp_path):
    "All bad files in one error, or skipped and counted"
    for i in range(4):
        for j in range(3): pic(tmp_path/f'id{i}'/f'{j}.jpg', i*3+j)
    whole = (tmp_path/'id0/0.jpg').read_bytes()
    (tmp_path/'id0/0.jpg').write_bytes(whole[:len(whole)//2])
    (tmp_path/'id1/1.jpg').write_bytes(b'')
    (tmp_path/'id2/2.jpg').write_text('not a picture')
    data = from_folder(tmp_path, test_frac=.5)
    with pytest.raises(ValueError) as e: data.check(progress=False)
    assert all(o in str(e.value) for o in ('3 unreadable', 'id0', 'id1', 'id2', 'skip_bad'))
    ok = data.check(skip_bad=True, progress=False)
    assert sum(map(len, ok.splits.values()))==9 and '3 unreadable pictures skipped' in ok.notes[-1]

def test_check_tables():
    rows = lambda pid,cam: pd.DataFrame(dict(path=[f'{p}_{c}' for p,c in zip(pid,cam)], pid=pid, camid=cam, dsetid='x'))
    one = ReIDData('one', rows([1,1],[0,1]), rows([2],[0]), rows([2,2],[1,2]))
    from fastreid_nb.data import _table_problems
    assert 'train has 1 identity' in _table_problems(one)[0][0]
    lonely = ReIDData('lonely', rows([1,2],[0,1]), rows([3,4],[0,0]), rows([3,5],[0,1]))
    assert 'none of 2 queries has a match' in _table_problems(lonely)[0][0]
    assert 'one picture' in _table_problems(lonely)[1][0]
    half = ReIDData('half', rows([1,1,2,2],[0,1,0,1]), rows([3,4],[0,0]), rows([3,5],[1,1]))
    assert _table_problems(half)==([], ['1 of 2 queries have no match in the gallery and will be dropped'])
    twice = ReIDData('twice', pd.concat([half.train]*2), half.query, half.gallery)
    assert 'lists 4 files twice' in _table_problems(twice)[0][0]

@pytest.mark.parametrize('seed', range(5))
def test_add_and_holdout(seed):
    "Joined sets share no identity and no camera; a holdout is disjoint and deterministic"
    rng = np.random.default_rng(seed)
    a,b,c = (from_df(table(rng, 10, 3, 80), name=o, seed=seed) for o in 'abc')
    j = a+b+c
    assert j.train.pid.nunique()==sum(o.train.pid.nunique() for o in (a,b,c)) and j.query.equals(a.query)
    assert j.train.groupby('pid').dsetid.nunique().max()==1 and j.train.groupby('camid').dsetid.nunique().max()==1
    h = j.holdout(.3, seed=seed)
    assert not set(h.train.pid) & set(h.gallery.pid) and h.query.equals(j.holdout(.3, seed=seed).query)

def test_market_names(tmp_path):
    "Cameras of two digits, other endings, names that say nothing, and a folder without training pictures"
    for o in ('query/0003_c10s1_000001_00.png', 'bounding_box_test/0003_c2s1_000001_00.JPG', 'bounding_box_test/thumbs.jpg'): pic(tmp_path/o)
    data = market1501(tmp_path)
    assert data.query.camid.tolist()==[9] and len(data.gallery)==1 and len(data.train)==0
    assert data.notes==['1 pictures of gallery have other names and were passed over', 'no bounding_box_train: there is nothing to train on']

def test_query_and_gallery_folders_alone(tmp_path):
    for s in ('query','gallery'):
        for i in range(3): pic(tmp_path/s/f'id{i}'/f'{s}.png')
    assert from_folder(tmp_path).summary().images.tolist()==[0,3,3]

def test_hidden_and_nested_folders(tmp_path):
    for i in range(4):
        for c in range(2): pic(tmp_path/f'id{i}'/f'cam{c}'/'a.png')
    pic(tmp_path/'.cache'/'x.png')
    data = from_folder(tmp_path)
    assert sum(map(len, data.splits.values()))==8 and "'id0/cam0' is taken for one identity" in ' '.join(data.notes).replace('id1','id0').replace('id2','id0').replace('id3','id0').replace('cam1','cam0')

def test_small_integers_do_not_wrap():
    t = lambda: pd.DataFrame(dict(path=[str(i) for i in range(400)], pid=np.arange(400, dtype=np.uint16)//2, camid=np.arange(400, dtype=np.uint8)%2, dsetid='x'))
    parts = lambda: (t()[:200], t()[200:300], t()[300:])
    small = [ReIDData('x', *(o.astype(dict(pid='uint8')) for o in parts())) for _ in range(2)]
    assert (small[0]+small[1]).train.pid.nunique()==200

def test_tables_need_whole_numbers():
    df = pd.DataFrame(dict(path=['a'], pid=['rex'], camid=[0], dsetid='x'))
    with pytest.raises(ValueError, match="pid.*expected whole numbers; from_df"): ReIDData('x', df, df, df)

def test_identity_leak_is_noted():
    df = pd.DataFrame(dict(path=list('abcdef'), pid=[1,1,2,2,2,2], camid=[0,1]*3, split=['train']*3+['query','gallery','gallery']))
    from fastreid_nb.data import _table_problems
    assert '1 identities are in training and in the test, first 2' in _table_problems(from_df(df))[1][-1]

def test_same_file_is_no_match():
    "Without cameras a query that is itself in the gallery is not found by finding itself"
    df = pd.DataFrame(dict(path=['a','b'], pid=[1,2], camid=0, dsetid='x'))
    assert not matchable(ReIDData('x', df, df, df)).any()
