"""The ops, one a file. Importing any of them registers all."""

from importlib import import_module
from pkgutil import iter_modules

# whatever lies here, so that a new op needs no other mention
for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
