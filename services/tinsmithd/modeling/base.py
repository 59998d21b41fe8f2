"""Loads a base model: a Hugging Face name or folder, Llama and Qwen families, dense and MoE."""
