"""Generative families: one model, one file, one training loop for all (`training.fit`)."""
