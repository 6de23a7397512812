"Heads on cached features against full fine-tuning of an ImageNet network on vehicle2cam: mAP and minutes (bar: 4 × faster)"
import json, os, sys, time
from functools import partial
from pathlib import Path
from bench_real import affine, color, often, vehicle2cam
from fastreid_nb.all import *

bar = 4 # Times that full fine-tuning must take longer than a head
preproc = Preproc((128,128), 'bilinear') # As torchvision's weights were trained
batches = dict(p=16, k=2, augs=[hflip, often(affine), often(color), random_erase], num_workers=0)
linear = partial(ReductionHead, n_emb=512)
ways = { # Name: head, fit
    'untrained':(BNNeckHead, lambda o: None),
    'neck on cached features':(BNNeckHead, lambda o: o.fit_head(30, 5e-3)),
    'linear head on cached features':(linear, lambda o: o.fit_head(30, 2e-3)),
    'full fine-tuning':(BNNeckHead, lambda o: o.fit_warmup_cos(12, slice(3e-4, 1e-3), freeze_iters=34)), # 34 iterations are two epochs
}

def learner(data, head, seed):
    "A new head on the ImageNet backbone, without scores while it trains"
    net = load_pretrained(Path(os.environ['REALWEIGHTS'])/'mobilenetv2_imagenet.pt').backbone
    learn = reid_learner(reid_dls(data, preproc=preproc, seed=seed, **batches), net, head=head, seed=seed)
    learn.remove_cb(learn.score_reid)
    learn.add_cb(ScoreReID(every=10**6)) # Once, after the last epoch
    return learn

def run(data, seed):
    "Minutes of the processor, mAP and rank-1 of each way"
    rows = []
    for name,(head,fit) in ways.items():
        learn = learner(data, head, seed)
        start = time.process_time()
        with learn.no_bar(), learn.no_logging(): fit(learn)
        mins = (time.process_time()-start)/60
        res = learn.evaluate(progress=False)
        rows.append(dict(seed=seed, name=name, minutes=round(mins, 2), mAP=round(res.mAP, 3), rank1=round(res.rank(1), 3)))
        print(rows[-1], flush=True)
    return rows

def main(
    seeds:int=1, # Number of seeds
)->dict: # value: how many times longer full fine-tuning keeps the processor busy
    "Train in every way, once per seed, and keep the rows in cached.json beside this file"
    for o,what in (('REALDATA','vehicle2cam'), ('REALWEIGHTS','mobilenetv2_imagenet.pt')):
        if not os.environ.get(o): sys.exit(f'{o} is not set: name the folder that holds {what}')
    data = vehicle2cam()
    rows = [o for seed in range(seeds) for o in run(data, seed)]
    Path(__file__).with_name('cached.json').write_text(json.dumps(rows, indent=1)+'\n', encoding='utf-8')
    sums = {n:{k:sum(o[k] for o in rows if o['name']==n) for k in ('minutes','mAP')} for n in ways}
    none,_,head,full = sums.values()
    ratio = full['minutes']/head['minutes']
    return dict(value=ratio, bar=bar, ok=ratio>=bar and none['mAP']<head['mAP'])
