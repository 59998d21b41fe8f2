"""The only translator between the contract's messages and the domain's values.

`x_from_pb` reads and refuses what no server could mean, naming the field; `x_to_pb` writes.
What only a particular server can refuse (a vocabulary, a limit) is checked below the servicers.
"""
