"""Compiles the kernels ahead of the first start, for images that have no compiler later.

python -m tinsmithd.sampler.engines.transformers.native FOLDER makes those of all CPUs; the setting
`sampler.native_folder` then names it.
"""

import sys

from tinsmithd.sampler.engines.transformers.native.compiling import VARIANTS, compiled, kept_in

if __name__ == "__main__":
    for variant in VARIANTS:
        print(compiled(variant, kept_in("".join(sys.argv[1:2]))))
