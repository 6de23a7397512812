"New cities: pseudo-labels against scikit-learn and loops, sorted crops, and systems that never see a label"
from copy import deepcopy
from itertools import combinations
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score
from torch import nn
from fastreid_nb.crossdomain.cluster import Clusters, _joined_by, _rebuilt, cluster_folder
from fastreid_nb.crossdomain.generalise import CameraStyle, mix_style
from fastreid_nb.crossdomain.pseudo import PairGraph, _circular, kmeans_labels, label_quality
from fastreid_nb.crossdomain.systems import MLT, MMT, SpCL, _overlap, sinkhorn
from fastreid_nb.crossdomain.uda import UDA, DomainNorm, StrongUDA, UDABatches, uda_learner
from fastreid_nb.data.own import from_csv
from fastreid_nb.data.toy import ToyCity, toy_cities, toy_camera, toy_person, toy_photo, toy_reid
from fastreid_nb.heads.model import reid_model
from fastreid_nb.rerank.core import rerank_dist
from fastreid_nb.train.resume import Resumable
from tiny_models import TinyNet

def drawn(rng, n_ids=20, spread=.7, width=32):
    pids = np.repeat(np.arange(n_ids), rng.integers(2, 9, n_ids))
    x = rng.normal(size=(n_ids,width))[pids]+spread*rng.normal(size=(len(pids),width))
    return torch.tensor(x, dtype=torch.float32), pids

## Toy cities

def test_cities_leave_the_toy_alone(tmp_path):
    "Without a city, and with one that changes nothing, the images are those of before"
    plain,nowhere = (toy_reid(tmp_path, n_ids=4, progress=False, city=o) for o in (None, ToyCity('nowhere')))
    assert nowhere.name=='nowhere' and plain.name=='toy'
    for a,b in zip(plain.train.path, nowhere.train.path): assert Path(a).read_bytes()==Path(b).read_bytes()

def test_city_knobs():
    "Each knob changes what it says"
    p,c = toy_person(np.random.default_rng(3)),toy_camera(np.random.default_rng(3))
    im = toy_photo(p, c, np.random.default_rng(0))
    red = np.asarray(ToyCity('a', gain=(1,0,0)).see(im))
    assert not red[...,1:].any() and (red[...,0]==np.asarray(im)[...,0]).all()
    low = np.asarray(ToyCity('a', detail=.25).see(im), float)
    assert np.abs(np.diff(low, axis=0)).mean()<np.abs(np.diff(np.asarray(im, float), axis=0)).mean()
    grey = ToyCity('a', vivid=0).dress(p, np.random.default_rng(0))
    assert len(set(grey['upper']))==1 and grey['skin']==p['skin']
    assert {ToyCity('a', patterned=0).dress(p, np.random.default_rng(i))['pattern'] for i in range(9)}=={'plain'}

## Pseudo-labels

@pytest.mark.parametrize('dist', ['jaccard','cosine'])
@pytest.mark.parametrize('min_samples', [1,3])
def test_dbscan(dist, min_samples):
    "Core and noise as scikit-learn has them, on a graph with copies of an image"
    x,_ = drawn(np.random.default_rng(1))
    graph = PairGraph(torch.cat([x,x[:3]]), dist=dist)
    full = graph.D[graph.same][:,graph.same].tolil()
    for i,j in combinations(range(len(graph)), 2):
        if graph.same[i]==graph.same[j]: full[i,j] = full[j,i] = 1e-9
    for eps in (.2,.5):
        ours = graph.dbscan(eps, min_samples)
        theirs = DBSCAN(eps=eps, min_samples=min_samples, metric='precomputed').fit(full.tocsr()).labels_
        assert ((ours<0)==(theirs<0)).all() and adjusted_rand_score(ours, theirs)>.98

def test_jaccard_is_that_of_rerank():
    "The distances are those of k-reciprocal re-ranking with weight 0 of the old ones"
    x,_ = drawn(np.random.default_rng(2))
    graph,want = PairGraph(x, k1=15, most=.999),rerank_dist(x[:5], x[5:], k1=15, lam=0.).matrix().numpy()
    ours = graph.D[:5,5:].tocoo()
    assert ours.nnz>20 and np.allclose(ours.data, want[ours.row,ours.col], atol=1e-5)
    assert np.abs(graph.D-graph.D.T).max()<1e-5

