"""A ResNet-18 at 128×64 taught by a ResNet-50-IBN at 256×128: share of the gap in mAP between student alone and teacher that the best term closes (bar 0.5)

Every run leaves a line in kd.csv beside this file; what is there is not run again. KD=tiny runs a small size into a file of its own;
KD_IDS (people in training), KD_TEACHER (epochs at a quarter, at half, and at the full size), KD_STUDENT (epochs), KD_SMALL (the student's
height and width) and KD_CAST (how much the colours of cameras differ) set other sizes."""
import os, statistics as st, time
from multiprocessing import get_context
from pathlib import Path
from toy_runs import Rows

tiny = os.environ.get('KD')=='tiny'
rows = Rows(Path(__file__).with_name('kd_tiny.csv' if tiny else 'kd.csv'), ('setting','run','seed'), ('held_out','test','rank1','minutes','ms'))
n_ids = int(os.environ.get('KD_IDS', 6 if tiny else 64))
stages = [int(o) for o in os.environ.get('KD_TEACHER', '4,3,3' if tiny else '36,20,4').split(',')]
n_epoch = int(os.environ.get('KD_STUDENT', 1 if tiny else 8))
cast = float(os.environ.get('KD_CAST', 1.6))
sizes = [(32,16),(48,24),(64,32)] if tiny else [(64,32),(128,64),(256,128)]
small = tuple(int(o) for o in os.environ.get('KD_SMALL', '32,16' if tiny else '128,64').split(','))
setting = f'{n_ids} people, cast {cast}, teacher {stages}, student {n_epoch} at {small[0]}×{small[1]}'
methods = 'soft_kl','logit_l1','pkt','paper','relational','similarity','overhaul'

def found():
    "Line by run and seed, of this setting"
    lines = {k:v for k,v in rows.found().items() if k[0]==setting}
    return {(run,int(seed)):dict(zip(rows.values, map(float, v))) for (_,run,seed),v in lines.items()}

def store(key, res): rows.add((setting, *key, *(float(res[k]) for k in rows.values)))

def people(job):
    "Training set without a fifth of its people, those as a test to choose by, and the test that is only reported on"
    from fastreid_nb.all import toy_reid
    n_test = 4 if tiny else 64
    whole = n_ids+n_ids//4+n_test
    data = toy_reid(job['toy'], n_ids=whole, test_frac=n_test/whole, size=sizes[-1], cast=cast, seed=7, progress=False)
    return data.holdout(.2, seed=0),data

def terms_of(run, student, teacher):
    "The terms between both networks, with the weights that they are tried with"
    from fastreid_nb.all import LogitL1, Overhaul, PKT, RelationalKD, SimilarityKD, SoftKL
    if run=='overhaul': return [SoftKL(),Overhaul(student, teacher)]
    return dict(soft_kl=[SoftKL()], logit_l1=[LogitL1()], pkt=[PKT(weight=50.)], paper=[LogitL1(),PKT(weight=50.)],
        relational=[RelationalKD(weight=5.)], similarity=[SimilarityKD('emb', weight=1000.)])[run]

def loaders(data, size):
    "The same batches, views and precision in every run, whatever its seed, so that what a teacher says is computed once"
    from fastreid_nb.all import hflip, pad_crop, reid_dls
    return reid_dls(data, size, p=2 if tiny else 8, k=4, augs=[hflip,pad_crop], num_workers=0)

def fit(learn, n, lr):
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(n, lr)
    return learn.model

def train_teacher(data, seed):
    "From small images to large ones: a fully convolutional network takes its weights along"
    import torch
    from fastreid_nb.all import reid_learner, resnet50_ibn
    model = None
    for n,size,lr in zip(stages, sizes, (1e-3,7e-4,3.5e-4)):
        dls = loaders(data, size)
        how = dict(backbone=resnet50_ibn) if model is None else dict(model=model)
        model = fit(reid_learner(dls, seed=seed, dtype=torch.bfloat16, **how), n, lr)
    return model

def train_student(data, seed, run, job):
    import torch
    from fastreid_nb.all import Distill, load_reid, reid_learner, resnet18
    learn = reid_learner(loaders(data, small), resnet18, seed=seed, dtype=torch.bfloat16)
    if run!='alone':
        teacher = load_reid(checkpoint(job, seed))
        torch.manual_seed(seed)
        cache = None if run=='overhaul' else Path(job['work'])/'said'
        learn.add_cb(Distill(teacher, *terms_of(run, learn.model, teacher), cache=cache))
    return fit(learn, n_epoch, 1e-3)

