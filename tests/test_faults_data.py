"Faults that users ran into with tables, files, folders and images: the right value, or a message that helps"
import html, os, shutil, signal, warnings, zipfile
import numpy as np, pandas as pd, pytest, torch
from contextlib import contextmanager
from pathlib import Path
from PIL import Image
from fastreid_nb.all import *
from fastreid_nb.data import doctor # the methods; chkstyle: ignore
from fastreid_nb.data.copies import unreadable
from fastreid_nb.data.core import match_names, matchable, visible
from fastreid_nb.data.images import image_exts, jpeg_size, list_images, open_image

@contextmanager
def within(seconds):
    "A hang is a failure"
    def ring(*_): raise TimeoutError(f'not done in {seconds} s')
    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try: yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)

def pic(path, size=(32,64), **kwargs):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    Image.fromarray(rng.integers(0, 255, (size[1],size[0],3), dtype=np.uint8)).save(path, **kwargs)
    return path

def names(data): return sorted(set(pd.concat(data.splits.values()).pid_name))
def rows(data): return pd.concat(data.splits.values(), ignore_index=True)
def said(data, text): return any(text in o for o in data.notes)

## 5, G39: CSV files

table_text = 'path,pid\nZoé_1.png,007\nAna_1.png,7\n'
forms = dict(commas=(table_text, 'utf-8'), semicolons=(table_text.replace(',', ';'), 'utf-8'), tabs=(table_text.replace(',', '\t'), 'utf-16'),
    bars=(table_text.replace(',', '|'), 'utf-16-le'), spaces=(table_text.replace(',', ', '), 'utf-8'), bom=(table_text, 'utf-8-sig'),
    excel=('sep=;\r\n'+table_text.replace(',', ';').replace('\n', '\r\n'), 'utf-8'), blanks=(table_text.replace(',', ' ,'), 'utf-8'),
    old_mac=(table_text.replace('\n', '\r'), 'utf-8'), single_blanks=(table_text.replace(',', ' '), 'utf-8'))

@pytest.mark.parametrize('form', forms)
def test_csv_forms(tmp_path, form):
    text,encoding = forms[form]
    (tmp_path/'a.csv').write_bytes(text.encode(encoding))
    data = from_csv(tmp_path/'a.csv', test_frac=0.)
    assert [Path(o).name for o in data.train.path]==['Zoé_1.png','Ana_1.png'] and data.train.pid_name.tolist()==['007','7']

@pytest.mark.parametrize('encoding', ['cp1252', 'latin-1'])
def test_csv_in_another_encoding(tmp_path, encoding):
    (tmp_path/'a.csv').write_bytes(table_text.encode(encoding))
    with pytest.raises(ValueError, match='is not in utf-8 .*save it as "CSV UTF-8", or say what it is, such as encoding="cp1252"'): from_csv(tmp_path/'a.csv')
    assert names(from_csv(tmp_path/'a.csv', encoding=encoding, test_frac=0.))==['007','7']
    with pytest.raises(ValueError, match='is not in klingon'): from_csv(tmp_path/'a.csv', encoding='klingon')

def test_csv_that_is_none(tmp_path):
    f = tmp_path/'a.csv'
    for text,msg in {'a.jpg,1\nb.jpg,2\n':'has no header, its first line is .*write one above, such as path,pid',
            'path,pid,pid\na,1,2\n':"two columns are called 'pid'", 'path,pid\na.jpg,1,2\n':'no readable CSV file with the columns',
            '  \n':'is empty'}.items():
        f.write_text(text)
        with pytest.raises(ValueError, match=msg): from_csv(f)
    for raw,msg in {b'PK\3\4rest':'an Excel workbook', b'PAR1':'a Parquet file', b'\x1f\x8b\x08':'compressed'}.items():
        f.write_bytes(raw)
        with pytest.raises(ValueError, match=msg): from_csv(f)

def test_advice_names_the_likely_column(tmp_path):
    (tmp_path/'metadata.csv').write_text('image_id,identity,path\n1,a,b.jpg\n')
    with pytest.raises(ValueError, match=r"cols=dict\(pid='identity'\), or rename the columns"): from_csv(tmp_path/'metadata.csv')
    with pytest.raises(ValueError, match=r"cols=dict\(path='File Name'\)"): from_df(pd.DataFrame({'File Name':['a'], 'pid':[1]}))

## 6: boxes and unknown identities

