"Exported file in onnxruntime against PyTorch: images/s of float32 on the same two threads, and the seconds of an export"
import platform, tempfile, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import numpy as np, onnxruntime, torch
from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.backbone.resnet import resnet18, resnet50_ibn
from fastreid_nb.export.core import export_onnx
from fastreid_nb.export.predictor import Predictor
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.speed import time_in_turn

networks = dict(resnet50_ibn=resnet50_ibn, resnet18=resnet18, osnet=osnet)

def processor():
    "What the processor calls itself"
    info = Path('/proc/cpuinfo')
    if not info.exists(): return platform.processor()
    return next((o.partition(':')[2].strip() for o in info.read_text().splitlines() if o.startswith('model name')), '')

def as_pytorch(model, x):
    "What a program with PyTorch does: pixels to floats with channels last, the model, length 1"
    images = torch.from_numpy(x).permute(0,3,1,2).float()/255
    return torch.nn.functional.normalize(model(images.contiguous(memory_format=torch.channels_last)), dim=1)

def compared(name, make, folder, size, bs, threads, seconds):
    "Row of the table for one network: both in turn in one process"
    torch.manual_seed(0)
    model = reid_model(make).eval()
    model.preproc = replace(model.preproc, size=size)
    begin = time.perf_counter()
    path = export_onnx(model, folder/f'{name}.onnx')
    took = time.perf_counter()-begin
    reid,model = Predictor(path, threads),model.to(memory_format=torch.channels_last)
    x = np.random.default_rng(0).integers(0, 256, (bs,*size,3), dtype=np.uint8)
    with torch.inference_mode():
        runs = dict(pytorch=partial(as_pytorch, model, x), onnxruntime=partial(reid.run, x))
        assert np.abs(runs['pytorch']().numpy()-runs['onnxruntime']()).max()<1e-3
        times = {k:np.median(v) for k,v in time_in_turn(runs, torch.device('cpu'), seconds, 200).items()}
    return dict(name=name, ratio=times['pytorch']/times['onnxruntime'], export=took, **{k:bs/v for k,v in times.items()})

def main(seeds=1, networks=networks, size=(256,128), bs=8, threads=2, seconds=20.):
    "value: images/s of onnxruntime over those of eager PyTorch (channels last, inference mode), ResNet-50-IBN; bar 1.3"
    torch.set_num_threads(threads)
    print(f'{processor()}, {threads} threads, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, batch {bs} of {size}')
    with tempfile.TemporaryDirectory() as d:
        rows = [compared(k, make, Path(d), size, bs, threads, seconds) for k,make in networks.items()]
    for o in rows: print(f'{o["name"]:14} PyTorch {o["pytorch"]:6.1f}/s, onnxruntime {o["onnxruntime"]:6.1f}/s: {o["ratio"]:.2f}; '
        f'export with gate {o["export"]:.0f} s')
    first = rows[0]
    slow = [o['name'] for o in rows if o['export']>60]
    if slow: print(f'more than 60 s of export: {", ".join(slow)}')
    return dict(value=first['ratio'], bar=1.3, ok=first['ratio']>=1.3 and not slow)
