"""A lab's files to tensors and back."""