boxes = [
    (dict(bbox='[10, 20, 40, 60]'), (60,40)), (dict(bbox='10 20 40 60'), (60,40)), (dict(bbox='(10.0, 20.0, np.float64(40.0), 60)'), (60,40)),
    (dict(BBox='[10, 20, 40, 60]'), (60,40)), (dict(bbox_xyxy='[10, 20, 40, 60]'), (40,30)),
    (dict(x=10, y=20, width=40, height=60), (60,40)), (dict(bbox_x=10, bbox_y=20, bbox_w=40, bbox_h=60), (60,40)),
    (dict(x_1=10, y_1=20, x_2=40, y_2=60), (40,30)), (dict(xmin=10, ymin=20, xmax=40, ymax=60), (40,30)), (dict(x0=10, y0=20, x1=40, y1=60), (40,30)),
    (dict(Left=10, Top=20, Right=40, Bottom=60), (40,30)), (dict(xmin=10, ymin=20, w=40, h=60), (60,40)),
    (dict(x_center=30, y_center=50, width=40, height=60), (60,40)), (dict(cx=30, cy=50, w=40, h=60), (60,40)), (dict(X=10, Y=20, W=40, H=60), (60,40))]

@pytest.mark.parametrize('columns,size', boxes, ids=lambda o: '-'.join(o) if isinstance(o, dict) else '')
def test_boxes_in_any_form(tmp_path, columns, size):
    pic(tmp_path/'f.png', (200,100))
    df = pd.DataFrame(dict(path='f.png', pid=[1,1,2,2], split='train')).assign(**columns)
    data = from_df(df, tmp_path)
    assert tuple(TableImages(data.train)[0].shape)==(3,*size) and said(data, 'boxes: ')

def test_boxes_as_lists_and_under_another_name(tmp_path):
    pic(tmp_path/'f.png', (200,100))
    df = pd.DataFrame(dict(path='f.png', pid=[1,1,2,2], split='train'))
    for box in ([10,20,40,60], np.array([10,20,40,60]), (10,20,40,60), dict(x=10, y=20, w=40, h=60)):
        assert TableImages(from_df(df.assign(bbox=[box]*4), tmp_path).train)[0].shape==(3,60,40)
    named = from_df(df.assign(det=['[10,20,40,60]']*3+[None]), tmp_path, cols=dict(bbox='det')).train
    assert [tuple(o.shape) for o in TableImages(named)]==[(3,60,40)]*3+[(3,100,200)]

@pytest.mark.parametrize('columns,cols', [
    (dict(x=1, y=2, w=3), {}), (dict(x=1), {}), (dict(h=1, w=2), {}), (dict(xmin=1, ymin=2, xmax=3), {}), (dict(bbox='[1, 2, 3]'), {}),
    (dict(bbox='none of them'), {}), (dict(bbox='[1,2,3,4]'), dict(x='bbox')), (dict(bbox='[1,2,3,4]'), dict.fromkeys('xywh', 'bbox')),
    (dict(x='a', y='b', w='c', h='d'), {}), (dict(x1='a', y1=1, x2=2, y2=3), {}), (dict(x=1e12, y=0, w=5, h=5), {})])
def test_partial_boxes_raise(columns, cols):
    df = pd.DataFrame(dict(path='f.png', pid=[1,1,2,2])).assign(**columns)
    with pytest.raises(ValueError, match='part of a box|expected four numbers|expected all of x, y, w, h|hold text|are no boxes'):
        TableImages(from_df(df, cols=cols, test_frac=0.).train)

def test_what_may_be_a_box_is_named():
    df = pd.DataFrame(dict(path='f.png', pid=[1,1,2,2]))
    assert said(from_df(df.assign(left=1, top=2)), "columns ['left', 'top'] look like a part of a box and are not used")
    assert not said(from_df(df.assign(width=640, height=480)), 'box')   # sizes of images

@pytest.mark.parametrize('nobody', ['unknown', 'Unknown', ' UNKNOWN ', 'unidentified', 'new_whale', '?', 'distractor'])
def test_unknown_is_nobody_in_particular(nobody):
    df = pd.DataFrame(dict(path=[f'{i}.png' for i in range(8)], pid=['a','a','b','b',nobody,nobody,'c','c']))
    data = from_df(df, test_frac=.5)
    assert rows(data).pid[rows(data).pid_name==nobody].unique().tolist()==[-1] and said(data, 'is nobody in particular: -1 in 2 rows')
    assert nobody not in set(data.train.pid_name)

def test_who_may_be_nobody_is_asked_about(tmp_path):
    df = pd.DataFrame(dict(path=[f'{i}.png' for i in range(8)], pid=['a','a','b','b','unknown_3','unknown_3','NA','NA']))
    data = from_df(df)
    assert 'NA' in names(data) and said(data, "is taken for one of that name: write -1")
    for o in ('ada/0.jpg','bob/0.jpg','unknown/0.jpg'): pic(tmp_path/o)
    assert rows(from_folder(tmp_path, test_frac=1.)).pid.min()==-1
    cam = from_df(df.assign(camid=['x','y']*3+['unknown']*2), test_frac=1.)
    assert rows(cam).camid.min()==-1 and said(cam, "camid 'unknown'")

