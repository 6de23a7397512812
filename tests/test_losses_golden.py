"Losses against the reference implementation: every array of its golden files, values and gradients"
import re

import numpy as np, pytest, torch

from fastreid_nb.heads.core import ReIDOut, cosine_logits
from fastreid_nb.losses.core import CrossEntropy
from fastreid_nb.losses.focal import AdaptiveCrossEntropy, FocalCrossEntropy, focal_rows
from fastreid_nb.losses.margins import arcface_logits, circle_logits, cosface_logits
from fastreid_nb.losses.memory import QueueLoss
from fastreid_nb.losses.pairs import TripletLoss, hard_dists, pair_dist, unit_rows, weighted_dists
from fastreid_nb.losses.similarity import PairwiseCircle, PairwiseCosFace
from golden_files import close, golden_files, golden_params, missing

tested = {} # pattern of files to the regular expressions of keys that a test below reads

def keys(pattern, rx):
    "Every (file, key) of the golden files whose key matches `rx` completely"
    tested.setdefault(pattern, []).append(rx)
    res = [pytest.param(p, k, id=f'{p.stem}-{k}') for p in golden_files(pattern) for k in np.load(p).files if re.fullmatch(rx, k)]
    return res or [pytest.param(None, None, id=f'no {pattern}')]

def out_of(x=None, logits=None): return ReIDOut(logits, x, x)

def read(path, pattern):
    if path is None: missing(pattern)
    return np.load(path)

def best(z, key): return z[f'{key}_f64'] if f'{key}_f64' in z.files else z[key]
def leaf(a): return torch.tensor(a, requires_grad=True)
def labels(a): return torch.tensor(a).long()

## losses_classification

@pytest.mark.parametrize('path', golden_params('losses_classification*.npz'))
def test_top1(path):
    z = read(path, 'losses_classification*.npz')
    close((torch.tensor(z['logits']).argmax(1)==labels(z['targets'])).double().mean(), z['cls_accuracy_top1'])

@pytest.mark.parametrize('path,key', keys('losses_classification*.npz', r'ce_eps(-?[\d.]+)(_alpha[\d.]+)?'))
def test_cross_entropy(path, key):
    z = read(path, 'losses_classification*.npz')
    eps,alpha = re.fullmatch(r'ce_eps(-?[\d.]+)(?:_alpha([\d.]+))?', key).groups()
    loss = AdaptiveCrossEntropy(float(alpha), 'others') if float(eps)<0 else CrossEntropy(float(eps), 'others')
    logits = leaf(z['logits'])
    val = loss(out_of(logits=logits), labels(z['targets']))
    val.backward()
    close(val, best(z, key))
    close(logits.grad, z[f'{key}_grad_logits'])

@pytest.mark.parametrize('path', golden_params('losses_classification*.npz'))
def test_adaptive_in_double(path):
    z = read(path, 'losses_classification*.npz')
    close(AdaptiveCrossEntropy(0.2, 'others')(out_of(logits=torch.tensor(z['logits']).double()), labels(z['targets'])), z['ce_eps-1_f64'])

@pytest.mark.parametrize('path,key', keys('losses_classification*.npz', r'ce_zero_rows_eps[\d.]+'))
def test_rows_of_loss_zero(path, key):
    z = read(path, 'losses_classification*.npz')
    logits,pid,eps = leaf(z['logits_zero_rows']),labels(z['targets_zero_rows']),float(key.rpartition('eps')[2])
    val = CrossEntropy(eps, 'others', skip_zeros=True)(out_of(logits=logits), pid)
    val.backward()
    close(val, z[key])
    if f'{key}_grad_logits' in z.files: close(logits.grad, z[f'{key}_grad_logits'])
    if eps==0: assert abs(CrossEntropy(0., 'others')(out_of(logits=logits), pid)/val-1)>0.1