def checkpoint(job, seed): return Path(job['work'])/f'teacher_{seed}.pt'

def ms_of(model):
    "Milliseconds for one image on one thread"
    import torch
    from fastreid_nb.heads.speed import time_in_turn
    x = torch.rand(1, 3, *model.preproc.size)
    def one():
        with torch.no_grad(): model.eval()(x)
    return 1000*min(time_in_turn(dict(one=one), torch.device('cpu'), 3.)['one'])

def go(job):
    "One line of the plan"
    import torch
    from fastreid_nb.all import evaluate_data
    from fastreid_nb.train.checkpoint import save_reid
    torch.set_num_threads(1)
    (run,seed),start = job['key'],time.time()
    data,test = people(job)
    model = train_teacher(data, seed) if run=='teacher' else train_student(data, seed, run, job)
    minutes = (time.time()-start)/60
    if run=='teacher': save_reid(checkpoint(job, seed), model)
    chosen,res = (evaluate_data(model, o, num_workers=0, progress=False) for o in (data,test))
    store(job['key'], dict(held_out=chosen.mAP, test=res.mAP, rank1=res.rank(1), minutes=minutes, ms=ms_of(model)))
    print(*job['key'], f'held out {chosen.mAP:.3f}, test {res.mAP:.3f}, {minutes:.1f} minutes', flush=True)

def work(pool, keys, more):
    "Run what the file does not have"
    known = found()
    again = [o for o in keys if o not in known or o[0]=='teacher' and not checkpoint(more, o[1]).exists()]
    for _ in pool.imap_unordered(go, [dict(key=o, **more) for o in again]): pass

def table(known):
    for run in ('alone',*methods,'teacher'):
        lines = [v for k,v in sorted(known.items()) if k[0]==run]
        if not lines: continue
        vals = [100*o['test'] for o in lines]
        sd = f' ± {st.stdev(vals):.1f}' if len(vals)>1 else ''
        print(f'{run:11s} held out {100*st.mean(o["held_out"] for o in lines):5.1f}  test {st.mean(vals):5.1f}{sd}  {min(o["ms"] for o in lines):.1f} ms')

def main(
    seeds:int=1, # Not used: three seeds for alone, the best term and the teacher, one for the other terms
)->dict: # value: share of the gap that the best term closes, from the means of its seeds
    "Two runs at a time, with one thread each"
    os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    more = dict(toy=os.environ.get('TOY', 'kd_work/toy'), work=f'kd_work/{"".join(c if c.isalnum() else "_" for c in setting)}')
    Path(more['work']).mkdir(parents=True, exist_ok=True)
    people(more)   # drawn once, before two processes want it
    some = range(1 if tiny else 3)
    with get_context('spawn').Pool(2, maxtasksperchild=1) as pool:
        work(pool, [('teacher',0), *(('alone',s) for s in some)], more)
        work(pool, [(methods[0],0), *(('teacher',s) for s in some[1:])], more)   # fills the folder of what teacher 0 says
        work(pool, [(o,0) for o in methods[:0:-1]], more)
        known = found()
        best = max(methods, key=lambda o: known[o,0]['held_out'])
        work(pool, [(best,s) for s in some[1:]], more)
    known = found()
    table(known)
    alone,taught,teacher = ([known[o,s]['test'] for s in some] for o in ('alone',best,'teacher'))
    gap,value = st.mean(teacher)-st.mean(alone),(st.mean(taught)-st.mean(alone))/(st.mean(teacher)-st.mean(alone))
    ms = [min(known[o,s]['ms'] for s in some) for o in (best,'teacher')]
    sd = max((st.stdev(o) for o in (alone,teacher) if len(o)>1), default=0)
    print(f'best {best}; the teacher leads by {100*gap:.1f} points of mAP (sd {100*sd:.1f}); {ms[0]:.1f} against {ms[1]:.1f} ms an image')
    return dict(value=value, bar=.5, ok=value>=.5 and gap>=max(.05, 2*sd) and ms[0]<=ms[1]/4)
