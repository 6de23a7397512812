"The command `reid`, and `python -m fastreid_nb`: Ctrl-C is answered before anything large is imported"
import os, signal, sys
from contextlib import suppress

def _end(number, frame): os._exit(128+number)

def main():
    "Import the library and run the command; an interrupted import ends without a traceback"
    names = 'SIGINT','SIGTERM'
    was = {o:signal.getsignal(o) for o in (getattr(signal, k) for k in names)}
    heard = [o for o,how in was.items() if how!=signal.SIG_IGN]
    for o in heard: signal.signal(o, _end)
    from .recipes.cli import reid_main
    with suppress(AttributeError): sys.stdout.reconfigure(errors='backslashreplace')   # of names that are no text
    for o in heard: signal.signal(o, was[o])
    try: return reid_main()
    finally:
        for o in heard: signal.signal(o, _end)

if __name__=='__main__': sys.exit(main())
