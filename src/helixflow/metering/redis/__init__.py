"""Limits and budgets of several gateways, counted in one Redis or Valkey (6 or newer, no cluster).

In go a gateway's demands and settlements, out come leave or refusals, in one round trip each; and what holds while the
server is away. Counts nothing that the ledger does not: when all is lost there, budgets begin again with its sums.

The parts: `resp` the protocol without I/O, `connection` one socket, `link` how it is made; the scripts (`*.lua`), which
do all that must happen at once; `plan` what a caller's policies are there; `calls` what of this gateway is under way,
`membership` how it joins and what it restores, `loading` how budgets begin, `leases` and `fallback` the time without;
`redis_limiter` puts them together. `closing` is for the shipper: what becomes of a dead gateway's holds.
"""
