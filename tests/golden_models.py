"The golden models: weights drawn from the names of their entries, and the pictures and settings they were run with"
import json, zlib

import numpy as np, torch, yaml

from golden_files import golden_dir

def golden_array(name, shape):
    "The value that the state entry `name` has: drawn from a generator seeded by the name"
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith('num_batches_tracked'): return torch.zeros(shape, dtype=torch.long)
    if name.endswith('pool_layer.p'): res = np.full(shape, 3.)
    elif name.endswith('running_mean'): res = 0.1*rng.standard_normal(shape)
    elif name.endswith('running_var'): res = rng.uniform(0.5, 1.5, shape)
    elif len(shape)>=2: res = rng.standard_normal(shape)*np.sqrt(2/np.prod(shape[1:]))
    elif name.endswith('weight'): res = rng.uniform(0.5, 1.0, shape)*(0.005 if '.W.1.' in name else 1)
    else: res = 0.1*rng.standard_normal(shape)
    return torch.tensor(np.asarray(res, dtype=np.float32))

def golden_state(path):
    "All entries of a file `*.keys.json`, under the names of the reference implementation"
    return {k:golden_array(k, s) for k,s in json.loads(path.read_text()).items()}

def golden_input():
    "Two pictures (2,3,256,128), RGB in [0,1]"
    return torch.tensor(np.load(golden_dir()/'models/input.npz')['images_uint8_nchw'])/255

def golden_name(path): return path.name.removesuffix('.keys.json')

def golden_config(path):
    "What the reference implementation would write into the config.yaml of this model: its base and what was changed"
    name,info = golden_name(path),path.parent/'summary.json'
    o = json.loads(info.read_text()).get(name) if info.exists() else None
    base = next((b for a,b in (('sbs','SBS'), ('agw','AGW'), ('MGN','MGN')) if name.startswith(a)), 'bagtricks')
    o = o or dict(config=f'Base-{base}.yml', overrides=dict(B__LAST_STRIDE=2) if 'laststride2' in name else {})
    parts,cfg = {'B':'BACKBONE', 'H':'HEADS'},dict(_BASE_=f'../{o["config"].rpartition("/")[2]}', MODEL={})
    for k,v in o['overrides'].items():
        part,_,key = k.partition('__')
        cfg['MODEL'].setdefault(parts[part], {})[key] = v
    return yaml.safe_dump(cfg)
