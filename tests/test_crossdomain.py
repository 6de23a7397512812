"New cities: pseudo-labels against scikit-learn and loops, sorted crops, and systems that never see a label"
from copy import deepcopy
from functools import partial
from itertools import combinations
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback.core import Callback
from PIL import Image
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score
from torch import nn
from fastreid_nb.crossdomain.adapt import adapt_folder
from fastreid_nb.crossdomain.cluster import Clusters, _joined_by, _rebuilt, cluster_features, cluster_folder
from fastreid_nb.crossdomain.generalise import CameraStyle, mix_style
from fastreid_nb.crossdomain.pseudo import PairGraph, _circular, kmeans_labels, label_quality
from fastreid_nb.crossdomain.systems import MLT, MMT, SpCL, _overlap, column_gains, sinkhorn
from fastreid_nb.crossdomain.uda import UDA, DomainNorm, StrongUDA, UDABatches, uda_learner
from fastreid_nb.data.own import from_csv
from fastreid_nb.data.preproc import Preproc
from fastreid_nb.data.toy import ToyCity, toy_cities, toy_camera, toy_person, toy_photo, toy_reid
from fastreid_nb.eval.extract import extract
from fastreid_nb.eval.features import Features
from fastreid_nb.heads.model import reid_model
from fastreid_nb.rerank.core import rerank_dist
from fastreid_nb.train.checkpoint import load_reid
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

def test_hdbscan_of_pieces():
    "Two groups that touch, one group, and three pieces of three images, fewer than a cluster; a piece has no say in another"
    sizes = [6,6,7,3,3,3]
    group = np.repeat(range(6), sizes)
    d = np.where(group[:,None]==group, .2+.1*np.random.default_rng(0).random((28,28)), 0)
    d[5,6] = d[6,5] = .8
    np.fill_diagonal(d, 0)
    def labels(rows):
        graph = PairGraph(torch.eye(len(rows)))
        graph.D = csr_matrix(np.maximum(d, d.T)[np.ix_(rows, rows)].astype(np.float32))
        return graph.hdbscan(4)
    whole = labels(np.arange(28))
    assert adjusted_rand_score(group[:19], whole[:19])==1 and (whole[:19]>=0).all() and (whole[19:]==-1).all()
    for gone in (group==2,group>2): assert adjusted_rand_score(whole[~gone], labels(np.flatnonzero(~gone)))==1

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

def test_known_people_tracks_and_frames():
    "Random tracks and frames: a track has one name, and in a frame nobody is two crops unless these are one track"
    x,pids = drawn(np.random.default_rng(7), 12)
    first = pd.Series(pids).drop_duplicates().index[:4]
    gallery = Features(x[first], pd.DataFrame(dict(pid=pids[first], pid_name=['ann','bob','cy','dee'])))
    rest = np.setdiff1d(np.arange(len(x)), first)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        df = pd.DataFrame(dict(pid=pids[rest], camid=0, trackid=rng.integers(-1, 8, len(rest)), frame=rng.integers(0, 6, len(rest))))
        df.loc[rng.random(len(df))<.7,'trackid'] = -1
        names = cluster_features(Features(x[rest], df), gallery).df.pid
        assert names.isin(['ann','bob','cy','dee']).any() and names.str.startswith('new').any()
        on = df.trackid>=0
        assert (names[on].groupby(df.trackid[on]).nunique()==1).all()
        unit = np.where(on, df.trackid, 100+df.index)
        crops = pd.DataFrame(dict(name=names, frame=df.frame, unit=unit))[names!='-1'].drop_duplicates()
        assert not crops.duplicated(['name','frame']).any()

