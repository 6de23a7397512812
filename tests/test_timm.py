"Networks by timm name: the map found in every shape, sizes, strides, names, and files of weights"
import sys
from types import SimpleNamespace

import fresh, pytest, torch

timm = pytest.importorskip('timm')
from fastreid_nb.backbone.weights import fill_network
from slow import slow_but
from fastreid_nb.backbone.timmnets import TimmBackbone, _as_map, check_timm_name, hrnet, timm_backbone, timm_name, timm_weights, token_grid

# name: channels and map at 256×128, from each family's paper or code: stride 32 unless the design says otherwise
spread = {'resnet18':(512,8,4), 'resnest14d':(2048,8,4), 'convnext_tiny':(768,8,4), 'efficientnet_b0':(1280,8,4), 'mobilenetv3_small_100':(576,8,4),
          'hrnet_w18_small':(2048,8,4), 'poolformer_s12':(512,8,4), 'regnetx_002':(368,8,4), 'repvgg_a0':(1280,8,4),
          'vit_tiny_patch16_224':(192,16,8), 'deit_tiny_distilled_patch16_224':(192,16,8), 'deit3_small_patch16_224':(384,16,8),
          'beit_base_patch16_224':(768,16,8), 'eva02_tiny_patch14_224':(192,18,9), 'vit_small_patch14_reg4_dinov2':(384,18,9),
          'xcit_nano_12_p16_224':(128,16,8), 'volo_d1_224':(384,16,8), 'swin_tiny_patch4_window7_224':(768,8,4), 'swinv2_tiny_window8_256':(768,8,4),
          'swinv2_cr_tiny_224':(768,8,4), 'levit_128s':(384,4,2), 'maxvit_tiny_tf_224':(512,8,4), 'coatnet_nano_rw_224':(512,8,4), 'mvitv2_tiny':(768,8,4),
          'pvt_v2_b0':(256,8,4), 'twins_pcpvt_small':(512,8,4), 'davit_tiny':(768,8,4), 'hiera_tiny_224':(768,8,4)}

usual = ('resnet18','resnest14d','convnext_tiny','efficientnet_b0','mobilenetv3_small_100','hrnet_w18_small','poolformer_s12','regnetx_002','repvgg_a0',
    'vit_tiny_patch16_224','deit_tiny_distilled_patch16_224','beit_base_patch16_224','eva02_tiny_patch14_224','vit_small_patch14_reg4_dinov2',
    'xcit_nano_12_p16_224','swin_tiny_patch4_window7_224','levit_128s')   # every form of output; the others are slow to build

@pytest.mark.parametrize('name', slow_but(spread, *usual))
def test_map_of_every_family(name):
    with torch.device('meta'):
        net = timm_backbone(name, img_size=(256,128)).eval()
        y = net(torch.zeros(2, 3, 256, 128))
    assert tuple(y.shape[1:])==spread[name] and y.shape[0]==2
    assert net.n_feat==y.shape[1] and net.total_stride==256//y.shape[2]
    assert len(net.mean)==len(net.std)==3

@pytest.mark.parametrize('name', slow_but(['coat_tiny','pit_ti_224','nest_tiny','efficientformer_l1','convit_tiny'], 'pit_ti_224', 'nest_tiny', 'efficientformer_l1', 'convit_tiny'))
def test_no_map_is_said(name):
    with torch.device('meta'), pytest.raises(ValueError, match='no feature map|cannot see'): timm_backbone(name, img_size=(256,128))

## What the map holds

def same_weights(*nets):
    for o in nets[1:]: o.load_state_dict(nets[0].state_dict())
    return [o.eval() for o in nets]

def test_cnn_is_passed_on():
    net,x = timm_backbone('resnet10t').eval(),torch.rand(2, 3, 64, 32)
    with torch.no_grad(): assert torch.equal(net(x), net.net.forward_features(x))

def test_channels_last_are_moved():
    net,x = timm_backbone('swin_tiny_patch4_window7_224', img_size=(64,32)).eval(),torch.rand(2, 3, 64, 32)
    with torch.no_grad(): assert torch.equal(net(x).movedim(1, -1), net.net.forward_features(x))

@pytest.mark.parametrize('name,n', [('vit_tiny_patch16_224',1), ('deit_tiny_distilled_patch16_224',2), ('vit_small_patch16_dinov3',5)])
def test_tokens_in_front_are_taken_off(name, n):
    x = torch.rand(2, 3, 64, 32)
    net,cls = same_weights(*(timm_backbone(name, img_size=(64,32), tokens=o) for o in ('patches','cls')))
    with torch.no_grad(): toks,fmap,one = net.net.forward_features(x),net(x),cls(x)
    assert toks.shape[1]==8+n and fmap.shape[2:]==(4,2)
    torch.testing.assert_close(fmap.flatten(2).mT, toks[:,n:])
    torch.testing.assert_close(one[...,0,0], toks[:,0])
    assert net.total_stride==cls.total_stride==16

