"""Back-ups of a cluster's folders: taken while it runs, checked, and restored elsewhere."""

from tinsmithd.backup.creating import Made, create
from tinsmithd.backup.place import About, BackupError
from tinsmithd.backup.restoring import Restored, restore
from tinsmithd.backup.verifying import Verified, verify

__all__ = ["About", "BackupError", "Made", "Restored", "Verified", "create", "restore", "verify"]
