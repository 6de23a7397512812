"What spoils reading, found in the pages that check_docs.py renders"
import re
from html.parser import HTMLParser
from fastreid_nb._site import nbs, public_names, sidebar

most_columns = 90 # Of a line in an example
void = {'img','br','hr','meta','link','input','col','source','wbr'}

class Outline(HTMLParser):
    "The blocks of a page's text in their order: (tag, classes, text), where headings, paragraphs and code do not nest"
    kinds = {'p','pre','h1','h2','h3','h4','h5','table','ul','ol','details','blockquote','img','math','div','summary','hr'}
    def __init__(self, text):
        super().__init__()
        self.blocks,self.stack,self.images,self.naked = [],[],[],[]
        self.feed(text[text.index('<main>'):])

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag=='img': self.images.append(attrs)
        if tag in self.kinds: self.blocks.append([tag,(attrs.get('class') or '').split(),'',self.inside('li')])
        if tag not in void: self.stack.append((tag, attrs, len(self.blocks)-1))

    def handle_endtag(self, tag):
        while self.stack:
            if self.stack.pop()[0]==tag: return

    def handle_data(self, data):
        if self.inside('code') and not self.inside('a') and not self.inside('pre'): self.naked.append(data.strip())
        for tag,_,i in reversed(self.stack):
            if tag in self.kinds:
                self.blocks[i][2] += data
                return

    def inside(self, tag): return any(o[0]==tag for o in self.stack)

def no_alternative(pages, outlines):
    "Figures without alternative text"
    for src,o in outlines.items():
        for img in o.images:
            if not (img.get('alt') or '').strip(): yield f'{src}: {img["src"][:60]} has no alternative text; give its cell a line #| fig-alt:'

def open_sentences(pages, outlines):
    "Sentences that end in a colon before nothing; an API block, which begins with a line, is something"
    for src,o in outlines.items():
        blocks = [b for b in o.blocks if b[0]!='summary' and (b[2].strip() or b[0] not in ('p','div'))]
        for i,b in enumerate(blocks):
            if b[0]!='p' or not b[2].rstrip().endswith(':') or b[3]: continue
            after = blocks[i+1] if i+1<len(blocks) else ['end',[],'',False]
            if after[0] in ('p','h1','h2','h3','h4','h5','end'): yield f'{src}: nothing follows "…{b[2].strip()[-60:]}"'

def long_lines(pages, outlines):
    "Lines of examples that do not fit"
    for src,o in outlines.items():
        for tag,classes,text,_ in o.blocks:
            if tag!='pre' or not {'example','python','sh'} & {*classes} or 'library' in classes: continue
            for line in text.splitlines():
                if len(line)>most_columns: yield f'{src}: {len(line)} columns, expected at most {most_columns}: {line[:70]}…'

def wrong_next(pages, outlines):
    "Pages whose line Next leads elsewhere than the sidebar"
    order = [o.file for o in sidebar()]
    for page in pages.values():
        i = order.index(page.src) if page.src in order else None
        if i is None: yield f'{page.src}: not in the sidebar of _quarto.yml'
        if i is None or page.src=='index.ipynb' or not page.src.endswith('.ipynb') or i+1==len(order): continue
        found = re.search(r'<strong>Next:</strong>\s*<a\s+href="([^"]+)"', page.html)
        want = order[i+1]
        if not found: yield f'{page.src}: no line "Next"'
        elif found[1]!=want: yield f'{page.src}: Next leads to {found[1]}, the sidebar to {want}'
    for file in order:
        if file not in {o.src for o in pages.values()}: yield f'_quarto.yml: {file} is in the sidebar and was not rendered'

def unlinked_notebooks(pages, outlines):
    "Names of notebooks in prose without a link"
    known = {o.stem for o in nbs().glob('*.ipynb')}-{'index','howto'}
    for src,o in outlines.items():
        for name in o.naked:
            stem = name.removesuffix('.ipynb')
            if stem in known and f'{stem}.ipynb'!=src: yield f'{src}: {name} has no link'

def not_in_reference(pages, outlines):
    "Public names that the Reference page does not have"
    text = next((o.html for o in pages.values() if o.src=='reference.qmd'), '')
    for name,*_ in public_names():
        if f'>{name}<' not in text: yield f'reference.qmd: {name} is missing'

rules = [no_alternative, open_sentences, long_lines, wrong_next, unlinked_notebooks, not_in_reference]

def page_faults(
    pages:dict, # Address to `Page`, as `check_docs.build` returns them
)->dict: # Name of the rule to a list of faults
    "Everything that spoils reading"
    outlines = {o.src:Outline(o.html) for o in pages.values()}
    return {o.__name__:list(o(pages, outlines)) for o in rules}