def test_a_patch_stays_in_its_place():
    "The token that changes most is the one whose patch was changed"
    torch.manual_seed(0)
    net,x = timm_backbone('vit_tiny_patch16_224', img_size=(64,32)).eval(),torch.rand(1, 3, 64, 32)
    y = x.clone()
    y[:,:,32:48,16:] = 0
    with torch.no_grad(): moved = (net(y)-net(x)).norm(dim=1)[0]
    assert divmod(moved.argmax().item(), 2)==(2,1)

@pytest.mark.parametrize('h,w,s', [(256,128,16), (256,128,14), (384,128,32), (224,224,16), (100,37,7)])
def test_grid_from_the_number(h, w, s): assert token_grid((h//s)*(w//s), (h,w))==(h//s,w//s)

@pytest.mark.parametrize('n', [0,7,127,10**6])
def test_no_grid(n): assert token_grid(n, (256,128)) is None

@pytest.mark.parametrize('out', [torch.zeros(2, 8), torch.zeros(2, 7, 3), [torch.zeros(2, 3, 4, 4)], None])
def test_other_outputs_are_refused(out):
    with pytest.raises(ValueError, match='no feature map'): _as_map(SimpleNamespace(), out, (64,32), 'patches')

def test_register_tokens_are_no_class_token():
    with pytest.raises(ValueError, match='no class token'): _as_map(SimpleNamespace(num_prefix_tokens=4), torch.zeros(2, 12, 3), (64,32), 'cls')

## Sizes and strides

@pytest.mark.parametrize('name,n_feat', [('resnet18',512), ('convnext_tiny',768), ('efficientnet_b0',1280)])
def test_last_stride(name, n_feat):
    with torch.device('meta'):
        net = timm_backbone(name, last_stride=1).eval()
        assert net.total_stride==16 and net(torch.zeros(1, 3, 256, 128)).shape==(1,n_feat,16,8)

@pytest.mark.parametrize('name', ['vit_tiny_patch16_224','hrnet_w18_small','densenet121'])
def test_last_stride_that_cannot_be(name):
    with torch.device('meta'), pytest.raises(ValueError, match='output_stride'): timm_backbone(name, last_stride=1)

@pytest.mark.parametrize('name', slow_but(['vit_tiny_patch16_224','swin_tiny_patch4_window7_224','mixer_s16_224','levit_128s'], 'vit_tiny_patch16_224', 'mixer_s16_224'))
def test_fixed_sizes(name):
    "Without `img_size` the size of the weights; another is refused with both sizes; asked for, it is built (the mixer as well)"
    with torch.device('meta'):
        with pytest.raises(ValueError, match=r'224×224.*256×128.*img_size=\(256, 128\)'): timm_backbone(name)(torch.zeros(1, 3, 256, 128))
        assert timm_backbone(name, img_size=(256,128))(torch.zeros(1, 3, 256, 128)).ndim==4

def test_cnn_takes_any_size():
    net = timm_backbone('resnet10t').eval()
    with torch.no_grad(): assert [tuple(net(torch.zeros(1, 3, *o)).shape[2:]) for o in ((64,32),(96,96),(33,70))]==[(2,1),(3,3),(2,3)]

def test_building_leaves_training_mode_and_statistics():
    net = timm_backbone('resnet10t')
    assert net.training and net.net.training and all((v==0).all() for k,v in net.state_dict().items() if k.endswith('running_mean'))

## Names

@pytest.mark.parametrize('name,near', [('convnext_tini','convnext_tiny'), ('resnet5O','resnet50'), ('vit_tiny_patch16_224.augreg_in21','vit_tiny_patch16_224.augreg_in21k')])
def test_near_names(name, near):
    with pytest.raises(ValueError, match='no network') as e: check_timm_name(name)
    assert repr(near) in str(e.value)

@pytest.mark.parametrize('name', ['', 'qqqq', 'hf-hub:a/b', '../resnet18'])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match='no network'): timm_backbone(name)

@pytest.mark.parametrize('spec', ['resnet18', 'timm', None, timm_backbone])
def test_strings_that_name_no_timm_network(spec):
    with pytest.raises(ValueError, match="expected 'timm/'"): timm_name(spec)

def test_names_with_timm_before_them():
    with torch.device('meta'):
        assert timm_backbone(f'timm/{timm_name("timm/resnet10t")}', last_stride=1).total_stride==16
        with pytest.raises(TypeError): timm_backbone('timm/resnet10t', last_strid=1)

def test_options_are_checked():
    with pytest.raises(ValueError, match='last_stride=3'): timm_backbone('resnet10t', last_stride=3)
    with pytest.raises(ValueError, match="'patches', 'cls'"): timm_backbone('resnet10t', tokens='all')
    with pytest.raises(ValueError, match='width=19'): hrnet(19)

def test_library_imports_without_timm(tmp_path):
    "The library does not import timm, and where timm is needed the error says what to install"
    code = ('import sys\nassert "fastreid_nb.all" in sys.modules and "timm" not in sys.modules\nsys.modules["timm"] = None\nfrom fastreid_nb.backbone.timmnets import timm_backbone, timm_name\nassert timm_name("timm/x")=="x"\n'
            'try: timm_backbone("resnet18")\nexcept ImportError as e: assert "pip install fastreid-nb[timm]" in str(e), e\nelse: raise SystemExit(3)')
    new = fresh.Fresh(tmp_path/'said.txt', code)
    assert new.wait()==0, new.text

## Weights

def test_file_with_and_without_classifier(tmp_path):
    for classes in (0,7):
        src = timm.create_model('resnet10t', num_classes=classes)
        torch.save(src.state_dict(), tmp_path/'w.pth')
        net = timm_backbone('resnet10t', pretrained=tmp_path/'w.pth')
        assert all(torch.equal(v, src.state_dict()[k]) for k,v in net.net.state_dict().items())

def test_positions_are_stretched(tmp_path):
    src = timm.create_model('vit_tiny_patch16_224')
    torch.save(src.state_dict(), tmp_path/'w.pth')
    net = timm_backbone('vit_tiny_patch16_224', img_size=(256,128), pretrained=tmp_path/'w.pth')
    want = timm.layers.resample_abs_pos_embed(src.pos_embed, (16,8), (14,14))
    torch.testing.assert_close(net.net.pos_embed, want)
    assert torch.equal(net.net.blocks[2].attn.qkv.weight, src.blocks[2].attn.qkv.weight)

def test_own_checkpoint_goes_through_unchanged():
    net = timm_backbone('resnet10t')
    again = timm_backbone('resnet10t')
    assert fill_network(again, again.adapt(net.state_dict()), ignore=again.ignore)==[]
    assert all(torch.equal(v, net.state_dict()[k]) for k,v in again.state_dict().items())

@pytest.mark.parametrize('change', [lambda s: s.pop('layer3.0.conv1.weight'), lambda s: s.update(extra=torch.zeros(1)),
                                    lambda s: s.update({'layer1.0.conv1.weight':torch.zeros(1)}), lambda s: s['conv1.0.weight'].fill_(torch.nan)])
def test_wrong_files_are_refused(tmp_path, change):
    state = timm.create_model('resnet10t').state_dict()
    change(state)
    torch.save(state, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='nothing was loaded'): timm_backbone('resnet10t', pretrained=tmp_path/'w.pth')

@pytest.mark.parametrize('name', slow_but(['vit_tiny_patch16_224','swin_tiny_patch4_window7_224','convnext_atto','levit_128s','maxvit_tiny_tf_224','eva02_tiny_patch14_224'],
    'vit_tiny_patch16_224', 'convnext_atto'))
def test_file_of_another_network_is_refused(tmp_path, name):
    torch.save(timm.create_model('resnet10t').state_dict(), tmp_path/'w.pth')
    with torch.device('meta'), pytest.raises(ValueError, match='nothing was loaded|cannot convert'): timm_backbone(name, pretrained=tmp_path/'w.pth')

def test_converter_that_fails(monkeypatch):
    def broken(state, net): raise KeyError('stem')
    net = timm_backbone('vit_tiny_patch16_224')
    monkeypatch.setattr(sys.modules[type(net.net).__module__], 'checkpoint_filter_fn', broken)
    with pytest.raises(ValueError, match='cannot convert.*stem'): net.adapt({'a':torch.zeros(1)})

def test_downloaded_weights_take_the_place_of_random_ones(monkeypatch):
    create,src = timm.create_model,timm.create_model('resnet10t', num_classes=0, output_stride=16)
    def downloaded(name, pretrained=False, **kwargs):
        net = create(name, **kwargs)
        if pretrained: net.load_state_dict(src.state_dict())
        return net
    monkeypatch.setattr(timm, 'create_model', downloaded)
    net = timm_backbone('resnet10t', last_stride=1, pretrained=True).eval()
    x = torch.rand(1, 3, 64, 32)
    with torch.no_grad(): assert torch.equal(net(x), src.eval().forward_features(x))

@pytest.mark.parametrize('error,want', [(OSError('no route'),FileNotFoundError), (RuntimeError('No pretrained weights exist'),ValueError)])
def test_download_errors_are_explained(monkeypatch, error, want):
    create = timm.create_model
    def broken(*args, pretrained=False, **kwargs):
        if pretrained: raise error
        return create(*args, **kwargs)
    monkeypatch.setattr(timm, 'create_model', broken)
    with pytest.raises(want, match=str(error)): timm_backbone('resnet10t', pretrained=True)

def test_weights_table():
    df = timm_weights('vit_tiny_patch16_224')
    assert len(df)>=2 and df.address.str.startswith('https://').all() and set(df.columns)=={'licence','size','mean','address'}
    assert df['mean'].eq(0.5).any() and all(o.startswith('vit_tiny_patch16_224.') for o in df.index)

def test_changed_network():
    net = timm.create_model('resnet10t', num_classes=0)
    net.maxpool = torch.nn.Identity()
    assert TimmBackbone(net, (64,32)).total_stride==16

def test_gradients_reach_the_network():
    net = timm_backbone('resnet10t')
    net(torch.rand(2, 3, 64, 32)).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
