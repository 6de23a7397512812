"Faults of the documentation pages: figures without text, lost sentences, long lines, wrong Next, links and names missing (bar 0)"
import sys, tempfile
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent.parent/'tools'))
from check_docs import build
from page_faults import page_faults

def main(
    seeds:int=1, # Not used: there is nothing random
)->dict: # value: number of faults
    "Render all pages and count"
    with tempfile.TemporaryDirectory() as tmp: faults = page_faults(build(Path(tmp))[1])
    for name,found in faults.items(): print(f'{name:20s} {len(found)}')
    n = sum(map(len, faults.values()))
    return dict(value=n, bar=0, ok=n==0)
