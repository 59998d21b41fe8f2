"""The only translator between the contract's messages and the domain's values.

`x_from_pb` reads and refuses what no server could mean: it raises `InvalidArgument` that names
`field`, or a field below it. `field` is where the message stands in its request, such as
`header.checkpoint_path`. `x_to_pb` writes, and cannot fail.
What only a particular server can refuse (a vocabulary, a limit) is checked below the servicers.
"""
