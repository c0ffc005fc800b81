"""The graph ops, one class or one formula each. Importing the package registers every module in it."""

import importlib
import pkgutil

from tinygpt.ir.registry import OPS, Attrs, ColumnOp, Example, GraphBuilder, GraphOp, Pointwise, RowOp

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OPS", "Attrs", "ColumnOp", "Example", "GraphBuilder", "GraphOp", "Pointwise", "RowOp"]
