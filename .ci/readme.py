#!/usr/bin/env python
"""Write README.md from nbs/index.ipynb without Quarto: python .ci/readme.py [--check]"""
import sys
from pathlib import Path
import nbformat
from nbdev.process import extract_directives

root = Path(__file__).parent.parent
HEAD = "<!-- Generated from nbs/index.ipynb by .ci/readme.py: do not edit -->\n"

def output_text(out):
    "The plain text of one cell output"
    if out.output_type == "stream": return out.text
    data = out.get("data", {})
    return data.get("text/markdown") or data.get("text/plain", "")

def markdown(cell):
    "One notebook cell as Markdown"
    if cell.cell_type == "markdown": return cell.source.replace("```{mermaid}", "```mermaid") # as GitHub wants it
    if cell.cell_type != "code": return ""
    directives = extract_directives(cell)
    if "hide" in directives or "default_exp" in directives: return ""
    code = "" if directives.get("echo:") == ["false"] else f"```python\n{cell.source.strip()}\n```\n\n"
    text = "".join(map(output_text, cell.outputs)).rstrip()
    if not text: return code.rstrip()
    return code + (text if text.startswith("|") else "```\n" + text + "\n```")

def readme():
    cells = nbformat.read(root/"nbs/index.ipynb", 4).cells
    return "\n\n".join([HEAD, *filter(None, map(markdown, cells))]) + "\n"

if __name__ == "__main__":
    path = root/"README.md"
    if "--check" not in sys.argv: path.write_text(readme())
    elif not path.exists() or path.read_text() != readme(): sys.exit("README.md is not what nbs/index.ipynb says: run `python .ci/readme.py`")
