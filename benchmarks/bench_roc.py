"""All pairs of Market-1501's size as a ROC, beside the bare matrix product, and TAR@FAR against exact counts

3,368 x 15,913 vectors of 2,048 numbers are drawn around 750 random centres. The pairs are never stored. The value is
the time that `evaluate_roc` needs beside the product `Q @ G.T`, over the time of the product; both in turn, medians.
"""
import statistics, time
import numpy as np, pandas as pd, torch
from fastreid_nb.eval.features import Features
from fastreid_nb.eval.verification import evaluate_roc

bar,worst,rates = .5,1e-6,(1e-3,1e-4)

def draw(n_q, n_g, dim, seed, n_ids=750, noise=2.6):
    "Features of queries and gallery around random centres, six cameras"
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_ids,dim), dtype=np.float32)
    def side(n):
        pid,cam = rng.integers(0, n_ids, n),rng.integers(0, 6, n)
        emb = centres[pid] + noise*rng.standard_normal((n,dim), dtype=np.float32)
        return Features(torch.from_numpy(emb), pd.DataFrame(dict(pid=pid, camid=cam)), 'market')
    return side(n_q),side(n_g)

def exact(q, g, fars):
    "TAR at each of `fars`, by sorting all impostor distances that can matter"
    unit = [torch.nn.functional.normalize(o.emb, dim=1) for o in (q,g)]
    pid,cam = ([o.df[c].to_numpy() for o in (q,g)] for c in ('pid','camid'))
    genuine,impostor,n = [],[],0
    for i in range(0, len(q), 64):
        d = (1-unit[0][i:i+64]@unit[1].T).clamp(0, 2).numpy()
        same = pid[0][i:i+64,None]==pid[1]
        own = same & (cam[0][i:i+64,None]==cam[1])
        genuine.append(d[same & ~own])
        other = d[~same]
        n += len(other)
        impostor.append(np.partition(other, len(other)//5)[:len(other)//5])   # far more than the rates need
    genuine,impostor = np.concatenate(genuine),np.sort(np.concatenate(impostor))
    return [float((genuine<impostor[int(far*n+1e-9)]).mean()) for far in fars]

def timed(f):
    "Seconds that `f` takes, and what it returns"
    start = time.perf_counter()
    res = f()
    return time.perf_counter()-start, res

def main(seeds=1, n_q=3368, n_g=15913, dim=2048, rounds=5):
    torch.set_num_threads(2)
    q,g = draw(n_q, n_g, dim, seed=0)
    times = []
    for _ in range(rounds):
        product,_ = timed(lambda: q.emb@g.emb.T)
        whole,roc = timed(lambda: evaluate_roc(q, g))
        times.append((product,whole))
        print(f'product {product:.2f} s, evaluate_roc {whole:.2f} s, beside {(whole-product)/product:.2f}', flush=True)
    beside = statistics.median((w-p)/p for p,w in times)
    want = exact(q, g, rates)
    errors = [abs(roc.tar_at(far)-o) for far,o in zip(rates, want)]
    print(f'{roc.n_genuine:,} genuine and {roc.n_impostor:,} impostor pairs, EER {roc.eer():.4f}')
    for far,o,e in zip(rates, want, errors): print(f'TAR@FAR {far:g}: {o:.6f} by exact counts, error {e:.1e}')
    return dict(value=beside, bar=bar, ok=beside<=bar and max(errors)<=worst)
