"Parameters of a test, of which a few are fast"
import pytest

def slow_but(values, *fast):
    "`values` as parameters, slow but for those whose value, or first value, is in `fast`"
    def first(o): return o[0] if isinstance(o, tuple) else o
    def marked(o): return pytest.param(*o, marks=pytest.mark.slow) if isinstance(o, tuple) else pytest.param(o, marks=pytest.mark.slow)
    return [o if first(o) in fast else marked(o) for o in values]
