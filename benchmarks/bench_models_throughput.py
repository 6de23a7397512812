"Embeddings/s of ResNet-50-IBN in bfloat16, channels_last and compiled, over a float32, channels-first torchvision ResNet-50 of the same size (bar 1.8)"
import statistics as st, time, torch, torchvision
from functools import partial
from torch import nn
from fastreid_nb.backbone.resnet import resnet50
from fastreid_nb.heads.model import reid_model

def baseline(): # torchvision's ResNet-50 with a last stride of 1, without its classifier
    net = torchvision.models.resnet50(weights=None)
    net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (1,1)
    net.fc = nn.Identity()
    return net.eval()

def once(run):
    "Seconds of one call"
    start = time.perf_counter()
    run()
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()-start

def main(
    seeds:int=1, # Times 5 runs of each
)->dict: # value: ratio of the medians, if the cosine to float32 is at least 0.999
    "All in turn, in one process"
    torch.manual_seed(0)
    device,bs = ('cuda',256) if torch.cuda.is_available() else ('cpu',32)
    x = torch.rand(bs, 3, 256, 128, device=device)
    last = x.to(memory_format=torch.channels_last)
    plain,model = baseline().to(device),reid_model(partial(resnet50, ibn=True), 751).eval().to(device)
    with torch.inference_mode(): want = model(x)
    model = model.to(memory_format=torch.channels_last)
    compiled = torch.compile(model)
    def amp(net):
        with torch.autocast(device, torch.bfloat16): return net(last)
    runs = {'float32, channels first (torchvision)':lambda: plain(x), 'float32, channels last':lambda: model(last), 'bfloat16, channels last':lambda: amp(model),
        'bfloat16, channels last, compiled':lambda: amp(compiled)}
    with torch.inference_mode():
        cos = {k:torch.cosine_similarity(want, f().float()).min().item() for k,f in runs.items() if 'torchvision' not in k}
        times = [[once(f) for f in runs.values()] for _ in range(5*seeds)]
    base,*ours = (st.median(o) for o in zip(*times))
    print(f'{list(runs)[0]}: {bs/base:.1f} images/s on {device}, {torch.get_num_threads()} threads, batches of {bs}')
    for (k,c),t in zip(cos.items(), ours): print(f'{k}: {bs/t:.1f} images/s, ratio {base/t:.2f}, smallest cosine to float32 {c:.5f}')
    ratio = base/min(ours[1:])
    return dict(value=ratio, bar=1.8, ok=ratio>=1.8 and min(cos.values())>=.999)
