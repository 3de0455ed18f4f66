"""The three services of mxgpt: loader, tokenizer and executor."""
