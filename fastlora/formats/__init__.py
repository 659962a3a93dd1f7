"""Adapter files: pure functions between a file's tensors and plain dicts, no models here."""
