"Tables of queries and gallery that tests score"
import pandas as pd

def tables(rng, nq=30, ng=90, n_ids=12, n_cams=3):
    "Random tables with distractors, and queries without a match"
    q,g = (pd.DataFrame(dict(pid=rng.integers(0, n_ids, n), camid=rng.integers(0, n_cams, n), path=[f'{k}{i}.jpg' for i in range(n)]))
        for k,n in (('q',nq), ('g',ng)))
    q.loc[:2,'pid'] = n_ids+1
    g.loc[:8,'pid'] = -1
    return q,g
