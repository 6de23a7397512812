"Seconds to embed 128 images whole on a CPU over those of `embed_batches`, ResNet-50-IBN and ResNet-18-IBN; the worst (bar 1)"
import resource, statistics as st, time
import torch
from fastreid_nb.all import *
from fastreid_nb.eval.inference import embed_batches
from fastreid_nb.heads.speed import fastest

jobs = {'ResNet-50-IBN':(resnet50_ibn, 256, 128), 'ResNet-18-IBN':(resnet18_ibn, 128, 64)} # network, height, width
n = 128 # images

def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def ways(name):
    "What to run: parts of every size, and the library's own way"
    net,h,w = jobs[name]
    torch.manual_seed(0)
    speed,xb = fastest('cpu', training=False),torch.rand(n, 3, h, w)
    model = reid_model(net, 32).eval().to(memory_format=speed.memory_format)
    def parts(bs):
        with torch.no_grad(), speed.autocast('cpu'): torch.cat([model(o) for o in xb.split(bs)])
    def ours(): embed_batches(model, [xb], speed.dtype, progress=False)
    return {bs:(lambda bs=bs: parts(bs)) for bs in (n, 64, 32, 16, 8, 4)} | dict(ours=ours)

def measure(name, rounds):
    "Way to median seconds and pages, all in turn; the first round warms up"
    runs = ways(name)
    rows = {o:[] for o in runs}
    for _ in range(1+rounds):
        for k,run in runs.items():
            start,before = time.perf_counter(),pages()
            run()
            rows[k].append((time.perf_counter()-start,pages()-before))
    return {k:[st.median(o) for o in zip(*v[1:])] for k,v in rows.items()}

def main(
    seeds:int=1, # Five rounds for each
)->dict: # value: the worst ratio of the networks
    "Every size of part in turn"
    ratios = []
    for name in jobs:
        rows = measure(name, 5*seeds)
        for k,(secs,count) in rows.items(): print(f'{name}, {n} images, {k}: {secs:.2f} s, {count:.0f} pages', flush=True)
        ratios.append(rows[n][0]/rows['ours'][0])
    value = min(ratios)
    return dict(value=value, bar=1., ok=value>=1.)
