"Losses: properties over random batches; equality with the reference is tested in test_losses_golden.py"
import math

import pytest, torch, torch.nn.functional as F

from fastreid_nb.heads.core import ReIDOut
from fastreid_nb.losses.core import CrossEntropy, ReIDLoss, smooth_cross_entropy
from fastreid_nb.losses.pairs import TripletLoss, batch_hard_triplet

def out_of(x=None, logits=None): return ReIDOut(logits, x, x)

def batch(p=4, k=3, c=8, seed=0, scale=1.):
    g = torch.Generator().manual_seed(seed)
    pid = torch.arange(p).repeat_interleave(k)[torch.randperm(p*k, generator=g)]
    return ReIDOut(torch.randn(p*k, p, generator=g), *(torch.randn(2, p*k, c, generator=g)*scale)), pid

def loop_triplet(x, pid, margin, dist):
    "The definition, one anchor at a time, in double precision"
    x,tot = x.double(),0.
    if dist=='cosine': x = x/x.norm(dim=1, keepdim=True)
    def d(i, j): return (x[i]-x[j]).pow(2).sum().item()**(1 if dist=='cosine' else 0.5)
    for a in range(len(x)):
        pos = [d(a, j) for j in range(len(x)) if pid[j]==pid[a]]
        neg = [d(a, j) for j in range(len(x)) if pid[j]!=pid[a]]
        gap = max(pos)-min(neg) if neg else -math.inf
        tot += math.log1p(math.exp(gap)) if margin is None else max(0., gap+margin)
    return tot/len(x)

@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('margin', [0.3, 0., 2., None])
@pytest.mark.parametrize('dist', ['euclidean','cosine'])
@pytest.mark.parametrize('on', ['feat','emb'])
def test_triplet_against_a_loop(seed, margin, dist, on):
    out,pid = batch(seed=seed)
    got = TripletLoss(margin, dist, on)(out, pid)
    assert abs(got.item()-loop_triplet(getattr(out, on), pid, margin, dist))<1e-5

@pytest.mark.parametrize('pids', [[0,0,1,1,2], [5,0,0,0,9], [0,1,2,3]])
def test_triplet_with_few_images(pids):
    x,pid = torch.randn(len(pids), 4),torch.tensor(pids)
    assert abs(batch_hard_triplet(x, pid).item()-loop_triplet(x, pid, 0.3, 'euclidean'))<1e-5

def test_triplet_does_not_depend_on_order():
    out,pid = batch()
    i = torch.randperm(len(pid))
    torch.testing.assert_close(TripletLoss()(out, pid), TripletLoss()(ReIDOut(o[i] for o in out), pid[i]))

@pytest.mark.parametrize('margin', [0.3,None])
def test_one_identity_is_zero_and_said(margin):
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.warns(UserWarning, match='one identity'): loss = TripletLoss(margin)(out_of(x), torch.full((4,), 7))
    loss.backward()
    assert loss==0 and x.grad.eq(0).all()

@pytest.mark.parametrize('margin', [0.3,None])
@pytest.mark.parametrize('dist', ['euclidean','cosine'])
@pytest.mark.parametrize('rows', ['same','zero','two'])
def test_gradients_stay_finite(margin, dist, rows):
    x = torch.randn(6, 5)
    if rows=='same': x = x[:1].repeat(6, 1)
    if rows=='zero': x = torch.zeros(6, 5)
    if rows=='two': x[1] = x[0]
    x.requires_grad_()
    loss = TripletLoss(margin, dist)(out_of(x), torch.tensor([0,0,1,1,2,2]))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()

def test_soft_margin_never_overflows():
    x,pid = torch.tensor([[0.],[1e8],[1e-3],[1e8]]),torch.tensor([0,0,1,1])
    loss = batch_hard_triplet(x, pid, None)
    assert loss.isfinite() and loss>1e7

@pytest.mark.parametrize('dist', ['euclidean','cosine'])
def test_triplet_gradient(dist):
    out,pid = batch(c=4)
    x = out.feat.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: batch_hard_triplet(x, pid, None, dist), x)

def test_near_distances_keep_their_digits_under_autocast():
    x = torch.randn(1, 512)*3+torch.randn(4, 512)*0.01
    pid = torch.tensor([0,0,1,1])
    want = loop_triplet(x, pid, None, 'euclidean')
    with torch.autocast('cpu', dtype=torch.bfloat16): got = TripletLoss(None)(out_of(x), pid)
    assert got.dtype==torch.float32 and abs(got.item()/want-1)<1e-5

@pytest.mark.parametrize('loss,fn', [(CrossEntropy(), 'core.smooth_cross_entropy'), (TripletLoss(), 'pairs.batch_hard_triplet'),
    (TripletLoss(mining='weighted'), 'pairs.batch_weighted_triplet')])
