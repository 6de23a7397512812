"""Write the report of 2,000 queries in a gallery of 8,000: seconds over those of the evaluation itself (bar: at most 1.0)

Toy images of 128×64 pixels, ResNet-18-IBN, float32, two threads; the file has at most 15 MB, and the peak of memory is printed."""
import resource, tempfile, time, torch
from pathlib import Path
from fastreid_nb.backbone.resnet import resnet18_ibn
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.eval import report   # the method `ReIDResult.report`; chkstyle: ignore
from fastreid_nb.eval.inference import evaluate_data
from fastreid_nb.heads.model import reid_model

bar = 1.
n_test = 500 # identities, each with four queries and sixteen gallery images

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def main(
    seeds:int=1, # Networks
)->dict: # value: the largest ratio of seconds over the seeds
    "Evaluate, then report"
    torch.set_num_threads(2)
    values,sizes = [],[]
    with tempfile.TemporaryDirectory() as tmp:
        data = toy_reid(tmp, n_ids=n_test+4, n_per_cam=5, test_frac=n_test/(n_test+4), progress=False)
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = reid_model(resnet18_ibn(), 0, preproc=Preproc((128,64))).eval()
            a = time.perf_counter()
            res = evaluate_data(model, data, progress=False)
            b,before = time.perf_counter(),peak()
            path = res.report(Path(tmp)/'report.html', model)
            c = time.perf_counter()
            values.append((c-b)/(b-a))
            sizes.append(path.stat().st_size/1e6)
            print(f'{res.n_used} queries, {len(res.g)} images: evaluation {b-a:.1f} s, report {c-b:.1f} s, {sizes[-1]:.1f} MB; '
                f'peak {before:.0f} MB before, {peak():.0f} MB after', flush=True)
    return dict(value=max(values), bar=bar, ok=max(values)<=bar and max(sizes)<=15)
