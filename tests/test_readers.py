"Readers of 00d_data.readers and 00j_data.catalogue, each on a miniature tree of true file names"
import os, shutil, warnings
from inspect import isfunction, signature
from pathlib import Path
import numpy as np, pandas as pd, pytest, scipy.io
from PIL import Image
from fastreid_nb.data import catalogue as C, readers as R
from fastreid_nb.data.core import ReIDData, as_protocol, matchable
from fastreid_nb.data.images import image_exts
from fastreid_nb.data.readers import market1501
from slow import slow_but

def mat(**kwargs): return lambda f: scipy.io.savemat(f, kwargs)

def annos(**cols):
    "The struct array of the Cars-196 .mat files"
    rows = list(zip(*cols.values()))
    return mat(annotations=np.array(rows, dtype=[(k,object) for k in cols]))

def text(*lines): return lambda f: f.write_bytes('\n'.join(lines).encode())

def market_tree(train, query, gallery, dirs=('bounding_box_train','query','bounding_box_test')):
    return [f'{d}/{o}' for d,os in zip(dirs, (train,query,gallery)) for o in os.split()]

def listed(*lists, **kw):
    "Lists as text files, from (name, lines)"
    return {k:text(*v) for k,v in lists}

cuhk03_names = [f'1_{p:03d}_{v}_{n:02d}.png' for p in (1,2,3) for v,n in ((1,1),(1,2),(2,6))]
cuhk03_files = lambda kind: {**dict.fromkeys(f'images_{kind}/{o}' for o in cuhk03_names),
    f'cuhk03_new_protocol_config_{kind}.mat':mat(filelist=np.array([[o] for o in cuhk03_names], dtype=object),
        labels=np.repeat([1,2,3], 3)[:,None], train_idx=[[1],[2],[3]], query_idx=[[4],[7]], gallery_idx=[[5],[6],[8],[9]])}