def test_the_nearest_keeps_the_name():
    "Of two crops of a frame that are near to a known person the nearer one has the name"
    x,pids = drawn(np.random.default_rng(8), 8, .3)
    gallery = Features(x[:1], pd.DataFrame(dict(pid=[0], pid_name='ann')))
    mine = np.flatnonzero(pids==0)[1:]
    df = pd.DataFrame(dict(pid=pids[1:], camid=0))
    named = lambda df: (cluster_features(Features(x[1:], df), gallery, dist='cosine').df.pid=='ann').to_numpy()
    assert named(df)[mine-1].all()
    far = 1-torch.cosine_similarity(x[mine], x[:1]).numpy()
    got = named(df.assign(frame=np.where(df.index.isin(mine-1), 1, -1)))[mine-1]
    assert got.sum()==1 and got[far.argmin()]

class Stripes(nn.Module):
    "Mean colours of six stripes; counts the images that it sees"
    preproc,seen,fail_at = Preproc((24,12)),0,None
    def forward(self, x):
        if self.fail_at is not None and self.seen>=self.fail_at: raise RuntimeError('killed')
        self.seen += len(x)
        return nn.functional.adaptive_avg_pool2d(x, (6,1)).flatten(1)-.5

@pytest.fixture
def painted(tmp_path):
    "A folder of six painted people, five crops each, and a folder of two that are known; files tell frame and track"
    rng = np.random.default_rng(0)
    for who,name in enumerate('ann bob cy dee eve fay'.split()):
        coat = rng.integers(30, 225, (6,1,3))
        for i in range(7):
            path = tmp_path/'known'/name if i<2 else tmp_path/'crops'
            if i<2 and who>1: continue
            path.mkdir(parents=True, exist_ok=True)
            shade = (coat+rng.normal(0, 6, (6,1,3))).clip(0, 255).repeat(4, 0).repeat(12, 1)
            frame,track = (2 if who==0 and i<4 else 10*who+i),(7 if (who,i) in ((2,5),(3,5)) else -1)
            Image.fromarray(shade.astype(np.uint8)).save(path/f'{name}_t{track}_f{frame}_{i}.png')
    return tmp_path

quiet = dict(num_workers=0, progress=False)

def test_cluster_folder_with_known_people(painted):
    "Names come from the folders; a frame forces two crops of one person apart, and a track two people together"
    names = lambda **kw: cluster_folder(Stripes(), painted/'crops', painted/f'out{len(kw)}', painted/'known', **kw, **quiet).df
    who = lambda df: df.path.map(lambda o: Path(o).name.split('_')[0])
    free = names()
    assert (free.pid[who(free)=='ann']=='ann').all() and (free.pid[who(free)=='bob']=='bob').all()
    assert free.groupby(who(free)).pid.nunique().eq(1).all() and free.pid.nunique()==6
    tied = names(regex=r'_t(?P<trackid>-?\d+)_f(?P<frame>\d+)_')
    assert (tied.pid[who(tied)=='ann']=='ann').sum()==4
    assert tied.pid[tied.trackid.astype(str)=='7'].nunique()==1

def test_cluster_folder_known_must_be_folders(painted):
    net = Stripes()
    with pytest.raises(ValueError, match='a folder for each known'):
        cluster_folder(net, painted/'crops', painted/'out', painted/'crops', **quiet)
    assert net.seen==0

@pytest.mark.parametrize('kw', [dict(eps=0), dict(min_samples=0), dict(dist='manhattan'), dict(eps=1.), dict(most=3)])
def test_cluster_folder_reads_its_options_first(painted, kw):
    "A bad option is refused before an image is embedded"
    net = Stripes()
    with pytest.raises(ValueError, match=next(iter(kw))): cluster_folder(net, painted/'crops', painted/'out', **kw, **quiet)
    assert net.seen==0 and not (painted/'out').exists()

def test_cluster_folder_goes_on(painted, monkeypatch):
    "Killed after half of the crops, a second call embeds the other half only; an image that changed is another folder"
    monkeypatch.setattr('fastreid_nb.crossdomain.cluster.extract', partial(extract, bs=5, shard=5))
    whole,net = cluster_folder(Stripes(), painted/'crops', painted/'whole', **quiet),Stripes()
    net.fail_at = 15
    with pytest.raises(RuntimeError, match='killed'): cluster_folder(net, painted/'crops', painted/'out', **quiet)
    net = Stripes()
    again = cluster_folder(net, painted/'crops', painted/'out', **quiet)
    assert 0<net.seen<30 and again.df.pid.equals(whole.df.pid)
    cluster_folder(net, painted/'crops', painted/'out', **quiet)
    assert net.seen<30
    Image.new('RGB', (12,24)).save(painted/'crops'/'new.png')
    with pytest.raises(ValueError, match='give a new folder'): cluster_folder(Stripes(), painted/'crops', painted/'out', **quiet)

