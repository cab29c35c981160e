"""timm for what compares with it, in tests and benchmarks: with a stand-in where torchvision is absent or broken."""

import importlib
import importlib.machinery
import sys
import types
from typing import Any


def timm() -> Any:
    """timm, whose models use nothing of torchvision's compiled parts.

    Raises:
        ImportError: it is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except Exception:  # a torchvision built for another PyTorch fails in many ways
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    return importlib.import_module("timm")


class _Finder:
    """Finds any module of torchvision as an empty one whose every name is a class that does nothing."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def absent(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Nothing

        module.__getattr__ = absent  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _AnyName(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls()


class _Nothing(metaclass=_AnyName):
    def __init__(self, *args: Any, **settings: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing()

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return _Nothing()
