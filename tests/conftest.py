"Tests compute on the CPU, on machines with a GPU too"
import os, pytest

# fastai sends loaders and learners to the GPU if there is one. The tests compare what comes out of them with tensors
# made here, on the CPU, and with figures of a seed, which only a CPU gives to the last digit. So the GPU is hidden, from
# the commands that a test starts as well, unless the tests that are marked `cuda` are asked for with `pytest -m cuda`.

def pytest_configure(config):
    if config.option.markexpr=='cuda': return
    os.environ['CUDA_VISIBLE_DEVICES'] = ''   # before torch looks
    from fastai.torch_core import default_device
    default_device(False)   # for a Mac, whose GPU cannot be hidden so

def pytest_runtest_setup(item):
    import torch
    if item.get_closest_marker('cuda') and not torch.cuda.is_available(): pytest.skip('needs CUDA and `pytest -m cuda`')
