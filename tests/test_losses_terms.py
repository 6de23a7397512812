"Every term of `ReIDLoss`: against loops, at the edges of what a batch may be, in memory, and without waiting for a device"
import io, math

import pytest, torch, torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastreid_nb.heads.core import ReIDOut, cosine_logits
from fastreid_nb.losses.core import CrossEntropy, LossTerm, ReIDLoss
from fastreid_nb.losses.focal import AdaptiveCrossEntropy, FocalCrossEntropy
from fastreid_nb.losses.margins import ArcFace, CircleSoftmax, CosFace, arcface_logits, circle_logits, cosface_logits
from fastreid_nb.losses.memory import CenterLoss, CentroidLoss, Centroids, FeatureQueue, QueueLoss
from fastreid_nb.losses.mixes import agw_loss, competition_loss, mgn_loss, sbs_loss
from fastreid_nb.losses.pairs import ContrastiveLoss, QuadrupletLoss, TripletLoss, batch_hard_triplet, pair_dist
from fastreid_nb.losses.similarity import PairwiseCircle, PairwiseCosFace, unified_loss

n_pids,n_feat = 6,8
makers = {
    'ce':CrossEntropy, 'ce skip zeros':lambda: CrossEntropy(0., skip_zeros=True), 'adaptive':AdaptiveCrossEntropy, 'focal':FocalCrossEntropy,
    'cosface':CosFace, 'arcface':ArcFace, 'circle':CircleSoftmax,
    'hard':TripletLoss, 'hard cosine':lambda: TripletLoss(None, 'cosine'), 'reused':lambda: TripletLoss(chosen_on='emb'),
    'weighted':lambda: TripletLoss(None, mining='weighted'), 'weighted cosine':lambda: TripletLoss(0.3, 'cosine', mining='weighted'),
    'weighted eps':lambda: TripletLoss(None, mining='weighted', eps=1e-6),
    'contrastive':ContrastiveLoss, 'contrastive euclidean':lambda: ContrastiveLoss(2., 'euclidean'),
    'quadruplet':QuadrupletLoss, 'quadruplet cosine':lambda: QuadrupletLoss(dist='cosine'),
    'pair cosface':PairwiseCosFace, 'pair circle':PairwiseCircle,
    'center':lambda: CenterLoss(n_pids, n_feat), 'queue':lambda: QueueLoss(n_feat, 64), 'queue circle':lambda: QueueLoss(n_feat, 64, circle=True),
    'centroid':lambda: CentroidLoss(n_pids, n_feat), 'centroid hardest':lambda: CentroidLoss(n_pids, n_feat, by='hardest')}
with_memory = [k for k in makers if k.split()[0] in ('center','queue','centroid')]
every = pytest.mark.parametrize('name', makers)
quiet = pytest.mark.filterwarnings('ignore:all .* images of a batch')

