"What benchmarks share that train on drawn people: rows in a file, which are not run again, and a light for every image"
import csv
from pathlib import Path

class Rows:
    "A CSV file whose first columns say what was run, and the others what came out"
    def __init__(self, path, keys, values): self.path,self.keys,self.values = Path(path),tuple(keys),tuple(values)
    def found(self):
        "Key to values; both are tuples of text"
        if not self.path.exists(): return {}
        with open(self.path, newline='') as f: lines = list(csv.DictReader(f))
        return {tuple(o[k] for k in self.keys):tuple(o[k] for k in self.values) for o in lines}

    def add(self, *rows):
        "Append rows of keys and values in one write; numbers with a fraction are rounded to four digits"
        new = [] if self.path.exists() else [self.keys+self.values]
        rounded = [[f'{o:.4f}' if isinstance(o, float) else o for o in row] for row in rows]
        with open(self.path, 'a', newline='') as f: csv.writer(f).writerows(new+rounded)

def light(x, rng):
    "Brightness and gains of the channels"
    import torch
    gain = torch.tensor(rng.uniform(.8,1.2,(3,1,1))*rng.uniform(.7,1.3), dtype=torch.float32)
    return (x.float()*gain).clamp(0,255).to(x.dtype)
