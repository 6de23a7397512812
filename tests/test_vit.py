"Vision transformer: patches, attention, positions, cameras, weight files, and a whole model against the reference implementation"
import copy, math, pickle
from functools import partial

import numpy as np, pytest, torch, torch.nn.functional as F

from fastreid_nb.backbone.weights import fill_network
from fastreid_nb.backbone.vit import ViTAttention, ViTBlock, ViT, detect_vit, patch_grid, resize_pos_embed, side_info, _ignore, vit, vit_names
from fastreid_nb.heads.transreid import Jigsaw, deal_patches
from golden_files import close, golden_params, missing
from golden_models import golden_input, golden_state
from slow import slow_but

tiny = partial(ViT, dim=32, depth=2, heads=2, img_size=(64,32))
sizes = ('base','small','deit_tiny','deit_small','deit_base')

@pytest.mark.parametrize('path', golden_params('models/ViT*.keys.json', slow='ViT_base'))
def test_golden_map(path):
    if path is None: missing('models/ViT*.keys.json')
    z = np.load(path.with_name(path.name.replace('.keys.json', '.npz')))
    make,state = detect_vit({k.removeprefix('backbone.'):v for k,v in golden_state(path).items() if k.startswith('backbone.')})
    net = make().eval()
    assert fill_network(net, net.adapt(state))==[]
    mean,std = (torch.tensor(o).view(1, 3, 1, 1) for o in ((0.485,0.456,0.406), (0.229,0.224,0.225)))
    with torch.no_grad(): fmap = net((golden_input()-mean)/std)
    assert list(fmap.shape)==z['backbone_map_shape'].tolist()
    close(fmap.mean((2,3)), z['backbone_map_mean_hw'], rel=1e-4)
    close(fmap.flatten()[::61], z['backbone_map_every61'], rel=1e-4)

## Patches

@pytest.mark.parametrize('size', [(256,128), (224,224), (16,16), (37,100)])
@pytest.mark.parametrize('stride', [1,11,12,16,(8,16)])
def test_grid_counts_windows(size, stride):
    with torch.device('meta'): n = F.unfold(torch.zeros(1, 1, *size), 16, stride=stride).shape[-1]
    assert math.prod(patch_grid(size, stride))==n

@pytest.mark.parametrize('stride', [0,17,12.,(12,),(12,12,12),(12,32)])
def test_bad_strides(stride):
    with pytest.raises(ValueError, match='stride='): patch_grid((256,128), stride)

def test_picture_smaller_than_a_patch():
    with pytest.raises(ValueError, match='one patch'): vit('deit_tiny', img_size=(256,15))

@pytest.mark.parametrize('stride', [16,12,(8,16)])
def test_patches_keep_their_place(stride):
    "With blocks and positions silenced, the map is the projection of each patch, in its place"
    net = tiny(stride=stride, tokens='patches').eval()
    for n,p in net.named_parameters():
        if n=='pos_embed' or '.proj.' in n and n.startswith('blocks') or '.fc2.' in n: torch.nn.init.zeros_(p)
    x = torch.rand(2, 3, 64, 32)
    with torch.no_grad(): torch.testing.assert_close(net(x), net.norm(net.patch_embed(x).movedim(1, -1)).movedim(-1, 1))

## ViTAttention and blocks

