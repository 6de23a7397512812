'''
---
title: Reference
description: Every public name of the library with its sentence, room by room
---
'''
from fastreid_nb._site import reference
print('`from fastreid_nb.all import *` brings all of these. A name leads to its definition.\n')
reference()
