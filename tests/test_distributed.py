"""Two processes on the CPU, connected by gloo, against one: losses, scores, statistics, order of gathered rows, and an end without a hang.

All of it in one pair of processes, because most of their time goes into starting."""
import json, os, subprocess, sys, time

import fresh, pytest, torch
from fastreid_nb.recipes.ledger import Ledger

script = fresh.small+'''
from fastai.callback.training import GradientClip
from fastreid_nb.train.distributed import AllRows, processes

rank = int(os.environ.get('RANK', 0))

class Dies(Callback):
    def before_batch(self):
        if rank: os._exit(7)

data = toy_reid(folder, n_ids=23, size=(64,32), progress=False)
dls = reid_dls(data, (64,32), p, 4, augs=[], num_workers=0, val_bs=20)
note,res = Note(),{}
torch.manual_seed(0)
learn = reid_learner(dls, tiny, dtype=torch.float32).across_processes(minutes=1)
torch.save([o.emb for o in learn.features(progress=False)], f'{out}{rank}.pt')
queue = ReIDLoss(CrossEntropy(.1), QueueLoss(32, 64, on='feat'))
learn = reid_learner(dls, tiny, loss=queue, dtype=torch.float32).across_processes(minutes=1)
dls.train.epoch = 0
with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3, cbs=[note, GradientClip(.5)])
res['queue'] = dict(losses=note.seen, who=learn.loss_func['queue'].queue.pids.tolist())
torch.manual_seed(7)
teacher = reid_model(tiny, len(dls.pids))
teacher.preproc,teacher.pids = dls.preproc,list(dls.pids)
learn = reid_learner(dls, tiny, dtype=torch.float32).across_processes(minutes=1)
dls.train.epoch = 0
with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3, cbs=[note, Distill(teacher, SoftKL(), PKT())])
res['taught'] = dict(losses=note.seen)
for name,kw in dict(all={}, own_triplets=dict(gather=False)).items():
    learn = reid_learner(dls, tiny, dtype=torch.float32).across_processes(minutes=1, **kw)
    dls.train.epoch = 0
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 3e-3, cbs=note)
    bn = learn.model.backbone[1]
    res[name] = dict(losses=note.seen, mAP=learn.reid_result.mAP, mean=bn.running_mean.tolist(), var=bn.running_var.tolist(),
        weight=learn.model.head.classifier.weight[0].tolist(), forward='forward' in vars(bn), batches=dls.train.batches is pk_batches)
if processes()>1:
    mine = torch.arange(7.)[rank::2]
    res['rows'] = gather_rows(mine, 7).tolist()
    x = torch.full((2,1), rank+1., requires_grad=True)
    (AllRows.apply(x).pow(2)*torch.arange(4.)[:,None]).sum().backward()
    res['grad'] = x.grad.ravel().tolist()
if processes()>1:
    exp = Experiment.load('toy_small', ['data.train={fn: toy_reid, n_ids: 23, size: [32, 16], progress: false}', 'sampler.p=2', 'sampler.k=2', 'epochs=1',
        'preproc.size=[32, 16]', 'model.backbone={fn: osnet, width: x0_25}', 'workers=0', 'precision=float32'])
    res['run'] = run_experiment(exp, os.path.join(os.path.dirname(out), 'run'), folder).mAP
json.dump(res, open(f'{out}{rank}.json', 'w'))
if processes()>1:
    with learn.no_bar(), learn.no_logging(): learn.fit(3, cbs=Dies())
'''

# Two processes train; the same again, and both are killed in the middle of an epoch; two others go on
killed = fresh.small+'''
import shutil
from fastai.callback.training import GradientClip
rank = int(os.environ['RANK'])

class Dies(Callback):
    order = 100   # after Resumable
    def after_batch(self):
        if dying and self.train_iter==7: os._exit(9)   # an epoch has four batches

data = toy_reid(folder, n_ids=23, size=(64,32), progress=False)
def learner():
    torch.manual_seed(0)
    dls = reid_dls(data, (64,32), p, 4, num_workers=0, seed=3)
    loss = ReIDLoss(CrossEntropy(.1), QueueLoss(32, 64, on='feat'))
    return reid_learner(dls, tiny, loss=loss, dtype=torch.float32).across_processes(minutes=1)
def fit(name, epochs=3, **kw):
    learn = learner()
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(epochs, 3e-3, cbs=[GradientClip(.5), going := Resumable(f'{out}_{name}', every_iters=2, **kw), Dies()])
    return dict(model=learn.model.state_dict(), loss=learn.loss_func.state_dict(), note=going.note)
again,dying = os.path.isdir(f'{out}_killed'),False
torch.distributed.init_process_group('gloo')
if again and not rank: shutil.copytree(f'{out}_killed', f'{out}_forced')
torch.distributed.barrier()
torch.save(fit('killed', resume=True) if again else fit('whole'), f'{out}_{"resumed" if again else "whole"}{rank}.pt')
if again: torch.save(fit('forced', 4, resume=True, force=True), f'{out}_forced{rank}.pt')
dying = True
if not again: fit('killed')
'''

def start(tmp, name, p, code=script, **env):
    return fresh.Fresh(tmp/f'{name}{env.get("RANK", "")}.txt', code, tmp/'toy', p, tmp/name, **env)