def test_circular_by_hand():
    rng = np.random.default_rng(0)
    d = rng.random((12,12))
    d = (d+d.T)/2
    np.fill_diagonal(d, np.inf)
    labels = _circular(csr_matrix(np.where(np.isinf(d), 0, d)), .3)
    home = list(range(12))
    def root(i):
        while home[i]!=i: i = home[i]
        return i
    for i in range(12):
        if d[i].min()<=.3: home[root(i)] = root(int(d[i].argmin()))
    roots = [root(i) for i in range(12)]
    want = [-1 if roots.count(r)==1 else r for r in roots]
    assert adjusted_rand_score(want, labels)==1 and [o<0 for o in want]==[o<0 for o in labels]

def test_eps_rule():
    "On features of any spread the rule's labels are nearly the best of all thresholds"
    for spread in (.4,1.):
        x,pids = drawn(np.random.default_rng(3), 40, spread)
        graph = PairGraph(x)
        ari = lambda eps: label_quality(graph.dbscan(eps, 2), pids)['ari']
        assert ari(graph.find_eps(2))>.9*max(map(ari, np.linspace(.1, .8, 8)))

def test_two_images_of_each():
    "Pairs are found by cosine distances, whatever clusters them"
    gen = torch.Generator().manual_seed(5)
    x = torch.randn(60, 64, generator=gen).repeat_interleave(2, 0)+.6*torch.randn(120, 64, generator=gen)
    graph,pids = PairGraph(x, dist='cosine'),np.repeat(np.arange(60), 2)
    for labels in (graph.circular(), graph.dbscan(min_samples=2)): assert label_quality(labels, pids)['ari']>.95

def test_labels_do_not_depend_on_the_order():
    x,_ = drawn(np.random.default_rng(4))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    a,b = PairGraph(x).dbscan(.4),PairGraph(x[order]).dbscan(.4)
    assert adjusted_rand_score(a[order], b)>.99

@pytest.mark.parametrize('n', [1,2,3,5])
def test_few_images(n):
    graph = PairGraph(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)))
    for labels in (graph.dbscan(), graph.circular(), graph.hdbscan(), kmeans_labels(torch.randn(n, 8), n)): assert len(labels)==n

def test_equal_images():
    graph = PairGraph(torch.ones(50, 8))
    for labels in (graph.dbscan(), graph.circular(), graph.hdbscan()): assert (labels==0).all()

def test_bad_graph():
    with pytest.raises(ValueError, match='NaN'): PairGraph(torch.full((4,3), torch.nan))
    with pytest.raises(ValueError, match='expected 1 to 3'): kmeans_labels(torch.eye(3), 4)

## Sorted crops

def test_tracks_and_frames():
    "Random labels: every track is in one cluster, and rebuilt groups never share a frame"
    rng = np.random.default_rng(0)
    labels,tracks = rng.integers(-1, 6, 60),rng.integers(-1, 12, 60)
    new = _joined_by(labels, tracks)
    for t in range(12):
        got = set(new[tracks==t])
        assert len(got)<=1
    frames = rng.integers(0, 15, 30)
    pairs = [tuple(o) for o in rng.permutation(list(combinations(range(30), 2)))]
    groups = _rebuilt(pairs, frames.tolist(), list(range(30)))
    assert not pd.DataFrame(dict(g=groups, f=frames)).duplicated().any() and len(set(groups))<30

def test_clusters_round_trip(tmp_path):
    "The table is read back, whatever the names of files; the page escapes them"
    odd = ['a b.jpg', '<i>&.jpg', "q'\".jpg", 'ü#?.jpg']
    for o in odd: (tmp_path/o).write_bytes(b'x')
    found = Clusters(pd.DataFrame(dict(path=[str(tmp_path/o) for o in odd], pid=['new 1','new 1','ann','-1'], camid=0)), .4)
    back = from_csv(found.to_csv(tmp_path/'deep'/'c.csv'), test_frac=0)
    assert sorted(Path(o).resolve().name for o in back.train.path)==sorted(odd[:3])
    assert all(Path(o).is_file() for o in back.train.path)
    page = found.to_html(tmp_path/'c.html').read_text()
    assert '<i>' not in page and 'new 1' in page and '%23%3F.jpg' in page

