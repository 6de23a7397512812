"Training images/s of a Learner with its own choices over the fastest bare loop (bar 0.95): ResNet-50-IBN, 256×128, batches of 16"
import statistics as st, time
import torch
from fastai.callback.core import Callback
from fastreid_nb.all import *
from fastreid_nb.heads.speed import Speed
from fastreid_nb.heads.model import plain_tensor

n_steps = 2 # of each way in a round

class Stamps(Callback):
    "When each step of the training ended, and how long the next batch was waited for"
    order = 90
    def before_fit(self): self.times,self.waits = [],[]
    def before_batch(self):
        if self.training and self.times: self.waits.append(time.perf_counter()-self.times[-1])
    def after_batch(self):
        if self.training: self.times.append(time.perf_counter())

    def waiting(self):
        "Share of the time between the first step and the last"
        return sum(self.waits)/(self.times[-1]-self.times[0])

def loaders(bs):
    "Toy people, drawn once, read as in any training; an epoch is one step to warm up and those that count"
    data = toy_reid(n_ids=8, progress=False)   # six learnt, eight images of each
    dls = reid_dls(data, (256,128), p=bs//4, k=4, num_workers=0)
    assert len(dls.train)==1+n_steps
    return dls

def learner(dls):
    learn = reid_learner(dls, resnet50_ibn, lr=1e-5)
    learn.remove_cb(ScoreReID)
    return learn

def learner_seconds(learn, stamps):
    "Seconds of each step of a fit that goes on where the last one ended"
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=stamps)
    return [b-a for a,b in zip(stamps.times, stamps.times[1:])][:n_steps]

class BareLoop:
    "The same network, loss and Adam in ten lines of PyTorch"
    def __init__(self, dls, speed):
        torch.manual_seed(0)
        self.model = reid_model(resnet50_ibn, len(dls.pids)).to(dls.device, memory_format=speed.memory_format).train()
        self.model.preproc = dls.preproc
        self.loss,self.speed = reid_loss(),speed
        self.opt = torch.optim.Adam(self.model.parameters(), lr=1e-5, weight_decay=5e-4, fused=True)
        xb,pid,camid = dls.train.one_batch()
        self.xb,self.pid,self.camid = plain_tensor(xb),plain_tensor(pid),plain_tensor(camid)

    def step(self, n=None):
        with self.speed.autocast(self.xb.device): out = self.model(self.xb[:n])
        self.loss(out, self.pid[:n], self.camid[:n]).backward()
        self.opt.step()
        self.opt.zero_grad()

    def seconds(self, n=1+n_steps, n_images=None):
        times = []
        for _ in range(n):
            start = time.perf_counter()
            self.step(n_images)
            times.append(time.perf_counter()-start)
        return times

def compiled(dls, learn, stamps):
    "Print what `torch.compile` gains over the same Learner, and how long it takes to compile"
    fast,start = learner(dls),time.perf_counter()
    fast.model.compile()
    learner_seconds(fast, stamps)
    first = time.perf_counter()-start
    times = [(min(learner_seconds(learn, stamps)),min(learner_seconds(fast, stamps))) for _ in range(3)]
    print(f'torch.compile: {st.median(a/b for a,b in times):.2f} times as fast, after {first:.0f} s for the first epoch', flush=True)

def main(
    seeds:int=1, # More rounds: 4 for each beyond the first
)->dict: # value: seconds of the fastest bare loop over seconds of the Learner, median of the rounds
    "All ways in turn, so that a busy moment of the machine hits all of them"
    dls,stamps = loaders(16),Stamps()
    learn = learner(dls)
    ways = [Speed(d, f) for d in (torch.float32,torch.bfloat16) for f in (torch.channels_last,torch.contiguous_format)]
    bare = {o:BareLoop(dls, o) for o in ways}
    first = {o:min(b.seconds(n_images=4)) for o,b in bare.items()}
    print('4 images, seconds:', {str(o):round(v, 2) for o,v in first.items()}, flush=True)
    bare = {o:b for o,b in bare.items() if first[o]<1.5*min(first.values())} # what is far behind is not run at full size
    for o in bare.values(): o.step()
    learner_seconds(learn, stamps)
    ratios,rows = [],{o:[] for o in ['Learner', *bare]}
    for _ in range(8+4*(seeds-1)):
        times = {o:min(b.seconds()) for o,b in bare.items()} | {'Learner':min(learner_seconds(learn, stamps))}
        for k,v in times.items(): rows[k].append(v)
        ratios.append(min(times[o] for o in bare)/times['Learner'])
        print(f'round: Learner {times["Learner"]:.2f} s a step, fastest bare loop {min(times[o] for o in bare):.2f}', flush=True)
    print(f'waiting for data: {stamps.waiting():.1%} of the time of the last round')
    for k,v in rows.items(): print(f'{k}: {16/st.median(v):.2f} images/s (median of {len(v)} rounds)')
    compiled(dls, learn, stamps)
    value = st.median(ratios)
    return dict(value=value, bar=.95, ok=value>=.95)
