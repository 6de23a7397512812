"Real pictures, trained from scratch: mAP on vehicle2cam (bar 0.85) and omniglot_small, in the folder named by REALDATA"
import os, statistics as st, sys, time
from functools import partial
from pathlib import Path
import pandas as pd, torch
from torchvision.transforms import v2
from fastreid_nb.all import *

def color(x, rng):
    "Brightness, gains of the channels, and contrast"
    y = x.float()*rng.uniform(.6,1.4)*torch.tensor(rng.uniform(.8,1.2,(3,1,1)), dtype=torch.float32)
    m = y.mean()
    return ((y-m)*rng.uniform(.6,1.4)+m).clamp(0,255).to(x.dtype)

def affine(x, rng, degrees=10, shift=.1, scale=.25, shear=8, fill=None):
    "Rotation (degrees), shift (share of the size), scale and shear (degrees); what comes in from outside has the mean value"
    h,w = x.shape[-2:]
    u = lambda o: float(rng.uniform(-o, o))
    return v2.functional.affine(x, u(degrees), [u(shift*w),u(shift*h)], 1+u(scale), [u(shear),0.], interpolation=v2.InterpolationMode.BILINEAR,
        fill=[float(x.float().mean()) if fill is None else fill]*3)

def often(f, p=.9):
    "`f` with probability `p`"
    return lambda x, rng: f(x, rng) if rng.random()<p else x

def splits(name, is_query):
    "A data set with a manifest: its training half, and of the other half the queries and the gallery"
    root = Path(os.environ['REALDATA'])/name
    df = pd.read_csv(root/'manifest.csv').rename(columns=dict(id='pid', cam='camid'))
    part = ['train' if h=='train' else 'query' if q else 'gallery' for h,q in zip(df.half, is_query(df))]
    return from_df(df.assign(split=part), root, name)

def vehicle2cam(): return splits('vehicle2cam', lambda df: df.camid==1)
def omniglot_small(): return splits('omniglot_small', lambda df: df.camid.isin(sorted(df.camid.unique())[:2]))

vehicle = dict(size=(96,96), p=16, k=2, augs=[hflip, often(affine), often(color), random_erase], epochs=50)
letters = dict(size=(64,64), p=16, k=4, augs=[often(partial(affine, degrees=15, fill=255))], epochs=12)

def trained(data, seed, size, p, k, augs, epochs, lr=1e-3):
    "A learner after training from scratch, its untrained mAP, and minutes of training and scoring"
    learn = reid_learner(reid_dls(data, size, p, k, augs, num_workers=0, seed=seed), resnet18_ibn, seed=seed)
    learn.remove_cb(ScoreReID)
    learn.add_cb(ScoreReID(every=epochs))
    before,t = learn.evaluate(progress=False).mAP,time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(epochs, lr)
    return learn,before,(time.perf_counter()-t)/60

def report(data, seeds, **kwargs):
    "Print a line per seed and a summary; mAP and minutes of each seed"
    rows = []
    for seed in range(seeds):
        learn,before,mins = trained(data, seed, **kwargs)
        res = learn.reid_result
        print(f'{data.name} seed {seed}: untrained {before:.3f}, mAP {res.mAP:.3f}, rank-1 {res.rank(1):.3f}, {mins:.1f} min', flush=True)
        rows.append((res.mAP, res.rank(1), mins))
    floors = ', '.join(f'{k} {v:.3f}' for k,v in floor_scores(data).mAP.items())
    mean = [f'{st.mean(o):.3f} ± {st.stdev(o):.3f}' if seeds>1 else f'{o[0]:.3f}' for o in zip(*rows)]
    print(f'{data.name}: mAP {mean[0]}, rank-1 {mean[1]}, floors: {floors}', flush=True)
    return [o[0] for o in rows],[o[2] for o in rows]

def main(
    seeds:int=1, # Number of seeds
)->dict: # value: mAP on vehicle2cam, median of the seeds
    "Train on both sets, once per seed"
    if not os.environ.get('REALDATA'): sys.exit('REALDATA is not set: name the folder that holds vehicle2cam and omniglot_small, each with its manifest.csv')
    report(omniglot_small(), seeds, **letters)
    maps,mins = report(vehicle2cam(), seeds, **vehicle)
    return dict(value=st.median(maps), bar=.85, ok=min(maps)>=.85 and max(mins)<=15)