def test_reid_cluster_with_timm(painted, monkeypatch, capsys):
    "The command takes a network of timm; here without its weights, which would be downloaded"
    pytest.importorskip('timm')
    from fastreid_nb.backbone import timmnets
    from fastreid_nb.recipes import use
    create = timmnets._create
    monkeypatch.setattr(timmnets, '_create', lambda name, pretrained, **kw: create(name, False, **kw))
    use.reid_cluster(painted/'crops', 'timm/resnet10t', size='64x32', workers=0, out=painted/'out', pattern=r'_f(?P<frame>\d+)_')
    assert 'identities' in capsys.readouterr().out and len(pd.read_csv(painted/'out'/'clusters.csv'))==30

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
    found['mlt, one granularity'] = train(MLT(ks=[6]))
    picky = SpCL(min_samples=2)
    picky.gap = .3   # on these images thresholds .02 apart find the same clusters
    found['spcl, trusts fewer'] = train(picky)
    for a,b in combinations(found, 2): assert not torch.equal(found[a], found[b]), f'{a} and {b} are the same'

def test_students_listen_to_each_other(start, cities):
    "The terms of a student change with what the teacher of the other says, and not with what its own says"
    class Ask(Callback):
        def after_pred(self):
            if not self.training: return
            system,pid = self.learn.mmt,self.learn.mmt.labels[self.yb[0]]
            memory = deepcopy(system.memory)
            def told(i, j):
                said = system.taught()
                if j is not None: [o[j].copy_(o[j].flip(0)) for o in (said.feat,said.emb)]
                system.memory = deepcopy(memory)
                return sum(o.item() for o in system._one(i, self.pred, said, pid).values())
            with torch.no_grad(): Ask.got = {(i,j):told(i, j) for i in (0,1) for j in (None,0,1)}
            system.memory = memory
    learn = adapt(start, MMT(min_samples=2), cities[1], n=1, cbs=[Ask()])
    for i in (0,1): assert Ask.got[i,i]==Ask.got[i,None]!=Ask.got[i,1-i]

def test_target_with_images_of_the_source(start, cities, tmp_path):
    "Under whatever path, and in query and gallery too"
    source,target = cities
    refused = lambda target: pytest.raises(ValueError, match='also in')
    with refused(source): uda_learner(start, source, StrongUDA(), source)
    (tmp_path/'link').symlink_to(Path(source.train.path[0]).parent)
    linked = deepcopy(target)
    linked.train.loc[0,'path'] = str(tmp_path/'link'/Path(source.train.path[0]).name)
    with refused(linked): uda_learner(start, linked, StrongUDA(), source)
    for part in ('query','gallery'):
        tested = deepcopy(target)
        getattr(tested, part).iloc[0,getattr(tested, part).columns.get_loc('path')] = source.train.path[0]
        with refused(tested): uda_learner(start, tested, StrongUDA(), source)

def test_one_camera_and_no_test(start, cities, capsys):
    "A target of one camera without query and gallery; given labels are ignored, and that is said"
    target = deepcopy(cities[1])
    target.train['camid'],target.query,target.gallery = 0,target.query[:0],target.gallery[:0]
    learn = adapt(start, UDA(min_samples=2, by_camera=True), target)
    assert any('not used' in o for o in learn.dls.data.notes) and 'labels in the training table' in capsys.readouterr().out

def test_all_noise_falls_back(start, cities):
    "A threshold that leaves everybody in the noise: the circular search takes over"
    learn = adapt(start, UDA(eps=1e-6, min_samples=50), cities[1], n=1)
    assert learn.uda.labels.max()>=1

