"""The objectives of TSPA in Gram form and their Riemannian solver: tensors in, rotations and scales out."""
