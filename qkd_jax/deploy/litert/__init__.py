"""LiteRT files (.tflite), written operation by operation, and the interpreter that runs them."""
