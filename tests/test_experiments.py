"Experiments: every shipped recipe is built, trained for two steps and written down again; every name is within reach; bad files"
import json, os, warnings
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from PIL import Image
from fastreid_nb.data.plain import read_yaml
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.augment.loaders import PKLoader
from fastreid_nb.train.core import ReIDLearner
from fastreid_nb.train.names import _kinds, names_of
from fastreid_nb.recipes import tune
from fastreid_nb.recipes.cli import reid_main
from fastreid_nb.recipes.core import Experiment, shipped
from fastreid_nb.recipes.ledger import Ledger
from fastreid_nb.recipes.publish import publish
from fastreid_nb.recipes.published import recipe_names
from fastreid_nb.recipes.run import _note, run_experiment
from fastreid_nb.eval.inference import evaluate_data
from fastreid_nb.train.checkpoint import load_reid
from fastreid_nb.recipes.use import check_options
from fastreid_nb.weights.load import load_pretrained
from slow import slow_but
from test_readers import TREES, annos, market_tree, text

names = recipe_names()

## Trees of true file names, with images

more = dict(veriwild={**{f'images/0000{i}/00000{j}.jpg':None for i,j in ((1,1),(1,2),(2,3),(2,4),(3,5),(3,6))},
        'train_test_split/train_list.txt':text('00001/000001', '00001/000002', '00003/000005', '00003/000006'),
        'train_test_split/vehicle_info.txt':text('head', *(f'0000{i}/00000{j};{j};x;;;' for i,j in ((1,1),(1,2),(2,3),(2,4),(3,5),(3,6))))},
    sop={'chair_final/1_0.JPG':None, 'chair_final/1_1.JPG':None, 'chair_final/9_1.JPG':None,
        'Ebay_train.txt':text('image_id class_id super_class_id path', '1 1 1 bicycle_final/111085122871_0.JPG', '2 1 1 bicycle_final/111085122871_1.JPG',
            '3 2 3 chair_final/1_0.JPG', '4 2 3 chair_final/1_1.JPG'),
        'Ebay_test.txt':text('image_id class_id super_class_id path', '5 11319 3 chair_final/251952414262_0.JPG', '6 11319 3 chair_final/9_1.JPG')},
    cars196={**dict.fromkeys(f'car_ims/{i:06d}.jpg' for i in range(1, 9)),
        'cars_annos.mat':annos(relative_im_path=[f'car_ims/{i:06d}.jpg' for i in range(1, 9)], bbox_x1=[1]*8, **{'class':[1,1,98,98,99,99,196,196]})},
    inshop={**{f'Img/img/WOMEN/Dresses/id_0000000{p}/0{i}_1_front.jpg':None for p in (1,2,3) for i in (1,2)},
        'Eval/list_eval_partition.txt':text('6', 'image_name item_id evaluation_status', *(f'img/WOMEN/Dresses/id_0000000{p}/0{i}_1_front.jpg id_0000000{p} {k}'
            for p,i,k in ((1,1,'train'),(1,2,'train'),(3,1,'train'),(3,2,'train'),(2,1,'query'),(2,2,'gallery'))))})

def tree(root, name):
    t = TREES[name]
    t.make(root)
    for k,write in more.get(name, {}).items():
        f = root/t.folder/k
        f.parent.mkdir(parents=True, exist_ok=True)
        f.touch() if write is None else write(f)

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A folder with a tree of every set that a recipe reads, and folders of identities"
    root = tmp_path_factory.mktemp('sets')
    for o in ('dukemtmc','msmt17','veri776','vehicleid','veriwild','cub200','cars196','sop','inshop'): tree(root, o)
    market = market_tree('0002_c1s1_000451_03.jpg 0007_c2s1_000451_03.jpg', '0001_c1s1_001051_00.jpg', '0001_c2s1_001051_00.jpg 0000_c2s1_001051_00.jpg')
    folders = [f'animals/{i}/{j}.jpg' for i in range(8) for j in range(3)]
    for o in [*(f'Market-1501-v15.09.15/{o}' for o in market), *folders]:
        (root/o).parent.mkdir(parents=True, exist_ok=True)
        (root/o).touch()
    small = Image.new('RGB', (32,64), (200,90,40))
    for f in root.rglob('*'):
        if f.suffix.lower() in ('.jpg','.png') and f.stat().st_size==0: small.save(f, 'jpeg')
    return root

