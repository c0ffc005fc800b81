"""The language: types, ops, the levels of IR, their text form, verifier and interpreter. Imports nothing else of ours."""

if __name__ == "ir":
    raise ImportError("import tinygpt.ir, not ir")
