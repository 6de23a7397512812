"TransReID's whole model: votes, dealing, frozen parts, cameras, checkpoints"
import copy

import pytest, torch

from fastreid_nb.losses.core import CrossEntropy, ReIDLoss
from fastreid_nb.losses.pairs import TripletLoss
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.train.checkpoint import load_reid, save_reid
from fastreid_nb.train.core import reid_splitter
from fastreid_nb.heads.transreid import detect_transreid, transreid

def make(**kw): return transreid(**dict(dict(variant='deit_tiny', n_pids=4, img_size=(64,32), n_cams=2), **kw))

x,cams,pid = torch.rand(4, 3, 64, 32),torch.tensor([0,1,0,1]),torch.tensor([0,0,1,1])

def test_the_whole_has_half_of_the_votes():
    out = make()(x, cams)
    for field in out: assert len(field)==8 and all(o is field[0] for o in field[:4]) and all(o is not field[0] for o in field[4:])
    losses = [torch.nn.functional.cross_entropy(o, pid) for o in out.logits]
    torch.testing.assert_close(CrossEntropy(0)(out, pid), losses[0]/2+sum(losses[4:])/8)

def test_search_joins_a_quarter_of_each_hand():
    model = make().eval()
    with torch.no_grad(): out,emb = model.outputs(x, cams),model(x, cams)
    full = model.head.branches(model.fmap(x, cams))
    torch.testing.assert_close(emb, torch.cat([full[0], *(o/4 for o in full[1:])], 1))
    assert len(out.emb)==5 and emb.shape==(4, 5*192)

def test_dealing_matters():
    model = make().eval()
    plain = copy.deepcopy(model)
    plain.head.branches.shift,plain.head.branches.groups = 0,1
    with torch.no_grad(): a,b = model.outputs(x, cams).feat,plain.outputs(x, cams).feat
    assert torch.equal(a[0], b[0]) and all((p-q).abs().max()>1e-4 for p,q in zip(a[1:], b[1:]))

def test_what_learns():
    model = make()
    ReIDLoss(CrossEntropy(), TripletLoss())(model(x, cams), pid).backward()
    still = {n for n,p in model.named_parameters() if p.grad is None}
    assert still=={n for n,p in model.named_parameters() if not p.requires_grad} and all(n.startswith(('backbone.blocks.11.','backbone.norm.')) for n in still)
    body,rest = reid_splitter(model)
    assert {id(p) for p in model.head.branches.parameters()}<={id(p) for p in body} and len(rest)==10

def test_checkpoint(tmp_path):
    model = make(preproc=Preproc((64,32), mean=(.4,)*3, std=(.5,)*3)).eval()
    save_reid(tmp_path/'m.pt', model)
    twin = load_reid(tmp_path/'m.pt')
    with torch.no_grad(): torch.testing.assert_close(twin(x, cams), model(x, cams))
    assert twin.recipe==model.recipe and twin.test_on=='feat'

def test_without_camera_the_mean_is_used():
    model = make().eval()
    with torch.no_grad(): assert not torch.equal(model(x), model(x, cams))
    with pytest.raises(ValueError, match='camid'): make().train()(x)

def test_detect_leaves_others_alone():
    state = {f'base.{k}':v for k,v in make().backbone.state_dict().items()}
    assert detect_transreid({}) is None and detect_transreid(state) is None
