"""One two-column table per model family: Megatron name | operation on Hugging Face names."""
