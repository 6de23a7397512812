"`doctor` on 100,000 pictures: pictures/s over a plain full decode on one core (bar 1), planted faults found, memory growth (bar 500 MB)"
import statistics as st, tempfile, threading, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
import numpy as np, pandas as pd
from PIL import Image, ImageEnhance
from fastreid_nb.data import doctor # the method `ReIDData.doctor`; chkstyle: ignore
from fastreid_nb.data.core import ReIDData
from fastreid_nb.data.toy import toy_reid

n_pictures,n_planted,n_broken,most_mb = 100_000,200,50,500

def vary(job):
    "Write pictures that look different from each other, made from a few drawn ones: crop, flip, light"
    root,bases,rows = job
    for i in rows:
        im,rng = Image.open(bases[i%len(bases)]).convert('RGB'),np.random.default_rng(i)
        x,y = rng.integers(0, 28),rng.integers(0, 56)
        im = im.crop((x, y, x+100, y+200)).resize((64,128) if i%2 else (128,256))
        if rng.random()<.5: im = im.transpose(Image.FLIP_LEFT_RIGHT)
        ImageEnhance.Brightness(im).enhance(rng.uniform(.7, 1.3)).save(root/f'{i}.jpg', quality=90)

def make_data(root):
    "100,000 files, half of 128×64 and half of 256×128; some saved again under another identity, some cut off"
    toy = toy_reid(root, n_ids=250, size=(256,128), progress=False)
    bases = list(pd.concat(list(toy.splits.values())).path)
    rows = np.array_split(np.arange(n_pictures), 200)
    with ProcessPoolExecutor(2, get_context('fork')) as ex: list(ex.map(vary, [(root,bases,o) for o in rows]))
    for i in range(n_planted): Image.open(root/f'{i}.jpg').save(root/f'{n_pictures-1-i}.jpg', quality=70)
    for i in range(1000, 1000+n_broken): (root/f'{i}.jpg').write_bytes((root/f'{i}.jpg').read_bytes()[:-300])
    df = pd.DataFrame(dict(path=[str(root/f'{i}.jpg') for i in range(n_pictures)], pid=np.arange(n_pictures)//20, camid=np.arange(n_pictures)%5, dsetid='x'))
    test = df.pid>=n_pictures//40
    return ReIDData('bench', df[~test], df[test & (df.camid==0)], df[test & (df.camid>0)])

def memory():
    "Memory of this process and its children, shared pages once, MB"
    me,total = Path('/proc/self'),0
    kids = [o for t in (me/'task').iterdir() for o in (t/'children').read_text().split()]
    for p in [me, *(Path('/proc')/o for o in kids)]:
        try: total += int(next(l for l in (p/'smaps_rollup').read_text().splitlines() if l.startswith('Pss:')).split()[1])
        except (OSError,StopIteration): pass   # a child that has just ended
    return total/1024

@contextmanager
def watched(peak):
    "Append the highest `memory` seen while the block runs to `peak`"
    stop = threading.Event()
    seen = [memory()]
    def look():
        while not stop.wait(.5): seen.append(memory())
    t = threading.Thread(target=look)
    t.start()
    try: yield
    finally:
        stop.set()
        t.join()
        peak.append(max(seen)-seen[0])

def naive(paths):
    "Pictures per second of a plain full decode"
    t = time.perf_counter()
    for p in paths:
        try: Image.open(p).convert('RGB')
        except OSError: pass
    return len(paths)/(time.perf_counter()-t)

def run(data):
    "One examination between two halves of the baseline: ratio, pictures/s, memory growth, and whether all that was planted is found"
    sample,peak = list(data.gallery.path[::9]),[]
    before = naive(sample[::2])
    with watched(peak):
        t = time.perf_counter()
        report = data.doctor(progress=False)
        rate = n_pictures/(time.perf_counter()-t)
    base = st.mean([before, naive(sample[1::2])])
    found = {f.what:f.rows for f in report.findings}
    twins = found['images like one of another identity']
    paths,root = set(twins.path),Path(data.train.path[0]).parent
    right = sum(str(root/f'{i}.jpg') in paths and str(root/f'{n_pictures-1-i}.jpg') in paths for i in range(n_planted))
    n_bad = len(found['unreadable images'])
    print(f'{rate:.0f} pictures/s, full decode {base:.0f}/s, memory +{peak[0]:.0f} MB; {right} of {n_planted} planted pairs, {n_bad} of {n_broken} broken files found; '
          f'{len(twins)} pictures like one of another identity')
    return rate/base,peak[0],right>=.95*n_planted and n_bad==n_broken

def main(
    seeds:int=1, # Number of runs on the same pictures
)->dict: # value: pictures per second over those of a plain full decode (median of the runs)
    "Make the pictures, examine them, and compare"
    with tempfile.TemporaryDirectory() as tmp:
        t = time.perf_counter()
        data = make_data(Path(tmp))
        print(f'{n_pictures} pictures made in {time.perf_counter()-t:.0f} s', flush=True)
        rows = [run(data) for _ in range(seeds)]
    ratio = st.median(o[0] for o in rows)
    return dict(value=ratio, bar=1., ok=ratio>=1 and all(mb<=most_mb and found for _,mb,found in rows))
