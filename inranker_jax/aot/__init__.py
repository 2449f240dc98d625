"""Ahead-of-time proof: steps compiled for machines that are not there, and what the compiler says of them."""
