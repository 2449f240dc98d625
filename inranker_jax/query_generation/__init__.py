"""Synthetic queries for the documents of a corpus, after InPars: sampling, prompts, generators, filters."""
