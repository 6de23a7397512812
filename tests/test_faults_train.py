"Faults that users met while they trained, scored and used the command: the right value, or one clear sentence"
import errno, fresh, os, re, signal, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from PIL import Image
from fastreid_nb.all import *
from fastreid_nb.data.files import atomic_path, read_torch
from fastreid_nb.data.workers import short_of, story
from fastreid_nb.recipes.start import find_network, networks, open_model, with_classes
from fastreid_nb.recipes.run import run_folder
from fastreid_nb.train.core import check_classes
from tiny_models import thin_resnets

root = Path(__file__).parents[1]
quick = '--weights none --epochs 1 --size 64x32 --p 6 --k 4 --workers 0 --precision float32'.split()
small = ['--backbone','resnet18',*quick]

@pytest.fixture(scope='module', autouse=True)
def thin():
    "Small files and networks: what is tested here does not depend on the number of channels"
    with thin_resnets(): yield

@pytest.fixture(scope='module')
def data(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=24, n_cams=2, size=(64,32), progress=False)

@pytest.fixture(scope='module')
def folder(data): return Path(data.train.path[0]).parents[1]

@pytest.fixture
def dls(data): return reid_dls(data, (64,32), 4, 2, num_workers=0)

@pytest.fixture
def learn(dls):
    l = reid_learner(dls, resnet18, dtype=torch.float32)
    with l.no_bar(), l.no_logging(): yield l

@pytest.fixture
def said(tmp_path_factory): return tmp_path_factory.mktemp('said')/'said.txt'

class Tiny(torch.nn.Conv2d):
    "A network of one layer"
    n_feat = 8
    def __init__(self): super().__init__(3, 8, 3, 4, 1)

def says(capsys, code, *words):
    "What the command prints on standard error"
    assert reid_main([str(o) for o in words])==code
    err = capsys.readouterr().err
    assert 'Traceback' not in err
    return err

# Losses and batches

@pytest.mark.parametrize('loss', [CrossEntropy(), TripletLoss(), TripletLoss(on='emb'), reid_loss()])
@pytest.mark.parametrize('pid', [torch.tensor([0.,0,1,1]), torch.tensor([True,True,False,False]), torch.tensor([[0],[0],[1],[1]])])
def test_labels_are_whole_numbers(loss, pid):
    out = ReIDOut(torch.randn(4,2), torch.randn(4,8), torch.randn(4,8))
    with pytest.raises(ValueError, match=r'pid is (float32|bool|int64) .*expected whole numbers, \(B,\) int64'): loss(out, pid)

@pytest.mark.parametrize('f', [smooth_cross_entropy, batch_hard_triplet])
def test_labels_of_plain_functions(f):
    with pytest.raises(ValueError, match='pid is float32'): f(torch.randn(4,2), torch.tensor([0.,0,1,1]))

@pytest.mark.parametrize('make', [lambda: CrossEntropy('a'), lambda: CrossEntropy(float('nan')), lambda: TripletLoss('a'), lambda: TripletLoss(float('inf'))])
def test_settings_of_losses(make):
    with pytest.raises(ValueError, match='eps=|margin='): make()

@pytest.mark.parametrize('p,k', [(1,1)])
def test_batch_of_one(data, p, k):
    with pytest.raises(ValueError, match='a batch needs two'): reid_dls(data, (64,32), p, k, num_workers=0)

@pytest.mark.parametrize('kw,match', [(dict(num_workers=-1), 'num_workers=-1: expected 0 or more'), (dict(val_bs=0), 'val_bs=0: expected 1 or more'), (dict(p=4.), r'p=4\.0: expected'),
    (dict(p='4'), "p='4': expected"), (dict(k=0), 'k=0: expected'), (dict(seed=-1), 'seed=-1: expected'), (dict(seed=None), 'seed=None'), (dict(num_workers=1.5), r'num_workers=1\.5')])
def test_settings_of_loaders(data, kw, match):
    with pytest.raises(ValueError, match=match): reid_dls(data, (64,32), **dict(num_workers=0)|kw)

def test_data_that_is_none(data):
    for wrong in (None, data.train, 'folder'):
        with pytest.raises(ValueError, match='expected ReIDData'): reid_dls(wrong)

# Preproc

