"""The base model's side: checkpoints, names of tensors, and what is known of architectures."""
