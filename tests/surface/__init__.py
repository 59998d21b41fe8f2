"""The surface of Tinker's SDK as names and signatures, and how much of it the client has."""