@pytest.mark.parametrize('heads', [1,2,4])
@pytest.mark.parametrize('scale', [None,0.05])
def test_attention_is_the_formula(heads, scale):
    att,x = ViTAttention(16, heads, scale=scale),torch.randn(3, 7, 16)
    q,k,v = (o.view(3, 7, heads, -1).transpose(1, 2) for o in att.qkv(x).chunk(3, -1))
    table = (q@k.mT*(scale or (16//heads)**-0.5)).softmax(-1)
    torch.testing.assert_close(att(x), att.proj((table@v).transpose(1, 2).reshape(3, 7, 16)))

def test_heads_must_divide():
    with pytest.raises(ValueError, match='heads=5 must divide'): ViTAttention(16, 5)

def test_drop_path_grows_with_depth():
    net = ViT(dim=8, depth=5, heads=1, img_size=(16,16), drop_path=0.2)
    assert [round(b.drop_path.p, 6) for b in net.blocks]==[0,0.05,0.1,0.15,0.2]

def test_drop_path_only_in_training():
    torch.manual_seed(0)
    block,x = ViTBlock(8, 2, drop_path=0.9),torch.randn(16, 3, 8)
    assert (block(x)==x).all(-1).all(-1).any()
    assert not (block.eval()(x)==x).all(-1).all(-1).any()

## Positions

@pytest.mark.parametrize('mode', ['bilinear','bicubic'])
@pytest.mark.parametrize('old,new', [((14,14),(16,8)), ((16,8),(21,10)), ((5,7),(9,3))])
def test_resize_is_that_of_a_picture(old, new, mode):
    pos = torch.randn(1, 2+math.prod(old), 6)
    res = resize_pos_embed(pos, new, n_prefix=2, old=old, mode=mode)
    assert torch.equal(res[:,:2], pos[:,:2])
    want = F.interpolate(pos[:,2:].view(1, *old, 6).permute(0, 3, 1, 2), new, mode=mode, align_corners=False)
    torch.testing.assert_close(res[:,2:].view(*new, 6), want[0].permute(1, 2, 0))

def test_ramp_stays_a_ramp():
    ramp = torch.arange(14.).expand(14, 14).reshape(1, 196, 1)
    steps = resize_pos_embed(ramp, (16,28), n_prefix=0).view(16, 28).diff(dim=1)[:,4:-4]
    torch.testing.assert_close(steps, torch.full_like(steps, 0.5), atol=1e-4, rtol=0)

def test_equal_grid_is_untouched():
    pos = torch.randn(1, 129, 4)
    assert resize_pos_embed(pos, (16,8)) is pos and resize_pos_embed(pos, (16,8), old=(16,8)) is pos
    assert not torch.equal(resize_pos_embed(pos, (16,8), old=(8,16)), pos)

def test_unknown_grid_has_to_be_told():
    with pytest.raises(ValueError, match='128 positions.*24×8'): resize_pos_embed(torch.randn(1, 129, 4), (24,8))
    with pytest.raises(ValueError, match='makes 12'): resize_pos_embed(torch.randn(1, 129, 4), (24,8), old=(4,3))
    with pytest.raises(ValueError, match='bicubic'): resize_pos_embed(torch.randn(1, 17, 4), (24,8), mode='nearest')

## Size of the picture

@pytest.mark.parametrize('hw', [(32,32), (64,64), (48,16)])
def test_another_size_is_refused(hw):
    with pytest.raises(ValueError, match=f'64×32.*{hw[0]}×{hw[1]}'): tiny()(torch.zeros(1, 3, *hw))

@pytest.mark.parametrize('size,n_feat', slow_but([('base',768), ('small',768), ('deit_tiny',192), ('deit_small',384), ('deit_base',768)], 'small', 'deit_tiny'))
@pytest.mark.parametrize('stride', [16,12])
def test_shapes(size, n_feat, stride):
    with torch.device('meta'):
        x,grid = torch.zeros(2, 3, 256, 128),patch_grid((256,128), stride)
        net = vit(size, stride=stride).eval()
        assert net(x).shape==(2,n_feat,1,1) and net.n_feat==n_feat and net.total_stride==stride
        assert vit(size, stride=stride, tokens='patches').eval()(x).shape==(2,n_feat,*grid)

@pytest.mark.parametrize('size,millions', [('base',85.75), ('small',47.93)])
def test_parameter_counts(size, millions):
    with torch.device('meta'): n = sum(p.numel() for p in vit(size).parameters())
    assert round(n/1e6, 2)==millions

def test_class_token_and_patches_are_of_one_sequence():
    cls = tiny().eval()
    both = tiny(tokens='patches').eval()
    both.load_state_dict(cls.state_dict())
    x,seen = torch.rand(2, 3, 64, 32),[]
    cls.norm.register_forward_hook(lambda m,i,o: seen.append(o))
    with torch.no_grad():
        assert torch.equal(cls(x)[...,0,0], seen[0][:,0])
        torch.testing.assert_close(both(x).flatten(2).mT, seen[0][:,1:])

def test_unknown_options():
    with pytest.raises(ValueError, match='deit_small'): vit('huge')
    with pytest.raises(ValueError, match="'cls', 'patches', 'trunk'"): vit('deit_tiny', tokens='mean')
    with pytest.raises(TypeError, match='strid'): vit('deit_tiny', strid=12)

## Cameras

def naive_row(table, n_views, cam, view):
    "The paper's row, or the mean over every row that fits what is known"
    cams = range(len(table)//n_views) if cam<0 else [cam]
    views = range(n_views) if view<0 else [view]
    return torch.stack([table[c*n_views+v,0] for c in cams for v in views]).mean(0)

@pytest.mark.parametrize('n_cams,n_views', [(3,2), (4,1), (1,5)])
def test_side_info_is_a_table(n_cams, n_views):
    table = torch.randn(n_cams*n_views, 1, 6)
    pairs = [(c,v) for c in range(-1, n_cams) for v in range(-1, n_views)]
    got = side_info(table, n_cams, n_views, *(torch.tensor(o) for o in zip(*pairs)))
    torch.testing.assert_close(got[:,0], torch.stack([naive_row(table, n_views, *o) for o in pairs]))

def test_cameras_add_the_row_times_the_weight():
    x,cam = torch.rand(3, 3, 64, 32),torch.tensor([1,0,1])
    net = tiny(n_cams=2, sie_weight=0.7).eval()
    plain = tiny().eval()
    plain.load_state_dict({k:v for k,v in net.state_dict().items() if k!='sie_embed'})
    with torch.no_grad(): torch.testing.assert_close(net.embed(x, cam), plain.embed(x)+0.7*net.sie_embed[cam])

def test_cameras_and_views():
    x,net = torch.rand(2, 3, 64, 32),tiny(n_cams=3, n_views=2).eval()
    assert net.sie_embed.shape==(6,1,32)
    with torch.no_grad():
        base = net.embed(x, torch.tensor([2,0]), torch.tensor([1,1]))
        net.sie_embed[5] += 1
        moved = net.embed(x, torch.tensor([2,0]), torch.tensor([1,1]))-base
    torch.testing.assert_close(moved, torch.tensor([3.,0.]).view(2, 1, 1).expand_as(moved), atol=1e-5, rtol=0)

def test_only_views():
    x,net = torch.rand(2, 3, 64, 32),tiny(n_views=2).eval()
    with torch.no_grad(): assert not torch.equal(*net(x[:1].expand(2, -1, -1, -1), viewid=torch.tensor([0,1])))

@pytest.mark.parametrize('camid', [torch.tensor([0,2]), torch.tensor([-2,0])])
def test_cameras_outside_the_table(camid):
    with pytest.raises(ValueError, match='outside 0 to 1'): tiny(n_cams=2).eval()(torch.rand(2, 3, 64, 32), camid)

@pytest.mark.parametrize('camid', [torch.tensor([0]), torch.tensor([0.,1.]), torch.tensor([[0],[1]])])
def test_cameras_of_the_wrong_shape(camid):
    with pytest.raises(ValueError, match='expected 2 whole numbers'): tiny(n_cams=2).eval()(torch.rand(2, 3, 64, 32), camid)

def test_no_cameras_given():
    net,x = tiny(n_cams=2),torch.rand(2, 3, 64, 32)
    with pytest.raises(ValueError, match='training needs the camid'): net(x)
    with torch.no_grad(): assert torch.equal(net.eval()(x), net(x, torch.tensor([-1,-1])))

def test_gradients_reach_every_weight():
    net = tiny(n_cams=2, drop_path=0.)
    net(torch.rand(2, 3, 64, 32), torch.tensor([0,1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum()>0 for p in net.parameters())

## Jigsaw

def naive_deal(cards, shift, groups):
    cards = cards[shift:]+cards[:shift]
    while len(cards)%groups: cards = cards+[cards[-2]] if -len(cards)%groups==1 else pytest.fail('more than one is missing')
    piles = [cards[i*len(cards)//groups:(i+1)*len(cards)//groups] for i in range(groups)]
    return [pile[i] for i in range(len(piles[0])) for pile in piles]

@pytest.mark.parametrize('n,shift,groups', [(128,4,2), (210,4,2), (129,4,2), (7,0,2), (12,5,3), (11,2,3), (9,1,1)])
def test_deal(n, shift, groups):
    assert deal_patches(torch.arange(n).view(1, n, 1), shift, groups).flatten().tolist()==naive_deal(list(range(n)), shift, groups)

def jigsaw_by_hand(net, head, x):
    "Each branch by itself, on tokens taken from the blocks one by one"
    t = net.embed(x)
    for b in net.blocks[:-1]: t = b(t)
    order = naive_deal(list(range(1, t.shape[1])), 4, 2)
    size = (t.shape[1]-1)//4
    hands = [[0, *order[i*size:(i+1)*size]] for i in range(4)]
    return [head.b1[1](head.b1[0](t))[:,0], *(head.b2[1](head.b2[0](t[:,o]))[:,0] for o in hands)]

@pytest.mark.parametrize('stride', [16,12,11])
def test_jigsaw(stride):
    net = ViT(dim=32, depth=3, heads=2, img_size=(64,48), stride=stride, tokens='trunk').eval()
    head,x = Jigsaw(net).eval(),torch.rand(2, 3, 64, 48)
    for p in head.b2.parameters(): torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad(): got,want = head(net(x)),jigsaw_by_hand(net, head, x)
    assert len(got)==5
    for a,b in zip(got, want): torch.testing.assert_close(a, b)
    assert (got[1]-got[2]).abs().max()>1e-3

def test_jigsaw_has_transreids_names():
    names = set(Jigsaw(tiny(tokens='trunk')).state_dict())
    assert {'b1.0.attn.qkv.weight','b2.0.mlp.fc2.bias','b1.1.weight','b2.1.bias'}<=names and len(names)==2*(12+2)

def test_jigsaw_branches_are_their_own():
    net = tiny(tokens='trunk')
    head = Jigsaw(net)
    head(net(torch.rand(2, 3, 64, 32)))[1].square().sum().backward()
    assert head.b2[0].mlp.fc1.weight.grad is not None and head.b1[0].mlp.fc1.weight.grad is None and net.blocks[-1].mlp.fc1.weight.grad is None

## Precision and copies

@pytest.mark.parametrize('tokens', ['cls','patches','trunk'])
def test_bfloat16(tokens):
    net,x = tiny(n_cams=2, tokens=tokens).eval(),torch.rand(2, 3, 64, 32)
    with torch.no_grad():
        want = net(x)
        with torch.autocast('cpu', dtype=torch.bfloat16): auto = net(x)
        half = net.bfloat16()(x.bfloat16())
    assert half.dtype==torch.bfloat16
    for o in (auto,half): assert F.cosine_similarity(o.float().flatten(1), want.flatten(1)).min()>0.999

def test_copies_are_independent():
    net = tiny(n_cams=2).eval()
    other,x = pickle.loads(pickle.dumps(copy.deepcopy(net))),torch.rand(1, 3, 64, 32)
    with torch.no_grad():
        assert torch.equal(other(x), net(x))
        other.cls_token.zero_()
        assert not torch.equal(other(x), net(x))

## Weight files

def saved(path, **kwargs):
    net = vit('deit_tiny', **kwargs)
    torch.save(net.state_dict()|{'head.weight':torch.zeros(1000, 192), 'head.bias':torch.zeros(1000)}, path)
    return net

@pytest.mark.parametrize('wrap', [False,True])
def test_pretrained_from_a_file(tmp_path, wrap):
    src = saved(tmp_path/'a.pth', img_size=(224,224))
    if wrap: torch.save(dict(model=torch.load(tmp_path/'a.pth')), tmp_path/'a.pth')
    net = vit('deit_tiny', stride=12, n_cams=4, pretrained=tmp_path/'a.pth')
    for k,v in src.state_dict().items():
        if k!='pos_embed': assert torch.equal(v, net.state_dict()[k]), k
    assert torch.equal(net.pos_embed, resize_pos_embed(src.pos_embed, (21,10)))

def test_pretrained_refuses_what_does_not_fit(tmp_path):
    saved(tmp_path/'a.pth')
    with pytest.raises(ValueError, match='does not fit'): vit('deit_small', pretrained=tmp_path/'a.pth')
    torch.save({'conv1.weight':torch.zeros(64, 3, 7, 7)}, tmp_path/'r.pth')
    with pytest.raises(ValueError, match='does not fit'): vit('deit_tiny', pretrained=tmp_path/'r.pth')
    with pytest.raises(FileNotFoundError): vit('deit_tiny', pretrained=tmp_path/'none.pth')

@pytest.mark.parametrize('size', sizes)
def test_pretrained_addresses(size, monkeypatch):
    asked = []
    def stop(url):
        asked.append(url)
        raise FileNotFoundError(url)
    monkeypatch.setattr('fastreid_nb.backbone.weights.download_weights', stop)
    with torch.device('meta'), pytest.raises(FileNotFoundError): vit(size, pretrained=True)
    assert asked[0].startswith('https://') and asked[0].endswith('.pth')

## Detection

@pytest.mark.parametrize('size', [o for o in sizes if o!='deit_base'])
@pytest.mark.parametrize('n_cams', [0,6])
def test_detect(size, n_cams):
    with torch.device('meta'):
        net = vit(size, stride=12, n_cams=n_cams)
        make,state = detect_vit(net.state_dict()|{'head.weight':torch.zeros(10, net.n_feat)})
        assert make.keywords==dict(variant=size, n_cams=n_cams) and 'head.weight' in state
        assert {k:v.shape for k,v in make(stride=12).state_dict().items()}=={k:v.shape for k,v in state.items() if k!='head.weight'}

@pytest.mark.parametrize('change', [{'blocks.0.ls1.gamma':(192,)}, {'blocks.3.attn.q_norm.weight':(64,)}, {'patch_embed.proj.weight':(192,3,14,14)},
                                    {'cls_token':(1,1,256)}, {'blocks.12.norm1.weight':(192,)}, {'blocks.0.mlp.fc1.weight':(192,192)}])
def test_detect_leaves_others_alone(change):
    with torch.device('meta'): assert detect_vit(vit('deit_tiny').state_dict()|{k:torch.zeros(v) for k,v in change.items()}) is None

@pytest.mark.parametrize('gone', ['cls_token','pos_embed','norm.weight','patch_embed.proj.weight'])
def test_detect_needs_the_parts(gone):
    with torch.device('meta'): assert detect_vit({k:v for k,v in vit('deit_tiny').state_dict().items() if k!=gone}) is None

def test_distilled_token_goes_with_its_position():
    state = tiny().state_dict()
    full = state|{'dist_token':torch.ones(1, 1, 32), 'pos_embed':torch.cat([state['pos_embed'][:,:1], torch.ones(1, 1, 32), state['pos_embed'][:,1:]], 1)}
    assert all(torch.equal(v, state[k]) for k,v in vit_names(full).items()) and vit_names(full).keys()==state.keys()
    assert 'dist_token' in full and all(torch.equal(v, state[k]) for k,v in vit_names(vit_names(full)).items())

def test_ignored_names_are_classifiers():
    state = tiny().state_dict()
    assert not [k for k in state if k.startswith(_ignore)]

def test_agrees_with_timm():
    timm = pytest.importorskip('timm')
    theirs = timm.create_model('vit_tiny_patch16_224', img_size=(64,32), num_classes=0).eval()
    make,state = detect_vit(theirs.state_dict())
    ours,x = make(img_size=(64,32)).eval(),torch.rand(2, 3, 64, 32)
    fill_network(ours, state)
    with torch.no_grad(): torch.testing.assert_close(ours(x)[...,0,0], theirs(x), atol=1e-4, rtol=1e-4)
