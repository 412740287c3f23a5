"""Qwen3.5 and Qwen3.6."""
