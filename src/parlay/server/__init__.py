"""The OpenAI-compatible HTTP server: requests in, an engine thread behind, answers and event streams out."""
