'''
---
title: The course
description: What each page answers, chapter by chapter
---
'''
from fastreid_nb._site import course
print('The pages are one course. Twelve of them, marked ★, are the **short path**: from images on disk to a model, '
    'a score and a recipe. Side rooms can be left out and visited later.\n')
course()
