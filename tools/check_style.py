"`chkstyle` with two differences: `#| exporti` cells are exported code, and nothing is joined to lines of over 90 columns"
import sys
from chkstyle import core

core.NB_EXPORT_KEYS = core.NB_MIX_EXEMPT_KEYS-{'exec_doc'}
core.COMBINE_WIDTH = 90
paths = ['nbs', 'fastreid_nb', 'tools', 'tests', 'benchmarks', 'setup.py']

if __name__=='__main__': sys.exit(core.main(['chkstyle', *(sys.argv[1:] or paths)]))