## 7: files, folders and names

def test_every_ending_that_is_read(tmp_path):
    for end,form in dict(jpg='JPEG', jfif='JPEG', jpe='JPEG', JPG='JPEG', mpo='JPEG', pgm=None, jp2='JPEG2000', webp='WEBP', tga=None, qoi=None).items():
        for i in (0,1): pic(tmp_path/'e'/end/f'{i}.{end}', **(dict(format=form) if form else {}))
    if '.avif' in image_exts: pic(tmp_path/'e/avif/0.avif')
    for o in ('a.txt','b.cr2','c.CR2','noending'): (tmp_path/'e/jpg'/o).write_text('x')
    data = from_folder(tmp_path/'e', test_frac=0.)
    assert len(names(data))==10+('.avif' in image_exts)
    assert said(data, '4 files are no images by their endings: 2 .cr2, 1 .txt, 1 without an ending')
    assert not said(data.check(progress=False), 'unreadable')


def laid(root, part, ids, cams=(1,2)):
    for p in ids:
        for c in cams: pic(root/part/p/f'{p}_c{c}s1_{len(part)}.jpg')

def test_prepared_layout(tmp_path):
    "That of prepare.py in Person_reID_baseline_pytorch: queries are not trained on, train_all holds train and val"
    for part,ids in dict(train=['0002'], val=['0002'], train_all=['0002','0007'], query=['0005','0006'], gallery=['0005','0006'], **{'multi-query':['0005']}).items(): laid(tmp_path, part, ids)
    data = from_folder(tmp_path)
    assert names(data)==['0002','0005','0006','0007'] and set(data.train.pid_name)=={'0002','0007'} and data.protocol=='market'
    assert said(data, 'were passed over: multi-query, train, val') and data.summary().images.tolist()==[4,4,4]
    shutil.rmtree(tmp_path/'train_all')
    (tmp_path/'montage.jpg').write_bytes((tmp_path/'val/0002/0002_c1s1_3.jpg').read_bytes())
    data = from_folder(tmp_path)
    assert set(data.train.pid_name)=={'0002'} and said(data, 'montage.jpg, multi-query, val')

def test_splits_in_capitals_and_other_words(tmp_path):
    for part in ('Train','Validation'): laid(tmp_path, part, ['0001' if part=='Train' else '0003'])
    data = from_folder(tmp_path)
    assert set(data.train.pid_name)=={'0001'} and set(data.gallery.pid_name)=={'0003'}
    assert len(from_df(pd.DataFrame(dict(path=list('abcd'), pid=[1,1,2,2], split=['Train','Train','Test','Test']))).train)==2

def test_names_in_identity_folders_give_cameras(tmp_path):
    for part,ids in dict(train=('0002','0007'), query=('0005','0006'), gallery=('0005','0006')).items(): laid(tmp_path, part, ids)
    assert from_folder(tmp_path).protocol=='market'
    pic(tmp_path/'train/0002/extra.jpg')
    data = from_folder(tmp_path)
    assert data.protocol=='no_camera' and said(data, '12 of 13 names tell a camera')

def test_backslashes(tmp_path):
    pic(tmp_path/'i'/'a.png')
    (tmp_path/'t.csv').write_text('path,pid\n' + ''.join(f'i\\a.png,{p}\n' for p in (1,2,3)))
    assert TableImages(from_csv(tmp_path/'t.csv', test_frac=0.).train)[2].shape==(3,64,32)
    by_hand = pd.DataFrame(dict(path=[f'{tmp_path}\\i\\a.png'], pid=1, camid=0, dsetid='x'))
    assert TableImages(by_hand)[0].shape==(3,64,32)
    pic(tmp_path/'real\\name.png', (8,8))
    assert TableImages(from_df(pd.DataFrame(dict(path=['real\\name.png'], pid=[1])), tmp_path, test_frac=0.).train)[0].shape==(3,8,8)
    with zipfile.ZipFile(tmp_path/'w.zip', 'w') as z:
        for i in 'ab': z.writestr(f'{i}\\0.png', (tmp_path/'i/a.png').read_bytes())
    data = from_folder(tmp_path/'w.zip', test_frac=0.)
    assert names(data)==['a','b'] and TableImages(data.train)[1].shape==(3,64,32)

def test_loose_image_beside_folders(tmp_path):
    for i in 'abcd': pic(tmp_path/i/'0.jpg')
    pic(tmp_path/'loose.jpg')
    with pytest.raises(ValueError, match='1 images lie beside the folders of identities in .*first loose.jpg: move'): from_folder(tmp_path)

