"""The one way from adapters to merged updates: plan, load, survey, merge, finish, report."""
