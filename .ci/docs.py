#!/usr/bin/env python
"""What `nbdev_docs` does, with signatures as Python writes them (fastcore 1.12 writes *args as args:VAR_POSITIONAL and hides a NamedTuple's fields):
    python -P .ci/docs.py              # the site, needs Quarto
    python -P .ci/docs.py --pages      # only the processed notebooks in _proc"""
import inspect, re, sys
from typing import Annotated, get_origin
from fastcore import docments as d
from nbdev import processors

LONG = 60 # characters of a default; the source below the signature has all of them
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}

def words(annotation):
    "An annotation as it is written: list[int], not list"
    if get_origin(annotation) is Annotated: annotation = annotation.__origin__ # without typer's options
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z])", "", text.replace("collections.abc.", "")) # torch.Tensor is Tensor; torch.dtype stays
    return text.replace(" | ", "|")

def default(value):
    "A default as it is written, if it is short"
    if callable(value) and getattr(value, "__name__", "") == "<lambda>": return "..."
    text = value.__name__ if hasattr(value, "__name__") else repr(value)
    return "..." if len(text) > LONG or text == "<factory>" or " at 0x" in text else text

def parameters(obj):
    "[(text, comment)] of each parameter"
    try: found = list(inspect.signature(obj).parameters.values()) # of a class: its fields, also a NamedTuple's
    except (ValueError, TypeError): return []
    if inspect.isclass(obj) and all(p.kind in STARS and p.annotation is p.empty for p in found): return [] # an exception's
    notes, out = d.docments(obj, full=True), []
    for i, p in enumerate(found):
        if p.name in ("self", "_cls"): continue
        keyword_only = p.kind == p.KEYWORD_ONLY and not any(q.kind in (p.VAR_POSITIONAL, p.KEYWORD_ONLY) for q in found[:i])
        text = ("*, " if keyword_only else "") + STARS.get(p.kind, "") + p.name
        if p.annotation is not p.empty: text += ":" + words(p.annotation)
        if p.default is not p.empty: text += "=" + default(p.default)
        note = notes.get(p.name)
        out.append((text, note and note.docment))
    return out

def returns(self):
    "What follows the parameters of a function"
    try: kind = inspect.signature(self.obj).return_annotation
    except (ValueError, TypeError): kind = inspect.Signature.empty
    note = self.dm.get("return", {}).get("docment")
    return ")" + (f"->{words(kind)}" if kind is not inspect.Signature.empty else "") + (f" # {note}" if note else "")

def text(self):
    "The signature of a function or a class"
    obj, params, name = self.obj, parameters(self.obj), d.get_name(self.obj)
    if inspect.isclass(obj):
        if not params: return f"class {name}({', '.join(b.__name__ for b in obj.__bases__ if b not in (object, tuple))})"
        prefix, end = "class", ")"
    else: prefix, end = "async def" if inspect.iscoroutinefunction(obj) else "def", returns(self)
    one = f"{prefix} {name}({', '.join(t for t, _ in params)}{end}"
    if not params or len(one) < self.maxline and not any(note for _, note in params): return one
    return d._fmt_sig(name, params, end, self.maxline, prefix=prefix)

in_order = processors._def_names # nbdev inserts them one by one behind the cell, the last first
processors._def_names = lambda cell, shown: list(reversed(list(in_order(cell, shown))))
d.DocmentText.__str__ = d.DocmentText.__repr__ = text # at import: nbdev's worker processes import this file too

if __name__ == "__main__":
    from nbdev.quarto import nbdev_docs
    from nbdev.serve import proc_nbs
    proc_nbs() if "--pages" in sys.argv else nbdev_docs.__wrapped__()
