"The toy set: repeatable, independent of its size, complete or absent"
from pathlib import Path
import numpy as np, pytest
from fastreid_nb.data.toy import toy_camera, toy_person, toy_photo, toy_reid

def test_counts_and_layout(tmp_path):
    data = toy_reid(tmp_path, n_ids=8, n_cams=3, n_per_cam=3, progress=False)
    assert data.summary().images.tolist()==[54,6,12] and data.summary().cameras.tolist()==[3,3,3]
    assert data.protocol=='market' and Path(data.query.path[0]).name=='0007_c1s1_000000_00.jpg'
    assert not set(data.train.pid) & set(data.query.pid)

def test_written_once(tmp_path):
    a = toy_reid(tmp_path, n_ids=4, progress=False)
    stamp = Path(a.train.path[0]).stat().st_mtime_ns
    b = toy_reid(tmp_path, n_ids=4, progress=False)
    assert Path(b.train.path[0]).stat().st_mtime_ns==stamp and len(list(tmp_path.iterdir()))==1
    assert toy_reid(tmp_path, n_ids=4, seed=1, progress=False).train.path[0]!=a.train.path[0]

def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    from fastreid_nb.data import toy
    def boom(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(toy, 'toy_photo', boom)
    with pytest.raises(KeyboardInterrupt): toy_reid(tmp_path, n_ids=4, progress=False)
    assert list(tmp_path.iterdir())==[]

def test_pictures_do_not_depend_on_the_set(tmp_path):
    "A larger set contains the same pictures"
    small,large = (toy_reid(tmp_path, n_ids=n, n_cams=c, test_frac=t, progress=False) for n,c,t in ((4,2,.25), (8,3,.25)))
    names = {Path(o).name:o for o in large.train.path}
    for f in small.train.path: assert Path(f).read_bytes()==Path(names[Path(f).name]).read_bytes()

@pytest.mark.parametrize('kw', [dict(n_ids=3), dict(n_ids=10000), dict(n_cams=1), dict(n_cams=10), dict(n_per_cam=1), dict(test_frac=0), dict(test_frac=1)])
def test_bad_arguments(tmp_path, kw):
    with pytest.raises(ValueError, match='expected'): toy_reid(tmp_path, progress=False, **kw)
    assert list(tmp_path.iterdir())==[]

def test_occlusion_knob():
    "With the same seeds, an obstacle changes pictures and its absence does not"
    p,c = toy_person(np.random.default_rng(0)),toy_camera(np.random.default_rng(0))
    a,b = ([toy_photo(p, c, np.random.default_rng(i), occlusion=o) for i in range(20)] for o in (0,1))
    diff = [np.abs(np.asarray(x,float)-np.asarray(y,float)).mean() for x,y in zip(a,b)]
    assert sum(d>2 for d in diff)>15
