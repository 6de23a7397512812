"The command `reid`: what it says when something is wrong, and that it loses nothing"
import shutil, sys
from pathlib import Path
import fresh, numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from PIL import Image
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.backbone.resnet import resnet18
from fastreid_nb.recipes.run import read_data, run_folder
from fastreid_nb.recipes.cli import reid_main as main
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.train.checkpoint import load_reid
from fastreid_nb.train.core import reid_learner
from fastreid_nb.train.logs import EpochLog, TensorBoardLog
from fastreid_nb.train.resume import Resumable, last_state, write_state
from fastreid_nb.recipes.ledger import Ledger
from tiny_models import thin_resnets

quick = '--backbone resnet18 --weights none --epochs 1 --size 64x32 --p 4 --k 4 --workers 0'.split()

@pytest.fixture(autouse=True)
def thin():
    "Small files and networks: what is tested here does not depend on the number of channels"
    with thin_resnets(): yield

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    data = toy_reid(tmp_path_factory.mktemp('toy'), n_ids=8, size=(64,32), progress=False)
    return Path(data.train.path[0]).parents[1]

def says(capsys, code, *words):
    "The one clear sentence (or list) on standard error"
    assert main([str(o) for o in words])==code
    err = capsys.readouterr().err
    assert 'Traceback' not in err
    return err

def dies_after_an_epoch(monkeypatch):
    "Every run ends when the state of an epoch is written"
    after = Resumable.after_epoch
    def die(self):
        after(self)
        raise SystemExit
    monkeypatch.setattr(Resumable, 'after_epoch', die)

def test_help(capsys):
    assert main(['--help'])==0
    text = capsys.readouterr().out
    assert all(o in text for o in ('demo','doctor','train','eval'))

@pytest.mark.parametrize('name', ['demo','doctor','train','eval'])
def test_help_of_commands(capsys, name):
    "Options are listed with their defaults and units"
    with pytest.raises(SystemExit) as e: main([name, '--help'])
    text = capsys.readouterr().out
    assert e.value.code==0 and '--seed' in text and 'default: ' in text
    assert name in ('doctor','eval') or 'pixels' in text

def test_wrong_calls(capsys, tmp_path, folder):
    assert 'expected one of demo, doctor, train, eval' in says(capsys, 2, 'trian')
    assert 'expected a CSV file' in says(capsys, 1, 'train', tmp_path/'nowhere', '--out', tmp_path/'o')
    assert 'such as 256x128' in says(capsys, 1, 'train', folder, '--size', 'big', '--out', tmp_path/'o')
    assert 'expected one of resnet18' in says(capsys, 1, 'train', folder, '--backbone', 'resnet9', '--out', tmp_path/'o')
    assert 'use p=6 or less' in says(capsys, 1, 'train', folder, *quick, '--p', 16, '--out', tmp_path/'o')
    assert 'no file' in says(capsys, 1, 'eval', tmp_path/'m.pt', folder, '--out', tmp_path/'o')

def test_output_folder_is_tried_first(capsys, tmp_path, folder):
    (tmp_path/'file').touch()
    for words in (['train', folder], ['eval', 'm.pt', folder], ['demo']):
        assert 'choose a folder you may write to' in says(capsys, 1, *words, '--out', tmp_path/'file'/'out')

