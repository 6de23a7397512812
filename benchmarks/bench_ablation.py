"The tricks of FastReID one after the other, on drawn people and on real vehicles (REALDATA): mAP points from the baseline to all of them (bar 3)"
import csv, os, statistics as st, tempfile, time
from multiprocessing import get_context
from pathlib import Path

ledger = Path(__file__).with_name('ledger.csv')
pad_crop,erase = '{fn: pad_crop, pad: 0.04}','{fn: random_erase, area: [0.02, 0.33], aspect: [0.3, 3.3], log: true}'

def augs(*first): return f'augs=[{", ".join([*first, pad_crop, "hflip", erase])}]'

# The steps of the paper's Table 2: each keeps what came before it. The last two are tried beside all of them.
start = ['model.backbone={fn: resnet, variant: 18}', 'weights=none', 'precision=float32', 'workers=0', 'optim.lr=1e-3', 'sampler.p=16', augs()]
steps = {'baseline':[], '+ IBN':['model.backbone.ibn=true'], '+ AutoAugment':[augs('{fn: autoaugment, p: 0.1}')], '+ soft margin':['loss.triplet.margin=null'],
    '+ non-local':['model.backbone.nl=true'], '+ GeM':['model.pool={fn: GeM, learn: true}'],
    '+ Circle':['model.head.cosine=true', 'loss.ce={fn: CircleSoftmax, margin: 0.35, scale: 64, eps: 0.1, spread: others}'],
    '+ freeze':['freeze_iters={freeze}'], '+ cosine':['schedule={{fn: fit_warmup_cos, warmup_epochs: {warm}, flat_epochs: {half}}}']}
beside = {'all, SWA':['callbacks=[{fn: SWA, both: false}]'], 'all, AugMix':[augs('{fn: augmix, p: 0.5}', '{fn: autoaugment, p: 0.1}')]}
thrice = 'baseline','+ IBN','+ cosine'

def steps_of(n): return f'schedule={{fn: fit_warmup_steps, milestone_epochs: [{n//3}, {n*3//4}], warmup_iters: null, warmup_epochs: {n/10:g}}}'
sets = dict(toy=dict(epochs=10, n_iters=240, more=['sampler.k=4','preproc.size=[64, 32]','data.train={fn: toy_reid, n_ids: 256, size: [64, 32], progress: false}']),
    vehicle2cam=dict(epochs=24, n_iters=408, more=['sampler.k=2','preproc.size=[64, 64]','data.train=from_csv','precision=bfloat16']))

def rows(name):
    "Label, changes of an experiment and seeds of every run on a set"
    s = sets[name]
    fill = dict(freeze=s['n_iters']//20, warm=f'{s["epochs"]/10:g}', half=s['epochs']//2)
    done = [*start, *s['more'], f'epochs={s["epochs"]}', steps_of(s['epochs'])]
    for label,changes in steps.items():
        done = done+[o.format(**fill) if '{freeze}' in o or '{warm}' in o else o for o in changes]
        yield label,done,range(3) if label in thrice else range(1)
    for label,changes in beside.items(): yield label,done+changes,range(1)

def vehicles(folder):
    "A CSV file of the real vehicles, with the split of its manifest"
    root = Path(os.environ['REALDATA'])/'vehicle2cam'
    with open(root/'manifest.csv', newline='') as f: found = list(csv.DictReader(f))
    part = lambda o: 'train' if o['half']=='train' else 'query' if o['cam']=='1' else 'gallery'
    with open(folder/'vehicle2cam.csv', 'w', newline='') as f:
        csv.writer(f).writerows([['path','pid','camid','split'], *([root/o['path'], o['id'], o['cam'], part(o)] for o in found)])
    return folder/'vehicle2cam.csv'

def run(job):
    "Train and score one row; its line goes to the ledger"
    import torch
    from fastreid_nb.all import Experiment, Ledger
    from fastreid_nb.recipes.ledger import run_row
    from fastreid_nb.eval.score import ScoreReID
    torch.set_num_threads(1)
    name,label,changes,seed,root = job
    exp = Experiment.load('bagtricks', [*changes, f'seed={seed}', f'name="ablation {name}: {label}"', 'eval.every=1000'])
    start = time.time()
    data = exp.read(root)[0]
    learn = exp.learner(data)
    learn.remove_cb(ScoreReID)
    untrained = learn.evaluate(progress=False).mAP
    with learn.no_bar(), learn.no_logging(): exp.fit(learn)
    res = learn.evaluate(progress=False)
    Ledger(ledger).add(run_row(exp, data, {name:res.to_dict()}, (time.time()-start)/60))
    print(f'{name} {label}, seed {seed}: mAP {res.mAP:.3f} (untrained {untrained:.3f}), {(time.time()-start)/60:.1f} minutes', flush=True)

def found():
    "mAP by set, label and seed, from the ledger"
    if not ledger.exists(): return {}
    with open(ledger, newline='') as f: lines = [o for o in csv.DictReader(f) if o['name'].startswith('ablation ')]
    return {(*o['name'].removeprefix('ablation ').split(': ', 1), int(o['seed'])):100*float(o['mAP']) for o in lines}

def table(name, maps):
    "Each label with its mean, and the gain over the baseline of the same seed"
    for label,_,_ in rows(name):
        some = {k[2]:v for k,v in maps.items() if k[:2]==(name,label)}
        gains = [v-maps[name,'baseline',s] for s,v in some.items() if (name,'baseline',s) in maps]
        sd = f' ± {st.stdev(gains):.1f}' if len(gains)>1 else ''
        if gains: print(f'{name:12s} {label:14s} mAP {st.mean(some.values()):5.1f}  over the baseline {st.mean(gains):+5.1f}{sd}  ({len(gains)} seeds)')

def main(
    seeds:int=1, # Not used: the seeds of each row are fixed
)->dict: # value: mAP points gained on the toy set, mean of three seeds
    "Run what the ledger does not have, two rows at a time with one thread each"
    with tempfile.TemporaryDirectory() as tmp:
        roots = dict(toy=os.environ.get('TOY', tmp))
        if os.environ.get('REALDATA'): roots['vehicle2cam'] = vehicles(Path(tmp))
        known = found()
        jobs = [(name,label,changes,seed,str(roots[name])) for name in roots for label,changes,some in rows(name) for seed in some
            if (name,label,seed) not in known]
        jobs.sort(key=lambda o: (list(roots).index(o[0]), o[3]))
        if jobs and jobs[0][0]=='toy':
            from fastreid_nb.all import toy_reid
            toy_reid(roots['toy'], n_ids=256, size=(64,32), progress=False)   # once, before two processes want it
        os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
        with get_context('spawn').Pool(2, maxtasksperchild=1) as pool:
            for _ in pool.imap_unordered(run, jobs): pass
    maps = found()
    for name in roots: table(name, maps)
    value = st.mean(maps['toy','+ cosine',s]-maps['toy','baseline',s] for s in range(3))
    return dict(value=value, bar=3, ok=value>=3)
