"""What requests use: limits and budgets that they must fit, prices, the journal, and the way to the ledger.

In comes a validated call, out comes leave to dispatch it, or a refusal; once it has ended, a record of what it used.
Every admitted call is settled exactly once. Knows no database: the ledger is behind `clients`.
"""