def start_pair(tmp, name, code=script):
    net = fresh.meeting()
    return [start(tmp, name, 4, code, RANK=str(r), LOCAL_RANK=str(r), **net) for r in range(2)]

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "What one process and each of two wrote; how the two ended, and after how many seconds the survivor did"
    tmp = tmp_path_factory.mktemp('dist')
    alone = start(tmp, 'one', 8)
    assert alone.wait(300)==0, alone.text
    pair = start_pair(tmp, 'two')
    codes = [pair[1].wait(300)]
    died = time.monotonic()
    codes.insert(0, pair[0].wait(100))
    said = [o.text for o in pair]
    read = lambda o: json.loads((tmp/f'{o}.json').read_text()) if (tmp/f'{o}.json').exists() else pytest.fail('\n'.join(said))
    return dict(folder=tmp, one=read('one0'), two=[read('two0'),read('two1')], codes=codes, seconds=time.monotonic()-died, said=said)

def test_two_learn_what_one_learns(runs):
    one = runs['one']['all']
    for two in (o['all'] for o in runs['two']):
        assert len(two['losses'])==len(one['losses'])>4
        assert two['losses']==pytest.approx(one['losses'], rel=1e-4)
        assert two['mAP']==pytest.approx(one['mAP'], abs=1e-4)
        for k in ('mean','var','weight'): assert two[k]==pytest.approx(one[k], rel=1e-2, abs=2e-4), k

def test_features_are_those_of_one_process(runs):
    one = torch.load(runs['folder']/'one0.pt')
    for rank in range(2):
        for a,b in zip(torch.load(runs['folder']/f'two{rank}.pt'), one, strict=True): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

def test_a_queue_and_clipped_gradients_in_two_processes(runs):
    "Every process keeps the features of both, so that the queue fills as in one"
    one = runs['one']['queue']
    for two in (o['queue'] for o in runs['two']):
        assert two['losses']==pytest.approx(one['losses'], rel=1e-3)
        assert sorted(two['who'])==sorted(one['who']) and -1 not in two['who']   # of both processes, in another order

def test_a_teacher_in_two_processes(runs):
    "Similarities within a batch are those of the batch of both"
    one = runs['one']['taught']
    assert one['losses'][0]!=pytest.approx(runs['one']['all']['losses'][0], rel=.01)   # the teacher has a say
    for two in (o['taught'] for o in runs['two']):
        assert two['losses']==pytest.approx(one['losses'], rel=1e-3)

def test_two_killed_processes_go_on(tmp_path):
    for code in (9,0):
        for o in start_pair(tmp_path, 'run', killed): assert o.wait(300)==code, o.text
    read = lambda name: torch.load(tmp_path/f'run_{name}.pt')
    for rank in range(2):
        whole,resumed = read(f'whole{rank}'),read(f'resumed{rank}')
        assert whole['note']=='' and 'in epoch 1 of 3 after 2 of 4 batches' in resumed['note']
        for part in ('model','loss'):
            for k,v in whole[part].items(): assert torch.equal(v, resumed[part][k]), k
    forced = [read(f'forced{rank}') for rank in range(2)]   # longer, so that the epoch begins again, in both
    assert all(o['note'].endswith('in epoch 1 of 4') for o in forced)
    for k,v in forced[0]['model'].items(): assert torch.equal(v, forced[1]['model'][k]), k

def test_all_processes_hold_the_same_weights(runs):
    for name in ('all','own_triplets'):
        a,b = (o[name] for o in runs['two'])
        assert a['weight']==b['weight'] and a['mAP']==b['mAP']

def test_own_triplets_are_another_training(runs):
    a,b = (o['own_triplets']['losses'] for o in runs['two'])
    assert a!=b # each process sees the loss of its part
    assert runs['two'][0]['own_triplets']['weight']!=runs['two'][0]['all']['weight']

def test_loader_and_norms_are_given_back(runs):
    assert all(o['all']['batches'] and not o['all']['forward'] for o in runs['two'])

def test_rows_come_in_the_order_of_the_table(runs):
    assert all(o['rows']==list(range(7)) for o in runs['two'])

def test_gradients_of_gathered_rows_come_back(runs):
    "The sum over rows i of i·x², seen by both processes: 2·2·i·x"
    assert [o['grad'] for o in runs['two']]==[[0.,4.],[16.,24.]]

def test_an_experiment_in_two_processes(runs):
    "One folder, one line in the ledger, the same score; the second process prints nothing of it"
    assert sorted(o.name for o in runs['folder'].glob('run*'))==['run']
    assert sorted(o.name for o in (runs['folder']/'run').iterdir())==['experiment.yml','model.pt','ranked_list.png']
    assert len(Ledger(runs['folder']/'ledger.csv').read())==1
    assert runs['two'][0]['run']==runs['two'][1]['run']
    assert ['checkpoint ' in o for o in runs['said']]==[True,False]

@pytest.mark.slow
def test_launchers_on_a_cpu(tmp_path):
    "Without GPUs accelerate starts one process whatever it is asked for, and torchrun as many as it is asked for"
    pytest.importorskip('accelerate')
    program = tmp_path/'p.py'
    program.write_text("import os, sys\nopen(sys.argv[1]+os.environ.get('RANK', '0'), 'w').close()")
    for name,how in dict(accelerate=['accelerate.commands.launch','--num_processes'], torchrun=['torch.distributed.run','--nproc_per_node']).items():
        words = [sys.executable, '-m', *how, '2', str(program), str(tmp_path/name)]
        subprocess.run(words, check=True, capture_output=True, env=dict(os.environ, CUDA_VISIBLE_DEVICES=''))
    assert sorted(o.name for o in tmp_path.iterdir() if o!=program)==['accelerate0','torchrun0','torchrun1']

def test_a_process_that_dies_ends_the_others(runs):
    assert runs['codes'][1]==7 and runs['codes'][0]==1
    assert runs['seconds']<60
    assert 'another one ended' in runs['said'][0]
