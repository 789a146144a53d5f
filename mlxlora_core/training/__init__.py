"""Rows to an adapter: dataset, examples, batches, loss, the loop, and the session that saves it."""
