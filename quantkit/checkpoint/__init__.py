"""Whole checkpoints: quantized file by file, in layouts that other programs load."""
