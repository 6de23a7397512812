"""Score 10,000 queries against 1,000,000 images in a memory map: time over the same products, block by block (bar: at most 2.0)

In at most 1 GB beside the files. Two threads. Writes a file of 1 GB to the folder for temporary files."""
import os, tempfile
from pathlib import Path
import numpy as np, pandas as pd, torch
from bench_eval_market import PeakMemory, timed
from fastreid_nb.eval.core import dist_blocks
from fastreid_nb.eval.features import Features, evaluate

bar,bar_mb = 2.0,1024
n_q,n_g,n_ids,width,noise = 10_000,1_000_000,50_000,256,1.4
if small := os.environ.get('EVAL_MILLION'): n_g,n_q,n_ids = int(small),max(100, int(small)//100),int(small)//20

def gallery(folder, centres, df, gen):
    "Features on disk, made 20,000 at a time"
    disk = np.memmap(folder/'gallery.f32', np.float32, 'w+', shape=(len(df),width))
    for i in range(0, len(df), 20_000):
        x = centres[df.pid[i:i+20_000].to_numpy()]
        disk[i:i+20_000] = (x + noise*torch.randn(x.shape, generator=gen)).numpy()
    disk.flush()
    return Features(np.memmap(folder/'gallery.f32', np.float32, 'r', shape=disk.shape), df)

def products(q, g):
    "The products of the blocks that the evaluation works through"
    out = torch.empty(0)
    for block in dist_blocks(lambda pos: torch.zeros(1).expand(len(pos), len(g)), q, g):
        x = q.emb[block.rows]
        if out.shape!=(len(x),len(g)): out = torch.empty(len(x), len(g))
        torch.mm(x, g.emb.T, out=out)

def main(
    seeds:int=1, # Not used: one round takes minutes
)->dict: # value: time of `evaluate` over that of the products
    "Products and evaluation in turn, 2,000 queries at a time"
    torch.set_num_threads(2)
    rng,gen = np.random.default_rng(0),torch.Generator().manual_seed(0)
    q_df,g_df = (pd.DataFrame(dict(pid=rng.integers(0, n_ids, n), camid=rng.integers(0, 6, n))) for n in (n_q,n_g))
    centres = torch.randn(n_ids, width, generator=gen)
    q_emb = centres[q_df.pid] + noise*torch.randn(n_q, width, generator=gen)
    with tempfile.TemporaryDirectory() as folder:
        g = gallery(Path(folder), centres, g_df, gen)
        ours = theirs = peak = 0
        for rows in np.array_split(np.arange(n_q), 5):
            q = Features(q_emb[rows], q_df.iloc[rows])
            seconds,_ = timed(lambda: products(q, g))
            with PeakMemory() as memory: mine,res = timed(lambda: evaluate(q, g))
            ours,theirs,peak = ours+mine,theirs+seconds,max(peak, memory.mb)
            print(f'{len(q)} queries: products {seconds:.1f} s, evaluate {mine:.1f} s: {mine/seconds:.2f}; mAP {res.mAP:.3f}, '
                f'{memory.mb:.0f} MB beside the files', flush=True)
    return dict(value=ours/theirs, bar=bar, ok=ours/theirs<=bar and peak<=bar_mb)
