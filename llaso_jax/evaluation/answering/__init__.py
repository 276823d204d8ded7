"""Let a model answer a benchmark: resumable, batched, written in the layout LLaSO released."""