def batch(pid=None, seed=0, scale=1., device='cpu', dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    pid = torch.arange(n_pids).repeat_interleave(3)[torch.randperm(3*n_pids, generator=g)] if pid is None else torch.tensor(pid)
    feat,emb = torch.randn(2, len(pid), n_feat, generator=g)*scale
    logits = cosine_logits(emb, torch.randn(n_pids, n_feat, generator=g))
    return ReIDOut(o.to(device, dtype).requires_grad_() for o in (logits,feat,emb)),pid.to(device)

## Against loops

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('margin,scale', [(0.,1.), (0.35,64.), (0.5,30.)])
@pytest.mark.parametrize('f', [cosface_logits, arcface_logits, circle_logits])
def test_margins_against_a_loop(f, margin, scale, seed):
    cos,pid = batch(seed=seed, dtype=torch.float64)[0].logits,torch.randint(-1, n_pids, (18,), generator=torch.Generator().manual_seed(seed))
    def one(c, right):
        if f is cosface_logits: return scale*(c-margin if right else c)
        if f is arcface_logits: return scale*math.cos(math.acos(c)+margin) if right else scale*c
        return scale*max(0, 1+margin-c)*(c-1+margin) if right else scale*max(0, c+margin)*(c-margin)
    want = torch.tensor([[one(c, k==y) for k,c in enumerate(row)] for row,y in zip(cos.tolist(), pid.tolist())], dtype=torch.float64)
    torch.testing.assert_close(f(cos, pid, margin, scale), want)

@pytest.mark.parametrize('f', [cosface_logits, arcface_logits])
def test_gradient_of_margins(f):
    out,pid = batch(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: f(c, pid, 0.3, 10.), 0.9*out.logits.detach().requires_grad_())

def test_cosines_of_exactly_one():
    for c in (1., -1., 1+1e-7, 1-1e-7, 0.):
        cos,pid = torch.full((2,3), c, requires_grad=True),torch.tensor([0,2])
        z = arcface_logits(cos, pid, 0.5, 64.)
        z.sum().backward()
        assert z.isfinite().all() and cos.grad.isfinite().all()
        assert abs(z[0,0].item()-64*math.cos(math.acos(max(-1, min(1, c)))+0.5))<0.05

def dists(x, dist):
    x = x.double()
    if dist!='euclidean': x = x/x.norm(dim=1, keepdim=True)
    d = torch.stack([(o-x).norm(dim=1) for o in x])
    return d**2 if dist=='cosine' else d

@pytest.mark.parametrize('pid', [None, [0,0,1,1,2], [0,1,2,3], [0,0,0], [3,3,5,5,5]])
@pytest.mark.parametrize('dist', ['euclidean','cosine'])
@quiet
def test_quadruplet_against_a_loop(pid, dist):
    out,pid = batch(pid)
    d,rows,tot = dists(out.feat.detach(), dist),range(len(pid)),0.
    for a in rows:
        ap = max(d[a,j] for j in rows if pid[j]==pid[a])
        an = [d[a,j] for j in rows if pid[j]!=pid[a]]
        lk = [d[l,k] for l in rows for k in rows if len({pid[o].item() for o in (a,l,k)})==3]
        tot += (max(0, ap-min(an)+2) if an else 0) + (max(0, ap-min(lk)+1) if lk else 0)
    assert abs(QuadrupletLoss(2., 1., dist)(out, pid).item()-float(tot)/len(pid))<1e-4

@pytest.mark.parametrize('pid', [None, [0,0,1,1,2], [0,1,2,3], [0,0,0], [0]])
@pytest.mark.parametrize('dist', ['euclidean','cosine'])
@quiet
def test_contrastive_against_a_loop(pid, dist):
    out,pid = batch(pid)
    d,margin = dists(out.feat.detach(), 'unit' if dist=='cosine' else dist),1.5 if dist=='cosine' else 3.
    pairs = [(i, j) for i in range(len(pid)) for j in range(i)]
    pull,push = [d[i,j]**2 for i,j in pairs if pid[i]==pid[j]],[max(0., margin-d[i,j])**2 for i,j in pairs if pid[i]!=pid[j]]
    want = sum(pull)/max(1, len(pull))/2 + sum(push)/max(1, len(push))/2
    assert abs(ContrastiveLoss(margin, dist)(out, pid).item()-float(want))<1e-4

@pytest.mark.parametrize('circle', [False,True])
@pytest.mark.parametrize('gamma', [1.,16.])
def test_unified_against_a_double_loop(circle, gamma):
    g = torch.Generator().manual_seed(3)
    sim,kind = torch.rand(5, 7, generator=g).double()*2-1,torch.randint(3, (5,7), generator=g)
    def p(s): return -gamma*(max(0, 1.25-s)*(s-0.75) if circle else s)
    def n(s): return gamma*(max(0, s+0.25)*(s-0.25) if circle else s+0.25)
    tot = [math.log1p(sum(math.exp(p(a)+n(b)) for a,i in zip(row, k) if i==0 for b,j in zip(row, k) if j==1))
        for row,k in zip(sim.tolist(), kind.tolist())]
    got = unified_loss(sim, kind==0, kind==1, 0.25, gamma, circle)
    assert abs(got.item()-sum(tot)/5)<1e-9

def test_triplet_is_the_limit():
    out,pid = batch()
    gaps = [(PairwiseCosFace(0.25, g)(out, pid)/g*2-TripletLoss(0.5, 'cosine')(out, pid)).abs().item() for g in (16,256,4096)]
    assert gaps[0]>gaps[1]>gaps[2] and gaps[2]<1e-3

def test_pair_dist():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pair_dist, x, atol=1e-6)
    same = x[:1].detach().repeat(3, 1).requires_grad_()
    pair_dist(same).sum().backward()
    assert same.grad.abs().max()<1e-6
    near = torch.randn(1, 512)*20+torch.randn(4, 512)*1e-3
    torch.testing.assert_close(pair_dist(near), torch.cdist(near.double(), near.double()).float(), rtol=1e-5, atol=1e-5)