@pytest.mark.parametrize('path,key', keys('losses_classification*.npz', r'focal_alpha[\d.]+_gamma[\d.]+_(none|mean|sum)'))
def test_focal(path, key):
    z = read(path, 'losses_classification*.npz')
    alpha,gamma,kind = re.fullmatch(r'focal_alpha([\d.]+)_gamma([\d.]+)_(\w+)', key).groups()
    logits,pid = leaf(z['logits']),labels(z['targets'])
    rows = focal_rows(logits, pid, float(alpha), float(gamma))
    close(rows if kind=='none' else getattr(rows, kind)(), z[key])
    if kind!='mean': return
    val = FocalCrossEntropy(float(alpha), float(gamma))(out_of(logits=logits), pid)
    val.backward()
    close(val, z[key])
    close(logits.grad, z[f'{key}_grad_logits'])

## logit_layers

layers = dict(Linear=lambda z, pid, m, s: cosface_logits(z, pid, 0., s), CosSoftmax=cosface_logits, ArcSoftmax=arcface_logits,
    CircleSoftmax=circle_logits)
layer_key = r'([A-Z][A-Za-z]+)_s([\d.]+)_m([\d.]+)'

def layer_of(key):
    kind,s,m = re.match(layer_key, key.replace('_aligned', '')).groups()
    if kind not in layers: missing(f'margin layer {kind}')
    return kind,lambda z, pid: layers[kind](z, pid, float(m), float(s))

@pytest.mark.parametrize('path,key', keys('logit_layers*.npz', layer_key))
def test_logits(path, key):
    z = read(path, 'logit_layers*.npz')
    kind,f = layer_of(key)
    x,w = leaf(z['features']),leaf(z['weight'])
    stored = torch.tensor(z['plain_linear'] if kind=='Linear' else z['cosine'])
    close(f(stored, labels(z['targets'])), z[key])
    close(f(stored, labels(z['targets_with_minus1'])), z[f'{key}_ign'])
    logits = x@w.T if kind=='Linear' else cosine_logits(x, w)
    (f(logits, labels(z['targets']))*torch.tensor(z['grad_out'])).sum().backward()
    close(x.grad, z[f'{key}_grad_features'])
    close(w.grad, z[f'{key}_grad_weight'])

@pytest.mark.parametrize('path,key', keys('logit_layers*.npz', layer_key.replace('_s', '_aligned_s')))
def test_logits_of_aligned_features(path, key):
    "A cosine of 1: where the reference gives NaN ours gives the value at 1, with a finite gradient"
    z = read(path, 'logit_layers*.npz')
    cos,pid = leaf(z['cosine_aligned']),labels(z['targets'])
    got,want = layer_of(key)[1](cos, pid),torch.tensor(z[key])
    got.sum().backward()
    known = ~want.isnan()
    close(got[known], want[known])
    assert got.isfinite().all() and cos.grad.isfinite().all()
    at_one = layer_of(key)[1](cos.detach().clamp(max=1), pid)
    if not known.all(): close(got[~known], at_one[~known], tiny=1e-5)

## losses_metric

metric = r'(?!huge)[a-z]+_norm[01]_hard[01]_'

def triplet_of(key, eps=1e-6):
    norm,hard,margin = re.search(r'_norm([01])_hard([01])_margin([\d.]+)_loss', key).groups()
    mining = 'hard' if hard=='1' else 'weighted'
    return TripletLoss(float(margin) or None, 'cosine' if norm=='1' else 'euclidean', mining=mining, eps=eps)

@pytest.mark.parametrize('path,key', keys('losses_metric*.npz', metric+r'margin[\d.]+_loss'))
@pytest.mark.filterwarnings('ignore:all .* images of the batch')
def test_triplet(path, key):
    z,name = read(path, 'losses_metric*.npz'),key.partition('_')[0]
    x = leaf(z[f'{name}_embedding'])
    val = triplet_of(key)(out_of(x), labels(z[f'{name}_targets']))
    val.backward()
    close(val, best(z, key), tiny=2e-7)   # a difference of distances around 1, in float32
    close(x.grad, best(z, key.replace('_loss', '_grad')))

