"""The ledger: what every admitted request used and cost, and its roll-ups by hour, by day and by tag.

In come shipments of journals, exactly once each; out go spend, usage and single requests. All SQL of these tables lives
here. Rows and roll-ups change in one transaction, so that their sums agree at any moment.
"""
