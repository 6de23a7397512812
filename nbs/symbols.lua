-- A cell with a heading is a `show_doc` output: without its div, the heading reaches the page's contents list
function Div(el)
  if el.classes:includes('cell') and el.content:find_if(function(b) return b.t == 'Header' end) then
    return el.content
  end
end

-- nbdev links every name in backticks that it knows, private ones too, which have no place on a page
function Link(el)
  if el.target:match('#_') then return el.content end
end