def test_folder_that_may_not_be_opened(tmp_path, monkeypatch):
    for i in 'abcd': pic(tmp_path/i/'0.jpg')
    scandir = os.scandir
    def closed(path='.'):
        if str(path).rstrip('/').endswith(os.sep+'b'): raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', closed)
    with pytest.raises(PermissionError, match='cannot look into the folder .*b.* .Permission denied'): from_folder(tmp_path)

def test_absolute_members(tmp_path):
    pic(tmp_path/'secret.jpg', (40,80))
    raw = pic(tmp_path/'m.jpg').read_bytes()
    with zipfile.ZipFile(tmp_path/'abs.zip', 'w') as z:
        for o in (str(tmp_path/'secret.jpg'), 'a/0.jpg', 'b/0.jpg', 'c/0.jpg'): z.writestr(o, raw)
    assert {tuple(o.shape) for o in TableImages(from_folder(tmp_path/'abs.zip', test_frac=0.).train)}=={(3,64,32)}
    (tmp_path/'t.csv').write_text(f'path,pid\n{tmp_path}/secret.jpg,1\na/0.jpg,2\n')
    assert TableImages(from_csv(tmp_path/'t.csv', tmp_path/'abs.zip', test_frac=0.).train)[0].shape==(3,64,32)

## 8: a protocol that leaves queries

def test_every_identity_at_one_camera(tmp_path):
    for s,seq in enumerate(('MOT17-02','MOT17-04')):
        for p in range(4):
            for i in range(4): pic(tmp_path/f'{p+4*s:04d}_{seq}_{i}.png', (8,8))
    rx = r'(?P<pid>\d+)_(?P<camid>MOT17-\d+)'
    for protocol in (None,'no_camera'):
        data = from_folder(tmp_path, regex=rx, protocol=protocol)
        assert len(data.query)==2 and data.protocol=='no_camera' and matchable(data).all()
    assert said(from_folder(tmp_path, regex=rx), 'every identity was seen by one camera only')
    held = ReIDData('x', data.train, data.query, data.gallery, 'market').holdout(.5)
    assert held.protocol=='no_camera' and matchable(held).all() and said(held, 'seen by one camera only')

def test_given_queries_of_the_same_camera():
    df = pd.DataFrame(dict(path=list('abcd'), pid=[0,0,1,1], camid=[0,0,1,1], split=['query','gallery']*2))
    data = from_df(df)
    assert data.protocol=='no_camera' and matchable(data).all() and said(data, 'one camera only')
    tracks = from_df(df.assign(trackid=[0,1,2,3]))
    assert tracks.protocol=='tracklet' and matchable(tracks).all()

def test_one_identity_in_the_test_is_noted():
    df = pd.DataFrame(dict(path=[f'{i}' for i in range(6)], pid=[0,0,1,1,2,2]))
    assert said(from_df(df, test_frac=.34), 'the test shows one identity only') and not said(from_df(df, test_frac=.67), 'one identity only')

## 9: codes made in two calls

def two_calls(cams=True):
    q = pd.DataFrame(dict(path=['q1','q2'], pid=['bo','cy'], camid=['lobby','gate']))
    g = pd.DataFrame(dict(path=['g0','g1','g2','g3'], pid=['al','bo','cy','bo'], camid=['yard','gate','lobby','lobby']))
    return [from_df(o if cams else o.drop(columns='camid'), test_frac=1., protocol='leave_one_out').gallery for o in (q,g)]

perfect = torch.tensor([[.9,.1,.8,.2],[.9,.8,.1,.7]])

def test_codes_of_two_calls():
    q,g = two_calls()
    with pytest.warns(UserWarning, match='numbered in separate calls'): assert rank_dist(perfect, q, g, 'market').mAP==1
    for protocol in (None,'market','no_camera'):
        data = ReIDData('x', q[:0], q, g, protocol)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert rank_dist(perfect, data.query, data.gallery, data.protocol).mAP==1
        assert said(data, 'pid of query and gallery was numbered in separate calls')

def test_cameras_of_two_calls_are_two_cameras():
    "Camera 0 of one call is the lobby, of the other the gate: nothing is removed"
    q,g = (from_df(pd.DataFrame(dict(path=[k], pid=['bo'], camid=[k])), test_frac=1., protocol='leave_one_out').query for k in ('lobby','gate'))
    with pytest.warns(UserWarning, match='camid of query and gallery'): res = rank_dist(torch.zeros(1,1), q, g)
    assert res.mAP==1 and res.n_removed==0 and res.protocol=='market'
    tracks = [from_df(pd.DataFrame(dict(path=[k], pid=['bo'], trackid=[k])), test_frac=1., protocol='leave_one_out').query for k in ('t1','t2')]
    with pytest.warns(UserWarning, match='trackid'): assert rank_dist(torch.zeros(1,1), *tracks).n_removed==0

