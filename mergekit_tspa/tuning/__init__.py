"""The search for the merge that answers best: what is varied, how a trial is run, and which comes next."""
