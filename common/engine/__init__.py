"""Many sequences at once: settings, sequences, the prefix cache and the engine itself."""
