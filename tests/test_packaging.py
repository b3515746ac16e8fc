"What a user installs: the wheel's content, the import time, the generated files."
import shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest

root = Path(__file__).parent.parent

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of the sources, so that no build folder stays behind"
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("out")
    for name in ["pyproject.toml", "README.md", "LICENSE"]: shutil.copy(root/name, src)
    shutil.copytree(root/"kernels", src/"kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root/"simplellm", src/"simplellm", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, src], check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))

def test_wheel_holds_the_package_and_the_model(wheel):
    names = wheel.namelist()
    modules = {p.name for p in (root/"simplellm").glob("*.py")}
    assert {f"simplellm/{m}" for m in modules} <= set(names)
    assert {f"simplellm/kernels/{p.name}" for p in (root/"kernels").iterdir() if p.is_file()} <= set(names)
    assert {f"simplellm/tiny/{f}" for f in ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
                                           "generation_config.json"]} <= set(names)

def test_wheel_never_hides_the_pypi_package_kernels(wheel):
    assert not any(n.startswith("kernels/") for n in wheel.namelist())
    assert not (root/"kernels/__init__.py").exists()

def test_shipped_model_is_at_most_8_mb():
    assert sum(p.stat().st_size for p in (root/"simplellm/tiny").iterdir()) <= 8e6

def test_import_is_quick_silent_and_without_triton():
    code = ("import time; t = time.perf_counter(); import simplellm; t = time.perf_counter() - t; import sys; "
            "assert t < 1.5, t; simplellm.LLM; simplellm.SamplingParams; "
            "assert 'triton' not in sys.modules and 'transformers' not in sys.modules")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr

def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    top = {Path(p).parts[0] for p in tracked if not p.startswith(".")}
    assert top == {"settings.ini", "README.md", "nbs", "simplellm", "kernels", "tests", "_quarto.yml", "pyproject.toml", "LICENSE"}
