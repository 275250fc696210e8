"""The way of the journals to the ledger: what the shipper process of a node does.

In come the records of all gateways of this node, out go rows: one for each admitted call, in the order of the journal,
exactly once. Never decides what a call costs, and never throws away what the ledger has not acknowledged.
"""
