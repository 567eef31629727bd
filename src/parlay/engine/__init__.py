"""The engine: scheduling, paged KV, the model, sampling and lossless acceptance."""
