"""Measurements; each script says what it measures and writes what it measured to `benchmarks/results/`."""

import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

# `common/data.py` reads data sets with these. No measurement reads one, and a machine that is borrowed for its GPU may
# lack them: empty modules then stand in for them.
for names in (("datasets",), ("pyarrow", "pyarrow.parquet")):
    if importlib.util.find_spec(names[0]) is None:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)
