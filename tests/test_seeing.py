"Seeing: ranked lists, pages, activation maps, confusions, suspicious labels, poor queries, and the report in a browser"
import json, pickle, re, shutil, subprocess
from dataclasses import replace
from functools import partial

import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from PIL import Image
from PIL.PdfParser import PdfParser
from torch import nn

from fastreid_nb.backbone.osnet import osnet
from fastreid_nb.backbone.vit import ViT
from fastreid_nb.data.own import from_csv
from fastreid_nb.data.toy import toy_reid
from fastreid_nb.eval import results   # methods of a result; chkstyle: ignore
from fastreid_nb.eval.core import ReIDResult, rank_dist
from fastreid_nb.eval.features import Features, evaluate
from fastreid_nb.eval.floors import features_from, raw_pixels
from fastreid_nb.eval.inference import evaluate_data
from fastreid_nb.eval.maps import activation_maps, overlay, pair_maps, part_maps
from fastreid_nb.eval.pages import rank_unlabelled
from fastreid_nb.eval.quality import filter_queries, image_quality, reject_curve
from fastreid_nb.eval.ranklist import list_hits, match_hits, pick_queries
from fastreid_nb.eval.report import compare_report
from fastreid_nb.eval.suspects import find_suspects, fold_suspects, plant_errors
from fastreid_nb.heads.ensemble import Ensemble
from fastreid_nb.heads.model import reid_model
from fastreid_nb.heads.parts import pcb
from fastreid_nb.heads.transreid import transreid
from fastreid_nb.pooling.core import GlobalAvgPool
from fastreid_nb.recipes.cli import reid_main
from fastreid_nb.train.checkpoint import save_reid
from fastreid_nb.data.preproc import Preproc
from random_tables import tables
from tiny_models import TinyNet

@pytest.fixture(scope='module')
def toy(tmp_path_factory): return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=16, test_frac=.5, size=(48,24), progress=False)

@pytest.fixture(scope='module')
def res(toy): return evaluate(*[features_from(raw_pixels, o) for o in (toy.query,toy.gallery)])

@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return reid_model(TinyNet(), 0, GlobalAvgPool, preproc=Preproc((48,24))).eval()

@pytest.fixture(autouse=True)
def no_figures():
    yield
    plt.close('all')

# ---- lists

@pytest.mark.parametrize('levels', [None,6])
def test_hits_vs_loop(levels):
    "Lists with junk in its place, and the matches hardest first, against a plain loop; with ties too"
    rng = np.random.default_rng(0)
    q,g = tables(rng)
    dist = rng.random((30,90))
    if levels: dist = (dist*levels).astype(int)/levels
    res = rank_dist(dist, q, g, 'market')
    rows = np.flatnonzero(res.used).tolist()
    for row,hits,hard in zip(rows, list_hits(res, rows, 90, junk=True), match_hits(res, rows, 99)):
        rank,want = 0,[]
        for j in np.lexsort((np.arange(90), dist[row])):
            same,own = g.pid[j]==q.pid[row],g.camid[j]==q.camid[row]
            junk = same and own
            rank += not junk
            want.append((int(j), 0 if junk else rank, '–' if junk else '✓' if same else '✗'))
        assert [(o.j,o.rank,o.mark) for o in hits]==want
        assert [(o.j,o.rank) for o in hard]==[(j,r) for j,r,m in want if m=='✓'][::-1]

def test_hits_of_a_copy():
    "A result that comes out of a file knows the matches within its lists, and that the others come later"
    q,g = tables(np.random.default_rng(1))
    res = rank_dist(np.random.default_rng(1).random((30,90)), q, g, 'market', max_rank=20)
    rows = np.flatnonzero(res.used).tolist()
    full = match_hits(res, rows, 99)
    res.top
    copy = pickle.loads(pickle.dumps(res))
    for a,b in zip(full, match_hits(copy, rows, 99)):
        assert len(a)==len(b) and [o.j for o in b if o.rank<=20]==[o.j for o in a if o.rank<=20]
        assert all(np.isnan(o.dist) and o.rank==21 for o in b if o.rank>20)
    with pytest.raises(ValueError, match='evaluate again'): list_hits(copy, rows, 5, junk=True)

