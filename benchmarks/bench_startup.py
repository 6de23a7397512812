"Seconds to build DataLoaders for 100,000 rows and start an epoch (bar 3); for a million rows at most 500 MB of memory"
import statistics as st, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
import numpy as np, pandas as pd
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.data.core import ReIDData

def table(
    n:int, # Rows
    pid:int, # First identity
)->pd.DataFrame: # Twelve pictures of each identity, by six cameras; the files are not there
    "A split as a reader makes it"
    i = np.arange(n)
    path = [f'/data/set/bounding_box_train/{o//12:07d}_c{o%6+1}s1_{o:07d}_00.jpg' for o in i]
    return pd.DataFrame(dict(path=path, pid=pid+i//12, camid=i%6, dsetid='set'))

def memory(key):
    "A figure of this process that Linux keeps, in MB"
    return next(int(o.split()[1]) for o in Path('/proc/self/status').read_text().splitlines() if o.startswith(key))/1024

def build(
    data:ReIDData, # Tables; unpickled, so that little freed memory lies about
)->tuple: # (seconds, growth of memory in MB, the same at its peak)
    "Build both loaders and draw the first epoch"
    Path('/proc/self/clear_refs').write_text('5')   # forget the peak so far
    before,start = memory('VmRSS'),time.perf_counter()
    dls = reid_dls(data, num_workers=0, device='cpu')
    assert len(dls.train.get_idxs())//64==len(dls.train)>0
    return time.perf_counter()-start,memory('VmRSS')-before,memory('VmHWM')-before

def fresh(
    n:int, # Training rows; the gallery has as many again
)->tuple: # As of `build`
    "`build` in a process of its own"
    data = ReIDData('set', table(n, 0), table(n//10, n), table(n, n))
    with ProcessPoolExecutor(1, get_context('spawn')) as ex: return ex.submit(build, data).result()

def main(
    seeds:int=1, # Times 5 runs with 100,000 rows
)->dict: # value: seconds, median
    "Start-up for a large and a very large table"
    runs = [fresh(100_000) for _ in range(5*seeds)]
    secs,(slow,mb,peak) = st.median(o[0] for o in runs),fresh(1_000_000)
    print(f'  100,000 rows: {secs:.2f} s ({min(o[0] for o in runs):.2f} to {max(o[0] for o in runs):.2f}), {max(o[1] for o in runs):.0f} MB')
    print(f'1,000,000 rows: {slow:.2f} s, {mb:.0f} MB, at most {peak:.0f} MB on the way')
    return dict(value=secs, bar=3, ok=secs<=3 and peak<=500)