def test_numbers_and_their_text_are_one_name():
    q = from_df(pd.DataFrame(dict(path=['a','b'], pid=[5,7])), test_frac=1., protocol='leave_one_out').query
    g = from_df(pd.DataFrame(dict(path=['c','d'], pid=['5','7'])), test_frac=1., protocol='leave_one_out').query
    with pytest.warns(UserWarning, match='separate calls'): assert rank_dist(torch.tensor([[0.,1],[1,0]]), q, g, 'no_camera').mAP==1

def test_training_of_another_call():
    a = from_df(pd.DataFrame(dict(path=list('abcd'), pid=['al','al','bo','bo'])), test_frac=0.)
    b = from_df(pd.DataFrame(dict(path=list('efgh'), pid=['cy','cy','al','al'])), test_frac=1.)
    data = ReIDData('x', a.train, b.query, b.gallery)
    code = dict(zip(rows(data).pid_name, rows(data).pid))
    assert len(set(code.values()))==3 and (rows(data).pid==rows(data).pid_name.map(code)).all() and said(data, 'training and test')

def test_right_codes_are_left_alone():
    df = pd.DataFrame(dict(path=[f'{i}' for i in range(12)], pid=list('abcabcabcabc'), camid=list('xyxyxyxyyxyx')))
    data = from_df(df, test_frac=1.)
    q,g,told = match_names(data.query, data.gallery)
    assert q is data.query and g is data.gallery and not told
    assert match_names(data.query.assign(pid_name=None), data.gallery)[2]==[]

## 12: published sets

def market(root, cams, first=1):
    for part,ids in dict(bounding_box_train=(1,2), query=(3,4), bounding_box_test=(3,4)).items():
        for p in ids:
            for c in cams: pic(root/part/f'{p:04d}_c{c}s1_{first:06d}_00.jpg', (8,8))
    return root

def test_cameras_from_zero(tmp_path):
    a,b = market1501(market(tmp_path/'a', (1,2)), 'x'),market1501(market(tmp_path/'b', (0,1)), 'x')
    assert a.protocol==b.protocol=='market' and a.query.camid.tolist()==b.query.camid.tolist() and said(b, 'cameras are counted from 0')
    assert said(market1501(market(tmp_path/'c', (1,)), 'x'), 'protocol no_camera')

def test_counts_of_copies_in_circulation():
    for reader,counts in {sysu_mm01:(510,30071,4), pes3d:(193,1012,1), saivt:(152,7150,8), shinpuhkan:(24,4501,8), prai1581:(1580,39481,None)}.items():
        assert counts in reader.row.counts['train'] and len(reader.row.counts['train'])==2
    assert '401999' in airport_alert.__doc__

def test_msmt17_without_validation_list(tmp_path):
    root = tmp_path/'MSMT17_V1'
    for part,lists in dict(train=['train'], test=['query','gallery']).items():
        for k in lists:
            lines = []
            for p in (0,1):
                name = f'{p:04d}/{p:04d}_{len(k):03d}_01_0303morning_0015_0.jpg'
                pic(root/part/name, (8,8))
                lines.append(f'{name} {p}')
            (root/f'list_{k}.txt').write_text('\n'.join(lines))
    assert len(msmt17(root, val=False, check=False).train)==2
    with pytest.raises(FileNotFoundError, match='list_val.txt'): msmt17(root, check=False)

def test_vehicleid_draw_does_not_depend_on_the_order_of_the_list(tmp_path):
    draws = []
    for k,step in enumerate((1,-1)):
        root = tmp_path/str(k)/'VehicleID_V1.0'
        for i in range(8): pic(root/f'image/{i:07d}.jpg', (8,8))
        (root/'train_test_split').mkdir()
        (root/'train_test_split/train_list.txt').write_text('0000000 1\n0000001 1')
        (root/'train_test_split/test_list_800.txt').write_text('\n'.join([f'{i:07d} {2+i%2}' for i in range(2, 8)][::step]))
        draws.append(sorted(Path(o).name for o in vehicleid(root, check=False).gallery.path))
    assert draws[0]==draws[1]

def test_a_folder_is_walked_once(tmp_path, monkeypatch):
    "Two lists of one folder do not list it twice"
    from fastreid_nb.data import readers
    n = []
    monkeypatch.setattr(readers, 'list_files', lambda o: n.append(o) or list_images(o))
    root = tmp_path/'Stanford_Online_Products'
    pic(root/'a/1.JPG', format='jpeg')
    for k in ('train','test'): (root/f'Ebay_{k}.txt').write_text('1 1 1 a/1.JPG')
    sop(root, check=False)
    assert len(n)==1

