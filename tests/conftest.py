"Tests compute on the CPU, on machines with a GPU too; slow ones wait until they are asked for; what several files train with"
import os, pytest

# fastai sends loaders and learners to the GPU if there is one. The tests compare what comes out of them with tensors
# made here, on the CPU, and with figures of a seed, which only a CPU gives to the last digit. So the GPU is hidden, from
# the commands that a test starts as well, unless the tests that are marked `cuda` are asked for with `pytest -m cuda`.

# Tests marked `slow` are skipped, and counted as skipped, unless they are asked for: `pytest --slow` runs them too,
# `pytest -m slow` runs them alone.

def pytest_addoption(parser):
    parser.addoption('--slow', action='store_true', help='run the tests that are marked slow, too')

def pytest_configure(config):
    if config.option.markexpr=='cuda': return
    os.environ['CUDA_VISIBLE_DEVICES'] = ''   # before torch looks
    from fastai.torch_core import default_device
    default_device(False)   # for a Mac, whose GPU cannot be hidden so

def pytest_runtest_setup(item):
    asked = item.config.option.slow or item.config.option.markexpr=='slow'
    if item.get_closest_marker('slow') and not asked: pytest.skip('slow: runs with `pytest --slow`')
    import torch
    if item.get_closest_marker('cuda') and not torch.cuda.is_available(): pytest.skip('needs CUDA and `pytest -m cuda`')

# What many files train with. Imports stand inside, because nothing may import torch before the GPU is hidden.

@pytest.fixture(scope='session')
def data(tmp_path_factory):
    "Eight drawn people; no test may change their files"
    from fastreid_nb.data.toy import toy_reid
    return toy_reid(tmp_path_factory.mktemp('toy'), n_ids=8, size=(32,16), progress=False)

@pytest.fixture(scope='module')
def dls(data):
    from tiny_models import tiny_dls
    return tiny_dls(data)

@pytest.fixture
def learn(dls):
    "A new learner that writes nothing, in float32"
    import torch
    from fastreid_nb.train.core import reid_learner
    from tiny_models import TinyNet
    l = reid_learner(dls, TinyNet, dtype=torch.float32)
    with l.no_bar(), l.no_logging(): yield l