## Memories

def test_ring():
    queue,past = FeatureQueue(3, 10),[]
    for step in range(7):
        x,pid = torch.randn(4, 3),torch.arange(4)+10*step
        at = queue.add(x, pid)
        torch.testing.assert_close(queue.feats[at], F.normalize(x))
        past += pid.tolist()
        assert sorted(o for o in queue.pids.tolist() if o>=0)==sorted(past[-10:])

def test_more_features_than_places():
    queue = FeatureQueue(3, 5)
    queue.add(torch.randn(8, 3), torch.arange(8))
    assert sorted(queue.pids.tolist())==[3,4,5,6,7]

def test_an_image_is_not_compared_with_itself():
    x,pid,term = torch.eye(8)[:4],torch.arange(4),QueueLoss(8, 32, gamma=1.)
    for step in range(3): val = term(ReIDOut(None, x, x), pid+4*step)
    assert val==0   # no image of the same person in the queue, so nothing to compare
    faulty = QueueLoss(8, 32, gamma=1., skip='first')
    for step in range(3): val = faulty(ReIDOut(None, x, x), pid+4*step)
    assert val>0.1   # itself as its only positive

@pytest.mark.parametrize('circle', [False,True])
def test_empty_places_are_nobody(circle):
    out,pid = batch()
    x,same = F.normalize(out.emb),pid[:,None]==pid
    alone = unified_loss(x@x.T, same.clone().fill_diagonal_(False), ~same, 0.25, 32., circle)
    torch.testing.assert_close(QueueLoss(n_feat, 500, circle=circle)(out, pid), alone)

def test_gradients_survive_the_next_batch():
    "Two forward passes before a backward pass, as when gradients are accumulated"
    for name in ('queue','centroid'):
        term,(a,pid),(b,_) = makers[name](),batch(seed=1),batch(seed=2)
        term(b, pid)
        first = term(a, pid)
        term(b, pid)
        first.backward()
        assert a.emb.grad.isfinite().all() and a.emb.grad.abs().sum()>0

@pytest.mark.parametrize('by', ['mean','hardest'])
def test_centroids_against_a_loop(by):
    memory,(out,pid) = Centroids(n_pids, n_feat, 0.3, by),batch()
    x = F.normalize(out.emb.detach())
    memory.start(torch.randn(12, n_feat), torch.arange(12)%n_pids)
    old = memory.vecs.clone()
    memory.move(out.emb, pid)
    for k in range(n_pids):
        mine = x[pid==k]
        goal = mine.mean(0) if by=='mean' else mine[(mine@old[k]).argmin()]
        torch.testing.assert_close(memory.vecs[k], F.normalize(0.3*old[k]+0.7*goal, dim=0))

def test_unseen_centroids_take_no_part():
    term,x = CentroidLoss(100, 4),torch.randn(2, 4)
    term.memory.start(x, torch.tensor([0,1]))
    some = term.loss(x, torch.tensor([0,1]))
    few = CentroidLoss(2, 4)
    few.memory.start(x, torch.tensor([0,1]))
    torch.testing.assert_close(some, few.loss(x, torch.tensor([0,1])))

@pytest.mark.parametrize('name', with_memory)
def test_saved_and_resumed(name):
    loss,(out,pid) = ReIDLoss(CrossEntropy(), makers[name]()),batch()
    for p in loss.parameters(): torch.nn.init.normal_(p)
    loss(out, pid)
    torch.save(loss.state_dict(), file := io.BytesIO())
    file.seek(0)
    again = ReIDLoss(CrossEntropy(), makers[name]())
    again.load_state_dict(torch.load(file, weights_only=True))
    more,_ = batch(pid.tolist(), seed=5)
    assert again(more, pid)==loss(more, pid)

def test_centers_are_trained():
    loss,(out,pid) = ReIDLoss(CrossEntropy(), CenterLoss(n_pids, n_feat, weight=1.)),batch()
    assert [tuple(o.shape) for o in loss.parameters()]==[(n_pids,n_feat)]
    loss(out, pid).backward()
    want = torch.stack([-out.feat.detach()[pid==k].sum(0)/len(pid) for k in range(n_pids)])
    torch.testing.assert_close(loss['center'].centers.grad, want)

