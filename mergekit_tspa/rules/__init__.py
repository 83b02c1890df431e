"""What to do with n matrices in one coordinate system.

Every rule is one function `rule(M, weights, its own parameters)` of the matrices `M (n, p, q)` and their
weights `(n,)`.  A family of rules is one file.  `rule_kinds` says what rules of a kind promise,
`update_statistics` what an entrywise rule may know of whole updates, `stream` how the same functions work on
blocks of rows.
"""
