"Two processes against one on the CPU, the same global batch: largest relative difference of the first five losses (bar 1e-3)"
import json, os, subprocess, sys, tempfile
from pathlib import Path

script = '''
import json, os, sys, time, torch
from fastai.callback.core import Callback
from fastreid_nb.all import *

class Note(Callback):
    run_valid = False
    def before_fit(self): self.seen,self.times = [],[]
    def after_loss(self): self.seen.append(self.learn.loss.item())
    def after_batch(self): self.times.append(time.perf_counter())

torch.set_num_threads(1)
folder,p,out = sys.argv[1],int(sys.argv[2]),sys.argv[3]
dls = reid_dls(toy_reid(folder, n_ids=64, progress=False), (64,32), p, 4, augs=[], num_workers=0)
learn = reid_learner(dls, resnet18_ibn, dtype=torch.float32).across_processes()
note = Note()
with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(2, 3.5e-4, warmup_epochs=1.5, flat_epochs=1.5, start=.01, cbs=note)
steps = [b-a for a,b in zip(note.times, note.times[1:])]
row = dict(losses=note.seen, mAP=learn.reid_result.mAP, seconds=sorted(steps)[len(steps)//2])
if os.environ.get('RANK', '0')=='0': json.dump(row, open(out, 'w'))
'''

def launch(tmp, n, p):
    "What process 0 of `n` wrote"
    (tmp/'train.py').write_text(script)
    how = [] if n==1 else ['-m','torch.distributed.run','--nproc_per_node',str(n)]
    subprocess.run([sys.executable, *how, tmp/'train.py', tmp, str(p), tmp/'out.json'], check=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    return json.loads((tmp/'out.json').read_text())

def main(
    seeds:int=1, # Not used: both runs are seeded
)->dict: # value: largest relative difference
    "ResNet-18-IBN, 16×4 images in one process and 8×4 in each of two"
    with tempfile.TemporaryDirectory() as tmp: one,two = (launch(Path(tmp), n, 16//n) for n in (1,2))
    off = [abs(b-a)/a for a,b in zip(one['losses'][:5], two['losses'])]
    for name,o in dict(one=one, two=two).items(): print(f'{name}: losses', *(f'{v:.5f}' for v in o['losses'][:5]), f'mAP {o["mAP"]:.4f}, {o["seconds"]:.2f} s a step')
    return dict(value=max(off), bar=1e-3, ok=max(off)<=1e-3)
