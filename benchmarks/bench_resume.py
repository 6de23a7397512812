"Eight kills with SIGKILL, each with 0 and with 2 workers: how many runs end with the weights of one that was not killed (bar: 8)"
import hashlib, json, multiprocessing, os, random, signal, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from fastai.callback.core import Callback
from torch import nn
from fastreid_nb.all import *
from fastreid_nb.train.state import named_tensors

bar,n_epoch = 8,4
# Name of a kill: what ends the process, its event or 'time', and how often it comes before
kills = {'in the first epoch':'after_pred', 'while validating':'after_pred_valid', 'inside a write':'write',
    **{f'at a random time, {i+1}':'time' for i in range(5)}}

## The process that is killed

class TinyNet(nn.Sequential):
    n_feat = 16
    def __init__(self): super().__init__(nn.Conv2d(3,16,3,4,1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout2d(.2))

def learner(folder, workers):
    "A small network and a run in which everything remembers something"
    data = toy_reid(folder, n_ids=40, size=(64,32), progress=False).holdout(.3)
    dls = reid_dls(data, (64,32), p=4, k=4, num_workers=workers, augs=[hflip, random_erase], val_bs=16,
        batch_tfms=[RandomPatch(warmup=20, capacity=100)])
    return reid_learner(dls, TinyNet, loss=ReIDLoss(CrossEntropy(), TripletLoss(), QueueLoss(16, 64)), dtype=torch.float32)

class Killer(Callback):
    "Ends this process at the `n`-th event"
    order,count = 98,0
    def __init__(self, how, n): self.event,self.left = how,n
    def __call__(self, name):
        wanted = name+('_valid' if name=='after_pred' and not self.training else '')
        if wanted!=self.event: return
        self.left -= 1
        if self.left<0: os.kill(os.getpid(), signal.SIGKILL)
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

def cut_short(n):
    "Let the `n`-th write end in the middle, and the process with it"
    save,left = torch.save,[n]
    def half(o, f):
        left[0] -= 1
        if left[0]>=0: return save(o, f)
        f.write(os.urandom(5000))
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = half

def child(toy, out, workers, how='', n=0):
    "Train, or go on; leave a hash of all weights"
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(0) # as a program does that is started again
    learn = learner(toy, workers)
    if how=='write': cut_short(n)
    (out/'started').touch()
    start = time.monotonic()
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(n_epoch, 1e-2, freeze_iters=5,
        cbs=[EMA(.9), KeepBest(None), Resumable(out/'run', every_iters=3, resume=True), Killer(how, n)])
    tensors = {**named_tensors(learn.model), **named_tensors(learn.loss_func)}
    weights = b''.join(o.detach().contiguous().numpy().tobytes() for o in tensors.values())
    end = dict(hash=hashlib.sha256(weights).hexdigest(), seconds=time.monotonic()-start, batches=len(learn.dls.train))
    (out/'end.json').write_text(json.dumps(end))

## The one that kills

def begin(toy, out, workers, how='', n=0):
    "A copy of this process, which has trained nothing and uses one thread"
    out.mkdir(exist_ok=True)
    process = multiprocessing.get_context('fork').Process(target=child, args=(toy, out, workers, how, n))
    process.start()
    return process

def wait(process):
    process.join()
    return process.exitcode

def run(*args):
    "What a process leaves that comes to its end"
    status = wait(begin(*args))
    if status: sys.exit(f'a run ended with exit status {status}')
    return json.loads((args[1]/'end.json').read_text())

def kill_at(toy, out, workers, seconds):
    "Kill a process so long after its training has begun; sooner, if it was over by then"
    process = begin(toy, out, workers)
    while process.is_alive() and not (out/'started').exists(): time.sleep(.01)
    time.sleep(seconds)
    process.kill()
    return wait(process)

def killed(toy, out, workers, how, n, seconds):
    "Start a run and see it die"
    status = kill_at(toy, out, workers, seconds) if how=='time' else wait(begin(toy, out, workers, how, n))
    if status!=-signal.SIGKILL: sys.exit(f'{out.name}: exit status {status}: expected a run that was killed')

def moment(how, rng, whole):
    "A random moment of the kind that is wanted"
    most = {'after_pred':whole['batches']-1, 'after_pred_valid':20, 'write':4*n_epoch, 'time':0}[how]
    return rng.randrange(most+1),rng.uniform(.02, .6)*whole['seconds']

def main(
    seeds:int=1, # Seed of the moments
)->dict: # value: kills after which the run ended with the same weights with both numbers of workers
    "Run once without a kill; then kill, go on, and compare"
    torch.set_num_threads(1)
    rng,rows = random.Random(seeds),[]
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        whole = {w:run(tmp/'toy', tmp/f'whole {w}', w) for w in (0,2)}
        print(f'{n_epoch} epochs of {whole[0]["batches"]} batches; 0 and 2 workers agree: {whole[0]["hash"]==whole[2]["hash"]}', flush=True)
        for i,(name,how) in enumerate(kills.items()):
            for w in (0,2):
                out,(n,seconds) = tmp/f'{i} {w}',moment(how, rng, whole[w])
                killed(tmp/'toy', out, w, how, n, seconds)
                states = sorted(o.name for o in (out/'run').glob('state-*.pt'))
                same = run(tmp/'toy', out, w)['hash']==whole[0]['hash']
                rows.append(dict(kill=i, same=same))
                print(f'killed {name}, {w} workers: newest of {len(states)} states {states[-1] if states else "none"}, same weights: {same}', flush=True)
    value = sum(all(o['same'] for o in rows if o['kill']==i) for i in range(len(kills)))
    return dict(value=value, bar=bar, ok=value>=bar)
