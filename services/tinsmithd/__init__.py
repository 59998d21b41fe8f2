"""The servers."""

import os

# A line for each handshake that fails would let anybody fill a log. gRPC asks once, when it is
# imported; `GRPC_VERBOSITY=INFO` shows them.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