## Any term, any batch

@every
@quiet
@pytest.mark.parametrize('rows', ['same','zero','twins','huge'])
@pytest.mark.parametrize('pid', [None, [0,0,0], [2], [0,1,2,3]])
def test_finite(name, rows, pid):
    out,pid = batch(pid)
    feat = out.feat.detach()
    if rows=='same': feat = feat[:1].repeat(len(feat), 1)
    if rows=='zero': feat = feat*0
    if rows=='twins': feat = torch.cat([feat[:1], feat[:-1]])
    if rows=='huge': feat = feat*1e4
    x = feat.clone().requires_grad_()
    term = makers[name]()
    for _ in range(2):
        val = term(ReIDOut(out.logits, x, x), pid)
        val.backward()
    assert val.isfinite() and val>=0 and val.ndim==0
    assert all(o.grad is None or o.grad.isfinite().all() for o in (out.logits,x))

@every
def test_bad_batches(name):
    out,pid = batch()
    term = makers[name]()
    with pytest.raises(ValueError, match='distractors'): term(out, torch.where(pid==0, -1, pid))
    with pytest.raises(ValueError, match='training mode'): term(out.emb, pid)
    with pytest.raises(ValueError, match='empty'): term(ReIDOut(o[:0] for o in out), pid[:0])
    with pytest.raises(ValueError, match='18 images'): term(out, pid[:5])
    with pytest.raises(ValueError, match='float32'): term(out, pid.float())

@pytest.mark.parametrize('name', ['ce','adaptive','focal','cosface','arcface','circle','center','centroid'])
def test_a_label_outside(name):
    out,pid = batch()
    with pytest.raises(ValueError, match='pid 9.* 6 identities'): makers[name]()(out, torch.where(pid==1, 9, pid))

@pytest.mark.parametrize('name', ['hard','weighted','contrastive','quadruplet','pair cosface','pair circle'])
def test_one_identity_is_said(name):
    out,pid = batch([4,4,4])
    with pytest.warns(UserWarning, match="one identity: no negative for"): makers[name]()(out, pid)

@pytest.mark.parametrize('name', ['hard','weighted','contrastive','quadruplet'])
def test_nobody_twice_is_said(name):
    out,pid = batch([0,1,2])
    with pytest.warns(UserWarning, match='different identities: no positive for'): makers[name]()(out, pid)

@pytest.mark.parametrize('make', [lambda: TripletLoss(5, 'cosine'), lambda: ContrastiveLoss(2.5), lambda: QuadrupletLoss(4.5, 1, 'cosine')])
def test_margins_that_no_distance_reaches(make):
    with pytest.raises(ValueError, match='margin=.*: expected 0 to [24]'): make()

@pytest.mark.parametrize('make', [lambda: CenterLoss(18, 1), lambda: CenterLoss(18, 5), lambda: QueueLoss(5, 16), lambda: CentroidLoss(18, 5)])
def test_memories_of_another_width(make):
    out,pid = batch()
    with pytest.raises(ValueError, match='made for n_feat=., and the model gives'): make()(out, pid)

@pytest.mark.parametrize('name', ['ce','hard','queue','centroid','center'])
def test_labels_of_32_bits(name):
    out,pid = batch()
    assert makers[name]()(out, pid.int())==makers[name]()(out, pid)

def test_a_bad_row_does_not_stay():
    "One feature that is not finite, then a clean batch: memories are as if the row had not been"
    out,pid = batch()
    bad = out._replace(emb=out.emb.detach().clone())
    bad.emb[0,0] = torch.nan
    queue,centroid = QueueLoss(out.emb.shape[1], 64),CentroidLoss(9, out.emb.shape[1])
    assert not queue(bad, pid).isfinite()
    assert queue.queue.pids[0]==-1 and torch.equal(queue.queue.pids[1:len(pid)], pid[1:])
    centroid.memory.move(out.emb.detach(), pid)
    alone = CentroidLoss(9, out.emb.shape[1])
    alone.load_state_dict(centroid.state_dict())
    centroid.memory.move(bad.emb, pid)
    alone.memory.move(bad.emb[1:], pid[1:])
    assert torch.allclose(centroid.memory.vecs, alone.memory.vecs) and centroid.memory.vecs.isfinite().all()
    assert queue(out, pid).isfinite() and centroid(out, pid).isfinite()