@pytest.mark.parametrize('kw', [dict(size=256), dict(size=None), dict(size=(64.5,32)), dict(size=('64','32')),
    dict(mean=(123.,116.,103.)), dict(std=(58.,57.,57.)), dict(std=(0,0,0)),
    dict(mean=(.5,.5)), dict(std=float('nan')), dict(mean=(float('nan'),)*3), dict(mean=(-.1,.5,.5))])
def test_preproc_is_checked(kw):
    with pytest.raises(ValueError, match='expected'): Preproc(**kw)

def test_preproc_of_a_file(tmp_path):
    save_reid(tmp_path/'q.pt', reid_model(resnet18, 3, preproc=Preproc((64,32))))
    ck = torch.load(tmp_path/'q.pt')
    for std in ([58.,57.,57.], [0.,0.,0.]):
        torch.save({**ck, 'preproc':{**ck['preproc'], 'std':std}}, tmp_path/'q2.pt')
        with pytest.raises(ValueError): load_reid(tmp_path/'q2.pt')
    assert Preproc((64.,32)).size==(64,32) and isinstance(Preproc((64.,32)).size[0], int)

# Learner

@pytest.mark.parametrize('dtype', ['bfloat16', 'float32', torch.int8, torch.float64, 16])
def test_precision_that_is_none(dls, dtype):
    with pytest.raises(ValueError, match='expected torch.bfloat16, torch.float16 or torch.float32'): reid_learner(dls, resnet18, dtype=dtype)
    with pytest.raises(ValueError, match='dtype='): embed(reid_model(resnet18), np.zeros((64,32,3), np.uint8), dtype=dtype)

@pytest.mark.parametrize('cb', [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau])
def test_columns_to_watch(learn, cb):
    with pytest.raises(ValueError, match=f"{cb.__name__}: monitor='valid_loss': there is no loss in validation.*'mAP' or 'rank-1'"): learn.fit(1, cbs=[cb()])
    with pytest.raises(ValueError, match="monitor='accuracy': no such column"): learn.fit(1, cbs=[cb(monitor='accuracy')])
    if cb is EarlyStoppingCallback: learn.fit(1, 1e-4, cbs=[cb(monitor='mAP')])

@pytest.mark.parametrize('f,match', [(lambda l: l.fit(1, float('nan')), 'lr=nan'), (lambda l: l.fit_warmup_cos(1, -1.), 'lr=-1'), (lambda l: l.fit_warmup_cos(1, end=-1), 'end=-1'),
    (lambda l: l.fit(1, slice(1e-5, float('inf'))), 'lr=inf'), (lambda l: l.fit(1, wd=-1), 'wd=-1'), (lambda l: l.fit_warmup_cos(1.5), r'1\.5 epochs: expected 1 or more'), (lambda l: l.fit(0), 'n_epoch=0')])
def test_settings_of_a_fit(learn, f, match):
    with pytest.raises(ValueError, match=match): f(learn)

@pytest.mark.parametrize('kw', [dict(wd=-1.), dict(lr=float('nan')), dict(wd='a')])
def test_settings_of_a_learner(dls, kw):
    with pytest.raises(ValueError, match=next(iter(kw))+'='): reid_learner(dls, resnet18, **kw)

def test_predict_show_results_and_tta(learn, data):
    path = data.query.path[0]
    assert torch.equal(learn.predict(path), learn.embed(path)) and learn.predict([path]*3).shape==(3,128)
    fig = learn.show_results(max_n=2)
    assert fig.axes
    q,g = learn.tta(progress=False)
    assert len(q)==len(data.query) and len(g)==len(data.gallery) and 0<evaluate(q, g).mAP<=1
    mirrored = Image.open(path).transpose(Image.FLIP_LEFT_RIGHT)
    want = torch.nn.functional.normalize(learn.embed([path, mirrored]).mean(0), dim=0)
    torch.testing.assert_close(torch.nn.functional.normalize(q.emb[0], dim=0), want, atol=1e-3, rtol=1e-3)

def test_classes_of_other_data(dls):
    with pytest.raises(ValueError, match='300 classes, the data 18 identities'): reid_learner(dls, model=reid_model(resnet18, 300))
    with pytest.raises(ValueError, match='7 classes'): reid_learner(dls, model=pcb(resnet18, 7))
    assert reid_learner(dls, model=reid_model(resnet18, 18), dtype=torch.float32)

