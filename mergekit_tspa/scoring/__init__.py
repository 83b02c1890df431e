"""Which merge answers best: losses on texts that no method saw, and what of each adapter is retained."""