@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_least_32_bits(name, dtype):
    out,pid = batch(dtype=dtype)
    term = makers[name]().to(dtype if dtype==torch.float64 else torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16): val = term(out, pid)
    assert val.dtype==(torch.float64 if dtype==torch.float64 else torch.float32)
    plain = makers[name]().to(term.centers.dtype if name=='center' else val.dtype)
    torch.testing.assert_close(plain(ReIDOut(o.detach() for o in out), pid), val.detach())

@every
def test_parts_are_averaged(name):
    (a,pid),(b,_) = batch(seed=1),batch(torch.arange(n_pids).repeat_interleave(3).tolist(), seed=2)
    both = ReIDOut([x, y] for x,y in zip(a, b))
    if name in with_memory:
        with pytest.raises(ValueError, match='2 parts'): makers[name]()(both, pid)
    else: torch.testing.assert_close(makers[name]()(both, pid), (makers[name]()(a, pid)+makers[name]()(b, pid))/2)

@every
def test_never_waits_for_a_device(name):
    "The `meta` device has no numbers that could be read back"
    out,pid = batch()
    out = ReIDOut(o.detach().to('meta').requires_grad_() for o in out)
    val = makers[name]().to('meta')(out, pid.to('meta'))
    val.backward()
    assert val.device.type=='meta'

class Largest(TorchDispatchMode):
    "Keeps the number of values in the largest tensor that any operation makes"
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        res = f(*args, **(kwargs or {}))
        self.n = max([self.n, *(o.numel() for o in tree_leaves(res) if isinstance(o, torch.Tensor))])
        return res

@every
def test_memory_stays_small(name):
    "Nothing of size B×B×D; the batch is large enough that B×B is more than anything that is meant to be"
    b,d = 96,64
    pid,x = torch.arange(n_pids).repeat(b//n_pids),torch.randn(b, d, requires_grad=True)
    logits = cosine_logits(x, torch.randn(n_pids, d))
    term = {'center':lambda: CenterLoss(n_pids, d), 'queue':lambda: QueueLoss(d, b), 'centroid':lambda: CentroidLoss(n_pids, d)}.get(name.split()[0], makers[name])()
    with Largest() as seen: term(ReIDOut(logits, x, x), pid).backward()
    assert seen.n<=2*b*b

def test_the_measure_of_memory_sees_a_large_tensor():
    x = torch.randn(96, 64)
    with Largest() as seen: (x[:,None]-x).norm(dim=2)
    assert seen.n==96*96*64

@pytest.mark.parametrize('make,match', [
    (lambda: CosFace(1.5), 'margin=1.5'), (lambda: CosFace(-.1), 'margin'), (lambda: ArcFace(2.), 'margin=2'), (lambda: ArcFace(math.nan), 'margin=nan'),
    (lambda: CircleSoftmax(2), 'margin=2'), (lambda: CircleSoftmax(scale=0), 'scale=0'), (lambda: CosFace(scale=-1), 'scale=-1'),
    (lambda: TripletLoss('0.3'), "margin='0.3'"), (lambda: TripletLoss(mining='semi'), "mining='semi'"), (lambda: TripletLoss(eps=-1), 'eps=-1'),
    (lambda: TripletLoss(mining='weighted', chosen_on='emb'), 'nothing to choose'), (lambda: TripletLoss(weight=-1), 'weight=-1'),
    (lambda: ContrastiveLoss(-1), 'margin=-1'), (lambda: QuadrupletLoss(margin2=-1), 'margin2=-1'), (lambda: PairwiseCircle(1.1), 'margin=1.1'),
    (lambda: PairwiseCosFace(gamma=0), 'gamma=0'), (lambda: QueueLoss(8, 0), 'size=0'), (lambda: QueueLoss(8, skip='x'), 'skip='),
    (lambda: CentroidLoss(0, 8), 'n=0'), (lambda: CentroidLoss(3, 8, momentum=1), 'never move'), (lambda: CenterLoss(3.5, 8), 'n_pids=3.5'),
    (lambda: FocalCrossEntropy(gamma=-1), 'gamma=-1'), (lambda: AdaptiveCrossEntropy(1.), 'eps'), (lambda: competition_loss(identity=1.1), 'identity=1.1')])
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match): make()

