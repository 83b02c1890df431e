"""What to do with n matrices in one coordinate system."""