@pytest.mark.parametrize('make', [MMT,MLT])
def test_first_teacher(make, start, cities):
    "A model of the same kind is where the teacher starts, with a source and without, whatever wraps the student"
    torch.manual_seed(1)
    other = reid_model(TinyNet, 4)
    class Look(Callback):
        order = 100
        def before_train(self): Look.got = [o.clone() for o in getattr(self.learn, make.__name__.lower()).teacher.parameters()]
    kw = dict(ks=[3,6]) if make is MLT else dict(min_samples=2)
    for source in (None,cities[0]):
        learn = adapt(start, make(teacher=other, **kw), cities[1], source, n=1, cbs=[Look()])
        assert torch.equal(Look.got[0], next(other.parameters())) and len(Look.got)==len(list(learn.model.parameters()))
    if make is MMT:
        adapt(start, MMT(min_samples=2, teacher=[other,start]), cities[1], n=1, cbs=[Look()])
        assert torch.equal(Look.got[len(Look.got)//2], next(start.parameters()))

def test_teacher_of_another_architecture(start, cities):
    class Wide(TinyNet):
        n_feat = 16
        def __init__(self): nn.Sequential.__init__(self, nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16))
    for system,source in ((MMT,None),(MLT,cities[0])):
        with pytest.raises(ValueError, match='another architecture'): adapt(start, system(teacher=reid_model(Wide, 6)), cities[1], source)

@pytest.mark.parametrize('shape', [(30,5),(64,64),(200,7)])
def test_sinkhorn_marginals(shape):
    scores = 5*torch.randn(*shape, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    plan = sinkhorn(scores, 200)
    n,k = shape
    assert (n*plan.sum(1)-1).abs().max()<1e-4 and (k*plan.sum(0)-1).abs().max()<1e-2
    assert not torch.equal(plan.argmax(1), scores.argmax(1))

def test_plan_of_mlt_is_balanced(start, cities):
    "At its own settings the columns of the plan over the queue have equal sums"
    class Look(Callback):
        order = 100
        def after_pred(self):
            if not self.training: return
            system = self.learn.mlt
            scores = [system._scores(system.queue.feats, g) for g in range(3)]
            Look.off = [((o+column_gains(o, system.n_iters)).softmax(1).mean(0)*o.shape[1]-1).abs().max().item() for o in scores]
    adapt(start, MLT(ks=[4,8,12]), cities[1], cities[0], cbs=[Look()])
    assert max(Look.off)<1e-2, Look.off

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

## A folder to adapt to

def test_adapt_folder_goes_on(start, cities, tmp_path):
    "Killed in its second epoch and resumed, it leaves the weights of a whole run; other crops are refused"
    import shutil
    crops = tmp_path/'crops'
    crops.mkdir()
    for i,o in enumerate(cities[1].train.path): shutil.copy(o, crops/f'{i:03d}.jpg')
    kw = dict(epochs=2, p=4, k=2, n_iters=2, num_workers=0, augs=[], dtype=torch.float32)
    run = lambda out, **more: adapt_folder(start, crops, tmp_path/out, MMT(min_samples=2), cbs=[Kill()], **kw, **more)
    Kill.on = False
    run('whole')
    Kill.on = True
    for out in ('stopped','other'):
        with pytest.raises(Killed): run(out)
    Kill.on = False
    with pytest.raises(ValueError, match='resume=True goes on'): run('stopped')
    run('stopped', resume=True)
    a,b = (load_reid(tmp_path/o/'model.pt', reid_model(TinyNet, 0)).state_dict() for o in ('whole','stopped'))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert sorted(o.name for o in (tmp_path/'stopped').iterdir())==['labels','model.pt']
    shutil.copy(cities[0].train.path[0], crops/'new.jpg')
    with pytest.raises(ValueError, match='other settings'): run('other', resume=True)
    assert not (tmp_path/'other'/'model.pt').exists()

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