def test_cluster_folder_goes_on(tmp_path, data):
    "The second call reads the features of the first; an image that changed is another folder"
    import shutil
    crops = tmp_path/'crops'
    crops.mkdir()
    for o in data.train.path[:12]: shutil.copy(o, crops)
    torch.manual_seed(0)
    model = reid_model(TinyNet, 0).eval()
    model.preproc = type(model.preproc)((32,16))
    kw = dict(num_workers=0, progress=False)
    a = cluster_folder(model, crops, tmp_path/'out', **kw)
    stamp = (tmp_path/'out'/'features'/'emb.npy').stat().st_mtime_ns
    b = cluster_folder(model, crops, tmp_path/'out', **kw)
    assert (tmp_path/'out'/'features'/'emb.npy').stat().st_mtime_ns==stamp and a.df.pid.equals(b.df.pid)
    shutil.copy(data.train.path[20], crops/'new.jpg')
    with pytest.raises(ValueError, match='give a new folder'): cluster_folder(model, crops, tmp_path/'out', **kw)

## Systems

@pytest.fixture(scope='module')
def cities(tmp_path_factory):
    kw = dict(n_ids=12, test_frac=.5, size=(32,16), progress=False)
    path = tmp_path_factory.mktemp('cities')
    return [toy_reid(path, city=o, seed=i, **kw) for i,o in enumerate(toy_cities.values())]

@pytest.fixture(scope='module')
def start():
    torch.manual_seed(0)
    model = reid_model(TinyNet, 6)
    model.preproc = type(model.preproc)((32,16))
    return model

def adapt(start, system, target, source=None, n=2, cbs=()):
    learn = uda_learner(start, target, system, source, p=4, k=2, n_iters=2, augs=[], num_workers=0, dtype=torch.float32, cbs=[*cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3)
    return learn

def weights(learn): return torch.cat([o.detach().flatten() for o in learn.adapted().state_dict().values() if o.is_floating_point()])

systems = dict(uda=lambda: UDA(min_samples=2), strong=lambda: StrongUDA(min_samples=2), mmt=lambda: MMT(min_samples=2),
    spcl=lambda: SpCL(min_samples=2), mlt=lambda: MLT(ks=[3,6,12]))

class Killed(Exception): pass
class Kill(Callback):
    order = 100
    on = True
    def after_batch(self):
        if Kill.on and self.training and self.epoch==1: raise Killed('now')

@pytest.mark.parametrize('name', systems)
def test_labels_are_not_seen_and_runs_go_on(name, start, cities, tmp_path):
    "With other labels the weights are the same, and so are those of a run that was killed in the middle of an epoch"
    source,target = cities
    whole = weights(adapt(start, systems[name](), target, source))
    other = deepcopy(target)
    for df in other.splits.values(): df['pid'] = np.random.default_rng(0).permutation(df.pid)
    Kill.on = True
    with pytest.raises(Killed): adapt(start, systems[name](), other, source, cbs=[Resumable(tmp_path, every_iters=1),Kill()])
    Kill.on = False
    again = adapt(start, systems[name](), other, source, cbs=[Resumable(tmp_path, resume=True),Kill()])
    assert torch.equal(weights(again), whole)

def test_no_mechanism_is_idle(start, cities):
    "Each system learns something else than the others, and than itself without its mechanism"
    source,target = cities
    train = lambda system: weights(adapt(start, system, target, source, n=1))
    found = {k:train(o()) for k,o in systems.items()}
    found['mlt, no transport'] = train(MLT(ks=[3,6,12], refine=0))
    hard = MMT(min_samples=2)
    hard.soft_ce = hard.soft_tri = 0
    found['mmt, hard'] = train(hard)
    for a,b in combinations(found, 2): assert not torch.equal(found[a], found[b]), f'{a} and {b} are the same'

def test_target_with_images_of_the_source(start, cities):
    source,target = cities
    with pytest.raises(ValueError, match='also in'): uda_learner(start, source, StrongUDA(), source)

def test_one_camera_and_no_test(start, cities):
    "A target of one camera without query and gallery; given labels are ignored, and that is said"
    target = deepcopy(cities[1])
    target.train['camid'],target.query,target.gallery = 0,target.query[:0],target.gallery[:0]
    learn = adapt(start, UDA(min_samples=2, by_camera=True), target)
    assert any('not used' in o for o in learn.dls.data.notes)

def test_all_noise_falls_back(start, cities):
    "A threshold that leaves everybody in the noise: the circular search takes over"
    learn = adapt(start, UDA(eps=1e-6, min_samples=50), cities[1], n=1)
    assert learn.uda.labels.max()>=1

def test_teacher_of_another_architecture(start, cities):
    class Wide(TinyNet):
        n_feat = 16
        def __init__(self): nn.Sequential.__init__(self, nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16))
    with pytest.raises(ValueError, match='another architecture'): adapt(start, MMT(teacher=reid_model(Wide, 6)), cities[1])

