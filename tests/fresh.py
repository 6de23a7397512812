"Processes that have imported the library and done nothing else, each in the time of a fork instead of seconds of imports"
import multiprocessing, os, re, signal, socket, sys, time
from pathlib import Path

_ways = multiprocessing.get_all_start_methods()
_context = multiprocessing.get_context('forkserver' if 'forkserver' in _ways else 'spawn')
_context.set_forkserver_preload(['fastreid_nb.all','fastreid_nb.recipes.cli'])
command = "import runpy; runpy.run_module('fastreid_nb', run_name='__main__', alter_sys=True)"   # what `reid` runs

def _run(said, code, words, env):
    "In the new process: `code` as a program, in a session of its own, with what it prints in the file `said`"
    if hasattr(os, 'setsid'): os.setsid()
    out = os.open(said, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
    for o in (1,2): os.dup2(out, o)
    sys.stdout.reconfigure(line_buffering=True, encoding='utf-8')
    signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs do not hear it
    sys.argv[1:] = words
    os.environ.update(env)
    exec(compile(code, '<test>', 'exec'), dict(__name__='__main__'))

class Fresh:
    "Run `code` with `words` in `sys.argv` and everything of the library imported; like `Popen` with its output in the file `said`"
    def __init__(self, said, code, *words, **env):
        self.said = Path(said)
        self.said.touch()
        self.process = _context.Process(target=_run, args=(str(said), code, [*map(str, words)], env))
        self.process.start()

    @property
    def pid(self): return self.process.pid

    @property
    def text(self): return self.said.read_text(encoding='utf-8')

    def wait(self, timeout=240):
        "Its exit status, as `Popen` gives it; it is killed after `timeout` seconds"
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f'{self.text}\nit had not ended after {timeout} seconds')
        return self.process.exitcode

    def wait_for(self, pattern, timeout=240):
        "Wait until it has printed `pattern`, or has ended"
        end = time.monotonic()+timeout
        while not re.search(pattern, self.text, re.M) and self.process.is_alive() and time.monotonic()<end: time.sleep(.02)

    def send_signal(self, how): os.kill(self.pid, how)

def run(said, code, *words, timeout=240, **env):
    "What `code` prints in a process of its own"
    new = Fresh(said, code, *words, **env)
    new.wait(timeout)
    return new.text

# Two processes that train together

def meeting():
    "Environment by which two processes find each other"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE='2')

small = '''
import json, os, sys, torch
from fastai.callback.core import Callback
from fastreid_nb.all import *
from torch import nn

torch.set_num_threads(1)
folder,p,out = sys.argv[1],int(sys.argv[2]),sys.argv[3]

def tiny():
    net = nn.Sequential(nn.Conv2d(3, 16, 5, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2))
    net.n_feat = 32
    return net

class Note(Callback):
    run_valid = False
    def before_fit(self): self.seen = []
    def after_loss(self): self.seen.append(self.learn.loss.item())
'''   # what such programs begin with
