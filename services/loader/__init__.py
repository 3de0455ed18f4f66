"""The loader: parses and checks GGUF files, owns the memory of weights, leases it to executors read-only."""
