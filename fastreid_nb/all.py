"Every public name, for `from fastreid_nb.all import *`"
from .data import *
from .toy import *
from .augment import *
from .backbone import *
from .pooling import *
from .heads import *
from .losses import *
from .train import *
from .eval import *
from .features import *
from .ranklist import *
from .inference import *
from .floors import *
from .recipes import *
