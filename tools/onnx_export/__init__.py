"""Codecs as ONNX graphs: `python -m tools.export_onnx`. `graphs` makes them, `check` compares them with PyTorch."""