def pictures(root, n_ids, n=3):
    for i in range(n_ids):
        for j in range(n):
            (root/f'id {i}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(9*i+j).integers(0, 255, (64,32,3), dtype=np.uint8)).save(root/f'id {i}'/f'{j}.png')

def test_bad_data(capsys, tmp_path):
    pictures(tmp_path/'one', 1)
    assert '1 identity in train: two or more are needed' in says(capsys, 1, 'train', tmp_path/'one', '--test_frac', 0, *quick, '--out', tmp_path/'o')
    pictures(tmp_path/'single', 6, n=1)
    assert 'no query or gallery' in says(capsys, 1, 'train', tmp_path/'single', *quick, '--out', tmp_path/'o')
    pictures(tmp_path/'bad', 6)
    (tmp_path/'bad'/'id 1'/'1.png').write_bytes(b'')
    (tmp_path/'bad'/'id 2'/'0.png').write_text('text')
    err = says(capsys, 1, 'train', tmp_path/'bad', *quick, '--out', tmp_path/'o')
    assert all(o in err for o in ('2 unreadable', 'id 1', 'id 2', 'skip_bad'))
    assert main(['train', str(tmp_path/'bad'), '--skip-bad', *quick, '--out', str(tmp_path/'o')])==0
    assert '2 unreadable images skipped' in capsys.readouterr().out

def test_csv_without_cameras(capsys, tmp_path, folder):
    "The same pictures as a table; protocol no_camera is chosen and said"
    df = pd.concat(read_data(folder).splits.values())
    df[['path','pid']].to_csv(tmp_path/'t.csv', index=False)
    assert main(['train', str(tmp_path/'t.csv'), *quick, '--out', str(tmp_path/'o')])==0
    out = capsys.readouterr().out
    assert 'no_camera' in out and 'no split given: 6 identities for training, 2 others' in out
    assert load_reid(tmp_path/'o'/'model.pt').preproc.size==(64,32)

def test_interrupted_training_keeps_what_was_learnt(capsys, tmp_path, folder, monkeypatch):
    from fastreid_nb.train.core import ReIDLearner
    step,n = ReIDLearner._do_grad_opt,[]
    def stop(self):
        step(self)
        n.append(1)
        if len(n)==2: raise KeyboardInterrupt
    monkeypatch.setattr(ReIDLearner, '_do_grad_opt', stop)
    assert main(['train', str(folder), *quick, '--out', str(tmp_path/'o')])==130
    assert 'stopped early' in capsys.readouterr().out
    assert not load_reid(tmp_path/'o'/'model_interrupted.pt').training
    assert sorted(o.name for o in (tmp_path/'o').iterdir())==['experiment.yml','model_interrupted.pt','run']

def test_nothing_learnt_nothing_written(capsys, tmp_path, folder):
    (tmp_path/'o').mkdir()
    (tmp_path/'o'/'model.pt').write_text('the good one')
    assert '0 epochs: expected 1 or more' in says(capsys, 1, 'train', folder, *quick, '--epochs', 0, '--out', tmp_path/'o')
    assert [(o.name,o.read_text()) for o in (tmp_path/'o').iterdir()]==[('model.pt','the good one')]

def test_doctor(capsys, tmp_path, folder):
    "A healthy set passes; an ill one does not, on one screen, and every finding goes into the table"
    assert main(['doctor', str(folder)])==0
    assert '0 errors, 0 warnings, 0 notes' in capsys.readouterr().out
    shutil.copytree(folder, tmp_path/'ill')
    one,two,three = sorted((tmp_path/'ill'/'bounding_box_train').iterdir())[:3]
    one.write_bytes(b'')
    shutil.copy(two, two.with_name('0009_c1s1_000009_00.jpg'))
    shutil.copy(three, tmp_path/'ill'/'query'/'0009_c1s1_000009_00.jpg')
    assert main(['doctor', str(tmp_path/'ill'), '--csv', str(tmp_path/'new'/'f.csv'), '--test-frac', '.5', '--workers', '1'])==1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines)<=40 and max(map(len, lines))<=80 and lines[1].startswith('error')
    assert any('filed under two identities' in o for o in lines) and any('unreadable' in o for o in lines)
    df = pd.read_csv(tmp_path/'new'/'f.csv')
    assert len(df)==sum(int(o.split()[1]) for o in lines if o.split()[0] in ('error','warning','note'))

def test_doctor_options(capsys, tmp_path):
    "A regex, notes of the reader below the report, and dashes or underscores"
    pictures(tmp_path/'set', 8)
    assert main(['doctor', str(tmp_path/'set'), '--regex', r'id (?P<pid>\d+)', '--test_frac', '.25', '--radius=4'])==0
    out = capsys.readouterr().out
    assert 'while reading: no split given: 6 identities for training, 2 others' in out and '24 images' in out
    (tmp_path/'t.csv').write_text('path,pid\nnone.png,1\nalso none.png,1\nset/id 0/0.png,2\nset/id 1/0.png,2\n')
    assert main(['doctor', str(tmp_path/'t.csv')])==1
    assert 'none.png (no image)' in capsys.readouterr().out