def test_a_loss_that_is_no_number(data):
    n = []
    def loss(out, pid, cam):
        n.append(0)
        return reid_loss()(out, pid, cam)*(float('nan') if len(n)==7 else 1)
    learn = reid_learner(reid_dls(data, (32,16), 4, 2, num_workers=0), Tiny, loss=loss, cbs=ScoreReID(every=6), dtype=torch.float32)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match=r'since step 7 of this fit \(epoch 0, learning rate'): learn.fit_warmup_cos(6, 1e-3)
    assert len(n)<=len(learn.dls.train)*2

def test_a_loss_that_is_no_number_in_a_long_epoch(data):
    "Noticed after a hundred steps at most; one bad step alone is none"
    long = replace(data, train=pd.concat([data.train]*8, ignore_index=True))
    n = []
    def loss(out, pid, cam):
        n.append(0)
        return out.feat.pow(2).mean()*(float('inf') if len(n)>=20 else 1)
    learn = reid_learner(reid_dls(long, (32,16), 2, 2, num_workers=0), Tiny, loss=loss, dtype=torch.float32)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='since step 20'): learn.fit(1, 1e-3)
    assert len(n)<=120

def test_embeddings_that_are_no_numbers(tmp_path):
    m = reid_model(resnet18, 3, preproc=Preproc((64,32))).eval()
    m.backbone.conv1.weight.data.fill_(float('nan'))
    with pytest.raises(ValueError, match='2 of 2 embeddings hold NaN or infinity, rows'): embed(m, [np.zeros((64,32,3), np.uint8)]*2)
    (tmp_path/'nan.pt').write_text('the old one')
    with pytest.raises(ValueError, match='NaN'): save_reid(tmp_path/'nan.pt', m)
    assert (tmp_path/'nan.pt').read_text()=='the old one' and len(os.listdir(tmp_path))==1

@pytest.mark.parametrize('threshold', [float('nan'), float('inf'), 'a'])
def test_thresholds(tmp_path, threshold):
    with pytest.raises(ValueError, match='threshold='): save_reid(tmp_path/'t.pt', reid_model(resnet18, 3), threshold=threshold)

# Scores that mean nothing

def table(pid): return pd.DataFrame(dict(pid=pid))

