__version__ = "0.1.0"

from importlib import import_module

_home = dict(LLM="async_engine", SamplingParams="sampling", load_model="models", load_tokenizer="tokenizer")
__all__ = list(_home)

def __getattr__(name):
    "Import a public name when it is first used, so that `import simplellm` costs nothing"
    if name not in _home: raise AttributeError(f"module 'simplellm' has no attribute {name!r}")
    return getattr(import_module(f"simplellm.{_home[name]}"), name)

def __dir__(): return [*globals(), *_home]
