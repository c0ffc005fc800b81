"""The passes, from a captured graph to a plan, and the pipeline that runs them."""

if __name__ == "lowering":
    raise ImportError("import tinygpt.lowering, not lowering")
