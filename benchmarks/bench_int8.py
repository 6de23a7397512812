"""INT8 files over the fastest way of PyTorch on this machine, images/s (bar 1.5), with cosine and mAP on drawn people, on vehicles (REALDATA) and for an ImageNet MobileNetV2 (REALWEIGHTS)

INT8=tiny runs a small size. Every case is a line on the screen; the value is the smallest ratio of the trained networks."""
import os, platform, tempfile
from functools import partial
from pathlib import Path
import torch
from torch import nn
from fastreid_nb.all import *
from fastreid_nb.heads.speed import time_in_turn
from bench_real import vehicle, vehicle2cam

tiny = os.environ.get('INT8')=='tiny'
toy = dict(n_ids=32, epochs=8, size=(64,32), bs=4) if tiny else dict(n_ids=192, epochs=20, size=(128,64), bs=32)
n_epochs = 1 if tiny else vehicle['epochs']
least = dict(cosine=.99, drop=.01)

class Tiny(nn.Sequential):
    "A network for a run of a minute"
    n_feat = 32
    def __init__(self):
        def block(a, b): return nn.Conv2d(a, b, 3, 2, 1),nn.BatchNorm2d(b),nn.ReLU()
        super().__init__(*block(3, 16), *block(16, 32), *block(32, 32))

net = Tiny if tiny else resnet18_ibn

def processor():
    "Name of the processor, and what it knows of small numbers"
    info = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    found = {k.strip():v.strip() for k,_,v in (o.partition(':') for o in info)}
    flags = [o for o in ('avx512_vnni','avx_vnni','amx_int8','avx512_bf16','amx_bf16') if o in found.get('flags', '').split()]
    return f'{found.get("model name", platform.processor())} ({", ".join(flags) or "none of VNNI, AMX, BF16"}), {torch.get_num_threads()} threads'

class FromFile(nn.Module):
    "A file where a model is expected"
    n_cams = 0
    def __init__(self, run, preproc):
        super().__init__()
        self.run,self.preproc,self.where = run,preproc,nn.Parameter(torch.zeros(1))
    def forward(self, x): return torch.from_numpy(self.run((255*x).round().to(torch.uint8).permute(0,2,3,1).contiguous().numpy()))

def by_openvino(path):
    "A function from a batch of bytes to embeddings; None where OpenVINO is not installed"
    try: import openvino as ov
    except ImportError: return None
    net = ov.compile_model(ov.Core().read_model(path), 'CPU', {'INFERENCE_NUM_THREADS':torch.get_num_threads(), 'INFERENCE_PRECISION_HINT':'f32'})
    return lambda x: net(x)[0].copy()

def runs_of(files):
    "Name to function from a batch of bytes to embeddings"
    n = torch.get_num_threads()
    runs = {k:Predictor(p, threads=n).run for k,p in files.items() if 'openvino' not in k}
    other = 'int8 for openvino' in files and by_openvino(files['int8 for openvino'])
    return runs|({'int8 for openvino':other} if other else {})

def scores(model, run, data):
    "mAP of the model and of what a file gives, and mean cosine of all queries and gallery images"
    model.test_on = 'emb'
    res = [evaluate_data(o, data, model.preproc, progress=False, num_workers=0) for o in (model,FromFile(run, model.preproc).eval())]
    embs = [embed(o, [*data.query.path, *data.gallery.path], model.preproc) for o in (model,FromFile(run, model.preproc).eval())]
    return res[0].mAP,res[1].mAP,(embs[0]*embs[1]).sum(1).mean().item()

def quantised(name, source, model, data, folder, runtime):
    "An INT8 file; None, with the reason, if the gate refuses it"
    try: res = quantise_onnx(source, model, data, folder/f'{name}_{runtime}.onnx', runtime=runtime)
    except ValueError as e: return print(f'{name}: no INT8 file for {runtime}: {e}', flush=True)
    print(f'{name}: {runtime}, left in float: {onnx_meta(res)["left_float"] or "nothing"}', flush=True)
    return res

def case(name, model, data, bs, folder):
    "Ratio of the fastest INT8 file to the fastest PyTorch, and whether it is faithful"
    model = model.cpu().float().eval()
    source = export_onnx(model, folder/f'{name}.onnx', data)
    files = {'float32':source}|{f'int8 for {k}':o for k in ('onnxruntime','openvino') if (o := quantised(name, source, model, data, folder, k))}
    runs,x = runs_of(files),torch.randint(256, (bs,*model.preproc.size,3), dtype=torch.uint8)
    xb = x.permute(0,3,1,2).contiguous()/255
    fast = fastest_model(model, xb, compile=not tiny)
    def by_torch():
        with torch.inference_mode(): return fast(xb)
    times = time_in_turn({'PyTorch':by_torch}|{k:partial(f, x.numpy()) for k,f in runs.items()}, torch.device('cpu'), 1. if tiny else 20.)
    rate = {k:bs/min(v) for k,v in times.items()}
    print(f'{name}: '+', '.join(f'{k} {v:.0f} images/s' for k,v in rate.items()), flush=True)
    faithful,best = True,0.
    for k in (o for o in runs if o.startswith('int8')):
        was,now,cosine = scores(model, runs[k], data)
        fits = cosine>=least['cosine'] and was-now<=least['drop']
        print(f'{name}: {k} mean cosine {cosine:.4f}, mAP {was:.4f} {now-was:+.4f}, {rate[k]/rate["PyTorch"]:.2f} × PyTorch', flush=True)
        if fits: best = max(best, rate[k]/rate['PyTorch'])
        faithful = faithful and fits
    return best,faithful

def toy_case(seed, folder):
    "A network that has learnt drawn people"
    data = toy_reid(folder/f'toy{seed}', n_ids=toy['n_ids'], size=toy['size'], seed=seed, progress=False)
    learn = reid_learner(reid_dls(data, toy['size'], p=4 if tiny else 16, k=4, num_workers=0, seed=seed), net, seed=seed)
    learn.remove_cb(ScoreReID)
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(toy['epochs'], 1e-3)
    return learn.model,data

def vehicle_case(seed):
    "A network that has learnt vehicles"
    data,kw = vehicle2cam(),{k:v for k,v in vehicle.items() if k!='epochs'}
    learn = reid_learner(reid_dls(data, num_workers=0, seed=seed, **kw), net, seed=seed)
    learn.remove_cb(ScoreReID)
    with learn.no_bar(), learn.no_logging(): learn.fit_warmup_cos(n_epochs, 1e-3)
    return learn.model,data

def main(
    seeds:int=1, # Number of seeds
)->dict: # value: smallest ratio of INT8 to PyTorch among the trained networks that keep cosine and mAP
    "Train, export, quantise, time and score"
    print(processor(), flush=True)
    found = []
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        for seed in range(seeds):
            found.append(case(f'toy{seed}', *toy_case(seed, folder), toy['bs'], folder))
            if os.environ.get('REALDATA'): found.append(case(f'vehicle{seed}', *vehicle_case(seed), toy['bs'], folder))
        if os.environ.get('REALDATA') and os.environ.get('REALWEIGHTS'):
            mobile = load_pretrained(Path(os.environ['REALWEIGHTS'])/'mobilenetv2_imagenet.pt')
            mobile.preproc = Preproc((128,128), 'bilinear')
            case('mobilenetv2', mobile, vehicle2cam(), toy['bs'], folder)
    value = min(o for o,_ in found)
    return dict(value=value, bar=1.5, ok=value>=1.5)
