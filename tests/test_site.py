"The documentation pages: source is shown, blocks are short, figures have text, and what spoils reading is found"
import re
from dataclasses import dataclass, field
from pathlib import Path
import pytest, yaml
from check_docs import Page, cell_md
from fastcore.nbio import mk_cell, new_nb, read_nb
from fastreid_nb import _site
from fastreid_nb._site import Block, LinkNotebooks, ShowSource, course, next_line, public_names, reference, sidebar
from nbdev.process import NBProcessor
from page_faults import Outline, page_faults, rules, wrong_next

root = Path(__file__).parents[1]

def processed(*cells):
    "Sources of the cells that `ShowSource` leaves; a cell that begins with > is prose, one with ! an API block"
    nb = new_nb([mk_cell(o, 'markdown') if o[0]=='>' else mk_cell(o) for o in cells], {})
    for i,o in enumerate(nb.cells): o.idx_ = i
    proc = NBProcessor(nb=nb, procs=[], rm_directives='quarto')
    for o in nb.cells:
        if o.source.startswith('show_doc'):
            o.has_sd = True
            o.outputs = [_AttrOut('---\n\n[source](x)\n\n### f\n\n*Adds one*\n\n| a |\n|---|\n| b |')]
    ShowSource(nb).begin()
    return nb.cells

class _AttrOut(dict):
    def __init__(self, text):
        super().__init__(data={'text/markdown':text})
        self.data = self['data']

short,long = '#| export\ndef f(x): return x+1', '#| export\ndef f(x):\n' + '\n'.join(f'    x += {i}' for i in range(30))

def test_short_source_is_open():
    "Below its heading, with a bar, and without the table that would say the same again"
    block,cell = processed(short, 'show_doc(f)')
    assert cell.source=='#| classes: library\ndef f(x): return x+1'
    assert block.outputs[0].data['text/markdown']=='---\n\n[source](x)\n\n### f'

def test_long_source_is_folded():
    block,cell = processed(long, 'show_doc(f)')
    assert cell.source.startswith('#| classes: library\n#| code-fold: true\n#| code-summary: "Source of f"\ndef f(x):')
    assert '| b |' in block.outputs[0].data['text/markdown']

@pytest.mark.parametrize('src,is_open', [
    ('#| exporti\ndef f(x): return x', True), ('#| export\nimport re', False), ('#| exporti\nx = 1', False),
    ('#| export\n#| code-fold: true\ndef f(x): return x', False), ('#| exporti\n#| code-fold: false\nx = 1', True)])
def test_open_or_folded(src, is_open):
    [cell] = processed(src)
    assert ('code-fold: true' in cell.source)!=is_open
    assert 'export' not in cell.source and cell.source.count('code-fold')<=1

def test_hidden_cells_go(): assert [o.source for o in processed('#| hide\n1', '#| default_exp a.b', '> text', '2')]==['> text', '2']

def test_notebooks_are_linked():
    cell = mk_cell('See `05_losses`, [`06_train`](x), `05_losses.ipynb` and `losses`.', 'markdown')
    proc = LinkNotebooks(None)
    proc.begin()
    proc.cell(cell)
    link = '[`05_losses`](05_losses.ipynb)'
    assert cell.source==f'See {link}, [`06_train`](x), {link} and `losses`.'

@dataclass
class Options:
    "Some options"
    names:list=field(default_factory=list) # Which ones
    dist:callable=len # How far apart
    n:int|str=3 # How many

def test_block_has_no_internals():
    text = Block(Options)._repr_markdown_()
    assert '### Options' in text and '*Some options*' in text and 'def ' not in text
    assert '| `names` | `list` | `[]` | Which ones |' in text
    assert '| `dist` | `callable` | `len` | How far apart |' in text
    assert '| `n` | `int \\| str` | `3` | How many |' in text

def test_next_follows_the_sidebar():
    pages = sidebar()
    line = next_line(next(o for o in pages if o.name=='00_data'), pages)
    assert line.startswith('**Next:** [00a Files](00a_data.files.ipynb). ')
    assert line.endswith('On the short path: [00c Your own images](00c_data.own.ipynb).')
    assert next_line(pages[-1], pages)==''

def test_chapters_and_short_path():
    "Every section of the sidebar is a chapter with a sentence; the twelve pages of the short path are there, in order"
    pages = sidebar()
    assert list(dict.fromkeys(o.chapter for o in pages if o.chapter))==list(_site.chapters)
    short = [o.name for o in pages if o.is_short]
    assert short==_site.short_path and len(short)==12
    assert all(o.text==(f'{o.head[0]} ★' if o.is_short else '') for o in pages)

