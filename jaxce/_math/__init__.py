"""What the losses are made of: sums over the classes of an example, numbers, gradients, and the losses of them."""