cuhk03_says = dict(train='0:0 0:0 0:1', query='1:0 2:0', gallery='1:0 1:1 2:0 2:1')
vehicle_list = lambda ids: text(*(f'{i:07d} {v}' for i,v in ids))
vehicle_files = {**dict.fromkeys(f'image/{i:07d}.jpg' for i in range(9)), 'train_test_split/train_list.txt':vehicle_list([(0,7),(1,7),(2,9)]),
    **{f'train_test_split/test_list_{n}.txt':vehicle_list([(i,i//3+20) for i in range(3, 9)]) for n in (800,1600,2400)}}
wild_files = {**dict.fromkeys(f'images/{o}.jpg' for o in ('00001/000001','00001/000002','00002/000003','00002/000004')),
    'train_test_split/vehicle_info.txt':text('id/image;Camera ID;Time;Model;Type;Color', '00001/000001;10;noon;;;', '00001/000002;9;x;;;',
        '00002/000003;10;x;;;', '00002/000004;174;x;;;'), 'train_test_split/train_list.txt':text('00001/000001', '00001/000002'),
    **{f'train_test_split/test_{n}{q}.txt':text(o) for n in (3000,5000,10000) for q,o in (('_query','00002/000003'),('','00002/000004'))}}
cub_files = [f'images/{p:03d}.Some_Bird/Some_Bird_{i:04d}_{p}.jpg' for p in (1,100,101,200) for i in (1,2)]
loo = dict(query='101:0 101:0 200:0 200:0', gallery='101:0 101:0 200:0 200:0')
partial = dict(query='1:0 1:0 60:0', gallery='1:1 60:1')
lost = lambda d: f'{d}/-1_c1s1_000401_03.jpg'
msmt = lambda a,b: {f'{a}/0000/0000_000_01_0303morning_0015_0.jpg':None, f'{a}/0007/0007_000_15_0303noon_0001_0.jpg':None,
    f'{b}/0000/0000_001_14_0302afternoon_1233_2.jpg':None, f'{b}/0000/0000_002_02_0302morning_0001_1.jpg':None,
    'list_train.txt':text('0000/0000_000_01_0303morning_0015_0.jpg 0'), 'list_val.txt':text('0007/0007_000_15_0303noon_0001_0.jpg 7'),
    'list_query.txt':text('0000/0000_001_14_0302afternoon_1233_2.jpg 0'), 'list_gallery.txt':text('0000/0000_002_02_0302morning_0001_1.jpg 0', '')}

class Tree:
    "What one reader should make of a small tree: `says` holds 'pid:camid' of each row of each split, `needs` what cannot be left out"
    def __init__(self, folder, files, says, needs, protocol='market', notes=0, call=None, **kwargs):
        self.folder,self.files,self.needs,self.protocol,self.notes,self.call = folder,files,needs.split(),protocol,notes,call
        self.says,self.kwargs = dict(train='', query='', gallery='') | says,kwargs

    def make(self, root, backwards=False):
        files = list((self.files if isinstance(self.files, dict) else dict.fromkeys(self.files)).items())
        for k,write in files[::-1] if backwards else files:
            f = root/self.folder/k
            f.parent.mkdir(parents=True, exist_ok=True)
            f.touch() if write is None else write(f)
        return root/self.folder

TREES = dict(
    dukemtmc=Tree('DukeMTMC-reID', market_tree('0001_c2_f0046182.jpg 0007_c8_f0000001.jpg', '0005_c2_f0046985.jpg', '0005_c5_f0051341.jpg 0002_c1_f0044158.jpg')
        + ['bounding_box_train/._0001_c2_f0046182.jpg', 'query/Thumbs.db', 'query/readme.png'], dict(train='1:1 7:7', query='5:1', gallery='2:0 5:4'),
        'bounding_box_train query bounding_box_test', notes=1),
    occluded_duke=Tree('Occluded_Duke', market_tree('0001_c2_f0046182.jpg', '0005_c2_f0046985.jpg', '0005_c5_f0051341.jpg'),
        dict(train='1:1', query='5:1', gallery='5:4'), 'bounding_box_train query bounding_box_test'),
    msmt17=Tree('MSMT17_V1', msmt('train','test'), dict(train='0:0 7:14', query='8:13', gallery='8:1'), 'train test list_train.txt list_val.txt list_query.txt list_gallery.txt'),
    msmt17_v2=Tree('MSMT17_V2', msmt('mask_train_v2','mask_test_v2'), dict(train='0:0 7:14', query='8:13', gallery='8:1'),
        'mask_train_v2 mask_test_v2 list_query.txt', call='msmt17'),
    msmt17_no_val=Tree('MSMT17', msmt('train','test'), dict(train='0:0', query='8:13', gallery='8:1'), 'train', call='msmt17', val=False),
    cuhk03=Tree('cuhk03', cuhk03_files('detected'), cuhk03_says, 'images_detected cuhk03_new_protocol_config_detected.mat'),
    cuhk03_labelled=Tree('cuhk03', cuhk03_files('labeled'), cuhk03_says, 'images_labeled', call='cuhk03', labelled=True),
    cuhk03_np=Tree('cuhk03-np', [f'{k}/{o}' for k in ('detected','labeled') for o in market_tree('0003_c1_1.png', '0007_c2_6.png', '0007_c1_2.png 0009_c2_7.png')],
        dict(train='3:0', query='7:1', gallery='7:0 9:1'), 'detected'),
    veri776=Tree('VeRi', market_tree('0001_c001_00016450_0.jpg 0776_c020_00016450_0.jpg', '0002_c002_00030600_0.jpg', '0002_c019_00030600_0.jpg -1_c001_1_0.jpg',
        ('image_train','image_query','image_test')), dict(train='1:0 776:19', query='2:1', gallery='2:18'), 'image_train image_query image_test', notes=1),
    vehicleid=Tree('VehicleID_V1.0', vehicle_files, dict(train='7:0 7:0 9:0'), 'image train_test_split/train_list.txt train_test_split/test_list_800.txt',
        protocol='no_camera'),
    veriwild=Tree('VERI-Wild', wild_files, dict(train='1:1 1:0', query='2:1', gallery='2:2'),
        'images train_test_split/vehicle_info.txt train_test_split/train_list.txt train_test_split/test_3000.txt train_test_split/test_3000_query.txt'),
    partial_reid=Tree('Partial_REID', [f'partial_body_images/{o}.jpg' for o in ('001_001','001_002','060_005')] + [f'whole_body_images/{o}.jpg' for o in ('001_001','060_005')],
        partial, 'partial_body_images whole_body_images', protocol='no_camera'),
    partial_ilids=Tree('Partial_iLIDS', [f'Probe/{o}.jpg' for o in ('001','119')] + [f'Gallery/{o}.jpg' for o in ('001','119')],
        dict(query='1:0 119:0', gallery='1:1 119:1'), 'Probe Gallery', protocol='no_camera'),
    partial_ilids_fastreid=Tree('PartialiLIDS', ['query/001_1.jpg', 'gallery/001_2.jpg'], dict(query='1:0', gallery='1:1'), 'query gallery', protocol='no_camera',
        call='partial_ilids'),
    occluded_reid=Tree('Occluded_REID', [f'{d}_body_images/{p:03d}/{p:03d}_01.tif' for d in ('occluded','whole') for p in (1,200)],
        dict(query='1:0 200:0', gallery='1:1 200:1'), 'occluded_body_images whole_body_images', protocol='no_camera'),
    occluded_reid_fastreid=Tree('OccludedREID', [f'{d}/{p:03d}_01.jpg' for d in ('query','gallery') for p in (1,200)],
        dict(query='1:0 200:0', gallery='1:1 200:1'), 'query gallery', protocol='no_camera', call='occluded_reid'),
    p_dukemtmc=Tree('P-DukeMTMC-reid', [f'{s}/{d}_body_images/{p:04d}/{p:04d}_c{c}_f0046182.jpg' for s,p in (('train',1),('test',2)) for c,d in ((5,'occluded'),(6,'whole'))],
        dict(train='1:0 1:1', query='2:0', gallery='2:1'), 'train/occluded_body_images train/whole_body_images test/occluded_body_images test/whole_body_images', protocol='no_camera'),
    black_reid=Tree('Black-reID', ['train/b_0001_c1s1.jpg', 'train/0001_c2s1.jpg', 'query/b_0001_c1s1.jpg', 'gallery/b_0001_c3s1.png', 'gallery/0044_c3s1.png'],
        dict(train='0:1 1:0', query='3:0', gallery='46:2 3:2'), 'train query gallery'),
    cuhk_sysu=Tree('cuhk_sysu', ['cropped_images/p11422_s16929_1.jpg', 'cropped_images/p7_s1_1.jpg', 'cropped_images/p7_s2_2.jpg'], dict(train='11422:0 7:0 7:0'),
        'cropped_images', protocol='no_camera', notes=1),
    airport_alert=Tree('AirportALERT', {'cam1/11001/a b.jpg':None, 'cam2/11001/2.jpg':None, 'cam2/10999/3.jpg':None,
        'filepath.txt':text('cam1\\11001\\a b.jpg\r', 'cam2\\11001\\2.jpg\r', 'cam2\\10999\\3.jpg\r')}, dict(train='11001:0 11001:1'), 'filepath.txt', notes=2),
    ilids_vid=Tree('i-LIDS-VID', ['sequences/cam1/person001/cam1_person001_00317.png', 'sequences/cam2/person001/cam2_person001_00001.png',
        'sequences/cam2/person300/cam2_person300_00001.png', 'images/cam1/person001/cam1_person001.png'], dict(train='0:0 0:1 1:1'), '', notes=1),
    ilids_vid_fastreid=Tree('iLIDS', ['person001/cam1_person001_00317.png', 'person002/cam2_person002_00317.png'], dict(train='0:0 1:1'), '', notes=1, call='ilids_vid'),
    pku_reid=Tree('PKUv1a_128x48', ['1_1_1.png', '1_2_8.png', '114_2_3.png'], dict(train='114:1 1:0 1:1'), '', notes=1),
    prai1581=Tree('PRAI-1581', ['images/0001_1_0001.jpg', 'images/1581_2.jpg'], dict(train='1:0 1581:1'), 'images', notes=1),
    prid2011=Tree('prid_2011', ['multi_shot/cam_a/person_0001/0001.png', 'multi_shot/cam_b/person_0001/0002.png', 'multi_shot/cam_b/person_0201/0001.png',
        'single_shot/cam_a/person_0001.png'], dict(train='1:0 1:1'), 'multi_shot', notes=2),
    prid2011_fastreid=Tree('prid_2011', ['slim_train/x/person_0001/a_1.png', 'slim_train/x/person_0200/b_1.png'], dict(train='1:0 200:1'), 'slim_train', notes=1, call='prid2011'),
    qmul_grid=Tree('underground_reid', ['probe/0001_1_25008_169_19_94_246.jpeg', 'gallery/0001_8_25023_116_69_80_181.jpeg', 'gallery/0000_2_00010_96_75_120_305.jpeg'],
        dict(train='1:1 1:0'), '', notes=2),
    saivt=Tree('SAIVT-SoftBio', ['cropped_images/001/0001-0045-C3-0001.jpeg', 'cropped_images/152/0001-0045-C8.jpeg'], dict(train='1:0 152:1'), 'cropped_images', notes=1),
    sensereid=Tree('SenseReID', ['test_probe/00001_0.jpg', 'test_gallery/00001_1.jpg', 'test_gallery/01717_1.jpg'], dict(train='1:0 1:1 1717:1'), 'test_probe test_gallery', notes=1),
    sysu_mm01=Tree('SYSU-MM01', ['cam1/0001/0001.jpg', 'cam5/0001/0002.jpg', 'cam3/0001/0001.jpg', 'cam6/0001/0001.jpg'], dict(train='1:0 1:4'), '', notes=2),
    thermalworld=Tree('thermalworld_rgb', ['1/0001.jpg', '409/0001.jpg'], dict(train='1:0 409:0'), '', protocol='no_camera', notes=1),
    pes3d=Tree('3DPeS', ['1/1_3_FRAME_25_RGB.bmp', '192/192_1_FRAME_9_RGB.bmp'], dict(train='1:0 192:0'), '', protocol='no_camera', notes=1),
    caviar4reid=Tree('CAVIARa', ['0001001.jpg', '0001020.jpg', '0072003.jpg'], dict(train='1:0 1:0 72:0'), '', protocol='no_camera', notes=1),
    viper=Tree('VIPeR', ['cam_a/000_45.bmp', 'cam_b/000_90.bmp', 'cam_b/872_180.bmp'], dict(train='0:0 0:1 872:1'), 'cam_a cam_b', notes=1),
    lpw=Tree('pep_256x128', ['scen1/view1/1/0001.jpg', 'scen1/view2/1/0001.jpg', 'scen2/view1/1/0001.jpg', 'scen2/view1/2/0001.jpg'],
        dict(train='0:0 0:1 1:2 2:2'), '', notes=1),
    lpw_slim=Tree('pep_256x128', ['data_slim/scen1/view1/1/0001.jpg', 'data_slim/scen3/view1/1/0001.jpg'], dict(train='0:0 1:1'), '', notes=1, call='lpw'),
    shinpuhkan=Tree('shinpuhkan', ['001/001_001_04_0001.jpg', '001/001_001_16_0001.jpg', '024/024_002_04.jpg'], dict(train='1:0 1:1 24:0'), '', notes=1),
    wildtrack=Tree('Wildtrack_crop_dataset', ['crop/0/C1_00000000.png', 'crop/0/C7_00000005.png', 'crop/312/C7_00000005.png'], dict(train='0:0 0:1 312:1'), 'crop', notes=1),
    cub200=Tree('CUB_200_2011', cub_files, dict(train='1:0 1:0 100:0 100:0') | loo, 'images', protocol='leave_one_out'),
    cars196=Tree('Cars_196', {**dict.fromkeys(f'car_ims/{i:06d}.jpg' for i in range(1, 5)),
        'cars_annos.mat':annos(relative_im_path=[f'car_ims/{i:06d}.jpg' for i in range(1, 5)], bbox_x1=[1]*4, **{'class':[1,98,99,196]})},
        dict(train='1:0 98:0', query='99:0 196:0', gallery='99:0 196:0'), 'car_ims', protocol='leave_one_out'),
    cars196_two_folders=Tree('stanford_cars', {**dict.fromkeys(f'cars_{k}/{i:05d}.jpg' for k in ('train','test') for i in (1,2)),
        'devkit/cars_train_annos.mat':annos(fname=['00001.jpg','00002.jpg'], bbox_x1=[1,2], **{'class':[1,196]}),
        'cars_test_annos_withlabels.mat':annos(fname=['00001.jpg','00002.jpg'], bbox_x1=[1,2], **{'class':[98,99]})},
        dict(train='1:0 98:0', query='196:0 99:0', gallery='196:0 99:0'), 'cars_train cars_test cars_test_annos_withlabels.mat', protocol='leave_one_out', call='cars196'),
    sop=Tree('Stanford_Online_Products', {'bicycle_final/111085122871_0.JPG':None, 'bicycle_final/111085122871_1.JPG':None, 'chair_final/251952414262_0.JPG':None,
        'Ebay_train.txt':text('image_id class_id super_class_id path', '1 1 1 bicycle_final/111085122871_0.JPG', '2 1 1 bicycle_final/111085122871_1.JPG'),
        'Ebay_test.txt':text('image_id class_id super_class_id path', '59552 11319 3 chair_final/251952414262_0.JPG')},
        dict(train='1:0 1:0', query='11319:0', gallery='11319:0'), 'Ebay_train.txt Ebay_test.txt', protocol='leave_one_out'),
    inshop=Tree('In-shop Clothes Retrieval Benchmark', {**dict.fromkeys(f'Img/img/WOMEN/Dresses/id_0000000{p}/0{i}_1_front.jpg' for p in (1,2) for i in (1,2)),
        'Eval/list_eval_partition.txt':text('4', 'image_name item_id evaluation_status', 'img/WOMEN/Dresses/id_00000001/01_1_front.jpg    id_00000001 train',
            'img/WOMEN/Dresses/id_00000001/02_1_front.jpg    id_00000001 train', 'img/WOMEN/Dresses/id_00000002/01_1_front.jpg id_00000002 query',
            'img/WOMEN/Dresses/id_00000002/02_1_front.jpg id_00000002 gallery ')},
        dict(train='1:0 1:0', query='2:0', gallery='2:0'), 'Eval/list_eval_partition.txt Img', protocol='no_camera'))

each = pytest.mark.parametrize('name', TREES)
kinds = ('dukemtmc','msmt17','cuhk03','veri776','vehicleid','occluded_reid','airport_alert','prid2011','qmul_grid','sysu_mm01','viper','lpw','cub200','cars196','sop')
some = pytest.mark.parametrize('name', slow_but(TREES, *kinds)) # one of each way to write things down is fast

def reader(name): return getattr(C, name, None) or getattr(R, name)

def read(name, path, check=False):
    o = TREES[name]
    return reader(o.call or name)(path, check=check, **o.kwargs)

def says(df): return ' '.join(f'{p}:{c}' for p,c in zip(df.pid, df.camid))

def same(a, b): return all(a.splits[k].equals(b.splits[k]) for k in a.splits)

def moved(data, root):
    "Tables with paths relative to `root`"
    return {k:o.assign(path=[Path(p).relative_to(root).as_posix() for p in o.path]) for k,o in data.splits.items()}

## Every reader

@each
def test_says(tmp_path, name):
    "Identities and cameras of every row, the order of rows, the protocol, and files that exist"
    tree,root = TREES[name],TREES[name].make(tmp_path)
    data = read(name, root)
    if name!='vehicleid': assert {k:says(o) for k,o in data.splits.items()}==tree.says
    else: assert says(data.train)==tree.says['train']
    assert str(data.protocol)==tree.protocol and len(data.notes)==tree.notes+(not len(data.train)), data.notes
    rows = pd.concat(data.splits.values())
    assert all(Path(o).is_file() for o in rows.path) and set(rows.dsetid)=={data.name}
    assert (data.train.pid>=0).all() and not set(data.train.pid) & (set(data.query.pid) | set(data.gallery.pid))
    assert not set(data.train.path) & (set(data.query.path) | set(data.gallery.path))
    if 'pid_name' in rows: assert (rows.groupby('pid').pid_name.nunique()==1).all()

@some
def test_root_or_parent(tmp_path, name):
    "The folder itself or the one above, as text or path, below folders that look like names or patterns"
    odd = tmp_path/'exp1_c2 [x]*(1)+'/'Ünï ★ 0099_c9s1_b'
    root = TREES[name].make(odd)
    a = read(name, root)
    assert same(a, read(name, odd)) and same(a, read(name, str(root)+os.sep))
    plain = read(name, TREES[name].make(tmp_path/'plain'))
    assert all(o.equals(moved(plain, tmp_path/'plain'/TREES[name].folder)[k]) for k,o in moved(a, root).items())

@some
def test_relative_path(tmp_path, monkeypatch, name):
    "Called from within the folder"
    root = TREES[name].make(tmp_path)
    a = read(name, root)
    monkeypatch.chdir(root)
    assert [says(o) for o in read(name, '.').splits.values()]==[says(o) for o in a.splits.values()]

class Shuffled:
    "os.scandir in an order of its own"
    scandir = os.scandir
    def __init__(self, path='.'): self.it = iter(sorted(Shuffled.scandir(path), key=lambda o: o.name[::-1], reverse=True))
    def __enter__(self): return self
    def __exit__(self, *_): self.close()
    def __iter__(self): return self
    def __next__(self): return next(self.it)
    def close(self): pass

@some
def test_order_on_disk(tmp_path, monkeypatch, name):
    "Neither the order in which files were made nor that in which they are listed changes anything"
    a = moved(read(name, TREES[name].make(tmp_path/'a')), tmp_path/'a'/TREES[name].folder)
    root = TREES[name].make(tmp_path/'b', backwards=True)
    monkeypatch.setattr(os, 'scandir', Shuffled)
    b = moved(read(name, root), root)
    assert all(a[k].equals(b[k]) for k in a)

@pytest.mark.parametrize('name,part', [(k,o) for k,v in TREES.items() for o in v.needs])
def test_missing_part(tmp_path, name, part):
    "What is missing is named, and where it was looked for"
    root = TREES[name].make(tmp_path)
    shutil.rmtree(root/part) if (root/part).is_dir() else (root/part).unlink()
    with pytest.raises(FileNotFoundError) as e: read(name, root)
    assert part in str(e.value) and str(root) in str(e.value)

@each
def test_missing_folder(tmp_path, name):
    "Without the folder nothing else is read in its place, and all names it may have are told"
    for o in ('7/0001_c1s1_000451_03.jpg', '7/8/9_9_9.png', '0001001.jpg'):
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/o).touch()
    for path in (tmp_path, tmp_path/'nowhere'):
        with pytest.raises(FileNotFoundError) as e: read(name, path)
        assert 'not found in' in str(e.value) and str(path/TREES[name].folder) in str(e.value)

@some
def test_counts_are_compared(tmp_path, name):
    "A tree of a few files is not what was published: one warning with both numbers, which is kept as a note"
    data,root = read(name, TREES[name].make(tmp_path)),tmp_path/TREES[name].folder
    with pytest.warns(UserWarning, match='is not as published') as found: checked = read(name, root, check=True)
    assert len(found)==1 and found[0].filename==__file__
    assert same(data, checked) and set(data.notes)<set(checked.notes)
    for o in set(checked.notes)-set(data.notes): assert 'published are' in o and o in str(found[0].message)

@each
def test_empty_folders(tmp_path, name):
    "Pictures gone, folders and lists still there: an error that tells what was expected"
    root = TREES[name].make(tmp_path)
    pictures = [o for o in root.rglob('*') if o.suffix.lower() in image_exts]
    for o in pictures: o.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match='such as|are not in|were not found'): read(name, root)

def test_every_reader_is_tested():
    "Every public function that reads has a tree, and a row in the overview"
    fs = {k:f for room in (R,C) for k in room.__all__ if isfunction(f := getattr(room, k)) and 'path' in signature(f).parameters}
    assert fs.keys()=={'market1501', *(o.call or k for k,o in TREES.items())} and len(fs)>=35
    assert fs.keys()=={o.split('(')[0] for o in C.benchmarks.index} | {'cuhk03_np'}
    assert fs.pop('market1501')
    assert all([*signature(f).parameters][-1]=='check' and f.__doc__ and f.__name__==k for k,f in fs.items())

## Rows

sources = [(b.name, k, s) for b in C._calls.values() for k,s in b.sources]

@pytest.mark.parametrize('name,split,source', sources, ids=lambda o: o if isinstance(o, str) else '')
def test_example_is_in_the_grammar(name, split, source):
    "The name given as example can be read, also the one in the docstring"
    said = source.read(source.eg.replace('\\', '/'))
    assert said and said['path'] and said.get('pid') and -1 not in source.keep

def test_overview():
    "Published numbers that everybody knows, and a protocol that exists"
    b = C.benchmarks
    assert b.index.is_unique and b.kind.isin(['person','vehicle','retrieval']).all()
    for o in b.protocol: as_protocol(o)
    images = b[['train images','query images','gallery images']]
    for call,want in {'market1501(path)':(12936,3368,15913), 'dukemtmc(path)':(16522,2228,17661), 'msmt17(path)':(32621,11659,82161),
            'cuhk03(path)':(7365,1400,5332), 'cuhk03(path, labelled=True)':(7368,1400,5328), "vehicleid(path, 'small')":(113346,5693,800),
            "vehicleid(path, 'large')":(113346,17377,2400), "veriwild(path, 'small')":(277797,3000,38861), "veriwild(path, 'large')":(277797,10000,128517),
            'occluded_duke(path)':(15618,2210,17661), 'p_dukemtmc(path)':(12927,2163,9053)}.items(): assert tuple(images.loc[call])==want, call
    both = b.loc[['cub200(path)','cars196(path)','sop(path)'], ['train images','query images']].sum(axis=1)
    assert both.tolist()==[11788,16185,120053]   # all pictures of these sets

def test_market_counts(tmp_path):
    "Market-1501 is a row, and its reader adds to what the row alone gives"
    market = C._calls['market1501(path)']
    for o in ('bounding_box_train/0002_c1s1_000451_03.jpg', 'query/0001_c1s1_001051_00.jpg', 'bounding_box_test/0001_c2s1_000301_00.jpg',
              'bounding_box_test/0000_c1s1_000151_01.jpg', 'bounding_box_test/-1_c1s1_000401_03.jpg'):
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/o).touch()
    data = market1501(tmp_path)
    diff = R.count_differences(data, market.counts)
    assert len(diff)==3 and 'gallery: (identities, images, cameras) are (1, 2, 2), published are (750, 15913, 6)' in diff
    rows = pd.concat([R.read_rows(tmp_path, s)[0].assign(split=k) for k,s in market.sources])
    assert rows.split.value_counts().to_dict()==dict(train=1, query=1, gallery=2)

@pytest.mark.parametrize('want,n', [((1,2,2),0), ((None,2,None),0), ([(9,9,9),(1,2,2)],0), ((1,3,2),1), ([(1,2,1),(2,2,2)],1)])
def test_count_differences(want, n):
    df = pd.DataFrame(dict(path=['a','b'], pid=[3,-1], camid=[0,1], dsetid='x'))
    assert len(R.count_differences(ReIDData('x', df.iloc[:0], df, df), dict(gallery=want)))==n

def test_row_of_ones_own(tmp_path):
    s = R.FileSource('all', r'(?P<camid>\w+) (?P<pid>\w+)/\d\.jpg', 'garden rex/1.jpg')
    f = R.benchmark_reader(R.Benchmark('cats', 'Cats', 2024, 'cats', dict(train=s), dict(train=(2,3,2))))
    for o in ('all/garden rex/1.jpg', 'all/garden rex/2.jpg', 'all/door ada/1.jpg'):
        (tmp_path/'cats'/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'cats'/o).touch()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = f(tmp_path)
    assert says(data.train)=='0:0 1:1 1:1' and data.train.pid_name.tolist()==['ada','rex','rex']
    assert f.__name__=='cats' and 'garden rex/1.jpg is identity rex, camera garden' in f.__doc__

def test_symbolic_links(tmp_path):
    "A link to a folder of the set is followed, a link that leads back is not"
    root = TREES['viper'].make(tmp_path)
    (root/'cam_b').rename(tmp_path/'elsewhere')
    (root/'cam_b').symlink_to(tmp_path/'elsewhere', target_is_directory=True)
    (root/'cam_a/loop').symlink_to(root, target_is_directory=True)
    assert says(C.viper(root, check=False).train)==TREES['viper'].says['train']

## Lists

def test_listed_pictures_must_exist(tmp_path):
    root = TREES['sop'].make(tmp_path)
    (root/'bicycle_final/111085122871_1.JPG').unlink()
    with pytest.raises(FileNotFoundError, match=r'1 of 2 images of .*Ebay_train.txt are not in .*first bicycle_final/111085122871_1.JPG'): C.sop(root, check=False)

def test_list_with_bom_and_crlf(tmp_path):
    root = TREES['msmt17'].make(tmp_path)
    for f in root.glob('list_*.txt'): f.write_bytes(b'\xef\xbb\xbf' + f.read_bytes().replace(b'\n', b'\r\n') + b'\r\n\r\n')
    assert says(R.msmt17(root, check=False).train)==TREES['msmt17'].says['train']

def test_list_of_another_kind(tmp_path):
    root = TREES['msmt17'].make(tmp_path)
    (root/'list_query.txt').write_text('path,pid\na.jpg,1\n')
    with pytest.raises(ValueError, match='none of 2 names in .*list_query.txt has the expected form, such as 0000/'): R.msmt17(root, check=False)

def test_msmt17_version(tmp_path):
    "Version 1 is preferred, and each can be had by its own folder"
    for k in ('msmt17','msmt17_v2'): TREES[k].make(tmp_path)
    assert 'MSMT17_V1' in R.msmt17(tmp_path, check=False).query.path[0]
    assert 'mask_test_v2' in R.msmt17(tmp_path/'MSMT17_V2', check=False).query.path[0]

@pytest.mark.parametrize('size', ['small','medium','large'])
def test_vehicleid(tmp_path, size):
    "One gallery picture of each vehicle, all others ask; the seed decides which"
    root = TREES['vehicleid'].make(tmp_path)
    get = lambda seed: C.vehicleid(root, size, seed, check=False)
    a = get(0)
    assert a.name==f'vehicleid_{size}' and sorted(a.gallery.pid)==[21,22] and len(a.query)==4 and matchable(a).all()
    assert set(a.query.path).isdisjoint(a.gallery.path) and same(a, get(0))
    assert len({tuple(get(i).gallery.path) for i in range(20)})>3

def test_sizes(tmp_path):
    root = TREES['veriwild'].make(tmp_path)
    for o in ('small','medium','large'): assert C.veriwild(root, o, check=False).name==f'veriwild_{o}'
    for f in (C.vehicleid, C.veriwild):
        with pytest.raises(ValueError, match="size 'tiny': expected one of small, medium, large"): f(root, 'tiny')

def test_veriwild_camera_missing(tmp_path):
    root = TREES['veriwild'].make(tmp_path)
    (root/'train_test_split/vehicle_info.txt').write_text('id/image;Camera ID\n00001/000001;1\n')
    with pytest.raises(ValueError, match='has no camera for 3 images, first .*000002.jpg'): C.veriwild(root, check=False)

def test_veriwild_other_lists(tmp_path):
    "The lists of the second release have more columns and other names"
    root = TREES['veriwild'].make(tmp_path)
    d = root/'train_test_split'
    (d/'train_list.txt').rename(d/'train_list_start0.txt')
    (d/'train_list_start0.txt').write_text('00001/000001.jpg 0 5\n00001/000002.jpg 0 6\n')
    assert says(C.veriwild(root, check=False).train)==TREES['veriwild'].says['train']

## What readers elsewhere get wrong

def test_picture_number_is_no_camera(tmp_path):
    "Query 001_001 of Partial-REID can be answered by 001_001 of the gallery"
    data = R.partial_reid(TREES['partial_reid'].make(tmp_path), check=False)
    assert matchable(data).all()

def test_pairs_that_share_numbers(tmp_path):
    "GRID's passers-by and PRID's unmatched people are left out, and counted"
    assert '1 images in . were left out for their identity, first gallery/0000' in ' '.join(C.qmul_grid(TREES['qmul_grid'].make(tmp_path), check=False).notes)
    assert 'person_0201' in ' '.join(C.prid2011(TREES['prid2011'].make(tmp_path), check=False).notes)

def test_holdout_of_a_training_set(tmp_path):
    root = tmp_path/'VIPeR'
    for c in 'ab':
        (root/f'cam_{c}').mkdir(parents=True)
        for i in range(10): (root/f'cam_{c}/{i:03d}_45.bmp').touch()
    data = C.viper(root, check=False)
    assert data.protocol=='market' and len(data.query)==len(data.gallery)==0 and 'holdout' in data.notes[-1]

## CUHK03 from its .mat files

def cuhk03_mat(path, n=(3,2,1,1,1)):
    "A file laid out as cuhk-03.mat: pairs of cameras → people × 10 references to pictures, some empty; 20 test sets"
    h5py = pytest.importorskip('h5py')
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, 'w') as f:
        cell,count = f.create_group('#refs#'),iter(range(10**6))
        def ref(a): return cell.create_dataset(str(next(count)), data=a).ref
        def refs(a):
            out = np.empty(np.shape(a), dtype=object)
            for i,o in np.ndenumerate(np.asarray(a, dtype=object)): out[i] = o
            return cell.create_dataset(str(next(count)), data=out, dtype=h5py.ref_dtype).ref
        for kind,red in (('detected',10),('labeled',20)):
            def picture(i, p): return ref(np.array([red+i,0,0], np.uint8)[:,None,None].repeat(8+p, 1).repeat(16, 2) if i%5<2 else np.zeros(2, np.uint64))
            pairs = [refs([[picture(i, p) for p in range(m)] for i in range(10)]) for m in n]
            f.create_dataset(kind, data=np.array([pairs], dtype=object), dtype=h5py.ref_dtype)
        tests = [ref(np.array([[1,2],[1+s%3,1]], float)) for s in range(20)]
        f.create_dataset('testsets', data=np.array([tests], dtype=object), dtype=h5py.ref_dtype)

@pytest.mark.parametrize('labelled', [False,True])
def test_cuhk03_unpacks(tmp_path, labelled):
    "Pictures come out of the .mat file the right way round, under the known names, and only once"
    kind = 'labeled' if labelled else 'detected'
    root = tmp_path/'cuhk03'
    cuhk03_mat(root/'cuhk03_release/cuhk-03.mat')
    names = ['1_001_1_01.png','1_002_1_02.png','1_002_2_06.png']
    mat(filelist=np.array([[o] for o in names], dtype=object), train_idx=[[1]], query_idx=[[2]], gallery_idx=[[3]])(root/f'cuhk03_new_protocol_config_{kind}.mat')
    data = C.cuhk03(tmp_path, labelled, check=False)
    assert {k:says(o) for k,o in data.splits.items()}==dict(train='0:0', query='1:0', gallery='1:1')
    assert data.query.pid_name.tolist()==['1_002']
    pics = sorted(o.name for o in (root/f'images_{kind}').iterdir())
    assert len(pics)==8*4 and sorted(o.name for o in root.iterdir())==sorted(['cuhk03_release', f'images_{kind}', f'cuhk03_new_protocol_config_{kind}.mat'])
    im = Image.open(root/f'images_{kind}/1_003_2_07.png')
    assert im.size==(10,16) and im.getpixel((0,0))==((20 if labelled else 10)+6,0,0)
    shutil.rmtree(root/'cuhk03_release')
    assert same(data, C.cuhk03(tmp_path, labelled, check=False))

def test_cuhk03_classic(tmp_path):
    "Twenty splits; query and gallery are the same people, and the single-shot protocol applies"
    root = tmp_path/'cuhk03'
    cuhk03_mat(root/'cuhk-03.mat')
    data = [C.cuhk03(root, classic=True, split=i, check=False) for i in range(20)]
    for i,o in enumerate(data):
        assert str(o.protocol)=='cuhk03' and o.query.equals(o.gallery) and matchable(o).all()
        assert set(o.query.pid_name)=={f'1_{1+i%3:03d}','2_001'} and len(o.query)==8 and o.train.pid.nunique()==6
        assert not set(o.train.pid) & set(o.query.pid)
    for i in (-1,20):
        with pytest.raises(ValueError, match=f'split {i}: expected 0 to 19'): C.cuhk03(root, classic=True, split=i, check=False)
    with pytest.warns(UserWarning, match='published are .1367, None, 2'): C.cuhk03(root, classic=True)

def test_cuhk03_half_unpacked(tmp_path, monkeypatch):
    "A run killed while it unpacks leaves no folder that looks complete"
    root = tmp_path/'cuhk03'
    cuhk03_mat(root/'cuhk-03.mat')
    save,n = Image.Image.save,[]
    def broken(self, *args, **kwargs):
        n.append(1)
        if len(n)==5: raise KeyboardInterrupt
        return save(self, *args, **kwargs)
    monkeypatch.setattr(Image.Image, 'save', broken)
    with pytest.raises(KeyboardInterrupt): C.cuhk03(root, classic=True, check=False)
    assert not (root/'images_detected').exists()
    monkeypatch.setattr(Image.Image, 'save', save)
    assert len(C.cuhk03(root, classic=True, check=False).query)==8
    assert sorted(o.name for o in root.iterdir())==['cuhk-03.mat','images_detected']

def test_cuhk03_without_h5py(tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'h5py', None)
    (tmp_path/'cuhk03').mkdir()
    (tmp_path/'cuhk03/cuhk-03.mat').touch()
    with pytest.raises(ImportError, match=r'install h5py to read it \(pip install "fastreid-nb\[cuhk03\]"\)'): C.cuhk03(tmp_path, classic=True)

def test_cuhk03_config_names_a_picture_that_is_not_there(tmp_path):
    root = TREES['cuhk03'].make(tmp_path)
    (root/'images_detected/1_002_1_02.png').unlink()
    with pytest.raises(FileNotFoundError, match='1 images of .*config_detected.mat were not found, first 1_002_1_02.png'): C.cuhk03(root, check=False)

## Large trees

def test_many_files_are_read_fast(tmp_path):
    "The work per picture stays small: 4,000 names in a second or so"
    import time
    root = tmp_path/'pep_256x128'
    for s in range(2):
        for p in range(20):
            d = root/f'scen{s+1}/view1/{p}'
            d.mkdir(parents=True)
            for i in range(100): (d/f'{i:04d}.jpg').touch()
    t = time.perf_counter()
    data = C.lpw(root, check=False)
    assert len(data.train)==4000 and data.train.pid.nunique()==40 and time.perf_counter()-t<4

## Market-1501

def market_files(root, *extra):
    for o in ('bounding_box_train/0002_c1s1_000451_03.jpg', 'query/0001_c1s1_001051_00.jpg', 'bounding_box_test/0001_c2s1_000301_00.jpg',
            'bounding_box_test/0000_c1s1_000151_01.jpg', 'bounding_box_test/-1_c1s1_000401_03.jpg', *extra):
        (root/o).parent.mkdir(parents=True, exist_ok=True)
        (root/o).touch()
    return root

def test_market_says(tmp_path):
    "Strangers are distractors, junk goes without a note, other names with one; the tables hold the four columns and no more"
    data = market1501(market_files(tmp_path, 'query/sheet.jpg', 'query/._0001_c1s1_001051_00.jpg', 'query/Thumbs.db'), name='mine')
    assert {k:says(o) for k,o in data.splits.items()}==dict(train='2:0', query='1:0', gallery='-1:0 1:1')
    assert all(list(o)==['path','pid','camid','dsetid'] and set(o.dsetid)=={'mine'} for o in data.splits.values())
    assert len(data.notes)==1 and '1 images in query have other names and were passed over' in data.notes[0]
    assert data.protocol=='market'

def test_market_without_training(tmp_path):
    root = market_files(tmp_path)
    shutil.rmtree(root/'bounding_box_train')
    data = market1501(root)
    assert len(data.train)==0 and data.train.pid.dtype=='int64' and data.notes==['no bounding_box_train: there is nothing to train on']
    shutil.rmtree(root/'query')
    with pytest.raises(FileNotFoundError, match="'bounding_box_train', 'query'. not found in .*expected the folders"): market1501(root)

def test_market_large_numbers(tmp_path):
    "Own images in this form may be numbered as people like"
    assert says(market1501(market_files(tmp_path, 'query/20240131235959_c1.jpg')).query)=='1:0 20240131235959:0'
