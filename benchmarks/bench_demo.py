"`reid demo`: mAP on unseen identities after training (bar 0.85), with the floors, the untrained score and minutes"
import re, statistics as st, subprocess, sys, tempfile, time
from pathlib import Path

def scores(text, row):
    "mAP, mINP and rank-1 of a row of the last table that has it, in [0,1]"
    return [float(o)/100 for o in re.findall(rf'^{row} +([\d.]+) +([\d.]+) +([\d.]+)', text, re.M)[-1]]

def run(seed, tmp):
    "One demonstration as a process of its own: scores by row of the table, and minutes"
    t = time.perf_counter()
    words = ['demo', '--seed', seed, '--cache', f'{tmp}/cache', '--out', f'{tmp}/{seed}']
    text = subprocess.run([Path(sys.executable).with_name('reid'), *map(str, words)], check=True, capture_output=True, encoding='utf-8').stdout
    return {o:scores(text, o) for o in ('raw pixels', 'colour histogram', 'untrained network', 'trained network')},(time.perf_counter()-t)/60

def main(
    seeds:int=1, # Number of seeds
)->dict: # value: mAP (median of the seeds)
    "Run the demonstration once per seed"
    with tempfile.TemporaryDirectory() as tmp: rows = [run(o, tmp) for o in range(seeds)]
    for i,(r,mins) in enumerate(rows):
        print(f'seed {i}: mAP', ', '.join(f'{k} {v[0]:.3f}' for k,v in r.items()), '; mINP {1:.3f}, rank-1 {2:.3f}'.format(*r['trained network']), f'; {mins:.1f} min')
    trained = list(zip(*(r['trained network'] for r,_ in rows)))
    if seeds>1: print(', '.join(f'{k} {st.mean(v):.3f} ± {st.stdev(v):.3f}' for k,v in zip(('mAP','mINP','rank-1'), trained)))
    ok = min(trained[0])>=.85 and all(mins<=5 and r['raw pixels'][0]<=.3 and r['colour histogram'][0]<=.4 for r,mins in rows)
    return dict(value=st.median(trained[0]), bar=.85, ok=ok)
