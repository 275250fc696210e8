"""The journal: an append-only file set a gateway process, which survives its end at any instruction.

In go records of admitted, progressing and settled calls, out they come in the same order, whoever reads. It never
decides what a record means.
"""
