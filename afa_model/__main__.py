"""`python -m afa_model` is `afa`; on several GPUs `torchrun --nproc-per-node N -m afa_model train ...`."""

import sys

from .cli import main

sys.exit(main())
