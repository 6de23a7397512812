"`reid demo`: mAP on unseen identities after training (bar 0.85), with the floors, the untrained score and minutes"
import statistics as st
import subprocess, sys, tempfile, time
from pathlib import Path
import re

def percent(text, row):
    "mAP of a row of the printed table, in [0,1]"
    return float(re.findall(rf'^{row} +([\d.]+)', text, re.M)[-1])/100

def run(seed, tmp):
    "One demonstration as a process of its own: (untrained, trained, raw pixels, colour histogram, minutes)"
    t = time.perf_counter()
    words = ['demo', '--seed', seed, '--cache', f'{tmp}/cache', '--out', f'{tmp}/{seed}']
    text = subprocess.run([Path(sys.executable).with_name('reid'), *map(str, words)], check=True, capture_output=True, encoding='utf-8').stdout
    return *(percent(text, o) for o in ('untrained network', 'trained network', 'raw pixels', 'colour histogram')), (time.perf_counter()-t)/60

def main(
    seeds:int=1, # Number of seeds
)->dict: # value: mAP (median of the seeds)
    "Run the demonstration once per seed"
    with tempfile.TemporaryDirectory() as tmp: rows = [run(o, tmp) for o in range(seeds)]
    for i,r in enumerate(rows): print(f'seed {i}: untrained {r[0]:.3f}, trained {r[1]:.3f}, raw pixels {r[2]:.3f}, colour histogram {r[3]:.3f}, {r[4]:.1f} min')
    maps,mins = [o[1] for o in rows],[o[4] for o in rows]
    if seeds>1: print(f'mAP {st.mean(maps):.3f} ± {st.stdev(maps):.3f}, {st.mean(mins):.1f} min')
    ok = min(maps)>=.85 and max(mins)<=5 and all(r[2]<=.3 and r[3]<=.4 for r in rows)
    return dict(value=st.median(maps), bar=.85, ok=ok)
