"""Scores before and after expansion and re-ranking on vehicle2cam and omniglot_small: the least gain of mAP on the latter (bar 0)

Features are those of the network in the file that WEIGHTS names, without any training; REALDATA names the folder of the sets."""
import os, sys
from dataclasses import replace
from functools import partial
from fastreid_nb.all import *
from bench_real import omniglot_small, vehicle2cam

steps = dict(expanded=dict(qe=True), published=dict(rerank=True), fastreid=dict(rerank=partial(rerank_dist, variant='fastreid')),
    graph=dict(rerank=gnn_rerank_dist))

def rows(model, data):
    "A line for every step, with the difference of mAP and its interval"
    q,g = (embed_features(model, o, data) for o in (data.query,data.gallery))
    before = evaluate(q, g)
    print(f'{data.name}: {len(q)} queries, {len(g)} images, mAP {before.mAP:.3f}, rank-1 {before.rank(1):.3f}', flush=True)
    gains = {}
    for name,kwargs in steps.items():
        after = evaluate(q, g, **kwargs)
        o = compare(before, after).loc['mAP']
        gains[name] = after.mAP-before.mAP
        print(f'  {name:9} mAP {after.mAP:.3f} ({o.difference:+.3f}, {o.low:+.3f} to {o.high:+.3f}), rank-1 {after.rank(1):.3f}', flush=True)
    return gains

def embed_features(model, df, data): return Features(embed(model, list(df.path), num_workers=0), df, data.protocol)

def main(
    seeds:int=1, # Not used: nothing is drawn
)->dict: # value: least gain of the two re-rankings on omniglot_small
    "ImageNet features, no training"
    if not {'WEIGHTS','REALDATA'}<=os.environ.keys(): sys.exit('set WEIGHTS (a file) and REALDATA (the folder of the sets)')
    for data,size in ((vehicle2cam(),(128,128)), (omniglot_small(),(64,64))):
        model = load_pretrained(os.environ['WEIGHTS'])
        model.preproc = replace(model.preproc, size=size)
        gains = rows(model, data)
    value = min(gains['published'],gains['fastreid'])
    return dict(value=value, bar=0, ok=value>=0)
