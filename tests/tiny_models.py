"Networks and loaders so small that an epoch takes a few hundredths of a second"
from contextlib import contextmanager
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from fastreid_nb.augment.loaders import reid_dls
from fastreid_nb.backbone.resnet import ReIDResNet

class TinyNet(nn.Sequential):
    n_feat = 8
    def __init__(self): super().__init__(nn.Conv2d(3,8,3,4,1), nn.BatchNorm2d(8), nn.ReLU())

def tiny_dls(data, augs=(), p=3, k=4, **kwargs):
    "Batches of 32×16 pixels, read in this process"
    return reid_dls(data, (32,16), p=p, k=k, num_workers=0, augs=list(augs), **kwargs)

@contextmanager
def thin_resnets(part=4):
    """Our networks of 18 and 34 layers with a quarter of their channels, 128 in the end: a file of 3 MB in place of 45.

    All else is as it was, so that files of weights are recognised by their names as before."""
    before = ReIDResNet._make_layer
    def make_layer(self, block, planes, *args, **kwargs):
        if issubclass(block, BasicBlock): planes //= part
        return ResNet._make_layer(self, block, planes, *args, **kwargs)
    ReIDResNet._make_layer = make_layer
    try: yield
    finally: ReIDResNet._make_layer = before