def test_reference_and_course(capsys):
    reference()
    text = capsys.readouterr().out
    assert all(f'[`{name}`](' in text for name,*_ in public_names()) and '[`Learner.save_reid`](' in text
    course()
    text = capsys.readouterr().out
    assert text.count('★')==12 and all(o.head[0] in text for o in sidebar() if o.chapter)

def test_numbers_in_titles():
    for o in sidebar():
        m = re.match(r'(\d\d[a-z]?)_', o.name)
        if m: assert o.head[0].startswith(f'{m[1]} '), o.name

## Figures

def draws(cell): return any(k.startswith('image/') for o in cell.get('outputs', []) for k in o.get('data', {}))

@pytest.mark.parametrize('path', sorted((root/'nbs').glob('[!_]*.ipynb')), ids=lambda o: o.stem)
def test_figures_have_text(path):
    bare = [o.source[:80] for o in read_nb(path).cells if draws(o) and 'hide' not in o.directives and len(o.directives.get('fig-alt', ''))<20]
    assert not bare

## Faults

def faults(body, src='05_losses.ipynb'):
    "What the rules find that look at one page alone"
    page = Page(src, f'<html><main>{body}</main></html>')
    found = {o.__name__:list(o({'a.html':page}, {src:Outline(page.html)})) for o in rules if o.__name__ not in ('wrong_next','not_in_reference')}
    return {k:v for k,v in found.items() if v}

@pytest.mark.parametrize('body,rule', [
    ('<img src="a.png">', 'no_alternative'), ('<img src="a.png" alt=" ">', 'no_alternative'),
    ('<p>As follows:</p><h2>B</h2>', 'open_sentences'), ('<p>As follows:</p><p>Text</p>', 'open_sentences'),
    ('<p>As follows:</p>', 'open_sentences'), ('<p>As follows:</p><h3>B</h3><p>Text</p>', 'open_sentences'),
    ('<pre class="python cell example"><code>' + 'x'*91 + '</code></pre>', 'long_lines'),
    ('<p>See <code>06_train</code>.</p>', 'unlinked_notebooks')])
def test_planted_fault(body, rule): assert list(faults(body))==[rule]

@pytest.mark.parametrize('body', [
    '<img src="a.png" alt="Two curves">', '<p>As follows:</p><pre>x</pre>', '<p>As follows:</p><ul><li>a:</li></ul>',
    '<p>As follows:</p><hr/><p><a href="x">source</a></p><h3>f</h3><div class="sourceCode"><pre>x</pre></div>',
    '<p>As follows:</p><hr/><p><a href="x">source</a></p><h3>f</h3><p><em>Adds one</em></p><table><tr><td>n</td></tr></table>',
    '<p>As follows:</p><details><summary>Source of f</summary><pre>x</pre></details>',
    '<pre class="python cell example"><code>' + 'x'*90 + '</code></pre>',
    '<pre class="python cell library"><code>' + 'x'*110 + '</code></pre>',
    '<p>See <a href="b"><code>06_train</code></a> and <code>05_losses</code>.</p>'])
def test_no_fault(body): assert not faults(body)

def test_wrong_next():
    page = '<html><main><p><strong>Next:</strong> <a href="{}">x</a></p></main></html>'
    def found(to): return [o for o in wrong_next({'a.html':Page('00_data.ipynb', page.format(to))}, {}) if o.startswith('00_data.ipynb')]
    assert found('06_train.ipynb')==['00_data.ipynb: Next leads to 06_train.ipynb, the sidebar to 00a_data.files.ipynb']
    assert not found('00a_data.files.ipynb')

def test_missing_in_reference():
    found = page_faults({'a.html':Page('reference.qmd', '<html><main><code>toy_reid</code></main></html>')})['not_in_reference']
    assert len(found)==len(list(public_names()))-1 and not any('toy_reid' in o for o in found)

def test_folded_cell_on_a_page():
    cell = dict(cell_type='code', source='#| code-fold: true\n#| code-summary: "Solution 1"\n1+1', outputs=[])
    text = '\n'.join(cell_md(cell, 'a', {}))
    assert '<details><summary>Solution 1</summary>' in text and '1+1' in text and 'code-fold' not in text

## Configuration

def test_site_reads_offline():
    "Formulas are MathML, and nothing on a page is fetched from elsewhere"
    html = yaml.safe_load((root/'_quarto.yml').read_text())['format']['html']
    assert html['html-math-method']=='mathml' and html['code-overflow']=='wrap'
    assert 'http' not in (root/'nbs/styles.css').read_text()
