"""One way to time every operator, with a table of cases for each: `python -m afa_kernels.bench`, benchmarks/run.py."""