## 13: things that are no images, and too large ones

def strange(root, kind):
    f = root/'a'/'1.jpg'
    if kind=='pipe': os.mkfifo(f)
    if kind=='device': f.symlink_to('/dev/zero')
    if kind=='link to a pipe':
        os.mkfifo(root/'p')
        f.symlink_to(root/'p')
    if kind=='folder': f.mkdir()
    if kind=='sparse':
        with f.open('wb') as o: o.truncate(3*2**30)
    return str(f)

@pytest.mark.parametrize('kind', ['pipe', 'device', 'link to a pipe', 'folder', 'sparse'])
def test_no_regular_files(tmp_path, kind):
    "Every path that reads says so at once"
    for o in ('a/0.jpg','a/2.jpg','b/0.jpg','b/1.jpg'): pic(tmp_path/o)
    f = strange(tmp_path, kind)
    df = pd.DataFrame(dict(path=[str(tmp_path/o) for o in ('a/0.jpg','a/2.jpg','b/0.jpg','b/1.jpg')]+[f], pid=[0,0,1,1,0], camid=0, dsetid='x'))
    data = ReIDData('x', df, df[:2], df)
    msg = 'cannot read the image .*1.jpg: .*(not a regular file|3,221,225,472 bytes, more than)'
    model = reid_model(resnet18, 2).eval()
    with within(60):
        for read in (lambda: read_image(f), lambda: open_image(f), lambda: data.check(progress=False),
                lambda: Preproc((64,32)).load(f), lambda: embed(model, f),
                lambda: list(plain_dl(df, Preproc((64,32)), num_workers=0)), lambda: floor_scores(data), lambda: color_hist(f)):
            with pytest.raises(ValueError, match=msg): read()
        assert list(unreadable([f]))==[f] and any('unreadable' in o.what for o in data.doctor(progress=False).findings)
        assert len(data.check(skip_bad=True, progress=False).train)==4

def test_archive_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path/'b.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        with z.open('a/0.png', 'w', force_zip64=True) as o:
            for _ in range(300): o.write(bytes(2**20))
        for i in 'bc': z.writestr(f'{i}/0.png', pic(tmp_path/f'{i}.png').read_bytes())
    with within(20):
        with pytest.raises(ValueError, match='314,572,800 bytes, more than the 268,435,456 that are read; see max_bytes'): read_image(tmp_path/'b.zip/a/0.png')
        with pytest.raises(ValueError, match='1 unreadable images'): from_folder(tmp_path/'b.zip', test_frac=0.).check(progress=False)
    with pytest.raises(ValueError, match='more than the 100 that are read'): read_image(tmp_path/'b.png', max_bytes=100)
    with pytest.raises(ValueError, match='more than the 100 that are read'): TableImages(pd.DataFrame(dict(path=[str(tmp_path/'b.png')])), max_bytes=100)[0]

@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_size_is_looked_at_before_decoding(tmp_path, form, monkeypatch):
    f = pic(tmp_path/'big.jpg', (600,500), format=form)
    with pytest.raises(ValueError, match='600×500 pixels, more than the 200,000'): read_image(f, max_pixels=200_000)
    assert read_image(f, max_pixels=300_000).shape==(3,500,600)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100_000)
    monkeypatch.setattr(torch.ops.image, 'decode_jpeg', lambda *_: pytest.fail('decoded'))
    df = pd.DataFrame(dict(path=[str(f)]*2, pid=[0,1], camid=0, dsetid='x'))
    for read in (lambda: read_image(f), lambda: open_image(f), lambda: Preproc((64,32)).load(f), lambda: ReIDData('x', df, df, df).check(progress=False),
            lambda: list(plain_dl(df, Preproc((64,32)), num_workers=0))):
        with pytest.raises(ValueError, match='pixels'): read()

def test_jpeg_with_a_lie_in_its_header(tmp_path):
    "30,000 × 30,000 pixels are said, a few are there: no memory is asked for"
    raw = bytearray(pic(tmp_path/'a.jpg').read_bytes())
    at = raw.index(b'\xff\xc0')
    raw[at+5:at+9] = b'\x75\x30\x75\x30'
    assert jpeg_size(bytes(raw))==(30000,30000)
    with pytest.raises(ValueError, match='30000×30000 pixels, more than'): read_image(bytes(raw))

