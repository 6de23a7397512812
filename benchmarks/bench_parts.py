"""Parameters, forward and training milliseconds and peak memory of each part model beside the plain one (value: training time of MGN over plain, bar 4)

The environment variable PARTS_EPOCHS=n also trains each of them with ResNet-18-IBN for n epochs on the drawn people and prints mAP.
PARTS_SIZE=64x32 and PARTS_NET=resnet18 make everything small, to see that it works."""
import os, statistics as st, time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
import torch
from fastreid_nb.backbone import resnet as backbones
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.heads.haa import haa
from fastreid_nb.heads.model import ReIDModel, reid_model
from fastreid_nb.eval.inference import evaluate_data
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.heads.parts import mgn, pcb
from fastreid_nb.heads.rmgl import rmgl
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.train.core import reid_learner

def models()->dict: # Name to function of (backbone, n_pids)
    "Every part model, the plain one first"
    return dict(plain=reid_model, pcb=pcb, mgn=mgn, grid=partial(mgn, grid=True), rmgl=rmgl, haa=haa)

def memory(key):
    "A figure of this process that Linux keeps, in MB"
    return next(int(o.split()[1]) for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key))/1024

def timed(f, n):
    "Median milliseconds of `n` calls, after one that does not count"
    f()
    res = []
    for _ in range(n):
        t = time.perf_counter()
        f()
        res.append(1e3*(time.perf_counter()-t))
    return st.median(res)

def small_model(name, n_pids, net):
    "One of `models` with a backbone of this name"
    return models()[name](getattr(backbones, net), n_pids)

def forward(
    model:ReIDModel, # In any mode
    x:torch.Tensor, # Pictures
    n:int, # Calls
)->float: # Milliseconds per image
    "Time of embeddings, in bfloat16 and channels_last"
    model.eval()
    with torch.inference_mode(), torch.autocast(x.device.type, dtype=torch.bfloat16): return timed(lambda: model(x), n)/len(x)

def training(
    model:ReIDModel, # In any mode
    x:torch.Tensor, # Pictures, in pairs of the same identity
    n:int, # Steps
)->float: # Milliseconds per step
    "Time of a step: forward in bfloat16, loss, backward, Adam"
    model.train()
    loss_fn,opt = ReIDLoss(CrossEntropy(), TripletLoss()),torch.optim.Adam(model.parameters(), 1e-5)
    pid = torch.arange(len(x)//2, device=x.device).repeat_interleave(2)
    def step():
        with torch.autocast(x.device.type, dtype=torch.bfloat16): out = model(x)
        opt.zero_grad()
        loss_fn(out, pid).backward()
        opt.step()
    return timed(step, n)

def measure(
    name:str, # Key of `models`
    net:str, # Name of a backbone
    size:tuple, # Height and width of the pictures, in pixels
    n:int, # Repetitions
)->tuple: # Parameters, ms per image, MB at the peak of that, ms per step, MB at the peak of that
    "Everything about one model, in a process of its own; memory is the growth since before the model was built"
    torch.manual_seed(0)
    before = memory('VmRSS')
    model,x = small_model(name, 751, net).to(memory_format=torch.channels_last),torch.rand(8, 3, *size)
    res = [sum(p.numel() for p in model.parameters())]
    for f in (forward, training):
        Path('/proc/self/clear_refs').write_text('5')   # forget the peak so far
        res += [f(model, x, n), memory('VmHWM')-before]
    return tuple(res)

def fresh(f, *args):
    "`f` in a process of its own"
    with ProcessPoolExecutor(1, get_context('spawn')) as ex: return ex.submit(f, *args).result()

def learn(
    name:str, # Key of `models`
    epochs:int, # Epochs
    seed:int, # Of the drawn people, the weights and the batches
)->tuple: # mAP and rank-1 of 32 identities, minutes
    "Train one model on the drawn people, and score identities that it has not seen"
    data,t = toy_reid(n_ids=128, seed=seed, progress=False),time.perf_counter()
    dls = reid_dls(data, size=(128,64), p=16, k=4, seed=seed, num_workers=0)
    torch.manual_seed(seed)
    learner = reid_learner(dls, model=small_model(name, len(dls.pids), 'resnet18_ibn'), seed=seed)
    with learner.no_bar(), learner.no_logging(): learner.fit_warmup_cos(epochs)
    res = evaluate_data(learner.model, data, progress=False)
    return res.mAP,res.cmc[0],(time.perf_counter()-t)/60

def main(
    seeds:int=1, # Times 5 repetitions; seeds of the training runs
)->dict: # value: training time of MGN over that of the plain model
    "Measure each model, and with PARTS_EPOCHS train each"
    net,(h,w) = os.environ.get('PARTS_NET', 'resnet50_ibn'),map(int, os.environ.get('PARTS_SIZE', '256x128').split('x'))
    rows = {k:fresh(measure, k, net, (h,w), 5*seeds) for k in models()}
    print(f'{net}, {h}×{w}, batch of 8, bfloat16, {torch.get_num_threads()} threads; memory is growth at the peak')
    print(f'{"":6s} {"parameters":>12s} {"forward, ms/image":>18s} {"MB":>6s} {"training, ms/step":>18s} {"MB":>6s}')
    for k,(n,ms,mb,step,step_mb) in rows.items(): print(f'{k:6s} {n:12,d} {ms:18.1f} {mb:6.0f} {step:18.0f} {step_mb:6.0f}')
    for k in models() if (epochs := int(os.environ.get('PARTS_EPOCHS', 0))) else ():
        runs = [learn(k, epochs, o) for o in range(seeds)]
        print(f'{k:6s} trained for {epochs} epochs: mAP', ', '.join(f'{a:.3f}' for a,_,_ in runs),
              '; rank-1', ', '.join(f'{b:.3f}' for _,b,_ in runs), f'; {st.mean(o[2] for o in runs):.1f} min', flush=True)
    ratio = rows['mgn'][3]/rows['plain'][3]
    return dict(value=ratio, bar=4, ok=ratio<=4)