@pytest.mark.parametrize('shape', [(30,5),(64,64),(200,7)])
def test_sinkhorn_marginals(shape):
    scores = 5*torch.randn(*shape, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    plan = sinkhorn(scores, 200)
    n,k = shape
    assert (n*plan.sum(1)-1).abs().max()<1e-4 and (k*plan.sum(0)-1).abs().max()<1e-2
    assert not torch.equal(plan.argmax(1), scores.argmax(1))

def test_overlap_against_sets():
    rng = np.random.default_rng(0)
    a,b = rng.integers(-1, 5, 40),rng.integers(-1, 5, 40)
    sets = lambda o,i: {i} if o[i]<0 else set(np.flatnonzero(o==o[i]))
    want = [len(sets(a, i) & sets(b, i))/len(sets(a, i) | sets(b, i)) for i in range(40)]
    assert np.allclose(_overlap(a, b), want)

def test_batches_of_labels():
    "The same number of batches whatever the clusters; noise never, source first, few clusters repeated"
    rng = np.random.default_rng(0)
    for n_clusters in (2,5,40):
        draw = UDABatches(7, 2, 20)
        draw.labels = np.r_[np.arange(20)//4,5+rng.integers(-1, n_clusters, 100)]
        draw.labels[20:][draw.labels[20:]==4] = -1
        plan = draw(None, 6, 4, rng)
        assert plan.shape==(7,24) and (plan[:,:8]<20).all() and (plan[:,8:]>=20).all() and (draw.labels[plan]>=0).all()
        groups = draw.labels[plan].reshape(7, 6, 4)
        assert (groups==groups[...,:1]).all()

def test_domain_norm_is_two_norms():
    x = torch.randn(10, 4, 3, 3)
    ours,a,b = DomainNorm(nn.BatchNorm2d(4)),nn.BatchNorm2d(4),nn.BatchNorm2d(4)
    ours.n_source = 6
    assert torch.allclose(ours(x), torch.cat([a(x[:6]),b(x[6:])]))
    assert torch.allclose(ours.eval()(x), b.eval()(x))

## Generalisation

def test_mix_style_keeps_the_picture():
    "Only mean and deviation change: normalised maps are the same"
    x = torch.randn(5, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    y = mix_style(x, torch.tensor([1,2,3,4,0]), torch.rand(5, 1, 1, 1))
    norm = lambda o: (o-o.mean((2,3), keepdim=True))/o.std((2,3), keepdim=True)
    assert torch.allclose(norm(x), norm(y), atol=1e-4) and not torch.allclose(x, y)

def test_camera_style(data):
    style = CameraStyle(data.train, p=1)
    x = torch.randint(0, 255, (3,32,16), dtype=torch.uint8)
    y = style(x, np.random.default_rng(0))
    near = (y.float().mean((1,2))-style.mean[:,:,0,0]).abs().amax(1).min()
    assert y.dtype==torch.uint8 and near<12
