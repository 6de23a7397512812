"Nothing depends on what was imported before: each module, imported alone, is what it is beside all the others"
import importlib, inspect, json, os, re, subprocess, sys, warnings
from pathlib import Path
import pytest
from slow import slow_but

root,lib = Path(__file__).parents[1],'fastreid_nb'

def modules():
    "All modules of the library, by name"
    paths = sorted((root/lib).rglob('*.py'))
    names = ['.'.join(o.relative_to(root).with_suffix('').parts) for o in paths]
    return [o for o in names if not o.endswith(('__init__', '_modidx', '_site'))]   # the last belongs to nbdev

# ---- what runs in processes of its own: this file as a program

def plain(o): return re.sub(r'0x[0-9a-f]+', '0x', repr(o))   # without addresses

def public(module):
    "Signatures of the public functions and classes of a module, and the values of its other public names"
    found = {}
    for name in getattr(module, '__all__', []):
        o = getattr(module, name)
        try: found[name] = plain(inspect.signature(o) if callable(o) else o)
        except ValueError: found[name] = plain(o)
    return found

def surroundings():
    "What an import may not touch"
    import numpy as np, random, torch
    from fastcore.basics import defaults
    from PIL import Image, ImageFile
    settings = dict(dtype=torch.get_default_dtype(), threads=torch.get_num_threads(), grad=torch.is_grad_enabled(),
        fastai=vars(defaults), pixels=Image.MAX_IMAGE_PIXELS, truncated=ImageFile.LOAD_TRUNCATED_IMAGES)
    seeds = [torch.get_rng_state().sum().item(), np.random.get_state()[1].sum().item(), hash(random.getstate())]
    return dict(settings=repr(settings), seeds=seeds, warnings=repr(warnings.filters))

def learner():
    "The callbacks and the defaults of a small learner"
    import pandas as pd, torch
    from torch import nn
    from fastreid_nb.augment.loaders import reid_dls
    from fastreid_nb.data.core import ReIDData
    from fastreid_nb.train.core import reid_learner
    class Net(nn.Conv2d):
        n_feat = 8
        def __init__(self): super().__init__(3, 8, 3)
    df = pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(8)], pid=[0,0,1,1]*2, camid=[0,1]*4, dsetid=''))
    dls = reid_dls(ReIDData('few', df, df, df), (32,16), 2, 2, num_workers=0)
    learn = reid_learner(dls, Net, dtype=torch.float32)   # a fixed precision, since measuring it takes a second
    methods = [o for o in dir(learn) if not o.startswith('_')]
    cbs = [type(o).__name__ for o in learn.cbs]
    return dict(cbs=cbs, loss=plain(learn.loss_func), opt=plain(learn.opt_func), methods=methods)

def look(name, with_learner):
    "Import `name` and look around"
    before = surroundings()
    module = importlib.import_module(name)
    after = surroundings()
    changed = {k:[before[k],v] for k,v in after.items() if v!=before[k]}
    return dict(public=public(module), changed=changed, learner=learner() if with_learner else None)

def in_fork(f):
    "What `f()` returns in a process that has imported what this one has, and nothing else"
    read,write = os.pipe()
    if pid := os.fork():
        os.close(write)
        with open(read, encoding='utf-8') as o: text = o.read()
        os.waitpid(pid, 0)
        return json.loads(text)
    try: res = f()
    except BaseException as e: res = dict(error=f'{type(e).__name__}: {e}')
    with open(write, 'w', encoding='utf-8') as o: json.dump(res, o, default=str)
    os._exit(0)

def may_patch(name):
    "Rooms before `train` know no learner"
    return name.split('.')[1] not in ('data','augment','backbone','pooling','heads','losses','weights')

def main(names):
    "One line of JSON: what was found with each module alone, and with all of them"
    import torch, torchvision, timm, fastai.vision.all   # once, since they are slow; chkstyle: ignore
    import matplotlib.pyplot   # chkstyle: ignore
    assert not [o for o in sys.modules if o.startswith(lib)]
    def whole():
        importlib.import_module(f'{lib}.all')
        return {o:look(o, o==f'{lib}.all') for o in names}
    alone = {o:in_fork(lambda: look(o, may_patch(o))) for o in names}
    print(json.dumps(dict(alone=alone, whole=in_fork(whole))))

if __name__=='__main__':
    main(sys.argv[1:])
    sys.exit()

# ---- what pytest runs

def last_of_rooms():
    "A module of each room, the last by name, and those above the rooms: the others take a minute, so they are slow"
    return {o.split('.')[1]:o for o in modules()}.values()

@pytest.fixture(scope='module')
def found(request):
    "What `main` prints of the modules that are looked at in this run"
    slow = request.config.option.slow or request.config.option.markexpr=='slow'
    names = modules() if slow else [*last_of_rooms(), *({f'{lib}.all'}-{*last_of_rooms()})]
    if not hasattr(os, 'fork'): pytest.skip('a fresh process for each module would take minutes without fork')
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(root), os.environ.get('PYTHONPATH', '')]))
    res = subprocess.run([sys.executable, __file__, *names], capture_output=True, encoding='utf-8', env=env, timeout=300)
    assert res.returncode==0, res.stderr
    return json.loads(res.stdout.splitlines()[-1])

@pytest.mark.parametrize('name', slow_but(modules(), *last_of_rooms()))
def test_module_alone(found, name):
    "Names and defaults of a module, the world around it, and the learner that `reid_learner` makes after it"
    alone,whole = found['alone'][name],found['whole']
    assert 'error' not in alone, alone['error']
    assert alone['public']==whole[name]['public']
    assert not alone['changed']
    if may_patch(name): assert alone['learner']==whole[f'{lib}.all']['learner']

def test_learner_scores(found): assert 'ScoreReID' in found['whole'][f'{lib}.all']['learner']['cbs']
