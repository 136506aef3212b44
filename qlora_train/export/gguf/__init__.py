"""Exports a run as a GGUF file, which llama.cpp, Ollama and LM Studio load (export_gguf.py)."""
