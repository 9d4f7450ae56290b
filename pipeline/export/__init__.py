"""Trained separators for other programs: ONNX and TorchScript, in real arithmetic (`python -m pipeline export`)."""
