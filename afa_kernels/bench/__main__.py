"""`python -m afa_kernels.bench`."""

import sys

from .command import main

sys.exit(main())