def test_pipes_that_are_called_otherwise(tmp_path):
    os.mkfifo(tmp_path/'set.zip')
    os.mkfifo(tmp_path/'t.csv')
    (tmp_path/'AirportALERT').mkdir()
    os.mkfifo(tmp_path/'AirportALERT/filepath.txt')
    with within(10):
        with pytest.raises(ValueError, match='no zip archive'): from_folder(tmp_path/'set.zip')
        with pytest.raises(FileNotFoundError, match='expected a CSV file'): from_csv(tmp_path/'t.csv')
        with pytest.raises(ValueError, match='not a regular file'): airport_alert(tmp_path)

@pytest.mark.parametrize('content', [b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 80\n%%EndComments\nshowpage\n%%EOF\n', b'%PDF-1.4\n'])
def test_no_program_is_started(tmp_path, monkeypatch, content):
    (tmp_path/'gs').write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 10 || echo "$@" > {tmp_path}/ran\n')
    (tmp_path/'gs').chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    (tmp_path/'e.jpg').write_bytes(content)
    for read in (open_image, read_image, Preproc((8,8)).load):
        with pytest.raises(ValueError, match='cannot read the image .*e.jpg: cannot identify'): read(tmp_path/'e.jpg')
    assert unreadable([tmp_path/'e.jpg']) and not (tmp_path/'ran').exists()

## 20, D12, D17 to D19: odd tables and images

def test_names_that_are_no_utf8(tmp_path):
    odd = os.fsdecode(b'a\xe9.jpg')
    for i in 'abc':
        for j in (0,1): pic(tmp_path/f'{i}_{j}.jpg', (8,8))
    os.rename(tmp_path/'a_0.jpg', tmp_path/odd)
    df = pd.DataFrame(dict(path=[odd,'a_1.jpg','b_0.jpg','b_1.jpg','c_0.jpg','c_1.jpg'], pid=[odd,odd,'b','b','c','c']))
    data = from_df(df, tmp_path, test_frac=0.)
    report = data.doctor(progress=False)
    report.to_csv(tmp_path/'r.csv')
    assert r'a\udce9' in (tmp_path/'r.csv').read_text() and '\udce9' not in repr(report)+repr(data)
    data.relabel(save=tmp_path/'map.csv')
    assert 'udce9' in (tmp_path/'map.csv').read_text() and read_image(data.train.path[0]).shape==(3,8,8)

def test_two_columns_of_one_name():
    df = pd.DataFrame([['a',1,2],['b',2,3]], columns=['path','pid','pid'])
    with pytest.raises(ValueError, match="two columns are called 'pid': rename or drop one"): from_df(df)
    full = pd.DataFrame([['a',1,2,0,'x']], columns=['path','pid','pid','camid','dsetid'])
    with pytest.raises(ValueError, match='two of them have one name'): ReIDData('x', full, full, full)

def test_no_root():
    assert from_df(pd.DataFrame(dict(path=['a','b'], pid=[1,2])), None, test_frac=0.).train.path.tolist()==['a','b']

@pytest.mark.parametrize('x', [np.full((8,4,3), np.nan), np.array([[.5,np.nan]]), torch.full((3,8,4), torch.nan), torch.tensor([[[.5,torch.nan]]])])
def test_nan_images(x):
    model = reid_model(resnet18, 2).eval()
    for read in (read_image, Preproc((64,32)).load, lambda o: embed(model, o)):
        with pytest.raises(ValueError, match='holds NaN'): read(x)
    with pytest.raises(ValueError, match='holds NaN'): TableImages(pd.DataFrame(dict(path=['a'], image=[x])))[0]

@pytest.mark.parametrize('x', [np.zeros((0,4,3), np.uint8), np.zeros((4,0)), torch.zeros(3,0,4)])
def test_empty_images(x):
    with pytest.raises(ValueError, match='one pixel or more'): read_image(x)

def test_values_of_a_byte_in_more_bits(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (64,32))
    x[0,0] = 255
    for k,a in dict(u16=x.astype('uint16'), i32=x.astype('int32'), f32=(x/255).astype('float32'), f255=x.astype('float32')).items():
        p = tmp_path/f'd_{k}.{"png" if k=="u16" else "tif"}'
        Image.fromarray(a).save(p)
        assert np.array_equal(read_image(p)[0], x), k
    for k,a in dict(u16=(x*257).astype('uint16'), i32=(x*257).astype('int32'), f32=(x*257).astype('float32')).items():
        Image.fromarray(a).save(tmp_path/'w.tif')
        assert np.array_equal(read_image(tmp_path/'w.tif')[0], x), k
    for bad in (np.nan, -1., np.inf, 1e12):
        Image.fromarray(np.float32([[.5,bad]])).save(tmp_path/'bad.tif')
        with pytest.raises(ValueError, match='bad.tif: values'): read_image(tmp_path/'bad.tif')

def test_names_that_look_alike(tmp_path):
    (tmp_path/'i.csv').write_text('path,pid\n'+''.join(f'{i}.jpg,{i//2}{".0"*(i%2)}\n' for i in range(8)))
    data = from_csv(tmp_path/'i.csv', test_frac=0.)
    assert data.train.pid.nunique()==8 and said(data, "pid '0' and '0.0' are taken for two; 4 names differ in such details")
    for pids in (['7',' 7','a','b'], ['Anna','anna','a','b'], ['007','7','a','b']):
        assert said(from_df(pd.DataFrame(dict(path=list('abcd'), pid=pids))), 'are taken for two')

def test_path_and_image_columns(tmp_path):
    pic(tmp_path/'g.jpg')
    (tmp_path/'im.csv').write_text('path,pid,image\n'+''.join(f'g.jpg,{i},g.jpg\n' for i in 'abcd'))
    data = from_csv(tmp_path/'im.csv', test_frac=0.)
    assert TableImages(data.train)[0].shape==(3,64,32) and said(data, 'path is used') and 'image' not in data.train
    with pytest.raises(FileNotFoundError, match='no image gone.jpg'): TableImages(pd.DataFrame(dict(path=['here.jpg'], image=['gone.jpg'])))[0]

def test_copies_are_found_whatever_a_column_is_called(tmp_path):
    for i in 'abcd': pic(tmp_path/f'{i}.jpg')
    df = pd.DataFrame(dict(path=[f'{i}.jpg' for i in 'aabbcd'], pid=[0,0,1,1,2,3], copy=1))
    data = from_df(df, tmp_path, test_frac=0.)
    assert 'copy' not in data.train and 'copy_given' in data.train
    for o in (data, ReIDData('x', data.train.assign(copy=1), data.query, data.gallery)):
        with pytest.raises(ValueError, match='2 files listed twice'): o.check(progress=False)

def test_damage_inside_a_jpeg(tmp_path):
    a = np.random.default_rng(3).integers(0, 255, (8,4,3), dtype='uint8')
    for i in range(4): Image.fromarray(np.roll(a, i, 0)).resize((200,400), Image.BILINEAR).save(tmp_path/f'{i}.jpg', quality=92)
    b = bytearray((tmp_path/'0.jpg').read_bytes())
    k = len(b)*2//3
    b[k:k+40] = bytes((o*7+3)%250 for o in range(40))
    (tmp_path/'0.jpg').write_bytes(b)
    df = pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(4)], pid=[0,0,1,1]))
    for workers in (1,2):
        found = from_df(df, tmp_path, test_frac=0.).doctor(progress=False, n_workers=workers).findings
        hurt = [o for o in found if 'damaged inside' in o.what]
        assert len(hurt)==1 and [Path(o).name for o in hurt[0].rows.path]==['0.jpg']

