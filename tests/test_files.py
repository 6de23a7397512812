"Files: whole or not at all, read without running, filled completely or left alone"
import argparse, copy, datetime, os

import numpy as np, pytest, torch
from torch import nn

from fastreid_nb.backbone.weights import as_state, download_weights, fill_network, load_backbone
from fastreid_nb.data.files import atomic_path, check_choice, read_torch

def a_net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

def values(net): return {k:v.clone() for k,v in net.state_dict().items()}

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def test_atomic_path_keeps_the_old_file(tmp_path):
    f = tmp_path/'a.txt'
    f.write_text('old')
    with pytest.raises(KeyboardInterrupt), atomic_path(f) as part:
        part.write_text('ne')
        raise KeyboardInterrupt
    assert f.read_text()=='old' and os.listdir(tmp_path)==['a.txt']

@pytest.mark.parametrize('extra', [np.float64(.5), np.float32(.5), np.int64(3), np.bool_(True), np.arange(5), np.zeros((2,3), dtype=np.float16), {'x':np.array('text')}])
def test_numpy_is_read(tmp_path, extra):
    torch.save(dict(model=torch.ones(2), extra=extra), tmp_path/'o.pth')
    got = read_torch(tmp_path/'o.pth')['extra']
    assert np.array_equal(np.asarray(got['x'] if isinstance(got, dict) else got), np.asarray(extra['x'] if isinstance(extra, dict) else extra))

def test_the_old_format_is_read(tmp_path):
    torch.save(dict(a=torch.arange(3), s=np.float64(2)), tmp_path/'o.pth', _use_new_zipfile_serialization=False)
    got = read_torch(tmp_path/'o.pth')
    assert got['a'].tolist()==[0,1,2] and got['s']==2

@pytest.mark.parametrize('bad', [argparse.Namespace(a=1), datetime.datetime(2020, 1, 1), os.getcwd])
def test_objects_are_refused_with_a_way_out(tmp_path, bad):
    torch.save(dict(model=torch.ones(2), args=bad), tmp_path/'o.pth')
    with pytest.raises(ValueError, match='would run code') as e: read_torch(tmp_path/'o.pth')
    assert 'weights_only=False' in str(e.value) and 'new_path' in str(e.value)

@pytest.mark.parametrize('content', [b'', b'hello', b'PK\x03\x04 not really', bytes(range(256))*40])
def test_other_files_are_named(tmp_path, content):
    (tmp_path/'o.pth').write_bytes(content)
    with pytest.raises(ValueError, match=r'o\.pth is not a readable file of weights'): read_torch(tmp_path/'o.pth')

def test_a_large_truncated_file_is_refused_at_once(tmp_path):
    "Two gigabytes, all but the beginning missing: sparse, so it costs no disk"
    torch.save(dict(w=torch.zeros(1000)), tmp_path/'o.pth')
    with open(tmp_path/'o.pth', 'r+b') as f: f.truncate(1000)
    with open(tmp_path/'o.pth', 'r+b') as f: f.truncate(2*1024**3)
    with pytest.raises(ValueError, match='2,147,483,648 bytes'): read_torch(tmp_path/'o.pth')

@pytest.mark.parametrize('change,match', [(lambda s: s|{'x':torch.zeros(1)}, r"not in the network: 1, such as \['x'\]"), (lambda s: s|{'0.bias':torch.zeros(1,4)}, 'other shapes'),
    (lambda s: {k:v for k,v in s.items() if k!='1.running_mean'}, 'missing in the file: 1'), (lambda s: s|{'1.running_var':torch.full((4,), torch.inf)}, 'NaN or infinity'),
    (lambda s: {}, 'no plain dictionary'), (lambda s: s|{'note':'text'}, 'no plain dictionary'), (lambda s: [s], r"no plain dictionary of tensors, because of \['list'\]")])
def test_fill_loads_all_or_nothing(change, match):
    net,good = a_net(),a_net().state_dict()
    before = values(net)
    with pytest.raises(ValueError, match=match): fill_network(net, change(good), 'file.pth')
    assert same(values(net), before)
    assert fill_network(net, good)==[] and same(values(net), good)

def test_fill_names_what_it_leaves_out():
    net,good = a_net(),a_net().state_dict()
    assert fill_network(net, good|{'fc.bias':torch.zeros(2), 'head.x':torch.zeros(1)}, ignore=('fc.','head.'))==['fc.bias','head.x']
    with pytest.raises(ValueError, match=r"\['fc.bias'\]"): fill_network(net, good|{'fc.bias':torch.zeros(2)}, ignore=())

def test_fill_takes_other_precision_and_no_counters():
    net,good = a_net(),a_net().state_dict()
    fill_network(net, {k:v.half() for k,v in good.items() if not k.endswith('tracked')})
    torch.testing.assert_close(net[0].weight.data, good['0.weight'].half().float())

def test_fill_leaves_what_is_new():
    net = nn.ModuleDict(dict(a=nn.Linear(2, 2), NL_2=nn.Linear(2, 2)))
    before = copy.deepcopy(net.NL_2.weight.data)
    fill_network(net, {f'a.{k}':v for k,v in nn.Linear(2, 2).state_dict().items()}, new=('NL_',))
    assert torch.equal(net.NL_2.weight.data, before)

def test_load_backbone_asks_for_the_address_only_if_needed(tmp_path):
    def url(): pytest.fail('no address is needed')
    torch.save(a_net().state_dict(), tmp_path/'o.pth')
    assert load_backbone(a_net(), False, url) and load_backbone(a_net(), str(tmp_path/'o.pth'), url)
    with pytest.raises(FileNotFoundError, match='nowhere'): load_backbone(a_net(), 'nowhere.pth')

def test_load_backbone_takes_an_address(tmp_path, monkeypatch):
    asked = []
    torch.save(a_net().state_dict(), tmp_path/'o.pth')
    monkeypatch.setattr('fastreid_nb.backbone.weights.download_weights', lambda url: asked.append(url) or tmp_path/'o.pth')
    for pretrained in (True, 'https://b'): load_backbone(a_net(), pretrained, 'https://a')
    assert asked==['https://a', 'https://b']

@pytest.mark.parametrize('wrap', [lambda o: o, lambda o: dict(model=dict(state_dict=o)), lambda o: dict(net={f'module._orig_mod.{k}':v for k,v in o.items()}, n_averaged=3)])
def test_wrappings_are_taken_off(wrap):
    good = a_net().state_dict()
    assert as_state(wrap(good)).keys()==good.keys()

@pytest.mark.parametrize('name,checksum', [('net-0123abcd.pth','0123abcd'), ('net.pth',None), ('net-large.pth',None)])
def test_checksums(tmp_path, monkeypatch, name, checksum):
    seen = []
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, dst, hash_prefix: seen.append(hash_prefix))
    assert download_weights(f'https://example.com/{name}').name==name and seen==[checksum]

def test_small_helpers():
    assert check_choice('a', 1, (1,2))==1 and as_state({'a':torch.zeros(1)}).keys()=={'a'}
    with pytest.raises(ValueError, match=r'a=3: choose one of \[1, 2\]'): check_choice('a', 3, (1,2))

def test_fill_keeps_the_names_of_a_network_called_module():
    "Wrappings are taken off files, not off networks that have such a part"
    net = nn.ModuleDict(dict(module=nn.Linear(2, 2)))
    want = copy.deepcopy(net).state_dict()
    assert fill_network(net, {k:v+1 for k,v in want.items()})==[] and torch.equal(net.module.weight.data, want['module.weight']+1)
