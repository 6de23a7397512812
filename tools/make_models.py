"Train the models that are published, and write each into a folder with its card: drawn people, and vehicles from scratch and from ImageNet's weights"
import os, sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from fastcore.script import call_parse
from fastreid_nb.all import *
from fastreid_nb.recipes.cli import reid_demo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))

drawn = 'The images are drawn by a program of this library, and free of rights'
photographed = 'Apache-2.0 (vehicle2cam: Vehicle-Re-ID-Dataset of Khoa-Nguyen-Truong, GitHub)'
vehicles = '''To rank images of vehicles, taken by two fixed cameras at a road, by how likely they show the same vehicle as a query.
It learnt 284 vehicles of one place. Measure it on images of your own before you rely on it.'''

def people(tmp):
    "Data and checkpoint of `reid demo`"
    reid_demo(out=tmp/'demo')
    return toy_reid(progress=False),tmp/'demo'/'model.pt'

def cars(pretrained, tmp):
    "Data and checkpoint of the benchmarks `real` and `cached`"
    import bench_cached, bench_real
    data = bench_real.vehicle2cam()
    head,fit = bench_cached.ways['full fine-tuning']
    learn = bench_cached.learner(data, head, 0) if pretrained else bench_real.trained(data, 0, **bench_real.vehicle)[0]
    if pretrained:
        with learn.no_bar(), learn.no_logging(): fit(learn)
    learn.save_reid(tmp/'model.pt')
    return data,tmp/'model.pt'

def write(out, name, train, licence, use=''):
    "Train and publish one model, and score what was published"
    if (out/name/'README.md').exists(): return print(f'{name}: is there')
    with TemporaryDirectory() as tmp:
        data,model = train(Path(tmp))
        publish(model, data, out/name, licence, name=name, use=use, progress=False)
    print(f'{name}: {evaluate_data(load_reid(out/name), data, progress=False).mAP:.3f}', flush=True)

@call_parse
def main(
    out:str='models', # Folder for a folder of each model
):
    "Train and publish; vehicles need REALDATA, and REALWEIGHTS for ImageNet's weights, in the environment"
    out = Path(out)
    write(out, 'people-drawn-r18ibn', people, drawn)
    if os.environ.get('REALDATA'): write(out, 'vehicle2cam-r18ibn', partial(cars, False), photographed, vehicles)
    if os.environ.get('REALDATA') and os.environ.get('REALWEIGHTS'):
        write(out, 'vehicle2cam-mobilenetv2', partial(cars, True), photographed, vehicles)