def test_autocast_is_off_inside(loss, fn, monkeypatch):
    seen,(out,pid) = [],batch()
    def spy(x, *args): return seen.append((x.dtype, torch.is_autocast_enabled('cpu'))) or x.sum()
    monkeypatch.setattr(f'fastreid_nb.losses.{fn}', spy)
    with torch.autocast('cpu', dtype=torch.bfloat16): loss(ReIDOut(o.bfloat16() for o in out), pid)
    assert seen==[(torch.float32, False)]

@pytest.mark.parametrize('eps', [0., 0.1, 0.5])
@pytest.mark.parametrize('k', [2,5,100])
def test_smoothing_against_torch(eps, k):
    logits,pid = torch.randn(7, k),torch.randint(k, (7,))
    torch.testing.assert_close(smooth_cross_entropy(logits, pid, eps), F.cross_entropy(logits, pid, label_smoothing=eps))
    q = torch.full((7,k), eps/(k-1)).scatter(1, pid[:,None], 1-eps)
    torch.testing.assert_close(smooth_cross_entropy(logits, pid, eps, 'others'), F.cross_entropy(logits, q))

def test_one_class_costs_nothing():
    for s in ('all','others'): assert smooth_cross_entropy(torch.randn(3, 1), torch.zeros(3, dtype=torch.long), 0.1, s)==0

# What holds for every term is tested in test_losses_terms.py; here it is their sum

def test_parts_are_averaged():
    loss = ReIDLoss(CrossEntropy(), TripletLoss(None, 'cosine', 'emb'))
    (a,pid),(b,_) = batch(seed=1),batch(seed=2)
    both = ReIDOut([x, y] for x,y in zip(a, b))
    torch.testing.assert_close(loss(both, pid), (loss(a, pid)+loss(b, pid))/2)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_loss_dtype(dtype):
    out,pid = batch()
    got = ReIDLoss(CrossEntropy(), TripletLoss())(ReIDOut(o.to(dtype) for o in out), pid)
    assert got.dtype==(torch.float64 if dtype==torch.float64 else torch.float32) and got.ndim==0

def test_weighted_sum_and_parts():
    out,pid = batch()
    out = ReIDOut(o.requires_grad_() for o in out)
    def norm(out, pid, camid): return out.feat.pow(2).mean()
    ce,tri = CrossEntropy(weight=0.5),TripletLoss(weight=2.)
    loss = ReIDLoss(ce, tri, norm)
    tot = loss(out, pid, pid)
    torch.testing.assert_close(tot, 0.5*ce(out, pid)+2*tri(out, pid)+norm(out, pid, pid))
    assert list(loss.parts)==['ce','triplet','norm'] and not any(v.requires_grad for v in loss.parts.values())
    torch.testing.assert_close(loss.parts['triplet'], tri(out, pid))

def test_parts_of_twice_the_same_term():
    loss,(out,pid) = ReIDLoss(TripletLoss(), CrossEntropy(), TripletLoss(None)),batch()
    loss(out, pid)
    assert list(loss.parts)==['triplet1','ce','triplet2']

def test_terms_with_weights_of_their_own_are_trained():
    class Term(torch.nn.Linear):
        def forward(self, out, pid, camid): return super().forward(out.feat).mean()
    term = Term(8, 1, bias=False)
    term.name,loss = 'own',ReIDLoss(CrossEntropy(), term)
    assert list(loss.parameters())==[term.weight]

def test_bad_batches():
    loss,(out,pid) = ReIDLoss(CrossEntropy()),batch()
    with pytest.raises(ValueError, match='distractors'): loss(out, torch.where(pid==0, -1, pid))
    with pytest.raises(ValueError, match='training mode'): loss(out.emb, pid)
    with pytest.raises(ValueError, match='empty'): loss(ReIDOut(o[:0] for o in out), pid[:0])
    with pytest.raises(ValueError, match='12 images'): loss(out, pid[:5])

def test_a_class_the_head_does_not_have():
    out,pid = batch()
    with pytest.raises(ValueError, match='pid 9.* 4 identities'): CrossEntropy()(out, torch.where(pid==1, 9, pid))

@pytest.mark.parametrize('make,match', [(lambda: CrossEntropy(1.), 'eps'), (lambda: CrossEntropy(-0.1), 'eps'), (lambda: CrossEntropy(spread='x'), 'spread'),
    (lambda: TripletLoss(-1), 'margin'), (lambda: TripletLoss(dist='l1'), 'dist'), (lambda: TripletLoss(on='x'), 'on='), (lambda: ReIDLoss(), 'one term')])
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match): make()

def test_gradient_is_repeatable():
    "To the last bit, with several threads and a batch large enough to be shared among them"
    x,pid,n = torch.randn(64, 512),torch.arange(16).repeat_interleave(4),torch.get_num_threads()
    x[pid==0] += 20 # everybody's hardest positive is somebody's: sums of many terms
    torch.set_num_threads(4)
    try: grads = [torch.autograd.grad(batch_hard_triplet(o, pid), o)[0] for o in (x.clone().requires_grad_() for _ in range(30))]
    finally: torch.set_num_threads(n)
    assert all(torch.equal(o, grads[0]) for o in grads)