@pytest.mark.parametrize('path,key', keys('losses_metric*.npz', metric+'dist_a[pn]'))
def test_chosen_distances(path, key):
    z,name = read(path, 'losses_metric*.npz'),key.partition('_')[0]
    norm,hard = '_norm1' in key,'_hard1' in key
    x,pid = unit_rows(torch.tensor(z[f'{name}_embedding']), 'cosine' if norm else 'euclidean'),labels(z[f'{name}_targets'])
    d_ap,d_an,has_neg = hard_dists(x, pid, norm) if hard else weighted_dists(pair_dist(x, norm), pid, 1e-6)
    want = torch.tensor(best(z, key))
    if hard: want,d_ap,d_an = (torch.where(has_neg, o, 0.) if key.endswith('an') else o for o in (want, d_ap, d_an))
    close(d_ap if key.endswith('ap') else d_an, want, tiny=2e-6)

@pytest.mark.parametrize('path,key', keys('losses_metric*.npz', metric.replace('hard[01]', 'hard0')+'dist_an'))
def test_no_collapse(path, key):
    "Without the reference's 1e-6, its distance is ours times Σ/(Σ+1e-6), Σ the sum of exp(−d) over the negatives"
    z,(name,norm) = read(path, 'losses_metric*.npz'),(key.partition('_')[0],'_norm1' in key)
    x,pid = torch.tensor(z[f'{name}_embedding']).double(),labels(z[f'{name}_targets'])
    dist = pair_dist(unit_rows(x, 'cosine' if norm else 'euclidean'), norm)
    _,d_an,has_neg = weighted_dists(dist, pid)
    tot = (-dist).exp().masked_fill(pid[:,None]==pid, 0).sum(1)
    want = torch.tensor(best(z, key))
    near = has_neg & (tot>0.2) # here 1e-6 does not count
    if has_neg.any(): close((d_an*tot/(tot+1e-6))[has_neg], want[has_neg], tiny=2e-6)
    if near.any(): close(d_an[near], want[near], tiny=2e-6)
    assert (d_an>=want-2e-6)[has_neg].all()

@pytest.mark.parametrize('path,key', keys('losses_metric*.npz', r'huge_norm0_hard[01]_margin0.0_loss'))
def test_huge_distances(path, key):
    "Where the reference's logarithm overflows it falls back to margin 0.3; ours does not overflow"
    z = read(path, 'losses_metric*.npz')
    pid,soft = labels(z['huge_targets']),triplet_of(key)
    hard_margin = triplet_of(key.replace('margin0.0', 'margin0.3'))
    x = leaf(z['huge_embedding'])
    val = hard_margin(out_of(x), pid)
    val.backward()
    close(val, z[key])
    close(x.grad, z[key.replace('_loss', '_grad')])
    assert soft(out_of(x), pid).isfinite() and abs(soft(out_of(x), pid)+0.3-val)<1

@pytest.mark.parametrize('path,key', keys('losses_metric*.npz', r'[a-z]+_pairwise_(circleloss|cosface)_m[\d.]+_g[\d.]+_loss'))
@pytest.mark.filterwarnings('ignore:all .* images of the batch')
def test_pairwise(path, key):
    z = read(path, 'losses_metric*.npz')
    name,kind,m,g = re.fullmatch(r'([a-z]+)_pairwise_(circleloss|cosface)_m([\d.]+)_g([\d.]+)_loss', key).groups()
    x = leaf(z[f'{name}_embedding'])
    term = (PairwiseCircle if kind=='circleloss' else PairwiseCosFace)(float(m), float(g))
    val = term(out_of(x), labels(z[f'{name}_targets']))
    val.backward()
    close(val, best(z, key))
    close(x.grad, z[key.replace('_loss', '_grad')])

