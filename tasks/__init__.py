"""SeqIO registrations, one module a collection: the place where a user adds a corpus."""
