"Old galleries and old cities: maps against known rotations, rows that stay to the last bit, and forgetting by hand"
from copy import deepcopy
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from scipy.linalg import orthogonal_procrustes
from torch import nn
from fastreid_nb.data.toy import toy_cities, toy_reid
from fastreid_nb.eval.features import Features, evaluate
from fastreid_nb.eval.inference import embed
from fastreid_nb.heads.core import ReductionHead, ReIDOut
from fastreid_nb.heads.model import reid_model
from fastreid_nb.kd import compatible
from fastreid_nb.kd.compatible import CompatibleLoss, GalleryMap, compatibility
from fastreid_nb.kd.core import PKT, RelationalKD, SimilarityKD
from fastreid_nb.kd.lifelong import average_models, choose_exemplars, lifelong_learner, lifelong_scores, with_more_classes
from fastreid_nb.train.checkpoint import load_reid, save_reid
from fastreid_nb.train.core import class_names
from tiny_models import TinyNet, tiny_dls

def table(n, n_ids=None):
    pid = np.arange(n)%(n_ids or n)
    return pd.DataFrame(dict(path=[f'{i}.jpg' for i in range(n)], pid=pid, camid=np.arange(n)//(n_ids or n)%3, dsetid='x'))

def rotation(n, seed=0): return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q

def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@pytest.fixture(scope='module')
def towns(tmp_path_factory):
    "Two cities of eight identities in training"
    kw = dict(n_ids=12, test_frac=1/3, size=(32,16), progress=False)
    return [toy_reid(tmp_path_factory.mktemp('towns'), city=o, seed=i, **kw) for i,o in enumerate(toy_cities.values())]

def tiny_model(data, seed=0):
    "An untrained model that knows the people of a set by name"
    torch.manual_seed(seed)
    dls = tiny_dls(data)
    model = reid_model(TinyNet, len(dls.pids), preproc=dls.preproc)
    model.pids,model.pid_names = dls.pids,class_names(dls)
    return model

## The map

@pytest.mark.parametrize('how', ['least_squares','procrustes'])
@pytest.mark.parametrize('width', [2,8,33])
def test_map_recovers_rotation(how, width):
    x,turn = random(5*width, width),rotation(width).float()
    old,new = (Features(o, table(len(x))) for o in (x, x@turn))
    found = GalleryMap.fit(old, new, how, reg=0)
    assert torch.allclose(found.weight, turn, atol=1e-5) and found.shift.abs().max()<1e-5
    assert torch.allclose(found(old).emb, F.normalize(new.emb), atol=1e-5)

def test_map_of_itself_is_identity():
    x = Features(random(50, 6), table(50))
    for how in ('least_squares','procrustes'):
        assert torch.allclose(GalleryMap.fit(x, x, how, reg=0).weight, torch.eye(6), atol=1e-5)

@pytest.mark.parametrize('d_old,d_new', [(6,6),(6,9),(9,6)])
def test_procrustes_is_orthogonal(d_old, d_new):
    old,new = (Features(random(200, d, seed=i), table(200)) for i,d in enumerate((d_old,d_new)))
    w = GalleryMap.fit(old, new, 'procrustes').weight
    small = w@w.T if d_old<=d_new else w.T@w
    assert torch.allclose(small, torch.eye(min(d_old, d_new)), atol=1e-5)
    if d_old==d_new:
        want = orthogonal_procrustes(F.normalize(old.emb).numpy(), F.normalize(new.emb).numpy())[0]
        assert torch.allclose(w, torch.tensor(want), atol=1e-5)

def test_ridge_is_the_closed_form():
    x,y = F.normalize(random(80, 5).double()),F.normalize(random(80, 7, seed=1).double())
    found = GalleryMap.fit(Features(x.float(), table(80)), Features(y.float(), table(80)), reg=.2)
    a,b = x-x.mean(0),y-y.mean(0)
    lam = .2*a.square().sum()/80/5
    w = torch.linalg.solve(a.T@a/80+lam*torch.eye(5), a.T@b/80)
    assert torch.allclose(found.weight, w.float(), atol=1e-5)
    assert torch.allclose(found.shift, (y.mean(0)-x.mean(0)@w).float(), atol=1e-5)

def test_regularisation_shrinks():
    old,new = (Features(random(60, 8, seed=i), table(60)) for i in (0,1))
    norms = [GalleryMap.fit(old, new, reg=o).weight.norm() for o in (0,.1,1,100)]
    assert all(a>b for a,b in zip(norms, norms[1:]))

def test_exemplars_are_matched_by_path():
    "Any order, and images that one side lacks"
    old,new = (Features(random(90, 4, seed=i), table(90)) for i in (0,1))
    order = np.random.default_rng(0).permutation(90)[:70]
    some = Features(new.emb[order], new.df.iloc[order])
    both = np.sort(order)
    a,b = GalleryMap.fit(old, some),GalleryMap.fit(Features(old.emb[both], old.df.iloc[both]), Features(new.emb[both], new.df.iloc[both]))
    assert a.n==70 and torch.allclose(a.weight, b.weight, atol=1e-6)

def test_map_in_blocks_and_on_disk(tmp_path, monkeypatch):
    "Blocks, half precision and memory maps give the same rows"
    old,new = Features(random(100, 6), table(100)),Features(random(100, 9, seed=1), table(100), 'market')
    move = GalleryMap.fit(old, new)
    whole = move(old).emb
    monkeypatch.setattr(compatible, '_tiles', lambda x: [slice(i, i+7) for i in range(0, len(x), 7)])
    assert torch.allclose(move(old).emb, whole, atol=1e-6)
    np.save(tmp_path/'old.npy', old.emb.numpy())
    stored = Features(np.load(tmp_path/'old.npy', mmap_mode='r'), old.df)
    there = move(stored, tmp_path/'new.npy')
    assert torch.allclose(there.emb, whole, atol=1e-6) and there.df.equals(old.df) and sorted(o.name for o in tmp_path.iterdir())==['new.npy','old.npy']
    half = move(Features(old.emb.half(), old.df))
    assert half.emb.dtype==torch.float16 and torch.allclose(half.emb.float(), whole, atol=2e-3)
    assert np.load(tmp_path/'new.npy', mmap_mode='r').dtype==np.float32
    on_disk = move(Features(old.emb.half(), old.df), tmp_path/'half.npy')
    assert np.load(tmp_path/'half.npy', mmap_mode='r').dtype==np.float16 and torch.equal(on_disk.emb, half.emb)
    coarse = Features(old.emb.bfloat16(), old.df)
    assert torch.allclose(move(coarse, tmp_path/'coarse.npy').emb, move(coarse).emb.float(), atol=1e-2)
    move.save(tmp_path/'map.pt')
    again = GalleryMap.load(tmp_path/'map.pt')
    assert torch.equal(again.weight, move.weight) and torch.equal(again.shift, move.shift) and (again.how,again.n)==(move.how,move.n)

def test_rotated_gallery_is_found_again():
    "A new space that is the old one turned: nothing fits before the map, everything after it"
    pid = np.arange(120)%30
    x = F.normalize(random(30, 16)[pid]+.3*random(120, 16, seed=1))
    q,g = (Features(x[o], table(120).assign(pid=pid, camid=np.arange(120)//30)[o], 'market') for o in (slice(30),slice(30,120)))
    new = [Features(o.emb@rotation(16).float(), o.df, o.protocol) for o in (q,g)]
    train = random(300, 16, seed=2)
    move = GalleryMap.fit(*(Features(o, table(300)) for o in (train, train@rotation(16).float())), 'procrustes')
    found = compatibility((q,g), new, move)
    assert found.mAP['new/old']<.3<.6<found.mAP['old/old']
    assert abs(found.mAP['new/mapped']-found.mAP['new/new'])<1e-6 and abs(found.mAP['new/new']-found.mAP['old/old'])<1e-6

@pytest.mark.parametrize('make,match', [
    (lambda x: GalleryMap.fit(Features(x.emb[:7], x.df[:7]), x), '7 exemplars.*expected 8 or more'),
    (lambda x: GalleryMap.fit(x, Features(x.emb, x.df.assign(path=[f'other{i}' for i in range(len(x))]))), '0 exemplars'),
    (lambda x: GalleryMap.fit(Features(x.emb, x.df.drop(columns='path')), x), 'the old exemplars have no column path'),
    (lambda x: GalleryMap.fit(x, x, 'cca'), 'how'),
    (lambda x: GalleryMap.fit(x, x, reg=-1), 'reg'),
    (lambda x: GalleryMap.fit(Features(x.emb*float('nan'), x.df), x), 'NaN'),
    (lambda x: GalleryMap.fit(x, x)(Features(x.emb[:,:5], x.df)), 'features of 5 values for a map of 8 → 8')])
def test_bad_maps(make, match):
    with pytest.raises(ValueError, match=match): make(Features(random(40, 8), table(40)))

def test_a_map_is_not_features(tmp_path):
    Features(random(4, 2), table(4)).save(tmp_path/'x.pt')
    with pytest.raises(ValueError, match='other than a map'): GalleryMap.load(tmp_path/'x.pt')
    with pytest.raises(FileNotFoundError): GalleryMap.load(tmp_path/'none.pt')

## The table

def both_sides(seed, width=8):
    x = F.normalize(random(10, width, seed=seed)[np.arange(60)%10]+.4*random(60, width, seed=seed+1))
    df = table(60, 10)
    return [Features(x[o], df[o], 'market') for o in (slice(20),slice(20,60))]

def test_table_is_symmetric():
    "One model twice; and both models exchanged"
    a,b = both_sides(0),both_sides(5)
    same = compatibility(a, a)
    assert same['over old'].tolist()==[1,1,1] and same.mAP.nunique()==1
    there,back = compatibility(a, b),compatibility(b, a)
    assert there.mAP['new/new']==back.mAP['old/old'] and there.mAP['old/old']==back.mAP['new/new']
    assert there.mAP['new/old']==evaluate(b[0], a[1]).mAP

def test_table_of_two_widths():
    a,b = both_sides(0, 6),both_sides(5)
    assert compatibility(a, b).index.tolist()==['new/new','old/old']
    move = GalleryMap.fit(a[1], b[1])
    assert compatibility(a, b, move).index.tolist()==['new/new','new/mapped','old/old']

def test_table_refuses_other_images():
    a,b = both_sides(0),both_sides(5)
    with pytest.raises(ValueError, match='gallery: 40 images by the old model and 39'):
        compatibility(a, (b[0],Features(b[1].emb[:39], b[1].df[:39], 'market')))
    with pytest.raises(ValueError, match='queries: 20'): compatibility(a, (Features(b[0].emb, b[0].df[::-1], 'market'),b[1]))

## The influence loss

def test_influence_loss_by_hand():
    rows,x,row_of = random(4, 6),random(5, 6, seed=1),torch.tensor([2,-1,0,3,-1])
    out,pid = ReIDOut(x, x, x),torch.arange(5)
    want = F.cross_entropy((x@rows.T)[[0,2,3]], torch.tensor([2,0,3]))
    assert torch.allclose(CompatibleLoss(rows, row_of)(out, pid), want)
    cosine = F.normalize(x)@F.normalize(rows).T/.05
    want = F.cross_entropy(cosine[[0,2,3]], torch.tensor([2,0,3]))
    assert torch.allclose(CompatibleLoss(rows, row_of, .05)(out, pid), want, atol=1e-5)

def test_influence_loss_moves_the_new_model_only():
    x = random(4, 3).requires_grad_()
    term = CompatibleLoss(nn.Parameter(random(4, 3, seed=1)), weight=2.)
    term(ReIDOut(x, x, x), torch.arange(4)).backward()
    assert x.grad.abs().sum()>0 and not list(term.parameters()) and not term.rows.requires_grad and term.weight==2

def test_classifier_rows_by_name(towns, tmp_path):
    "From a checkpoint, for the same people under other codes, and with people it does not know"
    old = tiny_model(towns[0])
    save_reid(tmp_path/'old.pt', old)
    kept = load_reid(tmp_path/'old.pt', reid_model(TinyNet, 8))
    term = CompatibleLoss.from_classifier(kept, tiny_dls(towns[0]))
    assert term.row_of.tolist()==list(range(8)) and torch.equal(term.rows, old.head.classifier.weight.cpu())
    some = replace(towns[0], train=towns[0].train[towns[0].train.pid.isin(towns[0].train.pid.unique()[3:])].reset_index(drop=True))
    assert CompatibleLoss.from_classifier(kept, tiny_dls(some)).row_of.tolist()==list(range(3, 8))
    with pytest.raises(ValueError, match='none of 8 training identities.*from_centres'):
        CompatibleLoss.from_classifier(kept, tiny_dls(towns[1]))
    with pytest.raises(ValueError, match='0 rows'): CompatibleLoss.from_classifier(reid_model(TinyNet, 0), tiny_dls(towns[0]))

def test_a_classifier_says_nothing_of_the_feature_before_the_neck(towns):
    old,dls = tiny_model(towns[0]),tiny_dls(towns[0])
    old.test_on = 'feat'
    with pytest.raises(ValueError, match="searched by 'feat'.*from_centres"): CompatibleLoss.from_classifier(old, dls)
    assert CompatibleLoss.from_centres(old, dls, num_workers=0).on=='feat'

def test_centres(towns):
    old,dls = tiny_model(towns[0]),tiny_dls(towns[1])
    term = CompatibleLoss.from_centres(old, dls, num_workers=0)
    for i in (0,5):
        mine = towns[1].train.path[towns[1].train.pid==dls.pids[i]].tolist()
        assert torch.allclose(term.rows[i], F.normalize(embed(old, mine).mean(0), dim=0), atol=1e-5)
    assert term.temperature==.05

def test_widths_are_named():
    x = random(4, 16)
    with pytest.raises(ValueError, match='16 values, the old one 8.*n_emb=8.*GalleryMap'):
        CompatibleLoss(random(4, 8))(ReIDOut(x, x, x), torch.arange(4))
    with pytest.raises(ValueError, match='made for 4 identities'): CompatibleLoss(random(4, 16))(ReIDOut(x, x, x), torch.tensor([0,1,2,4]))
    with pytest.raises(ValueError, match='parts'): CompatibleLoss(random(4, 16))(ReIDOut([x,x], [x,x], [x,x]), torch.arange(4))
    with pytest.raises(ValueError, match='temperature=0'): CompatibleLoss(x, temperature=0)
    with pytest.raises(ValueError, match='NaN'): CompatibleLoss(x*float('nan'))

## Exemplars

def test_exemplars_are_balanced_and_repeatable(towns):
    a,b,c = (choose_exemplars(towns[0], 5, 3, seed=o) for o in (0,0,1))
    assert a.train.path.tolist()==b.train.path.tolist()!=c.train.path.tolist()
    for o in (a,c):
        assert o.train.groupby('pid').size().tolist()==[3]*5 and o.train.groupby('pid').camid.nunique().tolist()==[3]*5
        assert set(o.train.path)<=set(towns[0].train.path) and o.query is towns[0].query or o.query.equals(towns[0].query)

def test_more_images_than_cameras(towns):
    "After each camera gave one, cameras come again; no image twice"
    kept = choose_exemplars(towns[0], 4, 6).train
    assert kept.groupby('pid').camid.value_counts().groupby('pid').max().tolist()==[2]*4 and not kept.path.duplicated().any()

def test_exemplars_nearest_to_the_mean(towns):
    model = tiny_model(towns[0])
    kept = choose_exemplars(towns[0], 8, 1, model, num_workers=0).train
    for pid,df in towns[0].train.groupby('pid'):
        emb = embed(model, df.path.tolist())
        best = df.path.iloc[int((emb@emb.mean(0)).argmax())]
        assert kept.path[kept.pid==pid].tolist()==[best]

def test_too_few_exemplars(towns):
    with pytest.raises(ValueError, match='8 identities.*expected 9'): choose_exemplars(towns[0], 9)
    with pytest.raises(ValueError, match='0 identities'): choose_exemplars(towns[0], 1, 9)
    for kw in (dict(n_ids=0),dict(n_images=0)):
        with pytest.raises(ValueError, match='expected'): choose_exemplars(towns[0], **kw)

## Going on

def next_learner(model, data, memory=(), **kw):
    return lifelong_learner(model, data, memory, p=4, k=2, augs=[], num_workers=0, dtype=torch.float32, **kw)

def test_old_rows_stay_bit_equal(towns):
    "Through a join that changes codes, and with new identities before and after"
    model = tiny_model(towns[0])
    kept = choose_exemplars(towns[0], 5)
    learn = next_learner(model, towns[1], [kept])
    names,w = class_names(learn.dls),learn.model.head.classifier.weight
    assert len(names)==13 and len(set(names))==13 and sum(o.startswith('harbour') for o in names)==5
    for i,name in enumerate(names):
        if name in model.pid_names: assert torch.equal(w[i], model.head.classifier.weight[model.pid_names.index(name)])
    assert sum(o in model.pid_names for o in names)==5
    body = model.state_dict()
    assert all(torch.equal(v, body[k]) for k,v in learn.model.state_dict().items() if 'classifier' not in k)
    assert learn.model.recipe['n_pids']==13 and learn.model is not model

def test_new_rows_follow_the_seed(towns):
    model = tiny_model(towns[0])
    a,b,c = (next_learner(model, towns[1], seed=o).model.head.classifier.weight for o in (0,0,1))
    assert torch.equal(a, b) and not torch.equal(a, c)

def test_names_through_three_cities(towns, tmp_path):
    "What was learnt second is found again in the third round, from a checkpoint too"
    model = tiny_model(towns[0])
    learn = next_learner(model, towns[1], [choose_exemplars(towns[0], 4)])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    learn.save_reid(tmp_path/'two.pt')
    again = load_reid(tmp_path/'two.pt', reid_model(TinyNet, 12))
    third = replace(towns[1].rename('third'), train=towns[1].train.assign(dsetid='third'))
    memory = [choose_exemplars(o, 3, seed=3) for o in (towns[1],towns[0])]
    last = next_learner(again, third, memory, share=.5)
    taken = [o for o in class_names(last.dls) if o in again.pid_names]
    assert sum(o.startswith('hill') for o in taken)==3
    rows = last.model.head.classifier.weight
    for o in taken: assert torch.equal(rows[class_names(last.dls).index(o)], again.head.classifier.weight[again.pid_names.index(o)])

@pytest.mark.parametrize('share,n', [(.25,1),(.5,2),(.75,3)])
def test_share_of_exemplars(towns, share, n):
    learn = next_learner(tiny_model(towns[0]), towns[1], [choose_exemplars(towns[0], 8)], share=share)
    old = learn.dls.train.dataset.dsetid[learn.dls.train.plan]=='harbour'
    assert (old.sum(1)==2*n).all()

def test_lifelong_bad_input(towns, tmp_path):
    model,kept = tiny_model(towns[0]),choose_exemplars(towns[0], 4)
    with pytest.raises(ValueError, match="both sets hold"): next_learner(model, towns[0], [kept])
    with pytest.raises(ValueError, match='expected a list'): next_learner(model, towns[1], kept)
    for o in (0,1,-.1,2):
        with pytest.raises(ValueError, match='share'): next_learner(model, towns[1], [kept], share=o)
    paths = kept.train.path.copy()
    paths[2] = str(tmp_path/'gone.jpg')
    with pytest.raises(FileNotFoundError, match="1 of 8 exemplars of 'harbour'.*gone.jpg"):
        next_learner(model, towns[1], [replace(kept, train=kept.train.assign(path=paths))])
    (tmp_path/'broken.jpg').write_bytes(b'\xff\xd8\xff')
    paths[2] = str(tmp_path/'broken.jpg')
    with pytest.raises(ValueError, match='1 of 8 exemplars'): next_learner(model, towns[1], [replace(kept, train=kept.train.assign(path=paths))])

@pytest.mark.parametrize('term', [PKT(), RelationalKD(), SimilarityKD()], ids=lambda o: type(o).__name__)
def test_relations_cost_nothing_when_nothing_changed(towns, term):
    "The relations of a copy are those of the model; those of another are not"
    model,other = tiny_model(towns[0]).eval(),tiny_model(towns[0], 1).eval()
    x = torch.rand(12, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    out,copied,strange = (o.outputs(x) for o in (model, deepcopy(model), other))
    same,changed = term(copied, out),term(strange, out)
    assert same.abs()<1e-6 and changed>10*same.abs()

## Averages

def test_average_of_models(towns):
    a,b = tiny_model(towns[0]),tiny_model(towns[0], 1)
    b.backbone[1].running_mean.fill_(4.)
    b.backbone[1].num_batches_tracked.fill_(7)
    mid,was = average_models(a, b, .25),deepcopy(b.state_dict())
    for k,v in mid.state_dict().items():
        if 'classifier' in k: assert torch.equal(v, b.state_dict()[k])
        elif v.is_floating_point(): assert torch.allclose(v, .75*a.state_dict()[k]+.25*b.state_dict()[k], atol=1e-6)
    assert all(torch.equal(v, was[k]) for k,v in b.state_dict().items())
    for share,of in ((0,a),(1,b)):
        ends = average_models(a, b, share).state_dict()
        assert all(torch.allclose(ends[k], v, atol=1e-6) for k,v in of.state_dict().items() if v.is_floating_point() and 'classifier' not in k)

def test_average_across_cities(towns):
    "Classifiers of two sizes do not matter"
    a = tiny_model(towns[0])
    b = with_more_classes(a, tiny_dls(replace(towns[1], train=towns[1].train[towns[1].train.pid<6].reset_index(drop=True))))
    assert len(average_models(a, b).head.classifier.weight)==len(b.head.classifier.weight)<8

def test_average_refuses_strangers(towns):
    a = tiny_model(towns[0])
    for o in (reid_model(TinyNet, 8, head=lambda n,p: ReductionHead(n, p, 4)), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match='one architecture'): average_models(o, a)
    with pytest.raises(ValueError, match='share'): average_models(a, a, 1.5)

## Scores

@pytest.mark.parametrize('seed', range(5))
def test_scores_against_loops(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 6))
    names,R,b = list('abcdef'[:n]),rng.random((n,n)),rng.random(n)
    found = lifelong_scores(pd.DataFrame(R, names, names), pd.Series(b, names))
    for j in range(n):
        assert found.learnt.iloc[j]==R[j,j] and found['last'].iloc[j]==R[-1,j]
        if j<n-1: assert np.isclose(found.forgotten.iloc[j], max(R[i,j] for i in range(n-1))-R[-1,j])
        if j: assert np.isclose(found.forward.iloc[j], R[j-1,j]-b[j])
    assert np.isnan(found.forgotten.iloc[-1]) and np.isnan(found.forward.iloc[0])

def test_scores_of_a_model_that_stays():
    "A model that does not change forgets nothing"
    same = pd.DataFrame(np.tile([.5,.4,.3], (3,1)), columns=list('abc'))
    assert lifelong_scores(same).forgotten[:2].tolist()==[0,0] and 'forward' not in lifelong_scores(same)
    shuffled = pd.Series(dict(c=.1, a=.2, b=.3))
    assert np.allclose(lifelong_scores(same, shuffled).forward[1:], [.1,.2])

def test_scores_bad_input():
    for o in (np.zeros((2,3)), np.zeros((1,1))):
        with pytest.raises(ValueError, match='one model for each city'): lifelong_scores(pd.DataFrame(o))
    with pytest.raises(ValueError, match='no score of b'): lifelong_scores(pd.DataFrame(np.zeros((2,2)), columns=list('ab')), pd.Series(dict(a=1)))
