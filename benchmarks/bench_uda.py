"""Adaptation between two toy cities and to real motorcycles (REALDATA): share of the gap from direct transfer to training with labels that the best system closes (bar 0.5)

Every run leaves its epochs in uda.csv beside this file; what is there is not run again. UDA=tiny runs a small size into a file of its own."""
import os, statistics as st, time
from multiprocessing import get_context
from pathlib import Path
from toy_runs import Rows, light

tiny = os.environ.get('UDA')=='tiny'
keys,values = ('set','source','target','system','seed','epoch'),('mAP','rank1','minutes')
rows = Rows(Path(__file__).with_name('uda_tiny.csv' if tiny else 'uda.csv'), keys, values)
toy = dict(n_ids=36, train=6, adapt=3, n_iters=3) if tiny else dict(n_ids=192, train=24, adapt=16)
vehicle = dict(train=4, adapt=3) if tiny else dict(train=40, adapt=20)
kinds = dict(cars=('car','truck'), motorcycles=('motorcycle',))
size,lr = (32,16) if tiny else (64,32),1e-3
cities = 'harbour','hill'
systems = 'UDA','StrongUDA','MMT','SpCL','MLT'

def found():
    "(mAP, rank-1) by set, source, target, system, seed and epoch"
    return {(*k[:4],int(k[4]),int(k[5])):(float(v[0]),float(v[1])) for k,v in rows.found().items()}

def store(key, scores, minutes):
    "Append a row for each epoch"
    rows.add(*((*key, i, m, r, f'{minutes:.1f}') for i,(m,r) in enumerate(scores)))

def city(root, name, seed):
    "Another seed has other people, cameras and weights"
    from fastreid_nb.all import toy_cities, toy_reid
    return toy_reid(root, n_ids=toy['n_ids'], test_frac=1/3, size=size, progress=False, city=toy_cities[name], seed=10*seed+cities.index(name))

def vehicles(root, kinds, name):
    "Some kinds of vehicles, split as in the manifest, with other identities for training"
    import pandas as pd
    from fastreid_nb.all import from_df
    df = pd.read_csv(root/'manifest.csv').rename(columns=dict(id='pid', cam='camid'))
    df = df[df.kind.isin(kinds)]
    part = ['train' if h=='train' else 'query' if c==1 else 'gallery' for h,c in zip(df.half, df.camid)]
    return from_df(df.assign(split=part), root, name)

def sets_of(job):
    kind,source,target,_,seed = job['key']
    if kind=='toy': return [city(job['toy'], o, seed) for o in (source,target)]
    root = Path(os.environ['REALDATA'])/'vehicle2cam'
    return [vehicles(root, kinds[o], o) for o in (source,target)]

def curve(learn, fit):
    "(mAP, rank-1) after every epoch"
    with learn.no_bar(), learn.no_logging(): fit()
    at = [list(learn.recorder.metric_names).index(o)-1 for o in ('mAP','rank-1')]
    return [tuple(o[i] for i in at) for o in learn.recorder.values]

def supervised(data, kind, seed):
    "A learner that has the labels"
    from fastreid_nb.all import hflip, reid_dls, reid_learner, resnet18
    k = 4 if kind=='toy' else 2
    dls = reid_dls(data, size if kind=='toy' else (64,64), p=16, k=k, augs=[hflip,light], num_workers=0, seed=seed)
    return reid_learner(dls, resnet18, seed=seed)

def adaptation(model, target, source, system, kind, seed):
    "A learner that has none"
    import fastreid_nb.all as lib
    k,how = (4,dict(by_camera=True)) if kind=='toy' else (2,dict(by_camera=True, min_samples=2, dist='cosine'))
    if kind!='toy' and system not in ('MLT','SpCL'): how['how'] = 'circular'
    return lib.uda_learner(model, target, getattr(lib, system)(**how), source, p=16, k=k, n_iters=toy.get('n_iters'), augs=[lib.hflip,light],
        num_workers=0, seed=seed)

def checkpoint(job, source): return Path(job['work'])/f'{job["key"][0]}_{source}_{job["key"][4]}.pt'

