"""Re-rank 1,000 queries among 5,000 to 200,000 vectors of width 256: exponent of the memory beside the features (bar: at most 1.1)

Also 200,000 within 6 GB, features included. Each size runs in a process of its own. Two threads."""
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import numpy as np, torch
from bench_eval_market import PeakMemory, timed
from fastreid_nb.rerank.core import rerank_dist

bar,bar_gb = 1.1,6
sizes,n_q,width,per_id = (5_000,20_000,60_000,200_000),1000,256,20

def one(n, seed):
    "Seconds and MB for `n` vectors, queries included"
    torch.set_num_threads(2)
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n//per_id, width, generator=gen).repeat(per_id, 1)
    x += torch.randn(x.shape, generator=gen)
    def run():
        rows = rerank_dist(x[:n_q], x[n_q:])
        for pos in torch.arange(n_q).split(128): rows(pos)
    with PeakMemory() as memory: seconds,_ = timed(run)
    return seconds,memory.mb,memory.most/1024

def in_own_process(n, seed):
    with ProcessPoolExecutor(1, get_context('spawn')) as pool: return pool.submit(one, n, seed).result()

def exponent(ys): return float(np.polyfit(np.log(sizes), np.log(ys), 1)[0])

def main(
    seeds:int=1, # Runs of the whole curve
)->dict: # value: fitted exponent of the memory, the largest over the seeds
    "Time and memory over the number of vectors"
    values,largest = [],0
    for seed in range(seeds):
        runs = [in_own_process(n, seed) for n in sizes]
        for n,(s,mb,gb) in zip(sizes, runs): print(f'{n:7,d} vectors: {s:7.1f} s, {mb:5.0f} MB, {gb:.2f} GB in all', flush=True)
        times,memory,total = zip(*runs)
        print(f'exponents: time {exponent(times):.2f}, memory {exponent(memory):.2f}')
        values.append(exponent(memory))
        largest = max(largest, *total)
    return dict(value=max(values), bar=bar, ok=max(values)<=bar and largest<=bar_gb)
