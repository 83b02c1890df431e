"""What adapters are, how they agree and fight, and what a merge leaves of them: numbers, sentences, a
page.
"""
