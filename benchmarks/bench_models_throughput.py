"Embeddings/s of `fastest_model` over the fastest of float32/bfloat16 × eager/compiled × channels first/last, same ResNet-50-IBN (bar 0.98)"
import copy, statistics as st, time, torch
from itertools import product

from fastreid_nb.backbone.resnet import resnet50_ibn
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.speed import fastest_model

def once(run):
    "Seconds of one call"
    if torch.cuda.is_available(): torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()-start

def plain(model, x, dtype, layout, compiled):
    "The network as torch alone runs it: a function without arguments"
    net,x = copy.deepcopy(model).to(memory_format=layout),x.contiguous(memory_format=layout)
    if compiled: net = torch.compile(net)
    def run():
        with torch.autocast(x.device.type, dtype, enabled=dtype!=torch.float32): return net(x)
    return run

def variants(model, x):
    "Name to function, for all eight"
    dtypes,layouts = dict(float32=torch.float32, bfloat16=torch.bfloat16),dict(first=torch.contiguous_format, last=torch.channels_last)
    names = product(dtypes, layouts, ('eager','compiled'))
    return {f'{d}, channels {l}, {how}':plain(model, x, dtypes[d], layouts[l], how=='compiled') for d,l,how in names}

def main(
    seeds:int=1, # Times 7 runs of each
)->dict: # value: median over the rounds of time of the fastest variant / our time, if the cosine to float32 is at least 0.999
    "All in turn, in one process"
    torch.manual_seed(0)
    device,bs = ('cuda',256) if torch.cuda.is_available() else ('cpu',32)
    model,x = reid_model(resnet50_ibn, 751).eval().to(device),torch.rand(bs, 3, 256, 128, device=device)
    ours = fastest_model(model, x, compile=True)
    with torch.inference_mode():
        runs = {**variants(model, x), 'ours':lambda: ours(x)}
        want = model(x)
        cos = {k:torch.cosine_similarity(want, f().float()).min().item() for k,f in runs.items()}   # compiles, and warms up
        times = [[once(f) for f in runs.values()] for _ in range(7*seeds)]
    rounds = dict(zip(runs, zip(*times)))
    for k,t in rounds.items(): print(f'{k}: {bs/st.median(t):.1f} images/s, smallest cosine to float32 {cos[k]:.5f}')
    best = min((k for k in rounds if k!='ours'), key=lambda k: st.median(rounds[k]))
    value = st.median(b/o for b,o in zip(rounds[best], rounds['ours']))
    print(f'ours / {best} = {value:.3f} on {device}, {torch.get_num_threads()} threads, batches of {bs}')
    return dict(value=value, bar=.98, ok=value>=.98 and cos['ours']>=.999)