def run(job):
    "One line of the plan: train on a city, or adapt a model of the other one"
    import torch, fastreid_nb.all as lib
    torch.set_num_threads(1)
    kind,source,target,system,seed = job['key']
    own,other = sets_of(job)
    sizes,start = toy if kind=='toy' else vehicle,time.time()
    if system=='supervised':
        learn = supervised(own, kind, seed)
        scores = curve(learn, lambda: learn.fit_warmup_cos(sizes['train'], lr))
        learn.save_reid(checkpoint(job, source))
    else:
        model = lib.load_pretrained(checkpoint(job, source), verbose=False)
        direct = lib.evaluate_data(model, other, num_workers=0, progress=False)
        store((*job['key'][:3],'direct',seed), [(direct.mAP,direct.rank(1))], 0) if system=='direct' else None
        if system=='direct': return print(*job['key'], f'mAP {direct.mAP:.3f}', flush=True)
        learn = adaptation(model, other, own, system, kind, seed)
        scores = curve(learn, lambda: learn.fit_warmup_cos(sizes['adapt'], lr/2))
    store(job['key'], scores, (time.time()-start)/60)
    print(*job['key'], f'mAP {scores[-1][0]:.3f}, {(time.time()-start)/60:.1f} minutes', flush=True)

def last(known, *key):
    "mAP after the last epoch, for each seed"
    seeds = sorted({o[4] for o in known if o[:4]==key})
    return {s:max((o[5],v[0]) for o,v in known.items() if o[:5]==(*key,s))[1] for s in seeds}

def closed(known, kind, source, target, system):
    "Share of the gap that a system closes, for each seed"
    ends = [last(known, kind, source, target, 'direct'),last(known, kind, target, target, 'supervised')]
    return {s:(v-ends[0][s])/(ends[1][s]-ends[0][s]) for s,v in last(known, kind, source, target, system).items()}

def best_system(known, kind, ways):
    share = lambda o: st.mean(closed(known, kind, *w, o)[0] for w in ways)
    return max(systems, key=share)

def work(pool, keys, **more):
    "Run what the file does not have"
    known = {o[:5] for o in found()}
    again = [o for o in keys if o not in known or o[3]=='supervised' and not checkpoint(dict(key=o, **more), o[1]).exists()]
    for _ in pool.imap_unordered(run, [dict(key=o, **more) for o in again]): pass

def plan(pool, kind, ways, ends, seeds, more):
    "First the models, then every system once, then the best one with the other seeds"
    work(pool, [(kind,o,o,'supervised',s) for s in seeds for o in ends], **more)
    work(pool, [(kind,*w,'direct',s) for s in seeds for w in ways], **more)
    work(pool, [(kind,*w,o,0) for o in systems for w in ways], **more)
    best = best_system(found(), kind, ways)
    work(pool, [(kind,*w,best,s) for s in seeds[1:] for w in ways], **more)
    return best

def table(known, kind, ways):
    for w in ways:
        target = (kind,w[1],w[1],'supervised')
        for o in ('direct',*systems,'supervised'):
            vals = list((last(known, *target) if o=='supervised' else last(known, kind, *w, o)).values())
            sd = f' ± {100*st.stdev(vals):.1f}' if len(vals)>1 else ''
            share = '' if o in ('direct','supervised') else f'  closes {st.mean(closed(known, kind, *w, o).values()):.2f} of the gap'
            if vals: print(f'{w[0]:10s} → {w[1]:12s} {o:12s} mAP {100*st.mean(vals):5.1f}{sd} ({len(vals)} seeds){share}')

def main(
    seeds:int=1, # Not used: three seeds for direct, the best system and supervised, one for the others
)->dict: # value: share of the gap that the best system closes, mean of both directions and of its seeds
    "Two runs at a time, with one thread each"
    os.environ.update(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    more = dict(toy=os.environ.get('TOY', 'uda_work/toy'), work='uda_work/tiny' if tiny else 'uda_work')
    Path(more['work']).mkdir(parents=True, exist_ok=True)
    ways = [cities,cities[::-1]]
    some = range(1) if tiny else range(3)
    for s in some:
        for o in cities: city(more['toy'], o, s)   # once, before two processes want it
    with get_context('spawn').Pool(2, maxtasksperchild=1) as pool:
        best = plan(pool, 'toy', ways, cities, some, more)
        if os.environ.get('REALDATA'): plan(pool, 'vehicle', [('cars','motorcycles')], ('cars','motorcycles'), range(1), more)
    known = found()
    table(known, 'toy', ways)
    if os.environ.get('REALDATA'): table(known, 'vehicle', [('cars','motorcycles')])
    value = st.mean(v for w in ways for v in closed(known, 'toy', *w, best).values())
    return dict(value=value, bar=.5, ok=value>=.5)
