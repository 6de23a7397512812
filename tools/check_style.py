"`chkstyle` with one difference: `#| exporti` cells are exported code, not examples"
import sys
from chkstyle import core

core.NB_EXPORT_KEYS = core.NB_MIX_EXEMPT_KEYS-{'exec_doc'}
paths = ['nbs', 'fastreid_nb', 'tools', 'tests', 'benchmarks', 'setup.py']

if __name__=='__main__': sys.exit(core.main(['chkstyle', *(sys.argv[1:] or paths)]))
