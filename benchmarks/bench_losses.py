"Time of every loss, forward and backward at 1,024 × 512 and 10,000 classes, over a straightforward implementation (worst ratio, bar 1.1)"
import statistics as st, time, torch, torch.nn.functional as F
from functools import partial
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastreid_nb.heads.core import ReIDOut, cosine_logits
from fastreid_nb.losses.core import CrossEntropy
from fastreid_nb.losses.focal import AdaptiveCrossEntropy, FocalCrossEntropy
from fastreid_nb.losses.margins import ArcFace, CircleSoftmax, CosFace
from fastreid_nb.losses.memory import CenterLoss, CentroidLoss, QueueLoss
from fastreid_nb.losses.pairs import ContrastiveLoss, QuadrupletLoss, TripletLoss
from fastreid_nb.losses.similarity import PairwiseCircle, PairwiseCosFace

b,d,n,k,size = 1024,512,10_000,4,8192 # Images, values, classes, images of an identity, places in the queue

## The straightforward implementations: formulas as they stand, on full matrices, as fast-reid and torch's users write them

def smoothed(z, pid): return F.cross_entropy(z, pid, label_smoothing=0.1)
def adaptive(z, pid):
    logp = F.log_softmax(z, 1)
    with torch.no_grad():
        eps = 0.2*F.softmax(z, 1).gather(1, pid[:,None])
        q = (eps/z.shape[1]).expand_as(z).clone()
        q.scatter_add_(1, pid[:,None], 1-eps)
    return (-q*logp).sum(1).mean()
def focal(z, pid):
    nll = F.cross_entropy(z, pid, reduction='none')
    return (0.25*(1-(-nll).exp())**2*nll).mean()

def cosface(z, pid):
    hot = torch.zeros_like(z).scatter_(1, pid[:,None], 0.35)
    return smoothed((z-hot)*64, pid)
def arcface(z, pid):
    rows = torch.arange(len(z))
    moved = z.clone()
    moved[rows,pid] = (z[rows,pid].clamp(-1+1e-7, 1-1e-7).acos()+0.5).cos()
    return smoothed(moved*64, pid)
def circle(z, pid):
    a_p,a_n = F.relu(1.35-z.detach()),F.relu(z.detach()+0.35)
    hot = F.one_hot(pid, z.shape[1])
    return smoothed(64*(hot*a_p*(z-0.65) + (1-hot)*a_n*(z-0.35)), pid)

def euclidean(x):
    sq = x.pow(2).sum(1, keepdim=True)
    return (sq+sq.T-2*x@x.T).clamp(min=1e-12).sqrt()
def cosine(x):
    x = F.normalize(x)
    return 2-2*x@x.T
def masks(pid): return (same := (pid[:,None]==pid).float()),1-same
def triplet(dist, x, pid):
    d,(pos,neg) = dist(x),masks(pid)
    return F.relu((d*pos).amax(1)-(d*neg+pos*1e9).amin(1)+0.3).mean()
def weighted(dist, x, pid):
    d,(pos,neg) = dist(x),masks(pid)
    def weights(d, mask):
        e = (d-(d*mask).amax(1, keepdim=True)).exp()*mask
        return e/(e.sum(1, keepdim=True)+1e-6)
    return F.softplus((weights(d*pos, pos)*d*pos).sum(1)-(weights(-d*neg, neg)*d*neg).sum(1)).mean()
def contrastive(x, pid):
    d,(pos,neg) = euclidean(F.normalize(x)),masks(pid)
    pos = pos-torch.eye(len(x))
    return ((d.pow(2)*pos).sum()/pos.sum() + (F.relu(1-d).pow(2)*neg).sum()/neg.sum())/2
def quadruplet(x, pid):
    d,(pos,neg) = euclidean(x),masks(pid)
    ap,an = (d*pos).amax(1),(d*neg+pos*1e9).amin(1)
    far = d.detach()+pos*1e9
    nearest = {}
    for p in pid.unique():
        out = (pid==p).float()*1e9
        nearest[p.item()] = (far+out+out[:,None]).argmin()
    lk = d.flatten()[torch.stack([nearest[p] for p in pid.tolist()])]
    return F.relu(ap-an+0.3).mean()+F.relu(ap-lk+0.15).mean()

def log_sums(p, q, pos, neg): return F.softplus(torch.logsumexp(p-99999999.*(1-pos), 1)+torch.logsumexp(q-99999999.*(1-neg), 1)).mean()
def pairwise(is_circle, x, pid):
    x,(pos,neg) = F.normalize(x),masks(pid)
    s,pos = x@x.T,pos-torch.eye(len(x))
    if not is_circle: return log_sums(-128*s, 128*(s+0.25), pos, neg)
    a_p,a_n = F.relu(1.25-s.detach()),F.relu(s.detach()+0.25)
    return log_sums(-128*a_p*(s-0.75), 128*a_n*(s-0.25), pos, neg)

def center(x, pid, centers): return (x-centers[pid]).pow(2).sum(1).mean()/2

