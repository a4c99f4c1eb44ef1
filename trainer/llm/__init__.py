"""The LLM in training: examples as token sequences, what learns of it, prefilled contexts."""
