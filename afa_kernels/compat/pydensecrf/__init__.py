"""What clients call of pydensecrf, on this project's kernels: in them ``import afa_kernels.compat.pydensecrf.densecrf
as dcrf`` and ``from afa_kernels.compat.pydensecrf.utils import ...`` are the only changes.
"""
