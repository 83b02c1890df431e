"""What may change in a whole model while its function stays, used to bring one model nearer to another."""
