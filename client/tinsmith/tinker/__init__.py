"""Programs that say `import tinker` run on this client, unchanged.

    python -m tinsmith.tinker script.py --option   # a script with its arguments
    python -m tinsmith.tinker -m package.module    # a module

or, before anything imports `tinker`:

    import tinsmith.tinker

    tinsmith.tinker.install()

The name is bound for the whole program: its modules, and processes that it starts.
"""

from tinsmith.tinker._finder import install
from tinsmith.tinker._modules import SDK_VERSION

__all__ = ["SDK_VERSION", "install"]
