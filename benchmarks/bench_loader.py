"Input pipelines of training and test, images/s over plain per-item PIL + torchvision v1 transforms: the smallest ratio (bar 2)"
import statistics as st, tempfile, time, torch
from itertools import product
from pathlib import Path
import numpy as np, pandas as pd
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.data.core import ReIDData
from fastreid_nb.recipes.augs import sbs_augs

def picture(rng, h=256, w=128):
    "Smooth colours with fine texture, about as many bytes as a cropped person"
    base = Image.fromarray(rng.integers(0, 256, (h//16,w//16,3), dtype=np.uint8)).resize((w,h), Image.BICUBIC)
    px = (np.asarray(base)+rng.normal(0, 6, (h,w,1))).clip(0, 255).astype(np.uint8)
    return Image.fromarray(px).filter(ImageFilter.GaussianBlur(.6))

def make(
    path:Path, # Folder to fill
    n:int, # Pictures; 16 of each identity
)->ReIDData: # Training pictures, and the same again as gallery
    "JPEG files of 256×128 pixels in quality 90"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(path=[str(path/f'{i:05d}.jpg') for i in range(n)], pid=np.arange(n)//16, camid=np.arange(n)%4, dsetid='made'))
    for f in df.path: picture(rng).save(f, quality=90)
    print(f'{n} files of {np.mean([Path(f).stat().st_size for f in df.path])/1000:.1f} kB on average')
    return ReIDData('made', df, df[:1], df[1:])

class Plain(Dataset):
    "One file at a time through a list of torchvision v1 transforms"
    def __init__(self, df, tfms): self.rows,self.tfms = list(zip(df.path, df.pid, df.camid)),T.Compose(tfms)
    def __len__(self): return len(self.rows)
    def __getitem__(self, i):
        path,pid,camid = self.rows[i]
        with Image.open(path) as im: return self.tfms(im.convert('RGB')),pid,camid

def plain(
    df:pd.DataFrame, # A split
    size:tuple, # (height, width)
    train:bool, # With augmentation, shuffled?
    n_workers:int, # Processes
)->DataLoader: # Batches of 64
    "The pipeline to compare with; fast-reid's strong baseline for training"
    tfms = [T.Resize(size, T.InterpolationMode.BICUBIC)]
    auto = T.RandomChoice([T.AutoAugment(interpolation=o) for o in (T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC)])
    if train: tfms = [T.RandomApply([auto], .1), *tfms, T.RandomHorizontalFlip(), T.Pad(10), T.RandomCrop(size)]
    erase = [T.RandomErasing(.5, (.02,.33), (.3,3.3), value=(.485,.456,.406))] if train else []
    return DataLoader(Plain(df, [*tfms, T.ToTensor(), *erase]), 64, shuffle=train, num_workers=n_workers, drop_last=train)

def ours(
    data:ReIDData, # All pictures
    size:tuple, # (height, width)
    train:bool, # With augmentation, in P×K batches?
    n_workers:int, # Processes
): # A loader with batches of 64
    "Our pipeline; the same augmentations"
    dls = reid_dls(data, size, augs=sbs_augs, val_bs=64, num_workers=n_workers, device='cpu')
    return dls.train if train else dls.valid

def speed(dl):
    "Images/s of one epoch from its first batch on, when worker processes have started"
    n,start = 0,None
    for xb,*_ in dl:
        assert xb.dtype==torch.float32 and xb.view(-1)[::1024].sum()>0   # touches every page of memory, as a network would
        if start: n += len(xb)
        else: start = time.perf_counter()
    return n/(time.perf_counter()-start)

def main(
    seeds:int=1, # Times 5 runs of each pipeline
)->dict: # value: smallest of the ratios of medians
    "Both pipelines in turn, with 0, 1 and 2 worker processes"
    torch.set_num_threads(1)
    ratios = []
    with tempfile.TemporaryDirectory() as tmp:
        data = make(Path(tmp), 2048)
        for train,size,n in product((True,False), ((256,128),(384,128)), (0,1,2)):
            dls = plain(data.train, size, train, n),ours(data, size, train, n)
            runs = [[speed(dl) for dl in dls] for _ in range(5*seeds)]
            a,b = (st.median(o) for o in zip(*runs))
            ratios.append(b/a)
            print(f'{"train" if train else "test":5} to {size[0]}×{size[1]}, {n} workers: plain {a:6.0f}, ours {b:6.0f} images/s, ratio {b/a:.2f}', flush=True)
    return dict(value=min(ratios), bar=2, ok=min(ratios)>=2)
