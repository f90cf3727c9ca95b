"""The projection behind a loss that never stores its logits: what they are made of, and loops over parts of them."""
