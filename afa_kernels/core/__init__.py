"""What every operator stands on: choosing a backend, checking arguments, calling kernels, counting taps.

Nothing in here knows an operator by name.
"""