def test_doctor_wrong_calls(capsys, tmp_path, folder, monkeypatch):
    "What goes wrong before, while or after reading is one sentence"
    (tmp_path/'file').touch()
    assert 'choose a folder you may write to' in says(capsys, 1, 'doctor', folder, '--csv', tmp_path/'file'/'f.csv')
    assert 'expected a CSV file' in says(capsys, 1, 'doctor', tmp_path/'nowhere')
    assert 'radius 99: expected 0 to 16' in says(capsys, 1, 'doctor', folder, '--radius', 99)
    (tmp_path/'boxes.csv').write_text(f'path,pid,x,y,w,h\n{folder}/query,1,0,0,0,5\n{folder}/query,1,0,0,5,5\n')
    assert 'boxes are no boxes' in says(capsys, 1, 'doctor', tmp_path/'boxes.csv')
    from fastreid_nb.data import copies
    def broken(*args, **kwargs): raise OSError(5, 'Input/output error')
    monkeypatch.setattr(copies, '_scan_chunk', broken)
    assert 'Input/output error' in says(capsys, 1, 'doctor', folder)

def test_no_tensorboard(capsys, tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    said = says(capsys, 1, 'train', folder, *quick, '--log', 'tensorboard', '--out', tmp_path/'o')
    assert 'pip install "fastreid-nb[log]"' in said

def test_tensorboard_of_a_run_that_goes_on(tmp_path):
    "Killed in the second epoch: every step of loss and terms once, at its place"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    data = toy_reid(tmp_path/'toy', n_ids=8, size=(32,16), progress=False)
    class Killed(Callback):
        now = True
        def before_batch(self):
            if self.now and self.epoch==1 and self.iter==1: raise SystemExit
    def fit(**kwargs):
        learn = reid_learner(reid_dls(data, (32,16), 2, 2, num_workers=0), resnet18, dtype=torch.float32)
        keeps = Resumable(tmp_path/'run', every_minutes=1e-9, **kwargs)
        with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(2, 1e-4, cbs=[keeps, TensorBoardLog(tmp_path/'board'), Killed()])
        return learn
    with pytest.raises(SystemExit): fit()
    Killed.now = False
    learn = fit(resume=True)
    seen = EventAccumulator(str(tmp_path/'board')).Reload()
    n = 2*len(learn.dls.train)
    for name in ('train/loss','train/ce','train/lr'): assert [o.step for o in seen.Scalars(name)]==list(range(n)), name
    assert [o.step for o in seen.Scalars('epoch/mAP')]==[n//2-1,n-1]

def test_a_search_for_a_rate_is_no_part_of_the_log(tmp_path):
    data = toy_reid(tmp_path/'toy', n_ids=8, size=(32,16), progress=False)
    learn = reid_learner(reid_dls(data, (32,16), 2, 2, num_workers=0), resnet18, dtype=torch.float32, path=tmp_path,
        cbs=[EpochLog(str(tmp_path/'log.csv')), TensorBoardLog(tmp_path/'board')])
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=8, show_plot=False)
        assert not (tmp_path/'log.csv').exists() and not (tmp_path/'board').exists()
        learn.fit(2)
    assert pd.read_csv(tmp_path/'log.csv').epoch.tolist()==[0,1]

def test_the_log_of_a_run_that_goes_on(capsys, tmp_path, folder, monkeypatch):
    "One line an epoch, of those before the kill too; the ledger counts the time before it; a log is no other setting"
    words = 'train', folder, *quick, '--epochs', 3, '--precision', 'float32'
    def run(*more): return main([str(o) for o in (*words, *more)])
    def epochs(): return pd.read_csv(tmp_path/'o'/'log.csv').epoch.tolist()
    after = Resumable.after_epoch
    def die(self):
        if self.epoch==1: raise SystemExit   # the line of this epoch is written, its state is not
        after(self)
    monkeypatch.setattr(Resumable, 'after_epoch', die)
    with pytest.raises(SystemExit): run('--out', tmp_path/'o', '--log', 'csv')
    monkeypatch.undo()
    assert epochs()==[0,1]
    state,_,_ = last_state(tmp_path/'o'/'run')
    write_state(tmp_path/'o'/'run', state|dict(seconds=state['seconds']+3600))
    assert run('--resume', tmp_path/'o')==0   # the log goes on without being asked for
    assert epochs()==[0,1,2] and 60<Ledger(tmp_path/'ledger.csv').read().minutes.item()<70
    assert run('--out', tmp_path/'o', '--overwrite', '--epochs', 1)==0
    assert not (tmp_path/'o'/'log.csv').exists()   # the numbers of the run that was replaced

def test_a_forced_run_is_killed_again(capsys, tmp_path, folder, monkeypatch):
    "From then on it is the run with the new settings; a line of the ledger says that its own run was forced"
    words = 'train', folder, *quick, '--precision', 'float32'
    def run(*more): return main([str(o) for o in (*words, *more)])
    dies_after_an_epoch(monkeypatch)
    with pytest.raises(SystemExit): run('--epochs', 2, '--out', tmp_path/'o')
    with pytest.raises(SystemExit): run('--epochs', 3, '--resume', tmp_path/'o', '--force')
    with pytest.raises(SystemExit): run('--epochs', 2, '--out', tmp_path/'p', '--ledger', tmp_path/'p.csv')
    monkeypatch.undo()
    assert run('--epochs', 1, '--resume', tmp_path/'p', '--force', '--ledger', tmp_path/'p.csv')==0
    assert Ledger(tmp_path/'p.csv').read().name.item().endswith('(forced)')
    assert main(['train', '--resume', str(tmp_path/'o')])==0 and 'goes on in epoch 2 of 3' in capsys.readouterr().out
    assert Ledger(tmp_path/'ledger.csv').read().epochs.item()==3

def test_log_for_tensorboard(capsys, tmp_path, folder):
    words = 'train', folder, *quick, '--log', 'tensorboard', '--out', tmp_path/'o'
    assert main([str(o) for o in words])==0
    assert any((tmp_path/'o'/'tensorboard').iterdir())

def test_the_module_is_the_command(tmp_path):
    "What a launcher of processes starts"
    code = "import runpy; runpy.run_module('fastreid_nb.recipes.cli', run_name='__main__', alter_sys=True)"
    assert 'usage: reid COMMAND' in fresh.run(tmp_path/'said.txt', code, '--help')

def test_a_killed_run_goes_on(capsys, tmp_path, folder, monkeypatch):
    "Killed after an epoch: the same command goes on, another one is refused, and states go when the model is there"
    words = 'train', folder, *quick, '--epochs', 2, '--precision', 'float32'
    def run(*more): return main([str(o) for o in (*words, *more)])
    dies_after_an_epoch(monkeypatch)
    with pytest.raises(SystemExit): run('--out', tmp_path/'o')
    monkeypatch.undo()
    (tmp_path/'o'/'model_interrupted.pt').unlink()
    assert run('--out', tmp_path/'o')==0 and 'holds a run that did not end' in capsys.readouterr().out
    told = main([str(o) for o in (*words, '--resume', tmp_path/'o', '--seed', 5)]),capsys.readouterr()
    assert told[0]==1 and 'batches.seed: 0 → 5' in told[1].err and '--force' in told[1].err and 'the run goes on with' not in told[1].out
    says(capsys, 1, 'train', tmp_path/'nowhere', *quick, '--out', tmp_path/'o', '--overwrite')
    assert last_state(tmp_path/'o'/'run')[0]   # what cannot begin takes nothing away
    assert run('--resume', tmp_path/'o')==0 and 'the run goes on in epoch 1 of 2' in capsys.readouterr().out
    a,b = (load_reid(tmp_path/o/'model.pt').state_dict() for o in ('o-2','o'))
    assert all((a[k]==b[k]).all() for k in a) and not (tmp_path/'o'/'run').exists()
    assert 'holds no run that could go on' in says(capsys, 1, *words, '--resume', tmp_path/'o')

def test_a_run_killed_in_its_first_write_leaves_the_folder_free(tmp_path):
    (tmp_path/'o'/'run').mkdir(parents=True)
    (tmp_path/'o'/'run'/'half.tmp').touch()
    with run_folder(tmp_path/'o') as folder: assert folder==tmp_path/'o'
    (tmp_path/'o'/'run'/'state-000000010.pt').touch()
    with run_folder(tmp_path/'o') as folder: assert folder==tmp_path/'o-2'