@pytest.mark.parametrize('path,key', keys('losses_metric*.npz', r'[a-z]+_(euclidean|cosine)_dist'))
def test_distances(path, key):
    "The reference's float32 distances of a row to itself are rounding noise of up to 4e-3, ours are 0"
    z,name = read(path, 'losses_metric*.npz'),key.partition('_')[0]
    squared = key.endswith('cosine_dist')
    x = torch.tensor(z[f'{name}_embedding'])
    got = pair_dist(unit_rows(x, 'cosine') if squared else x, squared)
    far = torch.cdist(x.double(), x.double())>1e-3
    close(got[far], torch.tensor(z[key])[far])
    assert got[~far].abs().max()<1e-5

@pytest.mark.parametrize('path,key', keys('losses_metric*.npz', r'[a-z]+_l2_normalize'))
def test_unit_rows(path, key):
    z = read(path, 'losses_metric*.npz')
    close(unit_rows(torch.tensor(z[f'{key.partition("_")[0]}_embedding']), 'cosine'), z[key])

## memory_bank

def queue_of(z, skip):
    term = QueueLoss(z['queue0'].shape[0], z['queue0'].shape[1], margin=0.25, gamma=32., skip=skip)
    term.queue.feats.copy_(torch.tensor(z['queue0'].T))
    term.queue.pids.copy_(torch.tensor(z['queue_label0'][0]))
    return term

@pytest.mark.parametrize('skip', ['first','self'])
@pytest.mark.parametrize('path', golden_params('memory_bank*.npz'))
def test_queue(path, skip):
    "With the reference's mask all steps agree, with ours the first, and the state of the queue always"
    z = read(path, 'memory_bank*.npz')
    term,n,apart = queue_of(z, skip),sum(bool(re.fullmatch(r'step\d+_loss', k)) for k in z.files),[]
    for i in range(n):
        x = leaf(z[f'step{i}_features'])
        val = term(ReIDOut(None, None, x), labels(z[f'step{i}_targets']))
        val.backward()
        apart.append((x.grad-torch.tensor(z[f'step{i}_grad'])).abs().max().item())
        if skip=='first' or i==0:
            close(val, z[f'step{i}_loss'])
            close(x.grad, z[f'step{i}_grad'])
        assert term.queue.next.tolist()==z[f'step{i}_queue_ptr'].tolist()
        assert term.queue.pids.tolist()==z[f'step{i}_queue_label'][0].tolist()
        close(term.queue.feats.sum(0), z[f'step{i}_queue_sum'])
    if skip=='self': assert max(apart)>1e-2 or n==1

## What is in the files

inputs = re.compile(r'seed|logits(_zero_rows)?|targets(_zero_rows|_with_minus1)?|features(_aligned)?|weight|cosine(_aligned)?|plain_linear|grad_out'
    r'|scale_margin_pairs|cls_accuracy_top1|[a-z]+_(embedding|targets)|queue0|queue_label0|step\d+_(features|targets|loss|grad|queue_(ptr|sum|label))')

def is_known(key, rxs):
    "Is `key` an input, does a test ask for it, or does it belong to one that a test asks for?"
    base = re.sub('(_grad_(logits|features|weight)|_ign|_f64)+$', '', key)
    return any(re.fullmatch(rx, o) for rx in (inputs,*rxs) for o in (key, base, base.replace('_grad', '_loss')))

@pytest.mark.parametrize('pattern', ['losses_classification*.npz','logit_layers*.npz','losses_metric*.npz','memory_bank*.npz'])
def test_every_array_is_known(pattern):
    "An array that no test reads is no test that passes"
    for path in golden_files(pattern):
        found = [k for k in np.load(path).files if not is_known(k, tested.get(pattern, []))]
        assert not found, f'{path.name}: no test reads {found}'
    assert not is_known('bal_norm2_hard0_margin0.3_loss', tested['losses_metric*.npz']) and not is_known('margin', tested[pattern] if pattern in tested else [])
