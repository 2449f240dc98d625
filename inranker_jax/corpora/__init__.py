"""Readers of collections and label files in their published formats: one module per format, text only."""
