"One detail of the training changed at a time, three seeds each, on held-out identities of two real sets: mAP points gained (REALDATA)"
import json, os, statistics as st, sys
from functools import partial
from pathlib import Path
import torch
from fastreid_nb.all import *
import bench_real as real

stored = Path(__file__).with_name('details.json')
sets = dict( # images seen in training, P, K, learning rate
    omniglot_small=(real.omniglot_small, 4800, 16, 4), vehicle2cam=(real.vehicle2cam, 4800, 16, 2))
details = dict( # what is not the default
    base={}, pad_10_pixels=dict(pad=10/64), no_erasing=dict(erase=False),
    smoothing_of_others=dict(ce=partial(CrossEntropy, spread='others')), soft_margin=dict(margin=None),
    half_batches=dict(halve=True), double_rate=dict(lr=2e-3),
    together=dict(erase=False, margin=None, halve=True), together_double=dict(erase=False, margin=None, halve=True, lr=2e-3))

def run(name, seed, pad=.04, erase=True, ce=CrossEntropy, margin=.3, halve=False, lr=1e-3):
    "mAP and rank-1 on held-out identities after as many images as every other run of this set"
    make,n_images,p,k = sets[name]
    data = make().holdout(.3, seed=0)
    colours = [] if name=='omniglot_small' else [real.often(real.affine), real.often(real.color)]
    mirror = [] if name=='omniglot_small' else [hflip]
    augs = [*mirror, *colours, partial(pad_crop, pad=pad), *[random_erase]*erase]
    dls = reid_dls(data, (64,64), p//2 if halve else p, k, augs, num_workers=0, seed=seed)
    loss = ReIDLoss(ce(eps=.1), TripletLoss(margin=margin))
    learn = reid_learner(dls, resnet18_ibn, loss=loss, dtype=torch.bfloat16, seed=seed)
    learn.remove_cb(ScoreReID)
    epochs = round(n_images/len(dls.train)/(p*k//(2 if halve else 1)))
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(epochs, lr)
    res = learn.evaluate(progress=False)
    return dict(set=name, seed=seed, mAP=round(res.mAP, 4), rank1=round(res.rank(1), 4))

def table(rows):
    "Mean and standard deviation of the points gained over the base, of the same seed and set"
    base = {(r['set'],r['seed']):r['mAP'] for r in rows if r['detail']=='base'}
    for name in sets:
        for d in details:
            gains = [100*(r['mAP']-base[name,r['seed']]) for r in rows if r['set']==name and r['detail']==d]
            maps = [100*r['mAP'] for r in rows if r['set']==name and r['detail']==d]
            if gains: print(f'{name:16s} {d:20s} mAP {st.mean(maps):5.1f}  gain {st.mean(gains):+5.1f} ± {st.stdev(gains) if len(gains)>1 else 0:.1f}')

def main(
    seeds:int=3, # Number of seeds
)->dict: # value: gain of the best detail in mAP points, mean of both sets
    "Run what is not stored yet; every result is stored at once, so that a run can be cut off"
    if not os.environ.get('REALDATA'): sys.exit('REALDATA is not set: name the folder that holds vehicle2cam and omniglot_small, each with its manifest.csv')
    rows = json.loads(stored.read_text()) if stored.exists() else []
    done = {(r['set'],r['detail'],r['seed']) for r in rows}
    for seed in range(seeds):
        for d,options in details.items():
            for name in sets:
                if (name,d,seed) in done: continue
                rows.append(dict(detail=d, **run(name, seed, **options)))
                stored.write_text(json.dumps(rows, indent=0))
    table(rows)
    base = {(r['set'],r['seed']):r['mAP'] for r in rows if r['detail']=='base'}
    value = max(st.mean(100*(r['mAP']-base[r['set'],r['seed']]) for r in rows if r['detail']==d) for d in details)
    return dict(value=value, bar=0, ok=value>=0)
