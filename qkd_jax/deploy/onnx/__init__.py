"""ONNX files of quantized nets, and the engines that run them."""
