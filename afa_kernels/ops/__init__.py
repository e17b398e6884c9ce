"""The operators, a folder each, all of one shape.

    functional.py      the formula, the public functions with their checks, forward, backward, registration
    reference.py       the formula in plain PyTorch, the oracle of the others; of production only the gradient of
                       PAR's images runs through it
    native.py          calls into the compiled module
    triton_impl.py     the same functions in Triton
    losses.py, triton_kernels.py   of the affinity, which has a loss and larger kernels
    modules.py         the operator as torch modules, where there are any

`afa_kernels.core.implementations` says what a front may expect of native.py and triton_impl.py. A new operator copies
the shape of `diffusion`, the smallest.
"""
