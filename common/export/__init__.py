"""Checkpoints in the formats that other engines read."""
