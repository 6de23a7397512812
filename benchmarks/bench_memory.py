"Seconds of embedding and of training steps on a CPU without `kept_memory` over those with it, in processes of their own, in turn; the worst of three (bar 1)"
import json, re, resource, statistics as st, subprocess, sys, time
from pathlib import Path
import torch
from fastreid_nb.all import *
from fastreid_nb.heads.speed import fastest

jobs = dict( # network, images, height, width, with the backward pass?
    embed_r50=(resnet50_ibn, 128, 256, 128, False), train_r50=(resnet50_ibn, 16, 256, 128, True), train_r18=(resnet18_ibn, 64, 128, 64, True))

def job(name):
    "A function that makes one forward pass or one step, in the way that is fastest on this machine"
    net,n,h,w,training = jobs[name]
    torch.manual_seed(0)
    model = reid_model(net, n//4).train(training)
    speed = fastest('cpu', training)
    model.to(memory_format=speed.memory_format)
    loss,opt = reid_loss(),torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)
    xb,pid,camid = torch.rand(n, 3, h, w),torch.arange(n)//4,torch.arange(n)%2
    def forward():
        with torch.set_grad_enabled(training), speed.autocast('cpu'): return model(xb)
    def step():
        loss(forward(), pid, camid).backward()
        opt.step()
        opt.zero_grad()
    return step if training else forward

def measure(name, device):
    "Print the median seconds and pages of five runs after two, and the peak of this process in GB"
    run,rows = job(name),[]
    with kept_memory(device):
        for _ in range(7):
            start,pages = time.perf_counter(),resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            run()
            rows.append((time.perf_counter()-start,resource.getrusage(resource.RUSAGE_SELF).ru_minflt-pages))
    peak = int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/2**20
    print(json.dumps([*map(st.median, zip(*rows[2:])), peak]))

def measured(name, keep):
    "The same from a new process"
    code = f'from bench_memory import measure; measure({name!r}, {"cpu" if keep else "meta"!r})'
    said = subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True)
    return json.loads(said.stdout.splitlines()[-1])

def main(
    seeds:int=1, # More rounds: 3 for each
)->dict: # value: the worst ratio of the jobs
    "Both ways in turn, round by round"
    ratios = {}
    for name in jobs:
        rounds = [(measured(name, False), measured(name, True)) for _ in range(3*seeds)]
        usual,kept = ([st.median(o) for o in zip(*way)] for way in zip(*rounds))
        ratios[name] = st.median(a[0]/b[0] for a,b in rounds)
        for k,(secs,pages,peak) in dict(usual=usual, kept=kept).items():
            print(f'{name}, {k}: {secs:.2f} s, {pages:.0f} pages, {peak:.2f} GB at the peak')
        print(f'{name}: {ratios[name]:.2f} times as fast', flush=True)
    value = min(ratios.values())
    return dict(value=value, bar=1., ok=value>=1.)