def test_a_head_without_cosines():
    out,pid = batch()
    for term in (CosFace(), ArcFace(), CircleSoftmax()):
        with pytest.raises(ValueError, match='cosine=True'): term(out._replace(logits=20*out.logits), pid)

def test_the_term_that_is_no_number():
    def broken(out, pid, camid): return out.feat.sum()*torch.nan
    loss,(out,pid) = ReIDLoss(CrossEntropy(), TripletLoss(), broken),batch()
    assert loss(out, pid).isnan() and loss.bad_terms()==['broken']
    assert ReIDLoss(CrossEntropy()).bad_terms()==[]

def test_terms_by_name():
    loss,(out,pid) = ReIDLoss(TripletLoss(), CrossEntropy(), TripletLoss(None)),batch()
    assert [loss[o] for o in loss.names]==list(loss.terms) and loss['triplet2'].margin is None
    with pytest.raises(KeyError, match='triplet1'): loss['triplet']
    before = loss(out, pid)
    loss['triplet1'].margin = 5.
    assert loss(out, pid)>before

@pytest.mark.parametrize('name', ['cosface','arcface','circle','hard','weighted cosine','contrastive','quadruplet','pair cosface','pair circle','queue'])
def test_margins_are_plain_numbers(name):
    term,(out,pid) = makers[name](),batch()
    assert isinstance(term.margin, float)
    term.margin = 0.1
    low = term(out, pid)
    term.margin = 0.9
    if name=='queue': term.queue = QueueLoss(n_feat, 64).queue
    high = term(out, pid)
    assert high<low if 'circle' in name else high>low   # Circle's margin is a relaxation

def test_a_term_without_a_loss():
    with pytest.raises(NotImplementedError, match='loss'): LossTerm()(*batch())

## Mixes

@pytest.mark.parametrize('make', [sbs_loss, agw_loss, mgn_loss, competition_loss])
def test_mixes(make):
    out,pid = batch()
    loss = make()
    val = loss(out, pid)
    val.backward()
    assert val.isfinite() and len(loss.names)==2 and 'triplet' in loss.names

def test_competition_by_its_formula():
    out,pid = batch(torch.arange(6).repeat(3).tolist())
    d = dists(out.emb.detach(), 'cosine')
    same = pid[:,None]==pid
    pos,neg = d.masked_fill(~same, -1).argmax(1),d.masked_fill(same, 9).argmin(1)   # chosen on the embedding
    f = dists(out.feat.detach(), 'cosine')                                          # compared on the feature
    rows = torch.arange(len(pid))
    pull = (f[rows,pos]-f[rows,neg]+0.3).clamp(min=0).mean()
    want = 0.1*F.cross_entropy(out.logits, pid, label_smoothing=0.1)+0.9*pull
    assert abs(competition_loss()(out, pid).item()-want.item())<1e-5

@pytest.mark.parametrize('dist', ['euclidean','cosine'])
def test_parts_of_another_number_choose_together(dist):
    "Eight embeddings choose the pairs of five features, as in MGN, and only features have a gradient"
    outs,pid = [batch(torch.arange(6).repeat(3).tolist(), seed=o)[0] for o in range(8)],torch.arange(6).repeat(3)
    feats,embs = [o.feat.detach().requires_grad_() for o in outs[:5]],[o.emb.detach().requires_grad_() for o in outs]
    val = TripletLoss(0.3, dist, chosen_on='emb')(ReIDOut([o.logits for o in outs], feats, embs), pid)
    want = torch.stack([batch_hard_triplet(o, pid, 0.3, dist, torch.cat(embs, 1)) for o in feats]).mean()
    assert torch.allclose(val, want)
    val.backward()
    assert all(o.grad.abs().sum()>0 for o in feats) and not any(o.grad is not None for o in embs)

def test_weights_of_mgn():
    outs,pid = [batch(torch.arange(6).repeat(3).tolist(), seed=o)[0] for o in range(8)],torch.arange(6).repeat(3)
    many = ReIDOut([o.logits for o in outs], [o.feat for o in outs[:5]], [o.emb for o in outs])
    loss = mgn_loss()
    heads,feats = [loss['circle'](o, pid) for o in outs],[loss['triplet'](o, pid) for o in outs[:5]]
    torch.testing.assert_close(loss(many, pid), 0.125*sum(heads)+0.2*sum(feats))