tiny = ['preproc.size=[64, 32]', 'sampler.p=2', 'sampler.k=2', 'weights=none', 'workers=0', 'precision=float32']
real = {'sbs_r50_ibn_msmt17', 'bagtricks_s50_dukemtmc', 'mgn_r50_market1501', 'retrieval_cub200', 'vit_market1501'} # one of a family with its own network

def shrunk(name):
    "A recipe for tiny images, with its own network or the smallest one"
    exp = Experiment.load(name, tiny)
    changes = []
    is_mgn = exp['model']!='reid_model' and exp['model.fn']=='mgn'
    small = 'resnet18' if is_mgn else '{fn: osnet, width: x0_25}' # MGN copies stages
    if name not in real: changes = [f'model.backbone={small}']
    if exp['sampler.batches']=='uniform_batches': changes.append('sampler.p=1')
    if is_mgn: changes.append('preproc.size=[96, 32]') # six rows to cut into thirds
    if exp['data.train'][0] in ('read_data','from_folder'): changes.append('data.train.path=animals')
    if isinstance(exp['data.train'][0], dict) and exp['data.train'][0]['fn']=='toy_reid': changes.append('data.train={fn: from_folder, path: animals}')
    schedule = exp['schedule'] if isinstance(exp['schedule'], dict) else {}
    changes += [f'schedule.{k}=1' for k in ('warmup_iters','flat_iters') if k in schedule]
    return exp.set(*changes, f'freeze_iters={min(1, exp["freeze_iters"])}')

class TwoSteps(Callback):
    "Ends a fit after its second step"
    def before_fit(self): self.losses = []
    def after_batch(self):
        if self.training: self.losses.append(self.loss.item())
        if len(self.losses)==2: raise CancelFitException()

some = *real,'bagtricks_r50_market1501','agw_r101_ibn_dukemtmc' # of the 48 that combine methods, networks and sets: each of them once
grid = [o for o in names if o.startswith(('bagtricks_','agw_','sbs_','mgn_')) and o.endswith(('market1501','dukemtmc','msmt17'))]

@pytest.mark.parametrize('name', slow_but(names, *some, *({*names}-{*grid})))
def test_recipe(root, name):
    "Two steps on a tree of its set, with the loss, the optimiser and the schedule of the recipe"
    torch.manual_seed(0)
    exp,two = shrunk(name),TwoSteps()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # the counts of the trees are not the published ones
        data,*others = exp.read(root)
    learn = exp.learner(data)
    before = next(learn.model.parameters()).detach().clone()
    with learn.no_bar(), learn.no_logging(): exp.fit(learn, [two])
    assert len(two.losses)==2 and all(map(torch.isfinite, torch.tensor(two.losses)))
    moved = (next(learn.model.parameters())-before).abs().max()
    assert moved>0 or exp['schedule']!='fit_warmup_cos'
    n_tests = len(exp['data.test'] or [1])
    assert len(others)==(n_tests if exp['data.holdout'] else n_tests-1)

@pytest.mark.parametrize('name', [o for o in names if not o.endswith(('dukemtmc','msmt17'))])
def test_networks_of_recipes(name):
    "The network of a recipe can be made as it stands, and so can all that needs no images"
    exp = Experiment.load(name)
    assert exp.check() is exp

def test_recipes_are_written_down():
    "YAML to experiment to YAML; no two recipes are the same run, and every file is part of one"
    found = [Experiment.load(o) for o in names]
    for exp in found:
        again = Experiment(read_yaml(exp.to_yaml()))
        assert again.values==exp.values and again.hash==exp.hash
    assert len({o.hash for o in found})==len(names)
    stems,parts = {Path(str(o)).stem for o in shipped.iterdir()},'_'.join(names)
    assert [o for o in stems if o not in parts]==[]

@pytest.fixture(scope='module')
def learner(tmp_path_factory):
    toy = toy_reid(tmp_path_factory.mktemp('toy'), n_ids=8, size=(64,32), progress=False)
    exp = Experiment.load('toy_small', [*tiny, 'model.backbone={fn: osnet, width: x0_25}'])
    return exp.learner(toy)

