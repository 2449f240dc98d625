"""Labels (query, document) pairs with teachers: lists are sampled, scored, stored and verified."""
