"""What runs a bundle: sessions, data, sampling, checkpoints. Imports nothing of the compiler."""

if __name__ == "runtime":
    raise ImportError("import tinygpt.runtime, not runtime")