def test_classifiers_of_shared_people(learner, tmp_path, capsys):
    "The file knows half of the people: their rows are kept, the others begin as in any model of this seed, not those of the file"
    exp = Experiment.load('toy_small', [*tiny, 'model.backbone={fn: osnet, width: x0_25}'])
    half = exp.learner(learner.dls.data.holdout(.5))
    half.model.head.classifier.weight.data.fill_(.5)
    half.save_reid(tmp_path/'half.pt')
    on = exp.set(f'weights={tmp_path/"half.pt"}', 'head=match').check().learner(learner.dls.data)
    known = [o in half.dls.pids for o in on.dls.pids]
    kept = [bool((row==.5).all()) for row in on.model.head.classifier.weight]
    assert kept==known and 0<sum(known)<len(known) and f'of {sum(known)} of {len(known)} identities' in capsys.readouterr().out
    for head in ('keep','match'):
        with pytest.raises(ValueError, match='head'): exp.set('weights=none', f'head={head}').check()
    torch.save(torch.load(tmp_path/'half.pt', weights_only=True)|dict(pid_names=[]), tmp_path/'nameless.pt')
    with pytest.raises(ValueError, match='does not say who its classes are'): exp.set(f'weights={tmp_path/"nameless.pt"}', 'head=match').check()

def test_weights_of_a_published_folder(learner, tmp_path, capsys):
    "An experiment, a command and `load_pretrained` take the folder that `publish` wrote, and say what is wrong with another"
    learner.save_reid(tmp_path/'model.pt')
    publish(tmp_path/'model.pt', learner.dls.data, tmp_path/'out', 'free of rights', progress=False)
    exp = Experiment.load('toy_small', [*tiny, 'model.backbone={fn: osnet, width: x0_25}', f'weights={tmp_path/"out"}', 'head=match']).check()
    on = exp.learner(learner.dls.data)
    assert torch.equal(on.model.head.classifier.weight, learner.model.head.classifier.weight)
    assert torch.equal(load_pretrained(tmp_path/'out').backbone.conv1.conv.weight, learner.model.backbone.conv1.conv.weight)
    check_options(dict(weights=str(tmp_path/'out')))
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='published folder, and there is no such file'): exp.set(f'weights={tmp_path/"empty"}').check()

def test_cards_say_who_was_in_training(learner, tmp_path):
    "Whether the people that are scored were learnt is seen by their names, not by a word of the experiment"
    data = learner.dls.data
    learner.save_reid(tmp_path/'model.pt')
    def card_of(folder, scored, **kw): return (publish(tmp_path/'model.pt', scored, tmp_path/folder, 'free', progress=False, **kw)/'README.md').read_text()
    assert 'none of them in training' in card_of('strangers', data)
    q = data.train.groupby('pid').head(1)
    known = replace(data, query=q, gallery=data.train.drop(q.index))
    assert f'{len(q)} of them in training, so that this says little about strangers' in ' '.join(card_of('known', known).split())
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'README.md').write_text('about something else')
    with pytest.raises(FileExistsError, match='has a README.md'): card_of('mine', data)
    assert (tmp_path/'mine'/'README.md').read_text()=='about something else' and 'none of them' in card_of('mine', data, overwrite=True)
    assert load_reid(tmp_path/'mine').experiment['data']['root']==''

def test_blanks_say_nothing(tmp_path):
    "An empty value is null, and an empty section leaves that of the base as it is"
    (tmp_path/'blank.yml').write_text('base: mgn_r50_market1501\nloss:\noptim:\n')
    blank,full = Experiment.load(tmp_path/'blank.yml'),Experiment.load('mgn_r50_market1501')
    assert blank['loss']==full['loss'] and blank['optim']==full['optim']
    assert Experiment({}, [f'{k}=null' for k in ('data','sampler','save','dist','optim','preproc','eval','loss')])==Experiment({})

@pytest.mark.parametrize('change,match', [('loss.triplt=null', 'loss.triplt: there is no such term.*triplet'), ('loss=[CrossEntropy]', 'loss='), ('data.train=[]', 'data.train is empty'),
    ('data.protocol=foo', 'foo'), ('sampler={p: 1, k: 1}', 'two images or more')])
def test_values_without_sense(change, match):
    with pytest.raises(ValueError, match=match): Experiment({}, [change])

