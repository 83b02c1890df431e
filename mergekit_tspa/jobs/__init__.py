"""Work that is done here, one job after another, or on many machines at once."""