def test_notes_of_scores():
    one = evaluate(Features(torch.randn(4,8), table(0*np.arange(4))), Features(torch.randn(9,8), table(0*np.arange(9))))
    assert one.mAP==1 and 'one identity only' in str(one)
    flat = evaluate(Features(torch.ones(4,8), table(np.arange(4))), Features(torch.ones(20,8), table(np.arange(20)//4)))
    assert any('4 of 4 queries are equally far' in o for o in flat.notes)
    f = Features(torch.randn(20,8), table(np.arange(20)//4))
    assert any('20 of 20 queries are in the gallery too' in o for o in evaluate(f, f).notes)
    files = table(np.arange(20)//4).assign(path=[f'{i}.jpg' for i in range(20)])
    f = Features(torch.randn(20,8), files)
    assert evaluate(f, f).notes==[] and any('find themselves' in o for o in rank_dist(torch.rand(3,20), files[:3].assign(camid=0), files.assign(camid=1), 'market').notes)

def test_notes_are_not_for_good_scores(data):
    rng = np.random.default_rng(0)
    q,g = (Features(torch.from_numpy(rng.random((len(o),8))), o) for o in (data.query,data.gallery))
    assert evaluate(q, g).notes==[]

@pytest.mark.parametrize('weights', [[-1,3], [float('nan'),1], [0,0]])
def test_weights_of_distances(weights):
    with pytest.raises(ValueError, match='expected one weight each'): sum_dists([torch.ones(1,1)]*2, weights)

@pytest.mark.parametrize('kw', [dict(chunk=-1), dict(chunk=0), dict(max_rank=0), dict(max_rank=2.5)])
def test_settings_of_ranking(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): rank_dist(torch.rand(2,2), table([0,1]), table([0,1]), **kw)

def test_wrong_arguments():
    m,x = reid_model(resnet18, 3, preproc=Preproc((64,32))).eval(),np.zeros((64,32,3), np.uint8)
    for f,match in ((lambda: embed(m, x, bs=0), 'bs=0'), (lambda: reid_model(resnet18, -1), 'n_pids'), (lambda: m(x), 'expected a non-empty batch')):
        with pytest.raises(ValueError, match=match): f()

def test_html_is_escaped():
    bad = '<img src=x onerror=alert(1)>'
    res = rank_dist(torch.rand(2,2), table([0,1]), table([0,1]), metric=bad)
    assert '<img' not in res._repr_html_() and '&lt;img' in res._repr_html_()

@pytest.mark.parametrize('name', ['$x_$', r'$\frac$', '\x1b[31mred', 'a\nb'])
def test_names_in_figures(tmp_path, name):
    for i in range(4): Image.new('RGB', (32,64)).save(tmp_path/f'n{i}.jpg')
    t = pd.DataFrame(dict(path=[str(tmp_path/f'n{i}.jpg') for i in range(4)], pid=[0,1,0,1], camid=0, pid_name=[name,'b']*2))
    evaluate(Features(torch.randn(2,3), t[:2]), Features(torch.randn(2,3), t[2:])).show_ranks(save=tmp_path/'fig.png')
    assert Image.open(tmp_path/'fig.png').size

# Workers

@pytest.mark.skipif(not os.path.isdir('/dev/shm'), reason='Linux')
def test_little_shared_memory(data, monkeypatch):
    "The room is looked at before workers start; by default there are as many as fit"
    usage = type('usage', (), dict(free=20*2**20))
    monkeypatch.setattr('fastreid_nb.data.workers.shutil.disk_usage', lambda path: usage)
    dls = reid_dls(data, (256,128), 8, 8, num_workers=4)
    with pytest.raises(RuntimeError, match='4 workers with batches of 64 need .* --shm-size'): next(iter(dls.train))
    assert reid_dls(data, (256,128), 8, 8).train.fake_l.num_workers==0 and short_of(0, (256,128), 64)==''

def test_few_files(data, monkeypatch):
    monkeypatch.setattr('fastreid_nb.data.workers._free_files', lambda: 20)
    with pytest.raises(RuntimeError, match='20 more open files.*ulimit'): next(iter(reid_dls(data, (64,32), 4, 2, num_workers=2).train))

def sleepy(x, rng): time.sleep(90)
def deadly(x, rng): os.kill(os.getpid(), signal.SIGKILL)
def quitting(x, rng): os._exit(0)

@pytest.mark.parametrize('aug,match', [(sleepy, 'gave no batch for 3 seconds'), (deadly, 'The system ended a process'), (quitting, 'ended a process|gave no batch')])
def test_workers_that_fail(data, aug, match):
    dl,began = reid_dls(data, (64,32), 4, 2, num_workers=1, augs=[aug]).train,time.time()
    dl.patience = 3
    with pytest.raises(RuntimeError, match=match): next(iter(dl))
    assert time.time()-began<30

def test_an_image_that_vanished(data):
    gone = replace(data, train=data.train.assign(path='gone.jpg'))
    for n in (0,1):
        with pytest.raises(FileNotFoundError) as e: next(iter(reid_dls(gone, (64,32), 4, 2, num_workers=n).train))
        assert 'gone.jpg' in str(e.value) and 'Traceback' not in str(e.value)

def test_every_batch_is_counted(data, monkeypatch):
    dl = reid_dls(data, (64,32), 4, 2, num_workers=0).train
    whole = dl._deliver
    monkeypatch.setattr(dl, '_deliver', lambda: (b for i,b in enumerate(whole()) if i<2), raising=False)
    with pytest.raises(RuntimeError, match=f'2 of {len(dl)} batches came'): list(dl)

@pytest.mark.parametrize('said', ['DataLoader worker (pid 3) is killed by signal: Bus error', 'received 0 items of ancdata', 'Too many open files', 'unable to allocate shared memory(shm)'])
def test_stories(said): assert 'num_workers' in story(RuntimeError(said), 45) and story(ValueError('anything'), 45)==''

spawned = """
import multiprocessing, sys
from functools import partial
from fastreid_nb.augment.core import hflip, pad_crop
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.data.toy import toy_reid
if __name__=='__main__':
    multiprocessing.set_start_method('spawn')
    d = toy_reid(sys.argv[1], n_ids=24, n_cams=2, size=(64,32), progress=False)
    for aug in (lambda x,rng: x, partial(pad_crop, pad=.1)):
        try: print(len(list(reid_dls(d, (64,32), 4, 2, num_workers=1, augs=[hflip,aug]).train)), 'batches')
        except ValueError as e: print(e)
"""
def test_nameless_functions_and_spawned_workers(data, folder, tmp_path):
    (tmp_path/'x.py').write_text(spawned)
    env = os.environ|dict(PYTHONPATH=str(root), PYTHONWARNINGS='ignore', CUDA_VISIBLE_DEVICES='')
    out = subprocess.run([sys.executable, tmp_path/'x.py', folder.parent], env=env, capture_output=True, text=True, timeout=300).stdout
    assert 'augmentation 1 (<lambda>) cannot be sent to worker processes' in out and 'num_workers=0' in out and '9 batches' in out

# Files

def test_threads_that_write_one_path(tmp_path):
    "Every read finds a whole file"
    bad,done = [],[]
    def write(n):
        for _ in range(60):
            with atomic_path(tmp_path/'t.pt') as part, open(part, 'wb') as f: torch.save(dict(w=torch.full((n,), float(n))), f)
            try: assert len(w := read_torch(tmp_path/'t.pt')['w'])==w[0]
            except Exception as e: bad.append(e)
    threads = [threading.Thread(target=write, args=(n,)) for n in (5,9000,70000)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert bad==[] and os.listdir(tmp_path)==['t.pt']

def test_a_link_under_a_known_name_is_not_followed(tmp_path):
    "No temporary name can be known, and one that is there is not taken"
    (tmp_path/'victim').write_text('safe')
    (tmp_path/f'.a.txt.{os.getpid()}.tmp').symlink_to(tmp_path/'victim')
    with atomic_path(tmp_path/'a.txt') as part: part.write_text('new')
    assert (tmp_path/'victim').read_text()=='safe' and (tmp_path/'a.txt').read_text()=='new'

def test_files_have_the_usual_permissions(tmp_path):
    with atomic_path(tmp_path/'a.txt') as part: part.write_text('x')
    (tmp_path/'b.txt').write_text('x')
    assert (tmp_path/'a.txt').stat().st_mode==(tmp_path/'b.txt').stat().st_mode

full = """
import pandas as pd, resource, sys, torch
from fastreid_nb.all import *
m = reid_model(resnet18, 5, preproc=Preproc((64,32)))
resource.setrlimit(resource.RLIMIT_FSIZE, (2*2**20,)*2)
for save in (lambda p: save_reid(p, m), Features(torch.zeros(9999,99), pd.DataFrame(dict(pid=range(9999)))).save):
    try: save(sys.argv[1])
    except OSError as e: print(type(e).__name__, e)
"""
def test_a_full_disk(tmp_path, said):
    (tmp_path/'full.pt').write_text('the old one')
    out = fresh.run(said, full, tmp_path/'full.pt')
    assert out.count(f'OSError [Errno {errno.EFBIG}] cannot write {tmp_path}/full.pt (No space left on device): choose')==2, out
    assert os.listdir(tmp_path)==['full.pt'] and (tmp_path/'full.pt').read_text()=='the old one'

def test_rests_of_dead_writers(tmp_path, said):
    code = "import sys, time\nfrom fastreid_nb.data.files import atomic_path\nwith atomic_path(sys.argv[1]) as f: f.touch(); print(1, flush=True); time.sleep(60)"
    p = fresh.Fresh(said, code, tmp_path/'k.pt')
    p.wait_for('1')
    assert len(os.listdir(tmp_path))==1
    with atomic_path(tmp_path/'k.pt') as f: f.touch()
    assert len(os.listdir(tmp_path))==2   # its writer lives
    p.send_signal(signal.SIGKILL)
    assert p.wait()==-signal.SIGKILL
    with atomic_path(tmp_path/'k.pt') as f: f.touch()
    assert os.listdir(tmp_path)==['k.pt']

# Folders of runs

def test_two_runs_and_one_folder(tmp_path, capsys):
    with run_folder(tmp_path/'o') as a, run_folder(tmp_path/'o') as b, run_folder(tmp_path/'o') as c:
        assert [o.name for o in (a,b,c)]==['o','o-2','o-3'] and 'in use by another run' in capsys.readouterr().out
        with pytest.raises(ValueError, match='in use'), run_folder(tmp_path/'o', overwrite=True): pass
        for o in (a,c): (o/'model.pt').touch()
    assert sorted(o.name for o in tmp_path.iterdir())==['o','o-3']   # an empty one goes
    with run_folder(tmp_path/'o') as d: assert d.name=='o-2' and 'holds the model of an earlier run' in capsys.readouterr().out
    with run_folder(tmp_path/'o', overwrite=True) as d: assert d.name=='o'
    assert [o.name for o in (tmp_path/'o').iterdir()]==['model.pt']

def test_a_lock_of_a_dead_run(tmp_path, said):
    code = "import os, sys\nfrom fastreid_nb.recipes.run import run_folder\nwith run_folder(sys.argv[1]): os.kill(os.getpid(), 9)"
    assert fresh.Fresh(said, code, tmp_path/'o').wait()==-9
    assert [o.name for o in (tmp_path/'o').iterdir()]==['.lock']
    with run_folder(tmp_path/'o') as a: assert a.name=='o'

def test_a_finished_run_stays(capsys, tmp_path, folder):
    for name in ('o','o-2'):
        assert reid_main(['train', str(folder), *small, '--out', str(tmp_path/'o')])==0
        assert (tmp_path/name/'model.pt').exists()
    kept = (tmp_path/'o'/'model.pt').stat().st_mtime_ns
    assert reid_main(['train', str(folder), *small, '--out', str(tmp_path/'o'), '--overwrite'])==0
    assert (tmp_path/'o'/'model.pt').stat().st_mtime_ns>kept and not (tmp_path/'o-3').exists()

# Options

@pytest.mark.parametrize('words,match', [('--workers -1', 'workers -1: expected 0 to 256 (option --workers)'), ('--size 9999999x9999999', '(option --size)'), ('--size 0x5', '(option --size)'),
    ('--seed -1', '(option --seed)'), ('--seed 99999999999999999999', '(option --seed)'), ('--p 0', '(option --p)'), ('--k -2', '(option --k)'), ('--lr nan', '(option --lr)'), ('--lr -1', '(option --lr)'),
    ('--lr inf', '(option --lr)'), ('--epochs 0', '0 epochs: expected 1 or more (option --epochs)'), ('--freeze_iters -1', '(option --freeze-iters)'), ('--test-frac nan', '(option --test-frac)'),
    ('--test-frac 2', '(option --test-frac)'), ('--precision float8', '(option --precision)'), ('--weights nowhere.pth', '(option --weights)'), ('--p 1 --k 1', 'a batch needs two'), ('--backbone resnet9', 'expected one of resnet18'),
    ('--backbone timm/nothing_like_it', 'nothing_like_it'), ('--backbone resnet18:7', 'has no variants'), ('--backbone osnet:fat', 'variant'), ('--regex (', '(option --regex)'), ('--regex a', '(?P<pid>')])
def test_options_are_checked_before_data_is_read(capsys, tmp_path, words, match):
    "The folder of images is empty, and nobody looks"
    (tmp_path/'none').mkdir()
    if 'timm' in words: pytest.importorskip('timm')
    more = [] if '--weights' in words else ['--weights','none']
    err = says(capsys, 1, 'train', tmp_path/'none', *more, *words.split(), '--out', tmp_path/'o')
    assert match in err and str(tmp_path/'none') not in err and not (tmp_path/'o').exists()

@pytest.mark.parametrize('command', ['demo','eval','doctor'])
def test_options_of_the_others(capsys, tmp_path, command):
    first = dict(demo=[], eval=['m.pt',tmp_path], doctor=[tmp_path])[command]
    assert '(option --workers)' in says(capsys, 1, command, *first, '--workers', -1)
    assert '(option --seed)' in says(capsys, 1, command, *first, '--seed', -1)

# Networks and files of weights

def test_all_networks():
    nets = networks()
    assert len(nets)>=20 and {'resnet152','resnext50','resnest','osnet','mobilenetv2','mobilenetv3','shufflenetv2','efficientnet','regnet','repvgg','vit','hrnet'}<=nets.keys()

@pytest.mark.parametrize('name', ['osnet:ibn','mobilenetv2:0.5','shufflenetv2','efficientnet','regnet:x_200mf','repvgg','vit:deit_tiny','resnet:18','resnest'])
def test_networks_run(name):
    net = find_network(name, (64,32))(pretrained=False).eval()
    with torch.no_grad(): assert net(torch.zeros(1,3,64,32)).shape[1]==net.n_feat

def test_training_with_other_networks(capsys, tmp_path, folder):
    pytest.importorskip('timm')
    for name in ('vit:deit_tiny','timm/mobilenetv3_small_050'):
        assert reid_main(['train', str(folder), '--backbone', name, *quick, '--out', str(tmp_path/'o'), '--overwrite'])==0, capsys.readouterr()
        assert open_model(tmp_path/'o'/'model.pt').preproc.size==(64,32)

@pytest.fixture(scope='module')
def files(tmp_path_factory, thin):
    "Weights in several forms"
    t,sd = tmp_path_factory.mktemp('files'),resnet18().state_dict()
    neck = {'bottleneck.weight':torch.ones(128), 'bottleneck.bias':torch.zeros(128), 'bottleneck.running_mean':torch.zeros(128), 'bottleneck.running_var':torch.ones(128), 'classifier.weight':torch.randn(9,128)}
    torch.save({f'base.{k}':v for k,v in sd.items()}|neck, t/'bag.pth')
    torch.save(sd, t/'plain.pth')
    save_reid(t/'ours.pt', reid_model(resnet18, 7, preproc=Preproc((64,32))), range(7))
    return t

@pytest.mark.parametrize('name', ['bag.pth','plain.pth','ours.pt'])
def test_any_file_is_scored_and_trained_on(capsys, tmp_path, folder, files, name):
    words = '--size 64x32 --workers 0 --precision float32'.split()
    assert reid_main(['eval', str(files/name), str(folder), *words, '--out', str(tmp_path/'e')])==0
    out = capsys.readouterr().out
    assert 'mAP' in out and ('assumed' in out)==(name!='ours.pt')
    words = ['--weights', str(files/name), '--epochs', '1', '--p', '6', '--k', '4', *words]
    assert reid_main(['train', str(folder), *words, '--out', str(tmp_path/'o')])==0
    made = load_reid(tmp_path/'o'/'model.pt')
    assert len(made.head.classifier.weight)==18 and made.preproc.size==(64,32)

def test_wrong_pairs_are_told_before_images_are_read(capsys, tmp_path, files):
    (tmp_path/'none').mkdir()
    for name in ('bag.pth','plain.pth','ours.pt'):
        assert 'another network than osnet' in says(capsys, 1, 'train', tmp_path/'none', '--weights', files/name, '--backbone', 'osnet', '--out', tmp_path/'o')
    (tmp_path/'text.pth').write_text('no weights')
    assert 'text.pth' in says(capsys, 1, 'train', tmp_path/'none', '--weights', tmp_path/'text.pth', '--out', tmp_path/'o')

def test_a_part_model_gets_other_classes(tmp_path):
    save_reid(tmp_path/'m.pt', pcb(resnet18, 7, preproc=Preproc((128,64))), range(7))
    old = open_model(tmp_path/'m.pt')
    new = with_classes(old, 5)
    check_classes(new, 5)
    assert all(torch.equal(v, new.state_dict()[k]) for k,v in old.state_dict().items() if 'classifier' not in k.split('.'))

# What is printed

def test_a_log_file_has_a_line_per_epoch(tmp_path, folder, said):
    p = fresh.Fresh(said, fresh.command, 'train', folder, *small, '--epochs', 3, '--out', tmp_path/'o')
    code,text = p.wait(),p.text
    assert code==0 and len(re.findall(r'^[012] +\d', text, re.M))==3, text
    assert not re.search(r'[\r\x1b]', text) and len(text)<3000 and text.index('epoch ')<text.index('\n0 ')

def test_a_learner_writes_lines_too(dls, capsys):
    learn = reid_learner(dls, Tiny, dtype=torch.float32)
    learn.fit(2, 1e-4)
    learn.validate()
    learn.features()
    out = capsys.readouterr().out.splitlines()
    assert len(out)==3 and out[0].split()==['epoch','train_loss','mAP','rank-1','time'] and learn.progress

def test_control_characters(capsys, tmp_path):
    for i in 'bc':
        (tmp_path/'an'/i).mkdir(parents=True)
        for j in range(2): Image.new('RGB', (64,64)).save(tmp_path/'an'/i/f'{j}.jpg')
    (tmp_path/'an'/'b'/'\x1b]0;PWNED\x07\x1b[31mred.jpg').write_text('x')
    reid_main(['doctor', str(tmp_path/'an'), '--workers', '1'])
    reid_main(['train', str(tmp_path/'an'), *small, '--out', str(tmp_path/'o')])
    reid_main(['\x1b[2J'])
    told = capsys.readouterr()
    assert '\x1b' not in told.out+told.err and r'\x1b' in told.out+told.err

@pytest.mark.parametrize('e,code,match', [(MemoryError(), 1, 'out of memory'), (RuntimeError('CUDA out of memory. Tried'), 1, 'out of memory'), (KeyError('x'), 1, "KeyError: 'x'"),
    (ModuleNotFoundError("No module named 'timm'"), 1, "No module named 'timm'"), (RuntimeError('Caught KeyError in DataLoader worker process 0.\nOriginal Traceback\n...\nKeyError: 3'), 1, 'KeyError: 3')])
def test_errors_are_one_line(capsys, monkeypatch, folder, e, code, match):
    def fail(*args, **kwargs): raise e
    monkeypatch.setattr('fastreid_nb.recipes.cli.read_data', fail)
    err = says(capsys, code, 'doctor', folder)
    assert match in err and len(err.splitlines())==1

def test_scores_come_before_a_figure_that_fails(capsys, monkeypatch, tmp_path, folder):
    def fail(*args, **kwargs): raise RuntimeError('no font')
    monkeypatch.setattr(ReIDResult, 'show_ranks', fail)
    assert reid_main(['train', str(folder), *small, '--out', str(tmp_path/'o')])==0
    out = capsys.readouterr().out
    assert 'trained network' in out and 'no figure of ranked lists: no font' in out and (tmp_path/'o'/'model.pt').exists()

def test_scores_come_before_a_disk_that_is_full(capsys, monkeypatch, tmp_path, folder):
    def fail(*args, **kwargs): raise OSError(28, 'cannot write')
    monkeypatch.setattr('fastreid_nb.train.core.ReIDLearner.save_reid', fail, raising=False)
    assert reid_main(['train', str(folder), *small, '--out', str(tmp_path/'o')])==1
    told = capsys.readouterr()
    assert 'trained network' in told.out and 'cannot write' in told.err

# Signals

def alive(group):
    "Processes of a session"
    found = subprocess.run(['ps','-o','pid=,stat=','-s',str(group)], capture_output=True, text=True).stdout.splitlines()
    return [o for o in found if 'Z' not in o]

def all_end(group, seconds=60):
    "Do all processes of a session end by themselves?"
    end = time.monotonic()+seconds
    while alive(group) and time.monotonic()<end: time.sleep(.1)
    return alive(group)==[]

@pytest.mark.skipif(os.name=='nt', reason='signals of Unix')
@pytest.mark.parametrize('how,status', [(signal.SIGTERM,143), (signal.SIGINT,130)])
def test_signals_end_a_run_in_order(tmp_path, folder, said, how, status):
    p = fresh.Fresh(said, fresh.command, 'train', folder, *small, '--epochs', 9999, '--workers', 2, '--out', tmp_path/'o')
    p.wait_for(r'^1 ')
    p.send_signal(how)
    code,text = p.wait(),p.text
    assert code==status and 'what was learnt so far is in' in text and 'Traceback' not in text, text
    assert f'goes on with --resume {tmp_path}' in text and all_end(p.pid)
    assert sorted(o.name for o in (tmp_path/'o').iterdir())==['experiment.yml','model_interrupted.pt','run']

@pytest.mark.skipif(os.name=='nt', reason='signals of Unix')
def test_a_second_signal_ends_at_once(said):
    "The first is being answered, for a long time"
    code = '''
import os, signal, time
from fastreid_nb.recipes.run import Signals
with Signals():
    try: os.kill(os.getpid(), signal.SIGINT); time.sleep(9)
    except KeyboardInterrupt:
        print('saving', flush=True)
        time.sleep(60)
'''
    p = fresh.Fresh(said, code)
    p.wait_for('saving')
    began = time.time()
    p.send_signal(signal.SIGINT)
    assert p.text=='saving\n' and p.wait()==130 and time.time()-began<5

@pytest.mark.skipif(os.name=='nt', reason='signals of Unix')
@pytest.mark.parametrize('how,status,seconds', [(signal.SIGINT,130,.5), (signal.SIGTERM,143,1.5)])
def test_signals_while_it_imports(tmp_path, how, status, seconds):
    env = os.environ|dict(PYTHONPATH=str(root), MPLBACKEND='agg', CUDA_VISIBLE_DEVICES='')
    words = [sys.executable,'-m','fastreid_nb','doctor',tmp_path/'nowhere']
    p = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(seconds)
    p.send_signal(how)
    text = p.communicate(timeout=120)[0]
    assert (p.returncode,text)==(status,'') or 'nowhere not found' in text and 'Traceback' not in text
