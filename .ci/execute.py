#!/usr/bin/env python
"""Re-execute notebooks in place and keep their outputs, skipping what `nbdev_test` skips.

    python .ci/execute.py nbs/05_norm.ipynb            # cells marked cuda, slow or notest keep their stored outputs
    python .ci/execute.py --flags cuda nbs/*.ipynb     # on a machine with a GPU"""
import argparse, os, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbdev.config import get_config
from nbdev.process import extract_directives

def skipped(cell, flags):
    "Whether nbdev would pass over this cell"
    if cell.cell_type != "code": return True
    found = extract_directives(cell, remove=False)
    return found.get("eval:", [""])[0].lower() == "false" or bool(flags & found.keys())

class SkippingClient(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if skipped(cell, self.skip_flags): return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)

def execute(path, flags, timeout):
    "Run one notebook in its own folder with a fresh kernel, and write it back only if every cell passed"
    nb = nbformat.read(path, 4)
    if nb.cells[0].cell_type == "raw" and "skip_exec: true" in nb.cells[0].source: return "skip_exec"
    client = SkippingClient(nb, timeout=timeout, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": str(path.parent)}})
    client.skip_flags, start = flags, time.time()
    client.execute()
    nb.metadata.pop("language_info", None)
    nbformat.write(nb, path)
    return f"{time.time() - start:.1f} s"

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--flags", default="", help="flags to run all the same, e.g. 'cuda slow'")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(get_config().config_path)
    flags = set(get_config().tst_flags.split()) - set(args.flags.split())
    for path in args.notebooks: print(f"{path}: {execute(path, flags, args.timeout)}", flush=True)