def test_orders(res):
    res.q['age'] = np.arange(len(res.q))[::-1].astype(float)
    assert pick_queries(res, 3, 'age').tolist()==[31,30,29] and pick_queries(res, 2, '-age').tolist()==[0,1]
    res.q.loc[31,'age'] = np.nan
    assert pick_queries(res, 3, 'age')[0]==30 and 'smallest first' in res.show_ranks(1, 'age', k=2).get_suptitle()
    with pytest.raises(ValueError, match='unknown order'): res.show_ranks(1, '-nothing')

def test_matches_row_and_lost_files(toy, res, tmp_path):
    "A second row with the matches; a file that is gone is a grey tile with its path"
    lost = ReIDResult(**{**vars(res), 'g':res.g.assign(path='gone/<b>.jpg')})
    fig = lost.show_ranks(1, k=2, matches=True, save=tmp_path/'a.png')
    assert 'hardest first' in ''.join(o.get_text() for ax in fig.axes for o in ax.texts)
    tiles = [o for ax in fig.axes for o in ax.texts if 'gone' in o.get_text()]
    assert len(tiles)>=3 and Image.open(tmp_path/'a.png').size[0]>0

def test_pages(res, tmp_path):
    "Every query once; a folder and a PDF have as many pages; positions in the PDF are right"
    pdf = res.save_pages(tmp_path/'new'/'all.pdf', k=3, per_page=5)
    folder = res.save_pages(tmp_path/'pages', k=3, per_page=5)
    assert len(PdfParser(str(pdf)).pages)==len(list(folder.glob('*.jpg')))==-(-res.n_used//5)
    raw = pdf.read_bytes()
    at = [int(o) for o in re.findall(rb'(\d{10}) 00000 n', raw)]
    assert all(raw[o:].startswith(f'{i} 0 obj'.encode()) for i,o in enumerate(at, 1)) and at
    with pytest.raises(ValueError, match='holds pages already'): res.save_pages(folder)
    with pytest.raises(OSError): res.save_pages(pdf/'b.pdf', n=1)
    assert {o.name for o in tmp_path.iterdir()}=={'new','pages'}

def test_unlabelled(toy, tmp_path):
    f = features_from(raw_pixels, toy.query)
    res = rank_unlabelled(Features(f.emb, f.df.drop(columns='pid')))
    top,dist = res.lists(np.arange(len(f)), 3)
    assert not (top==np.arange(len(f))[:,None]).any() and (np.diff(dist, axis=1)>=0).all()
    assert np.allclose(res.q.nearest, dist[:,0]) and 'without labels' in repr(res)
    fig = res.show_ranks(2, k=3)
    assert all('✓' not in o.get_xlabel() and '✗' not in o.get_xlabel() for o in fig.axes)
    with pytest.raises(ValueError, match='nobody knows'): res.show_ranks(order='worst')
    res.save_pages(tmp_path/'a.pdf', n=3)

# ---- maps

def plain(net, **kwargs): return reid_model(net, 0, GlobalAvgPool, test_on='feat', preproc=Preproc((64,32)), **kwargs).eval()

class Net(nn.Sequential):
    n_feat,total_stride = 16,8

def small_cnn():
    torch.manual_seed(1)
    return plain(Net(nn.Conv2d(3,8,3,4,1), nn.ReLU(), nn.Conv2d(8,16,3,2,1), nn.ReLU()))

def small_vit(tokens):
    torch.manual_seed(0)
    return plain(ViT(dim=24, depth=2, heads=2, img_size=(64,32), tokens=tokens))

def covered(im, row, col):
    im = im.copy()
    im.paste((120,120,120), (col, row, col+16, row+16))
    return im

@pytest.fixture(scope='module')
def person(toy): return Image.open(toy.gallery.path[0]).convert('RGB').resize((32,64))

@pytest.mark.parametrize('make', [small_cnn, lambda: small_vit('patches'), lambda: small_vit('cls')], ids=['cnn','patches','cls'])
def test_pair_map_follows_the_occluder(make, person):
    "Where the map of a pair changes most lies under the square, wherever the square is"
    net,spots = make(),[(r,c) for r in (0,16,32,48) for c in (0,16)]
    first = pair_maps(net, person, person)[1][0]
    change = (pair_maps(net, [person]*8, [covered(person, *o) for o in spots])[1]-first).abs()
    cells = F.adaptive_avg_pool2d(change[:,None], (4,2))[:,0]
    assert [divmod(o.argmax().item(), 2) for o in cells]==[(r//16,c//16) for r,c in spots]

def test_shares_add_up(toy):
    "The shares of all positions add up to the cosine, in both images, also behind a neck with an offset"
    net = small_cnn().requires_grad_(False)   # frozen weights do not matter
    net.test_on = 'emb'
    net.head.neck.running_mean += .3
    a,b = toy.query.path[:5].tolist(),toy.gallery.path[:5].tolist()
    emb = [torch.cat([net(torch.stack([net.preproc.load(o)]).float()/255) for o in side]) for side in (a,b)]
    cos = F.cosine_similarity(*(o.as_subclass(torch.Tensor) for o in emb))
    for maps in pair_maps(net, a, b, bs=2): assert torch.allclose(maps.sum((1,2)), cos, atol=1e-5)

@pytest.mark.parametrize('kind', ['norm','gradcam','product'])
def test_map_shapes(kind, model, toy):
    paths = toy.query.path[:3].tolist()
    assert activation_maps(model, paths, kind).shape==(3,12,6)
    assert activation_maps(model, paths, kind, bs=2).isfinite().all()
    assert [o.shape for o in pair_maps(model, paths, paths, kind)]==[(3,12,6)]*2
    assert overlay(Image.new('RGB', (1,1)), torch.zeros(2,2)).size==(1,1)

def test_maps_of_part_models(person):
    torch.manual_seed(0)
    strips = pcb(TinyNet(), n_parts=4, n_emb=4, preproc=Preproc((64,32))).eval()
    heard = part_maps(strips, person).abs().sum(2)
    assert (heard.argmax(1)//4).tolist()==[0,1,2,3]
    hands = transreid('deit_tiny', img_size=(64,32), stride=16).eval()
    assert part_maps(hands, person).shape==(5,4,2) and activation_maps(hands, person, 'product').shape==(1,4,2)
    assert part_maps(small_cnn(), person).shape[0]==1

def test_maps_refuse(model, person):
    for bad in (nn.Flatten(), Ensemble([model,model])):
        with pytest.raises(ValueError, match='no feature map'): activation_maps(bad, person, preproc=Preproc((48,24)))
    with pytest.raises(ValueError, match='expected as many'): pair_maps(model, [person], [])
    with pytest.raises(ValueError, match='kind'): part_maps(model, person, 'norm')
    assert not model._forward_hooks and not model.backbone._forward_hooks

# ---- confusions

def test_confusions_vs_loop():
    rng = np.random.default_rng(3)
    q,g = tables(rng)
    dist = rng.random((30,90))
    res = rank_dist(dist, q, g, 'market')
    votes,counts = {},np.zeros(90, int)
    for row in np.flatnonzero(res.used):
        top = res.lists([row], 10)[0][0]
        counts[top] += 1
        for j in top[:res.first_match[row]-1]: votes.setdefault(tuple(sorted((q.pid[row],g.pid[j]))), []).append(row)
    table = res.confusing_pairs().set_index(['a','b'])
    assert {k:(len(set(v)),len(v)) for k,v in votes.items()}=={k:(o.queries,o.votes) for k,o in table.iterrows()}
    assert (res.hubs()['count'].sort_index()==counts).all()
    for o in table.itertuples(): assert o.dist==pytest.approx(dist[o.query,o.found], abs=1e-6)

# ---- suspects

def clouds(rng, n_ids=30, n=6, width=16, noise=.25):
    centres = rng.normal(size=(n_ids,width))
    df = pd.DataFrame(dict(pid=np.arange(n_ids).repeat(n), path=[f'{i}.jpg' for i in range(n_ids*n)], camid=0))
    return (centres.repeat(n, 0)+noise*rng.normal(size=(n_ids*n,width))).astype(np.float32),df

@pytest.mark.parametrize('seed', range(3))
def test_planted_labels_come_first(seed):
    emb,df = clouds(np.random.default_rng(seed))
    wrong,planted = plant_errors(df, .05, seed)
    found = find_suspects(Features(emb, wrong)).images
    top = found.index[:len(planted)]
    assert set(top)==set(planted) and (found.suggested[top]==df.pid[top]).all()

def test_pairs_and_splits():
    emb,df = clouds(np.random.default_rng(0))
    df.loc[3:5,'pid'] = 77       # one person, two labels
    df.loc[df.pid==11,'pid'] = 10   # two people, one label
    found = find_suspects(Features(emb, df))
    assert set(found.pairs.loc[0,['a','b']])=={0,77} and found.splits.pid[0]==10
    assert sorted(found.splits.rows[0]) in (list(range(60,66)), list(range(66,72)))
    assert 'one person: 1' in repr(found) and 'two people: 1' in repr(found)

def test_folds_do_not_judge_what_they_learn(toy):
    "Every image is judged once, by a network that was not given it; tracks stay together"
    df,given = toy.train.assign(trackid=np.arange(len(toy.train))//2),[]
    class Means(nn.Module):
        preproc = Preproc((8,4))
        def forward(self, x): return x.flatten(1)
    def fit(table):
        given.append(set(table.path))
        return Means()
    found = fold_suspects(df, fit, 3, num_workers=0, seed=2)
    left_out = [set(df.path)-o for o in given]
    assert len(given)==3 and set.union(*left_out)==set(df.path) and sum(map(len, left_out))==len(df)
    for o in left_out: assert not set(df.trackid[df.path.isin(o)]) & set(df.trackid[~df.path.isin(o)])
    assert found.images.suspicion.notna().all() and len(found.images)==len(df)

def test_labels_come_back(toy, tmp_path):
    "What is corrected in the file is what `from_csv` reads; names with commas and quotes survive"
    name = 'a, "b" <i>'
    df = toy.train.assign(pid_name=[name if o==toy.train.pid[0] else f'p{o}' for o in toy.train.pid])
    found = find_suspects(features_from(raw_pixels, df))
    path = found.to_csv(tmp_path/'new'/'labels.csv')
    back = from_csv(path).train.set_index('path')
    assert (back.pid_name[df.path].to_numpy()==df.pid_name.to_numpy()).all() and name in set(back.pid_name)
    table = pd.read_csv(path, dtype=str)
    table.loc[0,'pid'] = 'somebody else'
    table.iloc[:-1].to_csv(path, index=False)
    again = from_csv(path).train
    assert len(again)==len(df)-1 and again.pid_name.eq('somebody else').sum()==1

def test_suspects_refuse():
    emb,df = clouds(np.random.default_rng(0), 2, 1)
    assert '2 images have no other image' in repr(find_suspects(Features(emb, df)))
    with pytest.raises(ValueError, match='two or more'): find_suspects(Features(emb[:1], df[:1]))
    with pytest.raises(ValueError, match='n_folds'): fold_suspects(df, None, 1)

# ---- quality

def test_reject_curve_vs_loop(res):
    rng = np.random.default_rng(0)
    quality = rng.random(len(res.q))
    curve = reject_curve(res, quality)
    order = np.argsort(quality[res.used])
    errors = 1-res.ap[res.used]
    want = [errors[order[r:]].mean() for r in range(len(order))]
    assert np.allclose(curve.errors, want) and curve.area==pytest.approx(np.mean(want))
    assert (np.diff(curve.best)<=1e-12).all() and reject_curve(res, res.ap).gain==pytest.approx(1)

@pytest.mark.parametrize('share', [0,.1,.5,.99])
def test_filter_adds_up(res, share):
    quality = np.random.default_rng(1).random(len(res.q))
    f = filter_queries(res, quality, share)
    right = res.first_match==1
    assert f.scores.queries['kept']+f.scores.queries['turned away']==res.n_used
    assert f.lost==pytest.approx((right & ~f.keep & res.used).sum()/max(1, (right & res.used).sum()))
    assert (quality[f.keep]>=f.threshold).all() and (quality[res.used & ~f.keep]<f.threshold).all()

def test_dark_and_covered_have_low_quality(model, toy, tmp_path):
    df = toy.query[:12].copy()
    for i in range(4):
        im = Image.open(df.path[i]).point(lambda v: v//16)
        im.save(tmp_path/f'{i}.png')
        df.loc[i,'path'] = str(tmp_path/f'{i}.png')
    Image.new('RGB', (1,1)).save(tmp_path/'dot.png')
    df.loc[4,'path'],df.loc[5,'path'] = str(tmp_path/'dot.png'),'gone.jpg'
    q = image_quality(df, model)
    assert q.quality[:5].mean()<q.quality[6:].mean()-.05 and q.brightness[:4].max()<q.brightness[6:].min()
    assert q.quality[5]==0 and q.drop(5).notna().all().all()
    assert list(image_quality(df))==['sharpness','size','brightness','quality']

# ---- the report

def browser(): return next(filter(None, map(shutil.which, ('chromium','chromium-browser','google-chrome','chrome'))), None)

look = '''<script>window.addEventListener('load',()=>setTimeout(()=>{const s=document.getElementById('slider'),r={};
const texts=()=>document.getElementById('ranked').innerText,first=texts();r.n=+s.max+1;
s.value=s.max;s.dispatchEvent(new Event('input'));r.moved=texts()!==first;r.said=s.getAttribute('aria-valuetext');
document.getElementById('back').click();r.back=+s.value;
setTimeout(()=>{const im=[...document.images];r.images=im.length;r.shown=im.filter(o=>o.naturalWidth>0).length;
r.alts=im.every(o=>o.alt);r.wide=document.documentElement.scrollWidth<=innerWidth+1;
document.title='RESULT'+JSON.stringify(r)},300)},100))</script>'''

@pytest.fixture(scope='module')
def hostile(toy, model, tmp_path_factory):
    "A report of data whose names want to be HTML"
    bad = '"><img src=x onerror=alert(1)><script>document.title="hacked"</script>'
    data = replace(toy, query=toy.query.assign(pid_name=[f'{bad}{o}' for o in toy.query.pid]),
        gallery=toy.gallery.assign(pid_name=[f'{bad}{o}' for o in toy.gallery.pid], cam_name=toy.gallery.camid.map(lambda o: f'{bad}{o}')))
    res = evaluate_data(model, data, num_workers=0, progress=False)
    return res,res.report(tmp_path_factory.mktemp('report')/'r.html', model, title=bad, n=12, k=5, worst=3)

def test_report_is_complete(hostile):
    res,path = hostile
    page = path.read_text(encoding='utf-8')
    assert page.count('<section')==9 and 'Not here' not in page
    assert not re.search(r'(src|href)=["\']?(https?:)?//', page) and '<img src=x' not in page and page.count('<script')==2
    data = json.loads(re.search(r'id=data>(.*?)</script>', page, re.S)[1])
    assert len(data['lists'])==12 and [o['ap'] for o in data['lists']]==sorted(o['ap'] for o in data['lists'])
    for o in data['lists']: assert o['ap']==pytest.approx(res.ap[o['row']], abs=1e-4)

@pytest.mark.parametrize('width', [360, pytest.param(1000, marks=pytest.mark.slow)])
def test_report_in_a_browser(hostile, tmp_path, width):
    "No errors, the slider moves, every image is shown and described, and nothing sticks out"
    if browser() is None: pytest.skip('no Chromium or Chrome here')
    page = tmp_path/'page.html'
    page.write_text(hostile[1].read_text(encoding='utf-8').replace('</body>', look+'</body>'), encoding='utf-8')
    words = ['--headless=new', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', f'--window-size={width},900',
        '--virtual-time-budget=4000', '--dump-dom', page.as_uri()]
    out = subprocess.run([browser(), *words], capture_output=True, encoding='utf-8', timeout=60)
    assert 'CONSOLE' not in out.stderr, out.stderr
    found = json.loads(re.search(r'<title>RESULT(.*?)</title>', out.stdout)[1].replace('&quot;', '"'))
    assert found['n']==12 and found['moved'] and found['back']==10 and 'list 12 of 12' in found['said']
    assert found['shown']==found['images']>30 and found['alts'] and found['wide']

def test_report_of_little(res, tmp_path):
    "Out of a file, without images, with one query: what is missing is said"
    copy = ReIDResult.load(res.save(tmp_path/'r.json', k=5))
    copy.g = copy.g.assign(path='gone.jpg')
    page = copy.report(tmp_path/'r.html', k=5).read_text()
    assert page.count('Not here')==5 and 'gone.jpg' in page
    one = rank_dist([[.1,.2]], dict(pid=[0], camid=[0]), dict(pid=[0,1], camid=[1,1]))
    page = one.report(tmp_path).read_text()
    assert 'no interval' in page and 'no column `path`' in page and (tmp_path/'report.html').exists()
    with pytest.raises(OSError): res.report(tmp_path/'r.json'/'x.html')
    with pytest.raises(ValueError, match='max_mb'): res.report(tmp_path/'x.html', max_mb=.1)
    assert not (tmp_path/'x.html').exists() and not list(tmp_path.glob('*.try'))

@pytest.mark.slow
def test_report_stays_small(res, tmp_path, monkeypatch):
    "Lists stop where the file would grow too large, and not all are compared with all where that takes long"
    monkeypatch.setattr('fastreid_nb.eval.report._most_judged', 10)
    page = res.report(tmp_path/'a.html', max_mb=.5)
    assert page.stat().st_size<.5e6 and 'call find_suspects yourself' in page.read_text()

def test_compare_report(res, toy, tmp_path):
    other = evaluate(*(Features(torch.rand(len(o), 4, generator=torch.Generator().manual_seed(i)), o) for i,o in enumerate((toy.query,toy.gallery))))
    page = compare_report(other, res, tmp_path/'c.html', ('<b>luck','pixels'), n=3, k=4).read_text()
    assert '<b>luck' not in page and page.count('<h3>')==6
    gain = res.ap-other.ap
    best = int(np.nanargmax(gain))
    assert page.index(f'Query {best}:')<page.index('Better with &lt;b&gt;luck</h2>')
    with pytest.raises(ValueError, match='same queries'): compare_report(rank_dist(torch.rand(2,len(res.g)), res.q[:2], res.g), res, tmp_path/'d.html')

@pytest.mark.slow
def test_commands(toy, tmp_path, capsys):
    "`reid eval --report` and `reid compare` leave pages, and say where"
    model = reid_model(partial(osnet, width='x0_25'), 0, preproc=Preproc((64,32)))
    for name in 'ab': save_reid(tmp_path/name/'model.pt', model)
    root = toy.query.path[0].rsplit('/', 2)[0]
    words = ['--workers', '0', '--precision', 'float32', '--out', str(tmp_path/'o')]
    assert reid_main(['eval', str(tmp_path/'a/model.pt'), root, '--report', *words])==0
    assert reid_main(['compare', *(str(tmp_path/o/'model.pt') for o in 'ab'), root, *words])==0
    out = capsys.readouterr().out
    assert 'report.html' in out and 'compare.html' in out
    page = (tmp_path/'o'/'compare.html').read_text()
    assert '<h1>a and b</h1>' in page and '0 queries are better with b' in page