class PlainQueue:
    "MoCo's queue, written as there"
    def __init__(self): self.feats,self.pids,self.at = F.normalize(torch.randn(d, size), dim=0),torch.randint(n, (size,)),0
    def __call__(self, x, pid):
        x = F.normalize(x)
        self.feats[:,self.at:self.at+len(x)],self.pids[self.at:self.at+len(x)] = x.detach().T,pid
        pos = (pid[:,None]==self.pids).float()
        neg = 1-pos
        pos[:,self.at:self.at+len(x)] -= torch.eye(len(x))
        self.at = (self.at+len(x))%size
        s = x@self.feats.clone().detach()
        return log_sums(-32*s, 32*(s+0.25), pos, neg)

class PlainCentroids:
    "Cluster Contrast's memory: one image after the other"
    def __init__(self): self.vecs = F.normalize(torch.randn(n, d))
    def __call__(self, x, pid):
        x = F.normalize(x)
        loss = F.cross_entropy(x@self.vecs.clone().T/0.05, pid)
        for o,p in zip(x.detach(), pid.tolist()): self.vecs[p] = F.normalize(0.2*self.vecs[p]+0.8*o, dim=0)
        return loss

## Ours beside them

def contestants():
    "Name to (ours, straightforward, on logits?)"
    queue,centroids,centers = QueueLoss(d, size),CentroidLoss(n, d),CenterLoss(n, d)
    plain_queue,plain_centroids = PlainQueue(),PlainCentroids()
    queue.queue.feats.copy_(plain_queue.feats.T)
    queue.queue.pids.copy_(plain_queue.pids)
    centroids.memory.start(plain_centroids.vecs, torch.arange(n))
    plain_centers = torch.zeros(n, d, requires_grad=True)
    return {
        'cross entropy':(CrossEntropy(), smoothed, True), 'adaptive':(AdaptiveCrossEntropy(), adaptive, True), 'focal':(FocalCrossEntropy(), focal, True),
        'CosFace':(CosFace(), cosface, True), 'ArcFace':(ArcFace(), arcface, True), 'Circle':(CircleSoftmax(), circle, True),
        'hard triplet':(TripletLoss(), partial(triplet, euclidean), False), 'hard triplet, cosine':(TripletLoss(dist='cosine'), partial(triplet, cosine), False),
        'weighted triplet':(TripletLoss(None, mining='weighted'), partial(weighted, euclidean), False),
        'weighted triplet, cosine':(TripletLoss(None, 'cosine', mining='weighted'), partial(weighted, cosine), False),
        'contrastive':(ContrastiveLoss(), contrastive, False), 'quadruplet':(QuadrupletLoss(), quadruplet, False),
        'pairwise CosFace':(PairwiseCosFace(), partial(pairwise, False), False), 'pairwise Circle':(PairwiseCircle(), partial(pairwise, True), False),
        'center':(centers, partial(center, centers=plain_centers), False), 'queue':(queue, plain_queue, False),
        'centroids':(centroids, plain_centroids, False)}

class Largest(TorchDispatchMode):
    "Keeps the number of values in the largest tensor that any operation makes"
    n = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        res = f(*args, **(kwargs or {}))
        self.n = max([self.n, *(o.numel() for o in tree_leaves(res) if isinstance(o, torch.Tensor))])
        return res

def seconds(run, leaf):
    "Of one forward and backward pass"
    leaf.grad,start = None,time.perf_counter()
    run().backward()
    return time.perf_counter()-start

def main(
    seeds:int=1, # Times 9 rounds
)->dict: # value: the worst median ratio ours/straightforward
    "Both in turn, on one thread; medians of the ratios of neighbours"
    torch.manual_seed(0)
    torch.set_num_threads(1) # a second one waits for whatever else runs on the machine
    pid = torch.arange(b//k).repeat_interleave(k)*(n//(b//k))
    x = torch.randn(b, d, requires_grad=True)
    z = cosine_logits(x, torch.randn(n, d)).detach().requires_grad_()
    ratios,largest = {},{}
    for name,(ours,plain,on_logits) in contestants().items():
        out,leaf = ReIDOut(z, x, x),z if on_logits else x
        def us(): return ours(out, pid)
        def them(): return plain(leaf, pid)
        with Largest() as seen: us().backward()
        them().backward()
        times = [(seconds(us, leaf), seconds(them, leaf)) for _ in range(9*seeds)]
        ratios[name],largest[name] = st.median(a/c for a,c in times),seen.n
        a,c = (st.median(o)*1e3 for o in zip(*times))
        print(f'{name}: ours {a:.0f} ms, straightforward {c:.0f} ms, ratio {ratios[name]:.2f}, largest tensor {seen.n/1e6:.1f} M values', flush=True)
    worst = max(ratios, key=ratios.get)
    small = max(largest.values())<=max(b*n, b*size, n*d) # B×B×D would be 537 M
    print(f'worst: {worst} {ratios[worst]:.2f}, {torch.get_num_threads()} threads; no tensor of B×B×D: {small}')
    return dict(value=ratios[worst], bar=1.1, ok=ratios[worst]<=1.1 and small)
