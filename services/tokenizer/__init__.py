"""The tokenizer: text and conversations to token ids, and token ids back to text as a stream."""
