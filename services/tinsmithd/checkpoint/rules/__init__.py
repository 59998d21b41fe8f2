"""What may happen to checkpoints: how store and catalogue move together."""

from tinsmithd.checkpoint.rules.clocks import REAL_CLOCKS, Clocks
from tinsmithd.checkpoint.rules.keeper import EXPIRY_GRACE_S, Keeper
from tinsmithd.checkpoint.rules.leases import HOLD_LEASES
from tinsmithd.checkpoint.rules.write import Header, Write

__all__ = ["EXPIRY_GRACE_S", "HOLD_LEASES", "REAL_CLOCKS", "Clocks", "Header", "Keeper", "Write"]
