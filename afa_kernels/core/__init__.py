"""What every operator stands on: choosing a backend, checking arguments, calling kernels, counting taps."""