def test_terms_may_be_taken_away(tmp_path):
    assert Experiment({}, ['loss.triplet=null'])['loss']['triplet'] is None
    (tmp_path/'a.yml').write_text('loss: {ce: CrossEntropy, triplet: TripletLoss}')
    (tmp_path/'b.yml').write_text('base: a.yml\nloss: {triplt: null}')
    with pytest.raises(ValueError, match='there is no such term.*triplet'): Experiment.load(tmp_path/'b.yml')

def test_files_that_are_no_experiment(tmp_path):
    (tmp_path/'l.yml').write_bytes('name: Größe'.encode('latin-1'))
    with pytest.raises(ValueError, match='l.yml is no text in UTF-8'): Experiment.load(tmp_path/'l.yml')
    with pytest.raises(FileNotFoundError, match='toy_small'): Experiment.load('toy_smal')

def test_scores_stand_under_the_name_of_the_test(learner, tmp_path):
    "Two sets are learnt, one of them is scored"
    made = [toy_reid(tmp_path/o, n_ids=8, size=(64,32), seed=i, progress=False) for i,o in enumerate('ab')]
    roots = [str(Path(o.train.path[0]).parents[1]) for o in made]
    sets = [dict(fn='market1501', path=o, name=n) for o,n in zip(roots, 'ab')]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        data, = Experiment(dict(data=dict(train=sets))).read()
        assert data.name=='a' and data.train.pid.nunique()==made[0].train.pid.nunique()+made[1].train.pid.nunique()
        with pytest.raises(ValueError, match="two sets are called 'a'"):
            Experiment(dict(data=dict(train=sets, test=[sets[0], dict(sets[1], name='a')]))).read()

