"""The training step that both sides run: mean squared error to centred teacher logits, clipping, AdamW."""

LEARNING_RATE = 1e-4
BETAS = (0.9, 0.99)
EPSILON = 1e-8
CLIP = 1.0