## G35 to G38: what is shown

def test_names_are_no_html():
    evil = '<img src=x onerror=alert(1)>'
    data = from_df(pd.DataFrame(dict(path=['x']*8, pid=[0,0,1,1,2,2,3,3])), name=evil)
    data.notes.append(evil)
    assert evil not in data._repr_html_() and html.escape(evil) in data._repr_html_()

def test_control_characters_are_spelt_out(tmp_path):
    evil = '\x1b]0;PWNED\x07\x1b[31mred'
    for i in 'bc':
        for j in '01': pic(tmp_path/i/f'{j}.jpg')
    (tmp_path/'b'/f'{evil}.jpg').write_text('x')
    pic(tmp_path/evil/'0.jpg')
    (tmp_path/f'{evil}.dat').write_text('x')
    data = from_folder(tmp_path, name=evil)
    shown = repr(data)+data._repr_html_()+'\n'.join(data.notes)
    report = data.doctor(progress=False)
    shown += repr(report)+report._repr_html_()+'\n'.join(data.check(skip_bad=True, progress=False).notes)
    for read in (lambda: data.check(progress=False), lambda: read_image(tmp_path/'b'/f'{evil}.jpg'), lambda: read_image(f'{evil}.jpg')):
        with pytest.raises((ValueError,FileNotFoundError)) as e: read()
        shown += str(e.value)
    assert '\x1b' not in shown and '\x07' not in shown and r'\x1b[31mred' in shown
    assert visible('Ünïcode ★ 日本')=='Ünïcode ★ 日本'

def test_a_wrong_root_is_told_in_a_few_lines(tmp_path):
    (tmp_path/'ms.csv').write_text('path,pid\n'+''.join(f'n/{i}.jpg,{i//4}\n' for i in range(2000)))
    with pytest.raises(ValueError) as e: from_csv(tmp_path/'ms.csv').check(progress=False)
    text = str(e.value)
    assert text.count('\n')<8 and '2000 unreadable images' in text and 'and 1997 more' in text and 'is the root right?' in text