def test_the_best_epoch_is_what_is_reported(tmp_path, learner):
    "The line of the ledger is about the model that is left"
    root = Path(learner.dls.data.train.path[0]).parents[1]
    exp = Experiment.load('toy_small', [*tiny, 'model.backbone={fn: osnet, width: x0_25}', 'epochs=4', 'optim.lr=0.02', 'sampler.p=4', 'sampler.k=4',
        f'data.train={{fn: market1501, path: {root}}}', 'callbacks=[{fn: KeepBest, on: test, patience: null}]'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        res = run_experiment(exp, tmp_path/'o')
        left = evaluate_data(load_reid(tmp_path/'o'/'model.pt'), exp.read()[0], progress=False)
    assert left.mAP==pytest.approx(res.mAP, abs=1e-4)==pytest.approx(Ledger(tmp_path/'ledger.csv').read().mAP.item(), abs=1e-3)

def test_schedules_fit_the_sets(learner, monkeypatch):
    "The lengths of every recipe make sense with the iterations of its set: 202 an epoch on Market-1501, 542 on VERI-Wild"
    class Stop(Callback):
        def before_train(self): raise CancelFitException()
    monkeypatch.setattr(PKLoader, '__len__', lambda self: 542)
    monkeypatch.setattr(learner.dls, 'data', replace(learner.dls.data, held_out=True))
    with learner.no_bar(), learner.no_logging():
        found = [Experiment.load(o) for o in names]
        for exp in {json.dumps([o['schedule'], o['epochs'], o['freeze_iters']]):o for o in found}.values(): exp.fit(learner, [Stop()])

def test_sets_of_one_name(root):
    "Their scores would be written over each other"
    test = ['market1501', dict(fn='market1501', path='Market-1501-v15.09.15')]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # the counts of the trees are not the published ones
        with pytest.raises(ValueError, match="two sets are called 'market1501'"): Experiment(dict(data=dict(train='market1501', test=test))).read(root)

early = {'schedule={fn: fit_warmup_cos, warmup_epochs: 99}':'schedule: a warm-up of 99', 'schedule={fn: fit_warmup_cos, how: up}':'schedule: how=',
    'schedule={fn: fit_warmup_steps, milestone_epochs: [99]}':'schedule: a fall at 99', 'schedule={fn: fastreid_curve, delay_epochs: 99}':'expected fewer than the',
    'schedule={fn: fine_tune, patience: 3}':'callbacks: KeepBest would choose', 'callbacks=[KeepBest]':'callbacks: KeepBest would choose',
    'callbacks=[{fn: FreezeLayers, what: [backbone.layr1]}]':'callbacks: no layer', 'precision=float16':'needs CUDA'}

@pytest.mark.parametrize('change', early)
def test_what_needs_no_images_is_refused_before_them(change):
    exp = Experiment.load('toy_small', [*base, 'model.backbone={fn: osnet, width: x0_25}', change])
    with pytest.raises(ValueError) as e: exp.check()
    assert early[change] in str(e.value), e.value

@pytest.mark.parametrize('changes', [['schedule={fn: fine_tune, patience: 3}', 'data.holdout=0.2'], ['callbacks=[{fn: KeepBest, on: test}]'],
    ['schedule={fn: fit_warmup_cos, warmup_iters: 10, flat_iters: 20}'], ['callbacks=[{fn: FreezeLayers, what: [backbone.conv*, 0]}]'], ['freeze_iters=10'],
    ['callbacks=[{fn: GradientAccumulation, n_acc: 64}, {fn: GradientClip, max_norm: 5}]'], ['callbacks=[{fn: SchedLoss, what: triplet.margin, start: 0.1, end: 0.5}]']])
def test_what_fits_passes(changes):
    exp = Experiment.load('toy_small', [*base, 'model.backbone={fn: osnet, width: x0_25}', *changes])
    assert exp.check() is exp

def test_later_keys_leave_the_hash_alone():
    "An experiment that says nothing of them is the run that it always was"
    exp = Experiment({})
    assert exp.hash=='1100d6f609a6' and exp.set('dist.minutes=3', 'dist.gather=true', 'compile=false', 'head=drop', 'save.minutes=null', 'save.keep=9').hash==exp.hash
    assert len({exp.set(o).hash for o in ('seed=0', 'dist.gather=false', 'dist.sync_bn=false', 'compile=true', 'head=keep')})==5

## Names

base = ['epochs=1', *tiny]
where = dict(batches='sampler.batches', backbone='model.backbone', pool='model.pool', head='model.head', model='model', opt='optim.func', dist='eval.dist',
    loss='loss', schedule='schedule', term='loss.x', aug='augs', batch_aug='batch_augs', callback='callbacks', reader='data.train',
    between='callbacks=[{{fn: Distill, teacher: null, ema: 0.9, terms: [{}]}}]')
needs = dict(with_norm='{fn: with_norm, backbone: resnet18}', haa='{fn: haa, backbone: resnet18}', mgn='{fn: mgn, backbone: resnet18}', rmgl='{fn: rmgl, backbone: resnet18}',
    pcb='{fn: pcb, backbone: resnet18}', FreezeLayers='{fn: FreezeLayers, what: [backbone.conv1]}', PCBHead='{fn: PCBHead, n_parts: 2}', timm_backbone='timm/resnet18',
    Distill='[{fn: Distill, teacher: big.pt, terms: [SoftKL]}]', SSKD='[{fn: SSKD, teacher: big.pt, unlabelled: [a.jpg]}]',
    KeepBest='{fn: KeepBest, on: test}', SchedLoss='{fn: SchedLoss, what: triplet.margin, start: 0.1, end: 0.5}', hrnet='osnet', vit='{fn: vit, variant: deit_tiny}', transreid='{fn: transreid, variant: deit_small}')

@pytest.mark.parametrize('kind', where)
def test_every_name_is_within_reach(kind, learner, monkeypatch):
    "Each public backbone, pooling, head, model, loss, sampler, … of the library can be set and is made by `check`"
    exp = Experiment.load('toy_small', [*base, 'epochs=3'])
    if kind not in ('backbone','pool','head','model'): monkeypatch.setattr('fastreid_nb.recipes.build._dummy_model', lambda exp: None)
    monkeypatch.setattr('fastreid_nb.kd.distill.load_reid', lambda path: learner.model)
    for o in names_of(kind):
        name,at = needs.get(o, o),where[kind]
        changed = exp.set(at.format(name) if '=' in at else f'{at}={name}')
        if '101' not in o and '152' not in o: changed.check()   # the recipes have large ones
    assert {*where}=={*_kinds,'schedule'}

def test_losses_with_a_memory(learner):
    "What a term asks for is filled in"
    for o in ('CenterLoss','QueueLoss','CentroidLoss'):
        loss = Experiment({}, [f'loss={{x: {o}}}']).loss(learner.model, 6)
        assert sum(p.numel() for p in [*loss.parameters(), *loss.buffers()])>0

def test_a_new_function_is_known(monkeypatch):
    "Names are found by what a function takes and gives, not in a list"
    import fastreid_nb.all as everything
    def first_come(pids, p, k, rng): return None
    first_come.__module__ = 'fastreid_nb.augment.samplers'
    monkeypatch.setattr(everything, 'first_come', first_come, raising=False)
    names_of.cache_clear()
    try: assert 'first_come' in names_of('batches')
    finally: names_of.cache_clear()
    monkeypatch.undo()
    assert 'first_come' not in names_of('batches')
    names_of.cache_clear()

@pytest.mark.parametrize('row', [['model.backbone.ibn=true'], ['augs=[{fn: autoaugment, p: 0.1}, pad_crop, hflip, random_erase]'], ['loss.triplet.margin=null'],
    ['model.backbone.nl=true'], ['model.pool=GeM'], ['loss.ce=CircleSoftmax', 'model.head.cosine=true'], ['freeze_iters=1000'], ['schedule={fn: fit_warmup_cos, warmup_iters: 2000}'],
    ['callbacks=[SWA]'], ['augs=[augmix, pad_crop, hflip]']])
def test_rows_of_an_ablation(row):
    "What a study changes one by one can be said, is another run, and can be made"
    exp = Experiment.load('bagtricks_r50_market1501', tiny)
    changed = exp.set(*row).check()
    assert changed!=exp and changed.diff(exp)

## Bad files

bad = {'epcohs: 3':'did you mean epochs?', 'epochs: three':'expected int', 'epochs: 0':'expected 1', '- epochs':'is no mapping', 'epochs':'is no mapping', '':'is no mapping',
    'version: 2':'has format 2', 'base: nowhere':'no experiment nowhere', 'base: [1]':'expected the name of a file', 'base: bad.yml':'is a circle',
    '{a: &x 1, b: *x}':'is an anchor', 'seed: !!python/object/apply:os.system [echo]':'could not determine', 'seed: !!timestamp 2020-01-01':'expected numbers, texts',
    'seed: 1\nseed: 2':'seed is said twice', '{1: 2}':'keys: texts', 'seed: [':'line 1', 'data: {train: [market1501, market1501]}':'stands there twice',
    'data: {train: market1502}':'did you mean market1501?', 'model: {backbone: {fn: os.system}}':"no backbone 'os.system'", 'model: {fn: load_reid, path: x}':"no model 'load_reid'",
    'model: {backbone: {fn: resnet50, pretrained: x.pt}}':'unknown key model.backbone.pretrained', 'loss: {x: {fn: TripletLoss, margni: 1}}':'did you mean margin?',
    'optim: {lr: .nan}':'expected float', 'optim: {lr: true}':'expected float', 'optim: {lr: 0}':'optim.lr=0', 'optim: 3':'expected a mapping', 'augs: [{p: 1}]':'a mapping with fn',
    'data: {holdout: 1}':'expected below 1', 'precision: half':'choose one of', 'callbacks: [Recorder]':"no callback 'Recorder'", 'workers: 1.5':'expected int'}

@pytest.mark.parametrize('said', bad)
def test_bad_files(tmp_path, said):
    (tmp_path/'bad.yml').write_text(said)
    with pytest.raises((ValueError,FileNotFoundError)) as e: Experiment.load(tmp_path/'bad.yml')
    assert bad[said] in str(e.value), e.value

def test_large_and_deep_files(tmp_path):
    for said in ('['*2000, '{a: '*2000, 'a: '+'x'*2*10**6):
        (tmp_path/'bad.yml').write_text(said)
        with pytest.raises(ValueError): Experiment.load(tmp_path/'bad.yml')

def says(capsys, code, *words):
    assert reid_main([str(o) for o in words])==code
    told = capsys.readouterr()
    return told.err if code else told.out

def test_wrong_calls(capsys, root, tmp_path):
    out = ['--out', tmp_path/'o']
    assert 'expected KEY=VALUE' in says(capsys, 1, 'train', root/'animals', '--set', 'lr', *out)
    assert 'unknown key optim.rl' in says(capsys, 1, 'train', root/'animals', '--set', 'optim.rl=1', *out)
    assert 'no experiment sbs_r51' in says(capsys, 1, 'train', root, '--config', 'sbs_r51', *out)
    assert 'nothing to train on' in says(capsys, 1, 'train', *out)
    assert "log='wandb'" in says(capsys, 1, 'train', root/'animals', '--log', 'wandb', *out)
    assert 'space is empty' in says(capsys, 1, 'tune', root/'animals', *out)
    assert 'data_licence is missing' in says(capsys, 1, 'publish', 'm.pt', root/'animals', *out)
    assert not (tmp_path/'o').exists()

## Runs

quick = ['--set', 'model.backbone={fn: osnet, width: x0_25}', *(o for o in tiny if 'workers' not in o), 'augs=[hflip]', '--workers', 0, '--epochs', 1]

def test_run_from_a_file(capsys, root, tmp_path, monkeypatch):
    "A file with changes: what was run is printed, saved, in the checkpoint and in the ledger"
    shared,compiled = [],[]
    monkeypatch.setattr(ReIDLearner, 'across_processes', lambda self, **kw: shared.append(kw) or self)
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(type(self).__name__))
    (tmp_path/'mine.yml').write_text('{base: own, seed: 3}')
    words = ['train', root/'animals', '--config', tmp_path/'mine.yml', *quick, '--set', 'dist.gather=false', '--compile', '--log', 'csv', '--out', tmp_path/'o']
    out = says(capsys, 0, *words)
    exp = Experiment.load(tmp_path/'o'/'experiment.yml')
    assert f'# hash {exp.hash}' in out and exp['seed']==3 and exp['epochs']==1 and exp['model.backbone.width']=='x0_25'
    ck = torch.load(tmp_path/'o'/'model.pt', weights_only=True)
    assert ck['experiment']['hash']==exp.hash and Experiment(ck['experiment'])==exp
    row, = Ledger(tmp_path/'ledger.csv').read().to_dict('records')
    assert row['hash']==exp.hash and row['seed']==3 and 0<=row['mAP']<=1 and row['minutes']>=0
    assert len((tmp_path/'o'/'log.csv').read_text().splitlines())==2
    assert shared==[dict(sync_bn=True, gather=False, minutes=10.)] and compiled==['ReIDModel']
    assert not {'\r','\x1b'} & {*out}

def test_a_ledger_that_cannot_be_written_loses_no_run(capsys, learner, tmp_path):
    (tmp_path/'l.csv').write_text('mine\n')
    _note(Experiment(), learner.dls.data, {}, 1., tmp_path/'l.csv')
    assert 'no line in the ledger' in capsys.readouterr().out and (tmp_path/'l.csv').read_text()=='mine\n'

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_search_goes_on_after_a_kill(capsys, monkeypatch, root, tmp_path):
    "A search that was killed in a trial keeps the trials that had ended, and runs the other one again"
    pytest.importorskip('optuna')
    space = 'tune={space: {optim.lr: [1e-3, 1e-2]}, holdout: 0.4, trials: 3}'
    words = [str(o) for o in ('tune', root/'animals', *quick[:-4], space, 'epochs=1', '--workers', 0, '--out', tmp_path/'s')]
    real = tune.run_trial
    def killed(*args):
        if args[-1].number==1: os.kill(os.getpid(), 9)
        return real(*args)
    def begin():
        torch.set_num_threads(1)
        tune.run_trial = killed
        reid_main(words)
    first = get_context('fork').Process(target=begin)
    first.start()
    first.join()
    assert first.exitcode==-9
    out = says(capsys, 0, *words)
    assert '1 trials were run, 2 to go' in out and (tmp_path/'s'/'best.yml').exists() and len(Ledger(tmp_path/'s'/'ledger.csv').read())==3

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_processes_share_a_ledger(tmp_path):
    "Three processes that write at once leave every line whole"
    def write():
        for i in range(50): Ledger(tmp_path/'l.csv').add(dict(seed=i, name='x'*5000, versions='v'))
    procs = [get_context('fork').Process(target=write) for _ in range(3)]
    for o in procs: o.start()
    for o in procs: o.join()
    df = Ledger(tmp_path/'l.csv').read()
    assert df.seed.value_counts().tolist()==[3]*50 and set(df.name)=={'x'*5000}

def test_package_has_the_recipes():
    "The files are part of what is installed"
    setup = (Path(__file__).parents[1]/'setup.py').read_text()
    assert "'yaml/*.yml'" in setup and json.dumps(sorted(o.name for o in shipped.iterdir())).count('.yml')>20
